"""Plots by matplotlib: what each layer keeps, and loss and sparsity over a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..structures import Kind
from .layer_bars import BAR, COLORS, INK, OUTLINE, Panel, StructureSize, lay_out_bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOSSES = {"loss": "#2f9e6e", "eval_loss": "#a05bc4"}
_WIDTH = 8.3  # inches, at 100 dots each as wide as the README of a repository


def plot_layers(structures: Sequence[StructureSize]) -> Figure:
    """Plot what each layer keeps, with the outline of what it had behind it; see `SlimReport.plot`."""
    panels = lay_out_bars(structures)
    if not panels:
        raise ValueError("SlimReport.plot: the report has no structures, so there is nothing to plot.")
    figure, axes = _make_figure("SlimReport.plot", len(panels), 2.1)
    for panel, ax in zip(panels, axes, strict=True):
        _draw_panel(ax, panel)
    return figure


def plot_training(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the losses and the sparsity in force over the steps of a training.

    Args:
        log_history: What a `Trainer` has logged: `trainer.state.log_history`, or that of a `trainer_state.json`.

    Returns:
        A matplotlib figure, which a notebook shows and `savefig` writes; its background is transparent, and its
        colours are readable on a light page and a dark one.

    Raises:
        ImportError: If matplotlib is not there.
        ValueError: If there are no losses in it.
    """
    curves = {
        name: [(entry["step"], entry[name]) for entry in log_history if name in entry]
        for name in ("loss", "eval_loss", "ffn2_sparsity", "mha_sparsity")
    }
    if not curves["loss"] and not curves["eval_loss"]:
        raise ValueError(
            "The log history holds no loss, so there is nothing to plot: give trainer.state.log_history after "
            "training, with logging_steps small enough that something was logged."
        )
    figure, (top, bottom) = _make_figure("plot_training", 2, 2.0, sharex=True)
    for name, label in (("loss", "training loss"), ("eval_loss", "evaluation loss")):
        if curves[name]:
            marker = "o" if name == "eval_loss" or len(curves[name]) == 1 else None
            top.plot(*zip(*curves[name], strict=True), color=_LOSSES[name], label=label, marker=marker, markersize=4)
    sparsities: tuple[tuple[Kind, str, str], ...] = (
        ("ffn", "ffn2_sparsity", "intermediate channels"),
        ("mha", "mha_sparsity", "heads or key-value groups"),
    )
    for kind, name, label in sparsities:
        if curves[name]:
            steps, values = zip(*curves[name], strict=True)
            share = [100 * value for value in values]
            bottom.plot(steps, share, color=COLORS[kind], label=label, drawstyle="steps-post")
    top.set_ylabel("loss", color=INK)
    bottom.set_ylabel("removed, %", color=INK)
    bottom.set_ylim(0, 100)
    bottom.set_xlabel("step", color=INK)
    for ax in (top, bottom):
        if ax.lines:
            ax.legend(frameon=False, labelcolor=INK, fontsize=9, loc="best")
    return figure


def _draw_panel(ax: Axes, panel: Panel) -> None:
    """Solid bars of what is kept in front of the outlines of what there was."""
    from matplotlib.colors import to_rgb

    xs = [bar.x for bar in panel.bars]
    dense = [bar.before for bar in panel.bars]
    fill, edge = ((*to_rgb(INK), opacity) for opacity in OUTLINE)
    points = panel.line * 0.72  # of which an inch has 72
    ax.bar(xs, dense, BAR, facecolor=fill, edgecolor=edge, linewidth=points)
    ax.bar(xs, [bar.after for bar in panel.bars], BAR, color=COLORS[panel.kind])
    ax.set_title(panel.title, loc="left", fontsize=10, color=INK)
    ax.set_xlim(panel.start, panel.end)
    ax.set_ylim(0, panel.highest * 1.02)  # or half of the outline would be cut off
    ax.set_yticks(panel.scale, [f"{units:,}" for units in panel.scale])
    ax.set_xticks([x for x, _ in panel.ticks], [text for _, text in panel.ticks])
    for group in panel.groups:
        if group.label:
            ax.annotate(
                group.label,
                ((group.start + group.end) / 2, 0),
                xytext=(0, -22),
                xycoords="data",
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8,
                color=INK,
                annotation_clip=False,
            )


def _make_figure(caller: str, rows: int, height: float, *, sharex: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """A figure with axes below each other, in mid-tones on nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib: `pip install matplotlib`, or install hf_slim with its extra `plot`."
        ) from error

    class Picture(Figure):
        """A figure that a notebook shows, also where no backend was chosen."""

        def _repr_png_(self) -> bytes:
            from io import BytesIO

            data = BytesIO()
            self.savefig(data, format="png", dpi=200)
            return data.getvalue()

    figure = Picture(figsize=(_WIDTH, height * rows), layout="constrained", facecolor="none")
    axes = list(figure.subplots(rows, 1, squeeze=False, sharex=sharex)[:, 0])
    for ax in axes:
        ax.set_facecolor("none")
        ax.tick_params(colors=INK, labelsize=9)
        ax.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
    return figure, axes
