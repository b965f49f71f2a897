"""From documents to sequences of token ids on disk.

Read `sequences` first (the unit that a teacher scores and a student trains on), then `tokenize`, `shards` and `index`.
"""
