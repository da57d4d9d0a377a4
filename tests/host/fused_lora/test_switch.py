"""The life of fused LoRAs: switches, memory, offloaded weights, hooks and clones."""

import functools
import itertools
import random
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from blade_tests.host.fused_lora.memory import tensor_bytes
from blade_tests.host.lora_files import (
    SMALL,
    LoraFile,
    Row,
    addresses,
    assert_near,
    changed,
    effective,
    fuse,
    loaded,
    make_clip,
    patcher,
    row,
    same,
    state,
    stock,
)
from blade_tests.host.tiny import DEVICE, conditioning, make_model, relative_rms
from blade_tests.host.tiny import sample as sample_steps

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session, optimize_model

WEIGHTS = 1e-6
IMAGES = 1e-4
EAGER = OptimizeConfig(backend="eager", on_failure="error")
NO_NEW_GRAPHS = {"graphs_compiled": 0, "captures": 0, "captures_dropped": 0}
ONCE = pytest.mark.parametrize("session", ["launched"], indirect=True)
NAMES = ("lora", "kron", "loha", "dora", "few")


def sample(model: Any, **options: Any) -> torch.Tensor:
    """One step is enough where only weights count."""
    return sample_steps(model, **{"steps": 1, **options})


def draw(chance: random.Random) -> list[Row]:
    """Up to four of any files at any strengths."""
    return [
        row(chance.choice(NAMES), chance.choice((1.0, chance.uniform(-1, 1))), 0.5)
        for _ in range(chance.randrange(1, 5))
    ]


def test_two_hundred_switches(own: Path, small: Any) -> None:
    """The base comes back bit for bit, at the same addresses, and nothing stays behind."""
    clip, chance, held = make_clip(), random.Random(0), []
    bases = state(small), state(clip)
    everything = [row(name) for name in NAMES]
    for model, base in zip(fuse(small, everything, clip)[:2], bases, strict=True):
        assert changed(loaded(model), base)
    there = addresses(small), addresses(clip)
    with torch.inference_mode():  # as in the host's prompt worker
        for number in range(200):
            rows = everything if number in (50, 199) else draw(chance)
            models = [patcher(model) for model in fuse(small, rows, clip)[:2]]
            comfy.model_management.load_models_gpu(models)
            assert (addresses(small), addresses(clip)) == there
            if rows is everything:
                held.append(tensor_bytes())
            elif number % 40 == 0:
                theirs = stock(make_model(SMALL), rows, make_clip())
                for ours, other in zip(models, theirs, strict=True):
                    assert_near(state(ours), loaded(other), 1e-5)
                del theirs, other
    assert held[0] == held[1]
    comfy.model_management.unload_all_models()
    assert same(state(small), bases[0]) and same(state(clip), bases[1])
    assert not small.backup and not clip.patcher.backup


def test_back_to_none_in_place(own: Path, small: Any) -> None:
    """A Blade clone without LoRAs gets the base by a switch too."""
    base = state(small)
    none = optimize_model(small, EAGER)
    loaded(fuse(none, [row("lora"), row("dora")])[0])
    there = addresses(small)
    for _ in range(3):
        assert same(loaded(none), base)
        assert addresses(small) == there and not none.backup
        assert changed(loaded(fuse(none, [row("loha", -0.5)])[0]), base)
        assert addresses(small) == there


def test_switches_recompile_and_recapture_nothing(session: Session, own: Path, small: Any) -> None:
    base = state(small)
    sets: list[list[Row]] = [
        [row("lora")],
        [],
        [row("lora", 0.5), row("kron", -0.7), row("few")],
        [row("dora", 0.9), row("loha", 0.4)],
        [row("few", 0.8), row("dora", 0.9), row("lora", -0.3)],
    ]
    theirs = [sample(stock(small, rows)[0], steps=3) for rows in sets]
    for one, other in itertools.pairwise(theirs):
        assert relative_rms(one, other) > 1e-3
    comfy.model_management.unload_all_models()
    optimized = optimize_model(small, EAGER)
    sample(fuse(optimized, sets[0])[0], steps=3)
    there = addresses(small)
    with session.engine.counters.expect(**NO_NEW_GRAPHS):
        for rows, expected in [*zip(sets, theirs, strict=True), (sets[0], theirs[0])]:
            assert relative_rms(sample(fuse(optimized, rows)[0], steps=3), expected) <= IMAGES
            assert addresses(small) == there
    comfy.model_management.unload_all_models()
    assert same(state(small), base)


def test_clones_with_other_loras_in_turn(session: Session, own: Path, small: Any) -> None:
    sets = [[row("lora"), row("few", -0.5)], [row("kron", 0.7)]]
    theirs = [sample(stock(small, rows)[0], steps=3) for rows in sets]
    assert relative_rms(theirs[0], theirs[1]) > 1e-3
    optimized = optimize_model(small, EAGER)
    clones = [fuse(optimized, rows)[0] for rows in sets]
    assert [type(clone).__name__ for clone in clones] == ["InPlacePatcher"] * 2
    sample(clones[0], steps=3)
    with session.engine.counters.expect(**NO_NEW_GRAPHS):
        for turn in (1, 0, 1):
            assert relative_rms(sample(clones[turn], steps=3), theirs[turn]) <= IMAGES


