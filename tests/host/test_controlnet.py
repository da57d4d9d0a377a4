"""BladeControlNetApply gives the image of the host's own node, and leaves what came in alone."""

import itertools
from pathlib import Path
from typing import Any

import comfy.hooks
import folder_paths
import pytest
import torch
from blade_tests.host import lora_files
from blade_tests.host.control_nets import (
    DEEP,
    EAGER,
    HOST_NODES,
    Prompts,
    applied,
    assert_as_stock,
    image,
    make_control_lora,
    make_controlnet,
    make_t2i_adapter,
    prompts,
)
from blade_tests.host.tiny import SD15, SDXL, conditioning, make_model, relative_rms, sample
from comfy.controlnet import StrengthType

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session
from blade.blade_core.host.progress import CompileProgress

# The host's Union layers have this one width.
UNION = {
    "model_channels": 320,
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
}
UNION |= {"transformer_depth_output": [1, 1], "transformer_depth_middle": 1}

STEPS = {"steps": 4}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the node, of the sampler
    "strength 1": ({}, STEPS),
    "strength 0.5": ({"strength": 0.5}, STEPS),
    "strength 2": ({"strength": 2.0}, STEPS),
    "start and end": ({"start": 0.25, "end": 0.6}, {"steps": 8}),
    "cfg 1": ({}, {"steps": 4, "cfg": 1.0}),
    "batch 4": ({}, {"steps": 4, "batch": 4}),
    "batch 2, images 2": ({"hint": image(batch=2)}, {"steps": 4, "batch": 2}),
    "batch 4, images 3": ({"hint": image(batch=3)}, {"steps": 3, "batch": 4}),
    "tall latent, wide image": ({"hint": image(size=(72, 200))}, {"steps": 4, "size": (24, 16)}),
    "two calls a step": ({}, {"steps": 3, "sampler": "heun"}),
    "noise in each step": ({}, {"steps": 4, "sampler": "euler_ancestral"}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_controlnet(session: Session, sd15: Any, case: str) -> None:
    node, options = CASES[case]
    control = make_controlnet(SD15)
    expected = assert_as_stock(
        sd15,
        lambda config: applied(control, **prompts(), config=config, **node),
        control,
        **options,
    )
    assert relative_rms(expected, sample(sd15, **prompts(), **options)) > 1e-3


def test_strength_0_is_no_controlnet(session: Session, sd15: Any) -> None:
    plain = prompts()
    with session.engine.counters.expect(control_runs=0, hint_embeddings=0):
        none = applied(make_controlnet(SD15), **plain, strength=0.0)
        assert none["positive"] is plain["positive"] and none["negative"] is plain["negative"]
        assert torch.equal(sample(sd15, **none), sample(sd15, **plain))


def _area(plain: Prompts) -> Prompts:
    part = HOST_NODES.ConditioningSetArea().append(conditioning(seed=5), 64, 96, 32, 0, 1.0)[0]
    return plain | {"positive": plain["positive"] + part}


def _mask(plain: Prompts) -> Prompts:
    mask = torch.zeros(16, 16)
    mask[:, 4:12] = 1.0
    node = HOST_NODES.ConditioningSetMask()
    parts = [
        node.append(conditioning(seed=5 + i), m, "default", 0.8)[0]
        for i, m in enumerate((mask, 1 - mask))
    ]
    return plain | {"positive": parts[0] + parts[1]}


def _timesteps(plain: Prompts) -> Prompts:
    node = HOST_NODES.ConditioningSetTimestepRange()
    early = node.set_range(plain["positive"], 0.0, 0.5)[0]
    late = node.set_range(conditioning(seed=5), 0.5, 1.0)[0]
    return plain | {"positive": early + late}


PROMPTS = {
    "77 and 154 tokens": prompts(77, 154),  # one batch: the shorter is repeated
    "77 and 385 tokens": prompts(77, 385),  # two calls
    "an area": _area(prompts()),
    "a mask": _mask(prompts()),
    "two at different steps": _timesteps(prompts()),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(session: Session, sd15: Any, name: str) -> None:
    control, plain = make_controlnet(SD15), PROMPTS[name]
    expected = assert_as_stock(
        sd15, lambda config: applied(control, **plain, config=config), control, **STEPS
    )
    assert relative_rms(expected, sample(sd15, **plain, **STEPS)) > 1e-3


def test_one_prompt_only(session: Session, sd15: Any) -> None:
    control, plain = make_controlnet(SD15), prompts()
    expected = []
    for side in plain:
        expected.append(
            assert_as_stock(
                sd15,
                lambda config, side=side: (
                    plain | {side: applied(control, **plain, config=config)[side]}
                ),
                control,
                **STEPS,
            )
        )
    assert relative_rms(expected[0], expected[1]) > 1e-3


def _averaged(control: Any) -> None:
    control.global_average_pooling = True


def _rising(control: Any) -> None:
    control.strength_type = StrengthType.LINEAR_UP


@pytest.mark.parametrize("change", [_averaged, _rising])
def test_attributes_of_the_controlnet(session: Session, sd15: Any, change: Any) -> None:
    control, plain = make_controlnet(SD15), prompts()
    before = sample(sd15, **applied(control, **plain, config=None, strength=0.7), **STEPS)
    change(control)
    expected = assert_as_stock(
        sd15, lambda c: applied(control, **plain, config=c, strength=0.7), control, **STEPS
    )
    assert relative_rms(expected, before) > 1e-4


def _union(config: dict[str, Any], kinds: list[int]) -> Any:
    control = make_controlnet(config, kinds=6)
    control.set_extra_arg("control_type", kinds)
    return control


SD15_UNION, SDXL_UNION = SD15 | UNION, SDXL | UNION
KINDS = {
    "sdxl": (SDXL, make_controlnet),
    "union of type 1": (SDXL_UNION, lambda config: _union(config, [1])),
    "union of any type": (SDXL_UNION, lambda config: _union(config, [])),
    "union, nobody set a type": (SD15_UNION, lambda config: make_controlnet(config, kinds=6)),
    "union of type 3, sd15": (SD15_UNION, lambda config: _union(config, [3])),
    "lora, sd15": (SD15, make_control_lora),
    "lora, sdxl": (SDXL, make_control_lora),
    "t2i": (DEEP, lambda config: make_t2i_adapter([32, 64])),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(session: Session, name: str) -> None:
    config, make = KINDS[name]
    model, control, plain = make_model(config), make(config), prompts()
    ours = 0 if name == "t2i" else 2  # with the UNet optimized, and not
    with session.engine.counters.expect(control_runs=ours, hint_embeddings=ours, blocks_eager=0):
        expected = assert_as_stock(
            model, lambda c: applied(control, **plain, config=c, strength=0.8), control, **STEPS
        )
    assert relative_rms(expected, sample(model, **plain, **STEPS)) > 1e-4


def test_types_of_a_union_in_turn(session: Session) -> None:
    """The host copies the ControlNet for each type; all share one model and its graphs."""
    model, plain = make_model(SDXL_UNION), prompts()
    control = make_controlnet(SDXL_UNION, kinds=6)
    seen = []
    compiled = []
    for kind in (0, 4, 0):
        typed = control.copy()
        typed.set_extra_arg("control_type", [kind])
        expected = sample(model, **applied(typed, **plain, config=None), **STEPS)
        seen.append(expected)
        assert relative_rms(sample(model, **applied(typed, **plain), **STEPS), expected) <= 1e-4
        compiled.append(session.engine.counters["graphs_compiled"])
    assert len(set(compiled)) == 1 and compiled[0] > 0
    assert relative_rms(seen[0], seen[1]) > 1e-4 and torch.equal(seen[0], seen[2])


S, B = None, EAGER  # a node of stock's, and one of Blade's
CHAINS: dict[str, tuple[tuple[OptimizeConfig | None, ...], tuple[int, ...]]] = {  # nodes, files
    "two": ((B, B), (0, 1)),
    "one file twice": ((B, B), (0, 0)),
    "after stock": ((S, B), (0, 1)),
    "before stock": ((B, S), (0, 1)),
    "one file, between stock": ((S, B, S), (0, 0, 0)),
    "one file, around stock": ((B, S, B), (0, 0, 0)),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chains(session: Session, sd15: Any, chain: str) -> None:
    nodes, files = CHAINS[chain]
    made = [make_controlnet(SD15, seed=file) for file in range(2)]
    controls = [made[file] for file in files]

    def apply(config: OptimizeConfig | None) -> Prompts:
        both = prompts()
        for i, (control, node) in enumerate(zip(controls, nodes, strict=True)):
            own = {"hint": image(i, (128, 128 + 64 * i)), "strength": 1 - 0.3 * i, "end": 1 - i / 4}
            both = applied(control, **both, config=config and node, **own)
        return both

    expected = assert_as_stock(sd15, apply, *controls, **STEPS)
    first = applied(controls[0], **prompts(), config=None, hint=image(0))
    assert relative_rms(expected, sample(sd15, **first, **STEPS)) > 1e-3


def test_chains_of_all_kinds(session: Session) -> None:
    model, plain = make_model(DEEP), prompts()
    controls = [make_controlnet(DEEP), make_control_lora(DEEP, seed=1), make_t2i_adapter([32, 64])]
    images = []
    for order in itertools.permutations(range(3)):

        def apply(config: OptimizeConfig | None, order: tuple[int, ...] = order) -> Prompts:
            both = plain
            for i in order:
                both = applied(controls[i], **both, config=config, hint=image(i), strength=0.6)
            return both

        images.append(sample(model, **apply(None), steps=3))
        assert relative_rms(sample(model, **apply(EAGER), steps=3), images[-1]) <= 1e-4
    assert all(relative_rms(image, sample(model, **plain, steps=3)) > 1e-3 for image in images)


@pytest.mark.parametrize("make", [make_controlnet, make_control_lora])
def test_fused_loras_on_the_model(
    session: Session, sd15: Any, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", folders)
    rows = [
        (lora_files.make(sd15, seed=seed, ranks=(4,)).save(tmp_path, str(seed)), 0.6, 0.0)
        for seed in (1, 2)
    ]
    control, plain = make(SD15), prompts()
    stock = lora_files.stock(sd15, rows)[0]
    expected = sample(stock, **applied(control, **plain, config=None), **STEPS)
    fused = lora_files.fuse(sd15, rows)[0]
    without = assert_as_stock(
        fused, lambda c: applied(control, **plain, config=c), control, **STEPS
    )
    assert relative_rms(without, expected) <= 1e-4
    assert relative_rms(expected, sample(stock, **plain, **STEPS)) > 1e-3
    bare = assert_as_stock(sd15, lambda c: applied(control, **plain, config=c), control, **STEPS)
    assert relative_rms(bare, expected) > 1e-3


@pytest.mark.parametrize("make", [make_controlnet, make_control_lora])
def test_a_lora_hook_on_a_prompt(session: Session, sd15: Any, make: Any) -> None:
    """It changes the base's weights between calls; a ControlLora is made of those."""
    key = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    for hook in hooks.hooks:
        hook.weights = {key: ("diff", (torch.full_like(sd15.model.state_dict()[key], 0.05),))}
        hook.need_weight_init = False
    control, plain = make(SD15), prompts()
    hooked = plain | {"positive": comfy.hooks.set_hooks_for_conditioning(plain["positive"], hooks)}
    expected = assert_as_stock(
        sd15, lambda c: applied(control, **hooked, config=c), control, **STEPS
    )
    unhooked = sample(sd15, **applied(control, **plain, config=None), **STEPS)
    assert relative_rms(expected, unhooked) > 1e-3


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_residuals_are_written_where_a_recording_wants_them(
    session: Session, config: dict[str, Any]
) -> None:
    """What a recording on a GPU does on a stream of its own: each to its place, times strength."""
    net = make_controlnet(config).control_model
    state = session.controlnet(net, EAGER)
    label = config["adm_in_channels"]
    with torch.inference_mode():
        call = state.prepare(
            net,
            (
                torch.randn(2, 4, 16, 16),
                torch.rand(1, 3, 128, 128),
                torch.full((2,), 500.0),
                torch.randn(2, 77, config["context_dim"]),
                None if label is None else torch.randn(2, label),
            ),
            {},
            progress=CompileProgress(None),
            freeze=False,
        )
        assert call is not None
        packed = state.packed(call, call.tensors)
        written = torch.full_like(packed, torch.nan)
        state.write(call, call.tensors, torch.tensor([0.5]), written, state.forms(call))
        assert torch.equal(written, packed * 0.5)
        assert torch.equal(state.packed(call, call.tensors), packed)
        state.end()
