"""Check everything that can be checked cheaply, before any expensive job: models, vocabularies, corpora, folders.

python workflow/scripts/check_inputs.py --config config/config.yaml --output results/checks/mine/inputs.json
"""

import logging
from pathlib import Path

from retort.cli import logger, run_script
from retort.config.handoff import config_parser, read_runs, write_config


def main() -> None:
    """Check the config and write what was found."""
    parser = config_parser(__doc__, required=True)
    parser.add_argument("--output", required=True, type=Path, help="JSON file for what was found")
    args = parser.parse_args()
    runs = read_runs(args.config)
    from retort.estimate.records import KEPT_FILE
    from retort.pipeline.costly_defaults import COSTLY
    from retort.pipeline.preflight import check_project

    found = check_project(runs, kept_path=args.output.with_name(KEPT_FILE))
    for line in found.notes:
        logger.log(logging.WARNING if line.startswith(COSTLY) else logging.INFO, line)
    write_config(args.output.parent, args.config)
    found.write(args.output)


if __name__ == "__main__":
    run_script(main)
