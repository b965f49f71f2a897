"""Numbers of a model on held-out text and on tasks, each with an interval.

Read `run` first, then `scores`.
"""
