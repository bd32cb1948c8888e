"""A `Slimmer` goes along with the steps of an optimizer, however these are taken."""

import copy
import pickle

import pytest
import torch
from conftest import build, make_batch
from torch import nn
from trainers import HALF, dropout_free, make_loop, make_trainer, take_steps

from hf_slim import SlimConfig, Slimmer, find_structures, model_slim
from hf_slim.compaction.zeros import zero_units
from hf_slim.training.slimmer import find_slimmer

ALL = range(1, 13)


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def assert_same(model, other):
    one, two = model.state_dict(), other.state_dict()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def step_with_closure(model, optimizer, step, *, by_keyword=False):
    def closure():
        optimizer.zero_grad()
        loss = model(**make_batch(model, seed=step)).loss
        loss.backward()
        return loss

    return optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)


def take_scaled(model, optimizer, steps, *, unscale=False, overflows=()):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in steps:
        loss = model(**make_batch(model, seed=step)).loss
        scaler.scale(loss * float("inf") if step in overflows else loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@pytest.fixture(params=[False, True])
def live(request):
    return request.param


def test_units_are_scored_before_the_step_and_dropped_after_it(live):
    model, optimizer, slimmer = make_loop(slim_live=live)
    done, sparsities = [], []
    optimizer.register_step_post_hook(lambda *_: sparsities.append(slimmer.sparsities()["mha_sparsity"]))
    for step in ALL:
        take_steps(model, optimizer, [step])
        done.append(slimmer.step)
    assert done == list(ALL)
    assert sparsities[:1] == [0.0] and sparsities == sorted(sparsities) and sparsities[7:] == [0.5] * 5
    assert slimmer.has_reached_target and slimmer.is_live == live and slimmer.unproven == set()


@pytest.mark.parametrize("by_keyword", [False, True])
def test_gradients_that_a_closure_makes(live, by_keyword):
    model, optimizer, slimmer = make_loop(slim_live=live)
    take_steps(model, optimizer, ALL)
    other, other_optimizer, other_slimmer = make_loop(slim_live=live)
    losses = [step_with_closure(other, other_optimizer, step, by_keyword=by_keyword) for step in ALL]
    assert all(loss.requires_grad for loss in losses)
    assert_same(model, other)
    assert slimmer.state_dict() == other_slimmer.state_dict()
    assert other_slimmer.unproven == set()


def test_a_closure_that_is_called_more_often_is_scored_once():
    def make(parameters):
        return torch.optim.LBFGS(parameters, lr=1e-2, max_iter=3)

    model, optimizer, slimmer = make_loop(make=make)
    scored = []
    score = slimmer.score
    slimmer.score = lambda *args, **kwargs: (scored.append(args[1]), score(*args, **kwargs))
    for step in ALL:
        step_with_closure(model, optimizer, step)
    assert scored == list(range(1, 9))
    assert not slimmer.is_live and slimmer.sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
    model, optimizer, _ = make_loop(make=make, slim_live=True)
    with pytest.raises(RuntimeError, match="LBFGS keeps the state '.+' for several parameters together"):
        step_with_closure(model, optimizer, 1)


def test_a_closure_that_is_not_called_is_an_error():
    class Lazy(torch.optim.SGD):
        def step(self, closure=None):
            return None

    model, optimizer, _ = make_loop(make=lambda parameters: Lazy(parameters, lr=0.1))
    with pytest.raises(RuntimeError, match="Lazy.step has not called its closure"):
        step_with_closure(model, optimizer, 1)


@pytest.mark.parametrize("make", [None, fused])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_loss_scale_changes_nothing(live, make, unscale):
    model, optimizer, slimmer = make_loop(make=make, slim_live=live)
    take_steps(model, optimizer, ALL)
    other, other_optimizer, other_slimmer = make_loop(make=make, slim_live=live)
    take_scaled(other, other_optimizer, ALL, unscale=unscale)
    assert_same(model, other)
    assert slimmer.state_dict() == other_slimmer.state_dict()


@pytest.mark.parametrize(("make", "counted"), [(None, 10), (fused, 12)])
def test_steps_that_overflow_do_not_count(make, counted):
    """A step that is not taken calls no optimizer; a fused optimizer is called, and does nothing."""
    model, optimizer, slimmer = make_loop(make=make, slim_live=False)
    take_scaled(model, optimizer, ALL, overflows=(1, 3))
    assert slimmer.step == counted and slimmer.has_reached_target
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_step_that_overflows_leaves_the_scores_of_a_fused_optimizer():
    model, optimizer, slimmer = make_loop(make=fused, slim_live=False)
    take_scaled(model, optimizer, [1])
    before = slimmer.to_state()["scores"]
    assert before
    take_scaled(model, optimizer, [2], overflows=(2,))
    after = slimmer.to_state()["scores"]
    assert {name: after[name] for name in before} == before


def test_nan_without_a_loss_scale_is_an_error():
    model, optimizer, _ = make_loop()
    with pytest.raises(RuntimeError, match="The importance scores are not finite at step 1"):
        (model(**make_batch(model)).loss * float("nan")).backward()
        optimizer.step()


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_subclass_that_calls_the_step_of_its_base(with_closure):
    """Both steps call the hooks as soon as anybody has made an optimizer of the base class."""
    seen = []

    class Own(torch.optim.AdamW):
        def step(self, closure=None):
            loss = super().step(closure)
            seen.append(slimmer.step)
            return loss

    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    model, optimizer, slimmer = make_loop(make=lambda parameters: Own(parameters, lr=1e-3))
    for step in ALL:
        if with_closure:
            step_with_closure(model, optimizer, step)
        else:
            take_steps(model, optimizer, [step])
    assert seen == list(range(12)) and slimmer.step == 12
    plain, plain_optimizer, _ = make_loop()
    take_steps(plain, plain_optimizer, ALL)
    assert_same(plain, model)


def test_a_step_that_fails_is_not_counted():
    class Failing(torch.optim.AdamW):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise OSError("no")
            return super().step(closure)

    model, optimizer, slimmer = make_loop(make=lambda parameters: Failing(parameters, lr=1e-3))
    with pytest.raises(OSError, match="no"):
        take_steps(model, optimizer, [1])
    assert slimmer.step == 0
    optimizer.fails = False
    optimizer.zero_grad()
    take_steps(model, optimizer, ALL)
    assert slimmer.step == 12


class Wrapper:
    """What Lightning makes of an optimizer: an object with its attributes, whose step calls that of the optimizer."""

    def __init__(self, optimizer):
        self.__dict__ = {key: value for key, value in optimizer.__dict__.items() if key != "step"}
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})
        self._wrapped = optimizer

    @property
    def optimizer(self):
        return self._wrapped

    def step(self, closure=None, **kwargs):
        return self._wrapped.step(closure=closure, **kwargs)


