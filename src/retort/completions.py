"""A model goes on from a prompt: greedy, or drawn with a seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from retort.commands import first_line
from retort.config import Evaluation
from retort.samples import Prompt, Sample, Samples
from retort.tokens import encode_beginning

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


def complete_prompts(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], *, sampling: Sampling
) -> list[str]:
    """Return one completion of each prompt, as text. Equal arguments on one device give equal completions."""
    ids = [encode_beginning(prompt, tokenizer) for prompt in prompts]
    return complete_ids(model, tokenizer, ids, sampling=sampling)


def complete_ids(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[list[int]], *, sampling: Sampling
) -> list[str]:
    """Return one completion of each prompt of token ids, as text.

    A prompt keeps its last tokens where it and its completion would be longer than the model can read (of a context
    too short for both, half is the completion's). Equal arguments on one device give equal completions.
    """
    context = longest_context(model)
    room = _completion_room(model, sampling.max_new_tokens)
    ids = [p if context is None else p[-(context - room) :] for p in prompts]
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    found: list[str] = [""] * len(ids)
    torch.manual_seed(sampling.seed)
    for start in range(0, len(order), sampling.batch_size):
        places = order[start : start + sampling.batch_size]
        texts = _complete_batch(model, tokenizer, [ids[p] for p in places], room, sampling)
        for place, text in zip(places, texts, strict=True):
            found[place] = text
    return found


def sample_model(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: list[Prompt],
    settings: Evaluation,
    *,
    say: Callable[[str], None],
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
        say(f"no samples: {missing}")
        return Samples(tuple(prompts), missing=missing)
    return Samples(tuple(prompts), tuple(map(Sample, *texts)) if prompts else ())


def _ways(settings: Evaluation) -> list[Sampling]:
    longest, seed = settings.sample_max_new_tokens, settings.sample_seed
    return [
        Sampling(temperature=temperature, max_new_tokens=longest, seed=seed)
        for temperature in (0.0, settings.sample_temperature)
    ]


def longest_context(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model can read; None where its config does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length and length > 1 else None


def _completion_room(model: PreTrainedModel, max_new_tokens: int) -> int:
    context = longest_context(model)
    return max_new_tokens if context is None else min(max_new_tokens, max(1, context // 2))


@torch.inference_mode()
def _complete_batch(
    model: PreTrainedModel, tokenizer: Any, ids: list[list[int]], room: int, sampling: Sampling
) -> list[str]:
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
            "top_p": TOP_P,
            "top_k": 0,
        }
    if sampling.stops:
        options["stopping_criteria"] = [_Stopped(tokenizer, sampling.stops, width)]
    written_BT: Tensor = model.generate(
        input_ids=ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        max_new_tokens=room,
        pad_token_id=filler,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
    new = [row[width:].tolist() for row in written_BT.cpu()]
    return [_decode(tokenizer, *pair) for pair in zip(ids, new, strict=True)]


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


def _decode(tokenizer: Any, prompt_ids: list[int], new_ids: list[int]) -> str:
    """Return the text of new tokens; decoded with their prompt, because some tokenizers drop a text's first space."""
    if tokenizer.eos_token_id in new_ids:
        new_ids = new_ids[: new_ids.index(tokenizer.eos_token_id)]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before: str = tokenizer.decode(prompt_ids, **options)
    whole: str = tokenizer.decode(prompt_ids + new_ids, **options)
    if whole.startswith(before):
        return whole[len(before) :]
    alone: str = tokenizer.decode(new_ids, **options)
    return alone
