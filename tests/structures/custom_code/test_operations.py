"""Operations of torch on units."""

import pytest

from hf_slim.structures.custom_code.axes import Many, Plain, Size, Units, UnreadableError
from hf_slim.structures.custom_code.operations import apply_operation, shape_of

X, HEADS, FUSED = Units(-1, 3), Units(-3, 4), Units(-1, 3, 2)


def apply(name, *values, **named):
    return apply_operation(name, list(values), named, {8})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: apply("gelu", X), X),
        (lambda: apply("mul", X, Units(-1, 3)), X),
        (lambda: apply("glu", FUSED), X),
        (lambda: apply("chunk", FUSED, Plain(2), dim=Plain(-1)), (X, X)),
        (lambda: apply("split", X, Plain(4), dim=Plain(1)), Many(X)),
        (lambda: apply("softmax", HEADS, dim=Plain(-1)), HEADS),
        (lambda: apply("sum", HEADS, Plain(-1)), Units(-2, 3)),
        (lambda: apply("mean", HEADS, (Plain(-1), Plain(-2)), keepdim=Plain(True)), HEADS),
        (lambda: apply("norm", HEADS, Plain(2), Plain(-1)), Units(-2, 3)),
        (lambda: apply("max", HEADS, Plain(-1)), (Units(-2, 3), Units(-2, 3))),
        (lambda: apply("matmul", HEADS, other=HEADS), HEADS),
        (lambda: apply("scaled_dot_product_attention", HEADS, HEADS, HEADS, attn_mask=Plain()), HEADS),
        (lambda: apply("scaled_dot_product_attention", query=HEADS, key=HEADS, value=HEADS), HEADS),
        (lambda: apply("cat", (X, X), dim=Plain(1)), X),
        (lambda: apply("stack", (X, X), Plain(-1)), Units(-2, 4)),
        (lambda: apply("einsum", Plain("bhqd,bhkd->bhqk"), HEADS, HEADS), HEADS),
        (lambda: apply("view", X, Plain(), Plain(), Size(), Plain(8)), Units(-2, 4)),
        (lambda: apply("view", X, (Plain(), Plain(), Plain(-1), Plain(8))), Units(-2, 4)),
        (lambda: apply("unflatten", X, Plain(-1), (Plain(-1), Plain(8))), Units(-2, 4)),
        (lambda: apply("transpose", HEADS, Plain(1), Plain(2)), Units(-2, 4)),
        (lambda: apply("permute", HEADS, Plain(0), Plain(2), Plain(1), Plain(3)), Units(-2, 4)),
        (lambda: apply("flatten", Units(-2, 4), end_dim=Plain(-1), start_dim=Plain(-2)), X),
        (lambda: apply("unbind", HEADS, dim=Plain(0)), Many(Units(-3, 3))),
        (lambda: apply("repeat_interleave", HEADS, Plain(2), dim=Plain(1)), HEADS),
        (lambda: apply("new_zeros", X, (Plain(), Size()), dtype=Plain()), Units(-1, 2)),
        (lambda: apply("expand", Plain(), Plain(2), Size()), Units(-1, 2)),
        (lambda: apply("size", X, Plain(-1)), Size()),
        (lambda: apply("size", X), (Plain(), Plain(), Size())),
        (lambda: apply("numel", X), Size()),
        (lambda: apply("zeros_like", X), X),
        (lambda: shape_of(X, 0), Plain()),
    ],
)
def test_units_are_treated_by_themselves(found, expected):
    assert found() == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: apply("softmax", X, dim=Plain(-1)), "goes over the dimension along which the units lie"),
        (lambda: apply("sum", X), "calls sum over all units together"),
        (lambda: apply("sum", X, Plain()), "goes along a dimension that is not written in the code"),
        (lambda: apply("sort", Plain(), Plain(1)), "calls sort in a way that is not known"),
        (lambda: apply("fft", X), "calls fft, of which it is not known that it treats units by themselves"),
        (lambda: apply("add", X, Plain()), "combines units with a tensor that may have a value for each of them"),
        (lambda: apply("scaled_dot_product_attention", X, X, X), "attends along the dimension of the heads"),
        (lambda: apply("cat", (X, X), Plain(-1)), "joins tensors along the dimension of the units"),
        (lambda: apply("cat", Plain()), "calls cat in a way that is not known"),
        (lambda: apply("einsum", Plain("bhd,bhe->bde"), Units(-2, 3), Units(-2, 3)), "mixes units by einsum"),
        (lambda: apply("einsum", Plain("...d,de->...e"), X, X), "calls einsum in a way that is not known"),
        (lambda: apply("chunk", X, Plain(2), Plain(-1)), "splits the units"),
        (
            lambda: apply("unflatten", X, Plain(1), (Plain(2), Plain(2))),
            "splits a dimension in a way that is not known",
        ),
        (lambda: apply("repeat_interleave", X, Plain(2)), "repeats the units"),
        (lambda: apply("layer_norm", X, (Plain(),)), "normalizes units together"),
        (lambda: apply("tril", X), "takes a triangle of units"),
        (lambda: apply("new_zeros", X, Size(), Size()), "several sizes that depend on how many units there are"),
        (lambda: shape_of(Units(-1)), "reads the shape of a tensor of which the rank is not known"),
    ],
)
def test_what_may_mix_units_is_refused(call, reason):
    with pytest.raises(UnreadableError, match=reason):
        call()
