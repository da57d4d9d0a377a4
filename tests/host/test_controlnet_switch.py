"""What switching ControlNets costs, what a run leaves behind, and how the weights may lie."""

import copy
import gc
import weakref
from typing import Any

import comfy.model_management
import pytest
import torch
from blade_tests.host.control_nets import (
    BOUND,
    EAGER,
    HOST_NODES,
    applied,
    assert_as_stock,
    changes,
    image,
    make_controlnet,
    prompts,
    state_of,
)
from blade_tests.host.tiny import SD15, SDXL, conditioning, make_model, relative_rms, sample
from comfy.patcher_extension import WrappersMP

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session, optimize_model

captured = pytest.mark.parametrize("session", ["captured"], indirect=True)


def inside(model: Any, function: Any, at: int = 2) -> Any:
    """A clone that calls `function` in mid-run, within its call number `at`."""
    clone, calls = model.clone(), iter(range(1000))

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) == at:
            function()
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", wrapper)
    return clone


# --- what is compiled, captured and taken up ------------------------------------------------------


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_blocks_use_the_graphs_of_the_unet(session: Session, config: dict[str, Any]) -> None:
    model, control = make_model(config), make_controlnet(config)
    sample(optimize_model(model, EAGER))
    # Its zero convolutions are all that is new: over 32 channels in two sizes, over 64 in one.
    with session.engine.counters.expect(graphs_compiled=3, blocks_eager=0):
        sample(model, **applied(control, **prompts()))


def test_switching_compiles_nothing(session: Session, sd15: Any) -> None:
    optimized, counters = optimize_model(sd15, EAGER), session.engine.counters
    one, other = make_controlnet(SD15), make_controlnet(SD15, seed=1)
    sample(optimized, steps=4)
    sample(optimized, **applied(one, **prompts()), steps=4)
    with counters.expect(graphs_compiled=0, hint_embeddings=1, blocks_eager=0):
        actual = sample(optimized, **applied(other, **prompts()), steps=4)
    expected = sample(sd15, **applied(other, **prompts(), config=None), steps=4)
    assert relative_rms(actual, expected) <= BOUND
    seen = [expected]
    for node in (
        {"hint": image(7)},
        {"hint": image(7, (64, 200))},
        {"strength": 0.3},
        {"start": 0.3},
        {"end": 0.7},
    ):
        seen.append(sample(sd15, **applied(other, **prompts(), config=None, **node), steps=4))
        with counters.expect(graphs_compiled=0, captures=0, captures_dropped=0, hint_embeddings=1):
            actual = sample(optimized, **applied(other, **prompts(), **node), steps=4)
        assert relative_rms(actual, seen[-1]) <= BOUND
    assert all(relative_rms(a, b) > 1e-3 for a, b in zip(seen[1:], seen, strict=False))


@captured
@pytest.mark.parametrize("optimized", [False, True])
def test_calls_are_replayed(session: Session, sd15: Any, optimized: bool) -> None:
    model = optimize_model(sd15, EAGER) if optimized else sd15
    control = make_controlnet(SD15)
    sample(model, steps=4)
    with session.engine.counters.expect(control_runs=1, control_replays=2):
        sample(model, **applied(control, **prompts()), steps=4)
    with session.engine.counters.expect(control_runs=1, control_replays=4, captures=0):
        sample(model, **applied(control, **prompts(), hint=image(3)), steps=4, seed=3)
    with session.engine.counters.expect(control_runs=1, control_replays=2, captures=0):
        sample(model, **applied(control, **prompts(), start=0.5), steps=4)  # two calls of four


