"""A stranger's modules with the usual child names: odd ones, whose code mixes units, and honest ones, which do not.

Each class is a module of one's own, built from a hidden size. `build_model` puts one into a small model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

HIDDEN, HEADS, WIDTH, VOCAB, LABELS = 32, 4, 48, 60, 3

ODD: dict[str, Callable[[int], nn.Module]] = {}
"""Modules that mix units, each built from a hidden size: none may be slimmed to something else."""
HONEST: dict[str, Callable[[int], nn.Module]] = {}
"""Modules that do not, which have to be slimmed."""
ONLY_PROOF_SEES: frozenset[str] = frozenset()
"""Odd modules that discovery takes, so that only comparing outputs can refuse them."""


def odd(kind: type[nn.Module]) -> type[nn.Module]:
    ODD[kind.__name__] = kind
    return kind


def honest(kind: type[nn.Module]) -> type[nn.Module]:
    HONEST[kind.__name__] = kind
    return kind


class Mlp(nn.Module):
    """The layers of a feed-forward network, with the usual names. `asks` is what its forward is given besides."""

    asks: tuple[str, ...] = ()

    def __init__(self, hidden: int, first: int = WIDTH, second: int = WIDTH) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, first), nn.Linear(second, hidden)


class Gated(nn.Module):
    asks: tuple[str, ...] = ()

    def __init__(self, hidden: int, width: int = WIDTH) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)


class Attention(nn.Module):
    """The layers of attention, with the usual names."""

    asks: tuple[str, ...] = ()

    def __init__(self, hidden: int, key_heads: int = HEADS) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, hidden // HEADS
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, key_heads * self.head_dim)
        self.v_proj = nn.Linear(hidden, key_heads * self.head_dim)
        self.o_proj = nn.Linear(hidden, hidden)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))


# Feed-forward networks that mix channels.


@odd
class MlpLongOnly(Mlp):
    """Mixes channels of longer inputs only."""

    def forward(self, x):
        x, length = F.gelu(self.fc1(x)), x.shape[1]
        return self.fc2(x.roll(1, -1) if length > 20 else x)


@odd
class MlpSoftmax(Mlp):
    def forward(self, x):
        return self.fc2(self.fc1(x).softmax(-1))


@odd
class MlpSoftmaxModule(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.act = nn.Softmax(dim=-1)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@odd
class MlpNormModule(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.act = nn.LayerNorm(WIDTH, elementwise_affine=False)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@odd
class MlpActivationFunction(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.activation = partial(F.normalize, dim=-1)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


@odd
class MlpOwnActivation(Mlp):
    class Act(nn.Module):
        """A gain that depends on all channels."""

        def forward(self, h):
            return F.gelu(h) * h.abs().amax(-1, keepdim=True)

    def __init__(self, hidden):
        super().__init__(hidden)
        self.act = self.Act()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@odd
class MlpLayerNorm(Mlp):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(F.gelu(F.layer_norm(h, h.shape[-1:])))


@odd
class MlpNormalize(Mlp):
    def forward(self, x):
        return self.fc2(F.normalize(self.fc1(x), dim=-1))


@odd
class MlpManualNorm(Mlp):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(h / (h.norm(dim=-1, keepdim=True) + 1e-6))


@odd
class MlpCentered(Mlp):
    def forward(self, x):
        h = torch.relu(self.fc1(x))
        return self.fc2(h - h.mean(-1, keepdim=True))


@odd
class MlpMaxScaled(Mlp):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(h / (1 + torch.amax(h.abs(), -1, True)))


@odd
class MlpWidthScaled(Mlp):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(F.gelu(h) / math.sqrt(h.shape[-1]))


@odd
class MlpFeaturesScaled(Mlp):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)) * self.fc1.out_features**-0.5)


@odd
class MlpOutputScaledByWidth(Mlp):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x))) / self.fc2.in_features**0.5


@odd
class MlpWeightSizeScaled(Mlp):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x))) * (self.fc1.weight.numel() / 1000)


@odd
class MlpRoll(Mlp):
    def forward(self, x):
        return self.fc2(F.gelu(torch.roll(self.fc1(x), 1, dims=-1)))


@odd
class MlpFlip(Mlp):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)).flip(-1))


@odd
class MlpCumsum(Mlp):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)).cumsum(-1))


@odd
class MlpSort(Mlp):
    def forward(self, x):
        return self.fc2(self.fc1(x).sort(dim=-1).values)


@odd
class MlpShuffle(Mlp):
    def forward(self, x):
        h = F.gelu(self.fc1(x))
        return self.fc2(h.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2))


@odd
class MlpMatmul(Mlp):
    def forward(self, x):
        h = F.gelu(self.fc1(x))
        gram = h.transpose(1, 2) @ h
        return self.fc2(h @ gram.tanh())


@odd
class MlpStridedGlu(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden, first=2 * WIDTH)

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(F.silu(h[..., ::2]) * h[..., 1::2])


@odd
class MlpFoldedGlu(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden, first=2 * WIDTH)

    def forward(self, x):
        h = self.fc1(x)
        half = h.shape[-1] // 2
        return self.fc2(F.silu(h[..., :half]) * h[..., half:].flip(-1))


@odd
class MlpSelfGated(Mlp):
    def forward(self, x):
        h = F.gelu(self.fc1(x))
        return self.fc2(h) * h.mean(-1, keepdim=True).sigmoid()


@odd
class MlpSqueezed(Mlp):
    def forward(self, x):
        h = F.gelu(self.fc1(x))
        return self.fc2(h * h.sum(-1, keepdim=True).sigmoid())


@odd
class MlpPositional(Mlp):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(F.gelu(h) * torch.linspace(0.5, 1.5, h.shape[-1]).to(h))


@odd
class MlpHiddenTensor(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.scale = torch.linspace(0.5, 1.5, WIDTH)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)) * self.scale.to(x))


@odd
class MlpFunctional(Mlp):
    def forward(self, x):
        first = F.linear(x, self.fc1.weight[: WIDTH // 2], self.fc1.bias[: WIDTH // 2])
        second = F.linear(x, self.fc1.weight[WIDTH // 2 :], self.fc1.bias[WIDTH // 2 :])
        return self.fc2(torch.cat([first.relu(), second.tanh()], dim=-1))


@odd
class MlpTransposed(Mlp):
    def forward(self, x):
        h = F.gelu(self.fc1(x))
        return self.fc2(h) + 0.1 * F.linear(h.flip(-1), self.fc1.weight.t())


@odd
class MlpStandardizedWeight(Mlp):
    def forward(self, x):
        weight = self.fc2.weight - self.fc2.weight.mean(1, keepdim=True)
        return F.linear(F.gelu(self.fc1(x)), weight, self.fc2.bias)


@odd
class MlpTwice(Mlp):
    def forward(self, x):
        h = F.gelu(self.fc1(x))
        return self.fc2(F.gelu(F.linear(self.fc2(h), self.fc1.weight)).cumsum(-1))


@odd
class MlpResidual(nn.Module):
    asks: tuple[str, ...] = ()

    def __init__(self, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)) + x)


@odd
class MlpConcatenated(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden, second=WIDTH + hidden)

    def forward(self, x):
        return self.fc2(torch.cat([F.gelu(self.fc1(x)), x], dim=-1))


@odd
class MlpSpectral(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.fc1 = nn.utils.parametrizations.spectral_norm(self.fc1)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


@odd
class MlpWeightNorm(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.fc2 = nn.utils.parametrizations.weight_norm(self.fc2)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


@odd
class MlpHooked(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.fc1.register_forward_hook(lambda module, inputs, output: output.softmax(-1))

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


@odd
class MlpOwnLinear(Mlp):
    class Linear(nn.Linear):
        """A layer that takes the mean of its inputs away."""

        def forward(self, x):
            return super().forward(x - x.mean(-1, keepdim=True))

    def __init__(self, hidden):
        super().__init__(hidden)
        self.fc2 = self.Linear(WIDTH, hidden)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


@odd
class MlpLambda(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.forward = lambda x: self.fc2(self.fc1(x).softmax(-1))


@odd
class MlpTopK(Mlp):
    def forward(self, x):
        h = F.relu(self.fc1(x))
        least = h.topk(3, dim=-1).values[..., -1:]
        return self.fc2(h * (h >= least))


@odd
class MlpWithResidual(Mlp):
    """Softmax where the forward asks for more than hidden states."""

    asks = ("gains", "states")

    def forward(self, x, gains, states):
        return self.fc2(torch.softmax(self.fc1(x), -1)) * gains["scale"] + states


@odd
class MlpHelper(Mlp):
    asks = ("gains",)

    def forward(self, x, gains):
        return self.fc2(_standardize(self.fc1(x))) * gains["scale"]


def _standardize(h):
    return (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True)


@odd
class GatedNorm(Gated):
    def forward(self, x):
        h = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


@odd
class GatedRolled(Gated):
    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x).roll(1, -1))


@odd
class GatedSoftmax(Gated):
    def forward(self, x):
        return self.down_proj(F.softmax(self.gate_proj(x), dim=-1) * self.up_proj(x))


# Attention that mixes heads.


@odd
class AttentionInterleaved(Attention):
    def split(self, x):
        return x.reshape(x.shape[0], x.shape[1], self.head_dim, self.num_heads).permute(0, 3, 1, 2)

    def forward(self, x):
        out = F.scaled_dot_product_attention(*self.heads(x))
        return self.o_proj(out.permute(0, 2, 3, 1).flatten(2))


@odd
class AttentionInterleavedOutput(Attention):
    def forward(self, x):
        out = F.scaled_dot_product_attention(*self.heads(x))
        return self.o_proj(out.permute(0, 2, 3, 1).flatten(2))


@odd
class AttentionSoftmaxOverHeads(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.o_proj(self.merge((q @ k.transpose(-1, -2)).softmax(dim=1) @ v))


@odd
class AttentionMeanOverHeads(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)).softmax(-1)
        return self.o_proj(self.merge(weights.mean(1, keepdim=True) @ v))


@odd
class AttentionTalkingHeads(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2)
        scores = scores + 0.3 * scores.roll(1, dims=1)
        return self.o_proj(self.merge(scores.softmax(-1) @ v))


@odd
class AttentionAmongHeads(Attention):
    """Each position's heads attend to one another."""

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).flatten(2))


