"""Plots by matplotlib, and what is said where it is not there."""

import sys

import pytest
from matplotlib.figure import Figure

from hf_slim import SlimReport, plot_training
from hf_slim.saving.layer_bars import StructureSize

SIZES = tuple(
    StructureSize(f"layers.{n}.{name}", kind, before, before - n - 1)
    for n in range(3)
    for name, kind, before in (("mlp", "ffn", 64), ("attention", "mha", 8))
)
REPORT = SlimReport(2, 1, 8, 4, SIZES)
LOG = [
    {"step": 2, "loss": 3.0, "ffn2_sparsity": 0.0, "mha_sparsity": 0.0},
    {"step": 4, "loss": 2.0, "ffn2_sparsity": 0.25, "mha_sparsity": 0.1},
    {"step": 4, "eval_loss": 2.5},
    {"step": 6, "loss": 1.0, "ffn2_sparsity": 0.5, "mha_sparsity": 0.2},
    {"step": 6, "train_runtime": 1.0, "train_loss": 2.0},
]


def curves(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines}


def test_a_report_is_plotted_with_the_dense_outline_behind_it():
    figure = REPORT.plot()
    assert isinstance(figure, Figure) and list(figure.get_size_inches()) == [8.3, 4.2]
    assert figure.get_facecolor()[3] == 0 and all(ax.get_facecolor()[3] == 0 for ax in figure.axes)
    heights = [[bar.get_height() for bar in ax.patches] for ax in figure.axes]
    assert heights == [[64, 64, 64, 63, 62, 61], [8, 8, 8, 7, 6, 5]]
    assert [ax.get_title("left") for ax in figure.axes] == [
        "feed-forward networks: intermediate channels (186 of 192 kept, 97%)",
        "attention: heads or key-value groups (18 of 24 kept, 75%)",
    ]
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 12, 13])
def test_twelve_layers_fill_the_width_and_fewer_are_no_wider(count):
    sizes = tuple(StructureSize(f"layers.{n}.mlp", "ffn", 64, 32) for n in range(count))
    (ax,) = SlimReport(2, 1, 8, 4, sizes).plot().axes
    assert ax.get_xlim() == (-0.5, max(count, 12) - 0.5)
    bars = sorted((bar.get_x(), bar.get_width()) for bar in ax.patches)
    assert bars[0] == pytest.approx((-0.39, 0.78)) and bars[-1][0] == pytest.approx(count - 1.39)


def test_without_structures_there_is_nothing_to_plot():
    with pytest.raises(
        ValueError, match="^SlimReport.plot: the report has no structures, so there is nothing to plot"
    ):
        SlimReport(2, 1, 8, 4, ()).plot()


def test_loss_and_sparsity_are_plotted_over_the_steps():
    top, bottom = plot_training(LOG).axes
    assert curves(top) == {"training loss": [[2, 3], [4, 2], [6, 1]], "evaluation loss": [[4, 2.5]]}
    assert curves(bottom) == {
        "intermediate channels": [[2, 0], [4, 25], [6, 50]],
        "heads or key-value groups": [[2, 0], [4, 10], [6, 20]],
    }
    assert bottom.get_ylim() == (0, 100) and bottom.get_xlabel() == "step"


def test_a_dense_training_has_no_sparsities():
    top, bottom = plot_training([{"step": 1, "loss": 1.0}]).axes
    assert len(top.lines) == 1 and not bottom.lines


def test_without_a_loss_there_is_nothing_to_plot():
    with pytest.raises(ValueError, match="^The log history holds no loss, so there is nothing to plot: give trainer"):
        plot_training([{"step": 6, "train_runtime": 1.0}])


@pytest.mark.parametrize(
    ("name", "plot"), [("SlimReport.plot", REPORT.plot), ("plot_training", lambda: plot_training(LOG))]
)
def test_without_matplotlib_the_error_names_the_extra(name, plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=f"^{name} needs matplotlib: `pip install matplotlib`, .* extra `plot`"):
        plot()
