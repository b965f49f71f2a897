"""The sections `output` and `tracking`: where results are, and what shows them during training."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from retort.config.schema import Found, show
from retort.config.section import Section, Text, setting

if TYPE_CHECKING:
    from retort.config.sections import Config


class Output(Section):
    """Folders of the results, which may be moved."""

    changes_ids: ClassVar[bool] = False

    results_dir: Text = setting("results", is_path=True)
    """Folder of all results, relative to the folder in which snakemake runs."""
    cache_dir: Text | None = setting(None, is_path=True)
    """Folder of large intermediate results (tokens, logit caches), for instance on a scratch disk; null means
    results_dir. s3://bucket/prefix or gs://bucket/prefix: the parts of logit caches are stored there, as objects, and
    all else is in results_dir."""

    @property
    def store(self) -> str | None:
        """The URL of the store, without a final slash; None where cache_dir is a folder."""
        is_url = self.cache_dir is not None and "://" in self.cache_dir
        return str(self.cache_dir).rstrip("/") if is_url else None

    @property
    def cache_folder(self) -> str:
        """The folder of intermediate results on a disk."""
        return self.results_dir if self.cache_dir is None or self.store else self.cache_dir

    def of_cache(self) -> "Output":
        """Return what a job that makes a cache needs to know: the store, not the folders, which it gets as paths."""
        return Output(cache_dir=self.store)

    def find_store(self, folder: Path) -> str | None:
        """Return the URL of the objects of a logit cache whose small files are in `folder`; None without a store."""
        return f"{self.store}/logits/{folder.resolve().name}/parts" if self.store else None


class Tracking(Section):
    """Trackers that show metrics during training."""

    changes_ids: ClassVar[bool] = False

    use_wandb: bool = False
    """Send metrics to Weights & Biases."""
    wandb_project: Text | None = None
    """The project in Weights & Biases."""
    wandb_run_name: Text | None = None
    """The run's name in Weights & Biases; null means the name in runs."""
    use_tensorboard: bool = False
    """Write metrics for TensorBoard into the run's folder."""


# A bucket is named by small letters, digits, dots and hyphens (Google's by _ too), and a prefix follows.
_STORE = re.compile(
    r"(s3://[a-z0-9][a-z0-9.-]{1,61}|gs://[a-z0-9][a-z0-9._-]{1,220})[a-z0-9](/[^/]+)*/?"
)


def check_folders(c: "Config") -> Found:
    if "://" in c.output.results_dir:
        yield (
            f"output.results_dir is {show(c.output.results_dir)}, but results are files: give a folder. An object "
            "store can hold the caches' parts: output.cache_dir."
        )
    if c.output.store and not _STORE.fullmatch(c.output.store):
        yield (
            f"output.cache_dir is {show(c.output.cache_dir)}, which is neither a folder nor an object store that "
            "Retort can use: give s3://bucket/prefix or gs://bucket/prefix, with the bucket's name in small letters."
        )
    for key in ("results_dir", "cache_dir"):
        folder = getattr(c.output, key)
        if folder is not None and ("{" in folder or "}" in folder):
            yield (
                f"output.{key} is {show(folder)}, but Snakemake takes braces in its paths for wildcards. Use a folder "
                "without { and }."
            )
