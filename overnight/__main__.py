"""`python -m overnight` is `overnight`."""

from overnight.cli import main

main()
