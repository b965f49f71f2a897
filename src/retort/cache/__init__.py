"""The teacher's distributions to bytes and back: the codec and the files of the logit cache (docs/cache-format.md).

Read `codec` first, then `reader`. `top_k_codec` codes records of `top_k`; `entropy_codec`, `sparse_streams`,
`stream_writer`, `stream_reader` and `entropy` those of `top_p` and `sampled`.
"""
