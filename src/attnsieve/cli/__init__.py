"""The command `attnsieve`: one file per command, each a thin layer over the library's public functions."""

from attnsieve.cli.app import app


def main() -> None:
    """Entry point of the console script and of `python -m attnsieve`."""
    app(prog_name="attnsieve")
