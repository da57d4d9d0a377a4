"""Captures: when work is recorded, what a replay sees, and the memory that all of them share."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blade_tests.host.recorder import TapeRecorder
from blade_tests.unit.samples import CPU

from blade.blade_core import log
from blade.blade_core.capture import CaptureBudget, CapturePool, Function, Replayer, Work
from blade.blade_core.counters import Counters
from blade.blade_core.errors import CaptureFailed

MIB = 2**20


class InterruptProcessingException(Exception):
    """A user's cancel, by the host's own name for it."""


class Tape(TapeRecorder):
    """A recorder of one test's own: the test says what it meets, and sees what was done."""

    usable_now = True
    waiting: tuple[str, ...] = ()
    error: BaseException | None = None
    replay_error: BaseException | None = None
    made: list[Tape]
    recordings: int
    releases: int
    at_release: Callable[[], None]

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.made.append(self)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        type(self).recordings += 1
        if self.error is not None:
            raise self.error
        replay = super().record(function)

        @torch.inference_mode()  # the tape writes what it kept, whatever mode that was made in
        def checked() -> None:
            if self.replay_error is not None:
                raise self.replay_error
            replay()

        return checked

    def release(self) -> None:
        type(self).releases += 1
        type(self).at_release()
        super().release()


@pytest.fixture
def tape() -> type[Tape]:
    class Own(Tape):
        made: list[Tape] = []  # noqa: RUF012
        recordings = releases = 0

        @staticmethod
        def at_release() -> None:
            pass

        @staticmethod
        def usable(device: torch.device) -> bool:
            return Own.usable_now

        @staticmethod
        def waits() -> AbstractContextManager[list[str]]:
            return collect()

    @contextmanager
    def collect() -> Iterator[list[str]]:
        found: list[str] = []
        yield found
        found.extend(Own.waiting)  # known at the end only, as with the real one

    return Own


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    log.forget_said()


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def budget(counters: Counters, tape: type[Tape]) -> CaptureBudget:
    """Three captures of what `tape` says that each takes."""
    return CaptureBudget(counters, tape, 3 * MIB)


@pytest.fixture
def pool(budget: CaptureBudget) -> CapturePool:
    return CapturePool(budget)


@pytest.fixture
def replayer(pool: CapturePool) -> Replayer:
    return Replayer(pool, strict=True)


class Counted:
    """A function that counts how often Python ran it."""

    def __init__(self, function: Function) -> None:
        self.calls = 0
        self._function = function

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return self._function(inputs)


