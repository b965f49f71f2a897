"""Every setting: type, range, default, checks across keys, runs and sweeps.

Read `training` or another section first (its keys, and its checks), then `load` (from YAML to one checked record per
run).
"""
