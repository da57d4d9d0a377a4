"""Counters: exact under threads, and `expect` fails when they move otherwise than expected."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from blade.blade_core.counters import NAMES, Counters


def test_all_start_at_zero() -> None:
    assert Counters().snapshot() == {
        **dict.fromkeys(NAMES, 0),
        "compile_seconds": 0,
        "capture_seconds": 0,
        "load_seconds": 0,
    }


def test_adding() -> None:
    counters = Counters()
    counters.add("runs")
    counters.add("cache_hits", 3)
    counters.add_compile_seconds(1.25)
    counters.add_compile_seconds(0.5004)
    assert (counters["runs"], counters["cache_hits"], counters["cache_misses"]) == (1, 3, 0)
    snapshot = counters.snapshot()
    assert (snapshot["runs"], snapshot["compile_seconds"]) == (1, 1.75)
    counters.add("runs")
    assert snapshot["runs"] == 1  # a copy


def test_captures_are_counted_and_timed_apart() -> None:
    counters = Counters()
    for name in ("captures", "captures_dropped", "replays"):
        counters.add(name, 2)
    counters.add_capture_seconds(0.25)
    counters.add_capture_seconds(0.1256)
    counters.add_compile_seconds(8)
    snapshot = counters.snapshot()
    assert [snapshot[n] for n in ("captures", "captures_dropped", "replays")] == [2, 2, 2]
    assert (snapshot["capture_seconds"], snapshot["compile_seconds"]) == (0.376, 8)


def test_an_unknown_name_is_an_error() -> None:
    counters = Counters()
    with pytest.raises(KeyError):
        counters.add("run")
    with pytest.raises(KeyError), counters.expect(run=1):
        pass


def test_no_count_is_lost_between_threads() -> None:
    counters = Counters()

    def add(_: int) -> None:
        for _ in range(500):
            counters.add("runs")
            counters.add_compile_seconds(1)
            counters.add_capture_seconds(2)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert (counters["runs"], counters.snapshot()["compile_seconds"]) == (4000, 4000)
    assert counters.snapshot()["capture_seconds"] == 8000


def test_expect_looks_at_the_block_only() -> None:
    counters = Counters()
    counters.add("runs", 5)
    with counters.expect(runs=1, cache_hits=0):
        counters.add("runs")
        counters.add("cache_misses")  # not named


@pytest.mark.parametrize("moved", [0, 2, -1])
def test_expect_fails(moved: int) -> None:
    counters = Counters()
    with (
        pytest.raises(AssertionError) as caught,
        counters.expect(runs=1, cache_hits=0),
    ):
        counters.add("runs", moved)
    text = str(caught.value)
    assert f"moved by {{'runs': {moved}, 'cache_hits': 0}}" in text
    assert "expected {'runs': 1, 'cache_hits': 0}" in text


def test_expect_lets_an_error_through() -> None:
    with pytest.raises(ZeroDivisionError), Counters().expect(runs=1):
        raise ZeroDivisionError
