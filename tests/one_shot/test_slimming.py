"""One-shot slimming: what is computed, what is refused, and that nothing is left behind."""

import copy
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, build, logits, make_batch
from datasets import Dataset, IterableDataset
from tiny import build_tiny
from torch.utils.data import DataLoader, Subset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

from hf_slim import SlimConfig, Slimmer, save_slimmed, slim
from hf_slim.cli.tokenizer import make_byte_tokenizer
from hf_slim.one_shot import methods
from hf_slim.one_shot.brain_surgery import DAMPING
from hf_slim.one_shot.calibration_batches import cut_batch
from hf_slim.one_shot.kept_weights import KeptWeights
from hf_slim.one_shot.output_error import OutputError
from hf_slim.one_shot.paused_passes import PausedPass
from hf_slim.one_shot.reading_layers import Watch
from hf_slim.proof import VerificationError, make_inputs

HALF = SlimConfig(ffn2_sparsity=0.5, mha_sparsity=0.5, slim_round_to=8, slim_scope="local")
METHODS = ("obs", "flap", "taylor", "magnitude")


def make_rows(model: PreTrainedModel, samples: int = 24) -> list[dict[str, torch.Tensor]]:
    """Random samples with labels, of one length."""
    batches = [make_batch(model, seed) for seed in range((samples + 1) // 2)]
    rows = [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(2)]
    return rows[:samples]


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], value) for name, value in state.items())


def is_replaced(module: torch.nn.Module) -> bool:
    return "ReplacedForward" in type(module).forward.__qualname__


@pytest.fixture(autouse=True)
def pytorch_is_as_it_was() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
    assert not [thread for thread in threading.enumerate() if thread.name == "hf_slim-pass"]


