# From text to sequences of tokens: check_inputs (-> stage) -> synthesize or draw_corpus -> tokenize_shard -> index_tokens.


rule check_inputs:
    output:
        CHECK,
    log:
        f"logs/check_inputs/{PROJECT.check_id}.log",
    localrule: True
    params:
        **command("check_inputs"),
    message:
        "Checking the inputs: models, vocabularies, corpora, folders"
    shell:
        "{params.script} --config {params.config:q} --output {output:q} >> {log:q} 2>&1"


rule estimate:
    # snakemake estimate --cores 1: what the config needs, and what is assumed for it. It makes nothing.
    log:
        f"logs/estimate/{PROJECT.check_id}.log",
    localrule: True
    params:
        **command("estimate"),
    message:
        "Estimating tokens, bytes, memory and hours"
    shell:
        "{params.script} --config {params.config:q} >> {log:q} 2>&1"


rule stage:
    # snakemake stage --cores 2, on a machine with a network: downloads what the other machines will need.
    input:
        check=ancient(CHECK),
        made=ancient(get_staged),
    log:
        f"logs/stage/{PROJECT.check_id}.log",
    localrule: True
    params:
        **command("stage"),
    message:
        "Downloading models and datasets from the Hub"
    shell:
        "{params.script} --config {params.config:q} >> {log:q} 2>&1"


rule synthesize:
    # The journal of answers, which were paid for, is one folder up; the responses are beside the record.
    input:
        check=check_unless(
            f"{CACHE}/syntheses/{{answers}}/{{synthesis}}/synthesis.json"
        ),
    output:
        f"{CACHE}/syntheses/{{answers}}/{{synthesis}}/synthesis.json",
    log:
        "logs/synthesize/{answers}_{synthesis}.log",
    wildcard_constraints:
        answers="[0-9a-f]{12}",
    threads: get_cpu_threads
    resources:
        gpu=get_teacher_gpus,
    params:
        **command("synthesize", "synthesis"),
    message:
        "A model writes responses: {wildcards.answers}"
    shell:
        "{params.script} --config {params.config:q} --output {output:q} >> {log:q} 2>&1"


# With responses from a server. It needs no GPU but a network, which compute nodes often lack, so it is a local rule.
use rule synthesize as synthesize_online with:
    wildcard_constraints:
        answers="api-[0-9a-f]{12}",
    localrule: True
    threads: 1
    resources:
        gpu=0,


rule draw_corpus:
    input:
        check=check_unless(f"{CACHE}/corpora/{{corpus}}/corpus{{reader}}.json"),
    output:
        f"{CACHE}/corpora/{{corpus}}/corpus{{reader}}.json",
    log:
        "logs/draw_corpus/{corpus}{reader}.log",
    params:
        **command("draw_corpus", "corpus"),
        reader=get_reader,
    message:
        "Reading the corpus {wildcards.corpus}{wildcards.reader}"
    shell:
        "{params.script} --config {params.config:q} --reader {params.reader} --output {output:q} >> {log:q} 2>&1"


rule tokenize_shard:
    # There may be ten thousand of these jobs: everything here is evaluated and formatted for each.
    input:
        unpack(get_tokenize_inputs),
    output:
        f"{CACHE}/tokens/{{tokens}}/shard_{{shard}}.h5",
    log:
        "logs/tokenize_shard/{tokens}_{shard}.log",
    params:
        **command("tokenize_shard", "tokens"),
    shell:
        "{params.script} --config {params.config:q} --corpus {input.corpus:q} --shard {wildcards.shard}"
        " --output {output:q} >> {log:q} 2>&1"


rule index_tokens:
    input:
        ancient(get_shards),
    output:
        f"{CACHE}/tokens/{{tokens}}/index.json",
    log:
        "logs/index_tokens/{tokens}.log",
    localrule: True
    params:
        **command("index_tokens", "tokens"),
    message:
        "Listing the parts of teacher work in {output}"
    shell:
        "{params.script} --config {params.config:q} --shards {input:q} --output {output:q} >> {log:q} 2>&1"
