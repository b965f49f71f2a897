"""Download what a config takes from the Hub into this machine's cache: models, tokenizers, datasets.

python workflow/scripts/stage.py --config mine.yaml
"""

from retort.cli import logger, run_script
from retort.config.handoff import config_parser, read_runs


def main() -> None:
    """Download everything that the config names."""
    args = config_parser(__doc__, required=True).parse_args()
    runs = read_runs(args.config)
    from retort.pipeline.staging import stage_project

    for line in stage_project(runs):
        logger.info(line)


if __name__ == "__main__":
    run_script(main)
