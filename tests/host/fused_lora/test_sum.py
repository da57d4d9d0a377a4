"""BladeFusedLoRA gives the weights of a chain of stock's loaders, and the images."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import torch
from blade_tests.host.lora_files import (
    SMALL,
    LoraFile,
    Row,
    additions,
    assert_near,
    changed,
    distance,
    expected,
    fuse,
    loaded,
    make,
    make_clip,
    row,
    state,
    stock,
)
from blade_tests.host.lora_kinds import LINEAR, NAMINGS, OTHERS, VECTORS
from blade_tests.host.tiny import make_model, relative_rms, sample

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session, optimize_model, stats, without_blade
from blade.blade_core.report import as_text
from blade.nodes.fused_lora import BladeFusedLoRA

WEIGHTS = 1e-6
IMAGES = 1e-4
EAGER = OptimizeConfig(backend="eager", on_failure="error")
SOUND = tuple(kind for kind in LINEAR if kind != "lokr tucker")


ROWS: dict[int, list[Row]] = {
    1: [row("lora", 0.8, 0.6)],
    2: [row("lora", 1.0, 1.0), row("mixed", -0.7, 0.5)],
    5: [
        row("lora", 0.5, 0.4),
        row("kron", -0.9, 0.0),
        row("tucker", 1.0, 1.0, False),
        row("lora", 0.25, -0.3),
        ("None", 1.0, 1.0),
        row("peft", 0.0, 0.7),
        row("all", 0.0, 0.0),
        row("few", 1.2, 1.0),
    ],
    8: [
        row("lora", 0.6, 0.5),
        row("mixed", -0.4, 0.3),
        row("kron", 0.5, -0.3),
        row("peft", 0.3, 0.2),
        row("diffusers", -0.35, 0.45),
        row("tucker", 0.7, -0.6),
        row("all", 0.45, 0.55),
        row("lora", -0.2, 0.1),
    ],
}
A, B = row("lora", 0.8, 0.6), row("kron", -0.5, 0.0)
C, D = row("peft", 0.0, 0.7), row("few", 1.2, -0.4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, LoraFile]]:
    """Files for a model and its text encoder: all kinds that only add, ranks 4 to 128."""
    both = (make_model(SMALL), make_clip())
    half, brain = torch.float16, torch.bfloat16
    files = {
        "lora": make(*both, ranks=(4, 16, 128), dtype=half, seed=1),
        "mixed": make(*both, kinds=("lora", "locon", "loha", *VECTORS), dtype=brain, seed=2),
        "kron": make(*both, kinds=("lokr", "lokr factored", "diff"), ranks=(4, 8), seed=3),
        "peft": make(*both, ranks=(128, 64), naming="peft", dtype=half, seed=4),
        "diffusers": make(*both, ranks=(32,), naming="diffusers", alpha=None, seed=5),
        "tucker": make(*both, kinds=("loha tucker", "flat", *VECTORS), ranks=(4, 6), seed=6),
        "all": make(*both, kinds=(*SOUND, *VECTORS), dtype=half, seed=7),
        "few": make(*both, only="attn", alpha=1.0, seed=8),
    }
    folder = tmp_path_factory.mktemp("loras")
    for name, file in files.items():
        file.save(folder, name)
    return folder, {f"{name}.safetensors": file for name, file in files.items()}


@pytest.fixture
def loras(
    made: tuple[Path, dict[str, LoraFile]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, LoraFile]]:
    """Those files, by name; ComfyUI's folders are theirs and this test's own."""
    folders = ([str(made[0]), str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", folders)
    yield made[1]
    comfy.model_management.unload_all_models()


def strengths(rows: list[Row], part: int) -> list[tuple[str, float]]:
    """Names and strengths of the rows in use, for the model (1) or for the text encoder (2)."""
    return [(row[0], row[part]) for row in rows if row[0] != "None" and all(row[3:]) and row[part]]


def test_the_files_differ(loras: dict[str, LoraFile], small: Any) -> None:
    bases = state(small) | state(make_clip())
    changes = {name: additions(file) for name, file in loras.items()}
    for change in changes.values():
        assert all(change[k].norm() > 0.03 * bases[k].norm() for k in change)
    for one, other in itertools.combinations(changes.values(), 2):
        shared = one.keys() & other.keys()
        assert shared and all(distance(one, other, [key]) > 0.5 for key in shared)


@pytest.mark.parametrize("count", ROWS)
def test_weights(loras: dict[str, LoraFile], small: Any, count: int) -> None:
    """Of model and text encoder: what fp64 says, and no further from it than stock's."""
    clip, rows = make_clip(), ROWS[count]
    bases = state(small), state(clip)
    ours = [loaded(model) for model in fuse(small, rows, clip)[:2]]
    theirs = [loaded(model) for model in stock(small, [r for r in rows if r[0] != "None"], clip)]
    for part in (1, 2):
        base, actual, other = bases[part - 1], ours[part - 1], theirs[part - 1]
        used = strengths(rows, part)
        reference = expected(base, [(loras[name], strength) for name, strength in used])
        keys = {k for name, _ in used for k in additions(loras[name]) if k in base}
        assert changed(actual, base) == keys and len(keys) > 10
        assert_near(actual, reference, WEIGHTS)
        assert distance(actual, reference, keys) <= distance(other, reference, keys) * 1.05


