"""The table and the file of a comparison."""

import json

from hf_slim.cli.comparison import Comparison, ModelFigures

DENSE = ModelFigures({"pearson": 0.94944, "loss": 0.196}, 818_689, 3_274_756, 28.561)
MASKED = ModelFigures({"pearson": 0.94891, "loss": 0.1984}, 818_689, 3_274_756, 28.414)
SLIMMED = ModelFigures({"pearson": float("nan"), "loss": 0.1984}, 423_681, 1_694_724, 16.52)


def test_comparison_prints_side_by_side():
    assert str(Comparison(DENSE, MASKED, SLIMMED, "out/my slim", "regression")) == (
        "                dense   masked  slimmed\n"
        "---------------------------------------\n"
        "pearson        0.9494   0.9489      nan\n"
        "loss           0.1960   0.1984   0.1984\n"
        "parameters    818,689  818,689  423,681\n"
        "megabytes         3.3      3.3      1.7\n"
        "latency (ms)    28.56    28.41    16.52\n"
        "\n"
        "The slim model lies in out/my slim. Next:\n"
        "\n"
        '  python -c "import hf_slim; from transformers import pipeline; '
        "print(pipeline('text-classification', 'out/my slim')('some text'))\"\n"
        "  hf-slim push 'out/my slim' USER/NAME"
    )


def test_comparison_is_saved_as_strict_json(tmp_path):
    Comparison(DENSE, MASKED, SLIMMED, "out/slim", "regression").save(tmp_path / "comparison.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=refuse)
    assert list(content) == ["dense", "masked", "slimmed", "slim_model", "task"]
    assert content["dense"] == {
        "metrics": {"pearson": 0.94944, "loss": 0.196},
        "parameters": 818_689,
        "bytes": 3_274_756,
        "latency_ms": 28.561,
    }
    assert content["slimmed"]["metrics"] == {"pearson": None, "loss": 0.1984}
