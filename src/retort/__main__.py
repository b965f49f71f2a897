"""`python -m retort` is the command `retort`."""

from retort.pipeline.console import main

main()