def test_half_precision_weights(loras: dict[str, LoraFile]) -> None:
    """The exact sum rounded once, up to a sum in fp32 that falls on the other side."""
    model, clip = make_model(SMALL, dtype=torch.float16), make_clip(dtype=torch.float16)
    bases = state(model), state(clip)
    for part, result in enumerate(fuse(model, ROWS[5], clip)[:2], start=1):
        base, actual = bases[part - 1], loaded(result)
        used = [(loras[name], strength) for name, strength in strengths(ROWS[5], part)]
        reference = expected(base, used)
        keys = changed(actual, base)
        assert keys and all(actual[key].dtype == torch.float16 for key in keys)
        equal = total = 0
        for key in keys:
            slack = WEIGHTS * reference[key].square().mean().sqrt()
            lowest, highest = (reference[key] - slack).half(), (reference[key] + slack).half()
            assert bool(((actual[key] >= lowest) & (actual[key] <= highest)).all()), key
            equal += int((actual[key] == reference[key].half()).sum())
            total += actual[key].numel()
        assert equal > 0.999 * total


def test_sdxl_with_two_text_encoders(loras: dict[str, LoraFile], tmp_path: Path, sdxl: Any) -> None:
    clip = make_clip(xl=True)
    files = [
        make(sdxl, clip, kinds=SOUND, naming="kohya xl", dtype=torch.float16, seed=21),
        make(sdxl, clip, naming="diffusers", ranks=(4, 64), seed=22),
    ]
    rows = [(file.save(tmp_path, str(n)), 0.9 - n, n - 0.4) for n, file in enumerate(files)]
    bases = state(sdxl), state(clip)
    for part, model in enumerate(fuse(sdxl, rows, clip)[:2], start=1):
        used = zip(files, [row[part] for row in rows], strict=True)
        actual, base = loaded(model), bases[part - 1]
        assert len(changed(actual, base)) > 30
        assert_near(actual, expected(base, used), WEIGHTS)


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming(loras: dict[str, LoraFile], tmp_path: Path, small: Any, naming: str) -> None:
    clip = make_clip()
    models = (small,) if naming == "lycoris" else (small, clip)
    file = make(*models, naming=naming, seed=31)
    rows = [(file.save(tmp_path, "named"), 0.7, -0.6)]
    bases = [state(model) for model in models]
    for base, model, strength in zip(bases, fuse(small, rows, clip), (0.7, -0.6), strict=False):
        actual = loaded(model)
        assert changed(actual, base)
        assert_near(actual, expected(base, [(file, strength)]), WEIGHTS)


