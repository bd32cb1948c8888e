"""The picture of the layers as SVG, which needs no library: for the model card and for notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from .layer_bars import BAR, COLORS, INK, OUTLINE, Panel, StructureSize, lay_out_bars

_WIDTH, _HEIGHT = 830, 130  # of the picture, as wide as the README of a repository; of the bars of a panel
_LEFT, _TOP = 56, 28  # where the bars of a panel begin
_FONT = "font-family='system-ui, sans-serif' font-size='12'"


def draw_layers(structures: Sequence[StructureSize]) -> str:
    """Draw the units that each layer keeps, with the outline of what it had behind them.

    Args:
        structures: The sizes, in the order of the model's modules.

    Returns:
        The SVG: a panel for each kind of structure, in mid-tones on nothing, so that it is readable on a light page
        and on a dark one.
    """
    drawn: list[str] = []
    y = 0
    for panel in lay_out_bars(structures):
        drawn += _draw_panel(panel, y + _TOP)
        y += _TOP + _HEIGHT + (46 if any(group.label for group in panel.groups) else 30)
    text = "; ".join(panel.title for panel in lay_out_bars(structures))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {y}' width='{_WIDTH}' height='{y}' "
        f"style='max-width: 100%; height: auto' role='img' {_FONT} fill='{INK}'>"
        f"<title>{escape(text)}</title>{''.join(drawn)}</svg>\n"
    )


def _draw_panel(panel: Panel, top: float) -> Iterator[str]:
    bottom = top + _HEIGHT
    step = (_WIDTH - _LEFT) / (panel.end - panel.start)

    def place(x: float) -> float:
        return _LEFT + (x - panel.start) * step

    yield f"<text x='{_LEFT}' y='{top - 12}' font-size='13'>{escape(panel.title)}</text>"
    for units in panel.scale:
        y = bottom - _HEIGHT * units / panel.highest
        opacity = 0.3 if units else 1
        yield f"<path d='M{_LEFT} {y:.1f}H{_WIDTH}' stroke='{INK}' stroke-opacity='{opacity}'/>"
        yield f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{units:,}</text>"
    for bar in panel.bars:
        x, width = place(bar.x - BAR / 2), BAR * step
        before, after = (_HEIGHT * units / panel.highest for units in (bar.before, bar.after))
        yield (
            f"<rect x='{x:.1f}' y='{bottom - before:.1f}' width='{width:.1f}' height='{before:.1f}' "
            f"fill-opacity='{OUTLINE.fill}' stroke='{INK}' stroke-opacity='{OUTLINE.edge}' "
            f"stroke-width='{panel.line:.2g}'/>"
        )
        yield (
            f"<rect x='{x:.1f}' y='{bottom - after:.1f}' width='{width:.1f}' height='{after:.1f}' "
            f"fill='{COLORS[panel.kind]}'/>"
        )
    for x, number in panel.ticks:
        yield f"<text x='{place(x):.1f}' y='{bottom + 16}' text-anchor='middle'>{escape(number)}</text>"
    for group in panel.groups:
        middle = (place(group.start) + place(group.end)) / 2
        yield f"<text x='{middle:.1f}' y='{bottom + 33}' text-anchor='middle'>{escape(group.label)}</text>"
