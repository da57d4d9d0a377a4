"""VAEs of the usual size on a GPU: the same image in each dtype, and no more memory than stock."""

import gc
from typing import Any

import comfy.model_management
import pytest
import torch
from blade_tests.host.tiny import relative_rms
from blade_tests.host.vaes import (
    FULL,
    Use,
    decode,
    encode,
    latent,
    make_vae,
    optimized,
    used,
)

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session

STRICT = OptimizeConfig(on_failure="error")
BOUNDS = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
LAYERS = 2 + 3 + 3 * 4 + 3 + 1
"""That the host's Decoder of FULL calls."""


@pytest.fixture(autouse=True)
def compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While other processes compile, a first image would be decoded as stock does it."""
    monkeypatch.setenv("BLADE_COMPILE_WORKERS", "0")


def as_stock(vae: Any, ours: Any, *uses: Use) -> list[torch.Tensor]:
    """Images by values only: kernels of a GPU differ in the last bits from call to call."""
    results = []
    for use in uses:
        expected, actual = used(vae, use), used(ours, use)
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert relative_rms(actual, expected) <= BOUNDS[vae.vae_dtype]
        assert torch.isfinite(actual).all()
        results.append(expected)
    return results


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_same_image_in_one_life(session: Session, dtype: torch.dtype) -> None:
    vae, counters = make_vae(dtype=dtype, config=FULL), session.engine.counters
    ours = optimized(vae, STRICT)
    with counters.expect(blocks_eager=0, blocks_compiled=LAYERS):
        as_stock(vae, ours, decode(size=(64, 64)))
    as_stock(vae, ours, encode(size=(512, 512)))
    with counters.expect(graphs_compiled=0, blocks_eager=0):
        as_stock(vae, ours, decode(batch=3, size=(64, 64), seed=1), encode(2, (512, 512)))
    as_stock(vae, ours, decode(size=(48, 40)))
    other = make_vae(seed=1, dtype=dtype, config=FULL)
    with counters.expect(graphs_compiled=0, blocks_eager=0):
        (image,) = as_stock(other, optimized(other, STRICT), decode(size=(64, 64)))
        as_stock(vae, ours, decode(size=(64, 64)), decode(size=(48, 40)))
    assert relative_rms(image, used(vae, decode(size=(64, 64)))) > 0.05
    assert counters["blocks_eager"] == 0


def test_tiles(session: Session) -> None:
    vae = make_vae(dtype=torch.bfloat16, config=FULL)
    as_stock(
        vae,
        optimized(vae, STRICT),
        lambda vae: vae.decode_tiled(latent(size=(96, 80)), tile_x=64, tile_y=64, overlap=16),
    )
    assert session.engine.counters["blocks_eager"] == 0


def test_offloaded_weights(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = make_vae(dtype=torch.bfloat16, config=FULL)
    ours, patcher = optimized(vae, STRICT), vae.patcher
    as_stock(vae, ours, decode(size=(32, 32)))
    comfy.model_management.unload_all_models()
    half = int(0.5 * patcher.model_size())
    device, load = comfy.model_management.get_torch_device(), patcher.load
    monkeypatch.setattr(patcher, "load", lambda *_, **__: load(device, lowvram_model_memory=half))
    with session.engine.counters.expect(graphs_compiled=0, blocks_eager=0):
        as_stock(vae, ours, decode(size=(32, 32)))
    assert any(p.device.type == "cpu" for p in vae.first_stage_model.parameters())


def peak(vae: Any, use: Use) -> int:
    """Most bytes that tensors hold while it runs, the weights being there already."""
    used(vae, use)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    used(vae, use)
    return int(torch.cuda.max_memory_allocated())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_more_memory_than_stock(session: Session, dtype: torch.dtype) -> None:
    vae = make_vae(dtype=dtype, config=FULL)
    ours = optimized(vae, STRICT)
    for use in (decode(size=(128, 128)), decode(batch=2, size=(64, 64))):
        stock = peak(vae, use)
        assert peak(ours, use) <= 1.05 * stock


def test_memory_comes_back(session: Session) -> None:
    def used_bytes() -> int:
        comfy.model_management.unload_all_models()
        gc.collect()
        comfy.model_management.soft_empty_cache()
        return int(torch.cuda.memory_allocated())

    def life() -> int:
        vae = make_vae(dtype=torch.bfloat16, config=FULL)
        used(optimized(vae, STRICT), decode(size=(32, 32)))
        del vae
        return used_bytes()

    first = life()
    assert life() <= first + 2**20
    assert session.captures.used() == 0 and session.stats()["vaes"] == []
