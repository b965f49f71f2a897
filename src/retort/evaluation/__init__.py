"""Metrics of a model on held-out text and its scores on benchmark tasks, each with an interval.

Read `run` first, then `scores`.
"""
