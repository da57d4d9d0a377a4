"""Passes over a transformer's tokens: what they take the place of, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from blade_tests.unit.samples import request_of
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from blade.blade_core.graph import trace
from blade.blade_core.kernels import geglu, layer_norm
from blade.blade_core.kernels.nodes import calls
from blade.blade_core.kernels.token_passes import (
    fuse_geglu,
    fuse_layer_norms,
    late_biases,
    pays_late,
)

aten = torch.ops.aten
C = 24


class Tokens(nn.Module):
    """As ComfyUI's SpatialTransformer with convolutions, around a block without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(3))
        self.outs = nn.ModuleList(nn.Linear(C, C) for _ in range(2))
        self.up, self.down = nn.Linear(C, 8 * C), nn.Linear(4 * C, C)

    def forward(self, image: torch.Tensor, scale: float) -> torch.Tensor:
        batch, channels, height, width = image.shape
        x = self.proj_in(image).contiguous().movedim(1, 3).flatten(1, 2).contiguous()
        x = self.outs[0](self.norms[0](x)).clone() + x
        x = self.outs[1](self.norms[1](x) * scale) + x
        value, gate = self.up(self.norms[2](x)).chunk(2, dim=-1)
        x = x + self.down(value * functional.gelu(gate))
        x = x.reshape(batch, height, width, channels).movedim(3, 1).contiguous()
        return image + self.proj_out(x)


def always(*_: Any) -> bool:
    return True


def nowhere(*_: Any) -> bool:
    return False


def tokens_request() -> Any:
    unit: Any = Tokens()
    unit.to(memory_format=torch.channels_last)
    return request_of(
        unit, (torch.randn(2, C, 6, 5).contiguous(memory_format=torch.channels_last),)
    )


def same(request: Any, module: fx.GraphModule) -> None:
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    expected = request.eager(request.weights, request.inputs)
    actual = module(*request.weights, *request.inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual.stride() == expected.stride()


# --- what a block becomes -----------------------------------------------------------------------


def test_norms_take_the_sum_and_the_bias_before_them() -> None:
    request = tokens_request()
    module = trace(request)
    assert fuse_layer_norms(module.graph, always) == 3
    alone, summed = layer_norm.operators()
    assert not calls(module.graph, alone)
    taken = [(n.args[1] is not None, n.args[2] is not None) for n in calls(module.graph, summed)]
    assert taken == [(True, False), (True, True), (True, True)]  # first, what a convolution gives
    assert [n.args[2] is None for n in calls(module.graph, aten.convolution.default)] == [
        True,
        False,
    ]
    assert len(calls(module.graph, aten.mm.default)) == 2
    assert len(calls(module.graph, aten.addmm.default)) == 2  # up and down
    same(request, module)


def test_the_gated_layer_is_one() -> None:
    request = tokens_request()
    module = trace(request)
    assert fuse_geglu(module.graph, always) == 1
    module.graph.eliminate_dead_code()
    assert not calls(module.graph, aten.gelu.default, aten.split.Tensor)
    assert len(calls(module.graph, aten.addmm.default)) == 3
    same(request, module)


def test_biases_are_added_where_they_are_read() -> None:
    request = tokens_request()
    module = trace(request)
    assert late_biases(module.graph, always) == 5  # all but that of `up`, which is cut in two
    assert len(calls(module.graph, aten.addmm.default)) == 1
    assert all(n.args[2] is None for n in calls(module.graph, aten.convolution.default))
    same(request, module)


def test_all_of_them_together() -> None:
    request = tokens_request()
    module = trace(request)
    count = fuse_geglu(module.graph, always) + fuse_layer_norms(module.graph, always)
    module.graph.eliminate_dead_code()
    assert (count, late_biases(module.graph, always)) == (4, 2)  # of down and proj_out
    assert not calls(module.graph, aten.addmm.default)
    same(request, module)


def test_nothing_is_done_on_the_cpu_or_where_it_is_not_usable() -> None:
    module = trace(tokens_request())
    before = str(module.graph)
    assert late_biases(module.graph, pays_late) == 0
    assert fuse_geglu(module.graph, nowhere) == fuse_layer_norms(module.graph, nowhere) == 0
    assert str(module.graph) == before


# --- what is left alone -------------------------------------------------------------------------

X = torch.randn(3, 5, C)
W, B = torch.randn(8 * C, C), torch.randn(8 * C)
ONE = torch.randn(C)


def traced(function: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    """`function` as a graph; what it closes over has its form noted, as arguments have."""
    module = make_fx(function)(*inputs)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = getattr(module, node.target)
    return module


def normed(x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, (C,), ONE, ONE)


def linear(x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, W[:C], B[:C])


@pytest.mark.parametrize(
    ("function", "shift", "term"),
    [
        (lambda x: normed(linear(x) + x), True, True),
        (lambda x: normed(x + linear(x)), True, True),
        (lambda x: normed(x + linear(x).clone().view(15, C).clone().view(3, 5, C)), True, True),
        (lambda x: normed(x + (linear(x).sum() + linear(x))), False, True),
        (lambda x: normed(y := x + linear(x)) + y, True, True),
        (lambda x: (y := x + linear(x)).sin() + normed(y), False, False),
        (lambda x: normed((y := linear(x)) + x) + y, False, True),
        (lambda x: normed(functional.linear(x, W[:C]) + x), False, True),
        (lambda x: normed(x + x.sin()), False, True),
        (lambda x: normed(x + 1), False, False),
        (lambda x: normed(x + ONE), False, False),
        (lambda x: normed(torch.add(x, x.sin(), alpha=2)), False, False),
        (lambda x: normed(x + x), False, False),
        (lambda x: normed(linear(x)), True, False),
        (lambda x: normed(y := linear(x)) + y, True, False),
    ],
)
def test_what_a_norm_takes_along(function: Callable[..., Any], shift: bool, term: bool) -> None:
    module = traced(function, X)
    assert fuse_layer_norms(module.graph, always) == 1
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(X), function(X), rtol=1e-4, atol=1e-5)
    alone, summed = layer_norm.operators()
    (node,) = calls(module.graph, alone, summed)
    assert (node.target is summed) == (term or shift)
    if node.target is summed:
        assert (node.args[1] is not None, node.args[2] is not None) == (shift, term)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.layer_norm(x, (C,)),
        lambda x: functional.layer_norm(x, (C,), ONE),
        lambda x: functional.layer_norm(x, (5, C), X[0], X[0]),
        lambda x: aten.native_layer_norm(x, (C,), ONE, ONE, 1e-5)[1],
    ],
    ids=["no weights", "no bias", "two dimensions", "the mean"],
)
def test_other_norms_are_left(function: Callable[..., Any]) -> None:
    assert fuse_layer_norms(traced(function, X).graph, always) == 0


