"""`python -m snows` is the command line."""

from snows.cli import main

main()
