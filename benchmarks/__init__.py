"""Measurements of Retort beside named opponents. Start one from the repository root: python -m benchmarks.<name> --help

    cache           bytes against error of the cache, beside other caches
    cache.merge     merging parts beside cp
    teacher         the teacher's pass beside its bare forward
    training        a training step beside cross-entropy
    training.feeding    how long a step waits for its batch
    training.stored     the same with a cache in an object store
    quality         what a student keeps of the teacher, by bytes a position
    defaults        cache method, temperature, alpha and learning rate by size of the student
    workflow.groups     one to eight GPU groups
    workflow.graph      planning 10,000 shards
    workflow.submissions    shards on a SLURM cluster
    distributions   the teacher's distributions that cache, feeding and quality read; they make them where needed

`make benchmark-<name>` runs the same; results are in docs/benchmarks.md.
"""
