"""Make a logit cache, and tokens, of logits that others have published; only DistillKit's format is read so far.

    python workflow/scripts/import.py distillkit PATH_OR_HUB_ID --tokenizer Qwen/Qwen3-8B --output imported/qwen

PATH is a folder of parquet files. How they were compressed is in compression_config.yaml beside them, or in the file
that --compression names (also the config of a DistillKit training). After an interruption the same command resumes.
"""

from pathlib import Path

from retort.cli import run_script, script_parser


def main() -> None:
    """Write the folder, and print what it has."""
    parser = script_parser(__doc__)
    parser.add_argument("kind", choices=["distillkit"], help="the format")
    parser.add_argument(
        "source", help="a folder of parquet files, or the id of a dataset of the Hub"
    )
    parser.add_argument(
        "--tokenizer", required=True, help="that of the teacher: a folder or a Hub id"
    )
    parser.add_argument("--output", required=True, type=Path, help="a folder; made if new")
    parser.add_argument("--compression", type=Path, help="a YAML file with its settings")
    parser.add_argument(
        "--min-probability",
        type=float,
        default=0.001,
        help="tokens of less go to the tail (0.001)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.01,
        help="share of the texts that is held out (0.01)",
    )
    args = parser.parse_args()
    from retort.imports.run import ImportSettings, import_logits

    settings = ImportSettings(
        args.source,
        args.tokenizer,
        args.compression,
        args.min_probability,
        args.validation_fraction,
    )
    print(f"{args.output}: {import_logits(args.output, settings)}")


if __name__ == "__main__":
    run_script(main)
