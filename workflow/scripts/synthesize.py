"""Let a model write responses to prompts: a corpus, with everything that was paid for in a journal.

    python workflow/scripts/synthesize.py --synthesis-provider openai --synthesis-base-url http://localhost:8000/v1 \\
        --synthesis-model my-model --synthesis-prompts prompts.jsonl --output results/mine/all/synthesis.json
"""

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from retort.cli import logger, run_script
from retort.cluster.leases import lease_teacher
from retort.config.flags import add_section_flags, section_from_args


def main() -> None:
    """Hold a GPU group where the model is local; ask what is missing, write the responses and their record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="synthesis.json; responses.jsonl lies beside it, the journal one folder up",
    )
    parser.add_argument("--local-model", help="folder or Hub id of a model that answers here")
    parser.add_argument("--local-revision", help="revision of a Hub model")
    parser.add_argument(
        "--stamp",
        help="refuse prompts whose files have another digest of sizes and times than this",
    )
    for section in ("synthesis", "evaluation", "teacher", "teacher.generation"):
        add_section_flags(parser, section)
    args = parser.parse_args()
    loading = replace(section_from_args(args, "teacher"), revision=args.local_revision)
    lease = (
        lease_teacher(loading.generation, worker=0, device=loading.device)
        if args.local_model
        else nullcontext()
    )
    with lease:
        from retort.synthesis.run import Task, synthesize

        task = Task(
            section=section_from_args(args, "synthesis"),
            evaluation=section_from_args(args, "evaluation"),
            local_model=args.local_model,
            loading=loading,
            stamp=args.stamp,
        )
        logger.info(synthesize(args.output, task))


if __name__ == "__main__":
    run_script(main)
