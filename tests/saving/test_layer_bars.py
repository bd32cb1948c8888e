"""Where the bars of the layers stand, and what is written below them."""

from hf_slim.saving.layer_bars import Bar, Group, StructureSize, lay_out_bars


def sizes(pattern, count, kind="ffn", before=100):
    return [StructureSize(pattern.format(n), kind, before, before - n) for n in range(count)]


def test_each_kind_has_a_panel_with_a_bar_for_each_structure():
    ffn, mha = lay_out_bars([*sizes("layers.{}.self_attn.o_proj", 2, "mha", 5), *sizes("layers.{}.mlp", 3)])
    assert ffn.bars == (Bar(0, 100, 100), Bar(1, 100, 99), Bar(2, 100, 98))
    assert ffn.ticks == ((0, "0"), (1, "1"), (2, "2")) and ffn.groups == (Group(0, 2, ""),)
    assert ffn.title == "feed-forward networks: intermediate channels (297 of 300 kept, 99%)"
    assert (mha.kind, mha.highest, mha.scale) == ("mha", 5, [0, 2, 5])
    assert mha.title == "attention: heads or key-value groups (9 of 10 kept, 90%)"


def test_a_panel_has_room_for_twelve_bars_and_its_outlines_grow_thin():
    for count, end, line in ((2, 11.5, 0.8), (12, 11.5, 0.8), (80, 79.5, 0.3)):
        (panel,) = lay_out_bars(sizes("layers.{}.mlp", count))
        assert (panel.start, panel.end, panel.line) == (-0.5, end, line)


def test_stacks_are_groups_named_by_what_sets_them_apart():
    structures = [
        *sizes("encoder.block.{}.layer.0.SelfAttention.o", 2, "mha"),
        *sizes("decoder.block.{}.layer.0.SelfAttention.o", 2, "mha"),
        *sizes("decoder.block.{}.layer.1.EncDecAttention.o", 2, "mha"),
    ]
    (panel,) = lay_out_bars(structures)
    assert [group.label for group in panel.groups] == [
        *("encoder.SelfAttention", "decoder.SelfAttention", "decoder.EncDecAttention")
    ]
    assert [round(bar.x, 6) for bar in panel.bars] == [0, 1, 3.2, 4.2, 6.4, 7.4]
    assert [text for _, text in panel.ticks] == ["0", "1"] * 3


def test_many_layers_have_few_numbers():
    (panel,) = lay_out_bars(sizes("layers.{}.mlp", 96))
    assert [text for _, text in panel.ticks] == [str(n) for n in range(0, 96, 6)]


def test_the_number_of_a_layer_is_the_one_that_differs():
    (panel,) = lay_out_bars(sizes("towers.1.layers.{}.experts.0", 2))
    assert panel.ticks == ((0, "0"), (1, "1"))
    (panel,) = lay_out_bars(sizes("lone.mlp", 1))
    assert panel.ticks == ((0, "0"),)


def test_without_structures_there_are_no_panels():
    assert lay_out_bars([]) == []
