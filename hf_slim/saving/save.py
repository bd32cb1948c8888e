"""save_slimmed: compact, check, write the folder whole or not at all, and push it to the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import extract_model_from_parallel
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..arguments import SlimConfig
from ..compaction import (
    find_dense,
    find_pretrained,
    find_proof,
    find_removable,
    find_unproven,
    mark_unproven,
    merge_proven,
    name_unproven,
    remove_units,
)
from ..costs import find_forward_costs, make_small_skeleton
from ..parallel import (
    build_whole,
    gather_weights,
    is_dispatched,
    is_first_process,
    is_spread,
    refuse_strategy,
    refuse_unmapped,
    run_in_first_process,
    writing_apart,
)
from ..proof import check_verify
from ..structures import REMEDY, Masks, count_left, has_adapters
from ..training import Slimmer, SlimTrainerCallback, find_slimmer
from .atomic_folder import check_folder
from .card_facts import Provenance, find_settings, is_number
from .hub_upload import add_hub_fields, check_keywords, push_folder
from .layer_bars import StructureSize
from .model_folder import write_folder
from .past_slimming import add_past, count_past_costs, find_past
from .report import SLIM_ALREADY, SlimReport, count_bytes, count_parameters
from .trainer_batches import find_batch
from .training_data import find_data_name, find_data_names
from .wrapped_models import can_save, copy_model

logger = logging.get_logger(__name__)


def save_slimmed(
    trainer_or_model: Trainer | nn.Module,
    output_dir: str | os.PathLike[str],
    *,
    processing_class: Any = None,
    verify: bool | Mapping[str, Any] = True,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    inplace: bool = False,
    max_shard_size: int | str | None = None,
    **hub_kwargs: Any,
) -> SlimReport:
    """Remove the zero units of a model physically and save it as `save_pretrained` would.

    The folder gets the weights, the config with the new shape, the tokenizer or processor, a model card and, where the
    config cannot express the shape, a small remote-code file. It is written beside `output_dir` and takes its place
    when all is written, so that at every moment the previous folder is there whole, or the new one; other files that
    are in `output_dir` stay there, but for weights and adapters of an older model. With several processes the first
    one writes, and the others wait for it, so every process has to call this.

    Args:
        trainer_or_model: The `Trainer` after training, or any model with zero units: a transformers model, one with
            adapters, which are merged into what is saved, or a module that holds transformers models and saves itself
            and them by `save_pretrained`.
        output_dir: The folder.
        processing_class: Tokenizer or processor to save along; the trainer's own if it is not given.
        verify: Check that the slimmed model gives what the masked model gave, and that the saved folder gives the same
            weights again, bit for bit. The inputs are a few rows of the trainer's evaluation or training data; for a
            bare model, and where the trainer's batches are not what the model takes, they are made from its config. A
            batch (keyword arguments of the forward pass, also what a tokenizer or processor returns) is used instead.
            False skips both checks.
        push_to_hub: Upload what was written, in one commit, which deletes what it replaces.
        repo_id: Repository to upload to; the trainer's `hub_model_id` or the folder's name if it is not given.
        inplace: Leave the caller's model slimmed, too; else it stays as it was. With `verify=False` no copy is made,
            so that the model is slimmed even if it cannot be saved. An optimizer from before does not fit it any more.
        max_shard_size: Size from which on the weights are split into several files, as for `save_pretrained`.
        **hub_kwargs: `token`, `private`, `revision`, `commit_message`, `commit_description` and `create_pr`, as for
            `push_to_hub` of transformers; the trainer's `hub_token`, `hub_private_repo` and `hub_revision` where they
            are not given.

    Returns:
        Parameters, bytes and the size of every structure before and after; prints as a table.

    Raises:
        TypeError: If a keyword is unknown.
        ValueError: If an argument is of a wrong type, the model has nothing to slim, or no input can be made for it.
        OSError: If `output_dir` is a file or cannot be written; what was there before is unchanged.
        RuntimeError: If the upload fails, and the folder is there; or in every process if the first one fails.
        VerificationError: If the slimmed model computes something else; nothing is written.
    """
    trainer = trainer_or_model if isinstance(trainer_or_model, Trainer) else None
    model = _unwrap(trainer_or_model.model if isinstance(trainer_or_model, Trainer) else trainer_or_model)
    _check_arguments(output_dir, processing_class, verify, repo_id, push_to_hub=push_to_hub, inplace=inplace)
    if hub_kwargs and not push_to_hub:
        raise ValueError(f"{', '.join(sorted(hub_kwargs))} can only be used with push_to_hub=True.")
    check_keywords(hub_kwargs)
    _check_model(model, inplace=inplace)
    name = repo_id or (trainer and trainer.args.hub_model_id) or Path(output_dir).resolve().name
    if push_to_hub:
        validate_repo_id(name)
        hub_kwargs = add_hub_fields(hub_kwargs, trainer.args if trainer is not None else None)
    if processing_class is None and trainer is not None:
        processing_class = trainer.processing_class
    target = run_in_first_process(lambda: check_folder(output_dir))
    known = _look_back(trainer, model, needs_batch=verify is True)
    own = inplace and verify is False  # without a comparison there is nothing to keep the masked model for

    def save(whole: nn.Module) -> SlimReport:
        slim = whole if own else _copy(whole)
        with nullcontext() if own else writing_apart(slim):
            slim, report, inputs = _slim(slim, known, verify, is_copy=not own)
            written = write_folder(
                target, slim, report, name, processing_class, inputs, known.provenance, max_shard_size=max_shard_size
            )
        if push_to_hub:
            push_folder(target, written, name, hub_kwargs)
        return report

    if not is_spread(model):
        report = run_in_first_process(lambda: save(model))
        if inplace and not (own and is_first_process()):
            _slim_too(model, known, report)
        return report
    weights = gather_weights(model)
    return run_in_first_process(lambda: save(build_whole(model, weights)))


class _Known(NamedTuple):
    """What is known of a model's training; of a bare model nothing is.

    Args:
        masks: For the names of structures boolean tensors of shape `[units]`, True = keep.
        multiple: Multiple for the number of intermediate channels.
        batch: A few rows of the trainer's data.
        unproven: Names of the structures that have lost units while it trained, without proof.
        provenance: What a card says of the training.
        slimmer: The state of the training of this very model, with its plan.
    """

    masks: Masks
    multiple: int
    batch: Mapping[str, Any] | None
    unproven: tuple[str, ...]
    provenance: Provenance
    slimmer: Slimmer | None


def _look_back(trainer: Trainer | None, model: nn.Module, *, needs_batch: bool) -> _Known:
    """What is known of a model's training, by a Trainer or another loop; its zeros are looked at again."""
    callbacks = trainer.callback_handler.callbacks if trainer is not None else []
    callback = next((c for c in callbacks if isinstance(c, SlimTrainerCallback)), None)
    slimmer = callback.slimming if callback is not None else find_slimmer(model)
    masks: Masks = {}
    if trainer is not None and callback is not None:
        callback.restore_zeros(trainer.model)
        masks = callback.find_masks(trainer.model)
    elif slimmer is not None:
        slimmer.restore_zeros(model)
        masks = slimmer.find_masks(model)
    if slimmer is not None and not slimmer.has_reached_target:
        logger.warning(
            f"save_slimmed: training ended before the last pruning step, {slimmer.plan.last_step}. The sparsities "
            f"reached are {slimmer.sparsities()}, and the model is saved with those."
        )
    return _Known(
        masks,
        slimmer.plan.round_to if slimmer is not None else SlimConfig().slim_round_to,
        find_batch(trainer, model) if trainer is not None and needs_batch else None,
        tuple(sorted(slimmer.unproven)) if slimmer is not None else (),
        _find_provenance(trainer, slimmer, model),
        slimmer if masks else None,
    )


