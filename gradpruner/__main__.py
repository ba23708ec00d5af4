"""Entry point of `python -m gradpruner`."""

from gradpruner.cli.main import main

main()
