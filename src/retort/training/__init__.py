"""One student: batches, and transformers' Trainer around them.

Read `run` first, then `loop`.
"""
