# A student is compared with its teacher on held-out text.


rule evaluate:
    input:
        training=ancient(rules.train.output[0]),
        index=ancient(get_index),
        features=ancient(get_features),
        signal=ancient(get_manifest),
    output:
        f"{RESULTS}/runs/{{run}}/{{id}}/evaluation/{{evaluation}}/metrics.json",
    log:
        "logs/evaluate/{run}_{id}_{evaluation}.log",
    threads: get_cpu_threads
    resources:
        gpu=get_evaluation_gpus,
    params:
        script=SCRIPTS.format("evaluate"),
        flags=get_evaluation_flags,
    message:
        "Evaluating the student {wildcards.run}"
    shell:
        "{params.script} --index {input.index:q} --training {input.training:q}"
        " --features {input.features:q} --signal {input.signal:q} --output {output:q} {params.flags}"
        " >> {log:q} 2> >(trap '' TERM; tee -a {log:q} >&2)"
