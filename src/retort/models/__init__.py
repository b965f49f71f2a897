"""Load, build and sample models: the only package that knows transformers' model classes.

Read `load` first.
"""
