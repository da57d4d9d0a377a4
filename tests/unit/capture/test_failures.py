"""Work that cannot be captured."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from blade_tests.unit.capture.tape import (
    Counted,
    InterruptProcessingException,
    Tape,
    capture,
    double,
    ones,
    work_of,
)

from blade.blade_core.capture import CapturePool, Replayer
from blade.blade_core.counters import Counters
from blade.blade_core.errors import CaptureFailed

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