class Loop:
    """A loop that owns the optimizer, and gives it a closure that runs the training step."""

    def __init__(self, module):
        self.module, self.wrapper = module, Wrapper(module.configure_optimizers())

    def fit(self, steps):
        for number in steps:

            def closure(number=number):
                loss = self.module.training_step(number)
                self.wrapper.zero_grad()
                loss.backward()
                return loss

            self.wrapper.step(closure)


class Module(nn.Module):
    """What Lightning trains: it makes the optimizer, and attaches the slimmer there."""

    def __init__(self, through_wrapper=False):
        super().__init__()
        self.model = dropout_free().train()
        self.slimmer = Slimmer(self.model, SlimConfig(**HALF), 12)
        self.through_wrapper = through_wrapper

    def training_step(self, number):
        return self.model(**make_batch(self.model, seed=number)).loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.slimmer.attach(Wrapper(optimizer) if self.through_wrapper else optimizer)
        return optimizer


@pytest.mark.parametrize("through_wrapper", [False, True])
def test_a_loop_that_owns_the_optimizer(through_wrapper):
    module = Module(through_wrapper)
    Loop(module).fit(ALL)
    model, optimizer, slimmer = make_loop()
    take_steps(model, optimizer, ALL)
    assert slimmer.is_live and module.slimmer.is_live
    assert_same(model, module.model)
    assert slimmer.state_dict() == module.slimmer.state_dict()