def double(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return inputs[0] * 2


def nothing() -> None:
    return None


def work_of(
    function: Function = double,
    why_not: Callable[[], str | None] = nothing,
    keep: Callable[[], Any] = nothing,
) -> Work:
    return Work(function, why_not, keep)


def ones(value: float = 1.0) -> list[torch.Tensor]:
    return [torch.full((2, 3), value)]


def capture(pool: CapturePool, key: Hashable = "a", work: Work | None = None) -> None:
    """Put one capture into `pool`."""
    pool.record(key, work or work_of(), ones(), torch.empty(2, 3, device="meta"))


# --- plain, recorded, replayed ------------------------------------------------------------------


def test_the_first_call_is_plain_the_second_recorded_the_third_replayed(
    replayer: Replayer, counters: Counters, tape: type[Tape]
) -> None:
    function = Counted(double)
    seen = []
    for value in (1.0, 2.0, 3.0, 4.0):
        result = replayer("a", work_of(function), ones(value))
        assert torch.equal(result, torch.full((2, 3), 2 * value))
        seen.append((function.calls, tape.recordings, counters["captures"]))
    assert seen == [(1, 0, 0), (2, 1, 1), (2, 1, 1), (2, 1, 1)]
    assert replayer.reasons == set()


def test_replay_takes_what_is_there(replayer: Replayer) -> None:
    assert replayer.replay("a", ones()) is None
    replayer("a", work_of(), ones())
    assert replayer.replay("a", ones()) is None
    replayer("a", work_of(), ones())
    replayed = replayer.replay("a", ones(5.0))
    assert replayed is not None and torch.equal(replayed, torch.full((2, 3), 10.0))
    assert replayer.replay("b", ones()) is None


def test_results_belong_to_the_caller(replayer: Replayer) -> None:
    work = work_of(lambda inputs: inputs[0])  # its own input, so that even that must not be seen
    given = [torch.full((2, 3), float(i)) for i in range(5)]
    results = [replayer("a", work, [x]) for x in given]
    for i in (2, 3, 4):  # replayed
        assert torch.equal(results[i], torch.full((2, 3), float(i)))
        results[i].fill_(-1.0)
    assert torch.equal(given[4], torch.full((2, 3), 4.0))
    assert torch.equal(replayer("a", work, [given[2]]), given[2])


def test_each_key_has_its_own_capture(replayer: Replayer, counters: Counters) -> None:
    tripled = work_of(lambda inputs: inputs[0] * 3)
    for value in (1.0, 2.0, 4.0):
        assert replayer("a", work_of(), ones(value))[0, 0] == 2 * value
        assert replayer("b", tripled, ones(value))[0, 0] == 3 * value
    assert counters["captures"] == 2


def test_a_later_run_replays_at_once(pool: CapturePool) -> None:
    capture(pool)
    function = Counted(double)
    result = Replayer(pool, strict=True)("a", work_of(function), ones(7.0))
    assert (result[0, 0], function.calls) == (14.0, 0)


def test_what_was_dropped_within_a_run_is_recorded_again(
    replayer: Replayer, pool: CapturePool, counters: Counters
) -> None:
    function = Counted(double)
    for _ in range(3):
        replayer("a", work_of(function), ones())
    pool.clear()
    for value in (3.0, 4.0):
        assert replayer("a", work_of(function), ones(value))[0, 0] == 2 * value
    assert (function.calls, counters["captures"], counters["captures_dropped"]) == (3, 2, 1)


# --- what a replay sees -------------------------------------------------------------------------


def test_fresh_inputs_are_read_and_left_alone(replayer: Replayer) -> None:
    work = work_of(lambda inputs: (inputs[0] - inputs[1]).mul_(inputs[2]))
    for seed in range(4):
        torch.manual_seed(seed)
        inputs = [torch.randn(2, 3) for _ in range(3)]
        before = [x.clone() for x in inputs]
        result = replayer("a", work, inputs)
        torch.testing.assert_close(result, (before[0] - before[1]) * before[2])
        assert all(map(torch.equal, inputs, before))


def test_work_that_writes_its_inputs_does_not_reach_the_caller(replayer: Replayer) -> None:
    for turn in range(4):
        inputs = ones(float(turn))
        result = replayer("a", work_of(lambda i: i[0].add_(1)), inputs)
        assert result[0, 0] == turn + 1
        assert turn == 0 or inputs[0][0, 0] == turn  # the plain call is as it was written


def test_changes_in_place_are_seen_and_replaced_tensors_are_not(replayer: Replayer) -> None:
    """As with a CUDA graph: this is what makes a LoRA hook work, and what Watch is there for."""
    held = {"weight": torch.ones(2, 3)}
    work = work_of(lambda inputs: inputs[0] * held["weight"])
    for _ in range(3):
        assert replayer("a", work, ones(2.0))[0, 0] == 2.0
    held["weight"].fill_(5.0)
    assert replayer("a", work, ones(2.0))[0, 0] == 10.0
    held["weight"] = torch.full((2, 3), 7.0)
    assert replayer("a", work, ones(2.0))[0, 0] == 10.0


@pytest.mark.parametrize("recorded_in", [True, False], ids=["inference", "normal"])
def test_inference_mode_may_change_between_runs(pool: CapturePool, recorded_in: bool) -> None:
    replayer = Replayer(pool, strict=True)
    for turn, mode in enumerate((recorded_in, recorded_in, not recorded_in, recorded_in)):
        with torch.inference_mode(mode):
            result = replayer("a", work_of(), ones(float(turn)))
        assert result[0, 0] == 2 * turn
    assert len(pool) == 1


def test_inputs_in_any_strides_give_the_same(replayer: Replayer) -> None:
    x = torch.randn(2, 4, 5, 6)
    forms = [
        x.contiguous(memory_format=torch.channels_last),
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x,
    ]
    for form in forms:
        assert torch.equal(replayer("a", work_of(), [form]), x * 2)


def test_an_input_that_overlaps_itself(replayer: Replayer) -> None:
    for value in (1.0, 2.0, 3.0):
        result = replayer("a", work_of(), [torch.full((1, 3), value).expand(2, 3)])
        assert torch.equal(result, torch.full((2, 3), 2 * value))


def test_a_result_keeps_its_strides(replayer: Replayer) -> None:
    """The graphs after it count on them."""
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    results = [replayer("a", work_of(), [x]) for _ in range(3)]
    assert [r.stride() for r in results] == [x.stride()] * 3


# --- what is not recorded -----------------------------------------------------------------------


def test_what_may_not_be_captured_runs_plainly(
    replayer: Replayer, counters: Counters, tape: type[Tape]
) -> None:
    function = Counted(double)
    asked = []

    def why_not() -> str:
        asked.append(function.calls)
        return "a patch runs between"

    for value in (1.0, 2.0, 3.0):
        assert replayer("a", work_of(function, why_not), ones(value))[0, 0] == 2 * value
    assert asked == [1], "asked once, and after the call"
    assert replayer.reasons == {"a patch runs between"}
    assert (function.calls, tape.recordings, counters["captures"]) == (3, 0, 0)


def test_never(replayer: Replayer) -> None:
    assert not replayer.never("a")
    for _ in range(3):
        replayer("a", work_of(), ones())
        replayer("b", work_of(why_not=lambda: "no"), ones())
        assert not replayer.never("a")
        assert replayer.never("b")
    assert not replayer.never("c")


def test_each_run_asks_anew(pool: CapturePool) -> None:
    Replayer(pool, strict=True)("a", work_of(why_not=lambda: "no"), ones())
    later = Replayer(pool, strict=True)
    for _ in range(2):
        later("a", work_of(), ones())
    assert (len(pool), later.reasons) == (1, set())


def test_a_call_that_waits_once_is_recorded_later(
    replayer: Replayer, pool: CapturePool, tape: type[Tape]
) -> None:
    """The one that compiles waits for the GPU."""
    seen = []
    for waiting in (("engine.py:12",), (), (), ()):
        tape.waiting = waiting
        replayer("a", work_of(), ones())
        seen.append(len(pool))
    assert seen == [0, 0, 1, 1]
    assert replayer.reasons == set()


def test_a_call_that_waits_twice_is_never_recorded(
    replayer: Replayer, pool: CapturePool, tape: type[Tape]
) -> None:
    tape.waiting = ("sampling.py:34", "other.py:5")
    replayer("a", work_of(), ones())
    assert (replayer.never("a"), replayer.reasons) == (False, set())
    replayer("a", work_of(), ones())
    assert replayer.never("a")
    tape.waiting = ()
    for _ in range(3):
        assert replayer("a", work_of(), ones(4.0))[0, 0] == 8.0
    assert replayer.reasons == {"it waits for the GPU: sampling.py:34"}
    assert (len(pool), tape.recordings) == (0, 0)


def test_waits_are_counted_for_each_key(
    replayer: Replayer, pool: CapturePool, tape: type[Tape]
) -> None:
    tape.waiting = ("engine.py:12",)
    for key in ("a", "b"):
        replayer(key, work_of(), ones())
    assert not replayer.never("a") and not replayer.never("b")


def test_an_error_of_the_plain_call_is_the_callers(
    replayer: Replayer, pool: CapturePool, tape: type[Tape]
) -> None:
    def fail(_: Sequence[torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^shapes differ$"):
            replayer("a", work_of(fail), ones())
    for value in (1.0, 2.0, 3.0):
        assert replayer("a", work_of(), ones(value))[0, 0] == 2 * value
    assert (len(pool), tape.recordings, replayer.reasons) == (1, 1, set())


# --- what is kept -------------------------------------------------------------------------------


class Graphs:
    """Something that the kernels use."""


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


# --- failures -----------------------------------------------------------------------------------


PERMANENT = RuntimeError("operation not permitted when stream is capturing\nand 40 lines more")
MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
]
SAID = (
    "its CUDA graph could not be captured: RuntimeError: operation not permitted when stream is "
    "capturing"
)


def test_strict_raises_what_is_permanent(pool: CapturePool, tape: type[Tape]) -> None:
    tape.error = PERMANENT
    replayer = Replayer(pool, strict=True)
    replayer("a", work_of(), ones())
    with pytest.raises(CaptureFailed) as caught:
        replayer("a", work_of(), ones())
    assert str(caught.value) == SAID
    assert not caught.value.transient
    assert caught.value.__cause__ is PERMANENT


def test_fallback_runs_on_and_says_so_once(
    pool: CapturePool, tape: type[Tape], counters: Counters, caplog: pytest.LogCaptureFixture
) -> None:
    tape.error = PERMANENT
    replayer = Replayer(pool, strict=False)
    function = Counted(double)
    with caplog.at_level(logging.WARNING), counters.expect(captures=0):
        for key in ("a", "b"):
            for value in (1.0, 2.0, 3.0):
                assert replayer(key, work_of(function), ones(value))[0, 0] == 2 * value
    assert caplog.messages == [f"Blade runs on without a CUDA graph: {SAID}."]
    assert replayer.reasons == {SAID}
    assert replayer.never("a") and replayer.never("b")
    assert (function.calls, tape.recordings) == (6, 2)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "fallback"])
