"""Weights during a run, as far as it needs no host: strides given and given back, and a watch."""

from __future__ import annotations

import importlib.util
import sys
import weakref
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from blade_tests.unit.samples import CPU, ROOT
from torch import nn


@pytest.fixture(scope="module")
def weights() -> Any:
    """A copy of host/weights.py over an empty `comfy.ops`; tests/host has the real one."""
    name = "blade.blade_core.host.weights"
    spec = importlib.util.spec_from_file_location(name, ROOT / "blade_core/host/weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    comfy: Any = ModuleType("comfy")
    comfy.ops = ModuleType("comfy.ops")
    there = {"comfy": comfy, "comfy.ops": comfy.ops, name: module}  # its dataclasses look it up
    with mock.patch.dict(sys.modules, there):
        spec.loader.exec_module(module)
    return module


# --- channels last ------------------------------------------------------------------------------


class State:
    """A tensor as its owner sees it: the values, where they are, and how they lie."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._before = self._now()
        self._values = tensor.detach().clone()
        self._bytes = self._memory()

    def _now(self) -> tuple[Any, ...]:
        t = self._tensor
        return t.data_ptr(), t.shape, t.dtype, t.storage_offset(), t.requires_grad, t.is_leaf

    def _memory(self) -> torch.Tensor:
        return torch.empty(0, dtype=self._tensor.dtype).set_(self._tensor.untyped_storage()).clone()

    def same(self) -> bool:
        """As before, but for the strides."""
        return self._now() == self._before and torch.equal(self._tensor, self._values)

    def same_bytes(self) -> bool:
        return torch.equal(self._memory(), self._bytes)


def conv(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape).to(dtype), requires_grad=grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trainable"])
def test_values_and_addresses_stay_and_strides_come_back(
    weights: Any, dtype: torch.dtype, grad: bool
) -> None:
    tensors = [conv(8, 4, 3, 3, dtype=dtype, grad=grad), torch.randn(4, 8, 5, 3).to(dtype)]
    stride = [t.stride() for t in tensors]
    states = [State(t) for t in tensors]
    layout = weights.ChannelsLast()
    layout.apply(tensors, CPU)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    assert not any(t.is_contiguous() for t in tensors)
    assert all(state.same() for state in states)
    layout.restore()
    assert [t.stride() for t in tensors] == stride
    assert all(state.same() and state.same_bytes() for state in states)


@pytest.mark.parametrize("recorded_in", [True, False], ids=["inference", "normal"])
def test_any_mode(weights: Any, recorded_in: bool) -> None:
    with torch.inference_mode(recorded_in):
        weight = conv(8, 4, 3, 3)
        state, stride = State(weight), weight.stride()
        layout = weights.ChannelsLast()
        layout.apply([weight], CPU)
        assert weight.is_contiguous(memory_format=torch.channels_last) and state.same()
        layout.restore()
    assert weight.stride() == stride and state.same()


def test_normal_weights_are_changed_in_inference_mode(weights: Any) -> None:
    """As a server does it: loaded outside of it or inside, sampled inside."""
    weight = conv(8, 4, 3, 3)
    state, stride = State(weight), weight.stride()
    layout = weights.ChannelsLast()
    with torch.inference_mode():
        layout.apply([weight], CPU)
        assert weight.is_contiguous(memory_format=torch.channels_last) and state.same()
    layout.restore()
    assert weight.stride() == stride and state.same()
    assert not weight.is_inference()


def test_a_convolution_computes_the_same_over_it(weights: Any) -> None:
    module = nn.Conv2d(4, 8, 3, padding=1).double()
    x = torch.randn(2, 4, 6, 6).double()
    expected = module(x)
    layout = weights.ChannelsLast()
    layout.apply(module.parameters(), CPU)
    torch.testing.assert_close(module(x), expected)
    layout.restore()
    assert torch.equal(module(x), expected)


def test_one_part_of_a_larger_memory(weights: Any) -> None:
    """Weights of one file may lie in one storage: what is beside them is not touched."""
    memory = torch.randn(1000)
    weight = nn.Parameter(memory[100:388].view(8, 4, 3, 3), requires_grad=False)
    state, around = State(weight), State(memory)
    left, right = memory[:100].clone(), memory[388:].clone()
    layout = weights.ChannelsLast()
    layout.apply([weight], CPU)
    assert state.same()
    assert torch.equal(memory[:100], left) and torch.equal(memory[388:], right)
    layout.restore()
    assert state.same() and around.same_bytes()


def test_a_weight_used_twice_is_rearranged_once(weights: Any) -> None:
    weight = conv(8, 4, 3, 3)
    state, stride = State(weight), weight.stride()
    layout = weights.ChannelsLast()
    layout.apply([weight, weight], CPU)
    layout.apply([weight], CPU)
    assert state.same()
    layout.restore()
    assert weight.stride() == stride and state.same()
    layout.restore()
    assert weight.stride() == stride and state.same()


class Quantized(torch.Tensor):
    """A tensor whose memory is not what it says."""


def untouched() -> dict[str, torch.Tensor]:
    return {
        "1x1": conv(8, 4, 1, 1),
        "one channel": conv(8, 1, 3, 3),
        "linear": conv(8, 4),
        "3-D": conv(8, 4, 3),
        "5-D": conv(8, 4, 3, 3, 3),
        "channels last": nn.Parameter(conv(8, 4, 3, 3).to(memory_format=torch.channels_last)),
        "neither": torch.randn(8, 4, 3, 6)[..., ::2],
        "subclass": torch.randn(8, 4, 3, 3).as_subclass(Quantized),
        "elsewhere": torch.empty(8, 4, 3, 3, device="meta"),
    }


@pytest.mark.parametrize("name", untouched())
def test_what_stays_as_it_is(weights: Any, name: str) -> None:
    tensor = untouched()[name]
    stride, version = tensor.stride(), tensor._version
    layout = weights.ChannelsLast()
    layout.apply([tensor], CPU)
    assert (tensor.stride(), tensor._version) == (stride, version)
    layout.restore()
    assert (tensor.stride(), tensor._version) == (stride, version)


def test_data_that_the_host_replaced_meanwhile_is_its_own(weights: Any) -> None:
    """The model patcher puts a weight's backup back so."""
    weight, other = conv(8, 4, 3, 3), conv(8, 4, 3, 3)
    layout = weights.ChannelsLast()
    layout.apply([weight, other], CPU)
    backup = torch.randn(8, 4, 3, 3)
    state = State(backup)
    weight.data = backup
    layout.restore()
    assert torch.equal(weight, backup) and state.same_bytes()
    assert weight.stride() == backup.stride()
    assert other.is_contiguous()


def test_values_that_the_host_wrote_meanwhile_stay(weights: Any) -> None:
    """A hook's LoRA, in the middle of a run."""
    weight = conv(8, 4, 3, 3)
    layout = weights.ChannelsLast()
    layout.apply([weight], CPU)
    values = torch.randn(8, 4, 3, 3)
    weight.data.copy_(values)
    layout.restore()
    assert torch.equal(weight, values) and weight.is_contiguous()


def test_giving_back_goes_on_where_it_stopped(
    weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [conv(8, 4, 3, 3) for _ in range(3)]
    states = [State(t) for t in tensors]
    layout = weights.ChannelsLast()
    layout.apply(tensors, CPU)
    restride, calls = weights._restride, []

    def fail_once(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        restride(*args)

    monkeypatch.setattr(weights, "_restride", fail_once)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        layout.restore()
    layout.restore()
    assert all(t.is_contiguous() for t in tensors)
    assert all(state.same_bytes() for state in states)


def test_a_part_that_the_host_put_in_its_place_is_left_alone(weights: Any) -> None:
    """It has other strides than the weight had: those are no reason to rearrange it."""
    weight = conv(8, 4, 3, 3)
    layout = weights.ChannelsLast()
    layout.apply([weight], CPU)
    memory = torch.randn(8, 16, 3, 3)
    state = State(memory)
    weight.data = memory[:, :4]
    layout.restore()
    assert state.same_bytes()
    assert torch.equal(weight, memory[:, :4])


def test_two_parameters_over_one_memory_keep_their_values(weights: Any) -> None:
    weight = conv(8, 4, 3, 3)
    tied = nn.Parameter(weight.data, requires_grad=False)
    values = weight.detach().clone()
    layout = weights.ChannelsLast()
    layout.apply([weight, tied], CPU)
    try:
        assert torch.equal(weight, values) and torch.equal(tied, values)
    finally:
        layout.restore()
    assert torch.equal(weight, values) and torch.equal(tied, values)


# --- watch --------------------------------------------------------------------------------------


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


# --- when memory is given up --------------------------------------------------------------------


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
    weight = conv(8, 4, 3, 3)
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
