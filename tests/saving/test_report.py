"""Sizes, latency and how they print."""

import json
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from hf_slim.costs import BudgetReport
from hf_slim.saving.layer_bars import StructureSize
from hf_slim.saving.report import (
    SlimReport,
    count_bytes,
    count_parameters,
    measure_latency,
    render_table,
)

CONFIG = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 10,
}
# Embeddings (20 + 10 + 2) * 8 and a norm; four 8x8 layers and a norm; 8 -> 16 -> 8 and a norm; the pooler.
ENCODER = 272 + (4 * 72 + 16) + (8 * 16 + 16 + 16 * 8 + 8 + 16)
POOLER = 72


def test_counts_of_a_classifier() -> None:
    model = BertForSequenceClassification(BertConfig(**CONFIG, num_labels=3))
    expected = ENCODER + POOLER + 3 * 8 + 3
    assert count_parameters(model) == expected
    assert count_bytes(model) == 4 * expected
    assert count_bytes(model.to(torch.bfloat16)) == 2 * expected


def test_tied_weights_count_once() -> None:
    model = BertForMaskedLM(BertConfig(**CONFIG))
    expected = ENCODER + (72 + 16) + 20  # the transform and the bias; the decoder is the word embeddings
    assert count_parameters(model) == expected
    assert count_bytes(model) == 4 * expected


def test_bytes_hold_what_is_saved() -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("saved", torch.zeros(5, dtype=torch.int64))
    model.register_buffer("unsaved", torch.zeros(5), persistent=False)
    assert count_bytes(model) == 4 * 8 + 8 * 5


def test_report_prints_every_structure() -> None:
    report = SlimReport(
        parameters_before=1_000_000,
        parameters_after=600_000,
        bytes_before=4_000_000,
        bytes_after=2_400_000,
        structures=(
            StructureSize("layer.0.output.dense", "ffn", 1536, 320),
            StructureSize("layer.0.attention.output.dense", "mha", 12, 12),
        ),
    )
    assert str(report) == (
        "                                        before    after  change\n"
        "---------------------------------------------------------------\n"
        "parameters                           1,000,000  600,000  -40.0%\n"
        "megabytes                                  4.0      2.4  -40.0%\n"
        "layer.0.output.dense            ffn      1,536      320  -79.2%\n"
        "layer.0.attention.output.dense  mha         12       12   +0.0%"
    )


WHOLE = SlimReport(
    1_000_000,
    600_000,
    4_000_000,
    2_400_000,
    (StructureSize("layer.0.<b>", "ffn", 1536, 384), StructureSize("layer.0.attention", "mha", 12, 9)),
    ("layer.0.<b>",),
    BudgetReport("parameters", 1e6, 6.1e5, 6e5),
    2_000_000,
    1_000_000,
    10.0,
    5.0,
    "a CPU <i>",
)


def test_a_report_goes_through_json() -> None:
    fields = WHOLE.to_dict()
    assert fields["structures"][0] == {"name": "layer.0.<b>", "kind": "ffn", "before": 1536, "after": 384}
    assert fields["budget"] == {"unit": "parameters", "dense": 1e6, "asked": 6.1e5, "got": 6e5}
    assert SlimReport.from_dict(json.loads(json.dumps(fields))) == WHOLE
    short = SlimReport(2, 1, 8, 4, ())
    assert SlimReport.from_dict(json.loads(json.dumps(short.to_dict()))) == short


def test_a_report_prints_what_was_counted_and_timed() -> None:
    lines = [line.split() for line in str(WHOLE).splitlines()]
    assert lines[4:6] == [["MFLOPs", "2.0", "1.0", "-50.0%"], ["latency", "(ms)", "10.00", "5.00", "-50.0%"]]
    lines = str(replace(WHOLE, flops_before=2_000_000_000, flops_after=1_500_000_000)).splitlines()
    assert lines[4].split() == ["GFLOPs", "2.0", "1.5", "-25.0%"]