@odd
class AttentionLayerNorm(Attention):
    def forward(self, x):
        q, k, v = self.heads(F.normalize(x, dim=-1))
        q = self.split(F.layer_norm(self.merge(q), (q.shape[1] * self.head_dim,)))
        return self.o_proj(self.merge(F.scaled_dot_product_attention(q, k, v)))


@odd
class AttentionNormalized(Attention):
    def forward(self, x):
        q, k = F.normalize(self.q_proj(x), dim=-1), F.normalize(self.k_proj(x), dim=-1)
        out = F.scaled_dot_product_attention(self.split(q), self.split(k), self.split(self.v_proj(x)))
        return self.o_proj(self.merge(out))


@odd
class AttentionOutputNormalized(Attention):
    def forward(self, x):
        out = self.merge(F.scaled_dot_product_attention(*self.heads(x)))
        return self.o_proj(out / out.norm(dim=-1, keepdim=True))


@odd
class AttentionWidthScaled(Attention):
    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        scale = q.shape[-1] ** -0.5
        scores = self.split(q) @ self.split(k).transpose(-1, -2) * scale
        return self.o_proj(self.merge(scores.softmax(-1) @ self.split(v)))


@odd
class AttentionFeaturesScaled(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.q_proj.out_features)
        return self.o_proj(self.merge(scores.softmax(-1) @ v))


