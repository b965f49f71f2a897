"""Retort: distil a large language model into a small one, from a cache of its distributions.

Packages in the order of the data flow; each imports only those before it (docs/architecture.md):
cli, io, config, cluster, corpus, artifacts, tokens, cache, models, teacher, training, evaluation, synthesis, report,
pipeline. Import from the module that defines a name: packages re-export nothing, so that a job loads only what it uses.
"""

import logging

logging.getLogger(__name__).addHandler(logging.NullHandler())  # scripts configure it (retort.cli)
