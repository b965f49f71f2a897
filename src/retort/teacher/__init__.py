"""Sequences to distributions: the teacher reads the corpus once, part by part, and the parts are merged into one cache.

Read `scoring` first, then `worker` and `merge`.
"""
