"""Snakemake as it is, but that it asks SLURM every second.

The SLURM plugin waits 10 s longer after every look at which nothing had finished, up to three minutes. That spares a
real cluster's controller, and would make these tests last hours.
"""

import asyncio
import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor


async def sleep(self: RemoteExecutor) -> None:
    """Wait for the next look."""
    await asyncio.sleep(1.0)


RemoteExecutor.sleep = sleep

if __name__ == "__main__":
    sys.argv[0] = "snakemake"
    main()
