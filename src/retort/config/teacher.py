"""The section `teacher`: the model to learn from, and how it is run."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from retort.config.schema import Found, show
from retort.config.section import Count, Positive, Section, Text, Texts, setting

if TYPE_CHECKING:
    from retort.config.sections import Config


_GPU_ID = re.compile(r"\d+|(GPU|MIG)-[A-Za-z0-9/-]+")


class Generation(Section):
    """How workers compute the teacher's logits."""

    num_workers: Count | None = setting(None, changes_id=False)
    """Jobs that share the teacher's work. null means one per GPU group (1 without GPUs). Any number makes the same
    cache, and it may be changed between runs."""
    batch_size: Count = 4
    """Sequences in one forward pass of the teacher, if they are as long as the longest of their part; batches of
    shorter ones have more, up to the same number of tokens. Lower it if memory runs out."""
    batch_tokens: Count | Literal["auto"] | None = None
    """Tokens in one forward pass, padding included, in place of batch_size; a longer sequence is read alone. auto finds
    how many fit the device, once for each cache, and records it in batch_tokens.json beside the cache's parts."""
    packing: bool = False
    """Concatenate the sequences of a batch in one row instead of padding them. Faster with an attn_implementation that
    does not attend across sequences (flash_attention_2). A teacher that mixes packed sequences is detected when it is
    loaded, and pads."""
    gpus_per_model: Count = setting(1, changes_id=False)
    """GPUs that together hold one copy of the teacher."""
    gpu_type: Text | None = setting(None, changes_id=False)
    """The kind of GPU that jobs will get, by its name in retort estimate, such as h100-80: teacher and students are
    checked against its memory before anything runs. null takes that of the machine of the check, if it has one."""
    gpus: Text | Texts | None = setting(None, changes_id=False)
    """GPU ids to use, such as "0,1,2,3", divided into groups of gpus_per_model; or a list of groups, such as ["0", "1",
    "2,3"]; null means all GPUs of the machine."""
    force_regenerate: bool | int | float | Text = False
    """Any value other than false (a date, a number) becomes part of the cache's id, so a new value makes a new cache
    and keeps the old one."""
    cpu_threads: Count = 1
    """CPU threads of a teacher on the CPU. Another number rounds differently, so it changes ids."""


class OneTeacher(Section):
    """A model to learn from."""

    model_path: Text | None = setting("demo", is_model=True)
    """Hub id or folder of a causal language model; demo trains a small one on the corpus; null means none (for
    distillation_type output only)."""
    revision: Text | None = None
    """Commit, tag or branch of the teacher on the Hub; null means its newest."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the teacher's weights; auto is bfloat16 if the device supports it."""
    attn_implementation: Text | None = None
    """The attention implementation of transformers, such as sdpa or flash_attention_2; null lets it choose."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose authors you trust."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", changes_id=False)
    """Where the teacher runs; auto uses GPUs if there are any."""
    generation: Generation = Field(default_factory=Generation)

    @property
    def source(self) -> dict[str, Any]:
        """What transformers is told beside the path of the model, its config or its tokenizer."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


class MixedTeacher(OneTeacher):
    """One of several teachers, with the keys of the section teacher, generation too; those left out are as there."""

    weight: Positive = 1.0
    """Its share of the mixture is its weight, divided by the sum of all weights."""


