"""What goes wrong with a VAE is said, costs one layer at most, and never an image."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.taesd.taesd
import pytest
import torch
from blade_tests.host.control_nets import fill
from blade_tests.host.test_failures import Faulty
from blade_tests.host.tiny import DEVICE, relative_rms
from blade_tests.host.vaes import (
    BOUND,
    FALLBACK,
    LAYERS,
    SMALL,
    assert_as_stock,
    decode,
    eager_blocks,
    encode,
    latent,
    make_vae,
    optimized,
    reports,
    used,
)
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine
from comfy.ldm.modules.diffusionmodules import model as host
from comfy.sd import VAE

from blade.blade_core import engine
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.errors import BackendUnavailable, CompileFailed
from blade.blade_core.graph import GraphRequest
from blade.blade_core.host import attention, unit
from blade.blade_core.host.model import Session

pytestmark = pytest.mark.parametrize("session", ["captured"], indirect=True)

SOFT = OptimizeConfig(backend="inductor")
STRICT = OptimizeConfig(backend="inductor", on_failure="error")


@pytest.fixture
def vae() -> Any:
    return make_vae()


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    backend = Faulty(lambda request: None)
    monkeypatch.setitem(engine.BACKENDS, "inductor", backend)
    return backend


def _only(label: str, fault: Callable[[], None]) -> Callable[[GraphRequest], None]:
    def at(request: GraphRequest) -> None:
        if label in request.key.label:
            fault()

    return at


def _raise(error: BaseException) -> None:
    raise error


# --- what Blade does not know ---------------------------------------------------------------------


class OwnDecoder(host.Decoder):
    """A pack's own."""


class OwnVAE:
    """A pack's own, with the host's model inside."""

    def __init__(self) -> None:
        self.first_stage_model = make_vae().first_stage_model


def _taesd() -> Any:
    model = comfy.taesd.taesd.TAESD()
    fill([p for p in model.parameters() if p.ndim], 0)
    return VAE(sd=model.state_dict(), device=DEVICE, dtype=torch.float32)


def _video() -> Any:
    shape = SMALL | {"conv3d": True, "time_compress": 4}
    params = {"params": {"ddconfig": shape, "embed_dim": 4}}
    model = AutoencoderKL(**params["params"])
    return VAE(sd=model.state_dict(), config=params, device=DEVICE, dtype=torch.float32)


