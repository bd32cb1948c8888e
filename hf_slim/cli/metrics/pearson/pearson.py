"""The Pearson correlation, as a module for `evaluate.load`."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np


class Pearson(evaluate.Metric):
    """The linear correlation of predicted and true numbers; NaN where one of them is constant."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The linear correlation of predicted and true numbers; NaN where one of them is constant.",
            citation="",
            inputs_description="predictions, references: numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return {"pearson": float(np.corrcoef(predictions, references)[0, 1])}
