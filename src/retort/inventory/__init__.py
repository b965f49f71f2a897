"""Results on disk, long after they were made: listed, shown, compared, and removed.

Read `layout` first: which folder is which artifact.
"""
