"""The tables of `hf-slim bench`, to the letter, and its plot."""

from hf_slim.bench.tables import draw_speed_up, find_growth, format_markdown, format_text

PNG = b"\x89PNG\r\n\x1a\n"
WHO = {"model": "gpt2", "layers": 12, "sparsity": "0.8,0.6"}
SIZE = {**WHO, "batch_size": 8, "sequence_length": 128}
SPEED_UP = {"speed_up": 2.5, "ideal": 2.95, "fraction": 0.8475}
STEP = {**SIZE, "ms": 8.26, "against_plain": 0.40001, "extra_ms": 0.1234, "extra": 0.01, "extra_most": 0.025}
TIMES = ("first_parse", "parse", "score", "read", "compact", "save_dense", "save_slim", "save_slimmed")
LOADS = ("load_dense", "load_slim", "load_read_dense", "load_read_slim")
RESULTS = {
    "train": [
        {**STEP, "step": "live", **SPEED_UP},
        {**STEP, "step": "plain", "speed_up": 1.0, "ideal": None, "fraction": None},
    ],
    "run": [{**SIZE, "steps": 100, "dense_s": 12.34, "slim_s": 6.78, **SPEED_UP}],
    "inference": [
        {
            **{**SIZE, "dense_ms": 5.678, "slim_ms": 2.345, "stock_ms": 2.3, "stock_from": "config"},
            **{"slim_over_stock": 1.0196, "dense_flops": 12_345_678_901, "slim_flops": 1_234_567, **SPEED_UP},
        }
    ],
    "times": [
        {
            **{**WHO, "parameters": 124_000_000, "slim_parameters": 61_000, "compact_over_read": 1.234},
            **{f"{name}_s": 0.0123456 for name in (*TIMES, *LOADS)},
            **{"load_ratio": 0.5, "load_read_ratio": 0.5554, "share": 0.4996},
        }
    ],
    "memory": [
        {**SIZE, "what": "plain step", "peak_bytes": 123_456_789, "ratio": 1.0, "against": "plain step"},
        {**SIZE, "what": "compact", "peak_bytes": None, "ratio": None, "against": "dense model"},
    ],
    "growth": [
        {**WHO, "cost": "parse", "ms": 3.14159, "ms_per_layer": 0.2618, "ratio": 1.0},
    ],
}


def test_text():
    assert format_text({part: RESULTS[part] for part in ("train", "memory")}) == (
        "Train steps\n\n"
        "model  layers  FFN2,MHA  batch  length   step   ms  / plain  extra, ms  extra, %  at most, %  speed-up  ideal"
        "  reached\n" + "-" * 118 + "\n"
        "gpt2   12      0.8,0.6       8     128   live  8.3    0.400       0.12      1.00        2.50      2.50   2.95"
        "      85%\n"
        "gpt2   12      0.8,0.6       8     128  plain  8.3    0.400       0.12      1.00        2.50      1.00      -"
        "        -\n\n"
        "Peak memory\n\n"
        "model  layers  FFN2,MHA  batch  length        what  peak, MB   ratio           to\n" + "-" * 81 + "\n"
        "gpt2   12      0.8,0.6       8     128  plain step     123.5  1.0000   plain step\n"
        "gpt2   12      0.8,0.6       8     128     compact         -       -  dense model"
    )


def test_markdown():
    head, rule = "| model | layers | FFN2,MHA |", "| --- | ---: | --- |"
    size = " batch | length |"
    assert format_markdown({**RESULTS, "train": []}) == "\n".join(
        [
            "## Fine-tuning runs\n",
            f"{head}{size} steps | dense, s | slim, s | speed-up | ideal | reached |",
            f"{rule} ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            "| gpt2 | 12 | 0.8,0.6 | 8 | 128 | 100 | 12.3 | 6.8 | 2.50 | 2.95 | 85% |\n",
            "## Inference\n",
            f"{head}{size} dense, ms | slim, ms | stock, ms | stock from | slim / stock | dense, GFLOPs | slim, GFLOPs"
            " | speed-up | ideal | reached |",
            f"{rule} ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            "| gpt2 | 12 | 0.8,0.6 | 8 | 128 | 5.68 | 2.35 | 2.30 | config | 1.020 | 12.346 | 0.001 | 2.50 | 2.95 "
            "| 85% |\n",
            "## Parsing, scoring, compacting\n",
            f"{head} parameters | slim | first parse, ms | parse, ms | score, ms | read weights, ms | compact, ms"
            " | compact / read |",
            f"{rule} ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            "| gpt2 | 12 | 0.8,0.6 | 124,000,000 | 61,000 | 12.3 | 12.3 | 12.35 | 12.3 | 12.3 | 1.23 |\n",
            "## Saving, loading\n",
            f"{head} save dense, ms | save slim, ms | save_slimmed, ms | load dense, ms | load slim, ms | slim / dense"
            " | load and read dense, ms | load and read slim, ms | slim / dense | share of bytes |",
            f"{rule} ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            "| gpt2 | 12 | 0.8,0.6 | 12 | 12 | 12 | 12.3 | 12.3 | 0.500 | 12.3 | 12.3 | 0.555 | 0.500 |\n",
            "## Peak memory\n",
            f"{head}{size} what | peak, MB | ratio | to |",
            f"{rule} ---: | ---: | --- | ---: | ---: | --- |",
            "| gpt2 | 12 | 0.8,0.6 | 8 | 128 | plain step | 123.5 | 1.0000 | plain step |",
            "| gpt2 | 12 | 0.8,0.6 | 8 | 128 | compact | - | - | dense model |\n",
            "## Growth with the number of layers\n",
            "| model | FFN2,MHA | cost | layers | ms | ms a layer | a layer / that at the fewest |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: |",
            "| gpt2 | 0.8,0.6 | parse | 12 | 3.14 | 0.2618 | 1.00 |\n",
        ]
    )


def test_growth_is_that_of_a_layer():
    costs = ("first_parse_s", "parse_s", "score_s", "compact_s", "save_slimmed_s", "load_slim_s")
    times = [
        {"model": "m", "sparsity": "0.5,0", "layers": layers, **dict.fromkeys(costs, seconds)}
        for layers, seconds in ((12, 0.9), (6, 0.3))
    ]
    step = {"model": "m", "sparsity": "0.5,0", "step": "masked", "batch_size": 8, "sequence_length": 128}
    train = [{**step, "layers": 6, "extra_ms": 3}, {**step, "layers": 12, "extra_ms": 6}]
    growth = find_growth({"times": times, "train": train})
    assert [(r["cost"], r["layers"], r["ms"]) for r in growth[2:4]] == [("parse", 6, 300), ("parse", 12, 900)]
    assert [(r["ms_per_layer"], r["ratio"]) for r in growth[2:4]] == [(50, 1), (75, 1.5)]
    assert growth[-1] == {
        "model": "m",
        "sparsity": "0.5,0",
        "cost": "extra of a masked step, 8 x 128",
        "layers": 12,
        "ms": 6,
        "ms_per_layer": 0.5,
        "ratio": 1,
    }
    assert find_growth({"times": times[:1]}) == []


def test_the_plot_is_drawn(tmp_path):
    draw_speed_up(RESULTS, {("gpt2", 12, "0.8,0.6"): 0.7}, tmp_path / "speedup.png")
    assert (tmp_path / "speedup.png").read_bytes().startswith(PNG)
