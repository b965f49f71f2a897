"""The cache in other people's training code: a dataset, a collator, losses (docs/library.md).

`retort` itself exports these names.
"""
