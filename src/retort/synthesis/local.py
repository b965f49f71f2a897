"""A local model answers prompts, in fixed batches: the unit of resuming, as parts are of the teacher's pass.

A batch is `batch_size` prompts in their order, drawn with a seed of its own. So an answer depends on the prompts, the
model and the settings, and not on what was answered before, or in which attempt.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from retort.cli import first_line, is_out_of_memory, open_terminal
from retort.config.sections import Synthesis, Teacher
from retort.io.digests import digest
from retort.models.generate import (
    Completion,
    Sampling,
    clip_prompt,
    complete_batch,
    list_ends,
    longest_context,
)
from retort.models.load import describe_device, load_teacher
from retort.synthesis.journal import Journal
from retort.synthesis.prompts import Prompt
from retort.synthesis.providers import Answer
from retort.tokens.tokenizer import encode_beginning, encode_chat, load_tokenizer

logger = logging.getLogger(__name__)

_SEEDS = 2**32
_LINE_S = 10.0
_TEMPERATURE = 0.7  # where the config leaves it to the provider


class Writer(ABC):
    """Answers prompts with a model of its own, which is loaded when the first answer is missing."""

    unit: ClassVar[str]  # what is counted on the way

    def __init__(
        self,
        section: Synthesis,
        prompts: Sequence[Prompt],
        journal: Journal,
        *,
        model_path: str,
        loading: Teacher,
    ) -> None:
        self.section, self.prompts, self.journal = section, prompts, journal
        self.model_path, self.loading = model_path, loading
        self.device = "none"  # until the model is loaded
        self._said = time.monotonic()
        self._done = 0

    @abstractmethod
    def write(self, places: Sequence[int]) -> None:
        """Answer the prompts of these places that are not answered yet."""

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(
            self.model_path,
            revision=self.loading.revision,
            trust_remote_code=self.loading.trust_remote_code,
        )

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
        """Return the seed of the prompts that are drawn together from this place on."""
        return int(digest([self.section.seed, start]), 16) % _SEEDS

    def _encode(self, place: int) -> list[int]:
        """Return a prompt's ids: through the model's chat template, or where it has none, as a text to go on from."""
        text, system = self.prompts[place].text, self.section.system_prompt
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "system", "content": system}] * bool(system)
            return encode_chat([*messages, {"role": "user", "content": text}], self.tokenizer)
        return encode_beginning(f"{system}\n\n{text}" if system else text, self.tokenizer)

    def _keep(self, place: int, completion: Completion) -> None:
        """Write an answer into the journal, unless it is there."""
        if place in self.journal.answers:
            return
        path = Path(self.model_path)
        answer = Answer(
            text=completion.text,
            finish="length" if completion.is_cut else "stop",
            input_tokens=completion.prompt_tokens,
            output_tokens=completion.new_tokens,
            model=path.name if path.is_dir() else self.model_path,
        )
        self.journal.keep(place, answer)

    @contextmanager
    def _open_bar(self, total: int) -> Iterator[Any]:
        self._done = 0
        with (
            open_terminal() or nullcontext() as terminal,
            tqdm(total=total, desc=self.unit, file=terminal, disable=terminal is None) as bar,
        ):
            yield bar

    def _advance(self, bar: Any) -> None:
        """Move the bar; without a terminal, say a line every ten seconds, and at the end."""
        bar.update()
        self._done += 1
        now = time.monotonic()
        if bar.disable and (now - self._said >= _LINE_S or self._done == bar.total):
            self._said = now
            paid = self.journal.paid.tokens
            logger.info(f"{self._done:,} of {bar.total:,} {self.unit}: {paid:,} tokens")


class BatchWriter(Writer):
    """Runs transformers' generate."""

    unit = "batches"

    def write(self, places: Sequence[int]) -> None:
        """Answer every batch in which one of these places is not answered yet."""
        size = self.section.batch_size
        starts = sorted(
            {place // size * size for place in places if place not in self.journal.answers}
        )
        with self._open_bar(len(starts)) as bar:
            for start in starts:
                batch = range(start, min(start + size, len(self.prompts)))
                for place, completion in zip(batch, self._complete(start, batch), strict=True):
                    self._keep(place, completion)
                self._advance(bar)

    def _complete(self, start: int, batch: range) -> list[Completion]:
        model, tokenizer, sampling = self._model, self.tokenizer, self._sampling
        context = longest_context(model.config)
        ids = [clip_prompt(self._encode(p), context, sampling.max_new_tokens) for p in batch]
        ends = list_ends(model.generation_config, tokenizer)
        torch.manual_seed(self._seed(start))
        try:
            return complete_batch(model, tokenizer, ids, sampling=sampling, ends=ends)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"{len(batch)} prompts at a time do not fit into memory ({first_line(error)}): lower "
                f"synthesis.batch_size (now {self.section.batch_size}), which asks anew, or raise "
                "teacher.generation.gpus_per_model, which does not."
            ) from None

    @cached_property
    def _model(self) -> PreTrainedModel:
        torch.set_num_threads(self.loading.generation.cpu_threads)
        model = load_teacher(self.model_path, self.loading).model
        self.device = describe_device(model.device)
        return model
