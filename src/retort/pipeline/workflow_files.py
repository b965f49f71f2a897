"""Finds the workflow's files: inside the package in an installed wheel, at the top of a checkout.

The layout is the same: Snakefile, workflow/rules, workflow/scripts, config, profiles.
"""

from pathlib import Path

import retort

PACKAGED = "_workflow"


def find_workflow() -> Path:
    """Return the folder with the Snakefile, workflow/, config/ and profiles/.

    Raises FileNotFoundError when this Retort was installed without them.
    """
    package = Path(retort.__path__[0]).resolve()
    for folder in (package / PACKAGED, package.parents[1]):
        if (folder / "Snakefile").is_file():
            return folder
    raise FileNotFoundError(
        f"the Retort in {package} comes without its workflow. Install it from its wheel, or with pip from a checkout."
    )


def find_snakefile() -> Path:
    """Return the Snakefile, for `snakemake --snakefile` and for `module` in a Snakefile of your own."""
    return find_workflow() / "Snakefile"


def find_script(name: str) -> Path:
    """Return the path of a rule's script, such as workflow/scripts/train.py for train.

    Raises ValueError, which lists all names, when there is no such script.
    """
    found = find_workflow() / "workflow" / "scripts" / f"{name}.py"
    if not found.is_file():
        raise ValueError(f"There is no script {name!r}. Scripts: {', '.join(list_scripts())}.")
    return found


def list_scripts() -> list[str]:
    """Return the names of all scripts in alphabetical order."""
    return sorted(
        path.stem for path in (find_workflow() / "workflow" / "scripts").glob("[a-z]*.py")
    )