class Teacher(OneTeacher):
    """The model to learn from."""

    imported: Text | None = setting(None, is_path=True)
    """Folder of logits that `retort import` made of a published dataset, to learn from in place of a model. Their text
    is the corpus, and model_path is null."""
    mix: tuple[MixedTeacher, ...] = ()
    """A list of teachers of one tokenizer that a student learns from together: from the mixture of their
    distributions, position by position. Each has a weight, and overrides the section's other keys as a run does. The
    first, or that of model_path if it is set, is the main one, whose tokenizer is the text's. Each has its own cache,
    the same that a run with it alone makes."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_demo(cls, values: Any) -> Any:
        """An import has no model, so the default one is not meant."""
        if isinstance(values, Mapping) and values.get("imported") and "model_path" not in values:
            return {**values, "model_path": None}
        return values

    @property
    def members(self) -> tuple["Teacher", ...]:
        """Each teacher by itself: those of `mix`, or this one alone."""
        found = [{k: getattr(one, k) for k in OneTeacher.model_fields} for one in self.mix]
        return tuple(self.model_copy(update={**keys, "mix": ()}) for keys in found) or (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """The shares of `members`, which sum to 1."""
        total = sum(one.weight for one in self.mix)
        return tuple(one.weight / total for one in self.mix) or (1.0,)

    def order_mix(self) -> "Teacher":
        """Return the section with the keys of the main teacher, first in `mix`, which is empty without others."""
        if not self.mix:
            return self
        mix = sorted(self.mix, key=lambda one: one.model_path != self.model_path)
        main = self.model_copy(update={"mix": tuple(mix)}).members[0]
        return main.model_copy(update={"mix": tuple(mix) if len(mix) > 1 else ()})


def check_teacher(c: "Config") -> Found:
    teacher, kind = c.teacher.model_path, c.training.distillation_type
    if teacher is None and c.teacher.imported is None and kind != "output":
        yield (
            f"training.distillation_type is {kind}, which needs a teacher, but teacher.model_path is null. Set "
            "teacher.model_path to a model, or use training.distillation_type: output."
        )


def check_mix(c: "Config") -> Found:
    teacher = c.teacher
    paths = [one.model_path for one in teacher.mix]
    for number, one in enumerate(teacher.mix):
        here = f"teacher.mix[{number}]"
        if one.model_path in (None, "demo"):
            yield (
                f"{here}.model_path is {show(one.model_path)}, but only models that exist can be mixed. Give "
                f"{here}.model_path: a Hub id or a folder."
            )
        elif one.model_copy(update={"weight": 1.0}) in [
            other.model_copy(update={"weight": 1.0}) for other in teacher.mix[:number]
        ]:
            yield (
                f"{here} is {show(one.model_path)}, which teacher.mix lists already. List each teacher once, and give "
                "it the sum of the weights."
            )
    if paths and teacher.model_path not in (None, "demo", *paths):
        yield (
            f"teacher.model_path is {show(teacher.model_path)}, but teacher.mix lists {', '.join(map(show, paths))} "
            "only. List it too, with its weight, or set teacher.model_path to one of these: the main one, whose "
            "tokenizer is the text's."
        )


def check_imported(c: "Config") -> Found:
    """An import has its own text, tokenizer and cache, at temperature 1, and no model."""
    imported, training = c.teacher.imported, c.training
    if imported is None:
        return
    if c.teacher.model_path is not None:
        yield (
            f"teacher.model_path is {show(c.teacher.model_path)} and teacher.imported {show(imported)}: a student "
            "learns from one of them. Leave one out."
        )
    if c.teacher.mix:
        yield "teacher.mix and teacher.imported are both set: a student learns from one of them. Leave one out."
    if c.dataset.tokenizer not in (None, f"{imported}/tokenizer"):
        yield (
            f"dataset.tokenizer is {show(c.dataset.tokenizer)}, but teacher.imported has its own. Leave "
            "dataset.tokenizer out."
        )
    if training.distillation_type == "output":
        return
    if not training.use_cached_logits:
        yield (
            "training.use_cached_logits is false, but teacher.imported has no model to learn from live. Leave it out."
        )
    if training.temperature != 1.0:
        yield (
            f"training.temperature is {training.temperature} (the default is {type(training)().temperature}), but "
            "teacher.imported has the tail's mass at temperature 1 only. Use training.temperature: 1.0."
        )


def check_tokenizer(c: "Config") -> Found:
    teacher, tokenizer = c.teacher.model_path, c.dataset.tokenizer
    if c.teacher.imported is not None:
        return
    if teacher is None and tokenizer is None and c.training.distillation_type == "output":
        yield (
            "teacher.model_path and dataset.tokenizer are both null, so there is no tokenizer. Set dataset.tokenizer "
            "to a Hub id or a folder with a tokenizer, for instance gpt2."
        )
    if teacher == "demo" and tokenizer is not None:
        yield (
            f"dataset.tokenizer is {show(tokenizer)}, but teacher.model_path is 'demo', which is trained with its own "
            "tokenizer. Set dataset.tokenizer: null, or name another teacher."
        )


def check_gpus(c: "Config") -> Found:
    gpus, key = c.teacher.generation.gpus, "teacher.generation.gpus"
    ids = _gpu_ids(gpus)
    if bad := [i for i in ids if not _GPU_ID.fullmatch(i)]:
        yield (
            f"{key} is {show(gpus)}, where {show(bad[0])} is not a GPU id. Write ids as nvidia-smi "
            'shows them, separated by commas, such as "0,1,2,3", or groups of them, such as ["0", "1", "2,3"].'
        )
    elif twice := sorted({i for i in ids if ids.count(i) > 1}):
        yield (
            f"{key} is {show(gpus)}, where GPU {', '.join(twice)} is listed more than once, but a GPU "
            "holds at most one copy of the teacher. List every GPU once."
        )


def check_gpus_per_model(c: "Config") -> Found:
    gpus, per_model = c.teacher.generation.gpus, c.teacher.generation.gpus_per_model
    ids = _gpu_ids(gpus)
    if gpus is not None and not isinstance(gpus, str) and per_model != 1:
        yield (
            f"teacher.generation.gpus_per_model is {per_model}, but teacher.generation.gpus is {show(gpus)}, a list "
            "of groups, whose sizes are already given. Remove teacher.generation.gpus_per_model, or "
            f'write the GPUs as one text to divide: "{",".join(ids)}".'
        )
    elif gpus is not None and per_model > len(ids):
        yield (
            f"teacher.generation.gpus_per_model is {per_model}, but teacher.generation.gpus lists {len(ids)}: "
            f"{','.join(ids)}. List at least {per_model} GPUs, or lower teacher.generation.gpus_per_model."
        )


def check_device(c: "Config") -> Found:
    gpus, key = c.teacher.generation.gpus, "teacher.generation.gpus"
    if gpus is not None and c.teacher.device == "cpu":
        yield (
            f"teacher.device is cpu, but {key} is {show(gpus)}. Remove {key} to run the teacher on "
            "the CPU, or set teacher.device: auto."
        )


def _gpu_ids(gpus: str | tuple[str, ...] | None) -> list[str]:
    groups = [gpus] if isinstance(gpus, str) else gpus or ()
    return [part.strip() for group in groups for part in group.split(",")]
