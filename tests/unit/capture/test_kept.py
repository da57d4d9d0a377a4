"""What a capture keeps alive, and buffers that captures of a pool share."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence

import torch
from blade_tests.unit.capture.tape import Counted, Graphs, Tape, capture, double, ones, work_of

from blade.blade_core.capture import CaptureBudget, CapturePool, Replayer
from blade.blade_core.counters import Counters

# --- what is kept -------------------------------------------------------------------------------


def test_what_the_kernels_use_lives_as_long_as_the_capture(
    replayer: Replayer, pool: CapturePool
) -> None:
    made: list[weakref.ref[Graphs]] = []

    def keep() -> Graphs:
        graphs = Graphs()
        made.append(weakref.ref(graphs))
        return graphs

    replayer("a", work_of(keep=keep), ones())
    assert made == []
    replayer("a", work_of(keep=keep), ones())
    replayer("a", work_of(keep=keep), ones())
    assert len(made) == 1
    assert made[0]() is not None
    pool.clear()
    assert made[0]() is None


def test_keep_is_asked_after_the_recorded_call(replayer: Replayer) -> None:
    """Only then is it known what that call used."""
    function = Counted(double)
    asked: list[int] = []
    work = work_of(function, keep=lambda: asked.append(function.calls))
    for _ in range(3):
        replayer("a", work, ones())
    assert asked == [2]


def test_one_capture_is_discarded(pool: CapturePool, tape: type[Tape], counters: Counters) -> None:
    """The others go on; with the last one the memory goes back."""
    capture(pool, "a")
    capture(pool, "b")
    with counters.expect(captures_dropped=1):
        pool.discard("a")
        pool.discard("never there")
    assert pool.get("a") is None and pool.get("b") is not None and tape.releases == 0
    with counters.expect(captures_dropped=1):
        pool.discard("b")
    assert len(pool) == pool.nbytes == 0 and tape.releases == 1


def test_a_buffer_is_freed_with_the_last_capture_that_uses_it(pool: CapturePool) -> None:
    buffers: list[weakref.ref[torch.Tensor]] = []

    def function(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        buffers.append(weakref.ref(inputs[0]))
        return inputs[0] * 2

    capture(pool, "a", work_of(function))
    capture(pool, "b", work_of(function))
    assert buffers[0]() is not None and buffers[0]() is buffers[1]()
    pool.clear()
    assert buffers[0]() is None


# --- buffers ------------------------------------------------------------------------------------


class Addresses:
    """Work that says which buffers it was recorded over."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.work = work_of(self._function)

    def _function(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        self.seen = [x.data_ptr() for x in inputs]
        return inputs[0] * 1


def buffers_of(pool: CapturePool, key: Hashable, inputs: Sequence[torch.Tensor]) -> list[int]:
    addresses = Addresses()
    pool.record(key, addresses.work, inputs, torch.empty_like(inputs[0], device="meta"))
    return addresses.seen


def test_captures_of_one_pool_share_buffers(pool: CapturePool) -> None:
    x, y = torch.randn(2, 3), torch.randn(5)
    first = buffers_of(pool, "a", [x, y])
    assert buffers_of(pool, "b", [y, x]) == first[::-1]


def test_buffers_are_distinct_within_a_call(pool: CapturePool) -> None:
    x = torch.randn(2, 3)
    first = buffers_of(pool, "a", [x, x, x])
    assert len({*first, x.data_ptr()}) == 4
    assert buffers_of(pool, "b", [x, x]) == first[:2]


def test_another_form_has_another_buffer(pool: CapturePool, tape: type[Tape]) -> None:
    tape.sizes = 0
    x = torch.randn(2, 4, 3, 3)
    forms = [x, x.half(), x.contiguous(memory_format=torch.channels_last), x[:1], x.flatten()]
    buffers = {address for i, form in enumerate(forms) for address in buffers_of(pool, i, [form])}
    assert len(buffers) == len(forms) == len(pool)


def test_pools_share_nothing(budget: CaptureBudget) -> None:
    """One may be cleared, or run, while the other stays."""
    x = torch.randn(2, 3)
    one, other = CapturePool(budget), CapturePool(budget)
    assert buffers_of(one, "a", [x]) != buffers_of(other, "a", [x])


def test_captures_over_shared_buffers_do_not_mix(replayer: Replayer) -> None:
    def subtract(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return inputs[0] - inputs[1]

    def reverse(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return inputs[1] - inputs[0]

    for _ in range(4):
        a, b = torch.randn(2, 3), torch.randn(2, 3)
        difference = replayer("a", work_of(subtract), [a, b])
        again = replayer("b", work_of(reverse), [difference, b])
        assert torch.equal(difference, a - b)
        assert torch.equal(again, b - difference)