def test_a_stock_clone_in_between(session: Session, own: Path, small: Any) -> None:
    """It may cost a reload, never a value."""
    base = state(small)
    rows = [row("lora"), row("dora", -0.5)]
    theirs, bare = sample(stock(small, rows)[0]), sample(small)
    optimized = optimize_model(small, EAGER)
    for _ in range(2):
        assert relative_rms(sample(fuse(optimized, rows)[0]), theirs) <= IMAGES
        assert relative_rms(sample(small), bare) <= IMAGES
        assert relative_rms(sample(stock(small, rows)[0]), theirs) <= IMAGES
    comfy.model_management.unload_all_models()
    assert same(state(small), base)


@ONCE
def test_frozen_weights_see_each_switch(session: Session, own: Path, small: Any) -> None:
    frozen = OptimizeConfig(backend="eager", freeze_weights=True, on_failure="error")
    optimized = optimize_model(small, frozen)
    for rows in ([row("lora")], [row("lora", 0.5)]):
        theirs = sample(stock(make_model(SMALL), rows)[0])
        assert relative_rms(sample(fuse(optimized, rows)[0]), theirs) <= IMAGES


def partially(model: Any) -> Any:
    """`model` as loads see it on a GPU that has room for half of it."""
    load = type(model).partially_load

    def partially_load(device: Any, extra_memory: float = 0, **options: Any) -> Any:
        return load(model, device, model.model_size() / 2, **options)

    model.partially_load = partially_load
    return model


def test_a_partially_loaded_model(session: Session, own: Path, small: Any) -> None:
    base, rows = state(small), [row("lora", 0.8), row("dora", 0.6), row("kron", -0.4)]
    theirs, image = loaded(stock(small, rows)[0]), sample(stock(small, rows)[0])
    comfy.model_management.unload_all_models()
    plain = partially(fuse(small, rows)[0])
    assert relative_rms(sample(plain), image) <= IMAGES
    assert small.model.model_lowvram and changed(effective(plain), state(plain))
    assert_near(effective(plain), theirs, 1e-5)
    optimized = partially(fuse(optimize_model(small, EAGER), rows)[0])
    assert relative_rms(sample(optimized), image) <= IMAGES
    other = partially(fuse(optimized, [row("few")])[0])
    assert relative_rms(sample(other), sample(stock(small, [*rows, row("few")])[0])) <= IMAGES
    comfy.model_management.unload_all_models()
    assert same(state(small), base)


def test_weights_that_move_off_later(own: Path, small: Any) -> None:
    """The host takes half of a loaded model off the GPU when something else needs room."""
    base, rows = state(small), [row("lora", 0.8), row("kron", -0.4)]
    theirs = loaded(stock(small, rows)[0])
    comfy.model_management.unload_all_models()
    model = fuse(small, rows)[0]
    assert_near(loaded(model), theirs, WEIGHTS)
    model.partially_unload(model.offload_device, model.model_size() / 2)
    assert small.model.model_lowvram
    assert_near(effective(model), theirs, WEIGHTS)
    changed_rows = fuse(small, [row("loha")])[0]
    assert_near(loaded(changed_rows), loaded(stock(make_model(SMALL), [row("loha")])[0]), WEIGHTS)
    comfy.model_management.unload_all_models()
    assert same(state(small), base)


def test_conditioning_hooks_with_loras(session: Session, own: Path, made: Path, small: Any) -> None:
    """A hook's LoRA comes on top of the node's, for its prompt alone, and goes again."""
    base, rows = state(small), [row("lora", 0.8), row("few", -0.6)]
    file = comfy.utils.load_torch_file(str(made / "kron.safetensors"))
    hooks = comfy.hooks.create_hook_lora(file, 0.9, 0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning(seed=1), hooks)
    with_stock = stock(small, rows)[0]
    plain, hooked = sample(with_stock), sample(with_stock, positive=positive)
    assert relative_rms(hooked, plain) > 1e-3
    for model in (fuse(small, rows)[0], fuse(optimize_model(small, EAGER), rows)[0]):
        assert relative_rms(sample(model, positive=positive), hooked) <= IMAGES
        assert relative_rms(sample(model), plain) <= IMAGES
    comfy.model_management.unload_all_models()
    assert same(state(small), base)


def test_saving_a_model(own: Path, small: Any) -> None:
    """A checkpoint that the host saves holds all patches, also of weights that are offloaded."""
    rows = [row("lora", 0.8), row("dora", 0.5)]
    theirs = loaded(stock(small, rows)[0])
    comfy.model_management.unload_all_models()
    models = {"whole": fuse(small, rows)[0], "in part": partially(fuse(small, rows)[0])}
    for name, model in models.items():
        path = str(own / f"{name}.safetensors")
        comfy.sd.save_checkpoint(path, model)
        saved = comfy.utils.load_torch_file(path)
        keys = {key: f"model.{key}" for key in theirs if key.startswith("diffusion_model.")}
        assert len(keys) > 100
        assert_near({k: saved[s] for k, s in keys.items()}, {k: theirs[k] for k in keys}, 1e-5)


