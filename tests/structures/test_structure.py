"""Index arithmetic."""

import torch

from hf_slim.structures.structure import Member, Structure, blocks, get_tensor


def test_blocks():
    assert blocks(2, 3, start=4).tolist() == [[4, 5, 6], [7, 8, 9]]


def test_positions_join_the_members_of_a_tensor():
    members = (
        Member("fused.weight", 0, blocks(3, 2), "input"),
        Member("fused.weight", 0, blocks(3, 2, start=6), "input"),
        Member("out.weight", 1, blocks(3, 2), "output"),
    )
    structure = Structure("out", "mha", 3, members)
    where = structure.positions(torch.tensor([False, True, False]))
    assert {place: positions.tolist() for place, positions in where.items()} == {
        ("fused.weight", 0): [2, 3, 8, 9],
        ("out.weight", 1): [2, 3],
    }
    assert structure.outputs == members[2:]


def test_get_tensor():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    assert get_tensor(module, "0.running_mean") is module[0].running_mean
    assert get_tensor(module[0], "weight") is module[0].weight
