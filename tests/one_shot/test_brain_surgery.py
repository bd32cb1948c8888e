"""The surgery by itself: against least squares on actual inputs."""

import pytest
import torch

from hf_slim.one_shot.brain_surgery import DAMPING, Reading, damp, rank_units, solve_kept


def make_reading(inputs: torch.Tensor, weight: torch.Tensor, size: int = 1) -> Reading:
    moment = damp(inputs.t() @ inputs / len(inputs))
    return Reading(weight, moment, torch.arange(inputs.shape[1]).view(-1, size))


def solve_by_least_squares(inputs: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The best weights for what is kept, on the inputs and, for the damping, one more row for each of them."""
    inputs, weight = inputs.double(), weight.double()
    scaled = inputs / len(inputs) ** 0.5
    extra = torch.eye(inputs.shape[1]).double() * (DAMPING * scaled.square().sum(0).mean()).sqrt()
    rows = torch.cat([scaled, extra])
    return torch.linalg.lstsq(rows[:, keep], rows @ weight.t()).solution.t()


def correlated(rows: int = 400, inputs: int = 24, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(rows, inputs) @ torch.randn(inputs, inputs) + torch.randn(inputs)


def test_what_is_kept_takes_over_as_least_squares_say() -> None:
    inputs, weight = correlated(), torch.randn(10, 24)
    dropped = torch.zeros(24, dtype=torch.bool)
    dropped[[1, 5, 6, 20]] = True
    solved = solve_kept(make_reading(inputs, weight), dropped)
    expected = solve_by_least_squares(inputs, weight, ~dropped)
    torch.testing.assert_close(solved[:, ~dropped], expected.float(), rtol=1e-4, atol=1e-4)
    assert solved[:, dropped].count_nonzero() == 0


@pytest.mark.parametrize("size", [1, 4])
def test_the_losses_add_up_to_what_the_least_squares_leave(size: int) -> None:
    inputs, weight = correlated(), torch.randn(10, 24)
    reading = make_reading(inputs, weight, size)
    order, losses = rank_units([reading], 12 // size, one_by_one=size > 1)
    dropped = torch.zeros(24, dtype=torch.bool)
    dropped[reading.index[order].flatten()] = True
    change = solve_kept(reading, dropped) - weight
    assert float(losses.sum()) == pytest.approx(float(((change @ reading.moment) * change).sum()), rel=1e-3)
    assert len(set(order.tolist())) == 12 // size


def test_units_go_one_by_one_in_the_order_of_the_least_loss() -> None:
    inputs, weight = correlated(), torch.randn(10, 24)
    reading = make_reading(inputs, weight, 4)
    gone: list[int] = []
    for _ in range(3):
        costs = {}
        for unit in set(range(6)) - set(gone):
            dropped = torch.zeros(24, dtype=torch.bool)
            dropped[reading.index[[*gone, unit]].flatten()] = True
            change = solve_kept(reading, dropped) - weight
            costs[unit] = float(((change @ reading.moment) * change).sum())
        gone.append(min(costs, key=costs.__getitem__))
    assert rank_units([reading], 3, one_by_one=True)[0].tolist() == gone


def test_a_channel_that_another_can_replace_goes_first_and_costs_next_to_nothing() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(500, 16)
    inputs[:, 7] = 2 * inputs[:, 3]
    weight = torch.randn(4, 16)
    order, losses = rank_units([make_reading(inputs, weight)], 1, one_by_one=False)
    assert order.item() in (3, 7)
    assert losses.item() < 0.05 * float(weight[:, order].square().sum())


def test_a_unit_costs_what_it_costs_all_layers_that_read_it() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(200, 8), torch.randn(200, 8)
    small, large = torch.full((2, 8), 0.1), torch.ones(2, 8)
    small[:, 2], large[:, 5] = 3.0, 0.01
    readings = [make_reading(first, small), make_reading(second, large)]
    order, _ = rank_units(readings, 8, one_by_one=True)
    assert order[0] == 5 and order[-1] == 2
    assert sorted(order.tolist()) == list(range(8))


def test_inputs_that_are_always_zero_are_no_trouble() -> None:
    weight = torch.randn(4, 8)
    reading = Reading(weight, damp(torch.zeros(8, 8)), torch.arange(8)[:, None])
    order, losses = rank_units([reading], 4, one_by_one=False)
    assert len(order) == 4 and losses.isfinite().all()
    dropped = torch.zeros(8, dtype=torch.bool)
    dropped[order] = True
    assert torch.equal(solve_kept(reading, dropped)[:, ~dropped], weight[:, ~dropped])


def test_a_moment_that_float32_cannot_factor_is_factored_in_float64() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 40) * torch.logspace(0, 3, 40)  # fewer rows than inputs, scales far apart
    reading = make_reading(inputs, torch.randn(4, 40))
    order, losses = rank_units([reading], 40, one_by_one=False)
    assert sorted(order.tolist()) == list(range(40)) and losses.isfinite().all()


def test_nothing_to_drop() -> None:
    order, losses = rank_units([make_reading(correlated(), torch.randn(3, 24))], 0, one_by_one=False)
    assert order.shape == losses.shape == (0,)
