"""`python -m qserve` is the command `qserve`."""

from qserve.cli import main

main()
