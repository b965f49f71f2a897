"""What tests share: tiny models and caches, places in which Snakemake runs, servers, a SLURM cluster."""
