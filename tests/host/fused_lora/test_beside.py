"""Fused LoRAs beside what else holds a model's weights: merges, parents, short memory, ties."""

import functools
import gc
import importlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import torch
from blade_tests.host.lora_files import (
    SMALL,
    assert_near,
    changed,
    effective,
    fuse,
    loaded,
    make,
    same,
    state,
    stock,
    widgets,
)
from blade_tests.host.lora_kinds import Tensors
from blade_tests.host.tiny import make_model

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session, optimize_model
from blade.nodes.fused_lora import BladeFusedLoRA

EAGER = OptimizeConfig(backend="eager", on_failure="error")
ROWS = [("a.safetensors", 1.0, 1.0)]
WEIGHTS = 1e-6
Patched = Callable[[Any], Any]

pytestmark = pytest.mark.parametrize("session", ["launched"], indirect=True)


@pytest.fixture(autouse=True)
def folder(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folders = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", folders)
    make(make_model(SMALL), ranks=(4, 8), seed=1).save(tmp_path, "a")
    yield tmp_path
    comfy.model_management.unload_all_models()


def by_stock(model: Any) -> Any:
    return stock(model, ROWS)[0]


def by_fuse(model: Any) -> Any:
    return fuse(model, ROWS)[0]


def by_stock_loader_and_optimize(model: Any) -> Any:
    return stock(optimize_model(model, EAGER), ROWS)[0]


def merge(one: Any, other: Any) -> Any:
    nodes: Any = importlib.import_module("comfy_extras.nodes_model_merging")
    return nodes.ModelMergeSimple().merge(one, other, 0.3)[0]


def merges(patched: Patched) -> list[Tensors]:
    """What merges hold that were made before the LoRA was loaded, used after it was."""
    result = []
    for again in (False, True):
        first, second = make_model(SMALL, seed=0), make_model(SMALL, seed=9)
        with_lora = patched(second)
        merged = [merge(first, with_lora), merge(first, second), merge(second, with_lora)]
        loaded(with_lora)
        if again:
            comfy.model_management.unload_all_models()
            loaded(with_lora)
        for model in merged:
            result.append(loaded(model))
            comfy.model_management.unload_all_models()
    return result


@pytest.mark.parametrize("patched", [by_fuse, by_stock_loader_and_optimize])
def test_merges_see_the_checkpoint(patched: Patched) -> None:
    expected = merges(by_stock)
    assert changed(expected[0], expected[1])  # the LoRA is seen
    for actual, theirs in zip(merges(patched), expected, strict=True):
        assert_near(actual, theirs, WEIGHTS)


def with_room(model: Any, share: float) -> Any:
    """`model` as loads see it on a GPU that has room for `share` of it."""
    load = type(model).partially_load

    def partially_load(device: Any, extra_memory: float = 0, **options: Any) -> Any:
        extra = model.model_size() * share - model.model.model_loaded_weight_memory
        return load(model, device, extra, **options)

    model.partially_load = partially_load
    return model


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("patched", [by_stock, by_fuse])
def test_a_parent_that_gave_memory_back(patched: Patched, share: float) -> None:
    """The clone that was loaded is gone; the host asks its parent, which has no LoRA."""
    base = make_model(SMALL)
    expected = loaded(patched(base))
    comfy.model_management.unload_all_models()
    gc.collect()
    one = patched(base)
    loaded(one)
    del one
    gc.collect()
    (held,) = comfy.model_management.current_loaded_models
    assert held.model is base
    held.model_unload(base.model_size() * 0.5)
    again = with_room(patched(base), share)
    comfy.model_management.load_models_gpu([again])
    assert_near(effective(again), expected, WEIGHTS)


def test_no_patches_left_for_a_weight() -> None:
    model = make_model(SMALL)
    base, one = state(model), by_fuse(model)
    loaded(one)
    two = one.clone()
    key = next(iter(two.patches))
    two.patches[key] = []
    two.patches_uuid = uuid.uuid4()
    assert torch.equal(loaded(two)[key], base[key])


def test_layers_that_share_a_weight() -> None:
    model = make_model(SMALL)
    names = [k for k in state(model) if k.endswith(("attn1.to_q.weight", "attn1.to_k.weight"))]
    one, other = (functools.reduce(getattr, k.split(".")[:-1], model.model) for k in names[:2])
    other.weight = one.weight
    base = state(model)
    expected = loaded(by_stock(model))
    comfy.model_management.unload_all_models()
    assert_near(loaded(by_fuse(model)), expected, WEIGHTS)
    comfy.model_management.unload_all_models()
    assert same(state(model), base)


@pytest.mark.parametrize("wired", ["lora_1", "strength_model_1", "enabled_1", "strength_clip_8"])
def test_a_wired_field_does_not_make_the_node_run_each_time(wired: str) -> None:
    """The host passes None for what is wired."""
    inputs = widgets(ROWS) | {wired: None}
    first, second = (BladeFusedLoRA.IS_CHANGED(model=None, **inputs) for _ in range(2))
    assert first == second
