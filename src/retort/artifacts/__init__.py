"""The artifacts of a config: their ids and folders, known before anything runs.

Read `project` first (the records), then `build` (from configs to ids).
"""
