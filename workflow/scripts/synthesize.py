"""Let a model write a corpus of responses to prompts; a journal keeps every answer that was paid for.

python workflow/scripts/synthesize.py --config config/examples/synthesis.yaml --output mine/all/synthesis.json
"""

from contextlib import nullcontext

from retort.cli import logger, run_script
from retort.cluster.leases import lease_teacher
from retort.config.handoff import job_parser, read_job


def main() -> None:
    """Request the missing answers (a local model leases a GPU group), and write the responses and their record."""
    parser = job_parser(
        __doc__,
        "synthesis",
        output="synthesis.json; responses.jsonl is written beside it, the journal one folder up",
    )
    args = parser.parse_args()
    job = read_job(args)
    loading = job.config.teacher
    is_local = job.config.synthesis.provider == "local"
    with (
        lease_teacher(loading.generation, worker=0, device=loading.device)
        if is_local
        else nullcontext()
    ):
        from retort.synthesis.run import synthesize

        logger.info(synthesize(args.output, job))
    job.write(args.output.parent, args.kind)


if __name__ == "__main__":
    run_script(main)
