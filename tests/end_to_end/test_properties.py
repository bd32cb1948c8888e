"""Properties of slimming, checked on drawn models, masks, optimizers, scores and schedules.

Each runs on a few examples, always the same, and on many more with `pytest -m slow`.
"""

import copy
import json
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import transformers
from conftest import FAMILIES, GROUPED, STACK, TEXT, logits, make_batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop
from transformers.optimization import Adafactor

from hf_slim import find_structures, model_slim
from hf_slim.arguments import SlimConfig, place_steps
from hf_slim.compaction.cut_tensors import compact_model
from hf_slim.compaction.zeros import find_zero_units, find_zeros, zero_units
from hf_slim.parallel.shards import find_shards
from hf_slim.saving.report import count_parameters
from hf_slim.structures.structure import Structure, get_tensor
from hf_slim.training.schedule import Schedule
from hf_slim.training.unit_selection import check_reachable, floor_of, select_units

MORE = [1, pytest.param(20, marks=pytest.mark.slow)]
EXTRA = {
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TEXT, **STACK}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**TEXT, **GROUPED}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**TEXT, **GROUPED}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, **GROUPED}),
}
ALL = {**FAMILIES, **EXTRA}
SWITCHES = {
    "opt": ["enable_bias"],
    "llama": ["attention_bias", "mlp_bias"],
    "olmo2": ["attention_bias"],
    "qwen3": ["attention_bias"],
    "gpt_neox": ["attention_bias", "use_parallel_residual"],
    "vit": ["qkv_bias"],
}


