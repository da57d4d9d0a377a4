"""The dials: defaults, what is refused and how, and the byte budgets of cache and captures."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from blade.blade_core.backends import BACKENDS as IMPLEMENTED
from blade.blade_core.backends.inductor import InductorBackend
from blade.blade_core.config import (
    BACKENDS,
    FROZEN_CHANGE,
    KERNELS,
    ON_FAILURE,
    OptimizeConfig,
    capture_bytes,
    graph_cache_bytes,
)
from blade.blade_core.engine import Engine
from blade.blade_core.errors import InvalidChoice


def test_defaults() -> None:
    config = OptimizeConfig()
    assert dataclasses.astuple(config) == (
        "auto",
        False,
        "fallback",
        "rebuild",
        True,
        KERNELS,
        "first",
    )
    assert not config.strict
    assert OptimizeConfig(on_failure="error").strict


def test_every_choice_is_valid() -> None:
    flags = (True, False)
    choices = itertools.product(BACKENDS, flags, ON_FAILURE, FROZEN_CHANGE, flags)
    configs = [OptimizeConfig(*choice) for choice in choices]
    assert len(set(configs)) == len(configs)  # as keys, all different


def test_every_backend_can_be_chosen() -> None:
    assert set(BACKENDS) == {"auto", *IMPLEMENTED}
    assert all(backend.name == name for name, backend in IMPLEMENTED.items())


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("backend", "tensorrt", "auto, torch_blade, inductor, eager"),
        ("backend", "Inductor", "auto, torch_blade, inductor, eager"),
        ("on_failure", "", "fallback, error"),
        ("on_failure", None, "fallback, error"),
    ],
)
def test_an_unknown_value_is_refused_with_the_valid_ones(name: str, value: str, valid: str) -> None:
    with pytest.raises(InvalidChoice) as caught:
        OptimizeConfig(**{name: value})  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"Blade does not know {name}={value!r}; expected one of {valid}. "
        "Choose one of these in the node, or in the workflow that you post."
    )


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimizeConfig().backend = "eager"  # type: ignore[misc]


@pytest.mark.parametrize(("text", "mib"), [(None, 4096), ("1", 1), ("512", 512), ("0099", 99)])
def test_cache_budget(text: str | None, mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLADE_GRAPH_CACHE_MIB", raising=False)
    if text is not None:
        monkeypatch.setenv("BLADE_GRAPH_CACHE_MIB", text)
    assert graph_cache_bytes() == mib * 2**20
    assert Engine().cache.budget == mib * 2**20


@pytest.mark.parametrize("text", ["0", "-1", "", "1.5", "4 GiB", "1e3"])
def test_an_impossible_budget_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLADE_GRAPH_CACHE_MIB", text)
    with pytest.raises(InvalidChoice) as caught:
        graph_cache_bytes()
    assert str(caught.value) == (
        f"BLADE_GRAPH_CACHE_MIB is {text!r}; expected a whole number of MiB above 0. "
        "Unset it, or set it for example to 4096."
    )


@pytest.mark.parametrize(
    ("text", "mib"), [(None, None), ("0", 0), ("00", 0), ("1", 1), ("0512", 512)]
)
def test_capture_budget(text: str | None, mib: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLADE_CAPTURE_MIB", raising=False)
    monkeypatch.setenv("BLADE_GRAPH_CACHE_MIB", "7")  # another dial
    if text is not None:
        monkeypatch.setenv("BLADE_CAPTURE_MIB", text)
    assert capture_bytes() == (None if mib is None else mib * 2**20)


@pytest.mark.parametrize("text", ["-1", "", " ", "1.5", "4 GiB", "1e3", "off"])
def test_an_impossible_capture_budget_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLADE_CAPTURE_MIB", text)
    with pytest.raises(InvalidChoice) as caught:
        capture_bytes()
    assert str(caught.value) == (
        f"BLADE_CAPTURE_MIB is {text!r}; expected a whole number of MiB. "
        "Unset it, or set it for example to 4096."
    )


@pytest.mark.parametrize(
    ("text", "kernels"),
    [
        (None, KERNELS),
        ("none", ()),
        (" none ", ()),
        ("geglu", ("geglu",)),
        ("geglu, group_norm,geglu", ("group_norm", "geglu")),
        (",".join(KERNELS), KERNELS),
    ],
)
def test_kernels_that_may_be_used(
    text: str | None, kernels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BLADE_KERNELS", raising=False)
    if text is not None:
        monkeypatch.setenv("BLADE_KERNELS", text)
    assert OptimizeConfig().kernels == kernels
    assert OptimizeConfig(kernels=("layer_norm",)).kernels == ("layer_norm",)
    (backend,) = Engine().backends(OptimizeConfig(backend="inductor"), torch.device("cpu"))
    assert isinstance(backend, InductorBackend)
    assert backend.kernels == kernels


@pytest.mark.parametrize("text", ["", " ", "all", "0", "none,geglu", "geglu,", "group-norm"])
def test_unknown_kernels_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLADE_KERNELS", text)
    with pytest.raises(InvalidChoice) as caught:
        OptimizeConfig()
    assert str(caught.value) == (
        f"BLADE_KERNELS is {text!r}; expected none, or with commas between them some of "
        "joint_linear, group_norm, short_attention, flash_attention, geglu, layer_norm, late_bias. "
        "Unset it for all of them."
    )
