"""Images of a VAE as one capture, where the GPU waits for the CPU, with the recorder of
test_capture.py. The first of a size compiles, the second tells, the third is recorded."""

import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
import pytest
import torch
from blade_tests.host.recorder import TapeRecorder
from blade_tests.host.tiny import relative_rms, sample
from blade_tests.host.vaes import (
    EAGER,
    FALLBACK,
    assert_as_stock,
    decode,
    encode,
    latent,
    make_vae,
    optimized,
    reports,
    used,
)
from comfy.ldm.modules.diffusionmodules import model as host

from blade.blade_core.capture import CaptureBudget
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session, optimize_model
from blade.blade_core.report import as_text

pytestmark = pytest.mark.parametrize("session", ["captured"], indirect=True)


@pytest.fixture
def vae() -> Any:
    return make_vae()


@pytest.fixture
def captured(session: Session, vae: Any) -> Any:
    """`vae` behind the node, its decode of the usual size captured."""
    ours = optimized(vae, FALLBACK)
    with session.engine.counters.expect(captures=1):
        for seed in range(3):
            used(ours, decode(seed=seed))
    return ours


@pytest.mark.parametrize("use", [decode, encode])
def test_from_the_third_image_on(session: Session, vae: Any, use: Callable[..., Any]) -> None:
    ours, counters = optimized(vae), session.engine.counters
    with counters.expect(captures=0, blocks_eager=0):
        assert_as_stock(vae, ours, use(), use(seed=1))
    with counters.expect(captures=1, vae_replays=0, graphs_compiled=0):
        assert_as_stock(vae, ours, use(seed=2))
    with counters.expect(captures=0, captures_dropped=0, vae_replays=2, blocks_eager=0):
        assert_as_stock(vae, ours, use(seed=3), use(seed=4))
    with counters.expect(captures=0, vae_replays=3):
        assert_as_stock(vae, ours, use(batch=3, seed=5))
    assert "(1 MiB), whole images replayed in the last run 3" in as_text(session.stats())


def test_a_batch_of_a_new_size(session: Session, vae: Any) -> None:
    with session.engine.counters.expect(captures=1, vae_replays=2):
        assert_as_stock(vae, optimized(vae), decode(batch=5))


def test_each_size_has_its_own(session: Session, vae: Any) -> None:
    ours = optimized(vae)
    sizes = [(8, 8), (8, 12), (12, 8)]
    with session.engine.counters.expect(captures=3, captures_dropped=0):
        assert_as_stock(vae, ours, *[decode(3, size) for size in sizes])
    with session.engine.counters.expect(captures=0, vae_replays=3):
        assert_as_stock(vae, ours, *[decode(1, size, seed=1) for size in sizes])


def test_tiles(session: Session, vae: Any) -> None:
    with session.engine.counters.expect(blocks_eager=0):
        assert_as_stock(
            vae,
            optimized(vae),
            lambda vae: vae.decode_tiled(latent(1, (40, 40)), tile_x=16, tile_y=16, overlap=4),
        )
    assert session.engine.counters["vae_replays"] > 0


class Busy(TapeRecorder):
    """A GPU that works on for longer than launching takes."""

    @staticmethod
    def wait(device: torch.device) -> None:
        time.sleep(0.3)


def test_where_the_gpu_does_not_wait_nothing_is_held(session: Session, vae: Any) -> None:
    session.captures = CaptureBudget(session.engine.counters, Busy, 2**30)
    ours = optimized(vae)
    with session.engine.counters.expect(captures=0, blocks_eager=0):
        assert_as_stock(vae, ours, *[decode(seed=seed) for seed in range(5)])
    (reason,) = reports(session)["VAE decoder"]["not_captured"]
    assert "less time than the GPU needs" in reason
    start = time.perf_counter()
    used(ours, decode())
    assert time.perf_counter() - start < 0.3  # asked once


def test_weights_written_in_place(session: Session, vae: Any, captured: Any) -> None:
    with torch.no_grad():
        vae.first_stage_model.decoder.conv_in.weight.mul_(1.5)
    with session.engine.counters.expect(captures_dropped=0, vae_replays=1):
        assert_as_stock(vae, captured, decode())


def evict(session: Session) -> None:
    """Both the memory that captures may hold and that of graphs were needed for others."""
    for pool in session.captures.pools:
        pool.clear()
    for key in session.engine.cache.all_keys():
        session.engine.cache.discard(key)


@pytest.mark.parametrize("delete", [evict, lambda session: session.clear(disk=False, memory=True)])
def test_what_compiles_again_is_not_recorded(
    session: Session, vae: Any, captured: Any, delete: Callable[[Session], Any]
) -> None:
    """Compiling waits for the GPU: that ends a recording, and under cudaMallocAsync the process."""
    delete(session)
    with session.engine.counters.expect(captures=0, vae_replays=0, blocks_eager=0):
        assert_as_stock(vae, captured, decode())
    with session.engine.counters.expect(captures=1, graphs_compiled=0):
        assert_as_stock(vae, captured, *[decode(seed=seed) for seed in range(3)])


def test_weights_that_leave_twice_from_where_they_were(
    session: Session, vae: Any, captured: Any
) -> None:
    """What was captured goes when the memory does, each time, though addresses are the same."""
    weight = vae.first_stage_model.decoder.conv_in.weight
    place = bytearray(weight.nbytes)

    def arrive() -> None:
        there = torch.frombuffer(place, dtype=weight.dtype).view(weight.shape)
        weight.data = there.copy_(weight.data)

    for _ in range(2):
        with session.engine.counters.expect(captures=1):
            arrive()
            assert_as_stock(vae, captured, *[decode(seed=seed) for seed in range(3)])
        with session.engine.counters.expect(captures_dropped=1):
            weight.data = weight.data.clone()