@odd
class AttentionHeadsScaled(Attention):
    def forward(self, x):
        return self.o_proj(self.merge(F.scaled_dot_product_attention(*self.heads(x)))) / self.num_heads


@odd
class AttentionAlibi(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1, device=x.device)
        steps = torch.arange(x.shape[1], device=x.device)
        distance = (steps[:, None] - steps[None]).abs()
        bias = (-slopes[:, None, None] * distance).to(x)
        return self.o_proj(self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


@odd
class AttentionSlopesInAList(Attention):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.head_scale = [0.5, 1.0, 1.5, 2.0]

    def forward(self, x):
        out = F.scaled_dot_product_attention(*self.heads(x))
        scale = torch.tensor(self.head_scale[: out.shape[1]]).to(out)
        return self.o_proj(self.merge(out * scale[:, None, None]))


@odd
class AttentionHeadLoop(Attention):
    """Heads with windows of their own."""

    def forward(self, x):
        q, k, v = self.heads(x)
        outs = []
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head].transpose(-1, -2)
            scores = scores.tril(head - 2).masked_fill(scores.new_ones(scores.shape[-2:]).tril(head) == 0, -1e9)
            outs.append(scores.softmax(-1) @ v[:, head])
        return self.o_proj(torch.cat(outs, dim=-1))


