"""The config of a pruned model, from that of the model that it is a part of; loads no weights."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PretrainedConfig

from retort.config.sections import Student
from retort.config.student import FromTeacher


def choose_layers(num_layers: int, num_kept: int) -> tuple[int, ...]:
    """Return `num_kept` of `num_layers` layers, spread evenly: the first, the last, and between them equal steps.

    Layer j of the n kept ones is j (L - 1) / (n - 1) of the L, rounded half up; with n = 1 it is the first.
    """
    assert 1 <= num_kept <= num_layers, (num_kept, num_layers)
    if num_kept == 1:
        return (0,)
    steps = num_kept - 1
    return tuple((2 * j * (num_layers - 1) + steps) // (2 * steps) for j in range(num_kept))


def count_layers(config: PretrainedConfig) -> int | None:
    """Return the number of layers of a model, None where its config does not say."""
    found = getattr(config.get_text_config(), "num_hidden_layers", None)
    return found if isinstance(found, int) else None


def find_mistakes(section: Student, config: PretrainedConfig, *, name: str) -> Iterator[str]:
    """Yield what of `student.from_teacher` does not fit the model to prune, which is `name` in messages."""
    part, num_layers = section.from_teacher, count_layers(config)
    key = "student.from_teacher"
    if num_layers is None:
        yield (
            f"{key} is set ({section.start}), but the config of {name} ({config.model_type}) has no "
            "num_hidden_layers, so its layers are not known. Start from student.config or student.model_path instead."
        )
        return
    if part.layers is not None and part.layers > num_layers:
        yield f"{key}.layers is {part.layers}, but {name} has {num_layers} layers. Set {num_layers} or fewer."
    beyond = [index for index in part.layer_indices or () if index >= num_layers]
    if beyond:
        yield (
            f"{key}.layer_indices has {', '.join(map(str, beyond))}, but the layers of {name} are 0 to "
            f"{num_layers - 1}. Leave out what is beyond."
        )


def list_kept_layers(part: FromTeacher, config: PretrainedConfig) -> tuple[int, ...]:
    """Return the layers that are kept, in ascending order; all if neither their number nor a list is given."""
    num_layers = count_layers(config)
    assert num_layers is not None
    if part.layer_indices is not None:
        return tuple(part.layer_indices)
    return choose_layers(num_layers, part.layers or num_layers)


def shape_config(section: Student, config: PretrainedConfig, *, name: str) -> PretrainedConfig:
    """Return the config of the pruned model. Raises ValueError with what does not fit (`find_mistakes`)."""
    if mistakes := list(find_mistakes(section, config, name=name)):
        raise ValueError(" ".join(mistakes))
    kept = list_kept_layers(section.from_teacher, config)
    pruned = copy.deepcopy(config)
    _keep_layers(pruned.get_text_config(), kept)
    return pruned


def _keep_layers(text: PretrainedConfig, kept: Sequence[int]) -> None:
    """Set the number of layers, and shorten every list that has a value for each layer (`layer_types`)."""
    num_layers = int(text.num_hidden_layers)
    lists = {k: v for k, v in vars(text).items() if _is_by_layer(k, v, num_layers)}
    text.num_hidden_layers = len(kept)
    for key, values in lists.items():
        setattr(text, key, [values[index] for index in kept])


def _is_by_layer(key: str, value: Any, num_layers: int) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) == num_layers
    return is_list and not key.endswith("_token_id") and key != "architectures"
