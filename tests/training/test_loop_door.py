"""A `Slimmer` in a loop goes on from a checkpoint bit for bit, and what it has dropped is known afterwards."""

import copy
import json
from functools import partial

import pytest
import torch
from trainers import HALF, dropout_free, make_loop, take_steps

from hf_slim import SlimConfig, Slimmer, model_slim, save_slimmed
from hf_slim.compaction.optimizer_state import refuse_other_units
from hf_slim.compaction.zeros import find_zero_units

ALL = range(1, 13)


def save(folder, model, optimizer, slimmer):
    path = folder / "checkpoint.pt"
    parts = {"model": model, "optimizer": optimizer, "slimmer": slimmer}
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)
    return path


def load(path, order, model, optimizer, slimmer):
    parts = {"model": model, "optimizer": optimizer, "slimmer": slimmer}
    stored = torch.load(path, weights_only=True)
    for name in order:
        parts[name].load_state_dict(stored[name])


def assert_same(model, other):
    one, two = model.state_dict(), other.state_dict()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


ORDERS = [
    ("slimmer", "model", "optimizer"),
    ("model", "optimizer", "slimmer"),
    ("optimizer", "slimmer", "model"),
    ("model", "slimmer", "optimizer"),
    ("slimmer", "optimizer", "model"),
    ("optimizer", "model", "slimmer"),
]


@pytest.mark.parametrize("live", [False, True, pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize(
    "at", [1, pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(10, marks=pytest.mark.slow)]
)
def test_resumed_it_is_the_same_training(live, order, at, tmp_path):
    whole = model, _, slimmer = make_loop(slim_live=live)
    take_steps(*whole[:2], range(1, at + 1))
    path = save(tmp_path, *whole)
    take_steps(*whole[:2], range(at + 1, 13))
    again = make_loop(slim_live=live, seed=5)
    for begin in (at, 12):  # in a new process, and once more in the same, from where that has got to
        assert again[2].step == (0 if begin == at else 12)
        load(path, order, *again)
        assert again[2].step == at
        take_steps(*again[:2], range(at + 1, 13))
        assert_same(model, again[0])
        assert slimmer.state_dict() == again[2].state_dict()
        assert again[2].is_live == bool(live) and again[2].unproven == set()


def test_the_state_is_plain_data(tmp_path):
    model, optimizer, slimmer = make_loop()
    take_steps(model, optimizer, range(1, 6))
    state = slimmer.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert state["step"] == 5 and state["live"]


def test_a_state_is_loaded_before_attaching_too():
    whole = model, optimizer, slimmer = make_loop()
    take_steps(model, optimizer, range(1, 6))
    weights, moments, state = model.state_dict(), optimizer.state_dict(), slimmer.state_dict()
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    other = dropout_free(seed=5).train()
    resumed = Slimmer(other, SlimConfig(**HALF), 12)
    resumed.load_state_dict(state)
    other.load_state_dict(weights)
    second = torch.optim.AdamW(other.parameters(), lr=1e-3)
    second.load_state_dict(copy.deepcopy(moments))  # which would share the tensors
    resumed.attach(second)
    take_steps(model, optimizer, range(6, 13))
    take_steps(other, second, range(6, 13))
    assert_same(model, other)
    assert whole[2].state_dict() == resumed.state_dict()


def test_a_branch_with_as_many_units_left_keeps_its_weights(tmp_path):
    """Two trainings that have dropped as many units as each other, but others."""
    one, two = (make_loop(seed=seed, slim_scope="local") for seed in (0, 1))
    for loop in (one, two):
        take_steps(*loop[:2], range(1, 6))
    assert any(not mask.equal(two[2].masks[name]) for name, mask in one[2].masks.items())
    path = save(tmp_path, *two)
    for order in ORDERS:
        take_steps(*one[:2], [6])
        load(path, order, *one)
        assert_same(one[0], two[0])
        assert all(mask.equal(two[2].masks[name]) for name, mask in one[2].masks.items())


def test_weights_without_their_state_are_an_error(tmp_path):
    whole = make_loop()
    take_steps(*whole[:2], range(1, 6))
    weights = {name: tensor.clone() for name, tensor in whole[0].state_dict().items()}
    model, optimizer, slimmer = make_loop()
    model.load_state_dict(weights)
    for use in (lambda: take_steps(model, optimizer, [6]), slimmer.state_dict):
        with pytest.raises(RuntimeError, match="from which other units have left: load the Slimmer's state of the"):
            use()


@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("live", [True, "auto"])
def test_weights_of_an_earlier_step_without_their_state_are_an_error(live, at):
    """In the middle of a training, for which the optimizer has stepped already."""
    model, optimizer, slimmer = make_loop(slim_live=live)
    take_steps(model, optimizer, range(1, at + 1))
    early = copy.deepcopy(model.state_dict())
    state = slimmer.state_dict()
    moments = copy.deepcopy(optimizer.state_dict())
    take_steps(model, optimizer, range(at + 1, 10))
    model.load_state_dict(early)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="from which other units have left: load the Slimmer's state of the"):
            take_steps(model, optimizer, [10])
    assert slimmer.step == 9
    slimmer.load_state_dict(state)
    optimizer.load_state_dict(moments)
    optimizer.zero_grad()
    take_steps(model, optimizer, range(at + 1, 13))
    whole = make_loop(slim_live=live)
    take_steps(*whole[:2], ALL)
    assert_same(model, whole[0])


WITHOUT_WEIGHTS = "The Slimmer's state was loaded without the weights of its checkpoint: those of the model are other"


@pytest.mark.parametrize("live", [False, True, "auto"])
@pytest.mark.parametrize("parts", [("slimmer",), ("slimmer", "optimizer"), ("optimizer", "slimmer")], ids=" ".join)
def test_a_state_without_its_weights_is_an_error(live, parts, tmp_path):
    whole = make_loop(slim_live=live)
    take_steps(*whole[:2], range(1, 6))
    path = save(tmp_path, *whole)
    again = make_loop(slim_live=live, seed=5)
    load(path, parts, *again)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=WITHOUT_WEIGHTS):
            take_steps(*again[:2], [6])
    assert again[2].step == 5
    load(path, ("model", "optimizer"), *again)
    again[1].zero_grad()
    for loop in (whole, again):
        take_steps(*loop[:2], range(6, 13))
    assert_same(whole[0], again[0])


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("is_attached", [False, True])
def test_weights_that_a_run_begins_with_are_not_those_of_the_state(live, is_attached, tmp_path):
    """Loaded before it, and of the full size; attaching writes zeros, which are no weights."""
    whole = make_loop(slim_live=live)
    take_steps(*whole[:2], range(1, 6))
    state = whole[2].state_dict()
    model, optimizer, slimmer = make_loop(slim_live=live)
    if not is_attached:
        slimmer.detach()
    model.load_state_dict(dropout_free(seed=7).state_dict())
    slimmer.load_state_dict(state)
    if not is_attached:
        slimmer.attach(optimizer)
    with pytest.raises(RuntimeError, match=WITHOUT_WEIGHTS):
        take_steps(model, optimizer, [6])


