"""Bad input is named, unknown kinds run as stock, and code of others is never left out."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import pytest
import torch
from blade_tests.host.control_nets import (
    BOUND,
    EAGER,
    applied,
    assert_as_stock,
    image,
    make_control_lora,
    make_controlnet,
    make_t2i_adapter,
    prompts,
)
from blade_tests.host.test_failures import Faulty
from blade_tests.host.tiny import SD15, SDXL, conditioning, make_model, relative_rms, sample
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential

from blade.blade_core import engine
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.errors import BackendUnavailable, CompileFailed, ControlNetError
from blade.blade_core.graph import GraphRequest
from blade.blade_core.host.model import Session, optimize_model
from blade.nodes.controlnet_apply import BladeControlNetApply

WIDE = SDXL | {"context_dim": 64, "model_channels": 64}
FALLBACK = OptimizeConfig(backend="eager")


def controlnet_report(session: Session) -> dict[str, Any]:
    (found,) = session.stats()["controlnets"]
    return found


# --- a ControlNet that does not fit ---------------------------------------------------------------


def test_one_of_another_architecture(session: Session) -> None:
    small, wide = make_model(SD15), make_model(WIDE)
    both = {"positive": conditioning(width=64), "negative": conditioning(width=64, seed=2)}
    sd15 = "32 channels and prompts of width 32"
    sdxl = "64 channels and prompts of width 64, and a label of width 1568"
    for model, plain, config in ((small, prompts(), WIDE), (wide, both, SD15)):
        words = [type(model.model.model_config).__name__, sd15, sdxl]
        with pytest.raises(ControlNetError, match="does not fit") as caught:
            sample(model, **applied(make_controlnet(config), **plain))
        assert [word for word in words if word not in str(caught.value)] == []
    fitting = make_controlnet(SD15)
    assert_as_stock(small, lambda c: applied(fitting, **prompts(), config=c), fitting, steps=3)


def test_one_that_gets_prompts_of_its_own(session: Session) -> None:
    """As the host's CLIPTextEncodeControlnet gives them: their width need not be the model's."""
    model, control = make_model(SD15 | {"context_dim": 48}), make_controlnet(SD15)
    own = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(7))
    plain = {
        name: conditioning(seed=seed, width=48) for name, seed in (("positive", 1), ("negative", 2))
    }
    both = {
        name: [[entry[0], entry[1] | {"cross_attn_controlnet": own}] for entry in prompt]
        for name, prompt in plain.items()
    }
    assert_as_stock(model, lambda c: applied(control, **both, config=c), control, steps=3)
    with pytest.raises(ControlNetError, match="does not fit the model"):
        sample(model, **applied(control, **plain))


SMALLER = {
    # ComfyUI's SDXL_small_cnet: the small ControlNets of diffusers have no attention at all.
    "without attention": SDXL | {"transformer_depth": [0, 0], "transformer_depth_middle": 0},
    # As one for SD2.1 on SD2.1-unCLIP.
    "without a label": {k: v for k, v in SDXL.items() if k != "num_classes"},
}


@pytest.mark.parametrize("name", SMALLER)
def test_one_that_fits_though_it_has_less(session: Session, sdxl: Any, name: str) -> None:
    control = make_controlnet(SMALLER[name])
    expected = assert_as_stock(
        sdxl, lambda c: applied(control, **prompts(), config=c), control, steps=3
    )
    assert relative_rms(expected, sample(sdxl, **prompts(), steps=3)) > 1e-3


# --- the image ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (torch.rand(1, 64, 64, 4), "has 4 channels; this ControlNet expects 3"),
        (torch.rand(64, 64, 3), "is of shape (64, 64, 3); expected an IMAGE"),
        (torch.full((1, 64, 64, 3), torch.nan), "NaN"),
        (image().masked_fill(image() > 0.99, torch.inf), "infinite"),
        ("none.png", "is str; expected an IMAGE"),
        (None, "is NoneType; expected an IMAGE"),
    ],
    ids=["channels", "shape", "nan", "infinite", "text", "none"],
)
@pytest.mark.parametrize("make", [make_controlnet, make_control_lora])
def test_a_bad_image(session: Session, hint: Any, text: str, make: Any) -> None:
    arguments = (*prompts().values(), make(SD15), hint, 1.0, 0.0, 1.0)
    with pytest.raises(ControlNetError) as caught:
        BladeControlNetApply().apply(*arguments)
    assert text in str(caught.value)


# --- the type of a Union ControlNet ---------------------------------------------------------------


@pytest.mark.parametrize("kinds", [[6], [0, 3], [9]], ids=str)
def test_types_that_a_union_does_not_know(session: Session, kinds: list[int]) -> None:
    """The host's own words: 6 is out of this file's range, and one image has one type only."""
    union = {"model_channels": 320, "channel_mult": [1], "num_res_blocks": [1]}
    config = SD15 | union | {"transformer_depth": [1], "transformer_depth_output": [1, 1]}
    model, control = make_model(config), make_controlnet(config, kinds=6)
    control.set_extra_arg("control_type", kinds)
    errors = []
    for choice in (None, EAGER):
        with pytest.raises((ValueError, LookupError)) as caught:
            sample(model, **applied(control, **prompts(), config=choice))
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
    if kinds == [6]:
        assert "Control type tile(6) is out of range" in errors[0][1]
    control.set_extra_arg("control_type", [5])
    assert_as_stock(model, lambda c: applied(control, **prompts(), config=c), control)


# --- what Blade does not know ---------------------------------------------------------------------


class OwnControlNet(comfy.controlnet.ControlNet):
    """A pack's own, over the host's: it weighs its residuals."""

    def control_merge(self, control: Any, *args: Any, **kwargs: Any) -> Any:
        merged = super().control_merge(control, *args, **kwargs)
        return {name: [t * 0.5 for t in tensors] for name, tensors in merged.items()}

    def copy(self) -> Any:
        other = OwnControlNet(None, load_device=self.load_device)
        other.control_model = self.control_model
        other.control_model_wrapped = self.control_model_wrapped
        self.copy_to(other)
        return other


class OwnModel(comfy.cldm.cldm.ControlNet):
    """A pack's own model in the host's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return {k: [t * 0.5 for t in v] for k, v in super().forward(*args, **kwargs).items()}


