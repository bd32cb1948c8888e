"""The picture of the layers that the card holds."""

from xml.etree import ElementTree

from hf_slim.saving.layer_bars import StructureSize
from hf_slim.saving.layer_svg import draw_layers

SVG = "{http://www.w3.org/2000/svg}"


def test_bars_are_as_high_as_units_are_kept_within_the_outline_of_what_there_was():
    structures = [
        StructureSize("encoder.0.mlp", "ffn", 400, 100),
        StructureSize("decoder.0.mlp", "ffn", 200, 200),
        StructureSize("encoder.0.attention", "mha", 3, 1),
    ]
    root = ElementTree.fromstring(draw_layers(structures))
    bars = [(float(bar.get("height")), bar.get("fill")) for bar in root.iter(f"{SVG}rect")]
    assert bars == [
        *[(130, None), (32.5, "#3b82d6"), (65, None), (65, "#3b82d6")],
        *[(130, None), (43.3, "#d9772b")],
    ]
    assert root.get("viewBox") == f"0 0 830 {28 + 130 + 46 + 28 + 130 + 30}"
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts == [
        "feed-forward networks: intermediate channels (300 of 600 kept, 50%)",
        *["0", "200", "400", "0", "0", "encoder", "decoder"],
        "attention: heads or key-value groups (1 of 3 kept, 33%)",
        *["0", "1", "3", "0", None],
    ]


def test_twelve_bars_fill_the_width():
    structures = [StructureSize(f"layers.{n}.mlp", "ffn", 4, 2) for n in range(12)]
    for count in (12, 1):
        root = ElementTree.fromstring(draw_layers(structures[:count]))
        bars = [(bar.get("x"), bar.get("width")) for bar in root.iter(f"{SVG}rect")]
        step = (830 - 56) / 12
        assert bars[0] == bars[1] == (f"{56 + 0.11 * step:.1f}", f"{0.78 * step:.1f}")
        assert bars[-1][0] == f"{56 + (count - 1 + 0.11) * step:.1f}"


def test_names_are_escaped():
    ElementTree.fromstring(draw_layers([StructureSize("<&'>.mlp", "ffn", 2, 1), StructureSize("b.mlp", "ffn", 2, 1)]))


def test_without_structures_the_picture_is_empty():
    root = ElementTree.fromstring(draw_layers([]))
    assert root.get("height") == "0" and not list(root.iter(f"{SVG}rect"))
