"""A local model answers prompts, in fixed batches: the unit of resuming, as parts are of the teacher's pass.

A batch is `batch_size` prompts in their order, drawn with a seed of its own. So an answer depends on the prompts, the
model and the settings, and not on what was answered before, or in which attempt.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from retort.commands import first_line, is_out_of_memory
from retort.completions import Sampling, clip_prompt, complete_batch, list_ends
from retort.config import Synthesis, Teacher
from retort.journal import Journal
from retort.models import describe_device, load_teacher
from retort.prompts import Prompt
from retort.provenance import digest
from retort.providers import Answer
from retort.tokens import encode_beginning, encode_chat, load_tokenizer

_SEEDS = 2**32
_LINE_S = 10.0
_TEMPERATURE = 0.7  # where the config leaves it to the provider


class Writer:
    """Answers prompts with a model, which is loaded when the first batch is missing."""

    def __init__(
        self,
        section: Synthesis,
        prompts: Sequence[Prompt],
        journal: Journal,
        *,
        model_path: str,
        loading: Teacher,
        say: Callable[[str], None],
        terminal: TextIO | None = None,
    ) -> None:
        self.section, self.prompts, self.journal = section, prompts, journal
        self.model_path, self.loading = model_path, loading
        self.device = "none"  # until the model is loaded
        self._say, self._terminal = say, terminal
        self._said = time.monotonic()
        self._loaded: tuple[PreTrainedModel, Any] | None = None

    def write(self, places: Sequence[int]) -> None:
        """Answer every batch in which one of these places is not answered yet."""
        size = self.section.batch_size
        starts = sorted(
            {place // size * size for place in places if place not in self.journal.answers}
        )
        with tqdm(
            total=len(starts), desc="batches", file=self._terminal, disable=not self._terminal
        ) as bar:
            for number, start in enumerate(starts, start=1):
                batch = range(start, min(start + size, len(self.prompts)))
                for place, answer in zip(batch, self._answer(start, batch), strict=True):
                    if place not in self.journal.answers:
                        self.journal.keep(place, answer)
                bar.update()
                self._tell(number, len(starts))

    def _tell(self, number: int, count: int) -> None:
        """Say a line every ten seconds, and at the end; a bar says it all the time."""
        now = time.monotonic()
        if self._terminal is None and (now - self._said >= _LINE_S or number == count):
            self._said = now
            self._say(f"batch {number:,} of {count:,}: {self.journal.paid.tokens:,} tokens")

    def _answer(self, start: int, batch: range) -> list[Answer]:
        model, tokenizer = self._load()
        longest = self.section.max_tokens
        sampling = Sampling(
            temperature=_TEMPERATURE
            if self.section.temperature is None
            else self.section.temperature,
            max_new_tokens=longest,
            seed=self.section.seed,
            top_p=self.section.top_p or 1.0,
        )
        ids = [clip_prompt(self._encode(tokenizer, p), model, longest) for p in batch]
        torch.manual_seed(int(digest([self.section.seed, start]), 16) % _SEEDS)
        try:
            written = complete_batch(
                model, tokenizer, ids, sampling=sampling, ends=list_ends(model, tokenizer)
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"{len(batch)} prompts at a time do not fit into memory ({first_line(error)}): lower "
                f"synthesis.batch_size (now {self.section.batch_size}), which asks anew, or raise "
                "teacher.generation.gpus_per_model, which does not."
            ) from None
        return [
            Answer(
                text=completion.text,
                finish="length" if completion.is_cut else "stop",
                input_tokens=completion.prompt_tokens,
                output_tokens=completion.new_tokens,
                model=Path(self.model_path).name
                if Path(self.model_path).is_dir()
                else self.model_path,
            )
            for completion in written
        ]

    def _encode(self, tokenizer: Any, place: int) -> list[int]:
        """Return a prompt's ids: through the model's chat template, or where it has none, as a text to go on from."""
        text, system = self.prompts[place].text, self.section.system_prompt
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "system", "content": system}] * bool(system)
            return encode_chat([*messages, {"role": "user", "content": text}], tokenizer)
        return encode_beginning(f"{system}\n\n{text}" if system else text, tokenizer)

    def _load(self) -> tuple[PreTrainedModel, Any]:
        if self._loaded is None:
            torch.set_num_threads(self.loading.generation.cpu_threads)
            model = load_teacher(self.model_path, self.loading).model
            self.device = describe_device(model.device)
            tokenizer = load_tokenizer(
                self.model_path,
                revision=self.loading.revision,
                trust_remote_code=self.loading.trust_remote_code,
            )
            self._loaded = model, tokenizer
        return self._loaded
