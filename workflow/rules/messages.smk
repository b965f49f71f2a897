# Before the first job and after the last, in the main Snakemake process: checks, and messages to the user.
import contextlib
import functools
import os
import shutil
import signal
import time

from retort.cluster.failures import describe_failures
from retort.cluster.gpus import describe_machine, is_scheduled
from retort.cluster.slurm import (
    cancel_jobs,
    find_plugin,
    patch_plugin,
    refuse_placeholders,
)
from retort.io.files import require_writable
from snakemake.settings.enums import Quietness

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

# A Snakefile that uses this one as a module may rename its rules.
rule_name = workflow.modifier.modify_rulename


def prepare():
    """Check folders, GPUs and the profile before the first job, and show the GPUs that the teacher will use.

    Raises WorkflowError when results cannot be written, this machine must run the teacher and cannot, or the SLURM
    profile still has placeholders.
    """
    wait_after_interrupts()
    jobs = list(workflow.dag.needrun_jobs())
    submitted = {job.rule.name: job for job in jobs if not job.is_local}
    try:
        refuse_placeholders(dict(job.resources.items()) for job in submitted.values())
        for folder in dict.fromkeys((RESULTS, CACHE)):
            require_writable(Path(folder))
    except ValueError as error:
        raise WorkflowError(str(error)) from None
    reset_future_dates(jobs)
    if slurm_plugin():
        patch_plugin(slurm_plugin(), logger)
    rules_to_run = {job.rule.name for job in jobs}
    if (
        rule_name("train") in rules_to_run
        and workflow.local_exec
        and not is_scheduled()
    ):
        refuse_several_nodes()
    if {rule_name("score_validation"), rule_name("generate_logits")} & rules_to_run:
        show_machine()


def wait_after_interrupts():
    """Let Ctrl-C interrupt Snakemake once; after another one it waits for its jobs, which that ends, and ends too.

    By itself it would end in a traceback of a hundred lines.
    """

    def interrupt(number, frame):
        signal.signal(number, keep_waiting)
        raise KeyboardInterrupt

    def keep_waiting(number, frame):
        logger.warning("Interrupted again: running jobs end at once, then Snakemake.")

    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, interrupt)


def show_machine():
    """Show the GPUs of this machine and the teacher's workers.

    Raises WorkflowError when this machine must run the teacher and its GPUs do not fit the config.
    """
    for generation, must_run in find_teacher_work().items():
        try:
            logger.info(describe_machine(generation, detected=detected_gpus()))
        except ValueError as error:
            if must_run and workflow.local_exec:
                raise WorkflowError(str(error)) from None
            logger.warning(str(error))


@functools.cache
def slurm_plugin():
    """Return the module of the SLURM plugin if it submits the jobs and has the tested version, else None."""
    return find_plugin(logger) if workflow.executor_plugin.name == "slurm" else None


def reset_future_dates(jobs):
    """Set the dates of inputs that are in the future to now.

    Snakemake assumes a wrong clock if an output is older than an input, even an ancient() one, and fails the job. So one
    input from a machine whose clock is ahead would fail every job that uses it.
    """
    now = time.time()
    for path in {str(path) for job in jobs for path in job.input}:
        with contextlib.suppress(OSError):  # not made yet, or another user's
            if os.stat(path).st_mtime > now:
                os.utime(path)


def find_teacher_work():
    """Return whether a result is missing, by the `generation` section that makes it."""
    made = [(logits, "manifest.json") for logits in PROJECT.logits.values()]
    for validation in PROJECT.validations.values():
        made.append((validation, "teacher_validation.safetensors"))
    work = {}
    for found, name in made:
        generation = found.config.teacher.generation
        is_missing = not (found.folder / name).exists()
        work[generation] = work.get(generation, False) or is_missing
    return work


def refuse_several_nodes():
    """Raise WorkflowError when a student is still to be trained on several nodes, but jobs run on this machine."""
    for name, run in PROJECT.runs.items():
        nodes = run.config.training.nodes
        if nodes > 1 and not (run.folder / "training.json").exists():
            raise WorkflowError(
                f"Nothing was started. In run '{name}', training.nodes is {nodes}, but without SLURM there is only "
                "this machine. Use snakemake --profile profiles/slurm, or training.nodes: 1, which trains the same student."
            )


def point_to_report():
    """Link results/report.html and summary.txt to those of the current config, once they exist."""
    if Path(REPORT).exists() and workflow.is_main_process:
        logger.info(f"Report of this config: {RESULTS}/report.html")
    for made in (Path(REPORT), Path(REPORT).with_name("summary.txt")):
        link, target = Path(RESULTS) / made.name, made.relative_to(RESULTS)
        if made.exists() and not (link.is_symlink() and link.readlink() == target):
            with contextlib.suppress(OSError):  # another user's results, read only
                link.unlink(missing_ok=True)
                link.symlink_to(target)


def remove_long_configs():
    """Remove the configs that were handed over in files: their jobs are done, and each result has its config.json."""
    shutil.rmtree(LONG_CONFIGS, ignore_errors=True)


def explain_failures():
    """Log why jobs failed, without those that Snakemake interrupted."""
    failed = sorted(workflow.scheduler.failed, key=lambda job: str(job.log))
    jobs = [(job.rule.name, Path(log)) for job in failed for log in job.log]
    if jobs:
        logger.error(f"\n{describe_failures(jobs)}\n")


def cancel_slurm_jobs():
    """Cancel all SLURM jobs of this Snakemake, which exits now."""
    if slurm_plugin():
        cancel_jobs(workflow.scheduler._executor)
