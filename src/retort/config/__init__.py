"""Every setting: type, range, default, checks across keys, runs and sweeps.

Read `sections` first (what a config holds), then `load` (from YAML to one checked record for each run).
"""
