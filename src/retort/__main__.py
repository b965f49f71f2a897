"""`python -m retort` is the command `retort`."""

from retort.console import main

main()
