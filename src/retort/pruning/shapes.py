"""The config of a pruned model, from that of the model that it is a part of; loads no weights."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from retort.config.sections import Student
from retort.config.student import FromTeacher


@dataclass(frozen=True)
class Widths:
    """The sizes of a decoder: ids, hidden channels, neurons, and heads in groups that share a key head."""

    ids: int
    hidden: int
    neurons: int
    heads: int
    groups: int
    head_size: int

    @classmethod
    def read(cls, config: PretrainedConfig) -> "Widths | None":
        """Return the sizes in a model's config, None where it does not have each as a number."""
        text = config.get_text_config()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
        sizes: list[Any] = [getattr(text, name, None) for name in names]
        groups = getattr(text, "num_key_value_heads", None) or sizes[-1]
        if not all(isinstance(size, int) for size in (*sizes, groups)):
            return None
        ids, hidden, neurons, heads = sizes
        head_size = getattr(text, "head_dim", None) or hidden // heads
        return cls(ids, hidden, neurons, heads, groups, head_size)

    @property
    def group_size(self) -> int:
        """Heads that share a key head."""
        return self.heads // self.groups


@dataclass(frozen=True)
class Plan:
    """How a model is pruned: the layers that are kept, the config with these alone, and the config in the end."""

    layers: tuple[int, ...]
    of_layers: PretrainedConfig
    config: PretrainedConfig
    is_narrower: bool  # whether the two differ


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
    yield from _find_wrong_widths(part, config, name=name)


def _find_wrong_widths(part: FromTeacher, config: PretrainedConfig, *, name: str) -> Iterator[str]:
    key, whole = "student.from_teacher", Widths.read(config)
    asked = {k: v for k, v in part.sizes.items() if k not in ("layers", "layer_indices")}
    if whole is None:
        for size, value in asked.items():
            yield (
                f"{key}.{size} is {value}, but the config of {name} ({config.model_type}) does not have its sizes as "
                f"one number each, so only layers can be pruned. Leave {size} out."
            )
        return
    text = config.get_text_config()
    for size, value in asked.items():
        if value > (most := getattr(text, size)):
            yield f"{key}.{size} is {value}, but that of {name} is {most}. Set {most} or less."
    heads = part.num_attention_heads
    if heads is not None and heads % whole.group_size:
        yield (
            f"{key}.num_attention_heads is {heads}, but in {name} each key head is shared by {whole.group_size} heads, "
            f"which stay together. Set a multiple of {whole.group_size}."
        )


def list_kept_layers(part: FromTeacher, config: PretrainedConfig) -> tuple[int, ...]:
    """Return the layers that are kept, in ascending order; all if neither their number nor a list is given."""
    num_layers = count_layers(config)
    assert num_layers is not None
    if part.layer_indices is not None:
        return tuple(part.layer_indices)
    return choose_layers(num_layers, part.layers or num_layers)


def plan_pruning(section: Student, config: PretrainedConfig, *, name: str) -> Plan:
    """Return how a model is pruned. Raises ValueError with what does not fit (`find_mistakes`)."""
    if mistakes := list(find_mistakes(section, config, name=name)):
        raise ValueError(" ".join(mistakes))
    part, of_layers = section.from_teacher, copy.deepcopy(config)
    kept = list_kept_layers(part, config)
    _keep_layers(of_layers.get_text_config(), kept)
    pruned = copy.deepcopy(of_layers)
    _set_widths(pruned.get_text_config(), part, Widths.read(config))
    try:
        pruned = type(pruned).from_dict(pruned.to_dict())
    except Exception as error:  # of transformers' and huggingface_hub's checks of a config
        why = str(error.__cause__ or error).rstrip(".")
        raise ValueError(
            f"student.from_teacher asks for {section.start}, but transformers refuses a {config.model_type} of these "
            f"sizes: {why}. Choose others."
        ) from error
    is_narrower = bool(part.sizes.keys() - {"layers", "layer_indices"})
    return Plan(kept, of_layers, pruned, is_narrower)


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


def _set_widths(text: PretrainedConfig, part: FromTeacher, whole: Widths | None) -> None:
    """Set the other sizes that are asked for; a head keeps its size, which otherwise may follow from these."""
    for key in ("hidden_size", "intermediate_size", "vocab_size"):
        if (value := getattr(part, key)) is not None:
            setattr(text, key, value)
    if part.hidden_size is not None or part.num_attention_heads is not None:
        assert whole is not None
        text.head_dim = whole.head_size
    if part.num_attention_heads is not None:
        assert whole is not None
        text.num_attention_heads = part.num_attention_heads
        text.num_key_value_heads = part.num_attention_heads // whole.group_size