@odd
class AttentionMaskByHead(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2)
        scores[:, ::2] = scores[:, ::2].masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -1e9)
        return self.o_proj(self.merge(scores.softmax(-1) @ v))


@odd
class AttentionRolledHeads(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.o_proj(self.merge(F.scaled_dot_product_attention(q, k, v.roll(1, dims=1))))


@odd
class AttentionFlippedKeys(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.o_proj(self.merge(F.scaled_dot_product_attention(q, k.flip(1), v)))


@odd
class AttentionGatedByValues(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        out = self.o_proj(self.merge(F.scaled_dot_product_attention(q, k, v)))
        return out * v.mean(dim=(1, 3))[..., None].sigmoid()


@odd
class AttentionHiddenTensor(Attention):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.gains = {"values": torch.linspace(0.5, 1.5, HEADS)}

    def forward(self, x):
        out = F.scaled_dot_product_attention(*self.heads(x))
        return self.o_proj(self.merge(out * self.gains["values"].to(x)[:, None, None]))


@odd
class AttentionHooked(Attention):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.o_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0].cumsum(-1),))

    def forward(self, x):
        return self.o_proj(self.merge(F.scaled_dot_product_attention(*self.heads(x))))


@odd
class AttentionValueResidual(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(self.merge(out + v.mean(1, keepdim=True)))


@odd
class AttentionSwappedGroups(Attention):
    """Query heads that are spread over the key-value heads in the other order."""

    def __init__(self, hidden):
        super().__init__(hidden, key_heads=2)
        self.num_key_value_heads = 2

    def forward(self, x):
        q, k, v = self.heads(x)
        groups = q.shape[1] // k.shape[1]
        out = F.scaled_dot_product_attention(q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1))
        return self.o_proj(self.merge(out))


