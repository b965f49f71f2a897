"""The teacher's pass beside its bare forward and beside the plain loop (`__main__.py`)."""
