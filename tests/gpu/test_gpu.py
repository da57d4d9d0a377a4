"""What only a GPU shows: fp16 on tensor cores, offloaded weights, memory that comes back."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from blade_tests.host.tiny import SD15, conditioning, make_model, relative_rms, sample
from torch._inductor.async_compile import AsyncCompile, CompiledTritonKernels

from blade.blade_core.backends.inductor import InductorBackend
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.engine import Engine
from blade.blade_core.host import model as blade_model
from blade.blade_core.host.model import Session, optimize_model
from blade.blade_core.kernels.joint_linear import as_one

BOUND = 3e-3
STRICT = OptimizeConfig(on_failure="error")


def _run(model: Any, **options: Any) -> torch.Tensor:
    width = model.model.model_config.unet_config["context_dim"]
    prompts = {
        "positive": conditioning(seed=1, width=width),
        "negative": conditioning(seed=2, width=width),
    }
    return sample(model, **{"size": (32, 32), "steps": 20, **prompts, **options})


def test_a_life_on_the_gpu(session: Session, model: Any) -> None:
    """Compile, switch, offload, come back: the same images, and no graph twice."""
    stock = _run(model)
    optimized = optimize_model(model, STRICT)
    assert relative_rms(_run(optimized), stock) <= BOUND
    # Where other processes compile, each block has run its first step as stock; else none has.
    blocks = len(session.stats()["models"][0]["blocks"])
    assert session.engine.counters["blocks_eager"] in (0, blocks)
    graphs = session.engine.counters["graphs_compiled"]
    attentions = [
        [getattr(module, f"to_{part}").weight for part in "qkv"]
        for name, module in model.model.diffusion_model.named_modules()
        if name.endswith("attn1")
    ]
    assert attentions and all(as_one(weights) is not None for weights in attentions)
    with session.engine.counters.expect(graphs_compiled=0, blocks_eager=0):
        assert relative_rms(_run(optimized), stock) <= BOUND

    lora = model.clone()
    lora.add_patches(
        {
            key: ("diff", (torch.randn(weight.shape) * 0.1,))
            for key, weight in model.model.state_dict().items()
            if key.endswith(("to_q.weight", "proj_in.weight"))
        }
    )
    with_lora = _run(lora)
    assert relative_rms(with_lora, stock) > 0.01
    assert relative_rms(_run(optimize_model(lora, STRICT)), with_lora) <= BOUND

    comfy.model_management.unload_all_models()
    assert relative_rms(_run(optimized), stock) <= BOUND
    assert session.engine.counters["graphs_compiled"] == graphs


def test_the_unet_without_the_node_is_bit_identical(session: Session, model: Any) -> None:
    """One call of the UNet: whole runs of stock on a GPU differ from one another in last bits."""
    _run(model)
    unet = model.model.diffusion_model
    width = model.model.model_config.unet_config["context_dim"]
    half: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
    x, context = torch.randn(2, 4, 32, 32, **half), torch.randn(2, 77, width, **half)
    y = torch.randn(2, unet.label_emb[0][0].in_features, **half) if unet.num_classes else None
    timesteps = torch.full((2,), 500.0, device="cuda")

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return unet(x, timesteps, context, y, None, {})

    before = call()
    _run(optimize_model(model, STRICT))
    assert torch.equal(call(), before)


def test_offloaded_weights_use_the_same_graphs(
    session: Session, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = _run(model)
    optimized = optimize_model(model, STRICT)
    _run(optimized)
    comfy.model_management.unload_all_models()
    half = int(0.5 * model.model_size())
    device = comfy.model_management.get_torch_device()
    partly = {"device_to": device, "lowvram_model_memory": half}
    load = type(model).load
    monkeypatch.setattr(type(model), "load", lambda self, *args, **kwargs: load(self, **partly))
    with session.engine.counters.expect(graphs_compiled=0, blocks_eager=0):
        assert relative_rms(_run(optimized), stock) <= BOUND
    assert model.model.model_lowvram
    assert any(p.device.type == "cpu" for p in model.model.diffusion_model.parameters())


def test_graphs_of_an_earlier_process_are_there_when_they_are_asked_for(
    session: Session, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread without a GPU context of its own loads them before any model is there."""
    session.engine = Engine(store=(tmp_path, 2**30))
    stock = _run(model)
    _run(optimize_model(model, STRICT))
    compiled = session.engine.counters["graphs_compiled"]
    CompiledTritonKernels.cache_clear()

    later = Session()
    later.engine = Engine(store=(tmp_path, 2**30))
    monkeypatch.setattr(blade_model, "session", lambda: later)
    blade_model.started()
    early = later.engine.early
    early.wait()
    assert len(early) == compiled > 0

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded once more")

    monkeypatch.setattr(InductorBackend, "load_for", load)
    with later.engine.counters.expect(graphs_compiled=0, blocks_eager=0, artifacts_dropped=0):
        assert relative_rms(_run(optimize_model(model, STRICT)), stock) <= BOUND
    assert later.engine.counters["graphs_loaded"] == compiled
    assert len(early) == 0


def test_loading_needs_no_pool_of_compilers(
    session: Session, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored graphs hold their kernels: torch's processes would only take the host's cores."""
    session.engine = Engine(store=(tmp_path, 2**30))
    stock = _run(model)
    _run(optimize_model(model, STRICT))
    session.engine.cache.clear()
    CompiledTritonKernels.cache_clear()

    def start() -> None:
        raise AssertionError("torch was made to get its compile processes ready")

    monkeypatch.setattr(AsyncCompile, "process_pool", staticmethod(start))
    monkeypatch.setattr(AsyncCompile, "_ready_future", None)
    launched = optimize_model(model, replace(STRICT, capture=False))
    with session.engine.counters.expect(graphs_compiled=0):
        assert relative_rms(_run(launched), stock) <= BOUND
    assert session.engine.counters["graphs_loaded"] > 0


def test_memory_comes_back(session: Session) -> None:
    def once() -> int:
        config = SD15 | {"model_channels": 320}
        model = optimize_model(make_model(config, dtype=torch.float16), STRICT)
        sample(model)
        del model
        comfy.model_management.unload_all_models()
        comfy.model_management.cleanup_models_gc()
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    first = once()
    assert [once() for _ in range(3)] == [first] * 3
    assert session.stats(None)["models"] == []


def test_frozen_weights(session: Session, model: Any) -> None:
    stock = _run(model)
    frozen = OptimizeConfig(freeze_weights=True, on_failure="error")
    assert relative_rms(_run(optimize_model(model, frozen)), stock) <= BOUND
