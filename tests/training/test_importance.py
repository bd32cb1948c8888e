"""Scores against the formulas, written out by hand."""

import pytest
import torch
from conftest import build, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_slim.parallel.shards import find_shards
from hf_slim.structures.discovery import find_structures
from hf_slim.training.importance import score_structures, smooth_scores


def score_units(model, structure, criterion):
    return score_structures(model, [structure], criterion, find_shards(model))[structure.name]


@pytest.fixture
def model():
    model = build("bert")
    model(**make_batch(model)).loss.backward()
    return model


def test_channel_scores(model):
    ffn = find_structures(model).of_kind("ffn")[0]
    weight = model.bert.encoder.layer[0].output.dense.weight
    product = (weight * weight.grad).detach()
    torch.testing.assert_close(score_units(model, ffn, "magnitude"), weight.detach().abs().mean(0))
    torch.testing.assert_close(score_units(model, ffn, "snip_momentum"), product.abs().mean(0))
    torch.testing.assert_close(score_units(model, ffn, "taylor"), product.sum(0).abs(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("criterion", ["magnitude", "snip_momentum"])
def test_head_scores_average_the_four_projections(model, criterion):
    mha = find_structures(model).of_kind("mha")[0]
    attention = model.bert.encoder.layer[0].attention
    parts = []
    for layer in (attention.self.query, attention.self.key, attention.self.value, attention.output.dense):
        size = layer.weight.abs() if criterion == "magnitude" else (layer.weight * layer.weight.grad).abs()
        by_head = size.view(4, 8, 32) if layer is not attention.output.dense else size.T.reshape(4, 8, 32)
        parts.append(by_head.mean((1, 2)))
    torch.testing.assert_close(score_units(model, mha, criterion), torch.stack(parts).mean(0).detach())


def test_taylor_of_a_head_is_the_derivative_of_removing_it(model):
    """A gate that scales a head's output: the loss's derivative by it, at 1, is the sum of weight * gradient."""
    mha = find_structures(model).of_kind("mha")[0]
    dense = model.bert.encoder.layer[0].attention.output.dense
    weight, batch, step = dense.weight.detach().clone(), make_batch(model), 1e-3
    derivatives = []
    for head in range(4):
        losses = []
        for scale in (1 + step, 1 - step):
            with torch.no_grad():
                dense.weight.copy_(weight)
                dense.weight[:, head * 8 : head * 8 + 8] *= scale
                losses.append(model.double()(**batch).loss)
            model.float()
        derivatives.append(float(losses[0] - losses[1]) / (2 * step))
    with torch.no_grad():
        dense.weight.copy_(weight)
    expected = torch.tensor(derivatives).abs()
    torch.testing.assert_close(score_units(model, mha, "taylor"), expected, atol=1e-4, rtol=1e-2)


def test_transposed_and_fused_layers_score_alike():
    """The fused, transposed projection of GPT-2 gives what its four parts give."""
    model = build("gpt2")
    mha = find_structures(model).of_kind("mha")[0]
    attention = model.transformer.h[0].attn
    parts = [*attention.c_attn.weight.split(32, dim=1)]
    expected = [part.T.reshape(4, 8, 32).abs().mean((1, 2)) for part in parts]
    expected.append(attention.c_proj.weight.view(4, 8, 32).abs().mean((1, 2)))
    torch.testing.assert_close(score_units(model, mha, "magnitude"), torch.stack(expected).mean(0).detach())


def test_without_a_gradient_the_score_is_zero():
    model = build("bert")
    structure = find_structures(model).structures[0]
    assert score_units(model, structure, "taylor").tolist() == [0, 0, 0, 0]
    assert score_units(model, structure, "snip_momentum").tolist() == [0, 0, 0, 0]


def test_smoothing():
    first = smooth_scores(None, torch.tensor([1.0, 2.0]))
    assert smooth_scores(first, torch.tensor([3.0, 0.0])).tolist() == pytest.approx([3.9, 1.8])


def test_squares_are_remembered_for_longer():
    first = smooth_scores(None, torch.tensor([1.0, 2.0]), 0.99)
    assert smooth_scores(first, torch.tensor([3.0, 0.0]), 0.99).tolist() == pytest.approx([3.99, 1.98])


@pytest.mark.parametrize("kind", ["ffn", "mha"])
def test_fisher_is_the_square_of_what_taylor_is_the_size_of(model, kind):
    structure = find_structures(model).of_kind(kind)[0]
    taylor = score_units(model, structure, "taylor")
    torch.testing.assert_close(score_units(model, structure, "fisher"), taylor**2)


class Counter(TorchDispatchMode):
    """Counts the operations that write, which on a device are the kernels that are started."""

    VIEWS = ("detach", "split", "slice", "view", "alias")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count it."""
        self.count += not func.overloadpacket.__name__.startswith(self.VIEWS)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_elsewhere_than_on_a_cpu_a_structure_costs_few_kernels(criterion):
    model = build("bert").to("meta")
    structures, shards = find_structures(model).structures, find_shards(model)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    for kind, kernels in (("ffn", 4), ("mha", 5)):  # zeros, a product, a sum (of heads two), and the score of it
        ones = [s for s in structures if s.kind == kind]
        score_structures(model, ones, criterion, shards)
        with Counter() as counter:
            score_structures(model, ones, criterion, shards)
        assert counter.count == kernels * len(ones)
