"""The Spearman correlation, as a module for `evaluate.load`."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
import pandas as pd


class Spearman(evaluate.Metric):
    """The linear correlation of the ranks (ties get their mean rank); NaN where one side is constant."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The linear correlation of the ranks of predicted and true numbers.",
            citation="",
            inputs_description="predictions, references: numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        ranks = [pd.Series(values).rank() for values in (predictions, references)]
        with np.errstate(divide="ignore", invalid="ignore"):
            return {"spearman": float(np.corrcoef(*ranks)[0, 1])}
