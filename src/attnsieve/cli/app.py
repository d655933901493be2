"""The typer application: its commands, --version, and errors as one sentence with exit code 2."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import attnsieve
from attnsieve.cli.bench import bench
from attnsieve.cli.demo import demo
from attnsieve.cli.evaluate import evaluate
from attnsieve.cli.fit import fit
from attnsieve.cli.measure import measure
from attnsieve.cli.profile import profile
from attnsieve.cli.run import run
from attnsieve.cli.show import show
from attnsieve.cli.train import train
from attnsieve.errors import UserError, require

USER_ERROR = 2


class Commands(TyperGroup):
    """Turns errors that a user can act on into one sentence on stderr; anything else is our mistake and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            message = str(error)
        except BrokenPipeError:
            raise
        except OSError as error:
            message = f"{error.filename or 'input or output'}: {error.strerror or error}"
        typer.echo(f"attnsieve: {message}", err=True)
        raise typer.Exit(USER_ERROR)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` name. Raises UserError where one of its arguments is empty."""
        if not ctx.resilient_parsing:  # a shell completes what may be unfinished
            refuse_empty(args)
        return super().resolve_command(ctx, args)


def refuse_empty(args: list[str]) -> None:
    """Raise UserError for an empty argument: as a path it would be the current folder, and no command has another use for it."""
    for before, given in pairwise(args):
        assigned = re.fullmatch("(--[a-z0-9-]+)=", given)
        require(
            given != "" and assigned is None,
            f"{assigned[1] if assigned else before} is followed by '': expected a value (the current folder is '.'); "
            "see that the shell's variables are set",
        )


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("profile")(profile)
app.command("measure")(measure)
app.command("fit")(fit)
app.command("show")(show)
app.command("run")(run)
app.command("eval")(evaluate)
app.command("train")(train)
app.command("bench")(bench)
app.command("demo")(demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attnsieve {attnsieve.__version__}")
        raise typer.Exit


@app.callback()
def attnsieve_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Attention that computes only the entries that matter, chosen per layer and per head.

    Observe a frozen model (profile), choose a pattern per head (fit), run it sparse (run), measure what that costs (eval),
    look at it (show). `attnsieve demo` does all of it on a small model. `attnsieve train` trains models that are sparse by
    design (DMA).
    """
