"""Adapters to other engines: thin, each optional, none imported by the rest of the package."""
