"""Blade's own kernels on a real GPU: against fp64, in compiled units, recorded and replayed."""

from typing import Any

import pytest
import torch
from blade_tests.host.tiny import relative_rms
from blade_tests.unit.samples import request_of
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from blade.blade_core.backends.inductor import InductorBackend
from blade.blade_core.kernels import (
    flash_attention,
    geglu,
    group_norm,
    joint_linear,
    layer_norm,
    short_attention,
)
from blade.blade_core.kernels.device import HOPPER
from blade.blade_core.recorder import CudaRecorder

CUDA = torch.device("cuda")
NHWC = torch.channels_last
BOUND = {torch.float16: 5e-4, torch.bfloat16: 4e-3}

# (C, H, W) of SD1.5 at 512x512 and 320x192, and of SDXL at 1024x1024.
IMAGES = [
    *((320, 64, 64), (640, 64, 64), (960, 64, 64), (640, 32, 32), (1280, 32, 32), (1920, 32, 32)),
    *((1280, 16, 16), (1920, 16, 16), (2560, 16, 16), (1280, 8, 8), (2560, 8, 8)),
    *((320, 40, 24), (640, 20, 12), (1280, 10, 6), (2560, 5, 3), (320, 128, 128)),
]
# Of the VAE at 1024x1024 and an odd size, whose parts are merged by a kernel of their own.
LARGE = [(512, 256, 256), (256, 1024, 1024), (128, 1024, 1024), (128, 616, 984)]
# (heads, L, S, D)
ATTENTIONS = [
    *((8, 4096, 77, 40), (8, 1024, 77, 80), (8, 256, 77, 160), (8, 64, 77, 160), (8, 64, 64, 160)),
    *((20, 1024, 77, 64), (8, 960, 77, 40), (8, 240, 77, 80), (8, 60, 60, 160), (5, 33, 1, 64)),
    *((10, 4096, 77, 64), (20, 130, 80, 64), (20, 64, 65, 64), (20, 1024, 64, 64)),
]
# (heads, L, S, D), of SD1.5 at 512x512 and 320x192, of SDXL, and others
LONG_ATTENTIONS = [
    *((8, 1024, 1024, 80), (8, 256, 256, 160), (20, 1024, 1024, 64), (8, 240, 240, 80)),
    *((8, 60, 90, 160), (20, 576, 576, 64), (8, 1024, 154, 40), (5, 33, 81, 96), (3, 65, 129, 128)),
]
ON_HOPPER = pytest.mark.skipif(
    torch.cuda.get_device_capability() != HOPPER, reason="written for other GPUs"
)


def noise(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA).to(dtype)


def image(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return noise(*shape, dtype=dtype).contiguous(memory_format=NHWC)


def norm_error(given: tuple[Any, ...]) -> float:
    assert group_norm.usable(given[0], given[5])
    actual = group_norm.operator()(*given)
    assert actual.stride() == given[0].stride() and actual.dtype == given[0].dtype
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in given]
    return relative_rms(actual, group_norm.reference(*wide))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_group_norm(shape: tuple[int, int, int]) -> None:
    channels = shape[0]
    for batch, dtype, mean, added in (
        (2, torch.float16, 0.0, True),
        (1, torch.bfloat16, 0.0, True),
        (3, torch.float16, 40.0, False),
        (8, torch.float16, -3.0, True),
    ):
        x = image(batch, *shape, dtype=dtype) + mean
        weight, bias, shift = noise(3, channels, dtype=dtype)
        term = noise(batch, channels, dtype=dtype) if added else None
        given = (x, shift if added else None, term, weight, bias, 32, 1e-5, added)
        assert norm_error(given) <= BOUND[dtype]


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_group_norm_of_large_images(shape: tuple[int, int, int]) -> None:
    for dtype, mean in ((torch.bfloat16, 0.0), (torch.float16, 40.0)):
        x = image(1, *shape, dtype=dtype) + mean
        weight, bias, shift = noise(3, shape[0], dtype=dtype)
        assert norm_error((x, shift, None, weight, bias, 32, 1e-6, True)) <= BOUND[dtype]


def test_group_norm_far_from_zero_with_a_sample_far_from_the_mean() -> None:
    x = image(2, 320, 64, 64) * 0.5 + 1000
    x[:, ::10, ::4] = 900  # what the sums start from
    weight, bias = noise(2, 320)
    assert norm_error((x, None, None, weight, bias, 32, 1e-5, False)) <= BOUND[torch.float16]


