"""Measure the student of a run on the held-out sequences, and compare it with its teacher if it has one.

    python workflow/scripts/evaluate.py --config mine.yaml --run soft --index results/tokens/<id>/index.json \\
        --training results/runs/soft/<id>/training.json --signal results/logits/<id>/manifest.json \\
        --features results/validation/<id>/teacher_validation.safetensors --output mine/metrics.json

For any other model: compare.
"""

from pathlib import Path

from retort.cli import logger, run_script
from retort.cluster.leases import lease_training
from retort.config.handoff import job_parser, read_job


def main() -> None:
    """Write the metrics.json of a run's student."""
    parser = job_parser(__doc__, "evaluation", "index", output="metrics.json")
    parser.add_argument(
        "--training", required=True, type=Path, help="training.json, with final/ beside it"
    )
    parser.add_argument(
        "--features",
        type=Path,
        nargs="*",
        default=[],
        help="teacher_validation.safetensors, of several teachers in the order of teacher.mix",
    )
    parser.add_argument(
        "--signal",
        type=Path,
        nargs="*",
        default=[],
        help="manifest.json of the run's cache, or fingerprint.json of its teacher; several in the same order",
    )
    args = parser.parse_args()
    job = read_job(args)
    config = job.config
    with lease_training(1, device=config.training.device, among=config.teacher.generation.gpus):
        from retort.evaluation.run import evaluate_run

        line = evaluate_run(
            args.output,
            job,
            index_path=args.index,
            training_path=args.training,
            features_paths=args.features,
            signal_paths=args.signal,
        )
    logger.info(line)
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
