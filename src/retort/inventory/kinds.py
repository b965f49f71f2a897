"""The kinds of artifacts: where their folders are, and which files Retort writes there."""

from dataclasses import dataclass

OF_ALL = ("config.json", "run.json", ".*.tmp", ".lock")  # of artifacts of all kinds


@dataclass(frozen=True)
class Kind:
    """A kind of artifact.

    place: its folders, with * for what differs. finished: files and folders that a finished one has, its record first.
    files: patterns of all that Retort writes there; a folder's name stands for all that is in it.
    """

    name: str
    title: str
    place: str
    finished: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def is_small(self) -> bool:
        """Whether it is made again in seconds, so that a list need not show each."""
        return self.name in ("evaluation", "benchmark", "check", "report")


# In the order of the data flow. An artifact that lies in another one's folder is removed with it.
KINDS = (
    Kind(
        "corpus",
        "corpora",
        "corpora/*",
        ("corpus*.json",),
        ("corpus*.json", "run*.json", "documents_*.jsonl.gz", ".draw_*"),
    ),
    Kind("journal", "journals of answers", "syntheses/*", (), ("journal.jsonl", ".journal.lock")),
    Kind(
        "synthesis",
        "syntheses",
        "syntheses/*/*",
        ("synthesis.json", "responses.jsonl"),
        ("synthesis.json", "responses.jsonl"),
    ),
    Kind(
        "teacher",
        "teachers",
        "teachers/*",
        ("fingerprint.json",),
        (
            "fingerprint.json",
            "digests.json",
            "architecture.json",
            "model",
            "final",
            "checkpoint-*",
            "student.json",
            "training.json",
            "training_log.csv",
            "tokenizer",
            ".demo_teacher.lock",
            ".final*",
        ),
    ),
    Kind(
        "tokens",
        "tokens",
        "tokens/*",
        ("index.json", "token_counts.npy"),
        ("index.json", "token_counts.npy", "shard_*.h5"),
    ),
    Kind(
        "validation",
        "held-out scores",
        "validation/*",
        ("teacher_validation.safetensors",),
        ("teacher_validation.safetensors", "samples.json"),
    ),
    Kind(
        "logits",
        "logit caches",
        "logits/*",
        ("manifest.json", "teacher_logits.h5"),
        (
            "manifest.json",
            "teacher_logits.h5",
            "plan.json",
            "batch_tokens.json",
            "metadata_worker*.json",
            "parts",
        ),
    ),
    Kind(
        "pruned",
        "pruned models",
        "pruned/*",
        ("pruned.json", "model"),
        ("pruned.json", "model", ".model.tmp"),
    ),
    Kind(
        "run",
        "runs",
        "runs/*/*",
        ("training.json", "final"),
        (
            "training.json",
            "final",
            "student.json",
            "training_log.csv",
            "checkpoint-*",
            "tmp-checkpoint-*",
            "tensorboard",
            "wandb",
            ".final*",
        ),
    ),
    Kind(
        "evaluation",
        "evaluations",
        "runs/*/*/evaluation/*",
        ("metrics.json",),
        ("metrics.json", "samples.json", "documents.csv"),
    ),
    Kind(
        "benchmark",
        "benchmarks",
        "*/**/benchmarks/*/*",
        ("benchmark.json",),
        ("benchmark.json", "attempts.jsonl"),
    ),
    Kind("check", "checks", "checks/*", ("inputs.json",), ("inputs.json", "estimate.json")),
    Kind(
        "report",
        "reports",
        "reports/*",
        ("report.html",),
        ("report.html", "summary.csv", "summary.txt"),
    ),
)
KIND_OF = {kind.name: kind for kind in KINDS}
