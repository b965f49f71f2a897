# Shared by the rules: the artifacts of the config, and get_* functions from wildcards to inputs and flags.
# Every job parses this file again, so nothing here may import torch.
import functools
import json
import shlex
import sys
from pathlib import Path

from retort.artifacts.build import build_project
from retort.config.load import load_runs
from retort.config.sweeps import prefer_command_line
from retort.config.flags import section_flags
from retort.corpus.sources import is_hub
from retort.artifacts.responses import local_model
from snakemake.exceptions import WorkflowError
from snakemake.io import flag
from snakemake.path_modifier import PATH_MODIFIER_FLAG
from snakemake.settings.enums import Quietness


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
        return config  # load_runs will refuse it
    output = dict(output)
    for key, default in {"results_dir": "results", "cache_dir": None}.items():
        if folder := output.get(key, default):
            output[key] = modifier.replace_prefix(f"{folder}/").removesuffix("/")
    modifier.modify = keep
    return {**config, "output": output}


if not workflow.modifier.is_main_snakefile():
    config = place_outputs(config)
else:
    config = prefer_command_line(config, workflow.config_settings.config)

try:
    PROJECT = build_project(load_runs(config))
except ValueError as error:
    raise WorkflowError(f"Nothing was started. {error}") from None

OUTPUT = next(iter(PROJECT.runs.values())).config.output
RESULTS = OUTPUT.results_dir
CACHE = OUTPUT.cache_dir or RESULTS
CHECK = f"{RESULTS}/checks/{PROJECT.check_id}.json"
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


def flags(*sections):
    """Return the command-line flags of config sections, quoted for the shell."""
    return " ".join(
        shlex.quote(word) for section in sections for word in section_flags(section)
    )


def check_unless(output):
    """Return an input function: the check of all inputs, unless `output` exists.

    The check is of the whole config; outputs of an earlier config must not wait for it, or be made again.
    """

    def get_check(wildcards):
        return [] if Path(output.format(**wildcards)).exists() else [ancient(CHECK)]

    return get_check


def get_corpus(wildcards):
    """Return the records of the corpus of a demo_teacher or tokenize_shard job, if a rule makes that corpus.

    If each shard has its own reader, the job waits for that reader only.
    """
    if "tokens" in wildcards.keys():
        records = PROJECT.tokens[wildcards.tokens].corpus.records
        if len(records) > 1:
            return [str(records[int(wildcards.shard)])]
        return map(str, records)
    return map(str, PROJECT.teachers[wildcards.teacher].corpus.records)


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


def get_synthesis_flags(wildcards):
    """Return the flags of a synthesis, with those of the model if it runs here. API keys are in the environment."""
    synthesis = PROJECT.syntheses[wildcards.synthesis]
    words = [flags(synthesis.section), flags(synthesis.config.evaluation.of_problems())]
    words.append(f"--stamp {synthesis.stamp}")
    if synthesis.section.provider == "local":
        model, revision = local_model(synthesis.config)
        words.append(f"--local-model {shlex.quote(model)}")
        words.append(f"--local-revision {shlex.quote(revision)}" if revision else "")
        words.append(
            flags(synthesis.config.teacher, synthesis.config.teacher.generation)
        )
    return " ".join(words)


def get_draw_flags(wildcards):
    corpus = PROJECT.corpora[wildcards.corpus]
    reader = int(wildcards.reader.removeprefix("_") or 0)
    return f"--reader {reader} --corpus-stamp {corpus.stamp} {flags(corpus.dataset)}"


def get_tokenize_inputs(wildcards):
    """Return the records of the corpus and of the tokenizer's teacher, and the check if nothing else depends on it.

    The jobs that make these records wait for the check, so ten thousand jobs need not have it as an input too.
    """
    records = [*get_corpus(wildcards), *get_tokenizer(wildcards)]
    shard = f"{CACHE}/tokens/{wildcards.tokens}/shard_{wildcards.shard}.h5"
    is_checked = not all(Path(path).exists() for path in records)
    return records if is_checked or Path(shard).exists() else [*records, CHECK]


def get_tokenize_flags(wildcards):
    return tokenize_flags(wildcards.tokens)


@functools.cache
def tokenize_flags(tokens_id):
    tokens = PROJECT.tokens[tokens_id]
    corpus = (
        f" --corpus {shlex.quote(str(tokens.corpus.folder))}"
        if tokens.corpus.needs_snapshot
        else (
            f" --synthesis {shlex.quote(str(tokens.corpus.synthesis.record))}"
            if tokens.corpus.synthesis
            else f" --corpus-stamp {tokens.corpus.stamp}"
        )
    )
    expected = (
        f" --expected-tokenizer {tokens.fingerprint}" if tokens.fingerprint else ""
    )
    section = tokens.teacher.section if tokens.teacher else None
    trust = " --trust-remote-code" if section and section.trust_remote_code else ""
    return f"{tokenizer_flags(tokens)} {flags(tokens.corpus.dataset)}{corpus}{expected}{trust}"


def tokenizer_flags(tokens):
    """Return the flags that say where a tokenizer is loaded from."""
    words = ["--tokenizer", tokens.tokenizer]
    if tokens.teacher and tokens.teacher.section.revision:
        words += ["--tokenizer-revision", tokens.teacher.section.revision]
    return shlex.join(words)


def get_tokenizer(wildcards):
    """Return the record of the teacher whose tokenizer is used, if it is a teacher's."""
    teacher = PROJECT.tokens[wildcards.tokens].teacher
    return [f"{teacher.folder}/fingerprint.json"] if teacher else []


