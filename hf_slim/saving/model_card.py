"""From the report to the model card."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, RepoCard
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING
from yaml import YAMLError  # type: ignore[import-untyped]

from ..compaction import find_auto_classes, has_record
from .report import SlimReport

_TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
_TAGS = ("hf_slim", "pruning")
_TITLE = "Slimmed with hf_slim"
_SENTENCE_END = "with [hf_slim](https://pypi.org/project/hf-slim)."


def write_model_card(
    model: PreTrainedModel,
    report: SlimReport,
    folder: Path,
    repo_id: str,
    has_remote_code: bool,
    metrics: Mapping[str, float],
    earlier: Path | None = None,
) -> None:
    """Write `README.md`; a card that is there, since what holds the model wrote one, gets ours at its end.

    Its metadata stay as they are but for our tags.

    Args:
        model: The slim model.
        report: What slimming made of it.
        folder: The folder of the card.
        repo_id: What users pass to `from_pretrained`.
        has_remote_code: Whether the folder holds the remote-code file.
        metrics: Evaluation results, by name.
        earlier: The `README.md` whose place the card takes, if there is one; what somebody else wrote in it stays.

    Raises:
        ValueError: If the metadata of a card that is there cannot be read.
    """
    path = folder / "README.md"
    if earlier is not None and earlier.is_file() and not path.exists() and not _is_ours(earlier):
        shutil.copyfile(earlier, path)
    there = path.exists()
    card = make_model_card(
        model,
        report,
        repo_id=repo_id,
        has_remote_code=has_remote_code,
        metrics=metrics,
        title=_TITLE if there else None,
    )
    if there:
        theirs = _load_card(path)
        theirs.data["tags"] = list(dict.fromkeys([*(theirs.data.get("tags") or []), *_TAGS]))
        before = theirs.text.partition(f"\n# {_TITLE}\n")[0]  # ours may be in it from an earlier time
        theirs.text = f"{before.rstrip()}\n\n{card.text.lstrip()}"
        theirs.save(path)
    else:
        card.save(path)


def _load_card(path: Path) -> RepoCard:
    """A card that somebody else wrote, with every field of its metadata as it is."""
    try:
        return RepoCard.load(path)
    except (ValueError, YAMLError) as error:
        raise ValueError(
            f"The metadata at the head of the README.md in the folder cannot be read, so the model card cannot be "
            f"added to it: {error}. Mend or move that file, and save again."
        ) from error


def _is_ours(path: Path) -> bool:
    """Whether a card is one of ours from its beginning on."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return _SENTENCE_END in text and f"\n# {_TITLE}\n" not in text


def rename_in_card(path: Path, name: str, repo_id: str) -> None:
    """Have a card load the model by the whole name of its repository.

    Args:
        path: The card.
        name: What `write_model_card` was given.
        repo_id: What it is to be, with the user's name.
    """
    if name != repo_id:
        card = path.read_text(encoding="utf-8")
        renamed = path.with_name(f".{path.name}.renamed")
        card = card.replace(f'.from_pretrained("{name}")', f'.from_pretrained("{repo_id}")')
        renamed.write_text(card, encoding="utf-8")
        renamed.replace(path)


def make_model_card(
    model: PreTrainedModel,
    report: SlimReport,
    *,
    repo_id: str,
    has_remote_code: bool,
    metrics: Mapping[str, float],
    title: str | None = None,
) -> ModelCard:
    """Write the model card of a slim model.

    Args:
        model: The slim model.
        report: What slimming made of it.
        repo_id: What users pass to `from_pretrained`.
        has_remote_code: Whether the folder holds the remote-code file.
        metrics: Evaluation results, by name; the Hub finds those that are numbers in the metadata, as `model-index`.
        title: The heading, for a part of another card, which says how to load the model; else the repository's name.

    Returns:
        The card, ready to be saved.
    """
    source = model.config.name_or_path
    base_model = source if source and source.count("/") <= 1 and not Path(source).exists() else None
    name = repo_id.rpartition("/")[2]
    class_name = type(model).__name__
    results = _eval_results(class_name, metrics)
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            tags=list(_TAGS),
            base_model=base_model,
            eval_results=results or None,
            model_name=name if results else None,
        ),
        template_path=str(_TEMPLATE),
        title=title or name,
        report=report,
        class_name=class_name,
        sentence_end=_SENTENCE_END,
        needs_import=has_record(model.config),
        auto_class="" if title else _auto_class(model),
        repo_id=repo_id,
        has_remote_code=has_remote_code and class_name in find_auto_classes(model.config).values(),
        metrics=metrics,
    )


def _eval_results(class_name: str, metrics: Mapping[str, float]) -> list[EvalResult]:
    """What the Hub shows of the metrics; the trainer does not tell what its evaluation data are called."""
    tasks = [task for task, mapping in TASK_MAPPING.items() if class_name in _flat(mapping.values())]
    return [
        EvalResult(
            task_type=next(iter(tasks), "other"),
            dataset_type="unknown",
            dataset_name="Unknown",
            metric_type=name.removeprefix("eval_"),
            metric_value=float(value),
        )
        for name, value in metrics.items()
        if math.isfinite(value)  # the Hub takes no other numbers
    ]


def _auto_class(model: PreTrainedModel) -> str:
    """The Auto class that serves the model's own class, preferably of the same task; or the class itself."""
    serving = [auto for auto, name in find_auto_classes(model.config).items() if name == type(model).__name__]
    same_task = [auto for auto in serving if type(model).__name__.endswith(auto.removeprefix("Auto"))]
    generating = [auto for auto in serving if auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")]
    return next(iter([*same_task, *generating, *serving]), type(model).__name__)


def _flat(names: Iterable[str | tuple[str, ...]]) -> Iterator[str]:
    for name in names:
        yield from (name,) if isinstance(name, str) else name
