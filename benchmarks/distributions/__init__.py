"""A teacher's distributions over 32,768 tokens, made offline on the CPU from text found on this machine.

The mixture of a small GPT and n-grams that the benchmarks of the cache, of feeding and of quality read. Start with
`build.py`.
"""
