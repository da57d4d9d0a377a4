"""Graphs that other processes compile, several at a time, while this one goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

import torch

from .cache import WAIT_SECONDS
from .config import compile_workers
from .key import GraphKey
from .log import warn_once
from .pool import Result, WorkerFailed, Workers, worker_count
from .store import GraphStore
from .worker import FORKS

_WORTH = 2
"""From how many processes on they are faster than this one alone where somebody waits for them:
two on four cores took 25 s for a first image, this one on sixteen 42 (docs/log.md)."""


_MOST = 128
"""Results that nobody has taken: those of two sizes. More are of sizes that were given up."""


class Jobs:
    """What other processes are compiling, have compiled, or are going to.

    Results are kept until they are taken, and written to the store as they come.
    """

    def __init__(self, store: GraphStore | None) -> None:
        self.finished = 0
        """How many have ended, for telling whether anything has changed."""
        self.cleared = 0
        """How often all was forgotten."""
        self._store = store
        self._workers: Workers | None = None
        self._device: torch.device | None = None
        self._lock = threading.RLock()  # a job that has ended already is kept at once
        self._running: dict[GraphKey, Future[Result]] = {}
        self._held: dict[GraphKey, tuple[str, bytes]] = {}

    def usable(self, device: torch.device) -> bool:
        """Whether other processes are to compile for `device`."""
        return self._pool(device).count > 0

    def pays(self, device: torch.device) -> bool:
        """Whether they are faster than this one where somebody waits for them: if the user says
        so, or if there are two of them. (Where none can fork, each would import a
        compiler of its own.)"""
        asked = compile_workers() is not None
        return self.usable(device) if asked else FORKS and self._pool(device).count >= _WORTH

    def start(self, device: torch.device) -> None:
        """Let them get ready for work that is going to come."""
        self._pool(device).submit("eager", b"")

    def _pool(self, device: torch.device) -> Workers:
        if self._workers is None:
            self._workers, self._device = Workers(worker_count(device)), device
        return self._workers

    def __contains__(self, key: object) -> bool:
        return key in self._running or key in self._held

    def pending(self, key: GraphKey) -> bool:
        """Whether another process still works on `key`, or is going to."""
        job = self._running.get(key)
        return key in self._held if job is None else not job.done()

    def add(
        self, key: GraphKey, backend: str, payload: bytes, device: torch.device, *, least: int
    ) -> None:
        """Let `payload`, which `Backend.job` gave, be compiled once there are `least` of them."""
        with self._lock:
            self._held[key] = (backend, payload)
            self._pool(device)
            self.begin(least=least)

    def begin(self, *, least: int) -> None:
        """Let what is held be compiled if there are `least` of them."""
        with self._lock:
            if not self._held or (len(self._held) < least and not self._busy()):
                return
            held, self._held = self._held, {}
            self._forget_oldest()
            assert self._workers is not None and self._workers.count
            for key, job in held.items():
                self._running[key] = self._workers.submit(*job)
                self._running[key].add_done_callback(self._keep(key))

    def wait(
        self,
        key: GraphKey,
        checkpoint: Callable[[], None],
        meanwhile: Callable[[Result, torch.device], None],
    ) -> None:
        """Return when nobody works on `key` any more. One that is only held is let go.

        meanwhile: given other results and what they are for, each until it is loaded.
        """
        with self._lock:
            self._held.pop(key, None)
            job = self._running.get(key)
            others = [other for other in self._running.values() if other is not job]
        while job is not None and not job.done():
            done = next((other for other in others if other.done()), None)
            if done is None:
                wait([job], WAIT_SECONDS)
            else:
                others.remove(done)
                if done.exception() is None and done.result().call is None:
                    assert self._device is not None
                    meanwhile(done.result(), self._device)
            checkpoint()

    def finish(self, checkpoint: Callable[[], None]) -> None:
        """Return when nobody works on anything any more."""
        while True:
            checkpoint()
            with self._lock:
                working = [job for job in self._running.values() if not job.done()]
            if not working:
                return
            wait(working, WAIT_SECONDS)

    def take(self, key: GraphKey) -> Result | None:
        """The result for `key`, once; None if there is none, or if the process failed."""
        with self._lock:
            job = self._running.pop(key, None)
        if job is None:
            return None
        error = job.exception()
        if error is None:
            return job.result()
        if not isinstance(error, WorkerFailed):
            raise error
        warn_once(f"A process of its own could not compile {key.label} ({error}); this one will.")
        return None

    def clear(self) -> None:
        """Forget what was made and what is held; what is still made is for nobody."""
        with self._lock:
            self.cleared += 1
            self._held.clear()
            self._running.clear()

    def close(self) -> None:
        """End all processes."""
        if self._workers is not None:
            self._workers.close()

    def _busy(self) -> bool:
        return any(not job.done() for job in self._running.values())

    def _forget_oldest(self) -> None:
        ended = [key for key, job in self._running.items() if job.done()]
        for key in ended[: max(0, len(ended) - _MOST)]:
            del self._running[key]

    def _keep(self, key: GraphKey) -> Callable[[Future[Result]], None]:
        cleared = self.cleared

        def keep(job: Future[Result]) -> None:
            with self._lock:
                wanted = self._store if cleared == self.cleared else None
                if wanted is not None and job.exception() is None:
                    wanted.write(key, job.result().artifact)
                self.finished += 1

        return keep