def get_shards(wildcards):
    num_shards = PROJECT.tokens[wildcards.tokens].corpus.dataset.num_shards
    return [
        f"{CACHE}/tokens/{wildcards.tokens}/shard_{s:05d}.h5" for s in range(num_shards)
    ]


def get_chunk_size(wildcards):
    return PROJECT.tokens[wildcards.tokens].corpus.dataset.streaming_chunk_size


def get_resolve_flags(wildcards):
    return flags(PROJECT.teachers[wildcards.teacher].section)


def get_demo_flags(wildcards):
    teacher = PROJECT.teachers[wildcards.teacher]
    return f"--corpus {shlex.quote(str(teacher.corpus.folder))} {flags(teacher.corpus.dataset)}"


def get_index(wildcards):
    return f"{artifact(wildcards).tokens.folder}/index.json"


def get_fingerprint(wildcards):
    return f"{artifact(wildcards).teacher.folder}/fingerprint.json"


def artifact(wildcards):
    """Return the cache, validation or run that a job's wildcards name."""
    if "logits" in wildcards.keys():
        return PROJECT.logits[wildcards.logits]
    if "validation" in wildcards.keys():
        return PROJECT.validations[wildcards.validation]
    return PROJECT.runs[wildcards.run]


def get_teacher_flags(wildcards):
    found = artifact(wildcards)
    path = shlex.quote(found.teacher.model_path)
    return f"--teacher {path} {flags(found.config.teacher, found.config.teacher.generation)}"


def get_cache_flags(wildcards):
    return flags(PROJECT.logits[wildcards.logits].config.cache)


def get_merge_flags(wildcards):
    config = PROJECT.logits[wildcards.logits].config
    return flags(config.cache, config.merge)


def get_evaluation_flags(wildcards):
    config = artifact(wildcards).config
    threads = get_cpu_threads(wildcards)
    words = [flags(config.evaluation.of_student()), gpu_flags(config)]
    return " ".join(
        [*words, f"--device {config.training.device} --cpu-threads {threads}"]
    )


def gpu_flags(config):
    """Return the flag with the GPUs that the config lists, which students may use too."""
    gpus = config.teacher.generation.gpus
    if gpus is None:
        return ""
    return (
        f"--among-gpus {shlex.quote(gpus if isinstance(gpus, str) else ','.join(gpus))}"
    )


def get_sample_flags(wildcards):
    return flags(artifact(wildcards).config.evaluation.of_teacher())


def get_benchmark(wildcards):
    """Return the benchmark of a student or a teacher that a job's wildcards name."""
    if "run" in wildcards.keys():
        model = PROJECT.runs[wildcards.run].folder
    else:
        model = PROJECT.teachers[wildcards.teacher].folder
    place = f"benchmarks/{wildcards.task}/{wildcards.benchmark}/benchmark.json"
    return PROJECT.tasks[model / place]


def get_benchmark_flags(wildcards):
    found = get_benchmark(wildcards)
    config = found.config
    words = ["--benchmark", shlex.quote(found.name), flags(found.settings)]
    if "run" in wildcards.keys():
        words += [gpu_flags(config), f"--device {config.training.device}"]
        words.append(f"--cpu-threads {get_cpu_threads(wildcards)}")
    else:
        path = PROJECT.teachers[wildcards.teacher].model_path
        words += ["--teacher", shlex.quote(path)]
        words.append(flags(config.teacher, config.teacher.generation))
    return " ".join(words)


def get_receipts(wildcards):
    folder = f"{CACHE}/logits/{wildcards.logits}"
    return [
        f"{folder}/metadata_worker{w}.json" for w in range(get_num_workers(wildcards))
    ]


def get_features(wildcards):
    """Return the teacher's exact distributions on held-out text, for the fidelity of a cache or the metrics of a run."""
    if "logits" in wildcards.keys():
        logits = PROJECT.logits[wildcards.logits]
        pairs = (logits.tokens.id, logits.teacher.id)
        found = [
            v
            for v in PROJECT.validations.values()
            if (v.tokens.id, v.teacher.id) == pairs
        ]
        features = Path(found[0].folder) / "teacher_validation.safetensors"
        # An existing cache is not merged again when other positions are to be evaluated.
        is_merged = Path(f"{logits.folder}/manifest.json").exists()
        return [] if is_merged and not features.exists() else [str(features)]
    validation = PROJECT.runs[wildcards.run].validation
    return [f"{validation.folder}/teacher_validation.safetensors"] if validation else []


def get_manifest(wildcards):
    """Return what a run learns from: the manifest of the cache, or the record of a live teacher; [] for text only."""
    run = PROJECT.runs[wildcards.run]
    if run.logits:
        return [f"{run.logits.folder}/manifest.json"]
    return [f"{run.teacher.folder}/fingerprint.json"] if run.teacher else []


def get_train_flags(wildcards):
    run = PROJECT.runs[wildcards.run]
    config = run.config
    words = [flags(config.student, config.training, config.tracking), gpu_flags(config)]
    words.append(tokenizer_flags(run.tokens))
    words.append(f"--expected-student {run.student}")
    if run.logits:
        words.append(
            f"--cache {shlex.quote(str(run.logits.folder / 'teacher_logits.h5'))}"
        )
    elif run.teacher and config.training.distillation_type != "output":
        words.append(
            f"--teacher {shlex.quote(run.teacher.model_path)} {flags(config.teacher)}"
        )
    if run.teacher:
        words.append(
            f"--fingerprint {shlex.quote(str(run.teacher.folder / 'fingerprint.json'))}"
        )
    return " ".join(words)


def get_all_metrics(wildcards):
    return [str(run.metrics_path) for run in PROJECT.runs.values()]


def get_all_benchmarks(wildcards):
    return [str(path) for path in PROJECT.tasks]
