"""Every example is a valid config, says how to run it, and uses a student that exists."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.cli import parse_config

from retort.config.load import load_runs
from retort.config.recommended import ALPHA, CACHE, TEMPERATURE, choose_learning_rate
from retort.config.schema import merge as merge_configs
from retort.config.section import Section
from retort.config.sections import Config

REPOSITORY = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((REPOSITORY / "config" / "examples").glob("*.yaml"))
STUDENTS = sorted((REPOSITORY / "config" / "students").glob("*.json"))
SCENARIOS = {
    "wikitext_one_gpu",
    "fineweb_streamed",
    "teacher_7b_eight_gpus",
    "teacher_34b_two_gpus_each",
    "teacher_70b_four_gpus_each",
    "teacher_405b_all_gpus",
    "chosen_gpus",
    "unequal_gpus",
    "laptop_output",
    "live_teacher_one_gpu",
    "chats",
    "mixture",
    "code_student",
    "code_student_slurm",
    "code_student_from_prompts",
    "sweep_alpha_temperature",
    "two_teachers",
    "benchmarks",
}
# What an example is about, where that is another value than the recommended one.
SUBJECTS = {"sweep_alpha_temperature": {"temperatures", "temperature", "alpha"}}
# Parameters of the students, with any common vocabulary on the same side of each limit.
SIZES = {
    "llama_demo.json": 1e5,
    "llama_100m.json": 124e6,
    "llama_350m.json": 360e6,
    "llama_1b.json": 1.07e9,
    "mine.student.json": 100e6,
}
each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)


def read(path: Path) -> dict[str, Any]:
    """Read an example as Snakemake would."""
    raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return raw


def comment(path: Path) -> str:
    """Return the comment at the top of an example, on one line and without backslashes."""
    lines = path.read_text(encoding="utf-8").splitlines()
    top = [line.removeprefix("#").strip(" \\") for line in lines if line.startswith("#")]
    return " ".join(top)


def test_there_is_one_example_per_scenario() -> None:
    assert {path.stem for path in EXAMPLES} == SCENARIOS


@each_example
def test_an_example_loads(path: Path) -> None:
    assert load_runs(read(path))


@each_example
def test_an_example_sets_only_what_differs_from_the_defaults(path: Path) -> None:
    def same(values: Any, default: Any, key: str) -> list[str]:
        if isinstance(default, Section):
            below = [same(v, getattr(default, k), f"{key}.{k}") for k, v in values.items()]
            return [k for keys in below for k in keys]
        default = list(default) if isinstance(default, tuple) else default
        return [key] if values == default and key != ".training.distillation_type" else []

    raw = {section: values for section, values in read(path).items() if section != "runs"}
    assert same(raw, Config(), "") == []


@each_example
def test_an_example_gives_its_command_and_a_trial(path: Path) -> None:
    words = comment(path)
    assert f"--configfile config/examples/{path.name}" in words
    assert ("--profile profiles/slurm" if "slurm" in path.stem else "--cores ") in words
    trial = re.search(r"Ten-sample trial.*? --config (.*)$", words)
    assert trial, words
    typed = parse_config(shlex.split(trial[1]))
    for config in load_runs(merge_configs(read(path), typed)).values():
        assert (config.dataset.max_samples, config.training.max_steps) == (10, 10)


@each_example
def test_an_examples_student_exists(path: Path) -> None:
    for config in load_runs(read(path)).values():
        assert config.student.model_path or (REPOSITORY / str(config.student.config)).exists()


def find_other_values(config: Config) -> set[str]:
    """Return the keys of a run that have other values than the recommended ones, where they matter."""
    training, found = config.training, set()
    if training.distillation_type != "output" and training.use_cached_logits:
        keys = ("method", "min_probability", "temperatures")
        found = {key for key in keys if getattr(config.cache, key) != getattr(CACHE, key)}
    if training.distillation_type != "output" and training.temperature != TEMPERATURE:
        found.add("temperature")
    if training.distillation_type == "hybrid" and training.alpha != ALPHA:
        found.add("alpha")
    name = Path(config.student.config or "").name
    size = SIZES[name] if name else 500e6  # the pretrained ones are below 1B
    if training.learning_rate != choose_learning_rate(int(size), is_pretrained=not name):
        found.add("learning_rate")
    return found


@each_example
def test_an_example_has_the_recommended_values_but_for_its_subject(path: Path) -> None:
    found = set[str]().union(*map(find_other_values, load_runs(read(path)).values()))
    assert found == SUBJECTS.get(path.stem, set())


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_the_configs_of_the_pages_have_the_recommended_values(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    (config,) = re.findall(r"^```yaml\n(# mine.yaml.*?)^```", text, re.MULTILINE | re.DOTALL)
    runs = load_runs(yaml.safe_load(config))
    assert set(runs) == {"text", "soft"}
    assert {name: find_other_values(run) for name, run in runs.items()} == {n: set() for n in runs}


def test_slurm_changes_nothing_but_the_number_of_workers() -> None:
    local, slurm = (
        read(REPOSITORY / "config" / "examples" / f"{name}.yaml")
        for name in ("code_student", "code_student_slurm")
    )
    assert slurm["teacher"].pop("generation") == {"num_workers": 8}
    assert slurm == local


@pytest.mark.parametrize("path", STUDENTS, ids=lambda p: p.stem)
def test_a_student_leaves_its_vocabulary_to_the_teacher(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["model_type"] == "llama" and "vocab_size" not in content


def test_the_students_are_as_large_as_their_readme_says() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    table = (REPOSITORY / "config" / "students" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+\.json)` \| \d+ \| \d+ \| ([\d,]+) \|", table, re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in STUDENTS} - {"llama_demo.json"}
    for name, count in rows:
        content = json.loads((REPOSITORY / "config" / "students" / name).read_text())
        config = transformers.AutoConfig.for_model(
            content.pop("model_type"), vocab_size=32000, **content
        )
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == int(count.replace(",", "")), name