@pytest.mark.parametrize("size", [8, 64])
def test_nan_stays_in_its_group(size: int) -> None:
    x, (weight, bias) = image(2, 320, size, size), noise(2, 320)
    x[1, 25, 3, 2] = torch.nan
    actual = group_norm.operator()(x, None, None, weight, bias, 32, 1e-5, True)
    assert actual[1, 20:30].isnan().all()
    assert actual.isnan().sum() == 10 * size * size


def heads_of(flat: torch.Tensor, heads: int) -> torch.Tensor:
    batch, rows, width = flat.shape
    return flat.view(batch, rows, heads, width // heads).transpose(1, 2)


@pytest.mark.parametrize("shape", ATTENTIONS, ids=str)
def test_short_attention(shape: tuple[int, int, int, int]) -> None:
    heads, rows, keys, width = shape
    batches = (1, 2, 3, 8) if heads * rows <= 2**13 else (1, 2)
    for batch in batches:
        for dtype, size in ((torch.float16, 1.0), (torch.bfloat16, 1.0), (torch.float16, 8.0)):
            q = heads_of(noise(batch, rows, heads * width, dtype=dtype) * size, heads)
            k, v = heads_of(noise(2 * batch, keys, heads * width, dtype=dtype), heads).chunk(2)
            assert short_attention.usable(q, k, v)
            for _ in range(2):  # twice the same: nothing is read before it is written
                actual = short_attention.operator()(q, k, v, width**-0.5)
                scores = q.double() @ k.double().transpose(2, 3) * width**-0.5
                assert relative_rms(actual, scores.softmax(-1) @ v.double()) <= BOUND[dtype]
                assert actual.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("keys", "width"), [(154, 40), (231, 64), (77, 96), (256, 80)])
def test_more_keys_than_it_is_used_for(keys: int, width: int) -> None:
    q, k, v = (heads_of(noise(2, n, 4 * width), 4) for n in (130, keys, keys))
    actual = short_attention.run(q, k, v, width**-0.5)
    scores = q.double() @ k.double().transpose(2, 3) * width**-0.5
    assert relative_rms(actual, scores.softmax(-1) @ v.double()) <= BOUND[torch.float16]


def test_nan_in_attention_stays_in_its_head() -> None:
    q, k, v = (heads_of(noise(2, n, 320), 8) for n in (96, 77, 77))
    k[1, 3, 76, 39] = torch.nan
    actual = short_attention.operator()(q, k, v, 0.2)
    assert actual[1, 3].isnan().all()
    assert actual.isnan().sum() == 96 * 40


@ON_HOPPER
@pytest.mark.parametrize("shape", LONG_ATTENTIONS, ids=str)
def test_flash_attention(shape: tuple[int, int, int, int]) -> None:
    heads, rows, keys, width = shape
    for batch in (1, 2):
        for dtype, size in ((torch.float16, 1.0), (torch.bfloat16, 1.0), (torch.float16, 8.0)):
            q = heads_of(noise(batch, rows, heads * width, dtype=dtype) * size, heads)
            k, v = heads_of(noise(2 * batch, keys, heads * width, dtype=dtype), heads).chunk(2)
            assert flash_attention.usable(q, k, v)
            for _ in range(2):  # twice the same: nothing is read before it is written
                actual = flash_attention.operator()(q, k, v, width**-0.5)
                scores = q.double() @ k.double().transpose(2, 3) * width**-0.5
                assert relative_rms(actual, scores.softmax(-1) @ v.double()) <= BOUND[dtype]
                assert actual.transpose(1, 2).is_contiguous()


@ON_HOPPER
def test_nan_in_flash_attention_stays_in_its_head() -> None:
    q, k, v = (heads_of(noise(2, n, 640), 8) for n in (96, 200, 200))
    k[1, 3, 199, 79] = torch.nan
    actual = flash_attention.operator()(q, k, v, 0.2)
    assert actual[1, 3].isnan().all()
    assert actual.isnan().sum() == 96 * 80


@ON_HOPPER
@pytest.mark.parametrize(
    ("rows", "depth", "width"),
    [
        *((8192, 320, 1280), (2048, 640, 2560), (2048, 1280, 5120), (512, 1280, 5120)),
        *((1950, 640, 2560), (2100, 1280, 5120), (1025, 64, 128)),
    ],
)
def test_geglu(rows: int, depth: int, width: int) -> None:
    for dtype in BOUND:
        weight = noise(2 * width, depth, dtype=dtype) * depth**-0.5
        given = (noise(rows, depth, dtype=dtype), weight, noise(2 * width, dtype=dtype))
        assert geglu.usable(*given)
        for _ in range(2):
            expected = geglu.reference(*(t.double() for t in given))
            assert relative_rms(geglu.operator()(*given), expected) <= BOUND[dtype]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("shape", [(8192, 320), (512, 1280), (120, 640)])