@torch.inference_mode()
def test_fp8_weights(own: Path) -> None:
    """What the host rounds at random, by the weight's name, is rounded as the host does it."""
    ours, theirs = (make_model(SMALL, dtype=torch.float8_e4m3fn) for _ in range(2))
    base = state(ours)
    for rows in ([row("lora"), row("few", -0.5)], [row("lora", 0.4), row("kron")], []):
        actual, expected = loaded(fuse(ours, rows)[0]), loaded(stock(theirs, rows)[0])
        keys = changed(expected, base)
        assert changed(actual, base) == keys and bool(keys) == bool(rows)
        for key in keys:
            equal = actual[key].float() == expected[key].float()
            assert float(equal.float().mean()) > 0.99, key
    comfy.model_management.unload_all_models()
    assert same(state(ours), base)


def test_equal_sets_are_the_same_weights(own: Path, small: Any) -> None:
    """Then a prompt that is queued again, or A, B, A, patches nothing."""
    clip = make_clip()
    sets = [
        [row("lora"), row("kron")],
        [row("kron"), row("lora")],
        [row("lora"), row("kron", 0.9)],
        [row("lora"), row("kron"), row("kron")],
        [row("lora")],
        [row("lora", 1.0, 0.5), row("kron", 1.0, 0.5)],
    ]
    identities = []
    for rows in sets:
        first, second = (fuse(small, rows, clip) for _ in range(2))
        switched_off = fuse(small, [*rows, (*row("few"), False)], clip)
        for part in (0, 1):
            one, other = patcher(first[part]), patcher(second[part])
            assert one is not other and one.patches_uuid == other.patches_uuid
            assert one.patches_uuid == patcher(switched_off[part]).patches_uuid
        identities.append((patcher(first[0]).patches_uuid, patcher(first[1]).patches_uuid))
    assert identities[0][0] == identities[5][0]  # other strengths of the text encoder's only
    assert identities[0][1] == identities[2][1]
    assert len({model for model, _ in identities}) == 5
    assert len({text for _, text in identities}) == 5
    others = fuse(stock(small, [row("few")])[0], sets[0])[0]
    assert others.patches_uuid != identities[0][0]
    assert small.patches_uuid not in {model for model, _ in identities}


def test_the_same_set_again_writes_nothing(own: Path, small: Any) -> None:
    rows = [row("lora"), row("dora")]
    loaded(fuse(small, rows)[0])
    key = next(key for key in state(small) if key.endswith("attn1.to_q.weight"))
    layer = functools.reduce(getattr, key.split(".")[:-1], small.model)
    layer.weight.data[0, 0] = 12345.0  # a write would take it away
    assert float(loaded(fuse(small, rows)[0])[key][0, 0]) == 12345.0
    assert float(loaded(fuse(small, rows[:1])[0])[key][0, 0]) != 12345.0


def test_a_lora_that_makes_a_weight_larger(own: Path, small: Any) -> None:
    """As `reshape_weight` asks; what comes next finds another shape there than its own."""
    prefix, key = "diffusion_model.out.2", "diffusion_model.out.2.weight"
    up, down = torch.ones(6, 2, 1, 1), torch.ones(2, 32, 3, 3)
    shape = torch.tensor([6, 32, 3, 3])
    parts = {".lora_up.weight": up, ".lora_down.weight": down, ".reshape_weight": shape}
    tensors = {prefix + suffix: tensor for suffix, tensor in parts.items()}
    LoraFile(tensors, {}).save(own, "larger")
    base, larger, other = state(small), row("larger", 0.5), row("lora", 0.5)
    for rows in ([other], [larger], [other], [larger, other], [other, larger], [other], []):
        theirs = loaded(stock(make_model(SMALL), rows)[0])
        ours = loaded(fuse(small, rows)[0])
        assert ours[key].shape == theirs[key].shape
        assert (ours[key].shape == torch.Size(shape)) == (larger in rows)
        assert_near(ours, theirs, WEIGHTS)
    comfy.model_management.unload_all_models()
    assert same(state(small), base)


def test_text_encoder_in_place(own: Path) -> None:
    model, clip = make_model(SMALL), make_clip()
    base = state(clip)
    loaded(fuse(model, [row("lora")], clip)[1])
    there = addresses(clip)
    for rows in ([row("kron", 0.0, 0.7)], [row("lora", 0.0, -0.7), row("loha")]):
        theirs = loaded(stock(make_model(SMALL), rows, make_clip())[1])
        text = fuse(model, rows, clip)[1]
        assert_near(loaded(text), theirs, WEIGHTS)
        assert addresses(clip) == there
        assert text.tokenize("a cat")
    assert clip.patcher.model is text.cond_stage_model
    comfy.model_management.unload_all_models()
    assert same(state(clip), base)
    assert patcher(clip).load_device == DEVICE
