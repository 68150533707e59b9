"""`python -m gap_export`."""

from gap_export.cli import main

main()
