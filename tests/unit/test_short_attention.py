"""Attention over few keys: the eager twin, when the kernel may be used, how it cuts, and itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blade.blade_core.kernels.short_attention import operator, parts, reference, tile, usable


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def heads_of(
    batch: int, heads: int, rows: int, width: int, dtype: torch.dtype = torch.float16
) -> Any:
    """(B, heads, L, D), as the host views (B, L, heads * D)."""
    flat = torch.randn(batch, rows, heads * width).to(dtype)
    return flat.view(batch, rows, heads, width).transpose(1, 2)


def on_gpu(
    batch: int, heads: int, rows: int, width: int, dtype: torch.dtype = torch.float16
) -> Any:
    return heads_of(batch, heads, rows, width, dtype).as_subclass(OnGpu)


# --- the eager twin -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.125, 1.0])
def test_the_twin_is_attention(scale: float) -> None:
    q, k, v = (heads_of(2, 3, n, 16, torch.float64) for n in (50, 7, 7))
    expected = (q @ k.transpose(2, 3) * scale).softmax(-1) @ v
    for function in (reference, operator()):
        actual = function(q, k, v, scale)
        torch.testing.assert_close(actual, expected)
        # So that the host's transpose and reshape to (B, L, heads * D) copy nothing.
        assert actual.transpose(1, 2).is_contiguous()


# --- when the kernel may be used ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "keys", "width"), [(4096, 77, 40), (1024, 77, 64), (64, 64, 160), (33, 1, 16)]
)
def test_usable(rows: int, keys: int, width: int, dtype: torch.dtype) -> None:
    q = on_gpu(2, 8, rows, width, dtype=dtype)
    both = on_gpu(4, 8, keys, width, dtype=dtype)
    assert usable(q, *both.chunk(2))


GOOD = on_gpu(2, 8, 77, 64)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    {
        "cpu": (GOOD.as_subclass(torch.Tensor), GOOD, GOOD),
        "fp32": (GOOD.float(), GOOD.float(), GOOD.float()),
        "mixed": (GOOD, GOOD, GOOD.bfloat16()),
        "many keys": (GOOD, on_gpu(2, 8, 1024, 64), on_gpu(2, 8, 1024, 64)),
        "no keys": (GOOD, GOOD[:, :, :0], GOOD[:, :, :0]),
        "other values": (GOOD, GOOD, on_gpu(2, 8, 77, 32)),
        "fewer heads": (GOOD, on_gpu(2, 4, 77, 64), on_gpu(2, 4, 77, 64)),
        "wide": tuple(on_gpu(2, 8, 77, 256) for _ in range(3)),
        "odd width": tuple(on_gpu(2, 8, 77, 20) for _ in range(3)),
        "off the grid": (on_gpu(2, 8, 77, 72)[..., 4:68], GOOD, GOOD),
        "transposed": (GOOD, GOOD, on_gpu(2, 8, 64, 77).transpose(2, 3)),
    }.values(),
    ids=lambda value: "",
)
def test_not_usable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    assert not usable(q, k, v)


def test_where_another_kernel_is_as_fast_it_is_left() -> None:
    """In large batches of SD1.5's 64x64 latents, and over two prompts' keys."""
    assert usable(on_gpu(2, 10, 4096, 64), *on_gpu(4, 10, 77, 64).chunk(2))
    assert not usable(on_gpu(3, 8, 4096, 40), *on_gpu(6, 8, 77, 40).chunk(2))
    assert not usable(on_gpu(2, 8, 4096, 40), *on_gpu(4, 8, 154, 40).chunk(2))


# --- the kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(1, 257))
def test_parts_cover_with_little_left_over(number: int) -> None:
    first, second = parts(number)
    assert first & (first - 1) == second & (second - 1) == 0
    assert first >= 16 and (second == 0 or 16 <= second < first)
    assert number <= first + second <= max(16, 1.34 * number + 15)
    # The kernel masks the second part, and the first only if there is no second.
    assert second == 0 or first < number


def test_no_small_block_is_multiplied_by_wgmma() -> None:
    for rows in (64, 256, 4096):
        for keys in (16, 64, 77, 80):
            for width in (40, 64, 80, 160):
                chosen = tile(rows, keys, width)
                blocks = [*chosen.keys, *chosen.width]
                assert chosen.rows < 64 or chosen.warps < 4 or min(filter(None, blocks)) >= 64
                assert sum(chosen.keys) >= keys and sum(chosen.width) >= width
