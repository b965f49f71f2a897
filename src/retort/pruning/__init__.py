"""A student that starts as a part of another model: the layers to keep, and the weights that follow from them.

Read `shapes` first, then `cut` and `run`.
"""
