"""The names of our flags, read off the source of the dataclasses that hold them: to import these takes PyTorch."""

from __future__ import annotations

import ast
import difflib
import functools
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

_DATA = ("cli/data.py", "DataArguments")
_SLIM = ("arguments/slim_fields.py", "SlimArgumentsMixin")
_RUN = (("cli/run.py", "ModelArguments"), _DATA, _SLIM)
_CLASSES = {
    "demo": _RUN,
    "run": _RUN,
    "prune": (("cli/prune.py", "PruneArguments"), _DATA, _SLIM),
    "bench": (("bench/flags.py", "BenchArguments"),),
}
"""For subcommands the files, within the package, and classes of their flags, but for those of the Trainer."""
_SAME = 0.9
"""How near a word is to a flag of ours that is meant; no flag of the Trainer is that near to one."""


def find_flags(command: str) -> dict[str, bool]:
    """Find our flags of a subcommand.

    Args:
        command: `demo`, `run`, `prune` or `bench`.

    Returns:
        For each name, without dashes, whether the flag has to be given.
    """
    found = (entry for file, owner in _CLASSES[command] for entry in _read(file, owner).items())
    return {name: default is None for name, default in found}


def read_default(file: str, owner: str, name: str) -> object:
    """Read the default of a field off the source, for the help of a flag.

    Args:
        file: The module, within the package.
        owner: The dataclass.
        name: The field.

    Returns:
        The default.
    """
    default = _read(file, owner)[name]
    assert default is not None
    return ast.literal_eval(default)


def check_needed(command: str, flags: Sequence[str]) -> None:
    """Refuse flags among which one is missing that has to be given.

    Args:
        command: The subcommand.
        flags: The arguments after it.

    Raises:
        ValueError: If one is missing; the message names it.
    """
    words = [word for word in flags if word != "--json"]
    before = ["", *words]
    is_file = any(w.endswith(".json") and not b.startswith("--") for b, w in zip(before, words, strict=False))
    if command == "demo" or is_file or {"-h", "--help", "--help-all"} & set(words):  # the demo has all defaults
        return
    given = [word.partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    known = find_flags(command)
    missing = [name for name in _needed(known) if not any(f"__{name}".startswith(word) for word in given)]
    if not missing:
        return
    unknown = [word[2:] for word in given if word[2:] not in known]
    near = [(typo, name) for name in missing for typo in difflib.get_close_matches(name, unknown, 1)]
    near += [(typo, name) for typo in unknown for name in difflib.get_close_matches(typo, known, 1, _SAME)]
    for typo, name in near:
        raise ValueError(f"There is no flag --{typo}: did you mean --{name}?")
    raise ValueError(f"--{' and --'.join(missing)} must be given; `hf-slim {command} --help` lists the flags.")


def _needed(flags: Mapping[str, bool]) -> list[str]:
    return [name for name, needed in flags.items() if needed]


@functools.cache
def _read(file: str, owner: str) -> dict[str, ast.expr | None]:
    """The fields of a dataclass, and the default of each; None for one that lacks a default."""
    spec = find_spec("hf_slim")
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner)
    fields = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {node.target.id: _find_default(node.value) for node in fields if isinstance(node.target, ast.Name)}


def _find_default(value: ast.expr | None) -> ast.expr | None:
    """What a field is by default: what is assigned to it, or the default within its `field`."""
    if not isinstance(value, ast.Call):
        return value
    return next((word.value for word in value.keywords if str(word.arg).startswith("default")), None)