@pytest.mark.parametrize("error", MEMORY, ids=["torch", "driver"])
def test_missing_memory_never_stops_a_prompt(
    error: RuntimeError, strict: bool, pool: CapturePool, tape: type[Tape]
) -> None:
    tape.error = error
    replayer = Replayer(pool, strict=strict)
    for value in (1.0, 2.0, 3.0):
        assert replayer("a", work_of(), ones(value))[0, 0] == 2 * value
    assert replayer.reasons == {"its CUDA graph could not be captured: out of memory"}
    assert tape.recordings == 1, "not at each step of this run"
    assert pool.refused("a") is None
    tape.error = None
    later = Replayer(pool, strict=strict)
    for _ in range(2):
        later("a", work_of(), ones())
    assert len(pool) == 1, "but in the next"


def test_a_permanent_failure_is_remembered_over_runs(pool: CapturePool, tape: type[Tape]) -> None:
    tape.error = PERMANENT
    for _ in range(3):
        replayer = Replayer(pool, strict=False)
        for _ in range(3):
            replayer("a", work_of(), ones())
        assert replayer.reasons == {SAID}
    assert tape.recordings == 1
    assert pool.refused("a") == SAID
    assert pool.refused("b") is None


def test_a_remembered_failure_says_why_before_the_work_does(
    pool: CapturePool, tape: type[Tape]
) -> None:
    """A strict run too only hears of it in the report: nothing was tried."""
    tape.error = PERMANENT
    with pytest.raises(CaptureFailed):
        capture(pool)
    replayer = Replayer(pool, strict=True)
    replayer("a", work_of(why_not=lambda: "something else"), ones())
    assert replayer.reasons == {SAID}


