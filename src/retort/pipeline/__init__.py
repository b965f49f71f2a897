"""Around the rules: the command `retort`, the check of all inputs, downloads for offline nodes, the demo's teacher.

Read `preflight` first.
"""
