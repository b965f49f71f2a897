"""Train the demo's teacher, a small causal LM with its own BPE tokenizer, on the corpus' training documents.

    python workflow/scripts/demo_teacher.py --config config/config.yaml \\
        --corpus results/corpora/<id>/corpus.json --output results/teachers/mine/fingerprint.json
"""

from pathlib import Path

from retort.cli import run_script
from retort.cluster.leases import lease_training
from retort.config.handoff import job_parser, read_job


def main() -> None:
    """Write model/ and fingerprint.json; an interrupted training resumes from its last checkpoint."""
    parser = job_parser(
        __doc__, "demo_teacher", output="fingerprint.json; model/ goes to the same folder"
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs="*",
        default=[],
        help="records that draw_corpus wrote, if it did",
    )
    args = parser.parse_args()
    job = read_job(args)
    with lease_training(1):
        from retort.pipeline.demo_teacher import make_demo_teacher

        snapshot = args.corpus[0].parent if args.corpus else None
        make_demo_teacher(args.output, job, snapshot=snapshot)
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
