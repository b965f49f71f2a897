"""Which responses a config asks a model for, named by what they come of: known when the Snakefile is parsed.

Two names are nested. *Answers* are named by what is asked of whom, and paid for once. A *synthesis* is those of them
that pass the filters, so that another filter, or another number of examples, asks nothing twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retort.artifacts.benchmarks import plan_benchmarks
from retort.config.load import identity
from retort.config.sections import Config, Dataset, Synthesis
from retort.config.synthesis_checks import COLUMNS
from retort.corpus.sources import expand
from retort.io.digests import digest, digest_file, digest_file_states
from retort.io.files import is_path, read_json, suggest_path
from retort.io.fingerprints import fingerprint_tokenizer, fingerprint_weights

PROMPT_SUFFIXES = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "lines",
}
RESPONSES_FILE = "responses.jsonl"
_PACKED = (".gz", ".zst")
_SHARED_KEYS = (
    "provider",
    "prompts",
    "prompts_split",
    "prompt_column",
    "templates",
    "system_prompt",
    "temperature",
    "top_p",
    "max_tokens",
    "seed",
)
_LOCAL_KEYS = ("revision", "engine", "batch_size")
_PLACES = ("prompts", "prompts_split", "prompt_column", "templates")  # where prompts are read
# How the teacher's section loads a local model.
_LOADING_KEYS = ("dtype", "attn_implementation", "trust_remote_code")


@dataclass(frozen=True)
class SynthesisPlan:
    """One set of responses; `folder` lies in that of its answers."""

    id: str
    answers_id: str  # "api-..." where a server answers
    folder: Path
    config: Config
    stamp: str  # of the files of prompts, as they were when they were named

    @property
    def record(self) -> Path:
        """The declared record, written last."""
        return self.folder / "synthesis.json"

    @property
    def is_online(self) -> bool:
        """Whether a server answers: that needs a network, and no GPU."""
        return self.section.provider != "local"

    @property
    def section(self) -> Synthesis:
        """What is asked of whom."""
        return self.config.synthesis

    def as_dataset(self, dataset: Dataset) -> Dataset:
        """Return the section that reads the responses."""
        responses = str(self.folder / RESPONSES_FILE)
        prompt, response = COLUMNS["prompt_column"], COLUMNS["response_column"]
        return replace(
            dataset,
            name="json",
            data_files=responses,
            prompt_column=prompt,
            response_column=response,
        )


def refuse_other_responses(record_path: Path) -> None:
    """Raise ValueError when the responses beside a record are not those that it speaks of."""
    record = read_json(record_path)["responses"]
    path = record_path.with_name(RESPONSES_FILE)
    found = digest_file(path) if path.exists() else "no file"
    if found != record["digest"]:
        raise ValueError(
            f"{path} is not what was written: digest {found}, but {record['digest']} in {record_path}. Remove "
            f"{record_path}: the responses are then made again from the journal of answers, and nothing is asked anew."
        )


def plan_synthesis(config: Config, root: Path, *, revisions: Mapping[str, int]) -> SynthesisPlan:
    """Name the responses that a config asks for, below `root`.

    Raises ValueError where prompts, templates or benchmarks' files are not there.
    """
    section = config.synthesis
    files = list_prompt_files(section)
    stamp = digest_file_states(files)
    named = identity(section)
    asked = _list_asked(section)
    if files:
        asked.pop("prompts", None)  # these count by content
        asked.pop("templates", None)
    prefix = "api-"
    model: Any = section.model
    if section.provider == "local":
        prefix = ""
        model = _name_model(*local_model(config))
        asked |= {k: v for k, v in identity(config.teacher).items() if k in _LOADING_KEYS}
    content = [digest_file(path) for path in files]
    answers_id = prefix + digest(["answers", revisions["answers"], asked, model, content])
    kept = {k: v for k, v in named.items() if k not in (*_SHARED_KEYS, *_LOCAL_KEYS, "model")}
    problems = _name_problems(config)
    synthesis_id = digest(["synthesis", revisions["synthesis"], answers_id, kept, problems])
    folder = root / "syntheses" / answers_id / synthesis_id
    return SynthesisPlan(synthesis_id, answers_id, folder, config, stamp)


def _list_asked(section: Synthesis) -> dict[str, Any]:
    """Return the keys that say what is asked, of whom and how; a local model counts by its content, apart."""
    keys = (*_SHARED_KEYS, *(_LOCAL_KEYS if section.provider == "local" else ()))
    return {key: value for key, value in identity(section).items() if key in keys}


def name_asking(section: Synthesis, *, local_model: str | None, revision: str | None) -> str:
    """Return a digest of what is asked, of whom, besides the prompts themselves, wherever these lie."""
    asked = {k: v for k, v in _list_asked(section).items() if k not in _PLACES}
    model = _name_model(local_model, revision) if local_model else section.model
    return digest([asked, model])


def list_prompt_files(section: Synthesis) -> list[Path]:
    """Return the local files of prompts in reading order, or of templates; none for a dataset on the Hub.

    Raises ValueError where one is missing.
    """
    if section.templates is not None:
        return expand(section.templates, key="synthesis.templates")
    given = section.prompts
    patterns = [given] if isinstance(given, str) else list(given or ())
    if len(patterns) == 1 and is_hub_id(patterns[0]):
        return []
    return list(dict.fromkeys(path for pattern in patterns for path in _expand(pattern)))


def is_hub_id(name: str) -> bool:
    """Say whether prompts are named by the id of a dataset on the Hub: no path, and no ending of a file of prompts."""
    return not is_path(name) and choose_reader(Path(name)) is None and not Path(name).exists()


def choose_reader(path: Path) -> str | None:
    """Return the reader of a file of prompts, by its ending; None for one that is not known."""
    endings = [ending for ending in path.suffixes if ending not in _PACKED]
    return PROMPT_SUFFIXES.get(endings[-1]) if endings else None


def _expand(pattern: str) -> list[Path]:
    found = expand(pattern, key="synthesis.prompts")
    for path in found:
        if choose_reader(path) is None:
            raise ValueError(
                f"synthesis.prompts {str(path)!r} has no known ending: expected {', '.join(PROMPT_SUFFIXES)}, "
                "compressed (.gz, .zst) or not. Rename or convert it."
            )
    return found


def local_model(config: Config) -> tuple[str, str | None]:
    """Return (folder or Hub id, revision) of the model that answers here: its own, or the teacher."""
    section = config.synthesis
    if section.model is not None:
        return section.model, section.revision
    return str(config.teacher.model_path), section.revision or config.teacher.revision


def _name_model(name: str, revision: str | None) -> Any:
    """Return a local model by content, one of the Hub by name."""
    folder = Path(name)
    if folder.is_dir():
        return [fingerprint_weights(folder), fingerprint_tokenizer(folder)]
    if is_path(name):
        raise ValueError(
            f"synthesis.model {name!r} does not exist (looked in {Path.cwd()}).{suggest_path(folder)} Give a folder "
            "that save_pretrained() wrote, without ~, or the id of a model on the Hub."
        )
    return [name, revision]


def _name_problems(config: Config) -> list[str]:
    """Return the ids of the benchmarks whose problems must not be in the responses; files count by content."""
    if not config.synthesis.decontaminate:
        return []
    bare = replace(config, evaluation=config.evaluation.of_problems())
    return [b.id for b in plan_benchmarks(bare, Path(), revision=0)]
