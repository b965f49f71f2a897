# Shared by the rules: get_* functions from wildcards to inputs, and the command of a job.
import inspect
import os


wildcard_constraints:
    answers="(api-)?[0-9a-f]{12}",
    synthesis="[0-9a-f]{12}",
    corpus="[0-9a-f]{12}",
    reader="(_[0-9]{5})?",
    teacher="(demo-)?[0-9a-f]{12}",
    tokens="[0-9a-f]{12}",
    logits="[0-9a-f]{12}",
    validation="[0-9a-f]{12}",
    pruned="[0-9a-f]{12}",
    id="[0-9a-f]{12}",
    evaluation="[0-9a-f]{12}",
    task="[^/]+",
    benchmark="[0-9a-f]{12}",
    run="[A-Za-z0-9][A-Za-z0-9._-]*",
    shard="[0-9]{5}",
    worker="[0-9]+",


def for_many_jobs(function):
    """Keep a function's signature: Snakemake asks for it several times for each of ten thousand jobs."""
    function.__signature__ = inspect.signature(function)
    return function


def command(script, kind=None):
    """Return a rule's params: its script and its --config, of the job that makes an artifact of a kind, or the whole."""

    def get_config(wildcards):
        if kind is None:
            return write_config(WHOLE_CONFIG)
        return JOBS.format(kind, dict(wildcards.items()))

    return {"script": SCRIPTS.format(script), "config": for_many_jobs(get_config)}


def find(wildcards):
    """Return the artifact that a job's wildcards name."""
    return PROJECT.find(dict(wildcards.items()))


def check_unless(output):
    """Return an input function: the check of all inputs, unless `output` exists.

    The check is of the whole config; outputs of an earlier config must not wait for it, or be made again.
    """

    def get_check(wildcards):
        return [] if Path(output.format(**wildcards)).exists() else [ancient(CHECK)]

    return get_check


def get_staged(wildcards):
    return [str(path) for path in PROJECT.staged_records]


@for_many_jobs
def get_corpus(wildcards):
    """Return the records of the corpus of a demo_teacher or tokenize_shard job, if a rule makes that corpus.

    If each shard has its own reader, the job waits for that reader only.
    """
    records = [str(record) for record in find(wildcards).corpus.records]
    has_readers = len(records) > 1 and "shard" in wildcards.keys()
    return [records[int(wildcards.shard)]] if has_readers else records


def get_reader(wildcards):
    return int(wildcards.reader.removeprefix("_") or 0)


@for_many_jobs
def get_tokenize_inputs(wildcards):
    """Return the corpus and the record of the teacher whose tokenizer is used, if any, and the check if neither needs it.

    The jobs that make records wait for the check, so ten thousand jobs need not have it as an input too.
    """
    tokens, corpus = find(wildcards), get_corpus(wildcards)
    record = [f"{tokens.teacher.folder}/fingerprint.json"] if tokens.teacher else []
    shard = f"{tokens.folder}/shard_{wildcards.shard}.h5"
    needed = [*record, *corpus]
    is_checked = os.path.exists(shard) or not all(map(os.path.exists, needed))
    before = record if is_checked else [*record, CHECK]
    return {"corpus": ancient(corpus), "before": ancient(before)}


def get_shards(wildcards):
    tokens = find(wildcards)
    shards = range(tokens.corpus.dataset.num_shards)
    return [f"{tokens.folder}/shard_{shard:05d}.h5" for shard in shards]


def get_index(wildcards):
    return f"{find(wildcards).tokens.folder}/index.json"


def get_fingerprint(wildcards):
    return f"{find(wildcards).teacher.folder}/fingerprint.json"


def get_receipts(wildcards):
    workers = range(get_num_workers(wildcards))
    return [f"{find(wildcards).folder}/metadata_worker{w}.json" for w in workers]


def get_features(wildcards):
    """Return the teacher's exact distributions on held-out text, for the fidelity of a cache or the metrics of a run."""
    return [str(path) for path in PROJECT.find_features(find(wildcards))]


def get_watched_features(wildcards):
    """Return the teachers' held-out scores that a run is compared with while it is trained, if it is.

    A student that exists is not trained again when other positions are to be evaluated.
    """
    run = find(wildcards)
    is_trained = (run.folder / "training.json").exists()
    return [] if is_trained else [str(path) for path in run.watched_features]


def get_signal(wildcards):
    """Return what a run learns from, of each of its teachers; [] without one."""
    return [str(path) for path in find(wildcards).signals]


def get_start(wildcards):
    """Return the record of what a run's student starts from; [] unless that is a part of another model."""
    pruned = find(wildcards).pruned
    return [str(pruned.record)] if pruned else []


def get_pruned_fingerprint(wildcards):
    """Return the record of the teacher to prune; [] for another model."""
    teacher = find(wildcards).teacher
    return [f"{teacher.folder}/fingerprint.json"] if teacher else []


def get_pruning_index(wildcards):
    """Return the index of the tokens that activations are measured on; [] if none are."""
    tokens = find(wildcards).tokens
    return [f"{tokens.folder}/index.json"] if tokens else []


def get_all_metrics(wildcards):
    return [str(run.metrics_path) for run in PROJECT.runs.values()]


def get_all_benchmarks(wildcards):
    return [str(path) for path in PROJECT.tasks]
