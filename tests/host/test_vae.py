"""BladeOptimizeVAE gives the image of the stock VAE, and leaves what came in alone."""

import copy
import gc
import itertools
import pickle
from typing import Any

import comfy.model_management
import pytest
import torch
from blade_tests.host.tiny import relative_rms
from blade_tests.host.vaes import (
    FALLBACK,
    LAYERS,
    Use,
    assert_as_stock,
    decode,
    encode,
    latent,
    make_vae,
    optimized,
    pixels,
    reports,
    used,
)

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session
from blade.blade_core.host.unit import Unit
from blade.blade_core.report import as_text

# What is captured is in test_vae_capture.py.
pytestmark = pytest.mark.parametrize("session", ["captured"], indirect=True)

TILES = {"tile_x": 16, "tile_y": 16, "overlap": 4}


@pytest.fixture
def vae() -> Any:
    return make_vae()


USES: dict[str, Use] = {
    "decode": decode(),
    "decode 3": decode(batch=3),
    "decode of an odd size": decode(size=(9, 13)),
    "decode in tiles": lambda vae: vae.decode_tiled(latent(2, (20, 24)), **TILES),
    "encode": encode(),
    "encode 3": encode(batch=3),
    "encode of an odd size": encode(size=(77, 123)),
    "encode in tiles": lambda vae: vae.encode_tiled(
        pixels(1, (160, 136)), tile_x=128, tile_y=128, overlap=32
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_the_same_result(session: Session, vae: Any, use: Use) -> None:
    strides = [p.stride() for p in vae.first_stage_model.parameters()]
    with session.engine.counters.expect(blocks_eager=0, runs=0):
        assert_as_stock(vae, optimized(vae), use)
    assert [p.stride() for p in vae.first_stage_model.parameters()] == strides
    assert session.engine.counters["vae_runs"] > 0


def test_what_is_random_stays_the_hosts(session: Session, vae: Any) -> None:
    """A sample of the posterior: the same numbers for the same seed, for the whole batch."""
    plain = used(vae, encode(batch=3))
    vae.first_stage_model.regularization.sample = True
    (expected,) = assert_as_stock(vae, optimized(vae), encode(batch=3))
    assert relative_rms(expected, plain) > 1e-2


def test_one_life(session: Session, vae: Any) -> None:
    """Batches, sizes that come back, seeds and another VAE compile nothing."""
    ours, counters = optimized(vae), session.engine.counters
    assert_as_stock(vae, ours, decode(), encode())
    report = reports(session)
    assert {name: len(report[f"VAE {name}"]["blocks"]) for name in LAYERS} == LAYERS
    compiled = counters["graphs_compiled"]
    assert 0 < compiled < sum(LAYERS.values())  # equal layers share
    with counters.expect(graphs_compiled=0, blocks_compiled=LAYERS["decoder"]):
        used(ours, decode(batch=4, seed=1))
    assert_as_stock(vae, ours, decode(size=(8, 12)))
    other, another = make_vae(seed=1), optimized(make_vae(seed=1))
    with counters.expect(graphs_compiled=0, blocks_eager=0):
        assert_as_stock(vae, ours, decode(), decode(size=(8, 12)), encode())
        (image,) = assert_as_stock(other, another, decode())
    assert relative_rms(image, used(vae, decode())) > 1e-2


def test_the_host_loads_one_model(session: Session, vae: Any) -> None:
    ours = optimized(vae)
    assert ours is not vae and ours.patcher is vae.patcher
    assert ours.get_sd().keys() == vae.get_sd().keys()
    assert ours.first_stage_model.decoder is vae.first_stage_model.decoder
    assert ours.model_size() == vae.model_size()


def test_the_node_gets_the_compiler_ready(session: Session, vae: Any) -> None:
    optimized(vae)
    assert session.engine._preload._thread is None  # backend eager needs none
    optimized(vae, OptimizeConfig(backend="inductor"))
    assert session.engine._preload._thread is not None
    session.engine._preload.wait()


def test_twice_and_off(session: Session, vae: Any) -> None:
    twice = optimized(optimized(vae, FALLBACK))
    assert_as_stock(vae, twice, decode())
    assert [report["on_failure"] for report in session.stats()["vaes"]] == ["error"]
    assert optimized(vae, enabled=False) is vae
    off = optimized(twice, enabled=False)
    assert off.first_stage_model is vae.first_stage_model and off.patcher is vae.patcher
    with session.engine.counters.expect(vae_runs=0):
        assert torch.equal(used(off, decode()), used(vae, decode()))


def test_pixels_to_the_last_bit(session: Session, vae: Any) -> None:
    ours = optimized(vae)
    given = torch.cat([torch.randn(1000), torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])])
    image = given.clone()
    expected = vae.process_output(given.clone())
    torch.testing.assert_close(
        ours.process_output(image), expected, rtol=0.0, atol=0.0, equal_nan=True
    )
    if vae.process_output is not ours.process_output:  # it makes new tensors, and so do we
        torch.testing.assert_close(image, given, rtol=0.0, atol=0.0, equal_nan=True)
    off = optimized(ours, enabled=False)
    assert off.process_output is vae.process_output


