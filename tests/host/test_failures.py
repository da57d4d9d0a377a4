"""What goes wrong is said, costs one block at most, and never an image."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.supported_models
import pytest
import torch
from blade_tests.host.tiny import relative_rms, sample
from comfy.ldm.flux.model import FluxParams
from comfy.model_patcher import ModelPatcher

from blade.blade_core import engine
from blade.blade_core.backends import BACKENDS
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.errors import BackendUnavailable, CompileFailed, InvalidChoice
from blade.blade_core.graph import Compiled, GraphRequest
from blade.blade_core.host import progress
from blade.blade_core.host.model import Session, optimize_model

BOUND = 1e-4
FALLBACK = OptimizeConfig(backend="inductor")
STRICT = OptimizeConfig(backend="inductor", on_failure="error")


class Faulty:
    """The reference backend under inductor's name, with a fault that a test puts in."""

    name = "inductor"
    channels_last = True
    capturable = True

    def __init__(self, fault: Callable[[GraphRequest], None]) -> None:
        self.fault = fault
        self.reason: str | None = None

    def available(self, device: torch.device) -> str | None:
        return self.reason

    def joins(self, device: torch.device) -> bool:
        return False

    def fingerprint(self) -> str:
        return "faulty"

    def compile(self, request: GraphRequest) -> Compiled:
        self.fault(request)
        return BACKENDS["eager"].compile(request)

    def load(self, artifact: bytes, request: GraphRequest) -> Any:
        return BACKENDS["eager"].load(artifact, request)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    backend = Faulty(lambda request: None)
    monkeypatch.setitem(engine.BACKENDS, "inductor", backend)
    return backend


def _reasons(session: Session) -> set[str]:
    return {r for m in session.stats()["models"] for b in m["blocks"] for r in b["reasons"]}


def _transformers_only(error: Exception) -> Callable[[GraphRequest], None]:
    def fault(request: GraphRequest) -> None:
        if "Transformer" in request.key.label:
            raise error

    return fault


def test_a_crashing_compiler_costs_its_blocks_only(
    session: Session, sd15: Any, faulty: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    faulty.fault = _transformers_only(ValueError("internal error\npages of generated code"))
    expected = sample(sd15)
    optimized = optimize_model(sd15, FALLBACK)
    with caplog.at_level(logging.WARNING, "blade"):
        assert relative_rms(sample(optimized), expected) <= BOUND
        failures = session.engine.counters["compile_failures"]
        assert failures == 2  # SpatialTransformer 32 and 64, each tried once
        sample(optimized, seed=1)
        assert session.engine.counters["compile_failures"] == failures
    text = "inductor could not compile SpatialTransformer 64: ValueError: internal error"
    assert caplog.text.count(text) == 1 and "generated code" not in caplog.text
    assert any(reason.startswith(text) for reason in _reasons(session))
    assert session.engine.counters["blocks_compiled"] > 0


def test_a_crashing_compiler_stops_the_prompt_under_error(
    session: Session, sd15: Any, faulty: Faulty
) -> None:
    expected = sample(sd15)
    faulty.fault = _transformers_only(ValueError("internal error"))
    with pytest.raises(CompileFailed, match="could not compile SpatialTransformer 32"):
        sample(optimize_model(sd15, STRICT))
    assert torch.equal(sample(sd15), expected)  # nothing stays behind


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "Out of memory while inductor compiled"),
        (OSError(28, "No space left on device"), "The disk filled up while inductor compiled"),
    ],
)
def test_want_of_memory_or_disk_is_tried_again(
    session: Session, sd15: Any, faulty: Faulty, error: Exception, text: str
) -> None:
    faulty.fault = _transformers_only(error)
    expected = sample(sd15)
    optimized = optimize_model(sd15, FALLBACK)
    assert relative_rms(sample(optimized), expected) <= BOUND
    assert any(reason.startswith(text) for reason in _reasons(session))
    faulty.fault = lambda request: None
    with session.engine.counters.expect(blocks_eager=0, compile_failures=0):
        assert relative_rms(sample(optimized), expected) <= BOUND