def _slim(
    slim: nn.Module, known: _Known, verify: bool | Mapping[str, Any], *, is_copy: bool
) -> tuple[nn.Module, SlimReport, list[Mapping[str, Any]]]:
    """The model slimmed, what became smaller, and the inputs on which it was compared with what it was before."""
    proof = find_proof(slim, verify, known.batch)
    slim, proof = merge_proven(slim, proof)
    dense = find_dense(slim)
    before = count_parameters(dense.model), count_bytes(dense.model)
    past_costs = count_past_costs(slim, dense)
    skeleton = (
        make_small_skeleton(slim, dense.structures, dense.sizes)
        if proof is not None
        else "nothing was run (verify=False)"
    )
    structures, masks = find_removable(slim, known.multiple, known.masks)
    unproven = remove_units(slim, structures, masks, proof, is_copy=is_copy)
    mark_unproven(slim, structures, unproven)
    kept = {s.name: count_left(slim, s) for s in dense.structures}
    costs = find_forward_costs(skeleton, slim, kept)
    report = SlimReport(
        before[0],
        count_parameters(slim),
        before[1],
        count_bytes(slim),
        tuple(StructureSize(s.name, s.kind, s.units, kept[s.name]) for s in dense.structures),
        tuple(dict.fromkeys((*find_unproven(slim, structures), *known.unproven))),
        known.slimmer.plan.report_budget(kept) if known.slimmer is not None else None,
        *costs,
    )
    report = add_past(report, slim, past_costs)
    if SLIM_ALREADY in report.missing:
        logger.warning(f"save_slimmed: {SLIM_ALREADY}")
    if report.parameters_after == report.parameters_before:
        logger.warning("save_slimmed: no unit of the model is zero, so it is saved at the size it has.")
    if proof is not None and unproven:
        logger.warning(f"save_slimmed: {name_unproven(unproven)}")
    return slim, report, list(proof.batches.values()) if proof is not None else []