def test_what_cannot_be_replayed_is_a_failed_capture(pool: CapturePool, tape: type[Tape]) -> None:
    """Recording runs no kernel: the first replay takes the memory, and shows what cannot run."""
    tape.replay_error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    replayer = Replayer(pool, strict=True)
    function = Counted(double)
    for value in (1.0, 2.0, 3.0):
        assert replayer("a", work_of(function), ones(value))[0, 0] == 2 * value
    assert replayer.reasons == {"its CUDA graph could not be captured: out of memory"}
    assert (len(pool), function.calls, tape.recordings) == (0, 4, 1)


CANCELS = [InterruptProcessingException(), KeyboardInterrupt()]


@pytest.mark.parametrize("cancel", CANCELS, ids=lambda error: type(error).__name__)
def test_a_cancel_passes_through_and_leaves_the_pool_empty(
    cancel: BaseException, pool: CapturePool, tape: type[Tape], counters: Counters
) -> None:
    capture(pool, "before")
    replayer = Replayer(pool, strict=False)
    cancelled = [False]

    def function(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        result = inputs[0] * 2
        if cancelled[0]:
            raise cancel
        return result

    replayer("a", work_of(function), ones())
    cancelled[0] = True
    with counters.expect(captures=0, captures_dropped=1), pytest.raises(type(cancel)) as caught:
        replayer("a", work_of(function), ones())
    assert caught.value is cancel
    assert (len(pool), pool.nbytes, tape.releases) == (0, 0, 1)
    assert pool.refused("a") is None and replayer.reasons == set()
    cancelled[0] = False
    with counters.expect(captures=1):
        for value in (3.0, 4.0):
            assert replayer("a", work_of(function), ones(value))[0, 0] == 2 * value


def test_a_failure_keeps_no_memory_in_the_pool(pool: CapturePool, tape: type[Tape]) -> None:
    """A pool gives memory back only as a whole."""
    capture(pool, "good")
    tape.error = PERMANENT
    with pytest.raises(CaptureFailed):
        capture(pool, "bad")
    assert (len(pool), pool.nbytes, tape.releases) == (0, 0, 1)
    assert pool.get("good") is None
    tape.error = None
    capture(pool, "good")
    assert len(pool) == 1


@pytest.mark.parametrize(
    "error",
    [ValueError("Pointer argument (at 0) cannot be accessed from Triton"), MemoryError()],
    ids=["triton", "memory"],
)
def test_what_another_library_raises_never_stops_a_prompt(
    error: Exception, pool: CapturePool, tape: type[Tape]
) -> None:
    """A patch's own Triton kernel says ValueError of memory that is only reserved."""
    tape.error = error
    replayer = Replayer(pool, strict=False)
    for value in (1.0, 2.0, 3.0):
        assert replayer("a", work_of(), ones(value))[0, 0] == 2 * value


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


# --- budget -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "recordable", "usable"),
    [(0, True, False), (MIB, True, True), (MIB, False, False), (None, True, True)],
)
def test_usable(
    nbytes: int | None, recordable: bool, usable: bool, counters: Counters, tape: type[Tape]
) -> None:
    tape.usable_now = recordable
    pool = CapturePool(CaptureBudget(counters, tape, nbytes))
    assert pool.usable(CPU) is usable
    assert tape.made == [], "nothing is reserved before there is something to record"


