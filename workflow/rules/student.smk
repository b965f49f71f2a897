# Where a student starts, and its training on the text, the cache, or both: prune_teacher (if asked) -> train.


rule prune_teacher:
    # Shared by all runs that start from the same part of the same model.
    input:
        fingerprint=ancient(get_pruned_fingerprint),
        index=ancient(get_pruning_index),
        check=check_unless(f"{CACHE}/pruned/{{pruned}}/pruned.json"),
    output:
        f"{CACHE}/pruned/{{pruned}}/pruned.json",
    log:
        "logs/prune_teacher/{pruned}.log",
    threads: get_cpu_threads
    resources:
        gpu=get_pruning_gpus,
    params:
        **command("prune_teacher", "pruned"),
    message:
        "Pruning the model that students start from: {wildcards.pruned}"
    shell:
        "{params.script} --config {params.config:q} --fingerprint {input.fingerprint:q}"
        " --index {input.index:q} --output {output:q} >> {log:q} 2>&1"


rule train:
    input:
        index=ancient(get_index),
        signal=ancient(get_signal),
        start=ancient(get_start),
        features=ancient(get_watched_features),
        check=check_unless(f"{RESULTS}/runs/{{run}}/{{id}}/training.json"),
    output:
        f"{RESULTS}/runs/{{run}}/{{id}}/training.json",
    log:
        "logs/train/{run}_{id}.log",
    threads: get_cpu_threads
    resources:
        **SEVERAL_NODES,
        gpu=get_training_gpus,
    params:
        **command("train", "run"),
        srun=get_srun,
    message:
        "Training the student {wildcards.run}"
    shell:
        "{params.srun} {params.script} --config {params.config:q} --index {input.index:q}"
        " --signal {input.signal:q} --start {input.start:q} --features {input.features:q}"
        " --output {output:q} >> {log:q} 2>&1"