@odd
class AttentionFusedByHead(nn.Module):
    """A fused projection that holds query, key and value of one head after the other."""

    asks: tuple[str, ...] = ()

    def __init__(self, hidden):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, hidden // HEADS
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, -1, 3 * self.head_dim).transpose(1, 2).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@odd
class AttentionFusedInterleaved(AttentionFusedByHead):
    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, self.head_dim, -1, 3).permute(4, 0, 3, 1, 2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@odd
class AttentionSelectedHeads(Attention):
    def forward(self, x):
        out = F.scaled_dot_product_attention(*self.heads(x))
        best = out.pow(2).sum((2, 3)).argmax(1)
        weight = 1 + F.one_hot(best, out.shape[1])[:, :, None, None].to(out)
        return self.o_proj(self.merge(out * weight))


@odd
class AttentionDroppedByIndex(Attention):
    """Dropout of whole heads while training, and a scale by the number of heads otherwise."""

    def forward(self, x):
        out = F.scaled_dot_product_attention(*self.heads(x))
        out = F.dropout2d(out, 0.1, self.training)
        return self.o_proj(self.merge(out * (HEADS / out.shape[1])))


@odd
class AttentionMasked(Attention):
    """Softmax over heads where the forward cannot do without a mask."""

    asks = ("mask", "rotary")

    def forward(self, x, mask, rotary):
        q, k, v = self.heads(x)
        q, k = _rotate(q, rotary.angles), _rotate(k, rotary.angles)
        scores = (q @ k.transpose(-1, -2)).softmax(1) + mask
        return self.o_proj(self.merge(scores.softmax(-1) @ v))


@odd
class AttentionMaskedScaled(Attention):
    asks = ("mask", "rotary")

    def forward(self, x, mask, rotary):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = q * q.size(-1) ** -0.5
        q, k = _rotate(self.split(q), rotary.angles), _rotate(self.split(k), rotary.angles)
        return self.o_proj(self.merge((q @ k.transpose(-1, -2) + mask).softmax(-1) @ self.split(v)))


@odd
class AttentionMaskedAlibi(Attention):
    asks = ("mask", "rotary")

    def forward(self, x, mask, rotary):
        q, k, v = self.heads(x)
        slopes = torch.tensor([2.0 ** -(head + 1) for head in range(self.num_heads)]).to(x)
        bias = mask - slopes[:, None, None] * rotary.distances
        return self.o_proj(self.merge((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v))


class Rotary:
    """What attention may be given, in an object that no generic call can make up."""

    def __init__(self, x: torch.Tensor, head_dim: int) -> None:
        steps = torch.arange(x.shape[1], device=x.device)
        angles = steps[:, None] * 0.5 ** torch.arange(head_dim // 2, device=x.device)
        angles = torch.cat([angles, angles], dim=-1).to(x.dtype)
        self.angles, self.distances = (angles.cos(), angles.sin()), (steps[:, None] - steps[None]).abs()


def _rotate(x, angles):
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# Honest modules.


@honest
class MlpPlain(Mlp):
    def forward(self, x):
        return self.fc2(F.dropout(F.gelu(self.fc1(x)), 0.1, self.training))


@honest
class MlpAsking(Mlp):
    asks = ("gains", "states")

    def __init__(self, hidden):
        super().__init__(hidden)
        self.act, self.dropout = nn.GELU(), nn.Dropout(0.1)

    def forward(self, x, gains, states):
        h = self.act(self.fc1(x))
        h = self.dropout(h * 0.5)
        return self.fc2(h) * gains["scale"] + states


@honest
class MlpGlu(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden, first=2 * WIDTH)
        self.act = nn.GLU()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@honest
class MlpSwappedGlu(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden, first=2 * WIDTH)

    def forward(self, x):
        up, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * up)


@honest
class MlpSquared(Mlp):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.slope = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)).pow(2) * self.slope)


@honest
class GatedPlain(Gated):
    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@honest
class AttentionPlain(Attention):
    def forward(self, x):
        return self.o_proj(self.merge(F.scaled_dot_product_attention(*self.heads(x))))


@honest
class AttentionEager(Attention):
    def forward(self, x, attention_mask=None):
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.size(-1))
        if attention_mask is not None:
            scores = scores + attention_mask
        out = torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)
        return self.o_proj(out.transpose(1, 2).contiguous().view(batch, length, self.num_heads * self.head_dim))


@honest
class AttentionAsking(Attention):
    """Rotary positions and a mask that its forward cannot do without."""

    asks = ("mask", "rotary")

    def forward(self, x, mask, rotary):
        input_shape = x.shape[:-1]
        shape = (*input_shape, -1, self.head_dim)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q, k = _rotate(q, rotary.angles), _rotate(k, rotary.angles)
        weights = F.softmax(q @ k.transpose(-1, -2) * self.head_dim**-0.5 + mask, dim=-1)
        out = torch.matmul(weights, v).transpose(1, 2).reshape(*input_shape, -1)
        return self.o_proj(out)


