"""Let a model write a corpus of responses to prompts; a journal keeps every answer that was paid for.

    python workflow/scripts/synthesize.py --synthesis-provider openai --synthesis-base-url http://localhost:8000/v1 \\
        --synthesis-model my-model --synthesis-prompts prompts.jsonl --output results/mine/all/synthesis.json
"""

from contextlib import nullcontext
from pathlib import Path

from retort.cli import logger, run_script, script_parser
from retort.cluster.leases import lease_teacher
from retort.config.flags import add_section_flags, section_from_args


def main() -> None:
    """Request the missing answers (a local model leases a GPU group), and write the responses and their record."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="synthesis.json; responses.jsonl is written beside it, the journal one folder up",
    )
    parser.add_argument("--local-model", help="folder or Hub id of a model to run on this machine")
    parser.add_argument("--local-revision", help="revision of a Hub model")
    parser.add_argument(
        "--stamp",
        help="digest of the prompt files' sizes and times; files with another digest are refused",
    )
    for section in ("synthesis", "evaluation", "teacher", "teacher.generation"):
        add_section_flags(parser, section)
    args = parser.parse_args()
    loading = section_from_args(args, "teacher")
    loading = loading.model_copy(update={"revision": args.local_revision})
    lease = (
        lease_teacher(loading.generation, worker=0, device=loading.device)
        if args.local_model
        else nullcontext()
    )
    with lease:
        from retort.synthesis.run import SynthesisJob, synthesize

        job = SynthesisJob(
            section=section_from_args(args, "synthesis"),
            evaluation=section_from_args(args, "evaluation"),
            local_model=args.local_model,
            loading=loading,
            files_digest=args.stamp,
        )
        logger.info(synthesize(args.output, job))


if __name__ == "__main__":
    run_script(main)
