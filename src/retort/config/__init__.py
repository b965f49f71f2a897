"""Every setting: type, range, default, checks across keys, runs and sweeps.

Read `sections` first (what a config contains), then `load` (from YAML to one checked record per run).
"""
