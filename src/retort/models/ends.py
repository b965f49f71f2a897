"""Where a text ends: the ids at which generating stops, and the special ids of a finished student's configs."""

from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from retort.tokens.chat import find_template_ends


def list_eos_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a text: those of the tokenizer, its chat template and the model's generation config."""
    own = getattr(generation_config, "eos_token_id", None)
    eos_ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    eos_ids += find_template_ends(tokenizer)
    return list(dict.fromkeys(i for i in eos_ids if i is not None))


def list_ends_beside(path: str, tokenizer: Any, *, revision: str | None = None) -> list[int]:
    """Return the ids that end a text, of a tokenizer and of the generation config beside it, if there is one."""
    try:
        beside = GenerationConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError):  # many folders have none
        beside = None
    return list_eos_ids(beside, tokenizer)


def set_special_ids(model: PreTrainedModel, tokenizer: Any, ends: list[int]) -> None:
    """Give a model's configs the tokenizer's special ids, and the ids that end a text.

    A config that was copied from another model has that model's ids, which may be other tokens here, or none.
    """
    config, generation = model.config, model.generation_config
    size = int(config.get_text_config().vocab_size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own, known = getattr(config, name, None), getattr(tokenizer, name)
        ids = own if isinstance(own, list) else [own]
        is_foreign = any(i is not None and not 0 <= i < size for i in ids)
        if known is not None or is_foreign:
            setattr(config, name, known)
        if generation is not None and (known is not None or is_foreign):
            setattr(generation, name, known)
    known_ends = [i for i in ends if i < size]
    if generation is not None and known_ends:
        generation.eos_token_id = known_ends if len(known_ends) > 1 else known_ends[0]
