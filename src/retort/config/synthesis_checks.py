"""Checks of the `synthesis` section, across its keys and with `dataset`."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from retort.config.schema import KEY_PREFIXES, ConfigError, show

Flat = Mapping[str, Any]

SYNTHESIS = "synthesis"  # the dataset.name of a corpus that a model writes
# The columns of that corpus, responses.jsonl.
COLUMNS = {"prompt_column": "prompt", "response_column": "response"}
_SET_BY_SYNTHESIS = (
    "data_files",
    "prompt_column",
    "response_column",
    "config_name",
    "revision",
    "validation_split",
)


def check_synthesis_keys(c: Flat, defaults: Flat) -> None:
    """Raise ConfigError for the first contradiction."""
    _refuse_secrets(c)
    if c["dataset.name"] != SYNTHESIS:
        _refuse_unused(c, defaults)
        return
    _check_provider(c)
    _check_corpus(c, defaults)
    _check_prompts(c)
    _check_numbers(c)


def _refuse_secrets(c: Flat) -> None:
    """Raise ConfigError for an API key, without showing it: configs are recorded and shared."""
    advice = (
        "Set an environment variable: export OPENAI_API_KEY=..., or the one that "
        "synthesis.api_key_variable names."
    )
    texts = {k: v for k, v in c.items() if k.startswith("synthesis.") and isinstance(v, str)}
    for key, value in texts.items():
        if value.startswith(KEY_PREFIXES):
            raise ConfigError(
                f"{key} looks like an API key, which does not belong in a config. {advice}"
            )
    url = c["synthesis.base_url"]
    if url is None:
        return
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            f"synthesis.base_url has a user name, password or query, which do not belong in a config. {advice}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"synthesis.base_url is {show(url)}, but a URL is expected, such as http://localhost:8000/v1."
        )


def _refuse_unused(c: Flat, defaults: Flat) -> None:
    """Raise ConfigError when `synthesis` is set, but the corpus is another one."""
    for key, value in c.items():
        if key.startswith("synthesis.") and value != defaults[key]:
            raise ConfigError(
                f"{key} is {show(value)}, but dataset.name is {show(c['dataset.name'])}, so its responses "
                f"would not be used. Set dataset.name: {SYNTHESIS}, or remove synthesis."
            )


def _check_provider(c: Flat) -> None:
    provider, model = c["synthesis.provider"], c["synthesis.model"]
    if provider is None:
        raise ConfigError(
            f"dataset.name is {SYNTHESIS!r}, but synthesis.provider is null. Set it to openai (any "
            "OpenAI-compatible server), anthropic or local."
        )
    if provider != "local" and model is None:
        raise ConfigError(
            f"synthesis.provider is {provider}, but synthesis.model is null. Set it to the provider's name of a model."
        )
    if provider == "local" and c["synthesis.base_url"] is not None:
        raise ConfigError(
            f"synthesis.base_url is {show(c['synthesis.base_url'])}, but synthesis.provider is local, which uses no "
            "server. Use synthesis.provider: openai, or remove synthesis.base_url."
        )
    if provider != "local" and c["synthesis.engine"] != "auto":
        raise ConfigError(
            f"synthesis.engine is {show(c['synthesis.engine'])}, but synthesis.provider is {provider}, whose server "
            "chooses its engine. Use synthesis.provider: local, or remove synthesis.engine."
        )
    if provider == "local" and model is None and c["teacher.model_path"] is None:
        raise ConfigError(
            "synthesis.provider is local, but synthesis.model and teacher.model_path are both null. Set one of them to "
            "a folder or a Hub id."
        )
    if "demo" in (c["teacher.model_path"], model if provider == "local" else None):
        raise ConfigError(
            "teacher.model_path or synthesis.model is 'demo', but the demo's teacher cannot answer prompts. Use "
            "another model, or dataset.name: demo."
        )


def _check_corpus(c: Flat, defaults: Flat) -> None:
    for key in _SET_BY_SYNTHESIS:
        value = c[f"dataset.{key}"]
        if value != defaults[f"dataset.{key}"] and value != COLUMNS.get(key):
            raise ConfigError(
                f"dataset.{key} is {show(value)}, but dataset.name is {SYNTHESIS!r}, which sets its file and columns. "
                f"Remove dataset.{key}."
            )
    if c["dataset.streaming"] or c["dataset.sharding"] == "files":
        key, value = (
            ("streaming", "false") if c["dataset.streaming"] else ("sharding", "interleaved")
        )
        raise ConfigError(
            f"dataset.{key} is {show(c[f'dataset.{key}'])}, but dataset.name is {SYNTHESIS!r}, which is one local "
            f"file. Use dataset.{key}: {value}."
        )


def _check_prompts(c: Flat) -> None:
    prompts, templates = c["synthesis.prompts"], c["synthesis.templates"]
    if (prompts is None) == (templates is None):
        both = "both null" if prompts is None else "both set"
        raise ConfigError(
            f"synthesis.prompts and synthesis.templates are {both}, but exactly one of them is needed. Set "
            "synthesis.prompts to a file of prompts, or synthesis.templates to a YAML file (docs/synthesis.md)."
        )
    if templates is not None and c["synthesis.num_examples"] is None:
        raise ConfigError(
            f"synthesis.templates is {show(templates)}, but synthesis.num_examples is null. Set it to the number of "
            "responses to keep."
        )


def _check_numbers(c: Flat) -> None:
    least, most = c["synthesis.min_characters"], c["synthesis.max_characters"]
    if most is not None and most < least:
        raise ConfigError(
            f"synthesis.max_characters is {most}, less than synthesis.min_characters, {least}: no response would be "
            "kept. Raise it."
        )
    longest = c["synthesis.max_tokens"]
    for key in ("tokens_per_minute", "max_total_tokens"):
        limit = c[f"synthesis.{key}"]
        if limit is not None and limit <= longest:
            raise ConfigError(
                f"synthesis.{key} is {limit}, but one response may have synthesis.max_tokens, {longest}: no request "
                "would fit. Raise the first, or lower the second."
            )
    prices = c["synthesis.price_per_million_input"] + c["synthesis.price_per_million_output"]
    if c["synthesis.max_cost"] is not None and prices == 0:
        raise ConfigError(
            f"synthesis.max_cost is {c['synthesis.max_cost']}, but no price is known. Set "
            "synthesis.price_per_million_input and price_per_million_output to the provider's."
        )
