"""Logits that others have published, as caches of ours: read file by file, checked, and stored with their tokens."""
