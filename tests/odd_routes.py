"""Odd modules of a stranger's own by the routes on which units leave a model: `python tests/odd_routes.py`.

With discovery as it is, and blind, so that a numerical proof is all that stands in the way.
"""

from __future__ import annotations

import collections
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from unittest import mock

import torch
from odd_modules import ODD, VOCAB, build_model
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging
from verdict import half_masks

from hf_slim import SlimTrainerCallback, SlimTrainingArguments, find_structures, model_slim, save_slimmed
from hf_slim.compaction.zeros import zero_units
from hf_slim.proof.output_comparison import VerificationError
from hf_slim.saving.report import render_table

VERDICTS = ("skipped", "exact", "refused", "kept as zeros", "warned of", "WRONG")
"""What may become of an odd module: nothing looks like a structure; it computes the same; `VerificationError`; live
compaction goes on with zeros; it differs, and a warning has said that nothing is proven; it differs silently."""
BLIND = ("hf_slim.structures.discovery.find_hook", "hf_slim.structures.discovery.find_strange")


def blind() -> AbstractContextManager[object]:
    """Let discovery take whatever has a known layout."""
    stack = ExitStack()
    for look in BLIND:
        stack.enter_context(mock.patch(look, lambda model, path, structure: None))
    return stack


def compute(model: torch.nn.Module) -> torch.Tensor:
    """What a model makes of some tokens."""
    tokens = torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return copy.deepcopy(model).eval()(input_ids=tokens).logits


def judge(before: torch.Tensor, slim: torch.nn.Module, *, said: bool) -> str:
    """Whether a slim model computes what the masked one did."""
    try:
        if (before - compute(slim)).abs().max() <= 1e-4 * (before.abs().max() + 0.1):
            return "exact"
    except RuntimeError:  # the slim model does not run
        pass
    return "warned of" if said else "WRONG"


def _is_taken(model: torch.nn.Module, name: str) -> bool:
    """Whether discovery takes the odd modules in a model."""
    kinds = {s.kind for s in find_structures(model).structures}
    return ("ffn" if name.startswith(("Mlp", "Gated")) else "mha") in kinds


def by_model_slim(name: str, folder: Path, *, pretrained: bool, verify: object = True) -> str:
    """`model_slim` on inputs that are made."""
    model = build_model(name, pretrained=pretrained)
    if not _is_taken(model, name):
        return "skipped"
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    before = compute(model)
    said: list[object] = []
    try:
        with mock.patch("hf_slim.compaction.sparse_model.logger.warning", said.append):
            model_slim(model, 1, verify=verify)
    except VerificationError:
        return "refused"
    return judge(before, model, said=bool(said))


def by_model_slim_and_batch(name: str, folder: Path, *, pretrained: bool) -> str:
    """`model_slim` on a batch that is given."""
    batch = {"input_ids": torch.arange(14).view(2, 7)}
    return by_model_slim(name, folder, pretrained=pretrained, verify=batch)


def _train(name: str, folder: Path, *, live: object) -> Trainer | None:
    """A trainer that has trained, None if nothing looks like a structure."""
    model = build_model(name, pretrained=True)
    if not _is_taken(model, name):
        return None
    which = "ffn2_sparsity" if name.startswith(("Mlp", "Gated")) else "mha_sparsity"
    settings = {which: 0.5, "slim_start": 1, "slim_end": 2, "slim_round_to": 1, "slim_live": live}
    quiet = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "error",
        "save_strategy": "no",
        "learning_rate": 1e-3,
    }
    quiet["max_grad_norm"] = 0.0  # zeros of odd modules have gradients, which would count
    args = SlimTrainingArguments(folder, max_steps=2, per_device_train_batch_size=4, **settings, **quiet)
    rows = torch.randint(VOCAB, (16, 7), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": row, "labels": int(row[0]) % 3} for row in rows]
    trainer = Trainer(model, args, train_dataset=data, callbacks=[SlimTrainerCallback()])
    trainer.train()
    return trainer


def by_live_training(name: str, folder: Path, *, pretrained: bool) -> str:
    """Live compaction, `slim_live="auto"`, against the same training with zeros."""
    live, masked = (_train(name, folder, live=live) for live in ("auto", False))
    if live is None or masked is None:
        return "skipped"
    verdict = judge(compute(masked.model), live.model, said=False)
    callback = next(c for c in live.callback_handler.callbacks if isinstance(c, SlimTrainerCallback))
    return verdict if verdict != "exact" or callback.slimming.is_live else "kept as zeros"


def by_strict_live_training(name: str, folder: Path, *, pretrained: bool) -> str:
    """Live compaction, `slim_live=True`."""
    try:
        live, masked = (_train(name, folder, live=live) for live in (True, False))
    except VerificationError:
        return "refused"
    if live is None or masked is None:
        return "skipped"
    return judge(compute(masked.model), live.model, said=False)


def by_masked_training(name: str, folder: Path, *, pretrained: bool) -> str:
    """Training with zeros, then `save_slimmed(trainer)`."""
    trainer = _train(name, folder, live=False)
    if trainer is None:
        return "skipped"
    try:
        save_slimmed(trainer, folder / "slim")
    except VerificationError:
        return "refused"
    loaded: PreTrainedModel = type(trainer.model).from_pretrained(folder / "slim")
    return judge(compute(trainer.model), loaded, said=False)


ROUTES: dict[str, Callable[..., str]] = {
    "model_slim": by_model_slim,
    "model_slim, batch": by_model_slim_and_batch,
    "live, auto": by_live_training,
    "live, True": by_strict_live_training,
    "masked and saved": by_masked_training,
}
ON_MODULES = ("model_slim", "model_slim, batch")
"""Routes that take a plain module as well."""


def verdict_of(name: str, route: str, *, pretrained: bool, is_blind: bool) -> str:
    """What becomes of an odd module on a route.

    Args:
        name: One of `ODD`.
        route: One of `ROUTES`.
        pretrained: Whether the model around it is a `PreTrainedModel` or a plain module.
        is_blind: Whether discovery takes whatever has a known layout.

    Returns:
        One of `VERDICTS`.
    """
    with tempfile.TemporaryDirectory() as folder, blind() if is_blind else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ROUTES[route](name, Path(folder), pretrained=pretrained)


def main() -> None:
    """Print a table: routes by verdicts, with discovery as it is and blind."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    columns = [
        (route, pretrained) for route in ROUTES for pretrained in (True, False) if pretrained or route in ON_MODULES
    ]
    rows = [("route", "model", "discovery", *VERDICTS)]
    wrong = []
    for is_blind in (False, True):
        for route, pretrained in columns:
            counts: collections.Counter[str] = collections.Counter()
            for name in tqdm(ODD, desc=route, leave=False):
                found = verdict_of(name, route, pretrained=pretrained, is_blind=is_blind)
                counts[found] += 1
                wrong += [(name, route, is_blind)] * (found == "WRONG")
            kind = "PreTrainedModel" if pretrained else "module"
            rows.append((route, kind, "blind" if is_blind else "as it is", *(str(counts[v]) for v in VERDICTS)))
    print(render_table(rows, left=3))
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