def check(number, **strategies):
    """Run a function on a number of examples that are the same every time."""
    examples = settings(
        deadline=None, max_examples=number, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    return lambda function: examples(given(**strategies)(function))()


@st.composite
def models(draw):
    """A tiny model of any family in float64, its sizes drawn."""
    family = draw(st.sampled_from(sorted(ALL)))
    layers, channels, heads = (draw(st.integers(1, high)) for high in (2, 20, 4))
    width = draw(st.sampled_from([4, 6, 8]))
    hidden, free = heads * width, draw(st.sampled_from([8, 12, 20]))
    name, config_name, fields = ALL[family]
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": channels,
    }
    if family in ("llama", "mistral", "qwen3", "olmo2", "phi3"):
        queries = heads * draw(st.integers(1, 3))
        sizes |= {"num_attention_heads": queries, "num_key_value_heads": heads, "head_dim": width}
        sizes |= {"hidden_size": queries * draw(st.sampled_from([2, 4, 6]))}
    elif family == "qwen2":
        groups = draw(st.sampled_from([number for number in range(1, heads + 1) if heads % number == 0]))
        sizes |= {"num_key_value_heads": groups}
    elif family == "distilbert":
        sizes = {"dim": hidden, "n_layers": layers, "n_heads": heads, "hidden_dim": channels}
    elif family == "gpt2":
        inner = draw(st.sampled_from([None, channels]))
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_inner": inner}
    elif family == "opt":
        sizes |= {"ffn_dim": channels, "word_embed_proj_dim": hidden}
        del sizes["intermediate_size"]
    elif family == "bart":
        sizes = {"d_model": hidden, "encoder_layers": layers, "encoder_ffn_dim": channels}
        sizes |= {"decoder_layers": draw(st.integers(1, 2)), "decoder_ffn_dim": draw(st.integers(1, 20))}
        sizes |= {"encoder_attention_heads": heads, "decoder_attention_heads": draw(st.sampled_from([1, heads]))}
    elif family.startswith("t5"):
        sizes = {"d_model": free, "num_layers": layers, "num_heads": heads, "d_kv": width, "d_ff": channels}
        sizes |= {"num_decoder_layers": draw(st.integers(1, 2))}
    sizes |= {switch: draw(st.booleans()) for switch in SWITCHES.get(family, [])}
    torch.manual_seed(draw(st.integers(0, 99)))
    model = getattr(transformers, name)(getattr(transformers, config_name)(**{**fields, **sizes})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


@st.composite
def optimizers(draw):
    """A name for it, and what makes an optimizer for parameters."""
    rate, decay = draw(st.sampled_from([1e-3, 1e-2])), draw(st.sampled_from([0.0, 0.1]))
    momentum, switch = draw(st.sampled_from([0.0, 0.9])), draw(st.booleans())
    kind = draw(st.sampled_from([SGD, Adam, AdamW, RMSprop, Adagrad, Adafactor, NAdam, "Muon"]))
    common = {"lr": rate, "weight_decay": decay}
    extra = {
        SGD: {"momentum": momentum, "nesterov": switch and momentum > 0},
        Adam: {"amsgrad": switch},
        AdamW: {"amsgrad": switch},
        RMSprop: {"momentum": momentum, "centered": switch},
        Adafactor: {"relative_step": False, "scale_parameter": switch, "beta1": momentum or None},
        NAdam: {"decoupled_weight_decay": switch},
    }
    if kind == "Muon" and not hasattr(torch.optim, "Muon"):
        kind = AdamW
    if kind == "Muon":
        return partial(Both, momentum=momentum, nesterov=switch, **common)
    return partial(kind, **common, **extra.get(kind, {}))


class Both:
    """Muon for the matrices and AdamW for what else there is."""

    def __init__(self, parameters, **muon):
        parameters = list(parameters)
        self.parts = [
            torch.optim.Muon([p for p in parameters if p.dim() == 2], **muon),
            AdamW([p for p in parameters if p.dim() != 2]),
        ]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()


def draw_masks(data, structures):
    def draw(units):
        return data.draw(st.lists(st.booleans(), min_size=units, max_size=units).filter(any))

    return {s.name: torch.tensor(draw(s.units)) for s in structures}


def dropped_positions(structures, masks):
    """For each tensor and dimension the positions of the dropped units, without the library's own arithmetic."""
    found = {}
    for structure in structures:
        for member in structure.members:
            gone = found.setdefault((member.tensor, member.dim), set())
            for unit, kept in enumerate(masks[structure.name].tolist()):
                if not kept:
                    gone.update(member.index[unit].tolist())
    return {place: sorted(positions) for place, positions in found.items()}


def assert_zero(model, dropped):
    tensors = model.state_dict()
    for (name, dim), where in dropped.items():
        assert not tensors[name].index_select(dim, torch.tensor(where, dtype=torch.long)).any(), name


def assert_kept(slim, model, structures, masks, dropped):
    """Every tensor is that of the masked model without the positions of the dropped units, bit for bit."""
    expected = model.state_dict()
    for (name, dim), where in dropped.items():
        gone = set(where)
        keep = [position for position in range(model.state_dict()[name].shape[dim]) if position not in gone]
        expected[name] = expected[name].index_select(dim, torch.tensor(keep))
    for structure in structures:
        for member in structure.members:
            if member.role == "norm":  # the mean of its squares is over fewer numbers
                kept = int(masks[structure.name].sum())
                expected[member.tensor] = expected[member.tensor] * (structure.units / kept) ** 0.5
    actual = slim.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def assert_close(actual, expected, tolerance):
    assert expected.isfinite().all()
    assert (actual - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


def tolerance_of(structures):
    """An RMS norm over all units is computed in float32, so that the number of zeros in it can be told."""
    return 1e-4 if any(m.role == "norm" for s in structures for m in s.members) else 1e-9


@pytest.mark.parametrize("more", MORE)
def test_training_masked_and_compacting(more):
    @check(50 * more, model=models(), make_optimizer=optimizers(), steps=st.integers(0, 3), data=st.data())
    def run(model, make_optimizer, steps, data):
        found = find_structures(model)
        structures = found.structures
        assert found.skipped == () and {s.kind for s in structures} == {"ffn", "mha"}
        masks = draw_masks(data, structures)
        dropped, shards = dropped_positions(structures, masks), find_shards(model)
        zeros = find_zeros(model, structures, masks, shards)
        zero_units(model, structures, masks)
        assert_zero(model, dropped)
        optimizer, batch = make_optimizer(model.parameters()), make_batch(model)
        batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        model.train()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for _ in range(steps):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, dim, where in zeros:
                shards.write_zeros(get_tensor(model, name), dim, where)
            assert_zero(model, dropped)
        assert steps == 0 or any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        model.eval()

        slim = copy.deepcopy(model)
        compact_model(slim, structures, masks)
        assert_kept(slim, model, structures, masks, dropped)
        again = model_slim(copy.deepcopy(model), 1)
        assert_kept(again, model, structures, masks, dropped)
        expected, tolerance = logits(model, batch), tolerance_of(structures)
        assert_close(logits(slim, batch), expected, tolerance)
        assert torch.equal(logits(again, batch), logits(slim, batch))

        removed = 0
        for (name, dim), where in dropped.items():
            tensor = model.state_dict()[name]
            removed += len(where) * tensor.numel() // tensor.shape[dim]
        assert count_parameters(model) - count_parameters(slim) == removed
        assert count_parameters(again) == count_parameters(slim)
        assert {s.name: s.units for s in find_structures(slim).structures} == {
            name: int(mask.sum()) for name, mask in masks.items()
        }


@pytest.mark.parametrize("more", MORE)
def test_the_shape_record_builds_the_model_again(more):
    @check(40 * more, model=models(), data=st.data())
    def run(model, data):
        structures = find_structures(model).structures
        zero_units(model, structures, draw_masks(data, structures))
        slim = model_slim(model, 1)
        config = type(slim.config).from_dict(json.loads(slim.config.to_json_string(use_diff=False)))
        built = type(slim)(config).double().eval()
        assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in slim.named_parameters()}
        built.load_state_dict(slim.state_dict(), strict=True)
        batch = make_batch(slim)
        batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        assert torch.equal(logits(built, batch), logits(slim, batch))
        config = slim.config.to_dict()
        assert model_slim(slim, 1).config.to_dict() == config


@pytest.mark.parametrize("more", MORE)
def test_the_zeros_in_the_second_layer_are_enough(more):
    @check(15 * more, model=models(), data=st.data())
    def run(model, data):
        structures = find_structures(model).structures
        masks = draw_masks(data, structures)
        with torch.no_grad():
            for structure in structures:
                for member in structure.deciders:
                    where = member.index[~masks[structure.name]].flatten()
                    model.get_parameter(member.tensor).index_fill_(member.dim, where, 0)
        found = find_zero_units(model, structures)
        assert all(torch.equal(found[name], mask) for name, mask in masks.items())
        batch = make_batch(model)
        batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        expected = logits(model, batch)
        assert_close(logits(model_slim(model, 1), batch), expected, tolerance_of(structures))


@dataclass
class Choice:
    """What `select_units` is given."""

    structures: list
    scores: dict
    masks: dict
    settings: dict

    def select(self, sparsity):
        return select_units(self.structures, self.scores, self.masks, sparsity, **self.settings)


@st.composite
def choices(draw):
    """Structures of one kind with distinct scores, nothing dropped."""
    kind = draw(st.sampled_from(["ffn", "mha"]))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    structures = [Structure(f"{kind}{number}", kind, size, ()) for number, size in enumerate(sizes)]
    order = torch.tensor(draw(st.permutations(range(sum(sizes)))), dtype=torch.float32)
    return Choice(
        structures,
        {s.name: scores for s, scores in zip(structures, order.split(sizes), strict=True)},
        {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures},
        {
            "scope": draw(st.sampled_from(["local", "global"])),
            "round_to": draw(st.sampled_from([1, 2, 3, 8, 32])),
            "min_heads": draw(st.integers(1, 3)),
        },
    )


def is_reachable(choice, sparsity):
    try:
        check_reachable(choice.structures, sparsity, **choice.settings)
    except ValueError as error:
        assert f"sparsity={sparsity} is unreachable" in str(error)
        return False
    return True


def assert_selected(choice, sparsity, masks):
    """The masks keep what `select_units` promises, given those before."""
    multiple = choice.settings["round_to"] if choice.structures[0].kind == "ffn" else 1
    groups = [[s] for s in choice.structures] if choice.settings["scope"] == "local" else [choice.structures]
    for structure in choice.structures:
        mask, before = masks[structure.name], choice.masks[structure.name]
        assert mask.dtype == torch.bool and mask.shape == (structure.units,)
        assert not (mask & ~before).any(), "a dropped unit came back"
        kept, alive = int(mask.sum()), int(before.sum())
        floor = floor_of(structure, round_to=choice.settings["round_to"], min_heads=choice.settings["min_heads"])
        assert kept >= min(floor, alive)
        assert kept % multiple == 0 or kept in (structure.units, alive)
        scores = choice.scores[structure.name]
        if kept < alive:
            assert scores[mask].min() > scores[before & ~mask].max(), "a better unit was dropped than one that is kept"
    for group in groups:
        units, before = sum(s.units for s in group), sum(int(choice.masks[s.name].sum()) for s in group)
        wanted = math.floor(sparsity * units + 1e-9)
        gone = units - sum(int(masks[s.name].sum()) for s in group)
        assert gone <= max(wanted, units - before), "more was dropped than asked for"
        assert gone > wanted - multiple, "less was dropped than rounding explains"


@pytest.mark.parametrize("more", MORE)
def test_selection(more):
    @check(150 * more, choice=choices(), sparsities=st.lists(st.floats(0, 0.99), min_size=1, max_size=4))
    def run(choice, sparsities):
        for sparsity in sorted(sparsities):
            if not is_reachable(choice, sparsity):
                return
            masks = choice.select(sparsity)
            assert_selected(choice, sparsity, masks)
            again = choice.select(sparsity)
            assert all(torch.equal(again[name], mask) for name, mask in masks.items())
            choice.masks = masks


@pytest.mark.parametrize("more", MORE)
def test_selection_after_other_units_were_dropped(more):
    @check(150 * more, choice=choices(), sparsity=st.floats(0, 0.99), data=st.data())
    def run(choice, sparsity, data):
        choice.masks = draw_masks(data, choice.structures)
        if is_reachable(choice, sparsity):
            assert_selected(choice, sparsity, choice.select(sparsity))


@pytest.mark.parametrize("more", MORE)
def test_selection_of_permuted_units(more):
    @check(100 * more, choice=choices(), sparsity=st.floats(0, 0.99), seed=st.integers(0, 999))
    def run(choice, sparsity, seed):
        if not is_reachable(choice, sparsity):
            return
        masks = choice.select(sparsity)
        generator = torch.Generator().manual_seed(seed)
        orders = {s.name: torch.randperm(s.units, generator=generator) for s in choice.structures}
        choice.scores = {name: scores[orders[name]] for name, scores in choice.scores.items()}
        permuted = choice.select(sparsity)
        assert all(torch.equal(permuted[name], mask[orders[name]]) for name, mask in masks.items())


PLACES = st.one_of(st.integers(1, 300).map(float), st.floats(0, 1, exclude_max=True))


@pytest.mark.parametrize("more", MORE)
def test_schedules(more):
    @check(
        300 * more,
        start=PLACES,
        end=PLACES,
        frequency=PLACES.filter(bool),
        curve=st.sampled_from(["exp", "cubic", "cos", "linear", "oneshot"]),
        target=st.floats(0.001, 0.99),
        max_steps=st.integers(1, 300),
    )
    def run(start, end, frequency, curve, target, max_steps):
        def step(value):
            return int(value) if value >= 1 else max(1, round(value * max_steps))

        first, last, every = step(start), step(end), step(frequency)
        settings = SlimConfig(slim_schedule=curve)
        settings.slim_start, settings.slim_end, settings.slim_frequency = start, end, frequency
        make = partial(place_steps, settings, max_steps)
        if not first <= last <= max_steps:
            with pytest.raises(ValueError, match="make slim_start smaller|beyond the last training step"):
                make()
            return
        steps = make()
        schedule = Schedule(steps, target, curve)
        assert (steps[0], steps[-1]) == (first, first if curve == "oneshot" else last)
        gaps = [after - before for before, after in zip(steps, steps[1:], strict=False)]
        assert all(gap == every for gap in gaps[:-1]) and all(0 < gap <= every for gap in gaps)
        reached = [schedule.sparsity_at(step) for step in range(max_steps + 1)]
        assert reached == sorted(reached)
        assert reached[:first] == [0.0] * first
        assert reached[steps[-1] :] == [target] * (max_steps + 1 - steps[-1])
        assert 0 < reached[first] <= target
        changes = {step for step in range(1, max_steps + 1) if reached[step] != reached[step - 1]}
        assert changes <= set(steps)
        assert [schedule.events_until(step) for step in (0, first, last, max_steps)] == [
            *(0, 1, len(steps), len(steps))
        ]