# ------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_asked_sizes_come_out_and_are_saved(family: str, scope: str, method: str, tmp_path) -> None:
    model = build(family)
    rows = make_rows(model)
    config = SlimConfig(ffn2_sparsity=0.5, mha_sparsity=0.5, slim_round_to=8, slim_scope=scope)
    report = slim(model, rows, config, num_calibration_samples=24, method=method)
    for kind in ("ffn", "mha"):
        sizes = [size for size in report.structures if size.kind == kind]
        assert sum(size.after for size in sizes) == sum(size.before for size in sizes) // 2
        assert scope == "global" or all(size.after == size.before // 2 for size in sizes)
    assert report.unproven == ()
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    batch = make_batch(model)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_slimmed_by_surgery(family: str) -> None:
    model = build(family)
    report = slim(model, make_rows(model), HALF, num_calibration_samples=24)
    assert all(size.after == size.before // 2 for size in report.structures)
    assert report.unproven == ()


@pytest.mark.parametrize("model_type", ["albert", "t5", "mixtral", "gpt_oss", "gpt_neox", "swin", "vit", "olmo2"])
def test_shared_layers_experts_towers_and_norms_over_heads(model_type: str) -> None:
    model = build_tiny(model_type)
    batch = {name: value for name, value in make_inputs(model).items() if isinstance(value, torch.Tensor)}
    rows = len(next(iter(batch.values())))
    loader = DataLoader([batch] * 3, batch_size=None)
    config = SlimConfig(ffn2_sparsity=0.5, mha_sparsity=0.5, slim_round_to=1)
    report = slim(model, loader, config, num_calibration_samples=3 * rows)
    assert report.parameters_after < report.parameters_before and report.unproven == ()


def test_autocast_around_it_changes_nothing() -> None:
    states = []
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        model = build("llama")
        with context:
            slim(model, make_rows(model), SlimConfig(ffn2_sparsity=0.5, slim_round_to=8), num_calibration_samples=24)
        states.append(state_of(model))
    assert_same(model, states[0])


def test_a_model_that_was_slimmed_in_inference_mode_can_be_trained() -> None:
    model = build("llama")
    with torch.inference_mode():
        slim(model, make_rows(model), HALF, num_calibration_samples=24)
        assert torch.is_inference_mode_enabled()
    model(**make_batch(model)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def find_kept(dense: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Which rows of a weight are left."""
    kept = (dense[:, None] == left[None]).all(-1).any(-1)
    assert int(kept.sum()) == len(left)
    return kept


def solve(inputs: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor, *, intercept: bool) -> torch.Tensor:
    """The best weights for the inputs that are kept, by least squares; with an intercept about the means."""
    inputs, weight = inputs.double(), weight.double()
    if intercept:
        inputs = inputs - inputs.mean(0)
    inputs = inputs / len(inputs) ** 0.5
    damping = (DAMPING * inputs.square().sum(0).mean()).sqrt() * torch.eye(inputs.shape[1]).double()
    rows = torch.cat([inputs, damping])
    return torch.linalg.lstsq(rows[:, keep], rows @ weight.t()).solution.t()


def see_inputs(model: PreTrainedModel, layer: torch.nn.Module, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row["input_ids"][None])
    handle.remove()
    return torch.cat(seen)


def test_each_layer_is_solved_by_least_squares_on_what_the_slimmed_layers_before_it_give() -> None:
    model = build("llama")
    dense, rows = copy.deepcopy(model), make_rows(model)
    slim(model, rows, HALF, num_calibration_samples=24, batch_size=5)
    for number in range(2):
        kept = find_kept(dense.model.layers[number].mlp.up_proj.weight, model.model.layers[number].mlp.up_proj.weight)
        before = copy.deepcopy(model)  # slim up to this structure, dense from there on
        before.model.layers[number].mlp = dense.model.layers[number].mlp
        inputs = see_inputs(before, dense.model.layers[number].mlp.down_proj, rows)
        expected = solve(inputs, dense.model.layers[number].mlp.down_proj.weight, kept, intercept=False)
        left = model.model.layers[number].mlp.down_proj.weight
        torch.testing.assert_close(left, expected.float(), rtol=1e-3, atol=1e-3)


def test_with_a_bias_the_weights_are_solved_about_the_mean_and_the_bias_takes_over_what_is_lost_of_it() -> None:
    model = build("gpt2")
    dense, rows = copy.deepcopy(model), make_rows(model)
    slim(model, rows, HALF, num_calibration_samples=24)
    block, old = model.transformer.h[1].mlp, dense.transformer.h[1].mlp
    kept = find_kept(old.c_fc.weight.t(), block.c_fc.weight.t())
    before = copy.deepcopy(model)
    before.transformer.h[1].mlp = old
    inputs = see_inputs(before, old.c_proj, rows)
    expected = solve(inputs, old.c_proj.weight.t(), kept, intercept=True)
    torch.testing.assert_close(block.c_proj.weight.t(), expected.float(), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        error = old.c_proj(inputs) - block.c_proj(inputs[:, kept])
    torch.testing.assert_close(error.mean(0), torch.zeros(32), atol=1e-4, rtol=0)


def test_a_channel_that_repeats_another_is_given_up_without_loss() -> None:
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight):
                weight[32:] = weight[:32]
    batch = make_batch(model)
    expected = logits(model, batch)
    slim(model, make_rows(model), replace(HALF, mha_sparsity=0.0), num_calibration_samples=24)
    assert model.model.layers[0].mlp.down_proj.weight.shape == (32, 32)
    assert (logits(model, batch) - expected).square().mean() < 1e-3 * expected.square().mean()


def test_padding_does_not_count() -> None:
    plain, padded = build("llama"), build("llama")
    rows = make_rows(plain)
    slim(plain, [{"input_ids": row["input_ids"][:5]} for row in rows], HALF, num_calibration_samples=24)
    mask = torch.tensor([1] * 5 + [0] * 2)
    with_mask = [{"input_ids": row["input_ids"], "attention_mask": mask} for row in rows]
    slim(padded, with_mask, HALF, num_calibration_samples=24)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(padded.state_dict()[name], weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_what_stands_in_padded_positions_makes_no_difference(model_type: str, scope: str) -> None:
    states = []
    for padding in (0, 7):
        model = build(model_type)
        rows = make_rows(model)
        for number, row in enumerate(rows):
            length = row["input_ids"].shape[0]
            row["attention_mask"] = (torch.arange(length) < 2 + number % 3).long()
            row["input_ids"] = torch.where(row["attention_mask"] == 1, row["input_ids"], padding)
        config = SlimConfig(ffn2_sparsity=0.5, mha_sparsity=0.5, slim_round_to=1, slim_scope=scope)
        slim(model, rows, config, num_calibration_samples=24)
        states.append(state_of(model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def make_padded_rows(padding: int, lengths: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    generator, rows = torch.Generator().manual_seed(1), []
    for number in range(12):
        mask = (torch.arange(7) < lengths[number % len(lengths)]).long()
        ids = torch.randint(8, (7,), generator=generator)
        rows.append({"input_ids": torch.where(mask == 1, ids, padding), "attention_mask": mask})
    return rows


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_padding_that_is_sent_to_experts_makes_no_difference(model_type: str) -> None:
    states = []
    for padding in (0, 7):
        model = build_tiny(model_type, "AutoModelForCausalLM")
        slim(
            model, make_padded_rows(padding, (3, 4, 5, 6)), replace(HALF, slim_round_to=1), num_calibration_samples=12
        )
        states.append(state_of(model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_padding_that_cannot_be_told_among_the_tokens_of_an_expert_is_refused() -> None:
    model = build_tiny("jetmoe", "AutoModelForCausalLM")
    state, config = state_of(model), SlimConfig(ffn2_sparsity=0.5, slim_round_to=1, slim_scope="local")
    message = r"Which tokens model\.layers\.0\.mlp\.output_linear\.weight\[\d\] reads cannot be told.* one length"
    with pytest.raises(ValueError, match=message):
        slim(model, make_padded_rows(0, (5, 7)), config, num_calibration_samples=12)
    assert_same(model, state)
    assert slim(model, make_padded_rows(0, (7,)), config, num_calibration_samples=12).unproven == ()


def test_the_error_of_outputs_leaves_out_padding_of_encoder_and_decoder() -> None:
    model = build("t5")
    batch = make_batch(model)
    batch["attention_mask"] = torch.tensor([[1, 1, 0, 0, 0, 0, 0]] * 2)[:, : batch["input_ids"].shape[1]]
    batch["decoder_attention_mask"] = (torch.arange(batch["labels"].shape[1]) < 3).long().expand(2, -1)
    error = OutputError(model, batch)
    rows, wide = (error._outputs[name] for name in ("encoder_last_hidden_state", "logits"))
    rows[:, 2:] += 1.0
    wide[:, 3:] += 1.0
    assert error.measure() == 0
    wide[:, 2] += 1.0
    assert error.measure() > 0


def test_a_frozen_model_in_half_precision_is_slimmed_and_stays_so() -> None:
    model = build("gpt2").to(torch.bfloat16).requires_grad_(False).train()
    rows = make_rows(model)
    slim(model, rows, HALF, num_calibration_samples=24)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.training and model.config.use_cache


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(method: str) -> None:
    model = build("llama").train()
    rows = make_rows(model)
    model.lm_head.weight.grad = gradient = torch.ones_like(model.lm_head.weight)
    config = copy.deepcopy(model.config)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    try:
        slim(model, rows, HALF, num_calibration_samples=24, method=method)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(torch.rand(1), expected)
    assert model.training and all(module.training for module in model.modules())
    assert model.lm_head.weight.grad is gradient
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or is_replaced(module) for module in model.modules())
    assert model.config.use_cache == config.use_cache and torch.is_grad_enabled()


def test_a_slim_model_trains_and_is_saved(tmp_path) -> None:
    model = build("gpt2")
    rows = make_rows(model)
    slim(model, rows, HALF, num_calibration_samples=24)
    arguments = TrainingArguments(
        tmp_path / "out", max_steps=20, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    save_slimmed(trainer, tmp_path / "slim")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert loaded.transformer.h[0].mlp.c_fc.weight.shape == (32, 32)
    batch = make_batch(model)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_slimming_again_goes_on_from_what_is_there() -> None:
    model = build("llama")
    rows = make_rows(model)
    slim(model, rows, HALF, num_calibration_samples=24)
    report = slim(model, rows, HALF, num_calibration_samples=24)
    assert [size.after for size in report.structures] == [1, 16] * 2


def test_a_fraction_is_of_what_the_model_has_that_is_slim_already(tmp_path, caplog) -> None:
    model = build("llama")
    rows, half = make_rows(model), SlimConfig(slim_target_params=0.8, slim_round_to=8)
    first = slim(model, rows, half, num_calibration_samples=24)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert "is taken of what the model has now" not in caplog.text
    caplog.clear()
    second = slim(loaded, rows, replace(half, slim_target_params=0.9), num_calibration_samples=24)
    before = first.parameters_after
    assert second.budget.dense == second.parameters_before == before < first.parameters_before
    assert second.budget.got <= 0.9 * before
    told = f"slim_target_params=0.9 is taken of what the model has now, {before:,} parameters, so {0.9 * before:,.0f}"
    assert told in caplog.text and f"of {before:,} before" in str(second)


# ------------------------------------------------------------------------------------------------- data


def test_every_kind_of_data_gives_the_same() -> None:
    rows = make_rows(build("gpt2"))
    lists = [{name: value.tolist() for name, value in row.items()} for row in rows]
    named = [{**row, "text": "not for the model"} for row in lists]
    sources = {
        "tensors": rows,
        "lists": lists,
        "named": named,
        "dataset": Dataset.from_list(named),
        "iterable": IterableDataset.from_generator(lambda: iter(named)),
        "indexed": Subset(rows, range(24)),
        "loader": DataLoader(rows, batch_size=8, collate_fn=default_data_collator),
    }
    states = {}
    for name, source in sources.items():
        model = build("gpt2")
        slim(model, source, HALF, num_calibration_samples=24)
        states[name] = state_of(model)
    for name in sources:
        assert states[name].keys() == states["tensors"].keys()
        for key, value in states["tensors"].items():
            torch.testing.assert_close(states[name][key], value, msg=f"{name}: {key}")


def join(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Samples whose image patches are one after the other, which is how models for images and text take them."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("as_loader", [False, True])
def test_batches_whose_tensors_have_not_one_entry_for_each_sample_are_not_cut(as_loader: bool) -> None:
    model = build_tiny("qwen2_vl", "AutoModelForImageTextToText")
    row = make_inputs(model)
    assert len(row["pixel_values"]) > 1
    data = DataLoader([row] * 6, batch_size=4, collate_fn=join) if as_loader else [row] * 6
    config = SlimConfig(ffn2_sparsity=0.5, slim_round_to=1)
    report = slim(model, data, config, num_calibration_samples=5, batch_size=5, data_collator=join)
    assert report.parameters_after < report.parameters_before and report.unproven == ()


def test_a_batch_is_cut_by_samples_or_not_at_all() -> None:
    batch = {"input_ids": torch.ones(4, 3), "scale": torch.tensor(2.0), "name": "x"}
    assert cut_batch(batch, 2)["input_ids"].shape == (2, 3)
    assert cut_batch(batch, 2)["scale"] == 2 and cut_batch(batch, 2)["name"] == "x"
    whole = cut_batch({**batch, "pixel_values": torch.ones(12, 5)}, 2)
    assert whole["input_ids"].shape == (4, 3) and whole["pixel_values"].shape == (12, 5)


def test_only_the_first_samples_are_taken_cut_and_collated() -> None:
    seen: list[tuple[int, ...]] = []
    model = build("gpt2")
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    tokenizer = make_byte_tokenizer()
    rows = [{"input_ids": [5] * (3 + number)} for number in range(20)]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    slim(model, rows, HALF, num_calibration_samples=10, max_seq_length=6, batch_size=4, data_collator=collator)
    assert set(seen) == {(1, 3), (4, 6), (2, 6)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "The data set is empty"),
        ([{"text": "hello"}] * 24, "no column 'input_ids', which GPT2LMHeadModel needs; it has text"),
        ([[1, 2]] * 24, "must be a dict of the model's inputs, got list"),
        ([{"input_ids": [1] * n} for n in range(1, 25)], "pass a data_collator that pads them"),
        ("train", "dataset must be a data set, a list of dicts or a DataLoader, got str"),
        ({"train": []}, r"pass one of them, such as dataset\['train'\]"),
        ([{"input_ids": [1]}] * 23, "has 23 samples, and num_calibration_samples=24 asks for more"),
        ([{"input_ids": [1000]}] * 24, "GPT2LMHeadModel cannot run on a sample of the data set"),
    ],
)
def test_data_that_do_not_fit_are_refused(data, message: str) -> None:
    model = build("gpt2")
    state = state_of(model)
    with pytest.raises(ValueError, match=message):
        slim(model, data, HALF, num_calibration_samples=24)
    assert_same(model, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {"input_ids": row["input_ids"][None]}, "cannot run on .*: too many values"),
        (
            lambda row: {"attention_mask": row["input_ids"]},
            "Sample 3 of a batch has no 'input_ids', which others do",
        ),
    ],
)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_rows_that_no_batch_can_be_made_of_are_named(change, message: str, scope: str) -> None:
    model = build("bert")
    state, rows = state_of(model), make_rows(model)
    rows = [change(row) if number == 3 or "too many" in message else row for number, row in enumerate(rows)]
    with pytest.raises(ValueError, match=message):
        slim(model, rows, replace(HALF, slim_scope=scope), num_calibration_samples=24)
    assert_same(model, state)


@pytest.mark.parametrize(
    ("method", "scope"), [("obs", "local"), ("obs", "global"), ("flap", "local"), ("taylor", "local")]
)
@pytest.mark.parametrize("number", [0, 2])
def test_the_batch_is_named_that_the_model_cannot_run_on(method: str, scope: str, number: int) -> None:
    model = build("gpt2")
    state, rows = state_of(model), make_rows(model)
    rows[8 * number + 1]["input_ids"] = torch.full_like(rows[0]["input_ids"], 1000)
    config = replace(HALF, slim_scope=scope)
    message = (
        rf"GPT2LMHeadModel cannot run on calibration batch {number}, of input_ids \(8, .*: index out of range.* Look"
    )
    with pytest.raises(ValueError, match=message):
        slim(model, rows, config, num_calibration_samples=24, method=method)
    assert_same(model, state)


def test_samples_without_any_token_are_refused() -> None:
    model = build("gpt2")
    with pytest.raises(ValueError, match="do not reach|cannot run on"):
        slim(model, [{"input_ids": []}] * 24, replace(HALF, slim_scope="global"), num_calibration_samples=24)


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite_are_named(method: str) -> None:
    model = build("bert")
    query = model.bert.encoder.layer[0].attention.self.query.weight
    with torch.no_grad():
        query[0, 0] = torch.nan  # which the attention of a CPU takes for a mask, so that no activation is NaN
    state = state_of(model)
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.self\.query\.weight holds NaN or infinite values"):
        slim(model, make_rows(model), HALF, num_calibration_samples=24, method=method)
    assert all(torch.equal(now.nan_to_num(7), state[name].nan_to_num(7)) for name, now in model.state_dict().items())


def test_the_surgery_needs_no_labels_and_taylor_does() -> None:
    rows = [{"input_ids": row["input_ids"]} for row in make_rows(build("gpt2"))]
    model = build("gpt2")
    with pytest.raises(ValueError, match="method='taylor' needs the loss of the model.*add labels"):
        slim(model, rows, HALF, num_calibration_samples=24, method="taylor")
    slim(model, rows, HALF, num_calibration_samples=24)


@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_without_inputs_is_told_as_such(method: str) -> None:
    model = build("t5")
    rows = [{"input_ids": row["input_ids"]} for row in make_rows(model)]
    with pytest.raises(ValueError, match="has no labels and no decoder_input_ids, one of which the decoder of T5"):
        slim(model, rows, HALF, num_calibration_samples=24, method=method)


def test_what_the_model_cannot_run_on_is_told_without_keywords_that_slim_has_not() -> None:
    model = build("gpt2")
    with pytest.raises(ValueError, match="cannot run on the first sample of the data set, with input_ids") as caught:
        slim(model, [{"input_ids": [1000]}] * 24, HALF, num_calibration_samples=24, method="magnitude")
    assert "verify" not in str(caught.value)


@pytest.mark.parametrize("samples", [24, 25])
def test_random_numbers_go_on_as_if_none_had_been_drawn(samples: int) -> None:
    model = build("gpt2")
    loader = DataLoader(make_rows(model), batch_size=8, shuffle=True, collate_fn=default_data_collator)
    states = torch.get_rng_state(), random.getstate()
    with nullcontext() if samples == 24 else pytest.raises(ValueError, match="asks for more"):
        slim(model, loader, HALF, num_calibration_samples=samples)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


# ------------------------------------------------------------------------------------------------- refusals


def test_a_model_that_a_slimmer_in_a_loop_slims_is_refused() -> None:
    model = build("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    slimmer = Slimmer(model, SlimConfig(ffn2_sparsity=0.5, slim_round_to=8), 10).attach(optimizer)
    with pytest.raises(ValueError, match="A Slimmer is attached to SGD, the optimizer of this model"):
        slim(model, make_rows(model), HALF, num_calibration_samples=24)
    slimmer.detach()
    slim(model, make_rows(model), HALF, num_calibration_samples=24)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "wanda"}, "method must be one of obs, magnitude, taylor, flap, got 'wanda'"),
        ({"num_calibration_samples": 0}, "num_calibration_samples must be a whole number from 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number from 1, got 2.5"),
        ({"max_seq_length": -1}, "max_seq_length must be a whole number from 1, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(keywords: dict, message: str) -> None:
    model = build("gpt2")
    with pytest.raises(ValueError, match=message):
        slim(model, make_rows(model), HALF, **{"num_calibration_samples": 24, **keywords})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SlimConfig(), "Nothing is to be removed: give ffn2_sparsity, mha_sparsity or a budget"),
        (SlimConfig(ffn2_sparsity=0.5, slim_teacher="self"), "there is no training that could learn from a teacher"),
        (SlimConfig(ffn2_sparsity=0.9, slim_scope="local"), "ffn2_sparsity=0.9 is unreachable"),
        ({"ffn2_sparsity": 0.5}, "dict has no field"),
    ],
)
def test_settings_that_cannot_be_carried_out_are_refused(config, message: str) -> None:
    model = build("gpt2")
    with pytest.raises(ValueError, match=message):
        slim(model, make_rows(model), config, num_calibration_samples=24)


def test_settings_about_the_schedule_say_nothing() -> None:
    model = build("gpt2")
    config = SlimConfig(ffn2_sparsity=0.5, slim_round_to=8, slim_start=100, slim_end=200, slim_schedule="exp")
    report = slim(model, make_rows(model), config, num_calibration_samples=24)
    assert sum(size.after for size in report.structures if size.kind == "ffn") == 64


@pytest.mark.parametrize("method", ["obs", "flap"])
def test_activations_that_are_not_finite_name_the_layer(method: str) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = torch.nan
    state = state_of(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight reads NaN or infinite"):
        slim(model, make_rows(model), HALF, num_calibration_samples=24, method=method)
    assert all(torch.equal(now.nan_to_num(), state[name].nan_to_num()) for name, now in model.state_dict().items())


def test_a_decoder_that_no_sample_reaches_is_refused_by_name() -> None:
    model = build("t5")
    rows = make_rows(model)
    reached = type(model).forward

    def forward(self, input_ids, labels=None):
        return self.encoder(input_ids)

    try:
        type(model).forward = forward
        with pytest.raises(ValueError, match=r"The calibration data do not reach decoder\."):
            slim(model, rows, HALF, num_calibration_samples=24)
    finally:
        type(model).forward = reached


class _Stop(BaseException):
    """Something that nobody catches."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, _Stop, RuntimeError])
@pytest.mark.parametrize("where", ["drop_units", "solve_weights", "make_readings"])
def test_whatever_is_raised_the_model_is_as_it_was(where: str, error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2").train()
    state, config, original = state_of(model), model.config.to_dict(), getattr(methods, where)
    parameters, calls = dict(model.named_parameters()), []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error("stopped")
        return original(*args, **kwargs)

    monkeypatch.setattr(methods, where, fail)
    with pytest.raises(error, match="stopped"):
        slim(model, make_rows(model), HALF, num_calibration_samples=24)
    assert_same(model, state)
    assert model.config.to_dict() == config and model.training
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert not any(module._forward_pre_hooks or is_replaced(module) for module in model.modules())


def test_an_interrupt_while_a_layer_is_left_leaves_nothing_that_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, leave = build("gpt2"), [], Watch.__exit__
    state = state_of(model)

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return leave(self, *args)

    monkeypatch.setattr(Watch, "__exit__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        slim(model, make_rows(model), HALF, num_calibration_samples=24)
    assert len(calls) == 4 and torch._C._len_torch_function_stack() == 0
    assert_same(model, state)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_within_a_forward_pass_is_raised_and_ends_all_passes(error: type) -> None:
    model = build("gpt2")
    state, calls = state_of(model), []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 6:
            raise error("in the model")

    handle = model.transformer.h[1].ln_1.register_forward_pre_hook(fail)
    raised = ValueError if error is RuntimeError else error
    with pytest.raises(raised, match="in the model") as caught:
        slim(model, make_rows(model), HALF, num_calibration_samples=24)
    handle.remove()
    assert raised is error or "cannot run on calibration batch" in str(caught.value)
    assert_same(model, state)


def test_an_interrupt_while_a_thread_begins_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2")
    state, ran, begin = state_of(model), [], threading.Thread._bootstrap
    monkeypatch.setattr(PausedPass, "_pass", lambda *args: ran.append(1))

    def begin_late(thread: threading.Thread) -> None:
        time.sleep(0.2)
        begin(thread)

    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            raise KeyboardInterrupt

    def start(thread: threading.Thread) -> None:
        thread._started, whole = Interrupted(), thread._started
        try:
            original(thread)
        finally:
            thread._started = whole

    original = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "_bootstrap", begin_late)
    monkeypatch.setattr(PausedPass, "start", start, raising=False)
    with pytest.raises(KeyboardInterrupt):
        slim(model, make_rows(model), HALF, num_calibration_samples=24)
    assert not [thread for thread in threading.enumerate() if thread.name == "hf_slim-pass"]
    assert not ran
    assert_same(model, state)


@pytest.mark.parametrize("at", ["_restore", "_put_back", "cleanup"])
def test_an_interrupt_while_all_is_put_back_does_not_stop_it(at: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, calls = build("gpt2"), []
    state = state_of(model)
    owner = tempfile.TemporaryDirectory if at == "cleanup" else KeptWeights
    original = getattr(owner, at)

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, at, interrupted)
    monkeypatch.setattr("hf_slim.one_shot.slimming.remove_units", fail_at_once)
    with pytest.raises(KeyboardInterrupt):
        slim(model, make_rows(model), HALF, num_calibration_samples=24, method="magnitude")
    assert_same(model, state)
    assert not list(tmp_path.iterdir())


def fail_at_once(*args, **kwargs) -> None:
    raise RuntimeError("stopped")


def test_a_slim_model_that_computes_something_else_is_refused_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2")
    state = state_of(model)
    monkeypatch.setattr("hf_slim.one_shot.slimming.zero_units", lambda *args: None)
    monkeypatch.setattr("hf_slim.one_shot.unit_removal.zero_units", lambda *args: None)
    with pytest.raises(VerificationError, match="The model is as it was"):
        slim(model, make_rows(model), HALF, num_calibration_samples=24, method="magnitude")
    assert_same(model, state)


def test_what_cannot_be_slimmed_is_refused() -> None:
    with pytest.raises(ValueError, match="slim takes a model"):
        slim("gpt2", [], HALF)
    with pytest.raises(ValueError, match="has no structure|has no feed-forward network"):
        slim(torch.nn.Linear(3, 3), [], HALF)


def test_the_progress_bar_follows_the_switch_of_transformers(capsys: pytest.CaptureFixture) -> None:
    was_enabled = logging.is_progress_bar_enabled()
    try:
        for enabled in (True, False):
            (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
            model = build("gpt2")
            slim(model, make_rows(model), HALF, num_calibration_samples=24)
            assert ("Slimming layers" in capsys.readouterr().err) == enabled
    finally:
        (logging.enable_progress_bar if was_enabled else logging.disable_progress_bar)()


def test_what_passes_hold_is_small_and_they_make_few_runs() -> None:
    """Two runs of each block a batch: up to a structure's layer for each, and one to go on."""
    model = build("llama")
    calls: dict[str, int] = {"block": 0, "embed": 0}
    handles = [
        model.model.layers[0].input_layernorm.register_forward_pre_hook(
            lambda *_: calls.update(block=calls["block"] + 1)
        ),
        model.model.embed_tokens.register_forward_pre_hook(lambda *_: calls.update(embed=calls["embed"] + 1)),
    ]
    slim(model, make_rows(model), HALF, num_calibration_samples=24, batch_size=8)
    for handle in handles:
        handle.remove()
    proof = 2  # with zeros, and without the units
    assert calls["embed"] == 3 + 1 + proof + 1  # the passes, the sample that shows the way, the proof
    assert calls["block"] == 3 * 3 + 1 + proof + 1
