"""Generate completions of prompts, greedily or sampled with a seed.

Legend: B prompts in a batch, T tokens.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, StoppingCriteria

from retort.cli import first_line
from retort.config.evaluation import SampleSettings
from retort.models.ends import list_eos_ids
from retort.models.samples import Sample, SamplePrompt, Samples
from retort.tokens.tokenizer import encode_prefix

logger = logging.getLogger(__name__)

TOP_P = 0.95  # of nucleus sampling, as in Chen et al., 2021
_STOP_INTERVAL = 16  # tokens between searches for stop strings


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the most probable one at temperature 0, else sampled; ends at a stop string or a limit."""

    temperature: float
    max_new_tokens: int
    seed: int
    stops: tuple[str, ...] = ()
    batch_size: int = 8
    top_p: float = TOP_P


@dataclass(frozen=True)
class Completion:
    """A model's completion of one prompt; is_cut: it reached its limit without an end."""

    text: str
    prompt_tokens: int
    new_tokens: int
    is_cut: bool


def complete_prompts(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], *, sampling: Sampling
) -> list[str]:
    """Return one completion of each prompt. Equal arguments on one device give equal completions."""
    ids = [encode_prefix(prompt, tokenizer) for prompt in prompts]
    return complete_ids(model, tokenizer, ids, sampling=sampling)


def complete_ids(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[list[int]], *, sampling: Sampling
) -> list[str]:
    """Return one completion, as text, of each prompt of token ids; long prompts lose their beginning.

    Equal arguments on one device give equal completions.
    """
    context = find_context_length(model.config)
    ids = [clip_prompt(prompt, context, sampling.max_new_tokens) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: list[str] = [""] * len(ids)
    torch.manual_seed(sampling.seed)
    for start in range(0, len(order), sampling.batch_size):
        indices = order[start : start + sampling.batch_size]
        batch = complete_batch(model, tokenizer, [ids[i] for i in indices], sampling=sampling)
        for i, completion in zip(indices, batch, strict=True):
            found[i] = completion.text
    return found


def sample_model(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: list[SamplePrompt],
    settings: SampleSettings,
) -> Samples:
    """Return a model's continuations of the prompts; if it cannot generate, none, and `missing` says why."""
    try:
        texts = [
            complete_ids(model, tokenizer, [list(p.ids) for p in prompts], sampling=sampling)
            for sampling in _list_samplings(settings)
        ]
    except Exception as error:  # models with their own code may raise anything
        missing = (
            f"{type(model).__name__} cannot generate ({type(error).__name__}: {first_line(error)})"
        )
        logger.warning(f"no samples: {missing}")
        return Samples(tuple(prompts), missing=missing)
    return Samples(tuple(prompts), tuple(map(Sample, *texts)) if prompts else ())


def _list_samplings(settings: SampleSettings) -> list[Sampling]:
    longest, seed = settings.max_new_tokens, settings.seed
    return [
        Sampling(temperature=temperature, max_new_tokens=longest, seed=seed)
        for temperature in (0.0, settings.temperature)
    ]


def find_context_length(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model can read; None if its config does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length and length > 1 else None


def limit_new_tokens(context: int | None, max_new_tokens: int) -> int:
    """Return how many tokens a completion may have: at most half of the context."""
    return max_new_tokens if context is None else min(max_new_tokens, max(1, context // 2))


def clip_prompt(ids: list[int], context: int | None, max_new_tokens: int) -> list[int]:
    """Return as many of a prompt's last tokens as fit into the context beside its completion."""
    return ids if context is None else ids[-(context - limit_new_tokens(context, max_new_tokens)) :]


@torch.inference_mode()
def complete_batch(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: list[list[int]],
    *,
    sampling: Sampling,
    eos_ids: Sequence[int] | None = None,
) -> list[Completion]:
    """Return the completions of one batch of prompts, whose ids `clip_prompt` has returned.

    eos_ids: the ids that end a text, by default those of `list_eos_ids`. Sampling uses torch's global generator, not
    `sampling.seed`.
    """
    if eos_ids is None:
        eos_ids = list_eos_ids(getattr(model, "generation_config", None), tokenizer)
    limit = limit_new_tokens(find_context_length(model.config), sampling.max_new_tokens)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    width = max(map(len, ids))
    ids_BT = torch.tensor([[pad_id] * (width - len(row)) + row for row in ids])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    device = model.get_input_embeddings().weight.device
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    if sampling.stops:
        options["stopping_criteria"] = [_StopStrings(tokenizer, sampling.stops, width)]
    output_BT: Tensor = model.generate(
        input_ids=ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        max_new_tokens=limit,
        pad_token_id=pad_id,
        eos_token_id=list(eos_ids) or None,
        **options,
    )
    new = [row[width:].tolist() for row in output_BT.cpu()]
    return [
        describe_completion(tokenizer, *pair, limit=limit, eos_ids=eos_ids)
        for pair in zip(ids, new, strict=True)
    ]


class _StopStrings(StoppingCriteria):  # type: ignore[misc]  # transformers is not type-checked
    """Ends the rows that hold a stop string; searches every few tokens, where transformers' own does so at each."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], width: int) -> None:
        self.tokenizer, self.stops, self.width = tokenizer, stops, width

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        has_stop = [False] * len(input_ids)
        if (input_ids.shape[1] - self.width) % _STOP_INTERVAL == 0:
            texts = self.tokenizer.batch_decode(input_ids[:, self.width :])
            has_stop = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(has_stop, device=input_ids.device)


def describe_completion(
    tokenizer: Any, prompt_ids: list[int], new_ids: list[int], *, limit: int, eos_ids: Sequence[int]
) -> Completion:
    """Return the completion of generated ids, up to the first id that ends a text; limit: of new tokens."""
    length = next((n for n, i in enumerate(new_ids) if i in eos_ids), None)
    text = _decode(tokenizer, prompt_ids, new_ids[:length])
    new_tokens = len(new_ids) if length is None else length + 1
    is_cut = length is None and new_tokens >= limit
    return Completion(text, len(prompt_ids), new_tokens, is_cut=is_cut)


def _decode(tokenizer: Any, prompt_ids: list[int], new_ids: list[int]) -> str:
    """Return the text of new tokens, decoded with their prompt because some tokenizers drop a text's first space."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before: str = tokenizer.decode(prompt_ids, **options)
    whole: str = tokenizer.decode(prompt_ids + new_ids, **options)
    if whole.startswith(before):
        return whole[len(before) :]
    alone: str = tokenizer.decode(new_ids, **options)
    return alone