def test_a_state_of_an_earlier_step_without_its_weights_is_an_error():
    model, optimizer, slimmer = make_loop()
    early = slimmer.state_dict()
    take_steps(model, optimizer, range(1, 6))
    slimmer.load_state_dict(early)
    with pytest.raises(RuntimeError, match=WITHOUT_WEIGHTS):
        take_steps(model, optimizer, [6])


def test_a_branch_with_as_many_units_left_without_its_weights_is_an_error():
    one, two = (make_loop(seed=seed, slim_scope="local", slim_live=True) for seed in (0, 1))
    for loop in (one, two):
        take_steps(*loop[:2], range(1, 6))
    one[2].load_state_dict(one[2].state_dict())  # its own
    take_steps(*one[:2], [6])
    one[2].load_state_dict(two[2].state_dict())
    with pytest.raises(RuntimeError, match=WITHOUT_WEIGHTS):
        take_steps(*one[:2], [6])


@pytest.mark.parametrize("live", [True, "auto"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("taken", "at"), [(0, 5), (9, 5), (9, 1)])
def test_a_state_of_the_optimizer_without_its_weights_is_an_error(taken, at, fused, live):
    """In a model of the full size that of a slim one, in a slim one that of a less slim one and of the full size."""
    make = partial(torch.optim.AdamW, lr=1e-3, fused=fused)
    other, other_optimizer, _ = make_loop(slim_live=live, make=make)
    take_steps(other, other_optimizer, range(1, at + 1))
    model, optimizer, slimmer = make_loop(slim_live=live, make=make)
    take_steps(model, optimizer, range(1, taken + 1))
    own, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(other_optimizer.state_dict()))
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="The state of AdamW is that of a model with .* units in .* load all three"
        ):
            take_steps(model, optimizer, [taken + 1])
    assert slimmer.step == taken
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    optimizer.load_state_dict(own)
    optimizer.zero_grad()
    take_steps(model, optimizer, range(taken + 1, 13))
    whole = make_loop(slim_live=live, make=make)
    take_steps(*whole[:2], ALL)
    assert_same(model, whole[0])


def test_a_state_that_is_smaller_by_its_kind_is_none_of_other_sizes():
    """An optimizer that keeps low-rank moments of matrices, as GaLore does."""
    model, _, slimmer = make_loop(slim_live=False)
    optimizer = slimmer.attached_to
    take_steps(model, optimizer, [1])
    structures = [slimmer.shape.find_current(name) for name in slimmer.masks]
    for parameter, state in optimizer.state.items():
        if parameter.dim() == 2:
            short = 0 if parameter.shape[0] <= parameter.shape[1] else 1
            state["exp_avg"] = state["exp_avg"].narrow(short, 0, min(4, parameter.shape[short]))
    refuse_other_units(optimizer, model, structures)


