"""The responses that a config requests from a model (`dataset.name: synthesis`): their ids and folder.

There are two nested ids. That of the *answers* covers the prompts, the model and the sampling: they are requested and
paid for once. That of the *synthesis* adds the filters and the number of examples: another filter needs no request.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.artifacts.tasks import build_tasks
from retort.config.load import identity
from retort.config.sections import Config, Dataset, Synthesis
from retort.config.synthesis import COLUMNS
from retort.corpus.sources import expand_pattern
from retort.io.digests import digest, digest_file, digest_file_states
from retort.io.files import is_path, suggest_path
from retort.io.fingerprints import describe_model_file, fingerprint_tokenizer, fingerprint_weights
from retort.io.records import Entry, Record
from retort.io.run_record import RunRecord
from retort.io.text_files import COMPRESSED_SUFFIXES, LOADER_OF, find_ending

PROMPT_SUFFIXES = LOADER_OF | {".txt": "lines"}
RESPONSES_FILE = "responses.jsonl"
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
_PROMPT_KEYS = ("prompts", "prompts_split", "prompt_column", "templates")
# Keys of `teacher` for loading a local model.
_LOADING_KEYS = ("dtype", "attn_implementation", "trust_remote_code")


class ResponsesFile(Entry):
    """The file of responses: its name, its lines, and the digest of its bytes."""

    file: str
    rows: int
    digest: str


class PromptCounts(Entry):
    """Numbers of prompts; `empty` and `duplicates` were left out before."""

    different: int
    empty: int
    duplicates: int
    asked: int


class Paid(Entry):
    """Requests and tokens that were paid (see `synthesis.journal.Usage`), and their price."""

    requests: int
    input_tokens: int
    output_tokens: int
    lost_requests: int
    lost_input_tokens: int
    lost_output_tokens: int
    cost: float


class SynthesisRecord(Record, format="retort synthesis", version=2):
    """synthesis.json: the responses, and how many were dropped by which filter.

    code_parsed_in: languages whose code was parsed. not_compared_with: benchmarks whose problems could not be read.
    """

    provider: str
    model: str | None
    responses: ResponsesFile
    prompts: PromptCounts
    dropped: dict[str, int]
    paid: Paid
    code_parsed_in: tuple[str, ...]
    not_compared_with: tuple[str, ...]
    made: RunRecord


@dataclass(frozen=True)
class Responses:
    """The filtered responses of one `synthesis` section; `folder` is in that of its answers."""

    id: str
    answers_id: str  # "api-..." for a server
    folder: Path
    config: Config
    stamp: str  # of the prompt files when the id was computed (see `digest_file_states`)

    @property
    def record(self) -> Path:
        """The output of `synthesize`, written last."""
        return self.folder / "synthesis.json"

    @property
    def is_online(self) -> bool:
        """Whether a server generates the responses, which needs a network and no GPU."""
        return self.section.provider != "local"

    @property
    def section(self) -> Synthesis:
        """The config section."""
        return self.config.synthesis

    def as_dataset(self, dataset: Dataset) -> Dataset:
        """Return the dataset section that reads the responses."""
        responses = str(self.folder / RESPONSES_FILE)
        prompt, response = COLUMNS["prompt_column"], COLUMNS["response_column"]
        columns = {"prompt_column": prompt, "response_column": response}
        return dataset.model_copy(update={"name": "json", "data_files": responses} | columns)


def refuse_other_responses(record_path: Path) -> None:
    """Raise ValueError when the responses next to a record do not match its digest."""
    record = SynthesisRecord.read(record_path).responses
    path = record_path.with_name(RESPONSES_FILE)
    found = digest_file(path) if path.exists() else "no file"
    if found != record.digest:
        raise ValueError(
            f"{path} is not what was written: digest {found}, but {record.digest} in {record_path}. Remove "
            f"{record_path} to rebuild the responses from the journal of answers, without new requests."
        )


def build_responses(config: Config, root: Path, *, revisions: Mapping[str, int]) -> Responses:
    """Return the responses of a config, with a folder below `root`.

    Raises ValueError when prompts, templates or the files of evaluation tasks do not exist.
    """
    section = config.synthesis
    files = list_prompt_files(section)
    stamp = digest_file_states(files)
    request = _request_keys(section)
    if files:
        request.pop("prompts", None)  # files count by content
        request.pop("templates", None)
    prefix = "api-"
    model: Any = section.model
    if section.provider == "local":
        prefix = ""
        model = _identify_model(*local_model(config))
        request |= {k: v for k, v in identity(config.teacher).items() if k in _LOADING_KEYS}
    content = [digest_file(path) for path in files]
    answers_id = prefix + digest(["answers", revisions["answers"], request, model, content])
    request_keys = (*_SHARED_KEYS, *_LOCAL_KEYS, "model")
    filters = {k: v for k, v in identity(section).items() if k not in request_keys}
    problems = _identify_problems(config)
    synthesis_id = digest(["synthesis", revisions["synthesis"], answers_id, filters, problems])
    folder = root / "syntheses" / answers_id / synthesis_id
    return Responses(synthesis_id, answers_id, folder, config, stamp)


def _request_keys(section: Synthesis) -> dict[str, Any]:
    """Return {key: value} of what affects a request, except the model."""
    keys = (*_SHARED_KEYS, *(_LOCAL_KEYS if section.provider == "local" else ()))
    return {key: value for key, value in identity(section).items() if key in keys}


def digest_request(section: Synthesis, *, local_model: str | None, revision: str | None) -> str:
    """Return a digest of what affects the answer to a prompt: model and sampling, not where prompts are read."""
    request = {k: v for k, v in _request_keys(section).items() if k not in _PROMPT_KEYS}
    model = _identify_model(local_model, revision) if local_model else section.model
    return digest([request, model])


def list_prompt_files(section: Synthesis) -> list[Path]:
    """Return the local files of prompts or templates in reading order; none for a dataset on the Hub.

    Raises ValueError when one does not exist or has an unknown ending.
    """
    if section.templates is not None:
        return expand_pattern(section.templates, key="synthesis.templates")
    prompts = section.prompts
    patterns = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if len(patterns) == 1 and is_hub_id(patterns[0]):
        return []
    return list(dict.fromkeys(path for pattern in patterns for path in _expand(pattern)))


def is_hub_id(name: str) -> bool:
    """Return whether `synthesis.prompts` is the id of a dataset on the Hub: not a path, no known ending, no file."""
    return (
        not is_path(name) and choose_prompt_reader(Path(name)) is None and not Path(name).exists()
    )


def choose_prompt_reader(path: Path) -> str | None:
    """Return the reader of a prompt file by its ending, one of PROMPT_SUFFIXES' values; None if unknown."""
    return PROMPT_SUFFIXES.get(find_ending(path))