def test_by_default_an_eighth_of_the_gpu(
    counters: Counters, tape: type[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {0: 8 * 2**30, 1: 24 * 2**30}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=memory[i])
    )
    assert CaptureBudget(counters, tape).nbytes == 3 * 2**30
    assert CaptureBudget(counters, tape, 5).nbytes == 5


def test_what_a_pool_holds(pool: CapturePool, budget: CaptureBudget, tape: type[Tape]) -> None:
    assert (len(pool), pool.nbytes, budget.used()) == (0, 0, 0)
    capture(pool, "a")
    tape.sizes = MIB // 2
    capture(pool, "b")
    assert (len(pool), pool.nbytes, budget.used()) == (2, 3 * MIB // 2, 3 * MIB // 2)
    pool.clear()
    assert (len(pool), pool.nbytes, budget.used()) == (0, 0, 0)


def test_memory_that_others_free_meanwhile_is_no_credit(
    pool: CapturePool, tape: type[Tape]
) -> None:
    tape.sizes = -5 * MIB
    capture(pool, "a")
    tape.sizes = MIB
    capture(pool, "b")
    assert pool.nbytes == MIB


def test_one_recorder_until_the_pool_is_cleared(pool: CapturePool, tape: type[Tape]) -> None:
    capture(pool, "a")
    capture(pool, "b")
    assert len(tape.made) == 1
    pool.clear()
    capture(pool, "c")
    assert len(tape.made) == 2


def test_memory_is_released_once_a_clear(
    pool: CapturePool, tape: type[Tape], counters: Counters
) -> None:
    pool.clear()
    assert tape.releases == 0
    capture(pool, "a")
    capture(pool, "b")
    assert tape.releases == 0
    with counters.expect(captures=0, captures_dropped=2):
        pool.clear()
        pool.clear()
    assert tape.releases == 1


def test_the_least_recently_used_pool_goes_first(budget: CaptureBudget, counters: Counters) -> None:
    pools = [CapturePool(budget) for _ in range(4)]
    for pool in pools[:3]:
        capture(pool)
    assert pools[0].get("a") is not None
    assert pools[1].get("absent") is None  # which is no use of it
    with counters.expect(captures=1, captures_dropped=1):
        capture(pools[3])
    assert [len(pool) for pool in pools] == [1, 0, 1, 1]
    with counters.expect(captures=1, captures_dropped=1):
        capture(pools[1])
    assert [len(pool) for pool in pools] == [1, 1, 0, 1]
    assert budget.used() == 3 * MIB


def test_as_many_pools_go_as_must(
    budget: CaptureBudget, counters: Counters, tape: type[Tape]
) -> None:
    pools = [CapturePool(budget) for _ in range(4)]
    for pool in pools[:3]:
        capture(pool)
    tape.sizes = 2 * MIB
    with counters.expect(captures=1, captures_dropped=2):
        capture(pools[3])
    assert [len(pool) for pool in pools] == [0, 0, 1, 1]


def test_what_fits_exactly_stays(
    pool: CapturePool, budget: CaptureBudget, counters: Counters
) -> None:
    with counters.expect(captures=3, captures_dropped=0):
        for key in "abc":
            capture(pool, key)
    assert (budget.used(), budget.exceeded()) == (budget.nbytes, False)


def test_an_own_pool_that_is_full_is_recorded_again_alone(
    pool: CapturePool, tape: type[Tape], budget: CaptureBudget
) -> None:
    for key in "abc":
        capture(pool, key)
    function = Counted(double)
    capture(pool, "d", work_of(function))
    assert [pool.get(key) is not None for key in "abcd"] == [False, False, False, True]
    assert (function.calls, tape.releases, len(tape.made)) == (2, 1, 2)
    assert (pool.nbytes, pool.refused("d")) == (MIB, None)


def test_others_go_before_the_own_pool(budget: CaptureBudget) -> None:
    own, other = CapturePool(budget), CapturePool(budget)
    capture(own, "a")
    capture(own, "b")
    capture(other, "c")
    capture(own, "d")
    assert (len(own), len(other)) == (3, 0)


TOO_LARGE = (
    "its CUDA graph needs 5 MiB, more than the 3 MiB that captures may hold. Set "
    "BLADE_CAPTURE_MIB to more, or use a smaller size or batch"
)


@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
def test_what_is_too_large_alone_is_refused(
    full: bool, pool: CapturePool, budget: CaptureBudget, tape: type[Tape], counters: Counters
) -> None:
    if full:
        capture(pool, "small")
    tape.sizes = 5 * MIB
    with pytest.raises(CaptureFailed) as caught, counters.expect(captures=0):
        capture(pool, "large")
    assert str(caught.value) == TOO_LARGE
    assert caught.value.transient, "a setting of the machine's must not stop a prompt"
    assert (len(pool), budget.used(), pool.refused("large")) == (0, 0, TOO_LARGE)
    assert pool.refused("small") is None
    tape.sizes = MIB
    capture(pool, "small")
    assert len(pool) == 1


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "fallback"])
def test_a_refusal_is_remembered(strict: bool, pool: CapturePool, tape: type[Tape]) -> None:
    tape.sizes = 5 * MIB
    for _ in range(3):
        replayer = Replayer(pool, strict=strict)
        for value in (1.0, 2.0, 3.0):
            assert replayer("a", work_of(), ones(value))[0, 0] == 2 * value
        assert replayer.reasons == {TOO_LARGE}
        assert replayer.never("a")
    assert tape.recordings == 1


