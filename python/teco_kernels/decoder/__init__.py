"""The slim decoder loop."""
