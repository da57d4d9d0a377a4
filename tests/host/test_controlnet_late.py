"""Residuals that are computed late are to others what stock's are: dicts of lists that empty."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from blade_tests.host.control_nets import (
    BOUND,
    EAGER,
    applied,
    assert_as_stock,
    make_controlnet,
    prompts,
)
from blade_tests.host.tiny import SD15, relative_rms, sample

from blade.blade_core.host.model import Session, optimize_model


def wrapped(model: Any, function: Callable[[Callable[[], Any], dict[str, Any]], Any]) -> Any:
    """A clone whose UNet is called by `function`, as packs do it; that gets the call and its
    arguments."""
    clone = model.clone()

    def wrapper(apply: Any, given: dict[str, Any]) -> Any:
        return function(lambda: apply(given["input"], given["timestep"], **given["c"]), given["c"])

    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def _halve(control: Any) -> Any:
    for tensors in control.values():
        for index, tensor in enumerate(tensors):
            tensors[index] = tensor * 0.5
    return control


LOOKS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "its own copy": lambda control: control.copy(),
    "dict": dict,
    "lists": lambda control: {name: list(control[name]) for name in control},
    "merged": lambda control: {**control, "input": []},
    "or": lambda control: control | {"input": []},
    "get": lambda control: {"middle": control.get("middle"), "input": control.get("none", [])},
    "changed": _halve,
    "middle only": lambda control: {"middle": control["middle"]},
}


@pytest.mark.parametrize("name", LOOKS)
def test_who_looks_sees_what_stock_gives(session: Session, sd15: Any, name: str) -> None:
    control, plain = make_controlnet(SD15), prompts()

    def look(call: Callable[[], Any], given: dict[str, Any]) -> Any:
        given["control"] = LOOKS[name](given["control"])
        return call()

    model = wrapped(sd15, look)
    expected = assert_as_stock(
        model, lambda c: applied(control, **plain, config=c), control, steps=4
    )
    assert relative_rms(expected, sample(sd15, **plain, steps=4)) > 1e-4


def test_a_second_call_with_the_same_residuals_has_none(session: Session, sd15: Any) -> None:
    """The host takes them out as it adds them; who calls twice has to copy them before."""
    control, plain = make_controlnet(SD15), prompts()
    model = wrapped(sd15, lambda call, _: (call() + call()) / 2)
    expected = sample(model, **applied(control, **plain, config=None), steps=4)
    for each in (model, optimize_model(model, EAGER)):
        assert relative_rms(sample(each, **applied(control, **plain), steps=4), expected) <= BOUND
    once = sample(sd15, **applied(control, **plain, config=None), steps=4)
    assert relative_rms(expected, once) > 1e-3


def test_a_step_that_never_calls_the_unet(session: Session, sd15: Any) -> None:
    """As of packs that take a result from the step before."""
    control, plain = make_controlnet(SD15), prompts()

    def cached() -> Any:
        kept: list[Any] = []

        def every_second(call: Callable[[], Any], _: Any) -> Any:
            if len(kept) % 2 == 0:
                kept.append(call())
            else:
                kept.append(kept[-1])
            return kept[-1].clone()

        return wrapped(sd15, every_second)

    expected = sample(cached(), **applied(control, **plain, config=None), steps=6)
    for _ in range(2):
        actual = sample(optimize_model(cached(), EAGER), **applied(control, **plain), steps=6)
        assert relative_rms(actual, expected) <= BOUND


def test_models_that_move_leave_nothing_behind(session: Session, sd15: Any) -> None:
    control = make_controlnet(SD15)
    model, given = optimize_model(sd15, EAGER), applied(control, **prompts())
    sizes = set()
    for moved in (control.control_model, sd15.model, control.control_model, sd15.model):
        sample(model, **given, steps=4)
        state = session.controlnet(control.control_model, EAGER)
        sizes.add((len(state._forms), len(state._captures._elsewhere)))
        for parameter in moved.parameters():
            parameter.data = parameter.data.clone()
    assert len(sizes) == 1
