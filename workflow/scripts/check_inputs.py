"""Check everything that can be checked cheaply, before any expensive job: models, vocabularies, corpora, folders.

python workflow/scripts/check_inputs.py --config config/config.yaml --output results/checks/mine.json
"""

from pathlib import Path

import yaml

from retort.cli import logger, run_script, script_parser
from retort.config.load import load_runs


def main() -> None:
    """Check the config and write what was found."""
    parser = script_parser(__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, or the config itself as JSON")
    parser.add_argument("--output", required=True, type=Path, help="JSON file for what was found")
    args = parser.parse_args()
    text = args.config if args.config.lstrip().startswith("{") else Path(args.config).read_text()
    from retort.pipeline.preflight import check_project

    found = check_project(load_runs(yaml.safe_load(text) or {}))
    for line in found.notes:
        logger.info(line)
    found.write(args.output)


if __name__ == "__main__":
    run_script(main)
