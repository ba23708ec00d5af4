"""`python -m gradpruner`."""

from gradpruner.cli import main

main()
