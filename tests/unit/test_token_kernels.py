"""The gated layer, LayerNorm and attention block by block: the eager twins, when the kernels may
be used, and they themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from blade.blade_core.kernels import device, flash_attention, geglu, layer_norm

HALF = (torch.float16, torch.bfloat16)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.fixture(autouse=True)
def _a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_capability", lambda _: device.HOPPER)


def on_gpu(*shape: int, dtype: torch.dtype = torch.float16, offset: int = 0) -> Any:
    flat = torch.empty(torch.Size(shape).numel() + offset, dtype=dtype, device="meta")[offset:]
    return flat.view(shape).as_subclass(OnGpu)


# --- the eager twins ----------------------------------------------------------------------------


def test_the_gated_layer_is_what_the_layers_give() -> None:
    x, weight, bias = torch.randn(5, 8), torch.randn(12, 8), torch.randn(12)
    values, gate = functional.linear(x, weight[:6], bias[:6]), x @ weight[6:].t() + bias[6:]
    for function in (geglu.reference, geglu.operator()):
        torch.testing.assert_close(function(x, weight, bias), values * functional.gelu(gate))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("term", [True, False])
def test_the_norm_is_what_the_layers_give(shift: bool, term: bool) -> None:
    x, weight, bias, added = torch.randn(2, 5, 8), *torch.randn(3, 8)
    other = torch.randn_like(x)
    total = x + (added if shift else 0) + (other if term else 0)
    expected = functional.layer_norm(total, (8,), weight, bias, 1e-3)
    alone, summed = layer_norm.operators()
    given = (x, added if shift else None, other if term else None, weight, bias, 1e-3)
    for function in (layer_norm.reference, summed):
        torch.testing.assert_close(function(*given), (total, expected))
    if not shift and not term:
        torch.testing.assert_close(alone(x, weight, bias, 1e-3), expected)


def test_attention_block_by_block_is_attention() -> None:
    q, k, v = (torch.randn(2, n, 3 * 16).view(2, n, 3, 16).transpose(1, 2) for n in (50, 90, 90))
    actual = flash_attention.operator()(q, k, v, 0.3)
    expected = functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(actual, expected)
    assert actual.transpose(1, 2).is_contiguous()


# --- when the kernels may be used ---------------------------------------------------------------


def layer(rows: int = 2048, depth: int = 640, width: int = 2560, **options: Any) -> tuple[Any, ...]:
    return (
        on_gpu(rows, depth, **options),
        on_gpu(2 * width, depth, **options),
        on_gpu(2 * width, **options),
    )


def test_a_large_tile_only_where_there_is_much_to_read() -> None:
    sizes = [(512, 1280), (8192, 640), (65536, 320), (1024, 1280), (2048, 1280), (8192, 1280)]
    assert [geglu.tile(*size) == geglu._LARGE for size in sizes] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [512, 1025, 8192])
def test_the_gated_layer_is_usable(rows: int, dtype: torch.dtype) -> None:
    assert geglu.usable(*layer(rows, dtype=dtype))


@pytest.mark.parametrize(
    "given",
    {
        "cpu": tuple(t.as_subclass(torch.Tensor) for t in layer()),
        "fp32": layer(dtype=torch.float32),
        "mixed": (*layer()[:2], on_gpu(5120, dtype=torch.bfloat16)),
        "few rows": layer(511),
        "odd depth": layer(depth=96),
        "odd width": layer(width=100),
        "off the grid": layer(offset=1),
        "turned": (layer()[0], on_gpu(640, 5120).t(), layer()[2]),
        "another bias": (*layer()[:2], on_gpu(2560)),
        "more than 32 bits": layer(2**21),
    }.values(),
    ids=lambda value: "",
)
def test_the_gated_layer_is_not_usable(given: tuple[Any, ...]) -> None:
    assert not geglu.usable(*given)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(2, 1024, 1280), (128, 1280), (1, 1, 4096)])
def test_the_norm_is_usable(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert layer_norm.usable(on_gpu(*shape, dtype=dtype), False)


@pytest.mark.parametrize(
    "x",
    {
        "cpu": on_gpu(2, 64, 1280).as_subclass(torch.Tensor),
        "fp32": on_gpu(2, 64, 1280, dtype=torch.float32),
        "narrow, where compilers do well": on_gpu(2, 64, 1024),
        "wide": on_gpu(2, 64, 8192),
        "odd": on_gpu(2, 64, 1284),
        "one row": on_gpu(1280),
        "turned": on_gpu(2, 1280, 64).transpose(1, 2),
        "off the grid": on_gpu(2, 64, 1280, offset=4),
        "empty": on_gpu(0, 64, 1280),
        "more than 32 bits": on_gpu(2**21, 1280),
    }.values(),
    ids=lambda value: "",
)
def test_the_norm_is_not_usable(x: torch.Tensor) -> None:
    assert not layer_norm.usable(x, False)


def test_a_bias_makes_the_norm_of_narrow_rows_usable() -> None:
    assert layer_norm.usable(on_gpu(2, 4096, 320), True)
    assert not layer_norm.usable(on_gpu(2, 4096, 320), False)
    assert not layer_norm.usable(on_gpu(2, 4096, 640), True)


def heads(images: int, count: int, rows: int, width: int, **options: Any) -> Any:
    flat = on_gpu(images, rows, count * width, **options)
    return flat.view(images, rows, count, width).transpose(1, 2)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("rows", "keys", "width"), [(1024, 1024, 64), (256, 256, 160), (1024, 154, 80), (33, 81, 40)]
)
def test_attention_is_usable(rows: int, keys: int, width: int, dtype: torch.dtype) -> None:
    q, k = (heads(2, 8, n, width, dtype=dtype) for n in (rows, keys))
    assert flash_attention.usable(q, k, k)


@pytest.mark.parametrize(
    ("q", "k"),
    {
        "cpu": [heads(2, 8, 256, 64).as_subclass(torch.Tensor)] * 2,
        "fp32": [heads(2, 8, 256, 64, dtype=torch.float32)] * 2,
        "few keys, which have another kernel": (heads(2, 8, 256, 64), heads(2, 8, 77, 64)),
        "narrow": [heads(2, 8, 256, 32)] * 2,
        "wide": [heads(2, 8, 256, 256)] * 2,
        "much work, where cuDNN is faster": [heads(2, 8, 4096, 64)] * 2,
        "fewer heads": (heads(2, 8, 256, 64), heads(2, 4, 256, 64)),
        "turned": [heads(2, 8, 256, 64).transpose(2, 3).contiguous().transpose(2, 3)] * 2,
    }.values(),
    ids=lambda value: "",
)
def test_attention_is_not_usable(q: torch.Tensor, k: torch.Tensor) -> None:
    assert not flash_attention.usable(q, k, k)


def test_other_gpus_have_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """LayerNorm waits for memory everywhere; how products are cut was measured on Hopper only."""
    monkeypatch.setattr(device, "_capability", lambda _: (8, 9))
    q = heads(2, 8, 256, 64)
    assert not geglu.usable(*layer()) and not flash_attention.usable(q, q, q)
    assert layer_norm.usable(on_gpu(2, 64, 1280), False)
