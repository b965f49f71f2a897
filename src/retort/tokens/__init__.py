"""Documents become sequences of token ids on disk.

Read `sequences` first (the record that everything later is paired with), then `tokenize`, `shards` and `index`.
"""
