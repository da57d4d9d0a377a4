"""Rows that are already there, that change nothing here, or whose file is sound but odd."""

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import safetensors.torch
import torch
from blade_tests.host.lora_files import (
    SMALL,
    Row,
    assert_near,
    fuse,
    loaded,
    make,
    make_clip,
    same,
    state,
    stock,
)
from blade_tests.host.tiny import make_model

from blade.blade_core.errors import LoraError
from blade.blade_core.host.model import stats

WEIGHTS = 1e-5
A: Row = ("a.safetensors", 0.8, 0.6)
B: Row = ("b.safetensors", 0.5, 0.0)
C: Row = ("c.safetensors", -0.4, 1.0)


@pytest.fixture
def folder(tmp_path: Path, small: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    folders = ([str(tmp_path)], folder_paths.supported_pt_extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", folders)
    for seed, name in enumerate("abc"):
        make(small, make_clip(), seed=seed).save(tmp_path, name)
    yield tmp_path
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize(
    ("first", "stack", "then"),
    [
        ([A], [A, B], [A, B]),
        ([A], [A], [A]),
        ([A, B, C], [A, B], [A, B, C]),
        ([A, B], [A, C], [A, B, A, C]),
        ([A], [B, C], [A, B, C]),
        ([], [A, B], [A, B]),
        ([A], [], [A]),
    ],
)
def test_what_came_with_the_model_is_not_applied_again(
    folder: Path, small: Any, first: list[Row], stack: list[Row], then: list[Row]
) -> None:
    """Also where another node has extended the stack, or an earlier node's stack is wired."""
    clip = make_clip()
    model, text, _ = fuse(small, first, clip)
    model, text, _ = fuse(model, [C], text, stack=stack)
    expected, words = stock(make_model(SMALL), [*then, C], make_clip())
    assert_near(loaded(model), loaded(expected), WEIGHTS)
    assert_near(loaded(text), loaded(words), WEIGHTS)


def test_rows_that_change_nothing_here_need_no_file(folder: Path, small: Any) -> None:
    gone: Row = ("gone.safetensors", 0.0, 1.0)
    plain = loaded(fuse(small, [A])[0])
    assert same(loaded(fuse(small, [A, gone], stack=[gone])[0]), plain)
    with pytest.raises(LoraError, match=r"gone\.safetensors"):
        fuse(small, [A, gone], make_clip())


def test_text_encoders_only_and_no_clip(
    folder: Path, small: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make(make_clip(), seed=9).save(folder, "text")
    row: Row = ("text.safetensors", 1.0, 1.0)
    plain = state(small)
    assert same(loaded(fuse(small, [row], on_failure="fallback")[0]), plain)
    assert "changes text encoders only, and no clip is wired: it changes nothing" in caplog.text
    with pytest.raises(LoraError, match=r"no clip is wired\. Wire it"):
        fuse(small, [row], on_failure="error")
    clip = make_clip()
    words = {key: weight.clone() for key, weight in state(clip).items()}
    assert not same(loaded(fuse(small, [row], clip)[1]), words)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_in_fp8(
    folder: Path, small: Any, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    file = make(small, seed=9)
    broken = next(name for name in file.tensors if name.endswith(".lora_up.weight"))
    tensors = {n: t.to(dtype) if t.ndim else t for n, t in file.tensors.items()}
    tensors[broken] = torch.full(tensors[broken].shape, float("nan")).to(dtype)
    safetensors.torch.save_file(tensors, folder / "fp8.safetensors")
    with caplog.at_level(logging.WARNING, "blade"):
        model = fuse(small, [("fp8.safetensors", 1.0, 1.0)], on_failure="fallback")[0]
    key = file.targets[broken.removesuffix(".lora_up.weight")][0]
    assert stats(model)["loras"]["rows"][-1]["skipped"] == [f"{key}: NaN or infinite values"]
    assert all(weight.isfinite().all() for weight in loaded(model).values())


def test_factors_that_do_not_fit_each_other(folder: Path, small: Any) -> None:
    file = make(small, kinds=("locon",), seed=9)
    middle = next(name for name in file.tensors if "lora_mid" in name)
    down = middle.replace("lora_mid", "lora_down")
    file.tensors[down] = file.tensors[down].repeat(1, 1, 3, 3)
    name = file.save(folder, "locon")
    model = fuse(small, [(name, 1.0, 1.0)], on_failure="fallback")[0]
    (skipped,) = stats(model)["loras"]["rows"][-1]["skipped"]
    assert file.targets[middle.split(".lora_mid")[0]][0] in skipped
    with pytest.raises(LoraError, match=r"locon\.safetensors"):
        fuse(small, [(name, 1.0, 1.0)], on_failure="error")


@pytest.mark.skipif("os.name == 'nt'", reason="a colon is no letter there")
def test_a_colon_in_a_name(folder: Path, small: Any) -> None:
    name = make(small, seed=0).save(folder, "style: v2")
    assert fuse(small, [(name, 0.8, 0.6)])[0].patches.keys() == fuse(small, [A])[0].patches.keys()
    with pytest.raises(LoraError, match=r"leads out of"):
        fuse(small, [("c:style.safetensors", 1.0, 1.0)])


def test_a_row_without_a_name(folder: Path, small: Any) -> None:
    nobody: Any = (None, 1.0, 1.0)
    assert fuse(small, [nobody, A])[2] == [A]