def test_weights_that_moved(session: Session, vae: Any, captured: Any) -> None:
    weight = vae.first_stage_model.decoder.conv_in.weight
    with session.engine.counters.expect(captures_dropped=1, captures=1, graphs_compiled=0):
        weight.data = weight.data * 1.5
        assert_as_stock(vae, captured, *[decode(seed=seed) for seed in range(3)])


def test_memory_comes_back_when_the_host_frees_the_weights(
    session: Session, vae: Any, captured: Any
) -> None:
    """The host tells nobody: the patcher is the stock VAE's, too."""
    assert session.captures.used() == 2**20
    with session.engine.counters.expect(captures_dropped=1):
        for parameter in vae.first_stage_model.parameters():
            parameter.data = parameter.data.clone()
    assert session.captures.used() == 0
    assert_as_stock(vae, captured, decode())


def _number(vae: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vae.first_stage_model.decoder, "tanh_out", True)


def _function(vae: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(host, "nonlinearity", torch.tanh)


def _layer(vae: Any, patch: pytest.MonkeyPatch) -> None:
    layer = vae.first_stage_model.decoder.mid.block_2
    forward = layer.forward
    patch.setattr(layer, "forward", lambda *args, **more: forward(*args, **more) * 0.5)


def _coder(vae: Any, patch: pytest.MonkeyPatch) -> None:
    decoder = vae.first_stage_model.decoder
    forward = decoder.forward
    patch.setattr(decoder, "forward", lambda *args, **more: forward(*args, **more) * 0.5)


def _upsampling(vae: Any, patch: pytest.MonkeyPatch) -> None:
    up = torch.nn.functional.interpolate
    patch.setattr(host, "interpolate_up", lambda x, s: up(x, scale_factor=s, mode="bilinear"))


def _other_decoder(vae: Any, patch: pytest.MonkeyPatch) -> None:
    """Put in where the node has left its own."""
    patch.setitem(vae.first_stage_model._modules, "decoder", vae.first_stage_model.decoder)  # back
    ours = optimized(vae, FALLBACK).first_stage_model
    ours.decoder = make_vae(seed=5).first_stage_model.decoder
    assert vae.first_stage_model.decoder is ours.decoder


def _no_bias(vae: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(vae.first_stage_model.decoder.mid.block_1.conv1._parameters, "bias", None)


@pytest.mark.parametrize(
    "change", [_no_bias, _number, _function, _layer, _coder, _upsampling, _other_decoder]
)
def test_a_replay_leaves_no_change_out(
    session: Session, vae: Any, captured: Any, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = used(vae, decode())
    with monkeypatch.context() as patch:
        change(vae, patch)
        for seed in range(4):
            (changed, *_) = assert_as_stock(vae, captured, decode(), decode(seed=seed))
    assert relative_rms(changed, plain) > 1e-3
    assert_as_stock(vae, captured, decode())


@pytest.mark.parametrize("name", ["deterministic", "benchmark", "enabled"])
def test_what_is_read_at_each_launch_is_recorded_again(
    session: Session, vae: Any, captured: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, name, not getattr(torch.backends.cudnn, name))
    with session.engine.counters.expect(captures=1, captures_dropped=1):
        for seed in range(3):
            used(captured, decode(seed=seed))


def test_a_budget_for_the_model_or_the_vae(session: Session, vae: Any, sd15: Any) -> None:
    """They push each other out a few times, not with each image."""
    session.captures = CaptureBudget(session.engine.counters, TapeRecorder, 2**20)
    model, ours, counters = optimize_model(sd15, EAGER), optimized(vae), session.engine.counters
    for seed in range(8):
        sample(model, steps=3, seed=seed)
        assert_as_stock(vae, ours, decode(seed=seed))
    with counters.expect(captures=0, captures_dropped=0):
        sample(model, steps=3)
        used(ours, decode())
    assert counters["captures"] < 8
    assert session.captures.used() == 2**20


def test_capturing_turned_off(session: Session, vae: Any) -> None:
    session.captures = CaptureBudget(session.engine.counters, TapeRecorder, 0)
    with session.engine.counters.expect(captures=0):
        assert_as_stock(vae, optimized(vae), *[decode(seed=seed) for seed in range(4)])


class Failing(TapeRecorder):
    """A GPU on which recording fails."""

    def record(self, function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_failing_capture_costs_no_image(session: Session, vae: Any) -> None:
    session.captures = CaptureBudget(session.engine.counters, Failing, 2**30)
    ours = optimized(vae, FALLBACK)
    assert_as_stock(vae, ours, *[decode(seed=seed) for seed in range(4)])
    assert "not permitted" in str(reports(session)["VAE decoder"]["not_captured"])
    with pytest.raises(RuntimeError, match="could not be captured"):
        strict = optimized(vae, OptimizeConfig(backend="eager", on_failure="error"))
        for seed in range(3):
            used(strict, decode(seed=seed))
    comfy.model_management.unload_all_models()


def test_what_was_dropped_between_images_is_recorded_again(
    session: Session, vae: Any, captured: Any
) -> None:
    decoder = session.vae(vae.first_stage_model.decoder, FALLBACK)
    for turn in range(4):
        decoder.drop_captures()  # as other models' captures do, or the clear node
        with session.engine.counters.expect(captures=1, vae_replays=1):
            used(captured, decode(seed=turn))
            used(captured, decode(seed=turn + 1))
    assert reports(session)["VAE decoder"]["not_captured"] == []