def test_several_param_groups_and_a_schedule():
    def make(parameters):
        parameters = list(parameters)
        groups = [{"params": [p for p in parameters if (p.dim() > 1) == matrix]} for matrix in (True, False)]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        schedules.append(torch.optim.lr_scheduler.LinearLR(optimizer))
        return optimizer

    schedules = []
    model, optimizer, slimmer = make_loop(make=make)
    for step in ALL:
        take_steps(model, optimizer, [step])
        schedules[0].step()
    assert slimmer.is_live and slimmer.has_reached_target


def test_nothing_is_done_after_the_schedule_but_to_count():
    model, optimizer, slimmer = make_loop(slim_live=False)
    take_steps(model, optimizer, range(1, 10))
    called = []
    slimmer.scores.take = slimmer._units.apply = slimmer._units._write = lambda *args: called.append(args)
    take_steps(model, optimizer, range(10, 13))
    assert called == [] and slimmer.step == 12


def test_a_copy_of_the_model_has_no_part_in_it():
    model, optimizer, slimmer = make_loop(slim_live=True)
    take_steps(model, optimizer, [1])  # the batch of the next step is waited for
    twin, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert find_slimmer(model) is slimmer
    assert find_slimmer(twin) is find_slimmer(pickled) is None
    for other in (twin, pickled):
        other(**make_batch(model, seed=99))
        assert [hook.func.__self__._calls for hook in other._forward_pre_hooks.values()] == [{}]
    take_steps(model, optimizer, [2])
    assert slimmer.shape.has_removed
    with pytest.raises(RuntimeError, match="size mismatch"):
        twin.load_state_dict(model.state_dict())
    pickle.dumps(optimizer), copy.deepcopy(optimizer)


def test_detached_it_steps_no_more():
    model, optimizer, slimmer = make_loop()
    take_steps(model, optimizer, range(1, 6))
    slimmer.detach()
    masks = {name: mask.clone() for name, mask in slimmer.masks.items()}
    take_steps(model, optimizer, range(6, 20))
    assert slimmer.step == 5 and all(mask.equal(masks[name]) for name, mask in slimmer.masks.items())
    assert not model._forward_pre_hooks and not model._load_state_dict_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    slimmer.detach()
    slimmer.attach(torch.optim.AdamW(model.parameters(), lr=1e-3))  # a second phase goes on


