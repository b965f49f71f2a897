"""The cache: bytes against error beside other caches (`__main__.py`), and merging its parts beside cp (`merge.py`)."""
