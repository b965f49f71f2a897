"""Local generation by vLLM, which batches prompts continuously and is many times as fast on GPUs.

Each prompt is sampled with its own seed, and each answer is in the journal as soon as it is complete. Answers that a
kill interrupted are generated again; rarely with another text, when other prompts in the batch change the order of a
sum.
"""

import os
import sys
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch

from retort.cli import first_line
from retort.config.sections import Synthesis, Teacher
from retort.models.ends import list_ends_beside
from retort.models.generate import (
    clip_prompt,
    describe_completion,
    find_context_length,
    limit_new_tokens,
)
from retort.models.load import (
    choose_device,
    choose_dtype,
    describe_device,
    load_model_config,
    name_dtype,
)
from retort.synthesis.local import LocalGenerator

REQUIREMENT = "vllm>=0.32"
_ENVIRONMENT = {
    # Run the engine in this process, so that it never outlives it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def require_vllm(section: Synthesis) -> None:
    """Raise ValueError, with the command that installs it, when vLLM is required and not installed."""
    if section.engine == "vllm" and find_spec("vllm") is None:
        raise ValueError(
            f"synthesis.engine is vllm, but vllm is not installed. Type: {sys.executable} -m pip install "
            f"'{REQUIREMENT}', or set synthesis.engine: transformers."
        )


def uses_vllm(section: Synthesis, loading: Teacher) -> bool:
    """Return whether vLLM runs the model: when required, or for `engine: auto` when it is installed and uses GPUs."""
    if section.engine != "auto":
        return section.engine == "vllm"
    return find_spec("vllm") is not None and choose_device(loading.device).type == "cuda"


class VllmGenerator(LocalGenerator):
    """Generates with vLLM on all visible GPUs, by tensor parallelism."""

    unit = "answers"

    def generate(self, indices: Sequence[int]) -> None:
        """Generate the missing answers to these prompts, in the order in which they are complete.

        Raises ValueError when vLLM cannot run the model.
        """
        from vllm import SamplingParams

        missing = [index for index in indices if index not in self.journal.answers]
        sampling, engine = self._sampling, self._model.llm_engine
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=self._seed(index),
                max_tokens=self._max_new_tokens,
                stop_token_ids=self._ends,
                detokenize=False,
            )
            for index in missing
        ]
        prompts = [{"prompt_token_ids": self._ids[index]} for index in missing]
        queued = self._model.enqueue(prompts, params, use_tqdm=False)
        # vLLM 0.32 returns "7-9c1e03ab" here (earlier versions "7"), but "7" with the output.
        request_ids = (request.partition("-")[0] for request in queued)
        index_of = dict(zip(request_ids, missing, strict=True))
        with self._open_progress(len(missing)) as progress:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    index = index_of[output.request_id]
                    completion = describe_completion(
                        self.tokenizer,
                        self._ids[index],
                        list(output.outputs[0].token_ids),
                        limit=self._max_new_tokens,
                        eos_ids=self._ends,
                    )
                    self._add_answer(index, completion)
                    progress.advance()

    @cached_property
    def _ids(self) -> list[list[int]]:
        """The token ids of all prompts, clipped so that the response fits into the context."""
        max_tokens, indices = self.section.max_tokens, range(len(self.prompts))
        return [clip_prompt(self._encode(index), self._context, max_tokens) for index in indices]

    @cached_property
    def _context(self) -> int | None:
        return find_context_length(load_model_config(self.model_path, **self.loading.source))

    @property
    def _max_new_tokens(self) -> int:
        return limit_new_tokens(self._context, self.section.max_tokens)

    @cached_property
    def _ends(self) -> list[int]:
        return list_ends_beside(self.model_path, self.tokenizer, revision=self.loading.revision)

    @cached_property
    def _model(self) -> Any:
        """The model, with memory for the longest prompt and its response: the whole context often does not fit."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm

        device = choose_device(self.loading.device)
        dtype = name_dtype(choose_dtype(self.loading.dtype, device))
        try:
            model = vllm.LLM(
                self.model_path,
                tokenizer_revision=self.loading.revision,
                **self.loading.source,
                dtype=dtype,
                max_model_len=max(map(len, self._ids)) + self._max_new_tokens,
                tensor_parallel_size=torch.cuda.device_count() if device.type == "cuda" else 1,
                enforce_eager=device.type != "cuda",  # else it compiles for minutes
                seed=self.section.seed,
            )
        except Exception as error:  # vLLM raises many types, its workers more
            raise ValueError(
                f"vLLM cannot run {self.model_path!r} here ({type(error).__name__}: {first_line(error)}). Set "
                "synthesis.engine: transformers, or teacher.generation.gpus_per_model to a number of GPUs that it fits."
            ) from error
        self.device, self.dtype = f"vLLM {vllm.__version__} on {describe_device(device)}", dtype
        return model
