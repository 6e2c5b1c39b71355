"""What `bench/compare_peers.py` is made of: the plan, the rounds, the results, the tables and the picture."""
