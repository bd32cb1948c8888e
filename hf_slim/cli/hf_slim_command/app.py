"""The subcommands of `hf-slim` as typer sees them: their arguments and help, and which function does the work.

A command returns the work, which imports what it needs; `main` does it when typer has read the arguments. To add one,
write a function here that returns `_later(MODULE, FUNCTION, as_json, ...)`, for a function of a module of
`hf_slim.cli`; what that returns is printed, as its `str` or, with `--json`, as its fields or its `to_dict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .flag_names import check_needed, find_flags

Work = Callable[[], int]
"""What is left to do of a command; returns the exit status."""

app = typer.Typer(
    help="Make transformer models smaller and faster while they are fine-tuned, or in one shot, and compare them with "
    "what they were.",
    epilog="hf-slim COMMAND --help says more.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs, and nothing else.")]
_Slim = Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of a slim model.", show_default=False)]


class _PassedOn(TyperCommand):
    """A command whose flags are fields of dataclasses, read by the parser of transformers."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters: none, but for our flags while a shell completes a word."""
        return [
            *super().get_params(ctx),
            *(_make_options(find_flags(str(self.name))) if ctx.resilient_parsing else ()),
        ]


def _make_options(names: Iterable[str]) -> list[Any]:
    """Options of a command, as typer makes them of the signature of a function."""

    def command(**flags: str) -> None: ...

    kinds = {name: Annotated[str, typer.Option(f"--{name}")] for name in names}
    parameters = [Parameter(name, Parameter.KEYWORD_ONLY, default="", annotation=kinds[name]) for name in kinds]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = kinds
    options = typer.Typer(add_completion=False)
    options.command()(command)
    return list(typer.main.get_command(options).params)


def _passed_on(name: str, does: str) -> None:
    """Add a command whose flags are passed on as they are."""
    settings = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}

    @app.command(
        name, help=does, cls=_PassedOn, context_settings=settings, add_help_option=False, options_metavar="[FLAGS]"
    )
    def command(ctx: typer.Context) -> Work:
        check_needed(name, ctx.args)

        def work() -> int:
            from hf_slim.cli.subcommands import run_command

            return run_command(name, ctx.args)

        return work


def _later(module: str, function: str, as_json: bool = False, **arguments: Any) -> Work:
    """The call of a function of a module of `hf_slim.cli`, whose result is printed."""

    def work() -> int:
        found = import_module(f"hf_slim.cli.{module}")
        return import_module("hf_slim.cli.answers").answer(lambda: getattr(found, function)(**arguments), as_json)

    return work


_passed_on("demo", "Train a small BERT on generated data: no files, no network.")
_passed_on("run", "Train a model on your data, slimmed and dense, and compare.")
_passed_on("prune", "Slim a trained model in one shot, calibrated on your data.")


@app.command()
def compact(
    model: Annotated[str, typer.Argument(metavar="IN", help="Model with zero units: a folder or a Hub name.")],
    output_dir: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the slim model.")],
    as_json: _Json = False,
) -> Work:
    """Remove the zero units of a sparse model, whoever zeroed them.

    It is proven that the slim model computes the same; tokenizer and other files come along.
    """
    return _later("compact", "compact", as_json, model=model, output_dir=output_dir)


@app.command()
def push(
    folder: _Slim,
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="USER/NAME; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Token with the right to write; default: that of `hf auth login`.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is not there.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create_pr", "--create-pr", help="Open a pull request in place of pushing.")
    ] = False,
) -> Work:
    """Upload the folder of a slim model to the Hub, in one commit."""
    keywords: dict[str, Any] = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
    return _later("push", "push", folder=folder, repo_id=repo_id, **keywords)


@app.command()
def card(folder: _Slim) -> Work:
    """Write the model card of a slim model anew."""
    return _later("card", "card", folder=folder)


_passed_on("bench", "Measure time, FLOPs and memory of dense and slim models.")
