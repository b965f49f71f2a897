"""Another workflow takes Retort as a Snakemake module: `module`, `use rule * from`, with a prefix and other names."""

import re
from pathlib import Path

import pytest

from support.place import REPOSITORY, Place, tiny

# What is learned from text alone, with the teacher's tokenizer: the shortest way to a report.
SHORT = tiny(
    dataset={"tokenizer": "teacher"},
    teacher={"model_path": None},
    cache=None,
    runs={"hard": {"training": {"distillation_type": "output"}}},
)
CALLED = """
configfile: "outer.yaml"
module retort:
    snakefile: "{snakefile}"
    config: config["retort"]
    {placing}
use rule * from retort {names}
rule count_lines:
    input: rules.{report}.output.text
    output: "lines.txt"
    shell: "wc -l < {{input}} > {{output}}"
onstart:
    retort.onstart()
onsuccess:
    retort.onsuccess()
onerror:
    retort.onerror()
"""


def write_outer(
    place: Place, config: dict[str, object], *, placing: str = "", names: str = ""
) -> list[str]:
    """Write a Snakefile that uses Retort's; return the command that makes what it makes of the report."""
    prefix = names.removeprefix("as ").removesuffix("*")
    text = CALLED.format(
        snakefile=REPOSITORY / "Snakefile",
        placing=placing,
        names=names,
        report=f"{prefix}report",
    )
    (place.path / "Snakefile").write_text(text, encoding="utf-8")
    place.write_config({"retort": config}, "outer.yaml")
    command = place.command("lines.txt", config=None)
    command[command.index(str(REPOSITORY / "Snakefile"))] = str(place.path / "Snakefile")
    # The profile of the outer workflow says this too (docs/guide.md).
    return [*command, "--rerun-triggers", "mtime"]


@pytest.mark.slow
def test_a_module_with_a_prefix_and_other_rule_names_runs_to_its_report(fresh: Place) -> None:
    command = write_outer(fresh, tiny(), placing='prefix: "distil"', names="as retort_*")
    done = fresh.execute(command)
    assert done.returncode == 0, done.output
    assert "retort_generate_logits" in done.output
    assert "No GPU found here" in done.output  # the module's onstart
    assert int((fresh.path / "lines.txt").read_text()) > 5
    # Everything that was made lies under the prefix, results and logs.
    assert not fresh.results.exists() and not (fresh.path / "logs").exists()
    assert (fresh.path / "distil" / "results" / "report.html").exists()
    assert list((fresh.path / "distil" / "logs" / "train").glob("both_*.log"))
    assert "Nothing to be done" in fresh.execute([*command, "-n"]).output


@pytest.mark.slow
def test_a_module_without_a_prefix_uses_results_and_logs_of_this_folder(fresh: Place) -> None:
    done = fresh.execute(write_outer(fresh, SHORT))
    assert done.returncode == 0, done.output
    assert (fresh.path / "lines.txt").exists()
    assert list(fresh.results.glob("runs/hard/*/final/model.safetensors"))
    assert list((fresh.path / "logs" / "train").glob("hard_*.log"))


@pytest.mark.parametrize(
    ("placing", "folder"),
    [
        ("", "results"),
        ('prefix: "deep/er"', "deep/er/results"),
        ('replace_prefix: {"results/": "elsewhere/"}', "elsewhere"),
    ],
)
def test_flags_name_the_files_that_the_module_declares(
    fresh: Place, placing: str, folder: str
) -> None:
    said = fresh.execute([*write_outer(fresh, tiny(), placing=placing), "-n", "-p"]).output
    scripts = re.findall(r"(\S+/workflow/scripts/\w+\.py)", said)
    assert len(scripts) == 15 and {Path(s).parent for s in scripts} == {
        REPOSITORY / "workflow" / "scripts"
    }, said
    outputs = re.findall(r"--output (\S+)", said)
    assert len(outputs) == 15 and all(path.startswith(f"{folder}/") for path in outputs), outputs
    declared = re.findall(r"(?:Reason|reason): Missing output files: ([^\s,;]+)", said)
    # The report has several outputs, of which only one is wanted here.
    made = {path.replace("report.html", "summary.txt") for path in outputs}
    assert set(declared) == made | {"lines.txt"}
    assert re.search(rf"--signal {folder}/logits/\w+/manifest.json", said)
    assert re.search(rf'"results_dir": "{folder}"', said), "the check looks at the same folder"
    assert '"source": "outer.yaml"' in said


def test_a_module_in_a_module_has_both_prefixes(fresh: Place) -> None:
    write_outer(fresh, tiny(), placing='prefix: "inner"')
    (fresh.path / "Snakefile").rename(fresh.path / "middle.smk")
    (fresh.path / "Snakefile").write_text(
        'configfile: "outer.yaml"\n'
        'module middle:\n    snakefile: "middle.smk"\n    config: config\n    prefix: "outer"\n'
        "use rule * from middle as middle_*\n",
        encoding="utf-8",
    )
    command = fresh.command("middle_count_lines", "-n", "-p", config=None)
    command[command.index(str(REPOSITORY / "Snakefile"))] = str(fresh.path / "Snakefile")
    said = fresh.execute(command).output
    outputs = re.findall(r"--output (\S+)", said)
    assert outputs and all(path.startswith("outer/inner/results/") for path in outputs), said
    assert "input: outer/inner/results/" in said
