"""Documents from local files, the Hub and streams, in one fixed order, each assigned to exactly one shard.

Read `documents` first, then `reading`; `sharding` proves that no document is lost or read twice.
"""
