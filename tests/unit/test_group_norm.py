"""GroupNorm with what stands around it: the eager twin, when the kernels may be used, and they."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from blade.blade_core.kernels.group_norm import operator, reference, tiles, usable

NHWC = torch.channels_last


def arguments(channels: int = 64, **options: Any) -> tuple[Any, ...]:
    """x, shift, term, weight, bias, groups, eps, silu."""
    x = torch.randn(2, channels, 6, 5).contiguous(memory_format=NHWC)
    shift = torch.randn(channels) if options.get("shift") else None
    term = torch.randn(2, channels) if options.get("term") else None
    weight, bias = torch.randn(2, channels)
    return x, shift, term, weight, bias, 32, 1e-3, options.get("silu", False)


# --- the eager twin -----------------------------------------------------------------------------


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("term", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_the_twin_is_what_the_layers_give(shift: bool, term: bool, silu: bool) -> None:
    x, bias, emb, *_ = given = arguments(shift=shift, term=term, silu=silu)
    norm = nn.GroupNorm(32, 64, eps=1e-3)
    norm.weight.data, norm.bias.data = given[3], given[4]
    h = x if bias is None else x + bias.view(1, 64, 1, 1)
    h = norm(h if emb is None else h + emb.view(2, 64, 1, 1))
    expected = nn.functional.silu(h) if silu else h
    for function in (reference, operator()):
        actual = function(*given)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert actual.is_contiguous(memory_format=NHWC)


# --- when the kernels may be used ---------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def image(*shape: int, dtype: torch.dtype = torch.float16, offset: int = 0) -> Any:
    n, c, h, w = shape
    flat = torch.empty(n * c * h * w + offset, dtype=dtype)[offset:]
    return flat.view(n, h, w, c).permute(0, 3, 1, 2).as_subclass(OnGpu)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 320, 64, 64), (1, 2560, 5, 3), (3, 64, 1, 1)])
def test_usable(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert usable(image(*shape, dtype=dtype), 32)


@pytest.mark.parametrize(
    "x",
    {
        "cpu": image(2, 320, 8, 8).as_subclass(torch.Tensor),
        "fp32": image(2, 320, 8, 8, dtype=torch.float32),
        "NCHW": image(2, 320, 8, 8).contiguous(),
        "tokens": image(2, 320, 8, 8).flatten(2),
        "every other row": image(2, 320, 8, 8)[:, :, ::2],
        "33 channels": image(2, 33, 8, 8),
        "groups of unequal size": image(2, 40, 8, 8),
        "wide groups": image(1, 32 * 264, 2, 2),
        "off the grid": image(2, 320, 8, 8, offset=1),
        "empty": image(0, 320, 8, 8),
    }.values(),
    ids=lambda value: "",
)
def test_not_usable(x: torch.Tensor) -> None:
    assert not usable(x, 32)


def test_what_cannot_be_counted_in_32_bits_is_not_usable() -> None:
    large = torch.empty(1, dtype=torch.float16).expand(1, 2048, 1024, 1024)
    large = torch.empty_strided(
        large.shape, (2**31, 1, 2**21, 2**11), dtype=torch.float16, device="meta"
    ).as_subclass(OnGpu)
    assert not usable(large, 32)


# --- the kernels --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 77, 256, 4096, 65536])
@pytest.mark.parametrize("width", [1, 2, 10, 20, 30, 40, 60, 80, 256])
def test_a_tile_fits_into_a_program(width: int, rows: int) -> None:
    tile = tiles(rows, width)
    padded = 1 << (width - 1).bit_length()
    assert tile.chunk % tile.step == 0
    assert 128 <= tile.groups * padded <= 256 or (padded < 4 and tile.groups >= 32)
    assert tile.step * tile.groups * padded <= 2**13  # what 128 threads keep in registers
    assert tile.chunk // tile.step <= 16  # they are unrolled
    sizes = (tile.step, tile.groups, tile.rows, tile.channels)
    assert all(size & (size - 1) == 0 for size in sizes)
