"""The moments of what layers read."""

import pytest
import torch

from hf_slim.one_shot.input_moments import Moments


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("centred", [True, False])
def test_the_moments_of_several_batches_are_those_of_all_inputs(centred, whole):
    batches = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1.0, -2.0, 5.0])
    moments = Moments(4, torch.device("cpu"), whole=whole)
    for batch in batches:
        moments.add(batch)
        moments.add(batch[:0])
    rows = batches.flatten(0, 1)
    expected = (rows - rows.mean(0) if centred else rows).double()
    products = expected.t() @ expected / len(rows)
    torch.testing.assert_close(moments.mean, rows.mean(0))
    torch.testing.assert_close(moments.take(centred=centred), (products if whole else products.diag()).float())


def test_inputs_that_hardly_vary_have_a_covariance():
    rows = 100 + 1e-3 * torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    moments = Moments(8, torch.device("cpu"), whole=True)
    for batch in rows.split(100):
        moments.add(batch)
    covariance = moments.take(centred=True)
    assert torch.linalg.eigvalsh(covariance.double()).min() > 0
    torch.testing.assert_close(covariance.diagonal(), rows.double().var(0, correction=0).float(), rtol=0.05, atol=0)
