"""What a student keeps of its teacher, by bytes a position of the cache. Start with `__main__.py`."""
