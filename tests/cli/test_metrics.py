"""The metric modules that come with the package."""

import math
from pathlib import Path

import evaluate
import pytest

import hf_slim

METRICS = Path(hf_slim.__file__).parent / "cli" / "metrics"


@pytest.mark.parametrize(
    ("name", "predictions", "references", "expected"),
    [
        ("accuracy", [1, 2, 3, 4], [1, 2, 0, 4], 0.75),
        ("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0),
        ("pearson", [1.0, 2.0, 3.0, 4.0], [1.0, -1.0, -1.0, 1.0], 0.0),
        ("pearson", [0.0, 0.0, 1.0], [0.0, 1.0, 1.0], 0.5),
        ("spearman", [1.0, 2.0, 30.0], [10.0, 11.0, 12.0], 1.0),
        # Ranks 1, 2.5, 2.5, 4 and 2, 3, 4, 1: deviations multiply to -1.5, squares to 4.5 and 5.
        ("spearman", [1.0, 2.0, 2.0, 5.0], [2.0, 4.0, 5.0, 1.0], -1.5 / math.sqrt(4.5 * 5)),
    ],
)
def test_metric_offline(name, predictions, references, expected):
    metric = evaluate.load(str(METRICS / name), keep_in_memory=True)
    assert metric.compute(predictions=predictions, references=references) == {name: pytest.approx(expected)}


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.filterwarnings("error")
def test_correlation_of_a_constant_is_undefined(name):
    metric = evaluate.load(str(METRICS / name), keep_in_memory=True)
    assert math.isnan(metric.compute(predictions=[1.0, 1.0], references=[2.0, 3.0])[name])
