"""A local model answers prompts by vLLM, which fills its batches by itself, and is many times as fast on GPUs.

Each prompt is drawn with a seed of its own, and each answer is in the journal as soon as it is whole. What a kill left
open is written again; seldom to another text, where other prompts in the batch change the order of a sum.
"""

import os
import sys
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from transformers import GenerationConfig

from retort.cli import first_line
from retort.config.sections import Synthesis, Teacher
from retort.models.generate import (
    clip_prompt,
    completion_room,
    describe_completion,
    list_ends,
    longest_context,
)
from retort.models.load import choose_device, choose_dtype, describe_device, load_model_config
from retort.synthesis.local import Writer

REQUIREMENT = "vllm>=0.32"
_ENVIRONMENT = {
    # The engine in this process: it ends with it, however it ends.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def require_vllm(section: Synthesis) -> None:
    """Raise ValueError, with the line that installs it, where vLLM is asked for and not there."""
    if section.engine == "vllm" and find_spec("vllm") is None:
        raise ValueError(
            f"synthesis.engine is vllm, but vllm is not installed here. Type: {sys.executable} -m pip install "
            f"'{REQUIREMENT}', or set synthesis.engine: transformers."
        )


def takes_vllm(section: Synthesis, loading: Teacher) -> bool:
    """Say whether vLLM runs the model: where it is asked for, or left open, installed, and the model is on GPUs."""
    if section.engine != "auto":
        return section.engine == "vllm"
    return find_spec("vllm") is not None and choose_device(loading.device).type == "cuda"


class VllmWriter(Writer):
    """Runs vLLM on all GPUs that are visible, split between them as tensor parallel."""

    unit = "prompts"

    def write(self, places: Sequence[int]) -> None:
        """Answer the prompts of these places, in the order in which they come to an end."""
        from vllm import SamplingParams

        missing = [place for place in places if place not in self.journal.answers]
        sampling, engine = self._sampling, self._model.llm_engine
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=self._seed(place),
                max_tokens=self._room,
                stop_token_ids=self._ends,
                detokenize=False,
            )
            for place in missing
        ]
        prompts = [{"prompt_token_ids": self._ids[place]} for place in missing]
        asked = self._model.enqueue(prompts, params, use_tqdm=False)
        # "7-9c1e03ab" when it is asked (0.32; before, "7"), and "7" when it is answered
        requests = (request.partition("-")[0] for request in asked)
        place_of = dict(zip(requests, missing, strict=True))
        with self._open_bar(len(missing)) as bar:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    place = place_of[output.request_id]
                    new = list(output.outputs[0].token_ids)
                    completion = describe_completion(
                        self.tokenizer, self._ids[place], new, room=self._room, ends=self._ends
                    )
                    self._keep(place, completion)
                    self._advance(bar)

    @cached_property
    def _ids(self) -> list[list[int]]:
        """All prompts, as ids that leave room."""
        longest = self.section.max_tokens
        places = range(len(self.prompts))
        return [clip_prompt(self._encode(place), self._context, longest) for place in places]

    @cached_property
    def _context(self) -> int | None:
        loading = self.loading
        trust = loading.trust_remote_code
        return longest_context(
            load_model_config(self.model_path, revision=loading.revision, trust_remote_code=trust)
        )

    @property
    def _room(self) -> int:
        return completion_room(self._context, self.section.max_tokens)

    @cached_property
    def _ends(self) -> list[int]:
        try:
            own = GenerationConfig.from_pretrained(self.model_path, revision=self.loading.revision)
        except OSError:  # models have one or not
            own = None
        return list_ends(own, self.tokenizer)

    @cached_property
    def _model(self) -> Any:
        """The model, with room for the longest prompt and its response: for the whole context there often is none."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm

        device = choose_device(self.loading.device)
        try:
            model = vllm.LLM(
                self.model_path,
                revision=self.loading.revision,
                tokenizer_revision=self.loading.revision,
                trust_remote_code=self.loading.trust_remote_code,
                dtype=str(choose_dtype(self.loading.dtype, device)).removeprefix("torch."),
                max_model_len=max(map(len, self._ids)) + self._room,
                tensor_parallel_size=torch.cuda.device_count() if device.type == "cuda" else 1,
                enforce_eager=device.type != "cuda",  # elsewhere it compiles for minutes
                seed=self.section.seed,
            )
        except Exception as error:  # vLLM's own kinds, and those of what it starts
            raise ValueError(
                f"vLLM cannot run {self.model_path!r} here ({type(error).__name__}: {first_line(error)}). Set "
                "synthesis.engine: transformers, or teacher.generation.gpus_per_model to a number of GPUs that it fits."
            ) from error
        self.device = f"vLLM {vllm.__version__} on {describe_device(device)}"
        return model