def test_attached_twice_is_refused():
    model, optimizer, slimmer = make_loop()
    for again in (optimizer, torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(ValueError, match="A Slimmer is attached to AdamW, the optimizer of this model, already"):
            slimmer.attach(again)
        with pytest.raises(ValueError, match="A Slimmer is attached to AdamW"):
            Slimmer(model, SlimConfig(**HALF), 12).attach(again)


def test_an_optimizer_that_is_gone_holds_nothing():
    model, optimizer, _ = make_loop()
    del optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    slimmer = Slimmer(model, SlimConfig(**HALF), 12).attach(optimizer)
    take_steps(model, optimizer, ALL)
    assert slimmer.has_reached_target and len(model._load_state_dict_pre_hooks) == 1


def test_an_optimizer_of_another_model_is_refused():
    model, other = dropout_free(), dropout_free()
    slimmer = Slimmer(model, SlimConfig(**HALF), 12)
    with pytest.raises(ValueError, match="AdamW belongs to another model: it has no weight that is to be slimmed"):
        slimmer.attach(torch.optim.AdamW(other.parameters()))
    some = [p for name, p in model.named_parameters() if "layer.1" not in name]
    with pytest.raises(ValueError, match=r"AdamW has no bert\.encoder\.layer\.1\..+ more in its param_groups"):
        slimmer.attach(torch.optim.AdamW(some))
    with pytest.raises(ValueError, match="takes a torch.optim.Optimizer, whose step calls hooks, got Linear"):
        slimmer.attach(nn.Linear(1, 1))
    assert find_slimmer(model) is None
    slimmer.attach(torch.optim.AdamW(model.parameters()))


def test_parameters_that_are_replaced_after_attaching_are_refused():
    model, optimizer, _ = make_loop()
    optimizer.param_groups[0]["params"] = list(dropout_free().parameters())
    with pytest.raises(ValueError, match="AdamW belongs to another model"):
        take_steps(model, optimizer, [1])


def test_frozen_weights_may_be_left_out():
    model = dropout_free()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "query" not in name and "embeddings" not in name
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    slimmer = Slimmer(model, SlimConfig(**HALF), 12).attach(optimizer)
    take_steps(model, optimizer, ALL)
    assert slimmer.is_live and slimmer.has_reached_target


def test_a_trainer_that_would_slim_a_second_time_is_refused(tmp_path):
    model, _optimizer, slimmer = make_loop()
    trainer = make_trainer(model, tmp_path)
    with pytest.raises(ValueError, match="A Slimmer is attached to AdamW.+leave SlimTrainerCallback out, or call"):
        trainer.train()
    slimmer.detach()
    trainer.train()


def test_a_trainer_with_an_attached_optimizer_is_a_loop_like_any_other(tmp_path):
    from trainers import STEPS, make_data
    from transformers import Trainer, TrainingArguments

    model, optimizer, slimmer = make_loop()
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    args = TrainingArguments(tmp_path, **STEPS, use_cpu=True)
    Trainer(model, args, train_dataset=make_data(model), optimizers=(optimizer, schedule)).train()
    assert slimmer.step == 12 and slimmer.is_live and slimmer.has_reached_target and slimmer.unproven == set()


def test_where_shapes_cannot_change_auto_keeps_zeros(group):
    model, optimizer, slimmer = make_loop()
    take_steps(model, optimizer, ALL)
    assert slimmer.has_reached_target and not slimmer.is_live
    with pytest.raises(
        ValueError, match=r"slim_live=True cannot be used here: the training runs on several devices \("
    ):
        make_loop(slim_live=True)


def test_the_model_in_ddp(group):
    model = dropout_free().train()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
    slimmer = Slimmer(parallel, SlimConfig(**HALF), 12).attach(optimizer)
    for step in ALL:
        parallel(**make_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain, plain_optimizer, _ = make_loop(slim_live=False)
    take_steps(plain, plain_optimizer, ALL)
    assert not slimmer.is_live
    assert_same(plain, model)


def test_a_compiled_model_is_proven_uncompiled():
    model = dropout_free().train()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    slimmer = Slimmer(compiled, SlimConfig(**HALF), 12).attach(optimizer)
    for step in ALL:
        compiled(**make_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert slimmer.is_live and slimmer.has_reached_target and slimmer.unproven == set()


def test_a_teacher_is_refused():
    config = SlimConfig(**HALF, slim_teacher="self")
    with pytest.raises(ValueError, match="slim_teacher='self' cannot be used with Slimmer.attach"):
        make_loop(config)


def test_nothing_to_do_is_said():
    with pytest.warns(
        UserWarning, match="Slimmer has nothing to do: ffn2_sparsity and mha_sparsity are both 0, and no budget"
    ):
        model, optimizer, _ = make_loop(SlimConfig())
    take_steps(model, optimizer, [1])


def test_what_cannot_be_slimmed_is_refused():
    with pytest.raises(ValueError, match="Sequential has no feed-forward network that can be slimmed"):
        Slimmer(nn.Sequential(nn.Linear(4, 4)), SlimConfig(**HALF), 12)
    with pytest.raises(ValueError, match="Slimmer takes the model that is trained, got str"):
        Slimmer("bert", SlimConfig(**HALF), 12)
    with pytest.raises(ValueError, match="Slimmer takes a SlimConfig or the list .+ got dict"):
        Slimmer(build("bert"), HALF, 12)
    for steps in (0, 2.5, None):
        with pytest.raises(ValueError, match="max_steps must be a whole number from 1, got"):
            Slimmer(build("bert"), SlimConfig(**HALF), steps)


@pytest.mark.parametrize("live", [False, True])
def test_a_model_that_something_else_made_smaller_is_refused(live):
    model, optimizer, slimmer = make_loop(slim_live=live)
    take_steps(model, optimizer, range(1, 6))
    structure = find_structures(model).structures[0]
    with torch.no_grad():
        zero_units(model, [structure], {structure.name: torch.arange(structure.units) >= 8})
    model_slim(model, round_multiplier=8, verify=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"something else has removed units \(model_slim, slim\), of which"):
            take_steps(model, optimizer, [6])
    assert slimmer.step == 5
