"""Weights that change their strides for a run and get them back: values and addresses stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blade_tests.unit.samples import CPU
from torch import nn


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
