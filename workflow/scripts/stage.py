"""Download what a config takes from the Hub into this machine's cache: models, tokenizers, datasets.

python workflow/scripts/stage.py --config mine.yaml
"""

import argparse
from pathlib import Path

import yaml

from retort.cli import logger, run_script
from retort.config.load import load_runs


def main() -> None:
    """Download everything that the config names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a YAML file, or the config itself as JSON")
    args = parser.parse_args()
    text = args.config if args.config.lstrip().startswith("{") else Path(args.config).read_text()
    from retort.pipeline.staging import stage_project

    for line in stage_project(load_runs(yaml.safe_load(text) or {})):
        logger.info(line)


if __name__ == "__main__":
    run_script(main)
