"""Slim a tiny model of any type, and say what became of it."""

from __future__ import annotations

import copy
import re
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from presence import has_modules
from tiny import auto_class_of, build_tiny, serves
from transformers import PreTrainedModel

import hf_slim
from hf_slim.compaction.numerical_proof import Proof
from hf_slim.compaction.zeros import zero_units
from hf_slim.proof.made_inputs import make_inputs
from hf_slim.proof.output_comparison import (
    ABSOLUTE,
    TOLERANCES,
    VerificationError,
    compare_models,
    compare_outputs,
    compute_outputs,
)
from hf_slim.structures.discovery import find_structures
from hf_slim.structures.structure import Kind, Structure, get_tensor

NEW_TOKENS = 5
KINDS: tuple[Kind, ...] = ("ffn", "mha")
GENERATING = (
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForCausalLM",
)

Outputs = dict[str, torch.Tensor]


@dataclass
class KindVerdict:
    """What became of the feed-forward networks or of the attention of a type.

    Args:
        present: Whether the model has such modules of linear layers, judged by class names and shapes alone.
        slimmed: Number of structures that were slimmed.
        skipped: Module and reason of each that was left alone.
    """

    present: bool = False
    slimmed: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.slimmed:
            return "slimmed"
        if self.skipped:
            return "skipped"
        return "not found" if self.present else "none"


@dataclass
class Verdict:
    """What became of a model type.

    Args:
        model_type: As in `config.json`.
        built: Whether the tiny model was built.
        ran: Whether it runs on made inputs.
        reason: Why not.
        kinds: By kind of structure.
        unproven: Structures that lost units and that the library names as not proven, with these inputs.
        unreached: Structures that no output depends on, with these inputs; about them the comparison says nothing.
        wrong: What the slimmed or the reloaded model computed otherwise than the masked one.
        error: What was raised by the library, and where.
        not_reloaded: Why the saved model was not compared.
        generation: How generation was compared.
        seconds: How long it took.
    """

    model_type: str
    built: bool = False
    ran: bool = False
    reason: str = ""
    kinds: dict[str, KindVerdict] = field(default_factory=lambda: {kind: KindVerdict() for kind in KINDS})
    unproven: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    wrong: str = ""
    error: str = ""
    not_reloaded: str = ""
    generation: str = ""
    seconds: float = 0.0


class WrongError(Exception):
    """The slimmed model computes something else."""


class _StepError(Exception):
    """An exception with the step that it came from."""


def sweep_type(model_type: str) -> Verdict:
    """Build a tiny model of a type, zero half of its units, slim it, save it and load it again.

    Args:
        model_type: As in `config.json`.

    Returns:
        The verdict; nothing is raised.
    """
    verdict = Verdict(model_type)
    start = time.monotonic()
    try:
        _sweep_base(verdict)
        if verdict.ran:
            _sweep_generation(verdict)
    except WrongError as error:
        verdict.wrong = str(error)
    except _StepError as error:
        verdict.error = str(error)
    verdict.seconds = round(time.monotonic() - start, 2)
    return verdict


def _sweep_base(verdict: Verdict) -> None:
    auto_class = auto_class_of(verdict.model_type)
    try:
        model = build_tiny(verdict.model_type, auto_class)
    except Exception as error:
        verdict.reason = _shorten(error)
        return
    verdict.built = True
    for kind in KINDS:
        verdict.kinds[kind].present = has_modules(model, kind)
    try:
        inputs = make_inputs(model)
        dense = compute_outputs(model, inputs)
    except Exception as error:
        verdict.reason = _shorten(error)
        return
    if any(value.isnan().any() for value in dense.values()) or not any(
        value.isfinite().any() for value in dense.values()
    ):
        verdict.reason = "the dense model gives no finite outputs"
        return
    verdict.ran = True
    with _step("find_structures"):
        found = find_structures(model)
    for skip in found.skipped:
        verdict.kinds[skip.kind].skipped.append((skip.name, skip.reason))
    structures = [s for s in found.structures if s.units > 1]
    if not structures:
        return
    for structure in structures:
        verdict.kinds[structure.kind].slimmed += 1
    masks = half_masks(found.structures)
    verdict.unreached = [s.name for s in structures if not _reaches(model, s, masks[s.name], inputs, dense)]
    slim = _mask_and_slim(model, found.structures, masks)
    verdict.unproven = list(Proof(model, {model: inputs}).find_unproven(found.structures, masks))
    _compare("slimmed", model, slim, inputs)
    _check_reload(verdict, slim, auto_class, inputs, model)


