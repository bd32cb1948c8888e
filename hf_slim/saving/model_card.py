"""From the report to the model card."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from html import escape
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, RepoCard
from yaml import YAMLError  # type: ignore[import-untyped]

from .card_facts import CardFacts
from .layer_svg import draw_layers
from .own_repository import REPOSITORY, find_install_command
from .report import SLIM_ALREADY, SlimReport

CARD = "README.md"
PICTURE = "hf_slim_layers.svg"
"""The picture of what each layer keeps, beside the card."""

_TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
_TAGS = ("hf_slim", "pruning")
_FIELDS = (*("library_name", "tags", "base_model", "base_model_relation", "pipeline_tag", "datasets", "model-index"),)
"""Metadata that are of one model; a license and others that somebody has added are of the repository."""
_TITLE = "Slimmed with hf_slim"
_OURS = re.compile(r"attention heads were removed physically with \[?hf_slim\b")


def write_model_card(
    facts: CardFacts, report: SlimReport, folder: Path, repo_id: str, earlier: Path | None = None
) -> Path:
    """Write `README.md` and its picture.

    A card that is there, since what holds the model wrote one, gets ours at its end; its metadata stay as they are but
    for our tags. One that is ours is written anew; fields that somebody has added to its metadata stay.

    Args:
        facts: What is known of the model.
        report: What slimming made of it.
        folder: The folder of the card.
        repo_id: What users pass to `from_pretrained`.
        earlier: The `README.md` whose place the card takes, if there is one; what somebody else wrote in it stays.

    Returns:
        The card.

    Raises:
        ValueError: If the metadata of a card that is there cannot be read.
    """
    path = folder / CARD
    if earlier is not None and earlier.is_file() and not path.exists():
        shutil.copyfile(earlier, path)
    is_ours = path.exists() and _is_ours(path)
    card = make_model_card(facts, report, repo_id=repo_id, title=None if is_ours or not path.exists() else _TITLE)
    if is_ours:
        for name, value in _load_card(path).data.to_dict().items():
            if name not in _FIELDS and card.data.get(name) is None:
                card.data[name] = value
        card.save(path)
    elif path.exists():
        theirs = _load_card(path)
        theirs.data["tags"] = list(dict.fromkeys([*(theirs.data.get("tags") or []), *_TAGS]))
        before = theirs.text.partition(f"\n# {_TITLE}\n")[0]  # ours may be in it from an earlier time
        theirs.text = f"{before.rstrip()}\n\n{card.text.lstrip()}"
        theirs.save(path)
    else:
        card.save(path)
    (folder / PICTURE).write_text(draw_layers(report.structures), encoding="utf-8")
    return path


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
    return _OURS.search(text) is not None and f"\n# {_TITLE}\n" not in text


def rename_in_card(path: Path, name: str, repo_id: str) -> None:
    """Have a card call the model, and load it, by another name, with all that others wrote in it as it is.

    Args:
        path: The card.
        name: What `write_model_card` was given.
        repo_id: What it is to be, with the user's name.
    """
    if name != repo_id:
        card = path.read_text(encoding="utf-8")
        title, new_title = (whole.rpartition("/")[2] for whole in (name, repo_id))
        card = card.replace(f"\n# {title}\n", f"\n# {new_title}\n", 1)
        card = card.replace(f"\nmodel-index:\n- name: {title}\n", f"\nmodel-index:\n- name: {new_title}\n", 1)
        renamed = path.with_name(f".{path.name}.renamed")
        card = card.replace(f'.from_pretrained("{name}"', f'.from_pretrained("{repo_id}"')
        renamed.write_text(card, encoding="utf-8")
        renamed.replace(path)


def make_model_card(facts: CardFacts, report: SlimReport, *, repo_id: str, title: str | None = None) -> ModelCard:
    """Write the model card of a slim model.

    Args:
        facts: What is known of the model.
        report: What slimming made of it.
        repo_id: What users pass to `from_pretrained`.
        title: The heading, for a part of another card; else the repository's name.

    Returns:
        The card, ready to be saved.
    """
    name = repo_id.rpartition("/")[2]
    return ModelCard.from_template(
        make_card_data(facts, name),
        template_path=str(_TEMPLATE),
        title=title or name,
        report=report,
        whole="model as it was loaded" if SLIM_ALREADY in report.missing else "dense model",
        facts=facts,
        auto_class="" if title else facts.auto_class,
        rows=list(_list_rows(facts, report)),
        settings=[
            (escape_code(key), escape_code(json.dumps(value))) for key, value in facts.provenance.settings.items()
        ],
        metrics=[(escape_text(name), f"{value:.4f}") for name, value in facts.provenance.metrics.items()],
        structures=[(escape_code(s.name), s.kind, s.before, s.after) for s in report.structures],
        escape=escape_text,
        hf_slim="hf_slim" if REPOSITORY is None else f"[hf_slim]({REPOSITORY})",
        install=find_install_command(),
        picture=PICTURE,
        repo_id=repo_id,
    )


def make_card_data(facts: CardFacts, name: str) -> ModelCardData:
    """The metadata of a card, which the Hub filters and shows models by.

    A slim model is a `finetune` of its base model: of the relations that the Hub knows (finetune, adapter, merge,
    quantized) it is the one whose weights are a model by themselves, of one parent, in the precision of that.

    Args:
        facts: What is known of the model.
        name: The name of its repository, without that of the user.

    Returns:
        The metadata; what is not known is not in them.
    """
    results = _list_results(facts)
    datasets = list(dict.fromkeys(data.repo_id for data in facts.provenance.datasets))
    return ModelCardData(
        library_name="transformers",
        tags=list(_TAGS),
        base_model=facts.base_model,
        base_model_relation="finetune" if facts.base_model else None,
        pipeline_tag=facts.task or None,
        datasets=datasets or None,
        eval_results=results or None,
        model_name=name if results else None,
        **facts.license,
    )


def _list_results(facts: CardFacts) -> list[EvalResult]:
    """What the Hub shows of the metrics."""
    data = facts.provenance.evaluated_on
    return [
        EvalResult(
            task_type=facts.task or "other",
            dataset_type=data.repo_id if data else "unknown",
            dataset_name=data.repo_id if data else "Unknown",
            dataset_config=data.config if data else None,
            dataset_split=data.split if data else None,
            metric_type=" ".join(name.removeprefix("eval_").split()),
            metric_value=float(value),
        )
        for name, value in facts.provenance.metrics.items()
        if math.isfinite(value)  # the Hub takes no other numbers
    ]


def _list_rows(facts: CardFacts, report: SlimReport) -> Iterator[tuple[str, ...]]:
    """The table of what was before and what is now, with the metrics that are known of both."""
    for name, before, after, spec in report.list_totals():
        yield name, format(before, spec), format(after, spec), f"{after / before - 1:+.0%}"
    for name, after in facts.provenance.metrics.items():
        if name in facts.metrics_before:
            yield escape_text(name), f"{facts.metrics_before[name]:.4f}", f"{after:.4f}", ""


def escape_text(text: str) -> str:
    """A text as a line of Markdown that shows it, also in the cell of a table.

    Args:
        text: Any text.

    Returns:
        It on one line, without what would be markup.
    """
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(" ".join(text.split()), quote=False))


def escape_code(text: str) -> str:
    """The same as code, in which only the end of the code and of the cell mean something.

    Args:
        text: Any text.

    Returns:
        The code, with its backticks.
    """
    line = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{line}{space}{fence}"
