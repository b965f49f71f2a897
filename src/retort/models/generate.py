"""A model goes on from a prompt: greedy, or drawn with a seed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, StoppingCriteria

from retort.cli import first_line
from retort.config.sections import Evaluation
from retort.models.samples import Prompt, Sample, Samples
from retort.tokens.tokenizer import encode_prefix

logger = logging.getLogger(__name__)

TOP_P = 0.95  # the nucleus that is drawn from, as in Chen et al., 2021
_LOOK_EVERY = 16  # tokens


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the most probable one at temperature 0, else drawn; up to `max_new_tokens` or a stop."""

    temperature: float
    max_new_tokens: int
    seed: int
    stops: tuple[str, ...] = ()
    batch_size: int = 8
    top_p: float = TOP_P


@dataclass(frozen=True)
class Completion:
    """What a model wrote to one prompt; `is_cut` where it had no room to come to an end."""

    text: str
    prompt_tokens: int
    new_tokens: int
    is_cut: bool


def complete_prompts(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], *, sampling: Sampling
) -> list[str]:
    """Return one completion of each prompt, as text. Equal arguments on one device give equal completions."""
    ids = [encode_prefix(prompt, tokenizer) for prompt in prompts]
    return complete_ids(model, tokenizer, ids, sampling=sampling)


def complete_ids(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[list[int]], *, sampling: Sampling
) -> list[str]:
    """Return one completion of each prompt of token ids, as text; a long prompt is clipped.

    Equal arguments on one device give equal completions.
    """
    context = longest_context(model.config)
    ids = [clip_prompt(prompt, context, sampling.max_new_tokens) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    found: list[str] = [""] * len(ids)
    torch.manual_seed(sampling.seed)
    for start in range(0, len(order), sampling.batch_size):
        places = order[start : start + sampling.batch_size]
        written = complete_batch(model, tokenizer, [ids[p] for p in places], sampling=sampling)
        for place, completion in zip(places, written, strict=True):
            found[place] = completion.text
    return found


def sample_model(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: list[Prompt],
    settings: Evaluation,
) -> Samples:
    """Return a model's continuations; one that cannot write keeps its numbers all the same, and `missing` says why."""
    try:
        texts = [
            complete_ids(model, tokenizer, [list(p.ids) for p in prompts], sampling=sampling)
            for sampling in _ways(settings)
        ]
    except Exception as error:  # models with code of their own fail in ways of their own
        missing = (
            f"{type(model).__name__} did not write ({type(error).__name__}: {first_line(error)})"
        )
        logger.warning(f"no samples: {missing}")
        return Samples(tuple(prompts), missing=missing)
    return Samples(tuple(prompts), tuple(map(Sample, *texts)) if prompts else ())


def _ways(settings: Evaluation) -> list[Sampling]:
    longest, seed = settings.sample_max_new_tokens, settings.sample_seed
    return [
        Sampling(temperature=temperature, max_new_tokens=longest, seed=seed)
        for temperature in (0.0, settings.sample_temperature)
    ]


def longest_context(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model can read; None where its config does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length and length > 1 else None


def completion_room(context: int | None, max_new_tokens: int) -> int:
    """Return how many tokens a completion may have: of a short context, half at most."""
    return max_new_tokens if context is None else min(max_new_tokens, max(1, context // 2))


def clip_prompt(ids: list[int], context: int | None, max_new_tokens: int) -> list[int]:
    """Return a prompt's last tokens, as many as leave room for its completion.

    Of a context too short for both, half is the completion's.
    """
    return ids if context is None else ids[-(context - completion_room(context, max_new_tokens)) :]


def list_ends(generation_config: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a text: the tokenizer's, and those of the model's own way of generating (chat models)."""
    own = getattr(generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(end for end in ends if end is not None))


@torch.inference_mode()
def complete_batch(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: list[list[int]],
    *,
    sampling: Sampling,
    ends: Sequence[int] | None = None,
) -> list[Completion]:
    """Return the completions of one batch of prompts, given as ids that leave room.

    `ends` are the ids that end a text, the tokenizer's where not given. Drawn ones follow torch's global generator.
    """
    if ends is None:
        ends = [tokenizer.eos_token_id]
    room = completion_room(longest_context(model.config), sampling.max_new_tokens)
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    width = max(map(len, ids))
    ids_BT = torch.tensor([[filler] * (width - len(row)) + row for row in ids])
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
        options["stopping_criteria"] = [_Stopped(tokenizer, sampling.stops, width)]
    written_BT: Tensor = model.generate(
        input_ids=ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        max_new_tokens=room,
        pad_token_id=filler,
        eos_token_id=ends[0] if len(ends) == 1 else list(ends),
        **options,
    )
    new = [row[width:].tolist() for row in written_BT.cpu()]
    return [
        describe_completion(tokenizer, *pair, room=room, ends=ends)
        for pair in zip(ids, new, strict=True)
    ]


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Says which rows hold a stop, looking once in so many tokens (transformers' own looks at each, and is slow)."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], width: int) -> None:
        self.tokenizer, self.stops, self.width = tokenizer, stops, width

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        has_stop = [False] * len(input_ids)
        if (input_ids.shape[1] - self.width) % _LOOK_EVERY == 0:
            texts = self.tokenizer.batch_decode(input_ids[:, self.width :])
            has_stop = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(has_stop, device=input_ids.device)


def describe_completion(
    tokenizer: Any, prompt_ids: list[int], new_ids: list[int], *, room: int, ends: Sequence[int]
) -> Completion:
    """Return what was written, up to the first id that ends a text, within so much room."""
    length = next((place for place, i in enumerate(new_ids) if i in ends), None)
    text = _decode(tokenizer, prompt_ids, new_ids[:length])
    written = len(new_ids) if length is None else length + 1
    return Completion(text, len(prompt_ids), written, is_cut=length is None and written >= room)


def _decode(tokenizer: Any, prompt_ids: list[int], new_ids: list[int]) -> str:
    """Return the text of new tokens; decoded with their prompt, because some tokenizers drop a text's first space."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before: str = tokenizer.decode(prompt_ids, **options)
    whole: str = tokenizer.decode(prompt_ids + new_ids, **options)
    if whole.startswith(before):
        return whole[len(before) :]
    alone: str = tokenizer.decode(new_ids, **options)
    return alone
