# Training a student on the text, the cache, or both.


rule train:
    input:
        index=ancient(get_index),
        signal=ancient(get_signal),
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
        " --signal {input.signal:q} --output {output:q} >> {log:q} 2>&1"
