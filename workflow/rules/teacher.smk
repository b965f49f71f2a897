# The teacher runs once: resolve_teacher or demo_teacher -> score_validation, plan -> generate_logits -> merge_h5.
# Large results (the demo's model, parts, the merged cache) are beside the declared outputs, which are small records:
# Snakemake deletes declared outputs before it makes them again, and must never delete hours of GPU work.


rule resolve_teacher:
    input:
        check=check_unless(f"{CACHE}/teachers/{{teacher}}/fingerprint.json"),
    output:
        f"{CACHE}/teachers/{{teacher}}/fingerprint.json",
    log:
        "logs/resolve_teacher/{teacher}.log",
    wildcard_constraints:
        teacher="[0-9a-f]{12}",
    localrule: True
    params:
        **command("resolve_teacher", "teacher"),
    message:
        "Recording the fingerprint of teacher {wildcards.teacher}"
    shell:
        "{params.script} --config {params.config:q} --output {output:q} >> {log:q} 2>&1"


rule demo_teacher:
    input:
        check=check_unless(f"{CACHE}/teachers/{{teacher}}/fingerprint.json"),
        corpus=ancient(get_corpus),
    output:
        f"{CACHE}/teachers/{{teacher}}/fingerprint.json",
    log:
        "logs/demo_teacher/{teacher}.log",
    wildcard_constraints:
        teacher="demo-[0-9a-f]{12}",
    threads: 2
    resources:
        gpu=1,
    params:
        **command("demo_teacher", "demo_teacher"),
    message:
        "Training the demo's teacher and its tokenizer"
    shell:
        "{params.script} --config {params.config:q} --corpus {input.corpus:q} --output {output:q} >> {log:q} 2>&1"


rule score_validation:
    input:
        index=ancient(get_index),
        fingerprint=ancient(get_fingerprint),
        check=check_unless(
            f"{CACHE}/validation/{{validation}}/teacher_validation.safetensors"
        ),
    output:
        f"{CACHE}/validation/{{validation}}/teacher_validation.safetensors",
    log:
        "logs/score_validation/{validation}.log",
    threads: get_cpu_threads
    resources:
        gpu=get_teacher_gpus,
    params:
        **command("score_validation", "validation"),
    message:
        "The teacher scores the held-out text"
    shell:
        "{params.script} --config {params.config:q} --index {input.index:q}"
        " --fingerprint {input.fingerprint:q} --output {output:q} >> {log:q} 2>&1"


rule plan:
    # After the held-out scores: what this teacher's distributions take is measured on them, before hours of GPU work.
    input:
        index=ancient(get_index),
        fingerprint=ancient(get_fingerprint),
        features=ancient(get_features),
    output:
        f"{CACHE}/logits/{{logits}}/plan.json",
    log:
        "logs/plan/{logits}.log",
    localrule: True
    params:
        **command("plan", "logits"),
    message:
        "Estimating the size of the cache"
    shell:
        "{params.script} --config {params.config:q} --index {input.index:q}"
        " --fingerprint {input.fingerprint:q} --features {input.features:q} --output {output:q} >> {log:q} 2>&1"


rule generate_logits:
    input:
        index=ancient(get_index),
        fingerprint=ancient(get_fingerprint),
        plan=ancient(rules.plan.output[0]),
        check=check_unless(f"{CACHE}/logits/{{logits}}/manifest.json"),
    output:
        temp(f"{CACHE}/logits/{{logits}}/metadata_worker{{worker}}.json"),
    log:
        "logs/generate_logits/{logits}_{worker}.log",
    threads: get_cpu_threads
    resources:
        gpu=get_teacher_gpus,
    params:
        **command("generate_logits", "logits"),
        num_workers=get_num_workers,
    message:
        "The teacher scores the text: worker {wildcards.worker} of {params.num_workers}"
    shell:
        "{params.script} --config {params.config:q} --index {input.index:q}"
        " --fingerprint {input.fingerprint:q} --worker {wildcards.worker} --num-workers {params.num_workers}"
        " --output {output:q} >> {log:q} 2>&1"


rule merge_h5:
    input:
        receipts=ancient(get_receipts),
        index=ancient(get_index),
        fingerprint=ancient(get_fingerprint),
        features=ancient(get_features),
    output:
        f"{CACHE}/logits/{{logits}}/manifest.json",
    log:
        "logs/merge_h5/{logits}.log",
    params:
        **command("merge_h5", "logits"),
    message:
        "Merging the parts of cache {wildcards.logits}"
    shell:
        "{params.script} --config {params.config:q} --index {input.index:q}"
        " --fingerprint {input.fingerprint:q} --features {input.features:q} --output {output:q} >> {log:q} 2>&1"
