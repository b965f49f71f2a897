"""What people look at: the table, the page, the figures.

Read `records` first (what is read of each run), then `page`.
"""
