"""Say what a config will need: tokens, cache, disk, memory, hours and money; fails where it cannot fit.

    python workflow/scripts/estimate.py mine.yaml --gpu h100-80 --num-gpus 8 --tokens 1e9 --price-per-gpu-hour 2.5

Nothing is made, but with --keep: then the report of the run shows this estimate beside what was taken. Small models
that are here are run for some seconds, to measure; with --no-run none is.
"""

import json

from retort.cli import has_log, logger, run_script
from retort.config.handoff import config_parser, read_runs


def main() -> None:
    """Print the estimate."""
    parser = config_parser(__doc__, required=False)
    parser.add_argument("file", nargs="?", metavar="CONFIG", help="the same as --config")
    parser.add_argument("--gpu", metavar="NAME", help="plan for this GPU, such as h100-80")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="how many of them at a time")
    parser.add_argument("--tokens", type=float, metavar="N", help="tokens to train on, not counted")
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="to say the money")
    parser.add_argument("--utilization", type=float, metavar="SHARE", help="of the peak, 0 to 1")
    parser.add_argument("--no-run", action="store_true", help="load and run no model")
    parser.add_argument("--keep", action="store_true", help="for the report of the run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if not (text := args.file or args.config):
        parser.error("give a config: a YAML file")
    runs = read_runs(text)
    from retort.estimate.table import describe
    from retort.pipeline.estimating import choose_options, estimate_config, keep_estimate

    options = choose_options(
        gpu=args.gpu,
        num_gpus=args.num_gpus,
        tokens=args.tokens,
        price=args.price_per_gpu_hour,
        utilization=args.utilization,
        may_run=not args.no_run,
    )
    found = estimate_config(runs, options)
    if args.json:
        print(json.dumps(found.model_dump(mode="json"), indent=2))
    elif has_log():
        logger.info("\n".join(describe(found)))
    else:
        print(*describe(found), sep="\n")
    if args.keep:
        logger.info(keep_estimate(found, runs))
    if found.faults:
        raise ValueError("it does not fit:\n" + "\n".join(f"- {fault}" for fault in found.faults))


if __name__ == "__main__":
    run_script(main)