def _slim_too(model: nn.Module, known: _Known, report: SlimReport) -> None:
    """Remove from the caller's model what has been removed from the copy that was saved."""
    structures, masks = find_removable(model, known.multiple, known.masks)
    remove_units(model, structures, masks, None)
    mark_unproven(model, structures, report.unproven)


def _check_arguments(output_dir: Any, processing_class: Any, verify: Any, repo_id: Any, **switches: Any) -> None:
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}.")
    if not isinstance(output_dir, (str, os.PathLike)) or not str(output_dir):
        raise ValueError(f"output_dir must be the path of a folder, got {output_dir!r}.")
    check_verify(verify)
    if repo_id is not None and (not isinstance(repo_id, str) or not repo_id):
        raise ValueError(f"repo_id must be the name of a repository, got {repo_id!r}.")
    if processing_class is not None and not callable(getattr(processing_class, "save_pretrained", None)):
        raise ValueError(
            "processing_class must be a tokenizer or processor, which have save_pretrained, got "
            f"{type(processing_class).__name__}."
        )


def _check_model(model: nn.Module, *, inplace: bool) -> None:
    if inplace and has_adapters(model):
        raise ValueError(f"inplace=True cannot slim a {type(model).__name__} with adapters. {REMEDY}")
    if inplace and is_spread(model):
        raise ValueError("inplace=True cannot be used with a sharded model: load the saved one instead.")
    refuse_strategy(model)
    refuse_unmapped(model)


def _unwrap(model: Any) -> nn.Module:
    if isinstance(model, nn.Module):
        model = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(model, nn.Module) or not can_save(model):
        raise ValueError(
            f"save_slimmed takes a Trainer or a PreTrainedModel, got {type(model).__name__}, which holds no "
            "PreTrainedModel that it could save. For another module call model_slim and save it yourself."
        )
    return model


def _copy(model: nn.Module) -> nn.Module:
    """A copy that shares weights until they change, without what was put in the place of the forward pass.

    That may run the model that was copied (TRL's fused head does), and is not saved.
    """
    slim = copy_model(model)
    slim.zero_grad(set_to_none=True)
    slim = extract_model_from_parallel(slim, keep_fp32_wrapper=False)
    for part in find_pretrained(slim):
        if not is_dispatched(part):
            part.__dict__.pop("forward", None)
    return slim


def _find_provenance(trainer: Trainer | None, slimmer: Slimmer | None, model: nn.Module) -> Provenance:
    """The last evaluation, the data sets that are known, and what was asked of the slimming, but for the defaults."""
    past = find_past(model)[1]
    settings = (find_settings(slimmer.plan.settings) if slimmer is not None else None) or past.settings
    if trainer is None:
        return Provenance(settings=settings, base_model=past.base_model)
    evaluated_on = trainer.eval_dataset if not isinstance(trainer.eval_dataset, dict) else None
    return Provenance(
        _metrics(trainer),
        tuple(find_data_names(trainer.train_dataset)),
        find_data_name(evaluated_on),
        settings,
        past.base_model,
    )


def _metrics(trainer: Trainer | None) -> dict[str, float]:
    """The last evaluation of the trainer."""
    for entry in reversed(trainer.state.log_history if trainer is not None else []):
        found = {key: value for key, value in entry.items() if key.startswith("eval_")}
        if found:
            timings = ("_runtime", "_per_second")
            numbers = {key: value for key, value in found.items() if not key.endswith(timings)}
            return {key: float(value) for key, value in numbers.items() if is_number(value)}
    return {}
