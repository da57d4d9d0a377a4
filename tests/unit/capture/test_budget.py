"""The memory that all captures of a process may hold."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from blade_tests.unit.capture.tape import MIB, Counted, Graphs, Tape, capture, double, ones, work_of
from blade_tests.unit.samples import CPU

from blade.blade_core.capture import CaptureBudget, CapturePool, Replayer
from blade.blade_core.counters import Counters
from blade.blade_core.errors import CaptureFailed

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
