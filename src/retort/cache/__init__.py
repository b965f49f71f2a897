"""Distributions to bytes and back: the codec and the files of the logit cache (docs/cache-format.md).

Read `codec` first, then `reader`; `sparse_streams` and `entropy` are the coded methods.
"""