def test_a_report_as_a_table_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    expected = pandas.DataFrame(
        {"kind": ["ffn", "mha"], "before": [1536, 12], "after": [384, 9], "kept": [0.25, 0.75]},
        index=pandas.Index(["layer.0.<b>", "layer.0.attention"], name="name"),
    )
    pandas.testing.assert_frame_equal(WHOLE.to_pandas(), expected)


def test_without_pandas_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"^SlimReport.to_pandas needs pandas: `pip install pandas`\.$"):
        WHOLE.to_pandas()


def test_a_notebook_shows_totals_picture_structures_and_notes() -> None:
    html = WHOLE._repr_html_()
    texts = list(ElementTree.fromstring(html).itertext())  # it is well-formed
    assert texts[:4] == ["before", "after", "change", "parameters"]
    for text in ("1,000,000", "-40.0%", "latency (ms)", "layer.0.<b>", "1,536", "not proven: layer.0.<b>"):
        assert text in texts, text
    assert "latency of a forward pass on a CPU <i>" in texts and f"budget: {WHOLE.budget}" in texts
    assert "2 structures" in texts and html.count("<svg ") == 1 and "<b>" not in html and "<i>" not in html


class _Recorder(nn.Module):
    def __init__(self, calls: list[tuple[str, bool, bool]], name: str) -> None:
        super().__init__()
        self.calls, self.name = calls, name
        self.inner = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.name, self.inner.training, torch.is_inference_mode_enabled()))
        return x


def test_latency_alternates_and_restores_the_mode() -> None:
    calls: list[tuple[str, bool, bool]] = []
    models = {name: _Recorder(calls, name) for name in ("dense", "slim")}
    models["slim"].inner.eval()
    latency = measure_latency(models, {"x": torch.ones(1)}, repeats=4)
    assert list(latency) == ["dense", "slim"] and all(value > 0 for value in latency.values())
    assert calls == [("dense", False, True), ("slim", False, True)] * (3 + 4)
    assert [(m.training, m.inner.training) for m in models.values()] == [(True, True), (True, False)]


def test_latency_restores_the_mode_after_an_error() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        measure_latency({"a": model}, {"x": torch.ones(1)})
    assert model.training


def test_latency_refuses_no_repeats() -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure_latency({}, {}, repeats=0)


def test_a_table_is_as_wide_as_its_cells_and_shows_them_as_they_are(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    rows = [("name", "[bold]", "12.5"), (":smile:", "é日本", "1,000"), ("x" * 200, "", "-")]
    assert render_table(rows).splitlines() == [
        f"{'name':200}  [bold]   12.5",
        "-" * 215,
        f"{':smile:':200}   é日本  1,000",  # two columns of a terminal for each of the wide letters
        f"{'x' * 200}              -",
    ]
    assert render_table([("a", "b"), ("1", "long"), ("22", "")], left=2) == "a   b\n--------\n1   long\n22"


def test_a_report_is_read_from_the_whole_file_or_refused() -> None:
    whole = {"version": 1, "name": "slim", "report": WHOLE.to_dict(), "card": {}, "files": []}
    assert SlimReport.from_dict(whole) == WHOLE
    lacking = "parameters_before, parameters_after, bytes_before, bytes_after, structures"
    for given, what in (({"version": 1}, f"lacks {lacking}"), ({"report": 3}, "is a int"), ([], "is a list")):
        with pytest.raises(ValueError, match=f"takes what to_dict gave, or the content of .*json; this {what}"):
            SlimReport.from_dict(given)
    with pytest.raises(ValueError, match="is no report of this version: .* unexpected keyword argument 'more'"):
        SlimReport.from_dict(WHOLE.to_dict() | {"more": 1})
    with pytest.raises(ValueError, match="is no report of this version: .* 'wide'"):
        SlimReport.from_dict(WHOLE.to_dict() | {"structures": [{"wide": 1}]})


def test_a_notebook_says_which_costs_are_not_known() -> None:
    why = "The latency is not known: <it> took long."
    assert "<p>The latency is not known: &lt;it&gt; took long.</p>" in replace(WHOLE, missing=why)._repr_html_()
    assert SlimReport.from_dict(replace(WHOLE, missing=why).to_dict()).missing == why
