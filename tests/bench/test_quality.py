"""The quality benchmark, with a few steps of its smallest task; half a minute, so run it with `pytest -m slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quality.py"


@pytest.mark.slow
def test_runs_are_kept_and_make_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n")
    flags = ["--data", tmp_path, "--output_dir", tmp_path / "out", "--part", 0.01, "--page", page, "--tasks", "digits"]
    flags += ["--seeds", 1, 2, "--sparsities", "0.5,0.5", "--methods", "dense", "default", "teacher", "one_shot_tenth"]

    def call():
        subprocess.run([sys.executable, SCRIPT, *map(str, flags)], check=True, capture_output=True)
        return (tmp_path / "out" / "runs.jsonl").read_text()

    runs = [json.loads(line) for line in call().splitlines()]
    names = ("dense", "default", "teacher", "one_shot_tenth")
    losses = {name: ({}, {}) for name in ("base", *names)}
    for run in runs:
        losses[run["method"]][run["seed"] - 1][run["rate"]] = run["result"]["loss"]
    for first, second in (losses[name] for name in names):
        (best,) = second  # what was the best for the first seed, and what lies beside it was tried
        assert first[best] == min(first.values())
        assert first.keys() >= {rate for rate in (best / 2, best * 2) if 1 / 16 <= rate <= 4}
    sizes = {run["method"]: run["result"]["parameters"] for run in runs}
    assert sizes["dense"] == sizes["base"] > sizes["default"] == sizes["teacher"]
    text = page.read_text()
    assert text.startswith("before\n<!-- figures -->\n\n![") and text.endswith("<!-- end of figures -->\nafter\n")
    assert "| defaults with a dense teacher | " in text and "old" not in text
    assert (tmp_path / "quality.svg").stat().st_size > 1000
    (tmp_path / "quality.svg").unlink()
    assert call() == "\n".join(map(json.dumps, runs)) + "\n"
    assert (tmp_path / "quality.svg").exists()