def test_usable_is_asked_about_what_is_normalized() -> None:
    asked = []

    def refuse(x: torch.Tensor, shift: bool) -> bool:
        asked.append((tuple(x.shape), shift))
        return False

    for function in (lambda x: normed(x + linear(x)), lambda x: normed(x + x.sin()), normed):
        module = traced(function, X)
        before = str(module.graph)
        assert fuse_layer_norms(module.graph, refuse) == 0
        assert str(module.graph) == before
    assert asked == [((3, 5, C), True), ((3, 5, C), False), ((3, 5, C), False)]


def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return functional.linear(x, W, B).chunk(2, -1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (y := both(x))[0] * functional.gelu(y[1], approximate="tanh"),
        lambda x: (y := both(x))[0].sin() * functional.gelu(y[1]),
        lambda x: (y := both(x))[1] * functional.gelu(y[0]),
        lambda x: both(x)[0] * functional.gelu(both(x)[1]),
        lambda x: (y := both(x))[0] * (z := functional.gelu(y[1])) + z,
        lambda x: (y := both(x))[0] * functional.gelu(y[1]) + y[0],
        lambda x: (
            (y := functional.linear(x, W, B).split(64, -1))[0][..., :8]
            * functional.gelu(y[1][..., :8])
        ),
        lambda x: (y := functional.linear(x, W).chunk(2, -1))[0] * functional.gelu(y[1]),
        lambda x: (
            (y := (z := functional.linear(x, W, B)).chunk(2, -1))[0] * functional.gelu(y[1])
            + z[..., : 4 * C]
        ),
        lambda x: x * 2.0,
    ],
)
def test_other_products_are_left(function: Callable[..., Any]) -> None:
    assert fuse_geglu(traced(function, X).graph, always) == 0


def test_the_gate_may_stand_first() -> None:
    module = traced(lambda x: functional.gelu((y := both(x))[1]) * y[0], X)
    assert fuse_geglu(module.graph, always) == 1
    module.graph.eliminate_dead_code()
    module.recompile()
    values, gate = both(X)
    torch.testing.assert_close(module(X), values * functional.gelu(gate), rtol=1e-4, atol=1e-4)
    (node,) = calls(module.graph, geglu.operator())
    assert len(node.args) == 3


@pytest.mark.parametrize(
    ("function", "moved"),
    [
        (lambda x: linear(x) + x, 1),
        (lambda x: linear(x).clone() + x, 1),
        (lambda x: linear(x).view(15, C).clone() + x.view(15, C), 1),
        (lambda x: linear(x).view(15, 2, C // 2) + x.view(15, 2, C // 2), 0),
        (lambda x: linear(x).permute(0, 2, 1) + x.permute(0, 2, 1), 0),
        (lambda x: normed(linear(x)), 1),
        (lambda x: (y := linear(x)) + normed(y), 1),
        (lambda x: linear(x).relu() + x, 0),
        (lambda x: linear(x), 0),
        (lambda x: (y := linear(x)) + x + y.sin(), 0),
        (lambda x: linear(x) + 1.0, 0),
        (lambda x: torch.add(linear(x), x, alpha=2), 0),
        (lambda x: torch.addmm(x[0], x[1], W[:C], beta=2).view(5, C) + x[2], 0),
        (lambda x: torch.addmm(x[0], x[1], W[:C]).view(5, C) + x[2], 0),
    ],
)
def test_which_biases_move(function: Callable[..., Any], moved: int) -> None:
    module = traced(function, X)
    assert late_biases(module.graph, always) == moved
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(X), function(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"padding": 1}, {"groups": 2}], ids=lambda value: str(value)
)
def test_convolutions_that_are_no_products_keep_their_bias(
    options: dict[str, int],
) -> None:
    layer = nn.Conv2d(C, C, 1, **options)  # type: ignore[arg-type]
    image = torch.randn(1, C, 4, 4)
    module = traced(lambda x: layer(x) + layer(x), image)
    assert late_biases(module.graph, always) == 0


def test_a_bias_behind_the_channels() -> None:
    layer = nn.Conv2d(C, C, 1)
    image = torch.randn(1, C, 4, 5)

    def function(x: torch.Tensor) -> torch.Tensor:
        return layer(x).permute(0, 2, 3, 1) + x.permute(0, 2, 3, 1)

    module = traced(function, image)
    assert late_biases(module.graph, always) == 1
    module.recompile()
    torch.testing.assert_close(module(image), function(image), rtol=1e-4, atol=1e-5)
