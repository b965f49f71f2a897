"""One student: losses, batches, and transformers' Trainer around them.

Read `losses` first, then `run`; `fused_loss` computes the same losses without all logits in memory.
"""
