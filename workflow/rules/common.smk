# Shared by the rules: the artifacts of the config, and get_* functions from wildcards to inputs.
# Every job parses this file again, so nothing here may import torch.
import inspect
import json
import os
import shlex
import sys
from pathlib import Path

from retort.artifacts.build import build_project
from retort.artifacts.jobs import Jobs
from retort.config.config_files import load_source, locate, read_files
from retort.config.sweeps import prefer_command_line
from retort.config.yaml_source import Source
from retort.corpus.sources import is_hub
from snakemake.common.configfile import load_configfile
from snakemake.exceptions import WorkflowError
from snakemake.io import flag
from snakemake.path_modifier import PATH_MODIFIER_FLAG
from snakemake.settings.enums import Quietness
from snakemake.utils import update_config


def place_outputs(config):
    """Return the config with the `prefix` of a module in its output folders, when another Snakefile uses this one.

    Snakemake adds a module's prefix to its rules' paths, but not to flags. So it is added to the folders here, and not
    again to inputs and outputs, which are below them. Logs get it from Snakemake.
    """
    modifier = workflow.modifier.path_modifier

    def keep(path, property=None):
        if property not in ("input", "output") or callable(path):
            return type(modifier).modify(modifier, path, property)
        return flag(modifier.apply_default_storage(path), PATH_MODIFIER_FLAG)

    output = config.get("output") or {}
    if not isinstance(output, dict):
        return config  # load_source will refuse it
    output = dict(output)
    for key, default in {"results_dir": "results", "cache_dir": None}.items():
        if folder := output.get(key, default):
            output[key] = modifier.replace_prefix(f"{folder}/").removesuffix("/")
    modifier.modify = keep
    return {**config, "output": output}


def read_source():
    """Return the config as it is written, with lines: the files and --config are read again, as Snakemake merges them.

    Lines are not known of a module's config, nor of one that another Snakefile has changed.
    """
    if not workflow.modifier.is_main_snakefile():
        return Source(place_outputs(config))
    settings = workflow.config_settings
    files = workflow.configfiles[len(settings.configfiles) :]  # of `configfile:`
    merged = {}
    for path in files:
        update_config(merged, load_configfile(path))
    update_config(merged, settings.overwrite_config)
    if merged == config:
        paths = [Path(path).absolute() for path in [*files, *settings.configfiles]]
        if source := read_files(paths, settings.config):
            return source
    return Source(prefer_command_line(config, settings.config))


SOURCE = Source({})
try:
    SOURCE = read_source()
    PROJECT = build_project(load_source(SOURCE))
except ValueError as error:
    raise WorkflowError(f"Nothing was started. {locate(error, SOURCE)}") from None

config = SOURCE.values  # as written: a run may be named no, or 010

# With the names of the config files, which each result records.
JOBS = Jobs(
    PROJECT, source=", ".join(Path(file).name for file in workflow.configfiles)
)
WHOLE_CONFIG = json.dumps(config, sort_keys=True)

OUTPUT = next(iter(PROJECT.runs.values())).config.output
RESULTS = OUTPUT.results_dir
CACHE = OUTPUT.cache_dir or RESULTS
CHECK = f"{RESULTS}/checks/{PROJECT.check_id}/inputs.json"
REPORT = f"{RESULTS}/reports/{PROJECT.report_id}/report.html"
PYTHON = shlex.quote(sys.executable)
# Relative to this file; workflow.basedir would be that of a Snakefile that uses this one as a module.
WORKFLOW = Path(workflow.current_basedir.get_path_or_uri(secret_free=False)).parent
SCRIPTS = f"{PYTHON} {shlex.quote(str(WORKFLOW / 'scripts'))}/{{}}.py"

