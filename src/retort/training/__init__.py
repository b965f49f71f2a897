"""One student: losses, batches, and transformers' Trainer around them.

Read `losses` first, then `run`; `fused_loss` is the same arithmetic without the whole logits in memory.
"""
