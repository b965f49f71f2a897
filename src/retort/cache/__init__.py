"""The teacher's distributions to bytes and back: the codec and the files of the logit cache (docs/cache-format.md).

Read `codec` first, then `reader`. `sparse_codec`, `sparse_streams`, `stream_writer`, `stream_reader` and `entropy` code
the records of `top_p` and `sampled`.
"""
