"""Documents in one fixed order, each in exactly one shard: local files, the Hub, streams.

Read `documents` first, then `reading`; `sharding` proves that no document is lost or read twice.
"""