def test_joint_linear(shape: tuple[int, int], joined: bool) -> None:
    rows, width = shape
    x, weights = noise(rows, width), [noise(width, width) * width**-0.5 for _ in range(3)]
    if joined:
        weights = list(torch.cat(weights).split(width))
    assert (joint_linear.as_one(weights) is not None) == joined
    expected = joint_linear.reference(x.double(), [weight.double() for weight in weights])
    actual = joint_linear.operator()(x, weights)
    assert relative_rms(actual, expected) <= BOUND[torch.float16]


@pytest.mark.parametrize("shape", [(2, 1024, 1280), (1, 77, 2560), (2, 4096, 320), (3, 5, 4096)])
def test_layer_norm(shape: tuple[int, ...]) -> None:
    width = shape[-1]
    alone, summed = layer_norm.operators()
    for dtype, mean in ((torch.float16, 0.0), (torch.bfloat16, 0.0), (torch.float16, 40.0)):
        x, term = noise(*shape, dtype=dtype) + mean, noise(*shape, dtype=dtype)
        shift, weight, bias = noise(3, width, dtype=dtype)
        assert layer_norm.usable(x, True)
        for given in ((shift, term), (None, term), (shift, None)):
            total, normed = summed(x, *given, weight, bias, 1e-5)
            wide: list[Any] = [None if t is None else t.double() for t in (x, *given, weight, bias)]
            expected = sum(t for t in wide[:3] if t is not None)
            assert relative_rms(total, expected) <= BOUND[dtype]
            # Of the sum as it is rounded: that is what eager takes, too.
            expected = functional.layer_norm(total.double(), (width,), wide[3], wide[4], 1e-5)
            assert relative_rms(normed, expected) <= BOUND[dtype]
        expected = functional.layer_norm(x.double(), (width,), weight.double(), bias.double())
        assert relative_rms(alone(x, weight, bias, 1e-5), expected) <= BOUND[dtype]


class Block(nn.Module):
    """A ResBlock, and attention over a prompt's keys and values, as ComfyUI's."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.GroupNorm(32, channels) for _ in range(3))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)
        )
        self.q, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(
        self, x: torch.Tensor, emb: torch.Tensor, both: torch.Tensor, scale: float
    ) -> torch.Tensor:
        h = self.convolutions[0](functional.silu(self.norms[0](x))) + emb[:, :, None, None]
        x = x + self.convolutions[1](functional.silu(self.norms[1](h))) * scale
        batch, channels, height, width = x.shape
        tokens = self.norms[2](x).movedim(1, 3).flatten(1, 2).contiguous()
        q, k, v = (heads_of(t, self.heads) for t in (self.q(tokens), *both.chunk(2)))
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        tokens = self.out(out.reshape(batch, -1, channels))
        return x + tokens.reshape(batch, height, width, channels).movedim(3, 1)


@pytest.mark.parametrize(("size", "frozen"), [(64, False), (8, False), (8, True)])
def test_a_compiled_unit_recorded_and_replayed(size: int, frozen: bool) -> None:
    """Under whichever allocator the process was started with."""
    torch.manual_seed(0)

    def inputs() -> tuple[torch.Tensor, ...]:
        return image(2, 320, size, size), noise(2, 320), noise(4, 77, 320)

    unit: Any = Block(320, 8)
    unit.to(CUDA, torch.float16, memory_format=NHWC)
    request = request_of(unit, inputs(), frozen=frozen)
    with torch.inference_mode():
        compiled = InductorBackend().compile(request)
        results: list[torch.Tensor] = []

        def call() -> None:
            results[:] = [compiled.call(request.weights, request.inputs)]

        call()
        expected = request.eager(request.weights, request.inputs)
        assert relative_rms(results[0], expected) <= 2e-3
        assert results[0].stride() == expected.stride()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            call()
            torch.cuda.synchronize()
        names = {event.name for event in trace.events()}
        assert "attend" in names and ("whole" if size == 8 else "apply") in names
        replay = CudaRecorder(CUDA).record(call)
        for _ in range(2):
            for old, new in zip(request.inputs, inputs(), strict=True):
                old.copy_(new)
            replay()
            expected = request.eager(request.weights, request.inputs)
            assert relative_rms(results[0], expected) <= 2e-3
        del replay