def test_an_image_is_taken_up_once_a_run(session: Session, sd15: Any) -> None:
    control, other = make_controlnet(SD15), make_controlnet(SD15, seed=1)
    apart = prompts(77, 385)  # two calls a step
    node = HOST_NODES.ConditioningSetArea()
    area = prompts()
    area["positive"] = area["positive"] + node.append(conditioning(seed=5), 64, 64, 0, 0, 1.0)[0]
    pictures = {"hint": image(batch=2)}
    cases = [  # prompts, options, how often
        (applied(control, **prompts()), {}, 1),
        (applied(control, **apart), {}, 1),
        (applied(control, **prompts(), **pictures), {"batch": 2}, 1),
        (applied(control, **apart, **pictures), {"batch": 2}, 1),
        (applied(other, **applied(control, **prompts())), {}, 2),
        (applied(control, **applied(control, **prompts()), hint=image(1)), {}, 2),
        (applied(control, **area), {}, 2),  # in two sizes
    ]
    for number, (both, options, count) in enumerate(cases):
        before = session.engine.counters["hint_embeddings"]
        sample(sd15, **both, steps=4, **options)
        assert session.engine.counters["hint_embeddings"] - before == count, number


# --- what a run leaves behind ---------------------------------------------------------------------


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("optimized", [False, True])
def test_nothing_is_held_after_a_run(
    session: Session, sd15: Any, cancel: bool, optimized: bool
) -> None:
    control = make_controlnet(SD15)
    before, model = state_of(control), optimize_model(sd15, EAGER) if optimized else sd15
    both = applied(control, **prompts())
    expected = sample(model, **both, steps=4)
    features: list[weakref.ref[torch.Tensor]] = []
    last = control.control_model.input_hint_block[-1]
    watched = last.register_forward_hook(lambda *a: features.append(weakref.ref(a[-1])))

    def look() -> None:
        assert features[0]() is not None
        assert changes(before, state_of(control)) != []  # channels-last
        if cancel:
            comfy.model_management.interrupt_current_processing()

    watching = inside(model, look)
    if cancel:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(watching, **both, steps=4)
    else:
        sample(watching, **both, steps=4)
    assert len(features) == 1 and features[0]() is None
    watched.remove()
    assert changes(before, state_of(control)) == []
    for patcher in (sd15, model, watching):
        assert not any("controlnet" in key for c in patcher.callbacks.values() for key in c)
    assert relative_rms(sample(model, **both, steps=4), expected) <= BOUND
    assert_as_stock(sd15, lambda c: applied(control, **prompts(), config=c), control, steps=3)


@captured
@pytest.mark.parametrize("freed", ["deleted", "moved"])
@pytest.mark.parametrize("optimized", [False, True])
def test_captures_go_with_the_controlnet(
    session: Session, sd15: Any, freed: str, optimized: bool
) -> None:
    model, control = optimize_model(sd15, EAGER) if optimized else sd15, make_controlnet(SD15)
    sample(model, steps=3)
    before = session.captures.used()
    sample(model, **applied(control, **prompts()), steps=3)
    assert session.captures.used() > before
    if freed == "deleted":
        del control
        gc.collect()
    else:  # as the host does when it takes it off the GPU, without telling anyone
        for parameter in control.control_model.parameters():
            parameter.data = parameter.data.clone()
    assert session.captures.used() <= before


def test_weights_go_with_the_last_reference(session: Session, sd15: Any) -> None:
    """As stock's do: at once, not when Python looks for cycles."""
    control = make_controlnet(SD15)
    weight = weakref.ref(control.control_model.input_blocks[1][0].in_layers[2].weight)
    sample(sd15, **applied(control, **prompts()), steps=3)
    comfy.model_management.unload_all_models()
    gc.collect()
    gc.disable()
    try:
        del control
        assert weight() is None
    finally:
        gc.enable()


def test_two_dials_on_one_controlnet(session: Session, sd15: Any) -> None:
    control, other = make_controlnet(SD15), OptimizeConfig(backend="eager")

    def apply(config: OptimizeConfig | None) -> Any:
        first = applied(control, **prompts(), config=config)
        return applied(control, **first, config=config and other, hint=image(1))

    assert_as_stock(sd15, apply, control, steps=4)
    one = assert_as_stock(
        sd15, lambda c: applied(control, **prompts(), config=c and other), steps=4
    )
    assert relative_rms(assert_as_stock(sd15, apply, control, steps=4), one) > 1e-3