def _mask_and_slim(
    model: PreTrainedModel, structures: Sequence[Structure], masks: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """Zero the units of the model, and give a copy without them."""
    zero_units(model, structures, masks)
    slim = copy.deepcopy(model)
    with _step("model_slim"):
        hf_slim.model_slim(slim, round_multiplier=1, verify=False)  # it is compared below
    for (name, dim), dropped in _dropped(structures, masks).items():
        before, after = get_tensor(model, name).shape[dim], get_tensor(slim, name).shape[dim]
        if after != before - len(dropped):
            raise WrongError(f"dimension {dim} of {name} is {after} after slimming instead of {before - len(dropped)}")
    return slim


def _dropped(structures: Sequence[Structure], masks: dict[str, torch.Tensor]) -> dict[tuple[str, int], set[int]]:
    """The positions that are to go, for each tensor and dimension."""
    found: dict[tuple[str, int], set[int]] = {}
    for structure in structures:
        for place, positions in structure.positions(~masks[structure.name]).items():
            found.setdefault(place, set()).update(positions.tolist())
    return found


def _check_reload(
    verdict: Verdict, slim: PreTrainedModel, auto_class: str, inputs: Any, masked: PreTrainedModel
) -> None:
    try:
        loaded = _reload(slim, auto_class)
    except (WrongError, _StepError):
        try:
            _reload(build_tiny(verdict.model_type, auto_class), auto_class)
        except (WrongError, _StepError) as error:
            verdict.not_reloaded = f"transformers does not give the dense model again either: {error}"
            return
        raise
    _compare("reloaded", masked, loaded, inputs)


def _reload(model: PreTrainedModel, auto_class: str) -> PreTrainedModel:
    """Save a model and load it again, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        with _step("save_pretrained"):
            model.save_pretrained(folder)
        with _step("from_pretrained"):
            loaded = getattr(transformers, auto_class).from_pretrained(folder, dtype=torch.float32).eval()
    weights = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in weights or not torch.equal(tensor, weights[name]):
            raise WrongError(f"reloaded: another {name}")
    return loaded


def _sweep_generation(verdict: Verdict) -> None:
    """Compare a greedy generation with a cache, where a generating Auto class serves the type."""
    auto_class = next((name for name in GENERATING if serves(name, verdict.model_type)), None)
    if auto_class is None:
        return
    try:
        model = build_tiny(verdict.model_type, auto_class)
        inputs = {name: value for name, value in make_inputs(model).items() if not name.startswith("decoder_")}
        _generate(model, inputs)
    except Exception as error:
        verdict.generation = f"not compared: {_shorten(error)}"
        return
    with _step("find_structures"):
        structures = find_structures(model).structures
    masks = half_masks(structures)
    if not any(s.units > 1 for s in structures):
        return
    slim = _mask_and_slim(model, structures, masks)
    tokens, scores = _generate(model, inputs)
    with _step("generate"):
        slim_tokens, slim_scores = _generate(slim, inputs)
    for step, (wanted, got) in enumerate(zip(scores, slim_scores, strict=True)):
        with _wrong("generated"):
            compare_outputs({f"scores {step}": wanted}, {f"scores {step}": got})
        if not torch.equal(tokens[:, step], slim_tokens[:, step]):
            best = wanted.topk(2).values
            if float((best[:, 0] - best[:, 1]).min()) > 2 * TOLERANCES[torch.float32] * float(
                wanted.abs().max() + ABSOLUTE
            ):
                raise WrongError(f"generated: token {step} is another one")
            break
    verdict.generation = f"compared with {auto_class}"


@torch.no_grad()
def _generate(model: PreTrainedModel, inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The new tokens and the scores of each."""
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, 0
    if getattr(settings, "decoder_start_token_id", None) is None:
        settings.decoder_start_token_id = 0
    torch.manual_seed(0)
    output = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, -len(output.logits) :], [logits.float() for logits in output.logits]


def half_masks(structures: Sequence[Structure], seed: int = 2) -> dict[str, torch.Tensor]:
    """Random masks that keep half of the units, fewer in every second structure, so that layers differ; at least one.

    Channels go by fours, since the kernels of experts need rows of whole 16 bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for number, structure in enumerate(structures):
        step = 4 if structure.kind == "ffn" and structure.units >= 16 else 1
        kept = max(1, structure.units // 2 // step - number // 2 % 2) * step
        masks[structure.name] = torch.randperm(structure.units, generator=generator) < min(kept, structure.units)
    return masks


def _reaches(model: PreTrainedModel, structure: Structure, mask: torch.Tensor, inputs: Any, dense: Outputs) -> bool:
    """Whether zeroing units of this structure alone changes an output; the model is left as it was."""
    before = {member.tensor: get_tensor(model, member.tensor).clone() for member in structure.members}
    zero_units(model, [structure], {structure.name: mask})
    masked = compute_outputs(model, inputs)
    with torch.no_grad():
        for name, value in before.items():
            get_tensor(model, name).copy_(value)
    return not all(torch.equal(masked[name], value) for name, value in dense.items())


def _compare(what: str, masked: PreTrainedModel, slim: PreTrainedModel, inputs: Any) -> None:
    """Wrong if outputs differ by more than rounding, as the library judges it."""
    with _wrong(what), _step("forward"):
        compare_models(masked, slim, inputs)


@contextmanager
def _wrong(what: str) -> Iterator[None]:
    try:
        yield
    except VerificationError as error:
        raise WrongError(f"{what}: {error}") from error


@contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except VerificationError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = next((f for f in reversed(frames) if "/torch/" not in f.filename), frames[-1])
        raise _StepError(f"{name}: {_shorten(error)} ({Path(last.filename).name}:{last.lineno})") from error


def _shorten(error: BaseException) -> str:
    """Type and message, without sentences that list hundreds of classes."""
    while error.__cause__ is not None:
        error = error.__cause__
    needs = re.search(r"requires the (\S+) library|No module named '(\w+)'", str(error))
    if needs:
        return f"needs {needs[1] or needs[2]}, which is not installed"
    first, *others = re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(str(error).split()))
    return " ".join([f"{type(error).__name__}: {first}", *(text for text in others if len(text) <= 400)])
