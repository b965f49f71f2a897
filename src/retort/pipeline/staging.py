"""Downloads what a config takes from the Hub into this machine's cache, for jobs on nodes without a network.

Streams are not downloaded here: the rule `draw_corpus` takes its snapshot of them. What is in the cache is not
downloaded again.
"""

from collections.abc import Mapping
from pathlib import Path

from retort.artifacts.responses import list_prompt_files, local_model
from retort.config.dataset import SYNTHESIS
from retort.config.sections import Config, Dataset
from retort.corpus.hub import open_table
from retort.corpus.sources import is_hub
from retort.synthesis.prompts import read_prompts
from retort.tokens.tokenizer import explain_load_error, load_tokenizer


def stage_project(configs: Mapping[str, Config]) -> list[str]:
    """Download models, tokenizers and datasets of every run; return a line about each.

    Raises ValueError for the first one that cannot be downloaded.
    """
    models: dict[tuple[str, str | None], None] = {}
    tokenizers: dict[str, None] = {}
    notes: dict[str, None] = {}
    for config in configs.values():
        teacher = config.teacher
        if _is_hub_id(teacher.model_path) and teacher.model_path != "demo":
            models[str(teacher.model_path), teacher.revision] = None
        if _is_hub_id(config.student.model_path):
            models[str(config.student.model_path), config.student.revision] = None
        if _is_hub_id(config.dataset.tokenizer):
            tokenizers[str(config.dataset.tokenizer)] = None
        if config.dataset.name == SYNTHESIS:
            notes |= dict.fromkeys(_stage_prompts(config))
            model, revision = local_model(config)
            if config.synthesis.provider == "local" and _is_hub_id(model):
                models[model, revision] = None
        else:
            for dataset in config.dataset.sources:
                place = config.output.cache_folder
                notes |= dict.fromkeys(_stage_corpus(dataset, place))
    for name, revision in models:
        notes[f"model {name}: {stage_model(name, revision=revision)}"] = None
    for name in tokenizers:
        load_tokenizer(name)
        notes[f"tokenizer {name}"] = None
    return [*notes] or ["nothing of this config comes from the Hub"]


def stage_model(name: str, *, revision: str | None = None) -> Path:
    """Download a model's weights, as safetensors if possible, and its small files; return the folder in the cache.

    Skips other formats of the same weights, and subfolders, where some repositories keep the original weights. Raises
    ValueError when the model cannot be downloaded.
    """
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        files = list_repo_files(name, revision=revision)
        has_safetensors = any(file.endswith(".safetensors") for file in files)
        weights = "*.safetensors" if has_safetensors else "*.bin"
        wanted = [weights, "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
        folder = snapshot_download(
            name, revision=revision, allow_patterns=wanted, ignore_patterns="*/*"
        )
    except Exception as error:  # whatever the HTTP client raises
        raise ValueError(explain_load_error("model", name, error)) from error
    return Path(folder)


def _stage_corpus(dataset: Dataset, place: str) -> list[str]:
    """Download a Hub dataset that is not streamed; return a line about it, none for local files.

    place: the folder that a stream is saved in.
    """
    if not is_hub(dataset) or Path(dataset.name).is_dir():
        return []
    if dataset.streaming:
        return [
            f"stream {dataset.name}: not downloaded here, draw_corpus saves its rows in {place}"
        ]
    splits = [split for split in (dataset.split, dataset.validation_split) if split]
    return [
        f"dataset {dataset.name}, {split}: {len(open_table(dataset, split)):,} rows"
        for split in splits
    ]


def _stage_prompts(config: Config) -> list[str]:
    """Download prompts that are a dataset of the Hub; return a line about them, none for files and templates."""
    section = config.synthesis
    if section.templates or list_prompt_files(section):
        return []
    return [f"prompts of {section.prompts}: {len(read_prompts(section).prompts):,}"]


def _is_hub_id(name: str | None) -> bool:
    return name is not None and not Path(name).is_dir()
