"""Measure a student on the held-out sequences, and compare it with its teacher if it has one.

    python workflow/scripts/evaluate.py --index results/tokens/mine/index.json \\
        --training results/runs/mine/training.json --features results/validation/mine/teacher_validation.safetensors \\
        --output results/runs/mine/evaluation/metrics.json

Or measure any model on any text, without a pipeline; this prints a table, and writes metrics.json if --output is given:

    python workflow/scripts/evaluate.py --model models/small --teacher models/large --data stories.jsonl
"""

import argparse
from pathlib import Path

from retort.cli import logger, run_script, script_parser
from retort.cluster.leases import lease_training
from retort.config.flags import add_section_flags, section_from_args


def main() -> None:
    """Write the metrics.json of a run, or print the table of a standalone comparison."""
    parser = script_parser(__doc__)
    run = parser.add_argument_group("the student of a run")
    run.add_argument("--index", type=Path, help="index.json of the tokens")
    run.add_argument("--training", type=Path, help="training.json, with final/ beside it")
    run.add_argument(
        "--features", type=Path, nargs="*", default=[], help="teacher_validation.safetensors"
    )
    run.add_argument(
        "--signal",
        type=Path,
        nargs="*",
        default=[],
        help="manifest.json of the run's cache, or fingerprint.json of its teacher",
    )
    alone = parser.add_argument_group("any models, standalone")
    alone.add_argument("--model", help="folder or Hub id of the model to measure")
    alone.add_argument("--teacher", help="folder or Hub id of the model to compare it with")
    alone.add_argument(
        "--data", nargs="+", help="text files: JSON lines, CSV, Parquet or plain text"
    )
    alone.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="dtype of the weights; auto is bfloat16 on a GPU",
    )
    alone.add_argument(
        "--gpus", type=int, default=1, help="number of GPUs to use, if there are any"
    )
    alone.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the models"
    )
    parser.add_argument(
        "--among-gpus", help="GPUs of this machine to choose from, such as 1,3,5,7; default: all"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--cpu-threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument(
        "--output", type=Path, help="metrics.json; optional for a standalone comparison"
    )
    for section in ("evaluation", "dataset"):
        add_section_flags(parser, section)
    args = parser.parse_args()
    evaluate_models(args) if args.model or args.data else evaluate_run(args)


def evaluate_run(args: argparse.Namespace) -> None:
    """Write the metrics.json of a run's student."""
    missing = [f"--{name}" for name in ("index", "training", "output") if not getattr(args, name)]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing. Give --index, --training and --output for the student of a run, or --model "
            "and --data for any model."
        )
    with lease_training(1, device=args.device, among=args.among_gpus):
        from retort.evaluation import run as evaluation

        line = evaluation.evaluate_run(
            args.output,
            index_path=args.index,
            training_path=args.training,
            features_path=next(iter(args.features), None),
            manifest_path=next((p for p in args.signal if p.name == "manifest.json"), None),
            fingerprint_path=next((p for p in args.signal if p.name == "fingerprint.json"), None),
            evaluation=section_from_args(args, "evaluation"),
            device=args.device,
            cpu_threads=args.cpu_threads,
        )
    logger.info(line)


def evaluate_models(args: argparse.Namespace) -> None:
    """Measure any model, and compare it with a teacher if one is given."""
    if not (args.model and args.data):
        raise ValueError(
            "--model and --data go together: give the model, and the files to measure it on."
        )
    if args.index or args.training:
        raise ValueError("--model is for any model, without a run: remove --index and --training.")
    with lease_training(args.gpus, device=args.device, among=args.among_gpus):
        from retort.evaluation import compare

        files = {"name": compare.choose_loader(args.data), "data_files": tuple(args.data)}
        dataset = section_from_args(args, "dataset").model_copy(update=files)
        found = compare.evaluate_models(
            args.model,
            args.teacher,
            dataset=dataset,
            evaluation=section_from_args(args, "evaluation"),
            loading=compare.choose_loading(
                device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code
            ),
            cpu_threads=args.cpu_threads,
        )
    print(compare.render_comparison(found))
    if args.output:
        found.write(args.output)


if __name__ == "__main__":
    run_script(main)