@pytest.mark.parametrize("kind", LINEAR)
def test_every_kind_that_adds(
    loras: dict[str, LoraFile], tmp_path: Path, small: Any, kind: str
) -> None:
    file = make(small, kinds=(kind,), ranks=(4, 12), seed=41)
    rows = [(file.save(tmp_path, "kind"), 0.7, 0.0)]
    base = state(small)
    reference = expected(base, [(file, 0.7)])
    fused = fuse(small, rows)[0]
    assert set(map(len, fused.patches.values())) == {1}
    ours, theirs = loaded(fused), loaded(stock(small, rows)[0])
    keys = changed(ours, base)
    assert keys and distance(ours, reference, keys) <= distance(theirs, reference, keys) * 1.05
    if kind != "lokr tucker":  # torch 2.13's kron() refuses what stock gives it there
        assert_near(ours, reference, WEIGHTS)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_keep_their_place(
    loras: dict[str, LoraFile], tmp_path: Path, small: Any, kind: str
) -> None:
    """What is no mere sum stays stock's own patch, between the sums before and after it."""
    clip = make_clip()
    other = (make(small, clip, kinds=(kind,), seed=51).save(tmp_path, "other"), 0.7, 0.6)
    one, two = row("lora", 0.8, 0.7), row("kron", -0.6, 0.9)
    weights = []
    for rows, patches in (([one, other, two], 3), ([other, one, two], 2), ([one, two, other], 2)):
        by_stock = [loaded(model) for model in stock(small, rows, clip)]
        weights.append(by_stock[0])
        model, text, _ = fuse(small, rows, clip)
        for ours, theirs in zip((model, text), by_stock, strict=True):
            assert_near(loaded(ours), theirs, 1e-5)
        assert max(map(len, model.patches.values())) == patches
    chained = fuse(stock(fuse(small, [one])[0], [other])[0], [two])[0]
    assert_near(loaded(chained), weights[0], 1e-5)
    if kind != "reshape":
        for these, those in itertools.combinations(weights, 2):
            assert distance(these, those, changed(these, those)) > 1e-3


def test_all_kinds_in_turn(loras: dict[str, LoraFile], tmp_path: Path, small: Any) -> None:
    rows: list[Row] = []
    for number, kind in enumerate(("set", "dora", "oft", "glora")):
        file = make(small, kinds=(kind,), seed=60 + number)
        rows.append((file.save(tmp_path, kind), 0.4 + 0.1 * number, 0.0))
        rows.append((list(loras)[number], 0.3 - 0.2 * number, 0.0))
    ours, theirs = loaded(fuse(small, rows)[0]), loaded(stock(small, rows)[0])
    assert_near(ours, theirs, 1e-5)


def test_stacks(loras: dict[str, LoraFile], small: Any) -> None:
    """What comes in, then what is in use of the node's own; the incoming list stays as it is."""
    stack: list[Any] = [A]
    for _ in range(2):
        assert fuse(small, [B, (*C, False), ("None", 1.0, 1.0)], stack=stack)[2] == [A, B]
    assert stack == [A]
    assert fuse(fuse(small, [A])[0], [B], stack=[A])[2] == [A, B]


def test_nothing_chosen(loras: dict[str, LoraFile], small: Any) -> None:
    clip, base = make_clip(), state(small)
    model, text, stack = fuse(small, [("None", 1.0, 1.0), row("lora", 1.0, 1.0, False)], clip)
    assert stack == [] and not model.patches and not text.patcher.patches
    assert not changed(loaded(model), base)
    assert fuse(small, [A])[1] is None


def test_merged_models(loras: dict[str, LoraFile], small: Any) -> None:
    """A merge scales what came before it, and nothing that comes after."""
    merge = importlib.import_module("comfy_extras.nodes_model_merging").ModelMergeSimple().merge
    other = make_model(SMALL, seed=5)
    (theirs,) = merge(stock(small, [A])[0], stock(other, [B])[0], 0.3)
    theirs = stock(theirs, [D])[0]
    (ours,) = merge(fuse(small, [A])[0], fuse(other, [B])[0], 0.3)
    ours = fuse(ours, [D])[0]
    assert_near(loaded(ours), loaded(theirs), WEIGHTS)


