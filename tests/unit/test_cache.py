"""The graph cache: one build a key whatever the threads, a budget, and a memory of failures."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest
import torch

from blade.blade_core.cache import GraphCache
from blade.blade_core.counters import Counters
from blade.blade_core.errors import CompileFailed
from blade.blade_core.graph import Graph
from blade.blade_core.key import GraphKey

PATIENCE = 20.0
"""Seconds after which a test that hangs fails."""

SOON = 0.6
"""Seconds in which a thread that is wrongly let in would have come in: three waits."""


class Cancelled(Exception):
    """A user's cancel."""


def key_of(name: str) -> GraphKey:
    return GraphKey(name, (), "layout", "backend", "environment")


def graph_of(name: str, nbytes: int = 10) -> Graph:
    return Graph(key_of(name), lambda weights, inputs: inputs[0], nbytes, 0.0)


def nothing() -> None:
    """A checkpoint that never cancels."""


def never() -> Graph:
    raise AssertionError("built again")


def wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


class SlowBuild:
    """A build that runs until it is told how to end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = threading.Event()
        self.finish = threading.Event()
        self.error: Exception | None = None

    def __call__(self) -> Graph:
        self.started.set()
        wait(self.finish)
        if self.error is not None:
            raise self.error
        return graph_of(self.name)

    def end(self, error: Exception | None = None) -> None:
        self.error = error
        self.finish.set()


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def cache(counters: Counters) -> GraphCache:
    return GraphCache(100, counters)


@pytest.fixture
def start() -> Iterator[Callable[..., Future[Graph]]]:
    """Run a function in a thread of its own."""
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


def put(cache: GraphCache, *names: str, nbytes: int = 10) -> None:
    for name in names:
        cache.get(key_of(name), partial(graph_of, name, nbytes), checkpoint=nothing)


def names(cache: GraphCache) -> list[str]:
    return [key.structure for key in cache.all_keys()]


# --- threads ------------------------------------------------------------------------------------


def test_a_race_for_one_key_builds_once(cache: GraphCache, counters: Counters) -> None:
    barrier = threading.Barrier(8)
    builds: list[int] = []

    def build() -> Graph:
        builds.append(1)
        time.sleep(0.05)
        return graph_of("a")

    def get(_: int) -> Graph:
        barrier.wait(PATIENCE)
        return cache.get(key_of("a"), build, checkpoint=nothing)

    with counters.expect(cache_misses=1, cache_hits=7), ThreadPoolExecutor(8) as pool:
        graphs = list(pool.map(get, range(8)))
    assert len(builds) == 1
    assert all(graph is graphs[0] for graph in graphs)
    assert cache.nbytes == 10


def test_another_key_does_not_wait(cache: GraphCache, start: Callable[..., Future[Graph]]) -> None:
    slow = SlowBuild("a")
    first = start(cache.get, key_of("a"), slow, checkpoint=nothing)
    wait(slow.started)
    second = start(cache.get, key_of("b"), lambda: graph_of("b"), checkpoint=nothing)
    try:
        assert second.result(PATIENCE).key == key_of("b")
        assert not first.done()
    finally:
        slow.end()
    assert first.result(PATIENCE).key == key_of("a")


def test_who_waits_can_be_cancelled(cache: GraphCache, start: Callable[..., Future[Graph]]) -> None:
    slow = SlowBuild("a")
    first = start(cache.get, key_of("a"), slow, checkpoint=nothing)
    wait(slow.started)

    def cancel() -> None:
        raise Cancelled

    try:
        with pytest.raises(Cancelled):
            start(cache.get, key_of("a"), never, checkpoint=cancel).result(PATIENCE)
        assert not first.done()
    finally:
        slow.end()
    assert first.result(PATIENCE) is cache.get(key_of("a"), never, checkpoint=nothing)


@pytest.mark.parametrize(
    "error", [CompileFailed("no memory", transient=True), Cancelled()], ids=["memory", "cancel"]
)
def test_who_waited_for_a_failure_builds_alone(
    error: Exception, cache: GraphCache, start: Callable[..., Future[Graph]]
) -> None:
    """The second of three threads builds after the first failed; the third must wait for it."""
    slow, again, third = SlowBuild("a"), SlowBuild("a"), SlowBuild("a")
    first = start(cache.get, key_of("a"), slow, checkpoint=nothing)
    wait(slow.started)
    waiting = threading.Event()
    second = start(cache.get, key_of("a"), again, checkpoint=waiting.set)
    wait(waiting)
    slow.end(error)
    with pytest.raises(type(error)):
        first.result(PATIENCE)
    wait(again.started)
    late = start(cache.get, key_of("a"), third, checkpoint=nothing)
    try:
        assert not third.started.wait(SOON), "two threads build one graph"
    finally:
        again.end()
        third.end()
    assert late.result(PATIENCE) is second.result(PATIENCE)
    assert cache.nbytes == 10


# --- budget -------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(cache: GraphCache, counters: Counters) -> None:
    put(cache, "a", "b", "c", nbytes=33)
    cache.get(key_of("a"), never, checkpoint=nothing)
    assert names(cache) == ["b", "c", "a"]
    with counters.expect(graphs_evicted=2):
        put(cache, "d", nbytes=66)
    assert names(cache) == ["a", "d"]
    assert (cache.nbytes, len(cache)) == (99, 2)


def test_what_fits_exactly_stays(cache: GraphCache, counters: Counters) -> None:
    with counters.expect(graphs_evicted=0):
        put(cache, "a", "b", nbytes=50)
    assert names(cache) == ["a", "b"]


def test_the_newest_stays_even_if_it_is_too_large(cache: GraphCache) -> None:
    put(cache, "a", "b")
    put(cache, "large", nbytes=1000)
    assert names(cache) == ["large"]
    put(cache, "c")
    assert names(cache) == ["c"]
    assert cache.nbytes == 10


def test_an_evicted_graph_is_built_again(cache: GraphCache, counters: Counters) -> None:
    put(cache, "a", "b", nbytes=60)
    with counters.expect(cache_misses=1, cache_hits=0):
        put(cache, "a", nbytes=60)


def test_discard_drops_one(cache: GraphCache) -> None:
    put(cache, "a", "b")
    cache.discard(key_of("a"))
    cache.discard(key_of("a"))
    assert (names(cache), cache.nbytes) == (["b"], 10)


def test_clear_drops_all_and_forgets_failures(cache: GraphCache) -> None:
    put(cache, "a", "b")
    fail(cache, CompileFailed("broken"))
    cache.clear()
    assert (names(cache), cache.nbytes, len(cache)) == ([], 0, 0)
    put(cache, "broken")
    assert names(cache) == ["broken"]


# --- failures -----------------------------------------------------------------------------------


def fail(cache: GraphCache, error: Exception) -> None:
    def build() -> Graph:
        raise error

    with pytest.raises(type(error)):
        cache.get(key_of("broken"), build, checkpoint=nothing)


def test_a_permanent_failure_is_remembered(cache: GraphCache, counters: Counters) -> None:
    with counters.expect(compile_failures=1, cache_misses=1):
        fail(cache, CompileFailed("the compiler gave up"))
        for _ in range(2):
            with pytest.raises(CompileFailed, match=r"^the compiler gave up$") as caught:
                cache.get(key_of("broken"), never, checkpoint=nothing)
            assert not caught.value.transient
    put(cache, "another")


@pytest.mark.parametrize(
    ("error", "failures"), [(CompileFailed("no memory", transient=True), 1), (Cancelled(), 0)]
)
def test_what_is_not_permanent_is_tried_again(
    error: Exception, failures: int, cache: GraphCache, counters: Counters
) -> None:
    with counters.expect(compile_failures=failures, cache_misses=2):
        fail(cache, error)
        put(cache, "broken")
    assert names(cache) == ["broken"]


def test_a_remembered_failure_holds_no_tensor(cache: GraphCache) -> None:
    """The frames of its traceback would keep a unit's weights in VRAM until the process ends."""
    held: list[weakref.ref[torch.Tensor]] = []

    def build() -> Graph:
        weight = torch.zeros(1)
        held.append(weakref.ref(weight))
        try:
            raise ValueError(weight)
        except ValueError as error:
            raise CompileFailed("broken") from error

    with pytest.raises(CompileFailed) as caught:
        cache.get(key_of("broken"), build, checkpoint=nothing)
    del caught
    gc.collect()
    assert held[0]() is None