def test_zeros_are_written_into_a_state_that_is_loaded():
    model, optimizer, slimmer = make_loop(slim_live=False)
    take_steps(model, optimizer, [1])
    early = copy.deepcopy(optimizer.state_dict())
    take_steps(model, optimizer, range(2, 13))
    optimizer.load_state_dict(early)
    slimmer.max_steps = 13
    take_steps(model, optimizer, [1])
    assert slimmer.restore_zeros(model, optimizer) == []


def test_zeros_that_loaded_weights_do_not_have_are_told_of(caplog):
    model, optimizer, slimmer = make_loop(slim_live=False)
    take_steps(model, optimizer, range(1, 6))
    slimmer.load_state_dict(slimmer.state_dict())
    model.load_state_dict(dropout_free(seed=7).state_dict())
    take_steps(model, optimizer, [6])
    assert "have come back, and are written with zeros again" in caplog.text


def test_a_state_and_weights_of_two_checkpoints_are_an_error():
    model, optimizer, slimmer = make_loop()
    take_steps(model, optimizer, range(1, 4))
    early = slimmer.state_dict()
    take_steps(model, optimizer, range(4, 8))
    other, _, other_slimmer = make_loop()
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="and the Slimmer's state are not of the same checkpoint"):
        other_slimmer.load_state_dict(early)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("step"), "it has no step"),
        (lambda state: state.update(step=-4), "damaged: step -4 is not among the max_steps=12 of this training"),
        (lambda state: state.update(step=13), "damaged: step 13 is not among the max_steps=12 of this training"),
        (lambda state: state.pop("scores"), "it has no scores"),
        (lambda state: state.update(steps=[[2], [99]]), "do not fit 2 schedules in a training of 12 steps"),
        (lambda state: state["settings"].update(mha_sparsity=0.25), "mha_sparsity=0.25 there, 0.5 here"),
        (lambda state: state["dropped"].update(other=[0]), "'other' is in only one of the state and the model"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    model, optimizer, slimmer = make_loop()
    take_steps(model, optimizer, range(1, 6))
    state = slimmer.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        make_loop()[2].load_state_dict(state)


def test_a_live_state_where_shapes_cannot_change(group):
    state = {**make_loop()[2].state_dict(), "live": True}
    with pytest.raises(ValueError, match="of a training with live compaction, but the training runs on several"):
        make_loop()[2].load_state_dict(state)


def test_more_steps_than_planned_are_an_error():
    model, optimizer, slimmer = make_loop()
    take_steps(model, optimizer, ALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="max_steps=12 optimizer steps are done, and the loop goes on"):
        take_steps(model, optimizer, [13])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    slimmer.detach()
    take_steps(model, optimizer, [13])


@pytest.mark.parametrize("live", [False, True])
def test_it_is_saved_as_after_a_trainer(live, tmp_path):
    model, optimizer, slimmer = make_loop(slim_live=live)
    take_steps(model, optimizer, ALL)
    report = save_slimmed(model, tmp_path / "slim")
    assert report.parameters_before == dropout_free().num_parameters() > report.parameters_after
    left = {structure.name: structure.after for structure in report.structures}
    assert left == {name: int(mask.sum()) for name, mask in slimmer.masks.items()}
    assert report.unproven == ()
    loaded = type(model).from_pretrained(tmp_path / "slim")
    assert loaded.num_parameters() == report.parameters_after
    slim = model_slim(model, round_multiplier=8)
    assert_same(loaded, slim)


def test_what_came_back_is_dropped_where_it_is_saved(tmp_path, caplog):
    model, optimizer, slimmer = make_loop(slim_live=False)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    take_steps(model, optimizer, ALL)
    slimmer.detach()
    with torch.no_grad():  # an average that is written back
        for name, parameter in model.named_parameters():
            parameter.lerp_(dense[name], 0.5)
    report = save_slimmed(model, tmp_path / "slim")
    left = {structure.name: structure.after for structure in report.structures}
    assert left == {name: int(mask.sum()) for name, mask in slimmer.masks.items()}
    assert "have come back, and are written with zeros again" in caplog.text


def test_a_loop_that_ends_early_is_told_of_when_saved(tmp_path, caplog):
    model, optimizer, _slimmer = make_loop()
    take_steps(model, optimizer, range(1, 4))
    save_slimmed(model, tmp_path / "slim")
    assert "training ended before the last pruning step, 8. The sparsities reached are" in caplog.text


def test_zeros_are_looked_at_for_a_checkpoint(caplog):
    model, optimizer, slimmer = make_loop(slim_live=False)
    take_steps(model, optimizer, range(1, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    slimmer.state_dict()
    used = find_zero_units(model, slimmer.plan.structures, whole=True)
    assert all(mask.equal(used[name]) for name, mask in slimmer.masks.items())
    assert "have come back, and are written with zeros again" in caplog.text


def test_two_models_are_slimmed_side_by_side():
    one, two = make_loop(slim_live=True), make_loop(slim_live=True, seed=1)
    for step in ALL:
        take_steps(*one[:2], [step])
        take_steps(*two[:2], [step])
    alone = make_loop(slim_live=True, seed=1)
    take_steps(*alone[:2], ALL)
    assert_same(two[0], alone[0])
