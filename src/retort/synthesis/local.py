"""Local generation: a model that is loaded here answers prompts in fixed batches, the unit of resuming.

A batch is `batch_size` consecutive prompts, sampled with the batch's own seed. So an answer depends only on the
prompts, the model and the settings, not on which answers existed before, or on the attempt.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from retort.cli import first_line, is_out_of_memory
from retort.config.sections import Synthesis, Teacher
from retort.io.digests import digest
from retort.io.progress import Meter
from retort.models.ends import list_eos_ids
from retort.models.generate import (
    Completion,
    Sampling,
    clip_prompt,
    complete_batch,
    find_context_length,
)
from retort.models.load import describe_device, load_teacher, name_dtype
from retort.synthesis.client import describe_usage
from retort.synthesis.journal import Journal
from retort.synthesis.prompts import LabeledPrompt
from retort.synthesis.providers import Answer
from retort.tokens.chat import ChatFormat
from retort.tokens.tokenizer import encode_prefix, load_tokenizer

_NUM_SEEDS = 2**32
_TEMPERATURE = 0.7  # when synthesis.temperature is not set


class LocalGenerator(ABC):
    """Answers prompts with a model of its own, which is loaded when the first answer is missing."""

    unit: ClassVar[str]  # of the progress

    def __init__(
        self,
        section: Synthesis,
        prompts: Sequence[LabeledPrompt],
        journal: Journal,
        *,
        model_path: str,
        loading: Teacher,
    ) -> None:
        self.section, self.prompts, self.journal = section, prompts, journal
        self.model_path, self.loading = model_path, loading
        self.device, self.dtype = "none", "none"  # until the model is loaded

    @abstractmethod
    def generate(self, indices: Sequence[int]) -> None:
        """Generate the missing answers to these prompts, and write them into the journal."""

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.model_path, **self.loading.source)

    @property
    def _sampling(self) -> Sampling:
        section = self.section
        return Sampling(
            temperature=_TEMPERATURE if section.temperature is None else section.temperature,
            max_new_tokens=section.max_tokens,
            seed=section.seed,
            top_p=section.top_p or 1.0,
        )

    def _seed(self, start: int) -> int:
        """Return the seed of the prompts that are sampled together, given the index of the first."""
        return int(digest([self.section.seed, start]), 16) % _NUM_SEEDS

    def _encode(self, index: int) -> list[int]:
        """Return a prompt's token ids: in the model's chat template, or as plain text when it has none."""
        text, system = self.prompts[index].text, self.section.system_prompt
        if self._chat is not None:
            messages = [{"role": "system", "content": system}] * bool(system)
            return self._chat.encode_prompt([*messages, {"role": "user", "content": text}])
        return encode_prefix(f"{system}\n\n{text}" if system else text, self.tokenizer)

    @cached_property
    def _chat(self) -> ChatFormat | None:
        has_template = getattr(self.tokenizer, "chat_template", None)
        return ChatFormat(self.tokenizer) if has_template else None

    def _add_answer(self, index: int, completion: Completion) -> None:
        """Write an answer into the journal, unless it has one."""
        if index in self.journal.answers:
            return
        path = Path(self.model_path)
        answer = Answer(
            text=completion.text,
            finish="length" if completion.is_cut else "stop",
            input_tokens=completion.prompt_tokens,
            output_tokens=completion.new_tokens,
            model=path.name if path.is_dir() else self.model_path,
        )
        self.journal.add_answer(index, answer)

    def _open_progress(self, total: int) -> Meter:
        def describe() -> str:
            return describe_usage(self.section, self.journal.usage)

        return Meter(total, unit=self.unit, describe=describe)


class TransformersGenerator(LocalGenerator):
    """Generates with transformers."""

    unit = "batches"

    def generate(self, indices: Sequence[int]) -> None:
        """Generate every batch in which one of these prompts has no answer yet.

        Raises ValueError when a batch does not fit into memory.
        """
        size = self.section.batch_size
        starts = sorted({i // size * size for i in indices if i not in self.journal.answers})
        with self._open_progress(len(starts)) as progress:
            for start in starts:
                batch = range(start, min(start + size, len(self.prompts)))
                for index, completion in zip(batch, self._complete(start, batch), strict=True):
                    self._add_answer(index, completion)
                progress.advance()

    def _complete(self, start: int, batch: range) -> list[Completion]:
        model, tokenizer, sampling = self._model, self.tokenizer, self._sampling
        context = find_context_length(model.config)
        ids = [clip_prompt(self._encode(i), context, sampling.max_new_tokens) for i in batch]
        ends = list_eos_ids(model.generation_config, tokenizer)
        torch.manual_seed(self._seed(start))
        try:
            return complete_batch(model, tokenizer, ids, sampling=sampling, eos_ids=ends)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"{len(batch)} prompts at a time do not fit into memory ({first_line(error)}): lower "
                f"synthesis.batch_size (now {self.section.batch_size}), which generates all answers again, or raise "
                "teacher.generation.gpus_per_model, which keeps them."
            ) from None

    @cached_property
    def _model(self) -> PreTrainedModel:
        torch.set_num_threads(self.loading.generation.cpu_threads)
        model = load_teacher(self.model_path, self.loading).model
        self.device, self.dtype = describe_device(model.device), name_dtype(model.dtype)
        return model
