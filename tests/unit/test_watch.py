"""What a run watches its weights for: tensors that move, and memory that is given up."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from blade_tests.unit.samples import CPU
from torch import nn


@pytest.fixture
def module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3, bias=False))


@pytest.fixture
def watch(weights: Any, module: nn.Sequential) -> Any:
    watch = weights.Watch()
    watch.start(weights.parameter_slots(module))
    return watch


def test_slots_are_where_a_layer_holds_its_tensors(weights: Any, module: nn.Sequential) -> None:
    slots = weights.parameter_slots(module)
    expected = [module[0]._parameters, module[0]._parameters, module[1]._parameters]
    assert [name for _, name in slots] == ["weight", "bias", "weight"]
    assert all(held is parameters for (held, _), parameters in zip(slots, expected, strict=True))


def test_nothing_moved(watch: Any, module: nn.Sequential) -> None:
    assert not watch.moved()
    assert watch.addresses == [p.data_ptr() for p in module.parameters()]


def test_a_change_in_place_is_none(watch: Any, module: nn.Sequential) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
            parameter.data.add_(1)
    assert not watch.moved()


@pytest.mark.parametrize("index", [0, 1])
def test_a_replaced_parameter(index: int, watch: Any, module: nn.Sequential) -> None:
    layer: Any = module[index]
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert watch.moved()


def test_a_replaced_parameter_over_the_same_memory(watch: Any, module: nn.Sequential) -> None:
    """The old one may be freed, and its memory be another's."""
    layer: Any = module[0]
    layer.weight = nn.Parameter(layer.weight.data)
    assert watch.moved()


@pytest.mark.parametrize("index", [0, 1])
def test_moved_data(index: int, watch: Any, module: nn.Sequential) -> None:
    layer: Any = module[index]
    layer.weight.data = layer.weight.data.clone()
    assert watch.moved()


def test_what_comes_back_has_not_moved(watch: Any, module: nn.Sequential) -> None:
    """Hooks of the host swap a weight and put it back between two calls."""
    layer: Any = module[0]
    data = layer.weight.data
    layer.weight.data = data.clone()
    assert watch.moved()
    layer.weight.data = data
    assert not watch.moved()


def test_a_parameter_that_is_gone(watch: Any, module: nn.Sequential) -> None:
    layer: Any = module[0]
    layer.bias = None
    assert watch.moved()


def test_a_parameter_that_is_deleted(watch: Any, module: nn.Sequential) -> None:
    """As weight norm and quantizing packs do it."""
    del module[0].bias
    assert watch.moved()


def test_other_strides_within_the_memory_are_no_move(
    weights: Any, watch: Any, module: nn.Sequential
) -> None:
    layout = weights.ChannelsLast()
    layout.apply(module.parameters(), CPU)
    assert not watch.moved()
    layout.restore()
    assert not watch.moved()


def test_after_stop_nothing_is_watched(watch: Any, module: nn.Sequential) -> None:
    layer: Any = module[0]
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    watch.stop()
    assert not watch.moved()
    assert watch.addresses == []


def test_a_watched_tensor_stays_alive_until_stop(weights: Any) -> None:
    """Or another could come to lie at its address, and be taken for it."""
    layer = nn.Linear(2, 2)
    watch = weights.Watch()
    watch.start(weights.parameter_slots([layer]))
    old = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.zeros(2, 2))
    assert old() is not None
    watch.stop()
    assert old() is None


def test_it_can_start_anew(weights: Any, watch: Any, module: nn.Sequential) -> None:
    layer: Any = module[0]
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    watch.start(weights.parameter_slots(module))
    assert not watch.moved()
    layer.weight.data = layer.weight.data.clone()
    assert watch.moved()


@pytest.fixture
def freed(weights: Any) -> Any:
    """Watch one tensor; the list gets an entry when its memory is given up."""
    calls: list[str] = []
    guards = []

    def watch(tensor: torch.Tensor) -> list[str]:
        guards.append(weights.when_freed(tensor, lambda: calls.append("freed")))
        return calls

    return watch


def test_data_that_is_replaced_is_given_up(freed: Any) -> None:
    layer = nn.Linear(2, 2)
    calls = freed(layer.weight)
    assert calls == []
    layer.weight.data = layer.weight.data.clone()
    assert calls == ["freed"]
    layer.weight.data = layer.weight.data.clone()
    assert calls == ["freed"]


def test_a_weight_that_is_gone_is_given_up(freed: Any) -> None:
    layer = nn.Linear(2, 2)
    calls = freed(layer.weight)
    del layer
    assert calls == ["freed"]


def test_memory_that_anyone_holds_is_not_given_up(weights: Any, freed: Any) -> None:
    weight = nn.Parameter(torch.randn(8, 4, 3, 3), requires_grad=False)
    calls = freed(weight)
    layout = weights.ChannelsLast()
    layout.apply([weight], CPU)
    weight.data.mul_(2)
    layout.restore()
    kept = weight.data[0]
    weight.data = torch.zeros(8, 4, 3, 3)
    assert calls == []
    del kept
    assert calls == ["freed"]


def test_who_lets_go_of_the_guard_is_not_called(weights: Any) -> None:
    calls: list[str] = []
    layer = nn.Linear(2, 2)
    guard = weights.when_freed(layer.weight, lambda: calls.append("freed"))
    assert guard is not None
    del guard, layer
    assert calls == []
