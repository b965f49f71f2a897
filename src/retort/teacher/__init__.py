"""Sequences to distributions: the teacher reads the corpus once, part by part, and the parts become one cache.

Read `scoring` first, then `worker` and `merge`.
"""
