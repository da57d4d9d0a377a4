"""Blade's kernels in traced graphs: what they take the place of, and what is left alone."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from blade_tests.unit.samples import request_of
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from blade.blade_core.backends import BACKENDS
from blade.blade_core.backends.inductor import InductorBackend
from blade.blade_core.config import KERNELS as CHOICES
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.engine import Engine
from blade.blade_core.graph import trace
from blade.blade_core.kernels import group_norm, short_attention
from blade.blade_core.kernels.passes import (
    ATTENTIONS,
    KERNELS,
    fuse_group_norms,
    replace_attention,
    use_kernels,
)

aten = torch.ops.aten
CPU = torch.device("cpu")


class Block(nn.Module):
    """As ComfyUI's ResBlock and SpatialTransformer, in one: three norms and two attentions."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(32, channels) for _ in range(3))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)
        )
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q = nn.Linear(channels, channels)

    def forward(
        self, x: torch.Tensor, emb: torch.Tensor, both: torch.Tensor, scale: float
    ) -> torch.Tensor:
        h = self.convolutions[0](functional.silu(self.norms[0](x)))
        h = self.norms[1](h + emb[:, :, None, None])
        x = x + self.convolutions[1](functional.silu(h)) * scale
        batch, channels, height, width = x.shape
        tokens = self.norms[2](x).movedim(1, 3).flatten(1, 2).contiguous()
        q, k, v = self.qkv(tokens).chunk(3, -1)
        tokens = tokens + attention(q, k, v)
        k, v = both.chunk(2)
        tokens = tokens + attention(self.q(tokens), k, v)
        return x + tokens.reshape(batch, height, width, channels).movedim(3, 1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int = 4) -> torch.Tensor:
    batch, _, width = q.shape
    q, k, v = (t.view(batch, -1, heads, width // heads).transpose(1, 2) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(batch, -1, width)


def block_request() -> Any:
    x = torch.randn(2, 64, 12, 10).contiguous(memory_format=torch.channels_last)
    unit: Any = Block()
    unit.to(memory_format=torch.channels_last)
    return request_of(unit, (x, torch.randn(2, 64), torch.randn(4, 77, 64)))


def always(*_: Any) -> bool:
    return True


class Always:
    """Few keys' kernel, for any attention."""

    usable = staticmethod(always)
    operator = staticmethod(short_attention.operator)


class Short(Always):
    @staticmethod
    def usable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        return k.shape[2] == 77


def calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is target]


def norms(graph: fx.Graph) -> list[fx.Node]:
    return calls(graph, group_norm.operator())


# --- what a block becomes -----------------------------------------------------------------------


def test_a_block_gives_the_same_with_both() -> None:
    request = block_request()
    module = trace(request)
    assert fuse_group_norms(module.graph, always) == 3
    assert replace_attention(module.graph, Short()) == 1
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    first, second, third = (node.args for node in norms(module.graph))
    assert [args[-1] for args in (first, second, third)] == [True, True, False]  # SiLU
    assert [args[1] is None for args in (first, second, third)] == [True, False, True]  # bias
    assert [args[2] is None for args in (first, second, third)] == [True, False, True]  # emb
    assert not calls(module.graph, aten.native_group_norm.default)
    assert not calls(module.graph, aten.silu.default)
    without, with_bias = calls(module.graph, aten.convolution.default)
    assert without.args[2] is None and with_bias.args[2] is not None
    assert len([n for n in module.graph.nodes if n.target in ATTENTIONS]) == 1
    expected = request.eager(request.weights, request.inputs)
    actual = module(*request.weights, *request.inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual.stride() == expected.stride()


def test_silu_in_place_comes_along() -> None:
    """As a VAE's ResnetBlock has it."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.swish = nn.GroupNorm(32, 64), nn.SiLU(inplace=True)

        def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
            return self.swish(self.norm(x)) * scale + x

    x = torch.randn(1, 64, 12, 10).contiguous(memory_format=torch.channels_last)
    request = request_of(Layers(), (x,))
    module = trace(request)
    assert fuse_group_norms(module.graph, always) == 1
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    (norm,) = norms(module.graph)
    assert norm.args[-1] and not calls(module.graph, aten.silu_.default)
    expected = request.eager(request.weights, request.inputs)
    actual = module(*request.weights, *request.inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_block_gives_the_same_and_can_be_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from blade.blade_core.backends import inductor

    monkeypatch.setattr(inductor, "_runs_kernels", always)
    for module in (group_norm, short_attention):
        monkeypatch.setattr(module, "usable", always)
    request = block_request()
    used: list[int] = []
    monkeypatch.setattr(inductor, "use_kernels", lambda *args: used.append(use_kernels(*args)))
    backend = InductorBackend()
    compiled = backend.compile(request)
    assert used == [5]
    assert compiled.artifact is not None
    expected = request.eager(request.weights, request.inputs)
    for call in (compiled.call, backend.load(compiled.artifact, request)):
        actual = call(request.weights, request.inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize("chosen", [(), ("group_norm",), ("short_attention",), CHOICES])
def test_only_what_is_chosen_is_used(
    chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (group_norm, short_attention):
        monkeypatch.setattr(module, "usable", always)
    graph = trace(block_request())
    each = {"group_norm": 3, "short_attention": 2}
    assert use_kernels(graph, chosen) == sum(each.get(name, 0) for name in chosen)


def test_nothing_is_used_on_the_cpu() -> None:
    module = trace(block_request())
    before = str(module.graph)
    assert use_kernels(module, CHOICES) == 0
    assert str(module.graph) == before


# --- GroupNorm: what is left alone --------------------------------------------------------------

X = torch.randn(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)
KERNEL = torch.randn(32, 32, 3, 3)
EMB = torch.randn(2, 32)
ONE = torch.randn(32)


def normed(x: torch.Tensor) -> torch.Tensor:
    return functional.group_norm(x, 8, ONE, ONE)


def convolved(x: torch.Tensor) -> torch.Tensor:
    return functional.conv2d(x, KERNEL, ONE, padding=1)


def fused(function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[Any, ...]:
    """The kernel's arguments in the graph of `function`, which must give the same with it."""
    module = make_fx(function)(*inputs)
    assert fuse_group_norms(module.graph, always) == 1
    module.graph.eliminate_dead_code()
    module.recompile()
    torch.testing.assert_close(module(*inputs), function(*inputs), rtol=1e-4, atol=1e-5)
    (node,) = norms(module.graph)
    return node.args


def test_a_value_that_others_use_is_not_swallowed() -> None:
    def of_sum(x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = convolved(x) + emb[:, :, None, None]
        return normed(h) + h

    def of_convolution(x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = convolved(x)
        return normed(h + emb[:, :, None, None]) + h

    def of_copy(x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = (convolved(x) + emb[:, :, None, None]).clone()
        return normed(h) + h

    def of_norm(x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = normed(convolved(x) + emb[:, :, None, None])
        return functional.silu(h) + h

    functions = (of_sum, of_convolution, of_copy, of_norm)
    found = [fused(function, X, EMB) for function in functions]
    assert [args[1] is not None for args in found] == [False, False, False, True]  # the bias
    assert [args[2] is not None for args in found] == [False, True, False, True]  # the embedding
    assert not any(args[-1] for args in found)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, emb: normed(x + x.mean((0,), keepdim=True)),
        lambda x, emb: normed(x + emb[:1, :, None, None]),
        lambda x, emb: normed(torch.add(x, emb[:, :, None, None], alpha=2)),
        lambda x, emb: normed(x * emb[:, :, None, None]),
        lambda x, emb: normed(x + 1.5),
    ],
    ids=["an image", "one for all images", "alpha", "a product", "a number"],
)
def test_other_sums_are_no_terms(function: Callable[..., Any]) -> None:
    assert fused(function, X, EMB)[1:3] == (None, None)


def test_a_term_may_stand_on_either_side() -> None:
    assert fused(lambda x, emb: normed(emb[:, :, None, None] + x), X, EMB)[2] is not None


def test_one_pixel_added_to_itself() -> None:
    pixel = X[:, :, :1, :1].contiguous(memory_format=torch.channels_last)

    def twice(x: torch.Tensor) -> torch.Tensor:
        h = convolved(x)
        return normed(h + h)

    assert fused(twice, pixel)[2] is None


def test_torch_s_copy_to_its_own_layout_is_left_out() -> None:
    """On CUDA torch's GroupNorm reads contiguous images only."""

    def function(x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = convolved(x) + emb[:, :, None, None]
        return normed(h.clone(memory_format=torch.contiguous_format))

    x, shift, term, *_ = fused(function, X, EMB)
    assert x.target is aten.convolution.default and shift is not None and term is not None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.group_norm(x, 8),
        lambda x: functional.group_norm(x, 8, ONE),
        lambda x: aten.native_group_norm(x, ONE, ONE, 2, 32, 16, 8, 1e-5)[1],
        lambda x: sum(t.sum() for t in aten.native_group_norm(x, ONE, ONE, 2, 32, 16, 8, 1e-5)),
    ],
    ids=["no weights", "no bias", "the mean", "everything"],
)
def test_other_norms_are_left(function: Callable[..., Any]) -> None:
    assert fuse_group_norms(make_fx(function)(X).graph, always) == 0


def test_usable_is_asked_about_the_image_and_its_groups() -> None:
    asked = []

    def refuse(x: torch.Tensor, groups: int) -> bool:
        asked.append((tuple(x.shape), x.stride(), groups))
        return False

    def function(x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return normed(convolved(x) + emb[:, :, None, None])

    module = make_fx(function)(X, EMB)
    before = str(module.graph)
    assert fuse_group_norms(module.graph, refuse) == 0
    assert str(module.graph) == before
    assert asked == [((2, 32, 4, 4), X.stride(), 8)]


# --- attention: what is left alone --------------------------------------------------------------

Q = torch.randn(2, 4, 9, 16)


def test_the_scale_is_kept() -> None:
    for scale in (None, 0.3):
        function = partial(functional.scaled_dot_product_attention, scale=scale)
        module = make_fx(function)(Q, Q, Q)
        assert replace_attention(module.graph, Always()) == 1
        module.graph.eliminate_dead_code()
        module.recompile()
        torch.testing.assert_close(module(Q, Q, Q), function(Q, Q, Q))
        assert not [n for n in module.graph.nodes if n.target in ATTENTIONS]


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"attn_mask": torch.zeros(9, 9)}], ids=["causal", "masked"]
)
def test_masked_attention_is_left(options: dict[str, Any]) -> None:
    module = make_fx(lambda q: functional.scaled_dot_product_attention(q, q, q, **options))(Q)
    assert [n for n in module.graph.nodes if n.target in ATTENTIONS]
    assert replace_attention(module.graph, Always()) == 0


@pytest.mark.parametrize(
    ("name", "arguments", "taken"),
    [
        ("cudnn", (None, False, 0.0, False, False), True),
        ("cudnn", (Q, False, 0.0, False, False), False),
        ("cudnn", (None, False, 0.0, True, False), False),
        ("cudnn", (None, False, 0.1, False, False), False),
        ("flash", (0.0, False, False), True),
        ("flash", (0.0, True, False), False),
        ("efficient", (None, False), True),
        ("efficient", (Q, False), False),
    ],
)
def test_each_of_torch_s_attentions(name: str, arguments: tuple[Any, ...], taken: bool) -> None:
    """As they are traced on CUDA; by hand, because the CPU cannot run them."""
    graph = fx.Graph()
    q = graph.placeholder("q")
    q.meta["val"] = Q
    mask = graph.placeholder("mask")
    target = getattr(aten, f"_scaled_dot_product_{name}_attention").default
    rest = tuple(mask if a is Q else a for a in arguments)
    node = graph.call_function(target, (q, q, q, *rest), {"scale": 0.25})
    graph.output(graph.call_function(operator.getitem, (node, 0)))
    assert replace_attention(graph, Always()) == taken
    assert bool(calls(graph, short_attention.operator())) == taken
    if taken:
        assert calls(graph, short_attention.operator())[0].args == (q, q, q, 0.25)


def test_the_log_sum_of_attention_is_needed() -> None:
    graph = fx.Graph()
    q = graph.placeholder("q")
    q.meta["val"] = Q
    node = graph.call_function(ATTENTIONS[1], (q, q, q))
    graph.output([graph.call_function(operator.getitem, (node, i)) for i in (0, 1)])
    assert replace_attention(graph, Always()) == 0


# --- keys and choices ---------------------------------------------------------------------------


def test_every_kernel_can_be_chosen() -> None:
    assert set(CHOICES) == set(KERNELS)
    assert InductorBackend().kernels == tuple(KERNELS)


def test_the_choice_reaches_the_backend_and_its_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prints = set()
    for chosen in ((), ("group_norm",), ("short_attention",), CHOICES):
        (backend,) = Engine().backends(
            OptimizeConfig("inductor", kernels=chosen, on_failure="error"), CPU
        )
        prints.add(backend.fingerprint())
    assert len(prints) == 4
    assert BACKENDS["inductor"].fingerprint() in prints
    monkeypatch.setitem(KERNELS, "group_norm", KERNELS["group_norm"] + 1)
    assert BACKENDS["inductor"].fingerprint() not in prints
