"""The losses of a student, and the same without all its logits in memory.

Read `terms` first; `fused_loss` computes them chunk by chunk, `model_loss` puts them into a model's forward pass.
"""
