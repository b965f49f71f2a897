"""`retort run CONFIG`: check the config, then run the packaged workflow with Snakemake, quietly.

Results, logs and .snakemake/ go to the current folder. Loaded by every `retort run`, and never by a job.
"""

import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retort.artifacts.build import build_project
from retort.artifacts.project import Project
from retort.cluster.gpus import detect_gpus
from retort.config.config_files import load_source, locate, read_files
from retort.config.sweeps import prefer_command_line
from retort.config.yaml_source import Source
from retort.pipeline.workflow_files import find_snakefile, find_workflow

_USAGE = """usage: retort run CONFIG [--verbose] [snakemake options]

Check CONFIG (YAML), then make everything that it asks for, in the current folder. After an interruption, rerun the
command to resume.

  -n                    show what would run
  --cores N             CPU cores of this machine to use (default: all)
  --resources gpu=N     GPUs to use at once (default: all that are detected)
  --profile slurm       submit jobs to SLURM with Retort's profile; a path names your own
  --verbose             show Snakemake's own output instead of a summary

All other options go to Snakemake: snakemake --help. Without an option, what runs on this machine is one job for each
free core and GPU."""


def run_workflow(words: Sequence[str]) -> None:
    """Run `retort run` with these words of the command line; exits with Snakemake's status.

    Exits with status 1 and one sentence when the config is wrong, before Snakemake starts, and with 2 without a config.
    """
    if not words or words[0].startswith("-"):
        print(_USAGE, file=sys.stdout if "--help" in words or "-h" in words else sys.stderr)
        raise SystemExit(0 if "--help" in words or "-h" in words else 2)
    config, options = Path(words[0]), list(words[1:])
    is_verbose = "--verbose" in options
    options = [word for word in options if word != "--verbose"]
    command = build_command(config, options, is_verbose=is_verbose)
    try:
        if not config.is_file():
            raise ValueError(
                f"The config {str(config)!r} does not exist (looked in {Path.cwd()}). `retort init` writes one."
            )
        parser, args = _parse(command, is_verbose=is_verbose)
        project = check_config_of(args)
        if extra := choose_machine(args):
            parser, args = _parse([*command, *extra], is_verbose=is_verbose)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if not is_verbose:
        args.logger_retort_summary = summary_path(project)
    raise SystemExit(_run_snakemake(parser, args))


def build_command(config: Path, options: Sequence[str], *, is_verbose: bool) -> list[str]:
    """Return the words for Snakemake, without its name: the packaged workflow, its default profile, our logger."""
    words = ["--snakefile", str(find_snakefile()), *resolve_profiles(options)]
    if not any(word.startswith("--workflow-profile") for word in words):
        words += ["--workflow-profile", str(find_workflow() / "profiles" / "default")]
    if not is_verbose and "--logger" not in words:
        words += ["--logger", "retort"]
    names = [n for n, word in enumerate(words) if word in ("--configfile", "--configfiles")]
    if names:  # more files of the user's: the last one wins, key by key
        words.insert(names[-1] + 1, str(config))
        return words
    return [*words, "--configfile", str(config)]


def resolve_profiles(options: Sequence[str]) -> list[str]:
    """Return options in which a profile that Retort brings is given by its path: slurm, unless ./slurm exists."""
    shipped = find_workflow() / "profiles"
    resolved: list[str] = []
    for word in options:
        flag, equals, value = word.rpartition("=")
        is_value = flag == "--profile" or (not equals and resolved[-1:] == ["--profile"])
        name = value if equals else word
        path = shipped / name
        # A person's own profile of that name comes first; profiles/slurm is where a checkout has it.
        own = [folder for folder in (Path(name), Path("profiles") / name) if folder.exists()]
        if is_value and name.isidentifier() and (own or path.is_dir()):
            word = f"{flag}{equals}{own[0] if own else path}"
        resolved.append(word)
    return resolved


def check_config_of(args: Any) -> Project:
    """Return the plan of the config that Snakemake would read. Raises ValueError when it is wrong."""
    from snakemake.cli import parse_config

    files = [path.absolute() for path in args.configfile]
    given = parse_config(args.config)
    source = read_files(files, given) or fill_in(files, given)
    with contextlib.chdir(args.directory or Path()):
        configs = load_source(source)
        try:
            return build_project(configs)
        except ValueError as error:
            raise ValueError(locate(error, source)) from None


def fill_in(files: Sequence[Path], given: Mapping[str, Any]) -> Source:
    """Return the values of files that are templates, as Snakemake fills them in. Lines are not known.

    Raises ValueError when a file cannot be read.
    """
    from snakemake.common.configfile import load_configfile
    from snakemake.exceptions import WorkflowError
    from snakemake.utils import update_config

    raw: dict[str, Any] = {}
    try:
        for path in files:
            update_config(raw, load_configfile(path))
    except WorkflowError as error:
        raise ValueError(f"The config cannot be read: {error}") from None
    update_config(raw, given)
    return Source(prefer_command_line(raw, given))


def choose_machine(args: Any) -> list[str]:
    """Return the options that a run on this machine lacks: its cores, and its GPUs where there are any."""
    if args.executor not in (None, "local") or args.dryrun:
        return []
    words = [] if args.cores or args.jobs else ["--cores", "all"]
    if not args.resources and (gpus := detect_gpus()):
        words += ["--resources", f"gpu={len(gpus)}"]
    return words


def summary_path(project: Project) -> Path:
    """Return where the table of this config's report is, or will be."""
    results = Path(next(iter(project.runs.values())).config.output.results_dir)
    return results / "reports" / project.report_id / "summary.txt"


def _parse(command: Sequence[str], *, is_verbose: bool) -> tuple[Any, Any]:
    """Parse Snakemake's command line; which profile it uses is said with --verbose, what is wrong always."""
    from snakemake.cli import parse_args

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: tuple[Any, Any] = parse_args(list(command))
    except SystemExit as ended:
        if not ended.code:  # --version, --help
            raise
        # The last line says what is wrong; above it, argparse lists all options of Snakemake.
        reason = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise ValueError(f"{reason} (snakemake --help explains its options)") from None
    if is_verbose:
        sys.stderr.write(said.getvalue())
    return parsed


def _run_snakemake(parser: Any, args: Any) -> int:
    from snakemake.cli import args_to_api
    from snakemake.exceptions import print_exception

    try:
        return 0 if args_to_api(args, parser) else 1
    except Exception as error:
        print_exception(error)
        return 1