def _own_controlnet() -> Any:
    control = make_controlnet(SD15)
    control.__class__ = OwnControlNet
    return control


def _own_model() -> Any:
    control = make_controlnet(SD15)
    control.control_model.__class__ = OwnModel
    return control


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_own_controlnet, "OwnControlNet"),
        (_own_model, "it holds a OwnModel"),
        (lambda: make_t2i_adapter([32, 64]), "T2I-Adapter"),
    ],
    ids=["controlnet", "model", "t2i"],
)
def test_unknown_kinds_run_as_stock(
    session: Session, sd15: Any, make: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    control = make()
    expected = sample(sd15, **applied(control, **prompts(), config=None), steps=3)
    with caplog.at_level(logging.INFO, "blade"), session.engine.counters.expect(control_runs=0):
        actual = sample(sd15, **applied(control, **prompts()), steps=3)
    assert torch.equal(actual, expected)
    assert "This ControlNet runs as stock" in caplog.text and text in caplog.text


# --- compilers that cannot run, or fail -----------------------------------------------------------


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    backend = Faulty(lambda request: None)
    monkeypatch.setitem(engine.BACKENDS, "inductor", backend)
    return backend


def test_a_compiler_that_cannot_run(session: Session, sd15: Any, faulty: Faulty) -> None:
    faulty.reason = "there is no compiler"
    strict = OptimizeConfig(backend="inductor", on_failure="error")
    with pytest.raises(BackendUnavailable, match="there is no compiler"):
        applied(make_controlnet(SD15), **prompts(), config=strict)
    control, soft = make_controlnet(SD15), OptimizeConfig(backend="inductor")
    expected = sample(sd15, **applied(control, **prompts(), config=None), steps=3)
    assert torch.equal(
        sample(sd15, **applied(control, **prompts(), config=soft), steps=3), expected
    )
    assert "there is no compiler" in controlnet_report(session)["runs_as_stock"]


def test_a_compiler_that_fails(session: Session, sd15: Any, faulty: Faulty) -> None:
    def fault(request: GraphRequest) -> None:
        if "Conv2d 32→32" in request.key.label:
            raise ValueError("internal error")

    faulty.fault = fault
    control, soft = make_controlnet(SD15), OptimizeConfig(backend="inductor")
    assert_as_stock(sd15, lambda c: applied(control, **prompts(), config=c and soft), control)
    blocks = controlnet_report(session)["blocks"]
    eager = [block["block"] for block in blocks if block["state"] == "eager"]
    assert eager == ["zero_convs.0", "zero_convs.1", "zero_convs.2"]
    strict = OptimizeConfig(backend="inductor", on_failure="error")
    with pytest.raises(CompileFailed, match="Conv2d 32→32"):
        sample(sd15, **applied(control, **prompts(), config=strict))
    assert_as_stock(sd15, lambda c: applied(control, **prompts(), config=c and soft), control)


# --- code of others inside ------------------------------------------------------------------------


@contextmanager
def _hooked(module: Any) -> Iterator[None]:
    handle = module.register_forward_hook(_halved)
    yield
    handle.remove()


def _halved(module: Any, args: Any, result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result * 0.5
    return {name: [t * 0.5 for t in tensors] for name, tensors in result.items()}


@contextmanager
def _replaced(owner: Any) -> Iterator[None]:
    own = owner.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "forward", lambda *a, **k: _halved(None, None, own(*a, **k)))
        yield


CODE: dict[str, Callable[[Any], Any]] = {
    "a hook on the model": _hooked,
    "a hook on a block": lambda m: _hooked(m.input_blocks[1]),
    "a hook on a layer": lambda m: _hooked(m.input_blocks[1][0]),
    "a hook on a zero convolution": lambda m: _hooked(m.zero_convs[1]),
    "a hook on the hint's block": lambda m: _hooked(m.input_hint_block),
    "a hook on a layer of the hint": lambda m: _hooked(m.input_hint_block[2]),
    "a hook on the embedding": lambda m: _hooked(m.time_embed),
    "another forward": _replaced,
    "another forward of a block": lambda m: _replaced(m.middle_block),
    "another forward of a layer": lambda m: _replaced(m.middle_block[1]),
    "another forward of the hint's block": lambda m: _replaced(m.input_hint_block),
    "another forward of the class": lambda m: _replaced(comfy.cldm.cldm.ControlNet),
    "another forward of the blocks' class": lambda m: _replaced(TimestepEmbedSequential),
}


@pytest.mark.parametrize("where", CODE)
def test_code_of_others_is_not_left_out(session: Session, sd15: Any, where: str) -> None:
    control = make_controlnet(SD15)

    def compare() -> torch.Tensor:
        return assert_as_stock(
            sd15, lambda c: applied(control, **prompts(), config=c and FALLBACK), control, steps=3
        )

    plain = compare()
    with CODE[where](control.control_model):
        assert relative_rms(compare(), plain) > 1e-3
        found = controlnet_report(session)
        reasons = {reason for block in found["blocks"] for reason in block["reasons"]}
        if "hint" not in where and "embedding" not in where:  # those are the host's own layers
            assert found["runs_as_stock"] or reasons
    with session.engine.counters.expect(blocks_eager=0):
        assert relative_rms(compare(), plain) <= BOUND


def test_copies_of_the_stand_in(session: Session, sd15: Any) -> None:
    """What deep-copies or looks into a conditioning."""
    both = applied(make_controlnet(SD15), **prompts())
    expected = sample(optimize_model(sd15, EAGER), **both, steps=3)
    ours = both["positive"][0][1]["control"]
    assert copy.copy(ours.control_model).dtype == torch.float32
    for side in both.values():
        side[0][1]["control"] = copy.deepcopy(ours)
    assert relative_rms(sample(sd15, **both, steps=3), expected) <= BOUND
