"""The command `retort`: `retort run` for the whole workflow, and a subcommand for each of its scripts.

A script is run from its file, with the flags that it has there: `retort train --help` is
`python workflow/scripts/train.py --help`. Nothing here loads torch.
"""

import ast
import difflib
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

from retort.pipeline.workflow_files import find_script, find_workflow, list_scripts

# The scripts in the order of the data flow; one that stands in no group is listed at the end.
GROUPS = {
    "Before the run": ("estimate",),
    "Corpus and tokens": (
        "check_inputs",
        "stage",
        "synthesize",
        "draw_corpus",
        "tokenize_shard",
        "index_tokens",
    ),
    "Teacher and logit cache": (
        "resolve_teacher",
        "demo_teacher",
        "score_validation",
        "plan",
        "generate_logits",
        "merge_h5",
        "import",
    ),
    "Student": ("prune_teacher", "train"),
    "Evaluation and report": ("evaluate", "benchmark", "report", "compare"),
    "After the run": ("export", "export_parquet", "publish"),
    "Results": ("ls", "show", "diff", "gc"),
}
_WORKFLOW = {
    "run": "Run the whole workflow for a config, with Snakemake.",
    "trial": "Try a config: a few documents and steps through every rule, then the estimate of the whole.",
    "init": "Write a config for your corpus and teacher; --examples copies config/ and profiles/slurm/.",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (that of this process, where none is given). Exits with status 2 on a wrong one."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(describe_commands())
        return
    command, rest = words[0], words[1:]
    if command in ("-V", "--version"):
        print(f"retort {metadata.version('retort')}")
    elif command == "run":
        from retort.pipeline.run_command import run_workflow

        run_workflow(rest)
    elif command == "trial":
        _run_trial(rest)
    elif command == "init":
        _run_init(rest)
    else:
        _run_script(command, rest)


def describe_commands() -> str:
    """Return the text of `retort --help`: all commands in groups, a line each."""
    grouped = {name for names in GROUPS.values() for name in names}
    others = tuple(name for name in list_scripts() if name not in grouped)
    lines = [
        "usage: retort COMMAND [options]    (retort COMMAND --help shows the options)",
        "       retort --version",
    ]
    lines += ["", "Workflow", *(_row(name, text) for name, text in _WORKFLOW.items())]
    for title, names in [*GROUPS.items(), ("Others", others)]:
        rows = [_row(name, summarize(find_script(name))) for name in names]
        lines += ["", title, *rows] if rows else []
    return "\n".join(lines)


def summarize(script: Path) -> str:
    """Return the first line of a script's docstring, without running the script."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def copy_configs(folder: Path) -> list[Path]:
    """Copy the workflow's config/ and profiles/slurm/ into `folder`; return the files written.

    Existing files are left alone.
    """
    source = find_workflow()
    paths = [p for name in ("config", "profiles/slurm") for p in (source / name).rglob("*")]
    written = []
    for path in sorted(filter(Path.is_file, paths)):
        target = folder / path.relative_to(source)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            written.append(target)
    return written


def _row(name: str, text: str) -> str:
    return f"  {name.replace('_', '-'):<18}{text}"


def _run_trial(words: Sequence[str]) -> None:
    from retort.cli import run_script

    def run() -> None:
        from retort.pipeline.trial_command import run_trial

        run_trial(words)

    run_script(run)


def _run_init(words: Sequence[str]) -> None:
    if list(words) == ["--examples"]:
        written = copy_configs(Path())
        print(f"{len(written)} files written. Try: retort run config/config.yaml -n")
        return
    from retort.cli import run_script
    from retort.pipeline.init_flags import read_init_flags

    flags = read_init_flags(words)

    def write() -> None:
        from retort.pipeline.init_command import write_first_config

        write_first_config(flags)

    run_script(write)


def _run_script(command: str, words: Sequence[str]) -> None:
    name = command.replace("-", "_")
    if name not in list_scripts():
        known = [*_WORKFLOW, *(script.replace("_", "-") for script in list_scripts())]
        close = difflib.get_close_matches(command, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else "retort --help lists all commands."
        print(f"retort: there is no command {command!r}. {hint}", file=sys.stderr)
        raise SystemExit(2)
    path, typed = find_script(name), f"retort {command}"
    # As runpy.run_path would, which calls the program by the file's name; --help is to say what was typed.
    text = path.read_text(encoding="utf-8").replace(f"python workflow/scripts/{name}.py", typed)
    script = ModuleType("__main__")
    script.__file__ = str(path)
    sys.modules["__main__"], sys.argv = script, [typed, *words]
    exec(compile(text, str(path), "exec"), script.__dict__)
