"""How far outputs are apart."""

import math

import torch

from hf_slim.proof import output_differences
from hf_slim.proof.output_differences import OutputDifference, measure_differences


def test_the_largest_difference_absolute_and_of_the_largest_output(monkeypatch):
    monkeypatch.setattr(output_differences, "PART", 2)  # the largest of both lie in other parts
    first = torch.tensor([[1.0, -8.0, 2.0], [0.0, 0.0, 4.0]])
    second = torch.tensor([[1.5, -8.0, 2.0], [0.0, 0.0, 2.0]])
    assert measure_differences({"logits": first}, {"logits": second}) == (OutputDifference("logits", 2.0, 0.25),)


def test_what_masks_are_filled_with_counts_only_where_it_differs():
    least = torch.finfo(torch.float32).min
    first, second = torch.tensor([4.0, least, -math.inf]), torch.tensor([3.0, least, -math.inf])
    assert measure_differences({"x": first}, {"x": second}) == (OutputDifference("x", 1.0, 0.25),)
    (found,) = measure_differences({"x": first}, {"x": torch.tensor([4.0, least, 0.0])})
    assert found.absolute == math.inf


def test_no_number_is_no_number():
    (found,) = measure_differences({"x": torch.tensor([1.0, math.nan])}, {"x": torch.tensor([1.0, 2.0])})
    assert math.isnan(found.absolute)


def test_outputs_of_zeros_and_outputs_of_other_names_or_shapes():
    zeros = torch.zeros(2)
    first = {"a": zeros, "b": zeros, "c": zeros, "d": torch.zeros(0)}
    second = {"a": zeros + 0.5, "b": torch.zeros(3), "d": torch.zeros(0)}
    assert measure_differences(first, second) == (OutputDifference("a", 0.5, 0.5),)
