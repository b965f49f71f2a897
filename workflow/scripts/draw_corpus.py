"""Write a snapshot of a corpus that is not in local files: the demo's text, or the first documents of a stream.

python workflow/scripts/draw_corpus.py --config config/config.yaml --output results/corpora/mine/corpus.json
"""

from retort.cli import run_script
from retort.config.handoff import job_parser, read_job
from retort.corpus.snapshot import write_snapshot


def main() -> None:
    """Write documents_*.jsonl.gz and their record into the output's folder; an interrupted run is resumed."""
    parser = job_parser(
        __doc__,
        "corpus",
        output="corpus.json, or a reader's corpus_<reader>.json; the documents are written to its folder",
    )
    parser.add_argument(
        "--reader", type=int, default=0, help="with dataset.sharding: files, the shard to read"
    )
    args = parser.parse_args()
    job = read_job(args)
    folder, stamp = args.output.parent, job.expected.get("corpus")
    write_snapshot(job.dataset, folder, reader=args.reader, stamp=stamp)
    job.write(folder, args.kind)


if __name__ == "__main__":
    run_script(main)
