"""What a job runs on: GPUs and who holds them, ranks of one training, time limits, SLURM, and why jobs failed.

Read `gpus` first, then `leases`.
"""
