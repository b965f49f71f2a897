"""The sections `output` and `tracking`: where results are, and what shows them during training."""

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
    results_dir."""


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


def check_folders(c: "Config") -> Found:
    for key in ("results_dir", "cache_dir"):
        folder = getattr(c.output, key)
        if folder is not None and ("{" in folder or "}" in folder):
            yield (
                f"output.{key} is {show(folder)}, but Snakemake takes braces in its paths for wildcards. Use a folder "
                "without { and }."
            )
