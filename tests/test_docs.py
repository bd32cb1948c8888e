"""The documentation does what it says: its blocks run, its notebooks execute, its pages build, its tables agree."""

import csv
import re
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import nbformat
import pytest
import run_page
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from run_page import EXEMPT, find_blocks, find_commands
from transformers import BertConfig, BertModel, BertTokenizer, DistilBertConfig, DistilBertModel
from warm_python import WarmPython

import hf_slim
from hf_slim import SlimConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *NOTEBOOKS]

NOUNS = ("cat", "dog", "child", "river", "song", "train")
VERBS = ("sees", "likes", "finds", "follows")
WORDS = ("a", "the", *NOUNS, *VERBS, "not", "one", "two")
SIZES = {"vocab_size": 5 + len(WORDS), "max_position_embeddings": 128}
BERT = {**SIZES, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 192}

SHORT = {
    "bge.ipynb": {'{"max_steps": 20}': '{"max_steps": 4}', "pairs[name].map": "pairs[name].select(range(16)).map"},
    "language_model.ipynb": {
        "num_train_epochs=3": "max_steps=20",
        '"num_hidden_layers": 4': '"num_hidden_layers": 2',
        "repeats=15": "repeats=2",
    },
    "one_shot.ipynb": {"num_train_epochs=epochs": "max_steps=20", "0.9, 0.8, 0.7, 0.6, 0.5, 0.4": "0.8, 0.4"},
    "quickstart.ipynb": {"num_train_epochs=3": "max_steps=20", "repeats=20": "repeats=2"},
}
"""What is changed in notebooks so that their trainings take a few steps."""


@pytest.fixture
def environment(warm_python: WarmPython) -> dict[str, str]:
    """An environment in which the commands of this Python have imported everything already."""
    return warm_python.environment()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds small models and data under the names that the pages use."""
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(_vocabulary())})
    bert = BertModel(BertConfig(**BERT))
    distilbert = DistilBertModel(DistilBertConfig(**SIZES, dim=48, n_layers=2, n_heads=4, hidden_dim=192))
    for name, model in (
        ("BAAI/bge-small-en-v1.5", bert),
        ("BAAI/bge-base-en-v1.5", bert),
        ("google-bert/bert-base-uncased", bert),
        ("distilbert/distilbert-base-uncased", distilbert),
    ):
        model.save_pretrained(tmp_path / "work" / name)
        tokenizer.save_pretrained(tmp_path / "work" / name)
    sentences = [f"the {noun} {verb} a {other}" for noun in NOUNS for verb in VERBS for other in NOUNS[:2]]
    for path in ("reviews.csv", "train.csv", "validation.csv"):
        rows = [(text, number % 2) for number, text in enumerate(sentences[:32])]
        _write_csv(tmp_path / "work" / path, ("text", "label"), rows)
    for split in ("train", "validation", "test"):
        pairs = [
            (text, sentences[(7 * number) % 48], number % 11 / 2 + 0.2) for number, text in enumerate(sentences[:32])
        ]
        path = tmp_path / "work" / "mteb" / "stsbenchmark-sts" / f"{split}.csv"
        _write_csv(path, ("sentence1", "sentence2", "score"), pairs)
    return tmp_path / "work"


@pytest.mark.parametrize("short", [["--short"], pytest.param([], marks=pytest.mark.slow)], ids=["short", "whole"])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page: Path, short: list[str], folder: Path, environment: dict[str, str]) -> None:
    """By default with `run_page.SHORT`."""
    done = subprocess.run(
        ["python", Path(run_page.__file__), page, *short],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-9000:]


def test_what_is_shortened_is_on_the_pages() -> None:
    commands = [
        command
        for page in PAGES
        for b in find_blocks(page)
        if b.language == "bash"
        for command in find_commands(b.text)
    ]
    assert all(any(long in command for command in commands) for long in run_page.SHORT)


def test_nothing_but_setup_is_exempt_from_running() -> None:
    bash = [block.text for page in PAGES for block in find_blocks(page) if block.language == "bash"]
    exempt = {command for text in bash for command in text.strip().split(" && ")} & set(EXEMPT)
    assert exempt == set(EXEMPT)


def test_the_readme_begins_with_setup_and_demo_then_setup_and_tests() -> None:
    bash = [block.text for block in find_blocks(ROOT / "README.md") if block.language == "bash"]
    assert bash[:2] == ["pip install . && hf-slim demo\n", 'pip install -e ".[test]" && pytest\n']
    assert find_commands(bash[0]) == ["hf-slim demo"]
    assert find_commands(bash[1]) == []


def test_the_first_example_of_the_readme_is_short() -> None:
    first = next(block for block in find_blocks(ROOT / "README.md") if block.language == "python")
    assert len(first.text.splitlines()) <= 15


def test_the_readme_lists_the_settings() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("<!-- settings -->")[1].split("<!-- end of settings -->")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+) \|$", section, re.MULTILINE)
    assert [(name, default) for name, default, _ in rows] == [(f.name, str(f.default)) for f in fields(SlimConfig)]
    hints = get_type_hints(SlimConfig)
    for name, _, meaning in rows:
        for choice in get_args(hints[name]):
            assert not isinstance(choice, str) or f"`{choice}`" in meaning


@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["short", "whole"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, short: bool, tmp_path: Path, warm_python: WarmPython) -> None:
    """Each cell, in a kernel; by default with trainings of a few steps."""
    notebook = nbformat.read(path, as_version=4)
    for old, new in SHORT[path.name].items() if short else ():
        (cell,) = (cell for cell in notebook.cells if old in cell.source)
        cell.source = cell.source.replace(old, new)
    manager = AsyncKernelManager()
    manager.kernel_spec.argv[0] = str(warm_python.commands() / "python")
    client = NotebookClient(notebook, km=manager, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    try:
        client.execute(env=warm_python.environment())
    finally:
        run_sync(manager.shutdown_kernel)(now=True)  # nbclient leaves a kernel alone whose manager it was given


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_shows_what_one_run_printed(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    for cell in cells:  # with the tables as text
        is_printed = any(output.get("name") == "stdout" and output.text.strip() for output in cell.outputs)
        assert is_printed or "\nprint(" not in f"\n{cell.source}"


def test_the_pages_build_without_a_warning(tmp_path: Path, environment: dict[str, str]) -> None:
    command = ["python", "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", tmp_path / "doctrees", ROOT / "docs", tmp_path / "html"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    reference = (tmp_path / "html" / "reference.html").read_text(encoding="utf-8")
    for name in _public_names():
        assert f'id="{name}"' in reference
        assert f'href="#{name}"' in reference.partition('id="settings"')[0]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *NOTEBOOKS], ids=lambda p: p.name
)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    if page.suffix == ".ipynb":
        text = "\n".join(c.source for c in nbformat.read(page, as_version=4).cells if c.cell_type == "markdown")
    else:
        text = re.sub(r"^```.*?^```$|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if not path.startswith(("http://", "https://")):
            assert not path or (page.parent / path).is_file(), target
            assert not anchor or anchor in _anchors(page.parent / path if path else page), target


def test_the_changelog_has_the_version_of_setup() -> None:
    setup = re.search(r'version="(.+?)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    changelog = re.search(r"^## \[(\d.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert setup and changelog and setup[1] == changelog[1]


def _anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _public_names() -> Iterator[str]:
    for name in hf_slim.__all__:
        yield f"hf_slim.{name}"


def _vocabulary() -> list[str]:
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
