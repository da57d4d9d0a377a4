"""Linear layers over the same tokens as one product: the operator, and the pass that puts it in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blade_tests.unit.samples import request_of
from torch import fx, nn
from torch.nn import functional

from blade.blade_core.graph import trace
from blade.blade_core.kernels.joint_linear import as_one, joint_linear, operator, reference, usable
from blade.blade_core.kernels.joint_pass import join_linears
from blade.blade_core.kernels.nodes import aten, calls, value
from blade.blade_core.travel import pack, unpack

C, HEADS = 24, 3


class Attention(nn.Module):
    """As ComfyUI's CrossAttention."""

    def __init__(self, context: int = C, bias: bool = False) -> None:
        super().__init__()
        self.to_q = nn.Linear(C, C, bias=bias)
        self.to_k, self.to_v = (nn.Linear(context, C, bias=bias) for _ in range(2))
        self.to_out = nn.Linear(C, C)

    def forward(self, x: torch.Tensor, context: torch.Tensor, scale: float) -> torch.Tensor:
        shape = (x.shape[0], -1, HEADS, C // HEADS)
        pairs = ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        q, k, v = (layer(t).view(shape).transpose(1, 2) for layer, t in pairs)
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.to_out(out.reshape(x.shape)) * scale


class SelfAttention(Attention):
    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, x, scale)


def same(request: Any, module: fx.GraphModule) -> None:
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    expected = request.eager(request.weights, request.inputs)
    torch.testing.assert_close(module(*request.weights, *request.inputs), expected)


def weights(*rows: int, width: int = C) -> list[torch.Tensor]:
    return [torch.randn(n, width) for n in rows]


def joined(*rows: int) -> list[torch.Tensor]:
    return list(torch.randn(sum(rows), C).split(rows))


# --- the operator -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [weights, joined])
@pytest.mark.parametrize("rows", [(24, 24, 24), (8, 40), (16,)])
def test_is_as_its_twin(make: Any, rows: tuple[int, ...]) -> None:
    x, layers = torch.randn(10, C), make(*rows)
    expected = reference(x, layers)
    torch.testing.assert_close(joint_linear(x, layers), expected)
    torch.testing.assert_close(operator()(x, layers), expected)


def test_only_what_lies_one_behind_the_other_is_one() -> None:
    q, k, v = layers = joined(24, 24, 24)
    whole = as_one(layers)
    assert whole is not None and whole.data_ptr() == q.data_ptr()
    assert torch.equal(whole, torch.cat(layers))
    assert as_one([k, v]) is not None
    assert as_one([q, v]) is as_one([k, q, v]) is as_one([q, k, v.clone()]) is None
    assert as_one(weights(24, 24, 24)) is None


def test_usable() -> None:
    x = torch.randn(10, C)
    assert usable(x, weights(24, 24))
    assert not usable(x, weights(24))
    assert not usable(x, weights(24, 24, width=16))
    assert not usable(x, weights(24, 20))
    assert not usable(x.half(), weights(24, 24))
    assert not usable(x, [*weights(24), torch.randn(C, 24).t()])


# --- the pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize("travels", [False, True])
def test_self_attention_becomes_one_product(travels: bool) -> None:
    request = request_of(SelfAttention(), (torch.randn(2, 7, C),))
    module = trace(request)
    if travels:  # to another process that compiles it
        module = unpack(pack(module))
    assert join_linears(module.graph, usable) == 1
    (node,) = calls(module.graph, operator())
    assert value(node).shape == (14, 3 * C)
    assert not calls(module.graph, aten.mm.default)
    assert len(calls(module.graph, aten.addmm.default)) == 1  # the layer behind attention
    if not travels:
        same(request, module)


def test_what_attention_reads_is_noted_anew() -> None:
    module = trace(request_of(SelfAttention(), (torch.randn(2, 7, C),)))
    join_linears(module.graph, usable)
    shown = [value(n) for n in calls(module.graph, aten.transpose.int)[:3]]
    assert [t.stride() for t in shown] == [(7 * 3 * C, C // HEADS, 3 * C, 1)] * 3
    assert [t.storage_offset() for t in shown] == [0, C, 2 * C]


def test_it_is_compiled() -> None:
    """By torch's own compiler, which calls the operator by its name."""
    request = request_of(SelfAttention(), (torch.randn(2, 8, C),))
    module = trace(request)
    join_linears(module.graph, usable)
    module.graph.eliminate_dead_code()
    module.recompile()
    compiled: Any = torch.compile(module)
    actual = compiled(*request.weights, *request.inputs)
    torch.testing.assert_close(actual, request.eager(request.weights, request.inputs))


@pytest.mark.parametrize(
    "unit", [Attention(context=16), SelfAttention(bias=True)], ids=["other tokens", "biases"]
)
def test_others_are_left(unit: nn.Module) -> None:
    tokens, context = torch.randn(2, 7, C), torch.randn(2, 5, 16)
    alone = isinstance(unit, SelfAttention)
    request = request_of(unit, (tokens,) if alone else (tokens, context))
    module = trace(request)
    # K and V of a prompt are a pair of their own.
    assert join_linears(module.graph, usable) == (0 if alone else 1)
    same(request, module)


def test_nothing_is_done_where_it_is_not_usable() -> None:
    module = trace(request_of(SelfAttention(), (torch.randn(2, 7, C),)))
    before = str(module.graph)
    assert join_linears(module.graph, lambda *_: False) == 0
    assert str(module.graph) == before


def test_what_cannot_be_shown_without_a_copy_is_left() -> None:
    class Flat(nn.Module):
        """Shows a layer's result as one row."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(C, C, bias=False) for _ in range(2))

        def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
            return self.a(x).view(-1) * self.b(x).view(-1) * scale

    request = request_of(Flat(), (torch.randn(10, C),))
    module = trace(request)
    assert join_linears(module.graph, usable) == 0
    same(request, module)
