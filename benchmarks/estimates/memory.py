"""The memory that is estimated for students and teachers beside the greatest resident memory of a CPU.

    python -m benchmarks.estimates.memory

Models of random weights of several architectures; students in Retort's own trainer, teachers in its scorer, each in a
process of its own. Of the resident memory, what the process had before it built the model is taken off.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import make_parser
from benchmarks.training.__main__ import Memory
from benchmarks.training.feeding import NoTokenizer
from benchmarks.training.packing import make_table
from retort.cache.codec import TokenOrder
from retort.cache.methods import build_codec
from retort.config.lora import Lora
from retort.config.sections import Cache, Config, Student, Tracking, Training
from retort.estimate.memory import Load, Mode, estimate_student_memory, estimate_teacher_memory
from retort.estimate.sizes import measure_model
from retort.models.causal_lm import split_model
from retort.models.lora import count_adapters
from retort.teacher.scoring import Scorer, score_part
from retort.training.arguments import training_arguments
from retort.training.job import TrainingJob
from retort.training.loop import build_trainer

_WIDE = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1408}
MODELS: dict[str, dict[str, Any]] = {
    "llama, 8 layers": {
        "model_type": "llama",
        **_WIDE,
        "num_hidden_layers": 8,
        "tie_word_embeddings": True,
    },
    "qwen3, 8 layers": {
        "model_type": "qwen3",
        **_WIDE,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "gpt2, 6 layers": {"model_type": "gpt2", "n_embd": 512, "n_layer": 6, "n_head": 8},
    "gemma2, 6 layers, eager": {
        "model_type": "gemma2",
        **_WIDE,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    },
    "llama, wide head": {
        "model_type": "llama",
        **_WIDE,
        "num_hidden_layers": 4,
        "vocab_size": 65_536,
    },
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputing": {"use_gradient_checkpointing": True},
    "two passes a step": {"gradient_accumulation_steps": 2},
    "adafactor": {"optim": "adafactor"},
    "LoRA, rank 16": {"lora": Lora(rank=16)},
}
_BATCH, _LENGTH = 8, 256


def make_config(name: str) -> Any:
    """Return the config of a model, of 8,192 ids if it says no other number."""
    keys = {"vocab_size": 8192} | MODELS[name]
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


def measure_student(folder: Path, name: str, case: str) -> tuple[float, float]:
    """Return the bytes that are estimated for a student, and those of some real steps."""
    config = make_config(name)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    keys = config.to_dict() | {"model_type": config.model_type}
    path = folder / "student.json"
    path.write_text(json.dumps(keys))
    training = Training(
        alpha=1.0,
        distillation_type="output",
        max_steps=3,
        batch_size=_BATCH,
        dataloader_num_workers=0,
        device="cpu",
    ).model_copy(update=CASES[case])
    size = measure_model(config)
    is_lora = training.lora.rank is not None
    trained = count_adapters(config, training.lora, name="it") if is_lora else size.parameters
    load = Load(_BATCH, _LENGTH, _BATCH * (_LENGTH - 1))
    mode = Mode("cpu", training.use_gradient_checkpointing is True, False)
    attention = "eager" if "eager" in name else None
    estimated = estimate_student_memory(
        size,
        training.model_copy(update={"attn_implementation": attention}),
        load,
        trained=trained,
        mode=mode,
    )
    memory = Memory("cpu")
    job = TrainingJob(
        name="student",
        identity="benchmark",
        source=make_table([_LENGTH] * _BATCH * training.gradient_accumulation_steps * 3),
        student=Student(config=str(path)),
        training=training,
        tracking=Tracking(),
        tokenizer=NoTokenizer(),
        vocabulary=size.vocabulary,
        max_length=_LENGTH,
    )
    arguments = training_arguments(folder, job)
    arguments.save_strategy = "no"
    trainer = build_trainer(arguments, job)
    trainer.train()
    return float(estimated.peak), float(memory.read())


def measure_teacher(name: str) -> tuple[float, float]:
    """Return the bytes that are estimated for a teacher, and those of scoring some batches."""
    config = make_config(name)
    size = measure_model(config)
    load = Load(_BATCH, _LENGTH, _BATCH * (_LENGTH - 1))
    estimated = estimate_teacher_memory(size, Config(), load, dtype="float32", device="cpu")
    table = make_table([_LENGTH] * _BATCH * 2)
    codec = build_codec(
        Cache(method="top_p", temperatures=(1.0,)),
        vocabulary=size.vocabulary,
        token_counts=torch.zeros(size.vocabulary, dtype=torch.long).numpy(),
    )
    order = TokenOrder.from_counts(
        torch.zeros(size.vocabulary, dtype=torch.long).numpy(), vocabulary=size.vocabulary
    )
    memory = Memory("cpu")
    teacher = split_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    teacher.model.requires_grad_(False)
    score_part(Scorer(teacher, _BATCH), table, codec, num_tokens=size.vocabulary, order=order)
    total = estimated.weights + estimated.activations + estimated.selection
    return float(total), float(memory.read())


def main() -> None:
    """Print a line for each model and case."""
    parser = make_parser("benchmarks.estimates.memory", __doc__)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.only:
        name, case = flags.only
        with tempfile.TemporaryDirectory() as folder:
            found = (
                measure_teacher(name)
                if case == "teacher"
                else measure_student(Path(folder), name, case)
            )
        print(json.dumps(found))
        return
    print(f"{'model':26}{'what':20}{'estimated':>12}{'measured':>12}{'error':>8}")
    pairs = [(name, "plain") for name in MODELS] + [("llama, 8 layers", c) for c in list(CASES)[1:]]
    for name, case in [*pairs, *((name, "teacher") for name in MODELS)]:
        command = [sys.executable, "-m", "benchmarks.estimates.memory", "--only", name, case]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        estimated, measured = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:26}{case:20}{estimated / 1e6:9,.0f} MB{measured / 1e6:9,.0f} MB"
            f"{estimated / measured - 1:8.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