@pytest.mark.parametrize("other", [lambda image: image, lambda image: image.mul_(2.0)])
def test_other_ways_to_pixels_are_left_alone(session: Session, vae: Any, other: Any) -> None:
    vae.process_output = other
    assert optimized(vae).process_output is other


def test_copies(session: Session, vae: Any) -> None:
    ours = optimized(vae)
    expected = used(vae, decode())
    with session.engine.counters.expect(blocks_eager=0, vae_runs=3):
        assert relative_rms(used(copy.copy(ours), decode()), expected) <= 1e-4
        for proxy in (
            copy.deepcopy(ours.first_stage_model),
            pickle.loads(pickle.dumps(ours.first_stage_model)),
        ):
            other = copy.copy(ours)
            other.first_stage_model = proxy
            assert proxy.decoder is not vae.first_stage_model.decoder
            assert relative_rms(used(other, decode()), expected) <= 1e-4


def test_the_vae_goes_with_its_states(session: Session) -> None:
    vae = make_vae()
    used(optimized(vae), decode())
    assert list(reports(session)) == ["VAE decoder"]
    del vae
    comfy.model_management.unload_all_models()
    gc.collect()
    assert session.stats()["vaes"] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(session: Session, dtype: torch.dtype) -> None:
    vae = make_vae(dtype=dtype)
    with session.engine.counters.expect(blocks_eager=0):
        assert_as_stock(vae, optimized(vae), decode(), encode(), bound=3e-2)


def test_with_inductor(session: Session, vae: Any) -> None:
    config = OptimizeConfig(backend="inductor", on_failure="error")
    with session.engine.counters.expect(blocks_eager=0):
        assert_as_stock(vae, optimized(vae, config), decode())
    with session.engine.counters.expect(graphs_compiled=0, blocks_eager=0):
        assert_as_stock(vae, optimized(vae, config), decode(batch=2, seed=1))


def test_frozen_weights(session: Session, vae: Any) -> None:
    ours = optimized(vae, OptimizeConfig(backend="eager", freeze_weights=True))
    assert_as_stock(vae, ours, decode())
    with torch.no_grad():
        vae.first_stage_model.decoder.conv_out.weight.mul_(1.5)
    with session.engine.counters.expect(graphs_compiled=1, frozen_rebuilds=1):
        assert_as_stock(vae, ours, decode())


def test_the_report(session: Session, vae: Any) -> None:
    ours = optimized(vae)
    used(ours, decode())
    used(ours, encode())
    lines = as_text(session.stats()).splitlines()
    for name, count in LAYERS.items():
        at = lines.index(f"VAE {name} (backend eager: eager; on_failure error)")
        assert lines[at + 2] == f"- {count} blocks: {count} compiled"


def peak(vae: Any, use: Use) -> int:
    """Bytes that tensors hold at most, over those that they held before."""
    with torch.profiler.profile(profile_memory=True) as profile, torch.inference_mode():
        use(vae)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def test_no_more_memory_while_others_compile(
    session: Session, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then layers run as stock, though Blade looks at their images in another layout."""
    monkeypatch.setattr(Unit, "_ask", lambda *_: None)  # not done yet, and again not
    ours = optimized(vae, OptimizeConfig(backend="inductor", on_failure="error"))
    use = decode(size=(16, 16))
    with session.engine.counters.expect(graphs_compiled=0, blocks_eager=LAYERS["decoder"]):
        used(ours, use)
    assert peak(ours, use) <= 1.01 * peak(vae, use)
