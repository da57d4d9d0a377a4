"""LoRAs switched on a real GPU: weights, addresses, captures, memory, offloaded weights."""

import gc
import random
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import torch
from blade_tests.host.lora_files import (
    LoraFile,
    addresses,
    assert_near,
    expected,
    fuse,
    loaded,
    make,
    same,
    state,
    stock,
)
from blade_tests.host.tiny import SD15, conditioning, make_model, relative_rms, sample

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host import patcher
from blade.blade_core.host.model import Session, optimize_model

BOUND = 3e-3
STRICT = OptimizeConfig(on_failure="error")
WIDE = SD15 | {"model_channels": 320, "context_dim": 64, "num_heads": 8}
NAMES = ("one", "two", "kron", "loha", "dora")
NOTHING_NEW = {"graphs_compiled": 0, "captures": 0, "captures_dropped": 0}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, LoraFile]:
    folders = {"loras": ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    model = make_model(WIDE, dtype=torch.float16)
    made = {
        "one": make(model, ranks=(4, 32), dtype=torch.float16, only="attn", seed=1),
        "two": make(model, ranks=(128,), only="transformer_blocks", seed=2),
        "kron": make(model, kinds=("lokr", "diff", "bias"), seed=3),
        "loha": make(model, kinds=("loha", "loha tucker", "norm"), seed=4),
        "dora": make(model, kinds=("dora",), only="attn2", seed=5),
    }
    for name, file in made.items():
        file.save(tmp_path, name)
    return made


def rows(*chosen: tuple[str, float]) -> list[tuple[str, float, float]]:
    return [(f"{name}.safetensors", strength, 0.0) for name, strength in chosen]


def run(model: Any, **options: Any) -> torch.Tensor:
    prompts = {
        "positive": conditioning(seed=1, width=64),
        "negative": conditioning(seed=2, width=64),
    }
    return sample(model, **{"size": (32, 32), "steps": 20, **prompts, **options})


def used() -> int:
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()
    return torch.cuda.memory_allocated()


def test_weights_are_the_sum(files: dict[str, LoraFile]) -> None:
    model = make_model(WIDE, dtype=torch.float32)
    base = state(model)
    chosen = [("one", 0.8), ("two", -0.5), ("kron", 1.2), ("loha", 0.7), ("one", 0.3)]
    patched = fuse(model, rows(*chosen))[0]
    comfy.model_management.load_models_gpu([fuse(model, rows(("two", 1.0)))[0]])
    switched = loaded(patched)
    on_cpu = {key: weight.cpu() for key, weight in switched.items()}
    assert_near(on_cpu, expected(base, [(files[n], s) for n, s in chosen]), 1e-6)
    comfy.model_management.unload_all_models()
    assert same(loaded(patched), switched)  # the same bits, loaded with it or switched to it
    comfy.model_management.unload_all_models()
    assert same(state(model), base)


@pytest.mark.parametrize("share", [4, 10**9], ids=["bases on the GPU", "bases in host memory"])
def test_a_life_of_switches(
    session: Session, files: dict[str, LoraFile], share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patcher, "_BACKUP_SHARE", share)
    choose = random.Random(0)
    model = make_model(WIDE, dtype=torch.float16)
    base = state(model)
    optimized = optimize_model(model, STRICT)

    def pick() -> list[tuple[str, float, float]]:
        names = choose.sample(NAMES, choose.randint(0, 4))
        return rows(*((name, choose.choice([-0.6, 0.4, 0.8])) for name in names))

    run(optimized)
    for _ in range(20):
        comfy.model_management.load_models_gpu([fuse(optimized, pick())[0]])
    there = addresses(model)
    memory = torch.cuda.memory_allocated()
    with session.engine.counters.expect(**NOTHING_NEW):
        for _ in range(180):
            comfy.model_management.load_models_gpu([fuse(optimized, pick())[0]])
        assert addresses(model) == there
        fused = fuse(optimized, rows(("one", 0.8), ("two", 0.5), ("dora", 0.5)))[0]
        actual, plain = run(fused), run(optimized)
        assert addresses(model) == there
    assert torch.cuda.memory_allocated() <= 1.2 * memory  # bases of other weights, no more
    loaded(optimized)
    comfy.model_management.unload_all_models()
    assert same(state(model), base)
    assert relative_rms(plain, run(model)) <= BOUND
    expected_image = run(stock(model, rows(("one", 0.8), ("two", 0.5), ("dora", 0.5)))[0])
    assert relative_rms(actual, expected_image) <= BOUND < relative_rms(actual, plain)


def test_memory_comes_back(files: dict[str, LoraFile]) -> None:
    model = make_model(WIDE, dtype=torch.float16)

    def once() -> int:
        for name in NAMES:
            comfy.model_management.load_models_gpu([fuse(model, rows((name, 1.0)))[0]])
        return used()

    first = once()
    assert [once() for _ in range(3)] == [first] * 3


def test_offloaded_weights(
    session: Session, files: dict[str, LoraFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(WIDE, dtype=torch.float16)
    chosen = rows(("one", 0.8), ("two", 0.5), ("kron", 0.5))
    expected_image = run(stock(model, chosen)[0])
    comfy.model_management.unload_all_models()
    half = int(0.5 * model.model_size())
    partly = {
        "device_to": comfy.model_management.get_torch_device(),
        "lowvram_model_memory": half,
    }
    load = type(model).load
    monkeypatch.setattr(type(model), "load", lambda self, *args, **kwargs: load(self, **partly))
    fused = fuse(optimize_model(model, STRICT), chosen)[0]
    assert relative_rms(run(fused), expected_image) <= BOUND
    assert model.model.model_lowvram
    plain = optimize_model(model, STRICT)
    assert relative_rms(run(plain), run(model)) <= BOUND