@pytest.mark.parametrize("optimized", [False, True])
def test_a_run_of_another_model_within_a_run(session: Session, sd15: Any, optimized: bool) -> None:
    """Some samplers sample; the inner run ends while the outer one goes on."""
    control, inner = make_controlnet(SD15), make_model(SD15, seed=1)
    images = []
    for config in (None, EAGER):
        outer = optimize_model(sd15, EAGER) if config and optimized else sd15

        def sample_inner(config: OptimizeConfig | None = config) -> None:
            both = applied(control, **prompts(), config=config, hint=image(1))
            images.append(sample(inner, **both, steps=4))

        both = applied(control, **prompts(), config=config)
        images.append(sample(inside(outer, sample_inner, at=4), **both, steps=6))
    assert relative_rms(images[2], images[0]) <= BOUND
    assert relative_rms(images[3], images[1]) <= BOUND


@pytest.mark.parametrize("optimized", [False, True])
def test_another_strength_in_mid_run(session: Session, sd15: Any, optimized: bool) -> None:
    """Packs schedule it so: by the attribute that the host reads in each step."""
    control, images = make_controlnet(SD15), []
    for config in (None, EAGER, EAGER):
        both = applied(control, **prompts(), config=config)
        ours = both["positive"][0][1]["control"]
        model = optimize_model(sd15, EAGER) if config and optimized else sd15
        changing = inside(model, lambda c=ours: setattr(c, "strength", 0.2), at=3)
        images.append(sample(changing, **both, steps=6))
    assert relative_rms(images[1], images[0]) <= BOUND
    assert relative_rms(images[2], images[0]) <= BOUND
    whole = sample(sd15, **applied(control, **prompts(), config=None), steps=6)
    assert relative_rms(images[0], whole) > 1e-3


def test_a_block_that_is_replaced_over_the_same_weights(session: Session, sd15: Any) -> None:
    control = make_controlnet(SD15)
    model = control.control_model
    assert_as_stock(sd15, lambda c: applied(control, **prompts(), config=c), control, steps=4)
    model.middle_block = copy.copy(model.middle_block)
    assert_as_stock(sd15, lambda c: applied(control, **prompts(), config=c), control, steps=4)


# --- how the weights may lie ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(session: Session, dtype: torch.dtype) -> None:
    """No further from fp32 than stock is."""
    reference, model = make_model(SD15), make_model(SD15, dtype=dtype)
    whole, half = make_controlnet(SD15), make_controlnet(SD15, dtype=dtype)
    exact = sample(reference, **applied(whole, **prompts(), config=None), steps=4)
    expected = sample(model, **applied(half, **prompts(), config=None), steps=4)
    for each in (model, optimize_model(model, EAGER)):
        actual = sample(each, **applied(half, **prompts()), steps=4)
        assert relative_rms(actual, exact) <= 1.2 * relative_rms(expected, exact)
    assert torch.equal(sample(model, **applied(half, **prompts(), config=None), steps=4), expected)


def test_weights_that_the_host_casts_and_patches_on_the_fly(session: Session, sd15: Any) -> None:
    """As of a ControlNet of which a part is offloaded."""
    control = make_controlnet(SD15)
    plain = sample(sd15, **applied(control, **prompts(), config=None), steps=4)
    for name in ("middle_block.0.in_layers.2", "zero_convs.1.0", "input_hint_block.0"):
        control.control_model_wrapped.add_weight_wrapper(f"{name}.weight", lambda w: w * 1.5)
    layer = control.control_model.get_submodule("input_blocks.1.1.proj_in")
    layer.comfy_cast_weights = True
    layer.to(torch.float16)
    expected = assert_as_stock(
        sd15, lambda c: applied(control, **prompts(), config=c), control, steps=4
    )
    assert relative_rms(expected, plain) > 1e-3
    assert session.engine.counters["blocks_eager"] == 0
