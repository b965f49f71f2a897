"""Compare all runs: a table (summary.txt, summary.csv) and a page (report.html).

python workflow/scripts/report.py --metrics results/runs/*/*/evaluation/*/metrics.json --output report.html
"""

from pathlib import Path

from retort.cli import logger, run_script
from retort.config.handoff import config_parser, write_config
from retort.report.estimated import Records
from retort.report.page import make_report


def main() -> None:
    """Write report.html, summary.csv and summary.txt, and print the table."""
    parser = config_parser(__doc__, required=False)
    parser.add_argument(
        "--metrics", required=True, type=Path, nargs="+", help="metrics.json of every run"
    )
    parser.add_argument(
        "--benchmarks", type=Path, nargs="*", default=[], help="benchmark.json of runs and teachers"
    )
    parser.add_argument(
        "--estimate", type=Path, help="estimate.json beside the check, if there is one"
    )
    parser.add_argument(
        "--tokens", type=Path, nargs="*", default=[], help="index.json of each text, to compare"
    )
    parser.add_argument(
        "--caches", type=Path, nargs="*", default=[], help="manifest.json of each cache, to compare"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="report.html; the summaries are written beside it",
    )
    args = parser.parse_args()
    if args.config:
        write_config(args.output.parent, args.config)
    estimated = Records(args.estimate, args.tokens, args.caches) if args.estimate else None
    summary = make_report(
        args.metrics, args.output, benchmark_paths=args.benchmarks, estimated=estimated
    )
    logger.info(summary)


if __name__ == "__main__":
    run_script(main)
