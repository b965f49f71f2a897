"""What all students of the quality benchmark share: the plan, the teacher's distributions, the folder of results.

Legend: P positions, T those of a sequence, C those of a chunk, V vocabulary, D width of the student.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.distributions.build import ensure
from benchmarks.distributions.settings import Settings
from benchmarks.quality.targets import MAKERS, Targets, load_targets

WAYS = ("CE", "FullKD", *MAKERS)
STATES = ("half", "end")  # of FullKD's training, at which gradients are compared
CHUNK = 64  # positions whose logits are held at once


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a student's numbers depend on, besides the way and the seed."""

    teacher: Settings
    steps: int = 300
    positions_per_step: int = 256  # consecutive, of one sequence
    num_evaluated: int = 24  # sequences at the end; no student trains on them
    num_angle: int = 16  # sequences at the beginning; angles are of their mean gradient
    learning_rate: float = 4e-3  # the peak, after a tenth of the steps; then a cosine to 0
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4


def digest(entry: dict[str, Any]) -> str:
    """Return 16 hex digits of a JSON object."""
    return xxhash.xxh3_64_hexdigest(json.dumps(entry, sort_keys=True).encode())


class Experiment:
    """The plan, the teacher's distributions, each way's targets in the folder, and the finished students."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.plan, self.folder = plan, folder
        self.data = ensure(folder / "logits", plan.teacher)
        self.length = self.data.tokens.shape[1]
        self.num_train = len(self.data.tokens) - plan.num_evaluated
        text = {"text": self.data.measured["text_digest"]}
        self.made_of = digest(dataclasses.asdict(plan) | text)
        trained_on = dataclasses.asdict(plan.teacher) | text | {"num_train": self.num_train}
        self.targets_folder = folder / f"targets-{digest(trained_on)}"
        self.targets_folder.mkdir(exist_ok=True)
        self.results: dict[tuple[str, int], dict[str, float]] = {}
        if self.results_path.exists():
            rows = map(json.loads, self.results_path.read_text().splitlines())
            self.results = {
                (r["way"], r["seed"]): r["found"] for r in rows if r["made_of"] == self.made_of
            }

    @property
    def results_path(self) -> Path:
        """A line of JSON for each finished student, of any plan."""
        return self.folder / "results.jsonl"

    def state_path(self, state: str) -> Path:
        """The weights of FullKD's student at which gradients are compared."""
        return self.folder / f"{state}-{self.made_of}.pt"

    def add(self, way: str, seed: int, found: dict[str, float]) -> None:
        """Save a finished student's numbers."""
        self.results[way, seed] = found
        row = {"way": way, "seed": seed, "found": found, "made_of": self.made_of}
        with self.results_path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, i: int) -> slice:
        """Return the positions of sequence i."""
        return slice(i * self.length, (i + 1) * self.length)

    def labels(self, rows: slice) -> Tensor:
        """Return the tokens of the text that follow these positions."""
        return torch.from_numpy(self.data.next_tokens[rows]).long()

    def logprobs(self, rows: slice) -> Tensor:
        """Return the teacher's [C, V], copied into memory."""
        return torch.from_numpy(np.array(self.data.logprobs[rows]))

    def load_targets(self, way: str) -> Targets | None:
        """Return a way's targets, None for CE and FullKD."""
        if way not in MAKERS:
            return None
        return load_targets(self.targets_folder, way, self.data, self.num_train)

    def build_student(self, *, seed: int) -> PreTrainedModel:
        """Return a Llama with a tied head, whose bias is initialised to the log of the unigram."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.plan.teacher.vocabulary,
            hidden_size=self.plan.width,
            intermediate_size=3 * self.plan.width,
            num_hidden_layers=self.plan.num_layers,
            num_attention_heads=self.plan.num_heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
        )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        counts_V = torch.from_numpy(self.data.unigram_counts) + 0.1
        model.bias_V = torch.nn.Parameter((counts_V / counts_V.sum()).log().float())
        return model

    def compute_logits(self, model: PreTrainedModel, features_CD: Tensor) -> Tensor:
        """Return the student's logits [C, V]."""
        return torch.addmm(model.bias_V, features_CD, model.lm_head.weight.t())

    def compute_features(self, model: PreTrainedModel, rows: slice) -> Tensor:
        """Return the student's last hidden states [P, D] at positions of one sequence, read from its start."""
        i, first = divmod(rows.start, self.length)
        stop = first + rows.stop - rows.start
        tokens_BT = torch.from_numpy(self.data.tokens[i : i + 1, :stop]).long()
        hidden_BTD: Tensor = model.base_model(tokens_BT, use_cache=False).last_hidden_state
        return hidden_BTD[0, first:]
