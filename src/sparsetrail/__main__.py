"""`python -m sparsetrail`, as the command."""

from sparsetrail.cli import main

main()
