"""The workflow: GPU groups that share the teacher's pass, planning a large graph, shards on a SLURM cluster."""
