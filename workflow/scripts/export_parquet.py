"""Write a logit cache as parquet files, a row for each sequence, which datasets, pandas and other tools read.

    python workflow/scripts/export_parquet.py results/logits/<id> OUT

docs/library.md lists the columns. After an interruption the same command writes the files that are missing.
"""

from pathlib import Path

from retort.cli import run_script, script_parser


def main() -> None:
    """Write the files, and print how to read them."""
    parser = script_parser(__doc__)
    parser.add_argument("cache", type=Path, help="the folder of a finished cache")
    parser.add_argument("out", type=Path, help="a folder; made if new")
    args = parser.parse_args()
    from retort.pipeline.parquet import export_parquet

    files = export_parquet(args.cache, args.out)
    size = sum(file.stat().st_size for file in files)
    print(f"{len(files)} files in {args.out}, {size:,} bytes. To read them:")
    print(f'datasets.load_dataset("parquet", data_files="{args.out}/*.parquet", split="train")')


if __name__ == "__main__":
    run_script(main)