PLACES: dict[str, Callable[[Any], Any]] = {
    "without Blade": lambda model: fuse(fuse(model, [A, B])[0], [C, D])[0],
    "before": lambda model: optimize_model(fuse(fuse(model, [A, B])[0], [C, D])[0], EAGER),
    "after": lambda model: fuse(fuse(optimize_model(model, EAGER), [A, B])[0], [C, D])[0],
    "between": lambda model: fuse(optimize_model(fuse(model, [A, B])[0], EAGER), [C, D])[0],
    "stock between": lambda model: fuse(
        stock(optimize_model(fuse(model, [A])[0], EAGER), [B])[0], [D]
    )[0],
    "switched off": lambda model: without_blade(optimize_model(fuse(model, [A, B, D])[0], EAGER)),
    "stack": lambda model: fuse(optimize_model(model, EAGER), [D], stack=[A, B, C])[0],
}


def test_images(session: Session, loras: dict[str, LoraFile], small: Any) -> None:
    bare, theirs = sample(small), sample(stock(small, [A, B, D])[0])
    assert relative_rms(theirs, bare) > 1e-2
    for place, build in PLACES.items():
        assert relative_rms(sample(build(small)), theirs) <= IMAGES, place
    optimized = optimize_model(small, EAGER)
    assert relative_rms(sample(optimized), bare) <= IMAGES


def test_prompts(loras: dict[str, LoraFile]) -> None:
    clip, model = make_clip(), make_model(SMALL)

    def encode(text: Any) -> torch.Tensor:
        with torch.inference_mode():
            result = text.encode_from_tokens(text.tokenize("a photo of a cat"))
        assert isinstance(result, torch.Tensor)
        return result

    bare, theirs = encode(clip), encode(stock(model, [A, C], clip)[1])
    assert relative_rms(theirs, bare) > 1e-3
    assert relative_rms(encode(fuse(model, [A, C], clip)[1]), theirs) <= IMAGES
    assert relative_rms(encode(clip), bare) <= IMAGES


@pytest.mark.parametrize("session", ["launched"], indirect=True)
def test_report(session: Session, loras: dict[str, LoraFile], tmp_path: Path, small: Any) -> None:
    file = make(small, kinds=("lora", "loha", "dora"), ranks=(4, 16), only="attn", seed=71)
    file.tensors["lora_unet_nowhere.lora_up.weight"] = torch.ones(2, 2)
    reported = (file.save(tmp_path, "reported"), 0.5, 0.25)
    model = fuse(fuse(optimize_model(small, EAGER), [reported])[0], [B])[0]
    loras_of = stats(model)["loras"]
    assert loras_of["weights"] == len(model.patches) and loras_of["switch_ms"] is None
    first, second = loras_of["rows"]
    assert (first["name"], first["strength_model"], first["strength_clip"]) == reported
    assert first["ranks"] == [4, 16] and first["keys"] == len(file.targets)
    assert first["kinds"].keys() == {"lora", "loha", "dora"}
    assert first["unmatched"] == ["lora_unet_nowhere.lora_up.weight"] and not first["skipped"]
    assert second["name"] == B[0] and second["kinds"].keys() == {"lokr", "diff"}
    sample(model)
    assert stats(model)["loras"]["switch_ms"] > 0
    text = as_text(stats(model))
    assert "reported" in text and "kron" in text and "lora_unet_nowhere" in text


def test_inputs(loras: dict[str, LoraFile]) -> None:
    inputs = BladeFusedLoRA.INPUT_TYPES()
    assert list(inputs["required"]) == ["model", "on_failure"]
    names = ("lora", "strength_model", "strength_clip", "enabled")
    rows = [f"{name}_{number}" for number in range(1, 9) for name in names]
    assert list(inputs["optional"]) == ["clip", "lora_stack", *rows]
    choices, options = inputs["optional"]["lora_8"]
    assert choices[0] == options["default"] == "None" and set(loras) <= set(choices)
    assert inputs["required"]["on_failure"][1]["default"] == "fallback"
    assert BladeFusedLoRA.RETURN_TYPES == ("MODEL", "CLIP", "LORA_STACK")
