"""Download what a config takes from the Hub into this machine's cache: models, tokenizers, datasets.

python workflow/scripts/stage.py --config mine.yaml
"""

from pathlib import Path

import yaml

from retort.cli import logger, run_script, script_parser
from retort.config.load import load_runs


def main() -> None:
    """Download everything that the config names."""
    parser = script_parser(__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, or the config itself as JSON")
    args = parser.parse_args()
    text = args.config if args.config.lstrip().startswith("{") else Path(args.config).read_text()
    from retort.pipeline.staging import stage_project

    for line in stage_project(load_runs(yaml.safe_load(text) or {})):
        logger.info(line)


if __name__ == "__main__":
    run_script(main)
