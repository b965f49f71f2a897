"""Before and around the rules: the check of all inputs, fetching for nodes without a network, the demo's teacher.

Read `preflight` first.
"""
