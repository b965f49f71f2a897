"""Train the demo's teacher, a small causal LM with its own BPE tokenizer, on the corpus' training documents.

    python workflow/scripts/demo_teacher.py --corpus results/corpora/mine --dataset-name demo \\
        --output results/teachers/mine/fingerprint.json
"""

from pathlib import Path

from retort.cli import run_script, script_parser
from retort.cluster.leases import lease_training
from retort.config.flags import add_section_flags, section_from_args


def main() -> None:
    """Write model/ and fingerprint.json; an interrupted training resumes from its last checkpoint."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--corpus", type=Path, help="folder that draw_corpus wrote, if there is one"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="fingerprint.json; model/ goes to the same folder",
    )
    add_section_flags(parser, "dataset")
    args = parser.parse_args()
    with lease_training(1):
        from retort.pipeline.demo_teacher import make_demo_teacher

        make_demo_teacher(args.output, section_from_args(args, "dataset"), snapshot=args.corpus)


if __name__ == "__main__":
    run_script(main)
