"""Retort: distil a large language model into a small one, from a cache of its distributions.

Packages in the order of the data flow; each imports only those before it (docs/architecture.md):
cli, io, config, cluster, corpus, artifacts, tokens, cache, models, teacher, training, evaluation, synthesis, report,
pipeline, api. Import from the module that defines a name: packages re-export nothing, so that a job loads only what it
uses. The exception are the names below, for other people's training code (docs/library.md), which load at first use.
"""

import logging
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retort.api.collator import Collator as Collator
    from retort.api.collator import Targets as Targets
    from retort.api.dataset import CacheDataset as CacheDataset
    from retort.api.dataset import open_cache as open_cache
    from retort.api.losses import distillation_loss as distillation_loss
    from retort.api.losses import distillation_loss_of_logits as distillation_loss_of_logits
    from retort.losses.terms import LossTerms as LossTerms

# The public names, and the modules that define them; they follow semantic versioning.
_PUBLIC = {
    "CacheDataset": "retort.api.dataset",
    "Collator": "retort.api.collator",
    "LossTerms": "retort.losses.terms",
    "Targets": "retort.api.collator",
    "distillation_loss": "retort.api.losses",
    "distillation_loss_of_logits": "retort.api.losses",
    "open_cache": "retort.api.dataset",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())  # scripts configure it (retort.cli)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("retort")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'retort' has no attribute {name!r}")
    found = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, "__version__"})
