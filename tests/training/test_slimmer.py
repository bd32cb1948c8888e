"""What slimming does in a training step, without a Trainer: no waiting for the device, no large temporaries."""

import copy

import pytest
import torch
from conftest import build, make_batch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_slim import SlimConfig
from hf_slim.training.slimmer import Slimmer
from hf_slim.training.zeroed_units import ZeroedUnits

LATE = {"slim_start": 100, "slim_end": 200}
NOW = {"slim_start": 1, "slim_end": 1, "slim_schedule": "oneshot"}


def make_slimming(model, live=False, **settings):
    settings = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5, "slim_round_to": 8, "slim_scope": "local", **settings}
    return Slimmer(model, SlimConfig(slim_live=live, **settings), 300)


def take_step(model, optimizer, slimming, step):
    model(**make_batch(model, seed=step)).loss.backward()
    if not slimming.has_reached_target:
        slimming.score(model, step, may_be_skipped=False)
    optimizer.step()
    slimming.advance(model, optimizer, step, skipped=slimming.has_reached_target)
    optimizer.zero_grad()


def move_to_fake_gpu(model):
    """Give a model parameters and gradients that are on a GPU as far as PyTorch's bookkeeping goes."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
                module._parameters[name].grad = torch.empty(parameter.shape, device="cuda")


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "snip_momentum", "magnitude"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_ordinary_steps_never_wait_for_the_device(family, criterion):
    """Fake tensors have no values: whatever would need one on the CPU (`item`, `bool`, `nonzero`) fails."""
    model = build(family)
    slimming = make_slimming(model, slim_criterion=criterion, **LATE)
    model(**make_batch(model)).loss.backward()
    slimming.score(model, 1, may_be_skipped=False)  # which keeps what depends on the model alone
    slimming.scores._pending = {}
    fake = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_fake_gpu(fake)
        optimizer = torch.optim.SGD(fake.parameters())
        for step in range(2, 5):
            slimming.score(fake, step, may_be_skipped=False)
            slimming.advance(fake, optimizer, step, skipped=False)
        slimming.score(fake, 5, may_be_skipped=True)
        slimming.advance(fake, optimizer, 5, skipped=torch.zeros((), dtype=torch.bool))
        assert all(scores.device.type == "cuda" for scores in slimming.scores.smoothed.values())
        assert len(slimming.scores.smoothed) == (0 if criterion == "magnitude" else 4)
        if criterion != "magnitude":
            with pytest.raises(Exception, match="local_scalar_dense|cuda"):
                slimming.to_state()  # a checkpoint does need the values


class Sizes(TorchDispatchMode):
    """Keeps the largest number of elements that any operation makes anew."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        made = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
            self.most = max(self.most, made.numel())
        return made


@pytest.mark.parametrize("criterion", ["taylor", "snip_momentum"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_no_tensor_as_large_as_a_weight(family, criterion):
    model = build(family)
    scored = make_slimming(model, slim_criterion=criterion, **LATE)
    smallest = min(
        model.get_parameter(m.tensor).numel() for s in scored.plan.structures for m in s.members if m.role == "output"
    )
    optimizer = torch.optim.AdamW(model.parameters())
    model(**make_batch(model)).loss.backward()
    with Sizes() as sizes:
        scored.score(model, 1, may_be_skipped=False)
        scored.advance(model, optimizer, 1, skipped=False)
    assert 0 < sizes.most < smallest
    dropping = make_slimming(model, slim_criterion=criterion, **NOW)
    dropping.score(model, 1, may_be_skipped=False)
    optimizer.step()
    with Sizes() as sizes:
        dropping.advance(model, optimizer, 1, skipped=False)
    assert dropping.has_reached_target
    assert 0 < sizes.most < smallest


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_nothing_is_done_after_the_schedule(make):
    model = build("bert", spread=0.1)
    optimizer, slimming = make(model.parameters()), make_slimming(model, **NOW)
    take_step(model, optimizer, slimming, 1)
    assert slimming.has_reached_target
    take_step(model, optimizer, slimming, 2)  # in which it is seen that the zeros stay
    optimizer.step()
    with Sizes() as sizes:
        slimming.advance(model, optimizer, 3, skipped=True)
    assert sizes.most == 0
    units = slimming._units
    assert isinstance(units, ZeroedUnits) and units._is_seen and not units._restless
    for step in range(4, 8):
        take_step(model, optimizer, slimming, step)
    check_zeros(model, slimming)


@pytest.mark.parametrize("case", ["activation", "optimizer"])
def test_what_moves_is_written_at_every_step(case):
    """A sigmoid is 0.5 at zero, so that FFN2 columns get gradients; noise moves everything."""
    model = build("bert", spread=0.1, **({"hidden_act": "sigmoid"} if case == "activation" else {}))
    optimizer = (torch.optim.AdamW if case == "activation" else Noisy)(model.parameters())
    slimming = make_slimming(model, **NOW)
    for step in range(1, 6):
        take_step(model, optimizer, slimming, step)
        check_zeros(model, slimming)
    restless = {name.rpartition(".")[2] for name, _ in slimming._units._restless}
    assert restless == ({"weight"} if case == "activation" else {"weight", "bias"})


class Noisy(torch.optim.SGD):
    """Adds noise to every weight."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)


def test_what_has_no_gradient_to_judge_by_is_written_without_waiting():
    model = build("bert", spread=0.1)
    optimizer, slimming = torch.optim.AdamW(model.parameters()), make_slimming(model, **NOW)
    take_step(model, optimizer, slimming, 1)
    units = slimming._units
    written = {z[:2] for zeros in units._zeros.values() for z in zeros}
    assert written and not units._is_seen and not units._restless
    optimizer.step()
    slimming.advance(model, optimizer, 2, skipped=True)  # there were no gradients in this step
    assert units._is_seen and units._restless == written
    for step in range(3, 6):
        take_step(model, optimizer, slimming, step)
        check_zeros(model, slimming)


def test_a_graph_of_an_earlier_step_may_be_held():
    model = build("bert", spread=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters())
    slimming = make_slimming(model, live=True, slim_start=2, slim_end=2, slim_schedule="oneshot")
    held = []
    for step in range(1, 5):
        held.append(model(**make_batch(model, seed=step)).loss)
        take_step(model, optimizer, slimming, step)
    assert slimming.is_live
    assert [s.units for s in slimming.plan.structures] == [
        2 * slimming.shape.find_current(s.name).units for s in slimming.plan.structures
    ]


def check_zeros(model, slimming):
    for structure in slimming.plan.structures:
        for (name, dim), where in structure.positions(~slimming.masks[structure.name]).items():
            assert not model.get_parameter(name).index_select(dim, where).any()


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("live", [True, False])
def test_nothing_is_computed_at_steps_after_the_schedule(live):
    model = build("bert", spread=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters())
    slimming = make_slimming(model, live=live, slim_start=2, slim_end=2, slim_schedule="oneshot")
    for step in range(1, 5):  # the step after the last pruning step shows which zeros stay by themselves
        slimming.watch(model, step)
        take_step(model, optimizer, slimming, step)
    assert slimming.has_reached_target and slimming.is_live is live
    with Operations() as operations:
        slimming.watch(model, 5)
        slimming.advance(model, optimizer, 5, skipped=True)
    assert operations.count == 0