@honest
class AttentionGrouped(Attention):
    def __init__(self, hidden):
        super().__init__(hidden, key_heads=2)
        self.num_key_value_heads = 2

    def forward(self, x):
        q, k, v = self.heads(x)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return self.o_proj(self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


@honest
class AttentionGate(Attention):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.gate_proj = nn.Linear(hidden, hidden)

    def forward(self, x):
        out = self.merge(F.scaled_dot_product_attention(*self.heads(x)))
        return self.o_proj(out * self.gate_proj(x).sigmoid())


@honest
class AttentionSinks(Attention):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x):
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        return self.o_proj(self.merge(weights @ v))


@honest
class AttentionFused(AttentionFusedByHead):
    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, -1))


@honest
class AttentionHeadNorm(Attention):
    def __init__(self, hidden):
        super().__init__(hidden)
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.o_proj(self.merge(F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)))


# The model around them.


class OddConfig(PreTrainedConfig):
    model_type = "odd_stranger"

    def __init__(self, case="MlpPlain", hidden_size=HIDDEN, num_labels=LABELS, **kwargs):
        self.case, self.hidden_size = case, hidden_size
        super().__init__(num_labels=num_labels, **kwargs)


class Layer(nn.Module):
    def __init__(self, case: str, hidden: int) -> None:
        super().__init__()
        built = {**ODD, **HONEST}[case](hidden)
        is_mlp = case.startswith(("Mlp", "Gated"))
        self.self_attn = AttentionPlain(hidden) if is_mlp else built
        self.mlp = built if is_mlp else MlpPlain(hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x):
        x = x + _call(self.self_attn, self.norm1(x))
        return x + _call(self.mlp, self.norm2(x))


def _call(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    made: dict[str, Callable[[], object]] = {
        "mask": lambda: torch.full((x.shape[1], x.shape[1]), -1e4).triu(1).to(x),
        "rotary": lambda: Rotary(x, part.head_dim),
        "gains": lambda: {"scale": 0.5},
        "states": lambda: x,
    }
    return part(x, *(made[name]() for name in part.asks))


def _compute(model, input_ids, labels):
    x = model.embeddings(input_ids)
    for layer in model.layers:
        x = layer(x)
    logits = model.head(x.mean(1))
    loss = None if labels is None else F.cross_entropy(logits, labels)
    return SequenceClassifierOutput(loss=loss, logits=logits)


def _add_parts(model: nn.Module, case: str, hidden: int) -> None:
    model.embeddings = nn.Embedding(VOCAB, hidden)
    model.layers = nn.ModuleList(Layer(case, hidden) for _ in range(2))
    model.head = nn.Linear(hidden, LABELS)


class OddModule(nn.Module):
    """A model that is no `PreTrainedModel`."""

    def __init__(self, case: str, hidden: int = HIDDEN) -> None:
        super().__init__()
        _add_parts(self, case, hidden)

    def forward(self, input_ids, labels=None):
        return _compute(self, input_ids, labels)


class OddPretrained(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        _add_parts(self, config.case, config.hidden_size)
        self.post_init()

    def _init_weights(self, module):
        """Weights stay as torch makes them."""

    def forward(self, input_ids, labels=None):
        return _compute(self, input_ids, labels)


def build_model(name: str, *, pretrained: bool, hidden: int = HIDDEN) -> nn.Module:
    """A small model with the module in each of its two layers, in evaluation mode, the same every time.

    Args:
        name: One of `ODD` or `HONEST`.
        pretrained: Whether the model is a `PreTrainedModel`, with a config, or a plain module.
        hidden: Hidden size.

    Returns:
        The model, whose forward takes `input_ids` and `labels` and gives `loss` and `logits`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OddPretrained(OddConfig(name, hidden)) if pretrained else OddModule(name, hidden)
        for parameter in model.parameters():
            if parameter.dim() < 2:
                nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.eval()
