"""The subcommands of `hf-slim` as typer sees them: their arguments and help, and which function does the work.

A command returns the work, which imports what it needs; `main` does it when typer has read the arguments. To add one,
write a function here that returns `_later(MODULE, FUNCTION, as_json, ...)`, for a function of a module of
`hf_slim.cli`; what that returns is printed, as its `str` or, with `--json`, as its fields or its `to_dict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import version
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .flag_names import check_needed, find_flags, read_default

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


def _print_versions(is_asked: bool) -> None:
    """Print which versions are installed, and end; nothing is imported for it."""
    if is_asked:
        installed = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        typer.echo(f"hf-slim {version('hf-slim')} ({installed})")
        raise typer.Exit()


@app.callback()
def _options(
    is_asked: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions and exit."),
    ] = False,
) -> None: ...


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


def _later(module: str, function: str, as_json: bool = False, gathered: str | None = None, **arguments: Any) -> Work:
    """The call of a function of a module of `hf_slim.cli`, whose result is printed.

    Its arguments are gathered in a dataclass of the module if one is named.
    """

    def work() -> int:
        found = import_module(f"hf_slim.cli.{module}")

        def call() -> Any:
            if gathered is None:
                return getattr(found, function)(**arguments)
            return getattr(found, function)(getattr(found, gathered)(**arguments))

        return import_module("hf_slim.cli.answers").answer(call, as_json)

    return work


def _flag(name: str, says: str) -> Any:
    """An option that is written with underscores, as the Trainer's are, or with dashes."""
    names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    return typer.Option(*names, help=says, show_default=False)


def _default(file: str, owner: str, name: str) -> str:
    """The default of a flag, as its help names it."""
    return f"default: {read_default(file, owner, name)}."


_FIELDS = ("arguments/slim_fields.py", "SlimArgumentsMixin")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hub name, a folder or a .json file with a config.")],
    ffn2_sparsity: Annotated[
        float | None, _flag("ffn2_sparsity", "Fraction of the intermediate channels to remove.")
    ] = None,
    mha_sparsity: Annotated[float | None, _flag("mha_sparsity", "Fraction of the attention heads to remove.")] = None,
    slim_target_params: Annotated[
        str | None, _flag("slim_target_params", "In place of them a budget: parameters, a fraction or a number.")
    ] = None,
    slim_target_flops: Annotated[
        str | None, _flag("slim_target_flops", "The same for the operations of a forward pass.")
    ] = None,
    slim_round_to: Annotated[
        int | None,
        _flag("slim_round_to", f"Multiple for the channels of a layer; {_default(*_FIELDS, 'slim_round_to')}"),
    ] = None,
    slim_min_heads: Annotated[
        int | None, _flag("slim_min_heads", f"Heads that every layer keeps; {_default(*_FIELDS, 'slim_min_heads')}")
    ] = None,
    slim_exclude: Annotated[
        list[str] | None, _flag("slim_exclude", "Modules to leave alone; once for each pattern.")
    ] = None,
    as_json: _Json = False,
) -> Work:
    """Say from a config what can be slimmed and what would be left."""
    given = {name: value for name, value in locals().items() if name != "as_json" and value is not None}
    return _later("inspection", "inspect_model", as_json, "InspectArguments", **given)


_LENGTH = _default("cli/data.py", "DataArguments", "max_seq_length")
_BATCH = _default("cli/model_comparison.py", "CompareArguments", "batch_size")


@app.command()
def compare(
    model: Annotated[str, typer.Argument(metavar="A", help="A Hub name, or a folder with weights.")],
    other: Annotated[str, typer.Argument(metavar="B", help="The model to compare it with.")],
    validation_file: Annotated[
        str | None, _flag("validation_file", "Rows to evaluate both on: .csv, .json, .jsonl or .txt.")
    ] = None,
    text_column: Annotated[
        list[str] | None, _flag("text_column", "Column of the text; twice for the two of pairs.")
    ] = None,
    label_column: Annotated[str | None, _flag("label_column", "Column of the label.")] = None,
    tokenizer_name: Annotated[str | None, _flag("tokenizer_name", "Tokenizer, if not the model's.")] = None,
    max_seq_length: Annotated[int | None, _flag("max_seq_length", f"Tokens of a sequence; {_LENGTH}")] = None,
    batch_size: Annotated[int | None, _flag("batch_size", f"Rows of a forward pass; {_BATCH}")] = None,
    as_json: _Json = False,
) -> Work:
    """Set two models side by side: sizes, times, outputs, metrics."""
    given = {name: value for name, value in locals().items() if name != "as_json" and value is not None}
    return _later("model_comparison", "compare_models", as_json, "CompareArguments", **given)


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


_exports = typer.Typer(help="Write a slim model as a file for another runtime.", rich_markup_mode=None)
app.add_typer(_exports, name="export")


@_exports.command()
def gguf(
    folder: Annotated[str, typer.Argument(metavar="IN", help="A Llama or Qwen2: a folder or a Hub name.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The file, such as model.gguf.")],
) -> Work:
    """Write a file that llama.cpp loads, whatever sizes the layers have."""
    return _later("export", "write_gguf", folder=folder, out=out)


_passed_on("bench", "Measure time, FLOPs and memory of dense and slim models.")
