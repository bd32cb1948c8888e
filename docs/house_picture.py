"""The picture of the rooms: their modules, in the order of the layers, and which room imports which."""

from __future__ import annotations

from itertools import accumulate, cycle
from pathlib import Path
from textwrap import wrap
from typing import Any

from house_code import LAYERS, PACKAGE, find_imports, find_levels, find_room_imports, room_of

_WIDTH, _EDGE = 900, 620
"""Of the picture, and where the boxes end; the lines are beside them."""
_LETTERS = 92
"""Of a line of text in a box."""
_MOST = 20
"""Imports from which on lines do not get thicker."""
_COLOURS = (
    "#0072b2",
    "#c44e00",
    "#00805e",
    "#a0438a",
    "#7a6200",
    "#3f51b5",
    "#b03060",
    "#4d7c0f",
    "#00798a",
    "#6d4c41",
)
_TEXT, _QUIET, _FRAME, _FILL = "#1f2328", "#59636e", "#8a94a0", "#f4f6f8"


def draw_rooms(root: Path, file: Path) -> None:
    """Draw the rooms, each with the names of its modules, and lines from each to those that it imports.

    The lines to one room share a colour and a lane, and are the thicker the more imports there are. They lead up; one
    that leads down, against the order, is dashed.

    Args:
        root: The checkout.
        file: The picture, an .svg or a .png; the same code gives the same file.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rooms = find_room_imports(root)
    levels = find_levels({room: set(targets) for room, targets in rooms.items()})
    order = sorted(rooms, key=lambda room: (levels[room], room))
    if rooms.keys() <= set(LAYERS):
        order = [room for room in LAYERS if room in rooms]
    imported = [room for room in order if any(room in targets for targets in rooms.values())]
    texts = {room: _list_modules(root, room) for room in order}
    heights = [max(28 + 15 * len(texts[r]), 9 * (len(rooms[r]) + (r in imported)) + 9) for r in order]
    tops = dict(zip(order, accumulate((height + 9 for height in heights), initial=12), strict=False))
    entries = {room: tops[room] + height - 9 for room, height in zip(order, heights, strict=True)}
    total = entries[order[-1]] + 46
    lanes = {room: _WIDTH - 16 - n * (_WIDTH - _EDGE - 36) / len(imported) for n, room in enumerate(imported)}
    colours = dict(zip(imported, cycle(_COLOURS), strict=False))
    fonts = {"svg.fonttype": "none", "svg.hashsalt": PACKAGE, "font.family": "sans-serif"}
    with rc_context(fonts):
        figure = Figure((_WIDTH / 100, total / 100), dpi=100, facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(total, 0))
        axes.axis("off")
        for room, height in zip(order, heights, strict=True):
            _draw_box(axes, room, tops[room], height, colours.get(room, _TEXT), texts[room])
        for room in imported:
            lines: list[tuple[float, int]] = []
            for importer in (other for other in order if room in rooms[other]):
                nearest_first = sorted(rooms[importer], key=order.index, reverse=True)
                port = tops[importer] + 9 + 9 * nearest_first.index(room)
                lines.append((port, min(rooms[importer][room], _MOST)))
            _draw_lines(axes, lines, lanes[room], entries[room], colours[room])
        _draw_legend(axes, total - 16)
        figure.savefig(file, dpi=200, metadata={"Date": None, "Creator": None} if file.suffix == ".svg" else None)


def _list_modules(root: Path, room: str) -> list[str]:
    """The names of the modules of a room as lines of text, with a paragraph for each folder in it."""
    folders: dict[str, list[str]] = {"": []}
    for module in sorted(find_imports(root)):
        folder, *inner = module.removeprefix(f"{PACKAGE}.{room}.").split(".")
        if room_of(module) == room and module != f"{PACKAGE}.{room}":
            names = folders.setdefault(folder if inner else "", [])
            names.append(inner[-1] if inner else folder)
    folders[""] = [name for name in folders[""] if name not in folders]  # an `__init__.py` goes without saying
    lines = []
    for folder, names in folders.items():
        lines += wrap(f"{folder}: {', '.join(names)}" if folder else ", ".join(names), _LETTERS)
    return lines if room != PACKAGE else []


def _draw_box(axes: Any, room: str, top: float, height: float, colour: str, texts: list[str]) -> None:
    from matplotlib.patches import FancyBboxPatch

    style: dict[str, Any] = {
        "boxstyle": "round,pad=0,rounding_size=5",
        "facecolor": _FILL,
        "edgecolor": _FRAME,
        "linewidth": 0.8,
    }
    axes.add_patch(FancyBboxPatch((12, top), _EDGE - 12, height, **style))
    title = "__init__" if room == PACKAGE else room
    axes.text(24, top + 18, title, size=9.5, weight="bold", color=colour)
    for number, text in enumerate(texts):
        axes.text(24, top + 34 + 15 * number, text, size=8, color=_TEXT)


def _draw_lines(axes: Any, lines: list[tuple[float, int]], lane: float, entry: float, colour: str) -> None:
    """Draw the lines to one room: out of the importers at their ports, along the lane, into the room at its entry."""
    from matplotlib.patches import PathPatch, Polygon
    from matplotlib.path import Path as Curve

    for is_line in (False, True):  # white below, so that lines are seen to cross
        for port, number in lines:
            bend = 6 if port > entry else -6
            points = [(_EDGE + 1.5, port), (lane - 6, port), (lane, port), (lane, port - bend)]
            points += [(lane, entry + bend), (lane, entry), (lane - 6, entry), (_EDGE + 8, entry)]
            curve = Curve(points, [Curve.MOVETO, Curve.LINETO, *2 * (Curve.CURVE3, Curve.CURVE3, Curve.LINETO)][:8])
            style = "--" if bend < 0 and is_line else "-"
            width = 0.8 + 0.2 * number + (0 if is_line else 2)
            look = {"linewidth": width, "linestyle": style, "edgecolor": colour if is_line else "white"}
            axes.add_patch(PathPatch(curve, fill=False, capstyle="butt", **look))
    tip = [(_EDGE + 1, entry), (_EDGE + 10, entry - 4.5), (_EDGE + 10, entry + 4.5)]
    axes.add_patch(Polygon(tip, facecolor=colour, linewidth=0))


def _draw_legend(axes: Any, y: float) -> None:
    axes.text(12, y, "A line leads from a room to one that it imports. Imports:", size=8, color=_QUIET)
    for number, x in ((1, 400), (5, 460), (10, 520), (_MOST, 580)):
        axes.plot((x, x + 24), (y - 4, y - 4), color=_QUIET, linewidth=0.8 + 0.2 * number, solid_capstyle="butt")
        axes.text(x + 29, y, f"{number}{'+' * (number == _MOST)}", size=8, color=_QUIET)
