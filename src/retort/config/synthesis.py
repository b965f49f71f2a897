"""The section `synthesis`: a corpus of responses that a model writes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from retort.config.dataset import SYNTHESIS
from retort.config.schema import KEY_PREFIXES, Found, show
from retort.config.section import Count, NonNegative, Positive, Section, Text, Texts, setting

if TYPE_CHECKING:
    from retort.config.sections import Config


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
_ADVICE = "Set an environment variable: export OPENAI_API_KEY=..., or the one that synthesis.api_key_variable names."


class Synthesis(Section):
    """A corpus of responses that a stronger model writes to prompts, for `dataset.name: synthesis`."""

    provider: Literal["openai", "anthropic", "local"] | None = setting(
        None, accepts="openai, anthropic or local"
    )
    """What answers: openai (any OpenAI-compatible server, by base_url), anthropic, or local (a model that runs here, on
    the teacher's device and GPUs)."""
    model: Text | None = setting(None, is_model=True)
    """The provider's name of the model; for local, a folder (ids depend on its content) or Hub id, and null means
    teacher.model_path."""
    revision: Text | None = None
    """Commit, tag or branch of a local model on the Hub; null means its newest."""
    base_url: Text | None = setting(None, changes_id=False)
    """URL of the API, such as http://localhost:8000/v1; null means the provider's."""
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = setting(
        None, changes_id=False, accepts="the name of a variable"
    )
    """The environment variable with the API key; null means OPENAI_API_KEY or ANTHROPIC_API_KEY. The key itself does
    not belong in a config."""
    prompts: Text | Texts | None = setting(None, is_model=True)
    """Path or glob, or a list of them, of prompts as .jsonl, .json, .csv, .parquet or .txt (one a line); or the id of a
    dataset on the Hub. Ids depend on the files' content. Labels are read from the columns category and language."""
    prompts_split: Text = "train"
    """The split of a Hub dataset of prompts."""
    prompt_column: Text = "prompt"
    """The column with the prompts."""
    templates: Text | None = setting(None, is_path=True)
    """Path of a YAML file of templates, topics, and proportions of categories and languages, from which prompts are
    made (docs/synthesis.md), instead of prompts. Ids depend on its content."""
    num_examples: Count | None = None
    """Responses to keep. Prompts are used in order, and more of them for responses that a filter drops; null uses each
    prompt once."""
    system_prompt: Text | None = None
    """The system prompt, which is not part of the corpus."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Sampling temperature: 0 is greedy; null is the provider's default, which newer models of Anthropic and OpenAI
    require (0.7 for local)."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus sampling; null is the provider's default (1 for local)."""
    max_tokens: Count = 1024
    """Maximum length of a response, in the model's tokens."""
    seed: NonNegative = 0
    """Seed of sampling, if the provider takes one (anthropic does not), and of the order of templates."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What runs a local model: transformers, vllm, or auto, which is vLLM if it is installed and the model is on GPUs.
    The two sample different responses, so setting one changes ids."""
    batch_size: Count = 8
    """Prompts that a local model answers at a time with transformers, and the unit of resuming; vLLM makes its own
    batches."""
    min_characters: Count = 1
    """Drop shorter responses."""
    max_characters: Count | None = None
    """Drop longer responses; null means none."""
    keep_truncated: bool = False
    """Keep responses that were truncated at max_tokens."""
    keep_refusals: bool = False
    """Keep responses in which the model declines to answer."""
    keep_duplicates: bool = False
    """Keep responses that are equal to an earlier prompt's, as short ones may be."""
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Drop a prompt with its response if the Jaccard similarity of its five-word sequences to those of an earlier one
    (by MinHash) is at least this; null keeps all."""
    response_language: Annotated[str, Field(min_length=2)] | None = None
    """The natural language of responses, such as en or english; null uses a prompt's own label, if it is a language."""
    check_language: bool = True
    """Drop responses in another natural language, if the wanted one is known."""
    check_code: bool = True
    """Drop responses with a code block that does not parse, in languages that can be parsed."""
    decontaminate: bool = True
    """Drop prompts and responses that share a sequence of words with a problem of evaluation.benchmarks."""
    decontamination_words: Annotated[int, Field(ge=3)] = 13
    """Length of such a sequence; shorter problems are matched as a whole."""
    concurrency: Count = setting(8, changes_id=False)
    """Concurrent requests."""
    requests_per_minute: Count | None = setting(None, changes_id=False)
    """The provider's rate limit; null means none."""
    tokens_per_minute: Count | None = setting(None, changes_id=False)
    """The provider's rate limit, counting prompts and responses of max_tokens; null means none."""
    timeout_s: Positive = setting(120.0, changes_id=False)
    """Seconds after which a request is retried."""
    max_attempts: Count = setting(8, changes_id=False)
    """Attempts per prompt before the job fails."""
    price_per_million_input: Annotated[float, Field(ge=0)] = setting(0.0, changes_id=False)
    """Price of a million tokens of prompts, in the currency of max_cost."""
    price_per_million_output: Annotated[float, Field(ge=0)] = setting(0.0, changes_id=False)
    """Price of a million tokens of responses, in the currency of max_cost."""
    max_cost: Annotated[float, Field(ge=0)] | None = setting(None, changes_id=False)
    """Budget of this set of answers, for all attempts together: no request that could exceed it is sent; null means
    none."""
    max_total_tokens: Count | None = setting(None, changes_id=False)
    """The same in tokens, prompts and responses together."""
    output: Text | None = setting(None, changes_id=False, is_path=True)
    """Path of a copy of the responses as JSONL. If it is set later, nothing is copied until synthesis.json
    is removed."""


def _of_synthesis(check: Callable[["Config"], Found]) -> Callable[["Config"], Found]:
    """Return the check for configs whose corpus is a synthesis."""
    return lambda c: check(c) if c.dataset.name == SYNTHESIS else iter(())


def check_secrets(c: "Config") -> Found:
    """Refuse an API key, without showing it: configs are recorded and shared."""
    for key, value in vars(c.synthesis).items():
        if isinstance(value, str) and value.startswith(KEY_PREFIXES):
            yield (
                f"synthesis.{key} looks like an API key, which does not belong in a config. {_ADVICE}"
            )


def check_url(c: "Config") -> Found:
    url = c.synthesis.base_url
    if url is None or url.startswith(KEY_PREFIXES):
        return
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        yield (
            f"synthesis.base_url has a user name, password or query, which do not belong in a config. {_ADVICE}"
        )
    elif parts.scheme not in ("http", "https") or not parts.hostname:
        yield (
            f"synthesis.base_url is {show(url)}, but a URL is expected, such as http://localhost:8000/v1."
        )


def check_unused(c: "Config") -> Found:
    """Refuse a `synthesis` that is set when the corpus is another one."""
    if c.dataset.name == SYNTHESIS:
        return
    for key, value in vars(c.synthesis).items():
        if value != getattr(Synthesis(), key):
            yield (
                f"synthesis.{key} is {show(value)}, but dataset.name is {show(c.dataset.name)}, so its responses "
                f"would not be used. Set dataset.name: {SYNTHESIS}, or remove synthesis."
            )
            return


@_of_synthesis
def check_provider(c: "Config") -> Found:
    provider, url, engine = c.synthesis.provider, c.synthesis.base_url, c.synthesis.engine
    if provider is None:
        yield (
            f"dataset.name is {SYNTHESIS!r}, but synthesis.provider is null. Set it to openai (any "
            "OpenAI-compatible server), anthropic or local."
        )
        return
    if provider == "local" and url is not None:
        yield (
            f"synthesis.base_url is {show(url)}, but synthesis.provider is local, which uses no "
            "server. Use synthesis.provider: openai, or remove synthesis.base_url."
        )
    if provider != "local" and engine != "auto":
        yield (
            f"synthesis.engine is {show(engine)}, but synthesis.provider is {provider}, whose server "
            "chooses its engine. Use synthesis.provider: local, or remove synthesis.engine."
        )


@_of_synthesis
def check_model(c: "Config") -> Found:
    provider, model, teacher = c.synthesis.provider, c.synthesis.model, c.teacher.model_path
    if provider is None:
        return
    if provider != "local" and model is None:
        yield (
            f"synthesis.provider is {provider}, but synthesis.model is null. Set it to the provider's name of a model."
        )
    if provider == "local" and model is None and teacher is None:
        yield (
            "synthesis.provider is local, but synthesis.model and teacher.model_path are both null. Set one of them to "
            "a folder or a Hub id."
        )
    if "demo" in (teacher, model if provider == "local" else None):
        yield (
            "teacher.model_path or synthesis.model is 'demo', but the demo's teacher cannot answer prompts. Use "
            "another model, or dataset.name: demo."
        )


@_of_synthesis
def check_dataset(c: "Config") -> Found:
    for key in _SET_BY_SYNTHESIS:
        value = getattr(c.dataset, key)
        if value is not None and value != COLUMNS.get(key):
            yield (
                f"dataset.{key} is {show(value)}, but dataset.name is {SYNTHESIS!r}, which sets its file and columns. "
                f"Remove dataset.{key}."
            )
    wrong = {"streaming": "false"} if c.dataset.streaming else {}
    if c.dataset.sharding == "files":
        wrong["sharding"] = "interleaved"
    for key, right in wrong.items():
        yield (
            f"dataset.{key} is {show(getattr(c.dataset, key))}, but dataset.name is {SYNTHESIS!r}, which is one local "
            f"file. Use dataset.{key}: {right}."
        )


@_of_synthesis
def check_prompts(c: "Config") -> Found:
    prompts, templates = c.synthesis.prompts, c.synthesis.templates
    if (prompts is None) == (templates is None):
        both = "both null" if prompts is None else "both set"
        yield (
            f"synthesis.prompts and synthesis.templates are {both}, but exactly one of them is needed. Set "
            "synthesis.prompts to a file of prompts, or synthesis.templates to a YAML file (docs/synthesis.md)."
        )
    elif templates is not None and c.synthesis.num_examples is None:
        yield (
            f"synthesis.templates is {show(templates)}, but synthesis.num_examples is null. Set it to the number of "
            "responses to keep."
        )


@_of_synthesis
def check_characters(c: "Config") -> Found:
    least, most = c.synthesis.min_characters, c.synthesis.max_characters
    if most is not None and most < least:
        yield (
            f"synthesis.max_characters is {most}, less than synthesis.min_characters, {least}: no response would be "
            "kept. Raise it."
        )


@_of_synthesis
def check_limits(c: "Config") -> Found:
    longest = c.synthesis.max_tokens
    for key in ("tokens_per_minute", "max_total_tokens"):
        limit = getattr(c.synthesis, key)
        if limit is not None and limit <= longest:
            yield (
                f"synthesis.{key} is {limit}, but one response may have synthesis.max_tokens, {longest}: no request "
                "would fit. Raise the first, or lower the second."
            )


@_of_synthesis
def check_prices(c: "Config") -> Found:
    prices = c.synthesis.price_per_million_input + c.synthesis.price_per_million_output
    if c.synthesis.max_cost is not None and prices == 0:
        yield (
            f"synthesis.max_cost is {c.synthesis.max_cost}, but no price is known. Set "
            "synthesis.price_per_million_input and price_per_million_output to the provider's."
        )
