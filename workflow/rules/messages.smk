# What is said and done before the first job and after the last, by the Snakemake that was typed.
import contextlib
import os
import subprocess
import sys
import time

from retort.cluster.failures import describe_failures
from retort.cluster.gpus import describe_machine, is_scheduled
from retort.io.files import require_writable
from retort.cluster.stuck_jobs import StuckJobs

# Names of rules in this run, which a Snakefile that takes this one as a module may have changed.
rule_name = workflow.modifier.modify_rulename


def greet():
    """Say what the teacher will run on, before anything starts; under a scheduler that is another machine than this.

    Raises WorkflowError where the results cannot be written, this machine must run the teacher and cannot, or the
    profile says nothing of the user's account.
    """
    require_own_profile()
    forget_future_dates()
    remember_job_age()
    watch_jobs()
    try:
        for folder in dict.fromkeys((RESULTS, CACHE)):
            require_writable(Path(folder))
    except ValueError as error:
        raise WorkflowError(str(error)) from None
    asked = {job.rule.name for job in workflow.dag.needrun_jobs()}
    if rule_name("train") in asked and workflow.local_exec and not is_scheduled():
        refuse_several_nodes()
    if not {rule_name("score_validation"), rule_name("generate_logits")} & asked:
        return
    for generation, must_run in find_teacher_work().items():
        try:
            logger.info(describe_machine(generation, detected=detected_gpus()))
        except ValueError as error:
            if must_run and workflow.local_exec:
                raise WorkflowError(str(error)) from None
            logger.warning(str(error))


def forget_future_dates():
    """Let no file from which something is made now bear a date that is still to come.

    Snakemake takes an output that is older than an input for the work of a wrong clock and fails its job, ancient() or
    not: one file of tomorrow, from another machine, and nothing could be made of it today.
    """
    now = time.time()
    for path in {
        str(path) for job in workflow.dag.needrun_jobs() for path in job.input
    }:
        with contextlib.suppress(OSError):  # not made yet, or somebody else's
            if os.stat(path).st_mtime > now:
                os.utime(path)


def find_teacher_work():
    """Every way in which a teacher is run, and whether any of what it makes is still to be made."""
    made = [(logits, "manifest.json") for logits in PROJECT.logits.values()]
    for validation in PROJECT.validations.values():
        made.append((validation, "teacher_validation.safetensors"))
    work = {}
    for found, name in made:
        generation = found.config.teacher.generation
        is_missing = not (found.folder / name).exists()
        work[generation] = work.get(generation, False) or is_missing
    return work


def require_own_profile():
    """Raise WorkflowError where jobs would be submitted by a profile that is as it was shipped."""
    submitted = {
        job.rule.name: job for job in workflow.dag.needrun_jobs() if not job.is_local
    }
    left = sorted(
        {
            name
            for job in submitted.values()
            for name, value in job.resources.items()
            if value == "CHANGE_ME"
        }
    )
    if left:
        raise WorkflowError(
            f"Nothing was submitted: {' and '.join(left)} still say CHANGE_ME. Write your own at the top of "
            "profiles/slurm/config.yaml (docs/slurm.md)."
        )


def refuse_several_nodes():
    """Raise WorkflowError where a student is still to be trained on several nodes, and nobody gives them."""
    for name, run in PROJECT.runs.items():
        nodes = run.config.training.nodes
        if nodes > 1 and not (run.folder / "training.json").exists():
            raise WorkflowError(
                f"Nothing was started. In run '{name}', training.nodes is {nodes}, but without SLURM there is one "
                "machine. Use snakemake --profile profiles/slurm, or training.nodes: 1, which trains the same student."
            )


def point_to_report():
    """Let results/report.html and summary.txt be those of the config that was asked for last, once they exist."""
    if Path(REPORT).exists() and workflow.is_main_process:
        logger.info(f"Report of this config: {RESULTS}/report.html")
    for made in (Path(REPORT), Path(REPORT).with_name("summary.txt")):
        link, target = Path(RESULTS) / made.name, made.relative_to(RESULTS)
        if made.exists() and not (link.is_symlink() and link.readlink() == target):
            with contextlib.suppress(OSError):  # somebody else's results, read only
                link.unlink(missing_ok=True)
                link.symlink_to(target)


def explain_failures():
    """Say why jobs failed; those that Snakemake interrupted are not among them."""
    failed = sorted(workflow.scheduler.failed, key=lambda job: str(job.log))
    jobs = [(job.rule.name, Path(log)) for job in failed for log in job.log]
    if jobs:
        logger.error(f"\n{describe_failures(jobs)}\n")


def remember_job_age():
    """Let the slurm plugin (2.8) know for good how long the controller remembers jobs that ended.

    It asks again at every look, takes a controller that is away for one that remembers nothing, and then asks sacct,
    where there may be no accounting: it would not notice that the controller is back.
    """
    plugin = sys.modules.get("snakemake_executor_plugin_slurm")
    age = plugin.get_min_job_age() if plugin and not workflow.local_exec else None
    if age is not None:
        plugin.get_min_job_age = lambda: age


def watch_jobs():
    """Let the slurm plugin (2.8) look at its jobs twice a minute at least, by one squeue, and say which are stuck.

    Its pauses grow to three minutes while no job ends: 182 s passed until the end of a job of 23 minutes was noticed.
    """
    plugin = sys.modules.get("snakemake_executor_plugin_slurm")
    if plugin and not workflow.local_exec:
        stuck = StuckJobs()
        kind = plugin.Executor
        pause = kind.next_seconds_between_status_checks

        def set_pause(executor, seconds):
            pause.fset(executor, min(seconds, 30))
            for sentence in stuck.look(executor.run_uuid):
                logger.warning(sentence)

        kind.next_seconds_between_status_checks = pause.setter(set_pause)


def cancel_forgotten_jobs():
    """Let no SLURM job outlive the Snakemake that ends here.

    While the slurm plugin (2.8) asks for the states of its jobs it has none in its list, so a Ctrl-C in that moment
    cancels none.
    """
    name = getattr(workflow.scheduler._executor, "run_uuid", None)
    if name is not None:
        with contextlib.suppress(OSError):
            subprocess.run(["scancel", "--name", name], check=False)