def _svd() -> Any:
    vae = make_vae()
    coders = {
        "encoder_config": "comfy.ldm.modules.diffusionmodules.model.Encoder",
        "decoder_config": "comfy.ldm.modules.temporal_ae.VideoDecoder",
    }
    sizes = SMALL | {"video_kernel_size": [3, 1, 1], "alpha": 0.0}
    regularizer = {"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}
    vae.first_stage_model = AutoencodingEngine(
        regularizer_config=regularizer,
        **{name: {"target": target, "params": sizes} for name, target in coders.items()},
    )
    return vae


def _own_decoder() -> Any:
    vae = make_vae()
    vae.first_stage_model.decoder.__class__ = OwnDecoder
    return vae


OTHERS = {
    "TAESD": (_taesd, "it holds a TAESD"),
    "video": (_video, "it is a VAE for video"),
    "SVD": (_svd, "VideoDecoder"),
    "a pack's decoder": (_own_decoder, "OwnDecoder"),
    "a pack's VAE": (OwnVAE, "OwnVAE"),
    "none": (lambda: None, "NoneType"),
}


@pytest.mark.parametrize(("make", "text"), OTHERS.values(), ids=OTHERS)
def test_other_kinds_pass_through(
    session: Session, make: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = make()
    with caplog.at_level(logging.INFO, "blade"):
        assert optimized(other) is other
    assert "This VAE runs as stock: " in caplog.text and text in caplog.text


def test_a_vae_without_model_raises_as_stock(session: Session, vae: Any) -> None:
    vae.first_stage_model = None
    assert optimized(vae) is vae
    with pytest.raises(RuntimeError, match="VAE is invalid"):
        used(vae, decode())


def test_arguments_that_the_host_does_not_know(session: Session, vae: Any) -> None:
    errors = []
    for each in (vae, optimized(vae, FALLBACK)):
        with pytest.raises(TypeError) as caught, torch.inference_mode():
            each.decode(torch.zeros(1, 4, 8, 8), vae_options={"timestep": 1})
        errors.append(str(caught.value).split("()")[-1])
    assert errors[0] == errors[1] and "timestep" in errors[0]
    assert_as_stock(vae, optimized(vae), decode())


# --- attention ------------------------------------------------------------------------------------


def _closure() -> Any:
    factor = 0.5
    return lambda q, k, v: host.pytorch_attention(q, k, v) * factor


@pytest.mark.parametrize(
    ("attention", "text"),
    [(host.normal_attention, "asks for free memory"), (_closure(), "Blade does not know")],
    ids=["split", "of a pack"],
)
def test_attention_that_cannot_be_traced(
    session: Session, vae: Any, attention: Any, text: str
) -> None:
    ours = optimized(vae)
    assert_as_stock(vae, ours, decode())
    for coder in (vae.first_stage_model.decoder, vae.first_stage_model.encoder):
        coder.mid.attn_1.optimized_attention = attention
    assert_as_stock(vae, ours, decode(), encode())
    for name in reports(session):
        reasons = eager_blocks(session, name)
        assert list(reasons) == ["mid.attn_1"] and text in reasons["mid.attn_1"]
    for coder in (vae.first_stage_model.decoder, vae.first_stage_model.encoder):
        coder.mid.attn_1.optimized_attention = host.pytorch_attention
    with session.engine.counters.expect(blocks_eager=0, graphs_compiled=0):
        assert_as_stock(vae, ours, decode(), encode())


def test_what_attention_calls_is_another_in_each_image(
    session: Session, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_others", {})
    layer = vae.first_stage_model.decoder.mid.attn_1
    with torch.no_grad():
        layer.proj_out.weight.normal_()
        layer.v.weight.normal_()
    own, ours = torch.nn.functional.scaled_dot_product_attention, optimized(vae)
    for factor in range(1, 8):

        def scaled(q: torch.Tensor, *args: Any, by: float = factor, **more: Any) -> torch.Tensor:
            return own(q, *args, **more) * by

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", scaled)
        assert_as_stock(vae, ours, decode())
    assert "cannot tell apart" in eager_blocks(session)["mid.attn_1"]


def test_an_output_function_of_a_pack_that_takes_other_images(session: Session, vae: Any) -> None:
    own = vae.process_output

    def only_whole_ones(image: torch.Tensor) -> torch.Tensor:
        if image.shape[2] < 8:
            raise ValueError("too small")
        result: torch.Tensor = own(image)
        return result

    vae.process_output = only_whole_ones
    assert optimized(vae).process_output is only_whole_ones


# --- code of others -------------------------------------------------------------------------------


@contextmanager
def _hooked(module: Any) -> Iterator[None]:
    handle = module.register_forward_hook(lambda module, args, result: result * 0.5)
    yield
    handle.remove()


@contextmanager
def _replaced(owner: Any, name: str = "forward") -> Iterator[None]:
    own = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, lambda *a, **k: own(*a, **k) * 0.5)
        yield


@contextmanager
def _other_layer(coder: Any) -> Iterator[None]:
    own = coder.mid.block_2
    coder.mid.block_2 = torch.nn.Identity()
    coder.mid.block_2.forward = lambda h, *_: own(h) * 0.5
    yield
    coder.mid.block_2 = own


ALL = "all of it"
CODE: dict[str, tuple[Callable[[Any], Any], str]] = {  # and the block that runs as stock
    "a hook on a layer": (lambda m: _hooked(m.decoder.mid.block_1), "mid.block_1"),
    "a hook inside of a layer": (lambda m: _hooked(m.decoder.up[1].block[0].conv2), "up.1.block.0"),
    "a hook on the decoder": (lambda m: _hooked(m.decoder), ALL),
    "another forward of a layer": (lambda m: _replaced(m.decoder.up[2].upsample), "up.2.upsample"),
    "another forward of the decoder": (lambda m: _replaced(m.decoder), ALL),
    "another forward of the class": (lambda m: _replaced(host.Decoder), ALL),
    "another decode": (lambda m: _replaced(m, "decode"), ""),
    "another decode of the class": (lambda m: _replaced(AutoencoderKL, "decode"), ""),
    "another layer": (lambda m: _other_layer(m.decoder), "mid.block_2"),
}


@pytest.mark.parametrize(("code", "where"), CODE.values(), ids=CODE)
def test_code_of_others_is_not_left_out(session: Session, vae: Any, code: Any, where: str) -> None:
    ours = optimized(vae, FALLBACK)
    (plain,) = assert_as_stock(vae, ours, decode())
    with code(vae.first_stage_model):
        (changed,) = assert_as_stock(vae, ours, decode(batch=1))
        assert relative_rms(changed, plain) > 1e-3
        if where == ALL:
            assert "another node pack" in reports(session)["VAE decoder"]["runs_as_stock"] or (
                "has hooks" in reports(session)["VAE decoder"]["runs_as_stock"]
            )
        elif where:
            assert list(eager_blocks(session)) == [where]
    with session.engine.counters.expect(blocks_eager=0):
        assert_as_stock(vae, ours, decode())


# --- weights elsewhere ----------------------------------------------------------------------------


def test_weights_that_the_host_patches_on_the_fly(session: Session, vae: Any) -> None:
    """A weight function is what lowvram leaves on a layer: resolved per call, by the host."""
    ours = optimized(vae)
    (plain,) = assert_as_stock(vae, ours, decode())
    layer = vae.first_stage_model.decoder.mid.block_1.conv2
    layer.comfy_cast_weights = True
    layer.weight_function = [lambda weight: weight * 1.5]
    with session.engine.counters.expect(graphs_compiled=0, blocks_eager=0):
        (changed,) = assert_as_stock(vae, ours, decode())
    assert relative_rms(changed, plain) > 1e-3


# --- compilers that cannot run, or fail -----------------------------------------------------------


def test_a_compiler_that_cannot_run(session: Session, vae: Any, faulty: Faulty) -> None:
    faulty.reason = "there is no compiler"
    with pytest.raises(BackendUnavailable, match="there is no compiler"):
        optimized(vae, STRICT)
    assert torch.equal(used(optimized(vae, SOFT), decode(batch=2)), used(vae, decode(batch=2)))
    assert "there is no compiler" in reports(session)["VAE decoder"]["runs_as_stock"]


def test_a_compiler_that_fails(session: Session, vae: Any, faulty: Faulty) -> None:
    faulty.fault = _only("Upsample 64", lambda: _raise(ValueError("internal error")))
    assert_as_stock(vae, optimized(vae, SOFT), decode())
    assert list(eager_blocks(session)) == ["up.2.upsample", "up.3.upsample"]
    assert session.engine.counters["blocks_compiled"] == LAYERS["decoder"] - 2
    with pytest.raises(CompileFailed, match="could not compile Upsample 64"):
        used(optimized(vae, STRICT), decode())
    assert_as_stock(vae, optimized(vae, SOFT), decode(batch=2))


def test_cancel_while_compiling(session: Session, vae: Any, faulty: Faulty) -> None:
    interrupt = comfy.model_management.interrupt_current_processing
    faulty.fault = _only("Upsample", lambda: interrupt(True))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        used(optimized(vae, SOFT), decode())
    faulty.fault = lambda request: None
    with session.engine.counters.expect(blocks_eager=0, compile_failures=0):
        assert_as_stock(vae, optimized(vae, SOFT), decode())


def test_out_of_memory_is_the_hosts(
    session: Session, vae: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own way out is to decode in tiles, and these run through Blade, too."""
    ours = optimized(vae)
    tiles = used(vae, lambda vae: vae.decode_tiled(latent(size=(136, 8))))
    own = unit.in_format

    def in_format(tensor: torch.Tensor, memory_format: Any) -> torch.Tensor:
        if tensor.ndim == 4 and tensor.shape[1] == 64 and tensor.shape[2:] == (136, 8):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(tensor, memory_format)

    monkeypatch.setattr(unit, "in_format", in_format)
    with caplog.at_level(logging.WARNING):
        actual = used(ours, lambda vae: vae.decode(latent(size=(136, 8))))
    assert "retrying with tiled VAE decoding" in caplog.text
    assert relative_rms(actual, tiles) <= BOUND
    assert session.engine.counters["blocks_eager"] == 0
    assert session.engine.counters["blocks_compiled"] > LAYERS["decoder"]
