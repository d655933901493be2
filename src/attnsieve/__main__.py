"""`python -m attnsieve` is the command `attnsieve`."""

from attnsieve.cli import main

main()
