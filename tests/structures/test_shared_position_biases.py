"""Blocks that share an attention bias are one structure."""

import torch
from conftest import build
from torch import nn

from hf_slim.structures.shared_position_biases import join_blocks, join_by_tables, name_in_stack
from hf_slim.structures.structure import Count, Discovery, Member, Skipped, Structure, blocks


def attention(name, heads=2, kind="mha"):
    members = (
        Member(f"{name}.q.weight", 0, blocks(heads, 2), "input"),
        Member(f"{name}.o.weight", 1, blocks(heads, 2), "output"),
    )
    return Structure(name if "*" in name else f"{name}.o", kind, heads, members, (Count(name, "heads", 1),), (name,))


class Stack(nn.Module):
    """Two blocks of attention and a table for each of its heads beside them."""

    def __init__(self, heads=2):
        super().__init__()
        self.num_heads = heads
        self.relative_attention_bias = nn.Embedding(5, heads)
        self.block = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "o": nn.Linear(4, 4)}) for _ in range(2))


def test_a_name_stands_for_all_blocks_of_the_nearest_model():
    model = build("t5")
    assert name_in_stack(model, "encoder.block.1.layer.0.SelfAttention.o") == "encoder.block.*.layer.0.SelfAttention.o"
    assert name_in_stack(model, "lm_head") == "lm_head"
    assert name_in_stack(nn.ModuleDict({"3": nn.ModuleDict({"o": nn.Linear(1, 1)})}), "3.o") == "*.o"


def test_blocks_of_one_name_are_joined():
    first, second, other = attention("a.*.o"), attention("a.*.o"), attention("c")
    found = join_blocks(Discovery((first, other, second), (Skipped("x", "ffn", "y"),)))
    assert found.skipped == (Skipped("x", "ffn", "y"),)
    assert found.structures[0] is other
    joined = found.structures[1]
    assert (joined.name, joined.units, joined.reshaping) == ("a.*.o", 2, ("a.*.o", "a.*.o"))
    assert joined.members == (*first.members, *second.members)
    assert joined.counts == (*first.counts, *second.counts)


def test_blocks_with_different_numbers_of_heads_are_skipped():
    found = join_blocks(Discovery((attention("a.*.o", 2), attention("a.*.o", 3))))
    assert found == Discovery(
        (), (Skipped("a.*.o", "mha", "blocks that share one attention bias differ in their numbers of heads"),)
    )


def test_a_table_beside_the_blocks_joins_them():
    parts = (attention("block.0"), attention("block.1"))
    ffn = attention("block.0.mlp", kind="ffn")
    found = join_by_tables(Stack(), Discovery((*parts, ffn)))
    assert found.skipped == () and found.structures[0] is ffn
    joined = found.structures[1]
    assert joined.name == "block.*.o"
    table = joined.members[-1]
    assert (table.tensor, table.dim, table.role) == ("relative_attention_bias.weight", 1, "extra")
    assert table.index.tolist() == [[0], [1]]
    assert joined.counts == (Count("block.0", "heads", 1), Count("block.1", "heads", 1), Count("", "num_heads", 1))


def test_a_table_of_another_size_is_a_reason_to_leave_them_alone():
    found = join_by_tables(Stack(3), Discovery((attention("block.0"), attention("block.1"))))
    reason = "the table relative_attention_bias.weight has not one position for each of its heads"
    assert found == Discovery((), (Skipped("block.*.o", "mha", reason),))


def test_a_table_that_a_structure_owns_joins_nothing():
    part = attention("block.0")
    own = Member("relative_attention_bias.weight", 1, blocks(2, 1), "extra")
    part = Structure(part.name, "mha", 2, (*part.members, own))
    assert join_by_tables(Stack(), Discovery((part,))).structures == (part,)


class Biased(nn.Module):
    """Attention that is given a bias which nothing known makes."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, position_bias):
        return torch.add(x, position_bias)


def test_a_bias_from_nowhere_is_a_reason_to_leave_it_alone():
    (skipped,) = join_by_tables(nn.ModuleDict({"a": Biased()}), Discovery((attention("a"),))).skipped
    assert (skipped.name, skipped.kind) == ("a", "mha")
    assert skipped.reason.startswith("its forward is given position_bias, which no known layout makes")
