"""The summary table of runs, and the report page with its figures.

Read `records` first (what is read of each run), then `page`.
"""