def test_pools_of_dead_owners_do_not_count(
    budget: CaptureBudget, counters: Counters, tape: type[Tape]
) -> None:
    pools = [CapturePool(budget) for _ in range(3)]
    for pool in pools:
        capture(pool)
    del pool, pools[:2]
    assert (len(budget.pools), budget.used()) == (1, MIB)
    tape.sizes = 2 * MIB
    new = CapturePool(budget)
    with counters.expect(captures_dropped=0):
        capture(new)
    assert (len(pools[0]), len(new)) == (1, 1)


def test_the_memory_of_a_dead_owner_is_released(
    budget: CaptureBudget, counters: Counters, tape: type[Tape]
) -> None:
    """What a CUDA graph held is free for others only after `release`."""
    pool = CapturePool(budget)
    capture(pool)
    with counters.expect(captures_dropped=1):
        del pool
    assert tape.releases == 1


def test_the_seconds_are_counted(
    pool: CapturePool, counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock, 99.0))
    capture(pool)
    assert counters.snapshot()["capture_seconds"] == 2.5
    assert counters["captures"] == 1


# --- memory that must be free, and work that must not be done twice -----------------------------


class Kept:
    """Weights as captures keep them, and whether any was alive when memory was released."""

    def __init__(self, tape: type[Tape]) -> None:
        self._made: list[weakref.ref[Graphs]] = []
        self.at_release: list[int] = []
        tape.at_release = lambda: self.at_release.append(self.alive())

    def keep(self) -> Graphs:
        graphs = Graphs()
        self._made.append(weakref.ref(graphs))
        return graphs

    def alive(self) -> int:
        return sum(ref() is not None for ref in self._made)


