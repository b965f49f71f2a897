"""LoRA beside training all weights: the greatest memory, and the bytes of weights, gradients and optimizer.

    python -m benchmarks.training.lora [--hidden 1024] [--layers 8] [--rank 16] [--keep-activations]

A Llama of random weights, with a tied output layer, is saved, and trained on random tokens by Retort's own trainer: all
of it, and adapters of all linear layers, each in a process of its own. Activations are recomputed, as Retort does on a
GPU. The greatest resident memory is less what the process had before it loaded the student.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import make_parser
from benchmarks.training.__main__ import Memory
from benchmarks.training.feeding import NoTokenizer
from benchmarks.training.packing import make_table
from benchmarks.training.student import Shape, build_model
from retort.config.lora import Lora
from retort.config.sections import Student, Tracking, Training
from retort.models.lora import count_merged
from retort.training.arguments import CHECKPOINTING, training_arguments
from retort.training.job import TrainingJob
from retort.training.loop import build_trainer

_VOCABULARY = 8192


def measure(folder: Path, flags: argparse.Namespace) -> dict[str, float]:
    """Train for some steps; return bytes by name."""
    table = make_table([flags.length] * flags.steps)
    memory = Memory("cpu")
    job = TrainingJob(
        name=flags.only,
        identity="benchmark",
        source=table,
        student=Student(model_path=str(folder / "student")),
        training=Training(
            alpha=1.0,
            distillation_type="output",
            lora=Lora(rank=flags.rank) if flags.only == "lora" else Lora(),
            max_steps=flags.steps,
            batch_size=1,
            dataloader_num_workers=0,
            device="cpu",
        ),
        tracking=Tracking(),
        tokenizer=NoTokenizer(),
        vocabulary=_VOCABULARY,
        max_length=flags.length,
    )
    trainer = build_trainer(training_arguments(folder / job.name, job), job)
    trainer.create_optimizer()
    assert trainer.optimizer is not None
    if not flags.keep_activations:
        getattr(trainer.model, f"{CHECKPOINTING}_enable")()
    trainer.model.train()
    for batch in trainer.get_train_dataloader():
        trainer.optimizer.zero_grad()
        positions = len(batch["counted"])
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=positions)
        loss.backward()  # type: ignore[no-untyped-call]
        trainer.optimizer.step()
    weights = list(trainer.model.parameters())
    state = [v for s in trainer.optimizer.state.values() for v in s.values()]
    parts = {"weights": weights, "gradients": [w.grad for w in weights], "optimizer": state}
    found = {
        name: float(sum(t.numel() * t.element_size() for t in tensors if t is not None))
        for name, tensors in parts.items()
    }
    return found | {"peak": memory.read(), "parameters": count_merged(trainer.model)}


def main() -> None:
    """Measure both and print their ratio."""
    parser = make_parser("benchmarks.training.lora", __doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--keep-activations", action="store_true", help="do not recompute them")
    parser.add_argument("--only", choices=("full", "lora"), help="measure one, in this process")
    parser.add_argument("--folder", type=Path, help="with --only: where the student is")
    flags = parser.parse_args()
    torch.set_num_threads(2)
    if flags.only:
        print(json.dumps(measure(flags.folder, flags)))
        return
    shape = Shape(flags.hidden, flags.hidden * 11 // 4, flags.layers, 8, batch=1, length=0)
    with tempfile.TemporaryDirectory() as folder:
        build_model(_VOCABULARY, seed=0, shape=shape).save_pretrained(Path(folder) / "student")
        found = {}
        for name in ("full", "lora"):
            command = [sys.executable, "-m", "benchmarks.training.lora", *sys.argv[1:]]
            command += ["--only", name, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
            sizes = ", ".join(
                f"{key} {value / 1e6:,.0f} MB"
                for key, value in found[name].items()
                if key != "parameters"
            )
            print(f"{name}: {found[name]['parameters'] / 1e6:.0f}M parameters, {sizes}", flush=True)
    kept = {n: sum(f[k] for k in ("weights", "gradients", "optimizer")) for n, f in found.items()}
    print(f"weights, gradients and optimizer: {kept['lora'] / kept['full']:.3f} of full")
    print(f"greatest memory: {found['lora']['peak'] / found['full']['peak']:.3f} of full")


if __name__ == "__main__":
    main()
