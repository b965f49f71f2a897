"""Measure any model on any text, without a pipeline, and compare it with another one.

    python workflow/scripts/compare.py --model models/small --teacher models/large --data stories.jsonl

Prints a table, and writes metrics.json where --output is given. `dataset` says how the text is read, `evaluation` how
much of it; `teacher` how both models are loaded (dtype, device, trust_remote_code, and in generation: gpus_per_model,
cpu_threads).
"""

from pathlib import Path

from retort.cli import run_script
from retort.cluster.leases import lease_training
from retort.config.handoff import job_parser, read_job


def main() -> None:
    """Print the table of a standalone comparison."""
    parser = job_parser(__doc__, "comparison")
    parser.add_argument("--model", required=True, help="folder or Hub id of the model to measure")
    parser.add_argument("--teacher", help="folder or Hub id of the model to compare it with")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="text files: JSON lines, CSV, Parquet or plain text",
    )
    parser.add_argument("--output", type=Path, help="metrics.json")
    args = parser.parse_args()
    job = read_job(args)
    loading = job.config.teacher
    generation = loading.generation
    with lease_training(generation.gpus_per_model, device=loading.device, among=generation.gpus):
        from retort.evaluation import compare

        found = compare.evaluate_models(args.model, args.teacher, args.data, job)
    print(compare.render_comparison(found))
    if args.output:
        found.write(args.output)
        job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