def test_nothing_is_alive_when_memory_is_released(pool: CapturePool, tape: type[Tape]) -> None:
    """torch gives back what is free then, and nothing later."""
    kept = Kept(tape)
    for key in "ab":
        capture(pool, key, work_of(keep=kept.keep))
    pool.clear()
    assert kept.at_release == [0]


def test_what_did_not_fit_is_gone_before_it_is_recorded_again(
    pool: CapturePool, tape: type[Tape]
) -> None:
    kept = Kept(tape)
    for key in "abcd":
        capture(pool, key, work_of(keep=kept.keep))
    assert kept.at_release == [0]


def test_what_is_refused_is_gone_when_memory_is_released(
    pool: CapturePool, tape: type[Tape]
) -> None:
    kept = Kept(tape)
    tape.sizes = 5 * MIB
    with pytest.raises(CaptureFailed):
        capture(pool, "large", work_of(keep=kept.keep))
    assert kept.at_release == [0]


def test_no_more_is_dropped_than_was_captured(
    pool: CapturePool, tape: type[Tape], counters: Counters
) -> None:
    """What stands in the report: the difference is what there is."""
    for key in "abcd":
        capture(pool, key)
    assert counters["captures"] - counters["captures_dropped"] == len(pool) == 1
    tape.sizes = 5 * MIB
    with pytest.raises(CaptureFailed):
        capture(pool, "large")
    assert counters["captures"] == counters["captures_dropped"]


def test_two_forms_that_do_not_fit_together_are_not_recorded_at_each_step(
    counters: Counters, tape: type[Tape]
) -> None:
    """Recording costs more than many plain calls; each would drop the other at every step."""
    pool = CapturePool(CaptureBudget(counters, tape, 3 * MIB // 2))
    replayer = Replayer(pool, strict=False)
    for _ in range(20):
        for key in ("cond", "uncond"):
            assert replayer(key, work_of(), ones(3.0))[0, 0] == 6.0
    assert tape.recordings <= 8


def test_two_models_that_do_not_fit_together_are_not_recorded_at_each_step(
    counters: Counters, tape: type[Tape]
) -> None:
    budget = CaptureBudget(counters, tape, 3 * MIB // 2)
    pools = [CapturePool(budget) for _ in range(2)]
    replayers = [Replayer(pool, strict=False) for pool in pools]
    for _ in range(20):
        for replayer in replayers:
            assert replayer("a", work_of(), ones(3.0))[0, 0] == 6.0
    assert tape.recordings <= 8