def test_a_wrong_graph_is_never_used(
    session: Session, sd15: Any, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_wrong(request: GraphRequest) -> Compiled:
        right = BACKENDS["eager"].compile(request)
        return Compiled(lambda w, i: right.call(w, i) * 1.01, None, 0)

    monkeypatch.setattr(faulty, "compile", compile_wrong)
    expected = sample(sd15)
    assert relative_rms(sample(optimize_model(sd15, FALLBACK)), expected) <= BOUND
    assert session.engine.counters["blocks_compiled"] == 0
    assert all("differs from the uncompiled layer by 1.0e-02" in r for r in _reasons(session))


def test_a_graph_that_fails_at_run_time_costs_its_block(
    session: Session, sd15: Any, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compile_brittle(request: GraphRequest) -> Compiled:
        right = BACKENDS["eager"].compile(request)

        def call(weights: Any, inputs: Any) -> torch.Tensor:
            calls.append(request.key.label)
            if request.key.label.startswith("Downsample") and len(calls) > 20:
                raise RuntimeError("device mismatch")
            return right.call(weights, inputs)

        return Compiled(call, None, 0)

    monkeypatch.setattr(faulty, "compile", compile_brittle)
    expected = sample(sd15)
    assert relative_rms(sample(optimize_model(sd15, FALLBACK)), expected) <= BOUND
    assert _reasons(session) == {"its graph failed: device mismatch"}


def test_no_compiler_means_stock_with_the_reason(
    session: Session,
    sd15: Any,
    faulty: Faulty,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(progress, "say", lambda text, node_id: shown.append(text))
    faulty.reason = "no working C++ compiler was found"
    expected = sample(sd15)
    with caplog.at_level(logging.WARNING, "blade"):
        optimized = optimize_model(sd15, FALLBACK)
        assert torch.equal(sample(optimized), expected)
        sample(optimized, seed=1)
    assert caplog.text.count("no working C++ compiler was found") == 1
    assert len(shown) == 2  # once a run, not once a step
    assert all("runs as stock" in text and faulty.reason in text for text in shown)
    assert "no working C++ compiler" in str(session.stats()["models"][0]["runs_as_stock"])
    with pytest.raises(BackendUnavailable, match=r"no working C\+\+ compiler was found"):
        optimize_model(sd15, STRICT)


def test_a_user_without_a_home_has_no_graphs_on_disk(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("BLADE_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BLADE_DISK_CACHE_MIB", "64")
    monkeypatch.setattr(Path, "home", home)
    assert Session().engine.store is None
    assert "BLADE_CACHE_DIR" in caplog.text


def test_torch_blade_that_cannot_run(
    session: Session, sd15: Any, faulty: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    reason = BACKENDS["torch_blade"].available(torch.device("cpu"))
    assert reason is not None
    with pytest.raises(BackendUnavailable) as error:
        optimize_model(sd15, OptimizeConfig(backend="torch_blade", on_failure="error"))
    assert reason in str(error.value)
    with caplog.at_level(logging.WARNING, "blade"):
        sample(optimize_model(sd15, OptimizeConfig(backend="torch_blade")))
    assert f"{reason}. Blade uses inductor instead." in caplog.text
    assert session.engine.counters["blocks_compiled"] == 10


def test_cancel_while_compiling_passes_and_leaves_all_well(
    session: Session, sd15: Any, faulty: Faulty
) -> None:
    expected = sample(sd15)
    strides = [p.stride() for p in sd15.model.parameters()]

    def cancel(request: GraphRequest) -> None:
        if request.key.label.startswith("Downsample"):
            comfy.model_management.interrupt_current_processing(True)

    faulty.fault = cancel
    optimized = optimize_model(sd15, FALLBACK)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(optimized)
    assert session.engine.counters["compile_failures"] == 0
    assert [p.stride() for p in sd15.model.parameters()] == strides
    faulty.fault = lambda request: None
    assert torch.equal(sample(sd15), expected)
    assert relative_rms(sample(optimized), expected) <= BOUND
    assert session.engine.counters["blocks_eager"] == 0


@pytest.mark.parametrize("session", ["launched"], indirect=True)
def test_out_of_memory_while_running_is_the_hosts(
    session: Session, sd15: Any, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimized = optimize_model(sd15, FALLBACK)
    expected = sample(optimized)

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("blade.blade_core.host.unit.in_format", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            sample(optimized)
    assert torch.equal(sample(optimized), expected)


def test_a_model_that_is_no_unet_passes_untouched(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 16,
        "context_in_dim": 16,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": False,
        "dtype": torch.float32,
    }
    if "txt_ids_dims" in FluxParams.__annotations__:  # newer hosts
        shape["txt_ids_dims"] = []
    config = comfy.supported_models.Flux(shape)
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    flux = ModelPatcher(comfy.model_base.Flux(config), cpu, cpu)
    with caplog.at_level(logging.WARNING, "blade"):
        assert optimize_model(flux, FALLBACK) is flux
    assert "this model is a Flux (Flux). It runs unchanged." in caplog.text


def test_an_unknown_choice_lists_the_valid_ones() -> None:
    with pytest.raises(InvalidChoice, match="expected one of auto, torch_blade, inductor, eager"):
        OptimizeConfig(backend="tensorrt")
