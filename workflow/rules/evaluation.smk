# Comparing students with the teacher on held-out text, and running benchmarks on both.


rule evaluate:
    input:
        training=ancient(rules.train.output[0]),
        index=ancient(get_index),
        features=ancient(get_features),
        signal=ancient(get_signal),
    output:
        f"{RESULTS}/runs/{{run}}/{{id}}/evaluation/{{evaluation}}/metrics.json",
    log:
        "logs/evaluate/{run}_{id}_{evaluation}.log",
    threads: get_cpu_threads
    resources:
        gpu=get_evaluation_gpus,
    params:
        **command("evaluate", "evaluation"),
    message:
        "Evaluating the student {wildcards.run}"
    shell:
        "{params.script} --config {params.config:q} --index {input.index:q} --training {input.training:q}"
        " --features {input.features:q} --signal {input.signal:q} --output {output:q} >> {log:q} 2>&1"


rule benchmark:
    input:
        record=ancient(rules.train.output[0]),
        check=check_unless(
            f"{RESULTS}/runs/{{run}}/{{id}}/benchmarks/{{task}}/{{benchmark}}/benchmark.json"
        ),
    output:
        f"{RESULTS}/runs/{{run}}/{{id}}/benchmarks/{{task}}/{{benchmark}}/benchmark.json",
    log:
        "logs/benchmark/{run}_{id}_{task}_{benchmark}.log",
    threads: get_cpu_threads
    resources:
        gpu=get_evaluation_gpus,
    params:
        **command("benchmark", "task"),
    message:
        "Benchmark {wildcards.task} of the student {wildcards.run}"
    shell:
        "{params.script} --config {params.config:q} --task {wildcards.task:q} --record {input.record:q}"
        " --output {output:q} >> {log:q} 2>&1"


use rule benchmark as benchmark_teacher with:
    input:
        record=ancient(f"{CACHE}/teachers/{{teacher}}/fingerprint.json"),
        check=check_unless(
            f"{CACHE}/teachers/{{teacher}}/benchmarks/{{task}}/{{benchmark}}/benchmark.json"
        ),
    output:
        f"{CACHE}/teachers/{{teacher}}/benchmarks/{{task}}/{{benchmark}}/benchmark.json",
    log:
        "logs/benchmark/teacher_{teacher}_{task}_{benchmark}.log",
    threads: get_cpu_threads
    resources:
        gpu=get_teacher_gpus,
    message:
        "Benchmark {wildcards.task} of the teacher"