# A time limit or scancel sends SIGTERM to all processes of a job. The script exits cleanly on it, and bash (trap) waits
# for that. A script's stdout and stderr are its log; messages for the terminal go to the shell's stderr, which
# retort.cli finds by RETORT_CONSOLE. There are no progress bars with --quiet progress or all.
IS_QUIET = {Quietness.ALL, Quietness.PROGRESS} & set(
    workflow.output_settings.quiet or ()
)
shell.prefix(
    "set -euo pipefail; trap : TERM; exec 3>&2;"
    f" export RETORT_CONSOLE=/proc/$$/fd/3 RETORT_PROGRESS={int(not IS_QUIET)}; "
)


wildcard_constraints:
    answers="(api-)?[0-9a-f]{12}",
    synthesis="[0-9a-f]{12}",
    corpus="[0-9a-f]{12}",
    reader="(_[0-9]{5})?",
    teacher="(demo-)?[0-9a-f]{12}",
    tokens="[0-9a-f]{12}",
    logits="[0-9a-f]{12}",
    validation="[0-9a-f]{12}",
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


def job(kind):
    """Return a params function: the JSON of the job that makes an artifact of a kind, for a script's --config."""
    return for_many_jobs(
        lambda wildcards: JOBS.format(kind, dict(wildcards.items()))
    )


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
    """Return the inputs of `stage` that other rules make: records of teachers, and corpora that need a network."""
    teachers = [t.folder for t in PROJECT.teachers.values() if t.corpus is None]
    corpora = [
        corpus
        for corpus in PROJECT.corpora.values()
        if is_hub(corpus.dataset) or (corpus.synthesis and corpus.synthesis.is_online)
    ]
    records = [str(record) for corpus in corpora for record in corpus.records]
    return [*(f"{folder}/fingerprint.json" for folder in teachers), *records]


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
def get_tokenizer(wildcards):
    """Return the record of the teacher whose tokenizer is used, if any, and the check if nothing else depends on it.

    The jobs that make records wait for the check, so ten thousand jobs need not have it as an input too.
    """
    tokens = find(wildcards)
    record = [f"{tokens.teacher.folder}/fingerprint.json"] if tokens.teacher else []
    shard = f"{tokens.folder}/shard_{wildcards.shard}.h5"
    made = [*record, *get_corpus(wildcards)]
    is_checked = not all(map(os.path.exists, made)) or os.path.exists(shard)
    return record if is_checked else [*record, CHECK]


def get_shards(wildcards):
    tokens = find(wildcards)
    num_shards = tokens.corpus.dataset.num_shards
    return [f"{tokens.folder}/shard_{s:05d}.h5" for s in range(num_shards)]


def get_index(wildcards):
    return f"{find(wildcards).tokens.folder}/index.json"


def get_fingerprint(wildcards):
    return f"{find(wildcards).teacher.folder}/fingerprint.json"


def get_receipts(wildcards):
    workers = range(get_num_workers(wildcards))
    return [f"{find(wildcards).folder}/metadata_worker{w}.json" for w in workers]


def get_features(wildcards):
    """Return the teacher's exact distributions on held-out text, for the fidelity of a cache or the metrics of a run."""
    found = find(wildcards)
    if "run" in wildcards.keys():
        validations = [found.validation] if found.validation else []
    else:
        pair = (found.tokens.id, found.teacher.id)
        validations = [
            v
            for v in PROJECT.validations.values()
            if (v.tokens.id, v.teacher.id) == pair
        ][:1]
        # An existing cache is not merged again when other positions are to be evaluated.
        if Path(f"{found.folder}/manifest.json").exists():
            validations = [v for v in validations if v.features.exists()]
    return [str(v.features) for v in validations]


def get_signal(wildcards):
    """Return what a run learns from: the manifest of the cache, or the record of its teacher; [] without a teacher."""
    run = find(wildcards)
    if run.logits:
        return [f"{run.logits.folder}/manifest.json"]
    return [f"{run.teacher.folder}/fingerprint.json"] if run.teacher else []


def get_all_metrics(wildcards):
    return [str(run.metrics_path) for run in PROJECT.runs.values()]


def get_all_benchmarks(wildcards):
    return [str(path) for path in PROJECT.tasks]