def _expand(pattern: str) -> list[Path]:
    found = expand_pattern(pattern, key="synthesis.prompts")
    for path in found:
        if choose_prompt_reader(path) is None:
            raise ValueError(
                f"synthesis.prompts {str(path)!r} has no known ending: expected {', '.join(PROMPT_SUFFIXES)}, "
                f"compressed ({', '.join(COMPRESSED_SUFFIXES)}) or not. Rename or convert it."
            )
    return found


def local_model(config: Config) -> tuple[str, str | None]:
    """Return (folder or Hub id, revision) of the local model: synthesis.model, else the teacher."""
    section = config.synthesis
    if section.model is not None:
        return section.model, section.revision
    return str(config.teacher.model_path), section.revision or config.teacher.revision


def _identify_model(name: str, revision: str | None) -> Any:
    """Return the fingerprints of a local folder, or the name and revision of a Hub id."""
    folder = Path(name)
    if folder.is_dir():
        return [fingerprint_weights(folder), fingerprint_tokenizer(folder)]
    if folder.is_file():
        raise ValueError(f"synthesis.model {name!r} is {describe_model_file(folder)}")
    if is_path(name):
        raise ValueError(
            f"synthesis.model {name!r} does not exist (looked in {Path.cwd()}).{suggest_path(folder)} Give a folder "
            "that save_pretrained() wrote, or the id of a model on the Hub."
        )
    return [name, revision]


def _identify_problems(config: Config) -> list[str]:
    """Return the ids of the evaluation tasks whose problems must not be in the responses; files count by content."""
    if not config.synthesis.decontaminate:
        return []
    reduced = config.model_copy(update={"evaluation": config.evaluation.of_problems()})
    return [task.id for task in build_tasks(reduced, Path(), revision=0)]
