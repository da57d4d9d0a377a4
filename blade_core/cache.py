"""Graphs in memory: one compile per key in the whole process, least recently used out first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from .counters import Counters
from .errors import CompileFailed
from .graph import Graph
from .key import GraphKey

WAIT_SECONDS = 0.2
"""How long a thread waits for another one before it asks whether it was cancelled."""


class GraphCache:
    """Thread-safe map from key to graph, with a budget in bytes.

    A graph that callers still hold lives on after it was evicted; it is only no longer found.
    """

    def __init__(self, budget: int, counters: Counters) -> None:
        self.budget = budget
        self._counters = counters
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)  # a build did
        self._graphs: OrderedDict[GraphKey, Graph] = OrderedDict()
        # Texts: an error itself holds on to its frames, and so to the unit's weights.
        self._failures: dict[GraphKey, str] = {}
        self._building: set[GraphKey] = set()
        self._bytes = 0
        self._forgotten = 0

    @property
    def forgotten(self) -> int:
        """How often graphs were dropped: while it stays, what was found is found."""
        return self._forgotten

    @property
    def nbytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: object) -> bool:
        """Whether `get` would answer at once: there is a graph, or it is known to fail."""
        return key in self._graphs or key in self._failures

    def all_keys(self) -> list[GraphKey]:
        """All keys, the least recently used first."""
        with self._lock:
            return list(self._graphs)

    def get(
        self, key: GraphKey, build: Callable[[], Graph], *, checkpoint: Callable[[], None]
    ) -> Graph:
        """Return the graph of `key`; call `build` if there is none.

        Of several threads that ask for one key, one builds and the others wait for it.
        `checkpoint` is called while waiting and may raise (a user's cancel).

        Raises:
            CompileFailed: `build` raised it, now or (unless transient) at an earlier time.
        """
        while True:
            with self._lock:
                found = self._find(key)
                if found is not None:
                    return found
                if key not in self._building:
                    self._building.add(key)
                    break
                self._ended.wait(WAIT_SECONDS)
            checkpoint()
        try:
            self._counters.add("cache_misses")
            graph = build()
            self._put(graph)
            return graph
        except CompileFailed as error:
            self._counters.add("compile_failures")
            if not error.transient:
                with self._lock:
                    self._failures[key] = str(error)
            raise
        finally:
            with self._lock:
                self._building.discard(key)
                self._ended.notify_all()

    def discard(self, key: GraphKey) -> None:
        """Drop one graph, if it is there."""
        with self._lock:
            graph = self._graphs.pop(key, None)
            if graph is not None:
                self._bytes -= graph.nbytes
                self._forgotten += 1

    def clear(self) -> None:
        """Drop all graphs and forget all failures."""
        with self._lock:
            self._graphs.clear()
            self._failures.clear()
            self._bytes = 0
            self._forgotten += 1

    def _find(self, key: GraphKey) -> Graph | None:
        failure = self._failures.get(key)
        if failure is not None:
            raise CompileFailed(failure)
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            self._counters.add("cache_hits")
        return graph

    def _put(self, graph: Graph) -> None:
        with self._lock:
            self._graphs[graph.key] = graph
            self._bytes += graph.nbytes
            # The newest graph stays even if it is larger than the budget: it is in use.
            while self._bytes > self.budget and len(self._graphs) > 1:
                _, evicted = self._graphs.popitem(last=False)
                self._bytes -= evicted.nbytes
                self._forgotten += 1
                self._counters.add("graphs_evicted")
