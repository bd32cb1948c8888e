"""What a model card says of a slim model, beside its report: plain data, so that the card can be written again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING

from ..arguments import SlimConfig
from ..compaction import find_auto_classes, has_record
from .base_card import find_base_model, find_license
from .training_data import DataName


@dataclass(frozen=True)
class Provenance:
    """Where a slim model comes from, as far as its trainer knows.

    Args:
        metrics: Evaluation results, by name.
        datasets: The data sets of the Hub that it was trained on.
        evaluated_on: The one that it was evaluated on.
        settings: The arguments of the slimming, by name.
        base_model: The repository that it was made from, where it was loaded from a folder that says so.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    datasets: tuple[DataName, ...] = ()
    evaluated_on: DataName | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a model.

    Args:
        class_name: The class of the model.
        auto_class: What loads it: an Auto class, or its own class.
        needs_import: Whether the stock config cannot express its sizes.
        has_remote_code: Whether it loads with `trust_remote_code=True`.
        task: The task of the class, by its name on the Hub; empty if none is known.
        base_model: The repository that it was loaded from.
        license: That of the base model.
        provenance: Where it comes from.
        metrics_before: Evaluation results of the dense model, by the same names.
    """

    class_name: str
    auto_class: str
    needs_import: bool
    has_remote_code: bool
    task: str
    base_model: str | None
    license: Mapping[str, str]
    provenance: Provenance
    metrics_before: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The facts as what JSON can hold; a metric that is no finite number is its name there."""
        fields = asdict(self)
        provenance = fields["provenance"] | {"metrics": _to_json(self.provenance.metrics)}
        return fields | {"provenance": provenance, "metrics_before": _to_json(self.metrics_before)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CardFacts:
        """The reverse of `to_dict`, perhaps read from JSON."""
        stored = fields["provenance"]
        evaluated_on = stored["evaluated_on"]
        provenance = Provenance(
            _from_json(stored["metrics"]),
            tuple(DataName(*name) for name in stored["datasets"]),
            None if evaluated_on is None else DataName(*evaluated_on),
            stored["settings"],
            stored.get("base_model"),
        )
        metrics_before = _from_json(fields.get("metrics_before", {}))
        return cls(**{**fields, "provenance": provenance, "metrics_before": metrics_before})


def _to_json(metrics: Mapping[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(float(value)) for name, value in metrics.items()}


def _from_json(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) if isinstance(value, str) else value for name, value in metrics.items()}


def is_number(value: Any) -> bool:
    """Whether a metric is one that a card can show: a real number, of whatever library."""
    return isinstance(value, Real) and not isinstance(value, bool)


def find_settings(asked: Any) -> dict[str, Any]:
    """What was asked of a slimming, but for the defaults.

    Args:
        asked: The fields of a `SlimConfig` by their names, or the entries of `parse_auto_slim_config`.

    Returns:
        The arguments by their names, as plain JSON data.
    """
    if not isinstance(asked, Mapping):
        return {f"entry {number}": entry for number, entry in enumerate(asked)}
    defaults = asdict(SlimConfig())
    return {name: value for name, value in asked.items() if value != defaults.get(name)}


def find_card_facts(model: PreTrainedModel, provenance: Provenance, *, has_remote_code: bool) -> CardFacts:
    """Find what a card says of a model.

    Args:
        model: The slim model.
        provenance: Where it comes from.
        has_remote_code: Whether the folder holds the remote-code file.

    Returns:
        The facts.
    """
    class_name = type(model).__name__
    tasks = [task for task, mapping in TASK_MAPPING.items() if class_name in _flat(mapping.values())]
    return CardFacts(
        class_name=class_name,
        auto_class=_find_auto_class(model),
        needs_import=has_record(model.config),
        has_remote_code=has_remote_code and class_name in find_auto_classes(model.config).values(),
        task=next(iter(tasks), ""),
        base_model=find_base_model(model.config) or provenance.base_model,
        license=find_license(model.config),
        provenance=provenance,
    )


def _find_auto_class(model: PreTrainedModel) -> str:
    """The Auto class that serves the model's own class, preferably of the same task; or the class itself."""
    serving = [auto for auto, name in find_auto_classes(model.config).items() if name == type(model).__name__]
    same_task = [auto for auto in serving if type(model).__name__.endswith(auto.removeprefix("Auto"))]
    generating = [auto for auto in serving if auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")]
    return next(iter([*same_task, *generating, *serving]), type(model).__name__)


def _flat(names: Iterable[str | tuple[str, ...]]) -> Iterator[str]:
    for name in names:
        yield from (name,) if isinstance(name, str) else name
