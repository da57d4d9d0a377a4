"""Counters of everything that costs a user time; tests assert on them, the report shows them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = (
    "graphs_compiled",  # a compiler ran and its result was kept
    "graphs_loaded",  # taken from disk instead
    "artifacts_dropped",  # on disk, but damaged or out of date
    "cache_hits",  # a block's part took a graph that was there (once a run, not once a step)
    "cache_misses",  # it had to be compiled, or taken from disk
    "compile_failures",  # a compiler was tried and gave up
    "graphs_evicted",  # dropped to stay within the byte budget
    "frozen_rebuilds",  # compiled again because a frozen weight changed
    "blocks_compiled",  # blocks that ran compiled, once a run
    "blocks_eager",  # blocks that ran as stock, once a run
    "runs",  # sampling runs through an optimized model
    "runs_pending",  # ended while other processes still compiled for them; ControlNets and VAEs too
    "captures",  # CUDA graphs recorded
    "captures_dropped",  # given back: weights moved, memory needed, or the model is gone
    "replays",  # UNet calls that were one replay
    "control_runs",  # of these, runs of an optimized ControlNet; a model twice in a chain is one
    "control_replays",  # ControlNet calls that were one replay
    "vae_runs",  # decodes and encodes through an optimized VAE; each tile is one
    "vae_replays",  # images or tiles that were one replay
    "hint_embeddings",  # control images that a ControlNet took up
)


class Counters:
    """Thread-safe counts, and the seconds spent compiling, loading and capturing."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a collector that runs meanwhile may drop captures
        self._counts = dict.fromkeys(NAMES, 0)
        self._compile_seconds = 0.0
        self._load_seconds = 0.0
        self._capture_seconds = 0.0

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counts[name] += count

    def add_compile_seconds(self, seconds: float) -> None:
        with self._lock:
            self._compile_seconds += seconds

    def add_load_seconds(self, seconds: float) -> None:
        with self._lock:
            self._load_seconds += seconds

    def add_capture_seconds(self, seconds: float) -> None:
        with self._lock:
            self._capture_seconds += seconds

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def snapshot(self) -> dict[str, int | float]:
        with self._lock:
            return {
                **self._counts,
                "compile_seconds": round(self._compile_seconds, 3),
                "load_seconds": round(self._load_seconds, 3),
                "capture_seconds": round(self._capture_seconds, 3),
            }

    @contextmanager
    def expect(self, **deltas: int) -> Iterator[None]:
        """Assert that the counters named move by exactly these amounts inside the block."""
        before = self.snapshot()
        yield
        after = self.snapshot()
        seen = {name: after[name] - before[name] for name in deltas}
        assert seen == deltas, f"counters moved by {seen}, expected {deltas}"
