"""Measure one student on the held-out sequences, and against its teacher where there is one.

    python workflow/scripts/evaluate.py --index results/tokens/mine/index.json \\
        --training results/runs/mine/training.json --features results/validation/mine/teacher_validation.safetensors \\
        --output results/runs/mine/evaluation/metrics.json
"""

import argparse
from pathlib import Path

from retort.commands import run_script, say
from retort.config import add_section_flags, section_from_args
from retort.leases import lease_training


def main() -> None:
    """Write metrics.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", required=True, type=Path, help="index.json of the tokens")
    parser.add_argument(
        "--training", required=True, type=Path, help="training.json; final/ lies beside it"
    )
    parser.add_argument(
        "--features", type=Path, nargs="*", default=[], help="teacher_validation.safetensors"
    )
    parser.add_argument(
        "--signal", type=Path, nargs="*", default=[], help="manifest.json of the run's cache"
    )
    parser.add_argument(
        "--among-gpus", help="GPUs of this machine that may be used, such as 1,3,5,7; else all"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--cpu-threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--output", required=True, type=Path, help="metrics.json")
    add_section_flags(parser, "evaluation")
    args = parser.parse_args()
    with lease_training(1, device=args.device, among=args.among_gpus, say=say):
        from retort.evaluation import evaluate_run

        line = evaluate_run(
            args.output,
            index_path=args.index,
            training_path=args.training,
            features_path=next(iter(args.features), None),
            manifest_path=next((p for p in args.signal if p.name == "manifest.json"), None),
            evaluation=section_from_args(args, "evaluation"),
            device=args.device,
            cpu_threads=args.cpu_threads,
        )
    say(line)


if __name__ == "__main__":
    run_script(main)
