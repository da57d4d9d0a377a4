"""Graphs that other processes compile, several at a time, while this one goes on."""

from __future__ import annotations

import atexit
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .cache import WAIT_SECONDS
from .config import compile_workers
from .key import GraphKey
from .log import warn_once
from .store import GraphStore
from .worker import read, write

_START = """
import importlib.util, sys
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "blade_core", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["blade_core"] = importlib.util.module_from_spec(spec)
from blade_core.worker import main
main()
"""
"""Without the host, and by no name that the host gave the pack."""

_MOST = 8
_VRAM_BYTES = 3 * 2**30
"""Free memory of a GPU for each process that compiles for it: it takes a quarter of that."""


class Result(NamedTuple):
    """A graph as `Backend.load` takes it, and how long it took."""

    artifact: bytes
    seconds: float


class WorkerFailed(Exception):
    """A process could not compile a graph, or ended."""


class Jobs:
    """What other processes are compiling, have compiled, or are going to.

    Results are kept until they are taken, and written to the store as they come.
    """

    def __init__(self, store: GraphStore | None) -> None:
        self.finished = 0
        """How many have ended, for telling whether anything has changed."""
        self._store = store
        self._workers: Workers | None = None
        self._lock = threading.Lock()
        self._running: dict[GraphKey, Future[Result]] = {}
        self._held: dict[GraphKey, tuple[str, bytes]] = {}

    def usable(self, device: torch.device) -> bool:
        """Whether other processes are to compile for `device`."""
        if self._workers is None:
            self._workers = Workers(worker_count(device))
        return self._workers.count > 0

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
            if len(self._held) < least and not self._busy():
                return
            held, self._held = self._held, {}
            assert self.usable(device) and self._workers is not None
            for key, job in held.items():
                self._running[key] = self._workers.submit(*job)
                self._running[key].add_done_callback(self._keep(key))

    def wait(self, key: GraphKey, checkpoint: Callable[[], None]) -> None:
        """Return when nobody works on `key` any more. One that is only held is let go."""
        with self._lock:
            self._held.pop(key, None)
            job = self._running.get(key)
        while job is not None and not job.done():
            wait([job], WAIT_SECONDS)
            checkpoint()

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

    def close(self) -> None:
        """End all processes."""
        if self._workers is not None:
            self._workers.close()

    def _busy(self) -> bool:
        return any(not job.done() for job in self._running.values())

    def _keep(self, key: GraphKey) -> Callable[[Future[Result]], None]:
        def keep(job: Future[Result]) -> None:
            if self._store is not None and job.exception() is None:
                self._store.write(key, job.result().artifact)
            self.finished += 1

        return keep


class Workers:
    """A pool of processes, started when there is work; they end by themselves without it.

    A thread for each process waits for it, and dies with this process without being waited for.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._todo: queue.SimpleQueue[tuple[dict[str, Any], Future[Result]]] = queue.SimpleQueue()
        self._threads = 0
        self._own = threading.local()
        self._processes: weakref.WeakSet[subprocess.Popen[bytes]] = weakref.WeakSet()
        atexit.register(self.close)

    def submit(self, backend: str, payload: bytes) -> Future[Result]:
        """Compile `payload`; fails with WorkerFailed."""
        future: Future[Result] = Future()
        self._todo.put(({"backend": backend, "payload": payload}, future))
        if self._threads < self.count:
            self._threads += 1
            threading.Thread(target=self._serve, name="blade-compile", daemon=True).start()
        return future

    def close(self) -> None:
        """End all processes, also in the middle of their work."""
        atexit.unregister(self.close)
        for process in list(self._processes):
            process.kill()

    def _serve(self) -> None:
        while True:
            job, future = self._todo.get()
            try:
                future.set_result(self._run(job))
            except Exception as error:
                future.set_exception(error)

    def _run(self, job: dict[str, Any]) -> Result:
        answer = None
        for _ in range(2):  # a process that ended for want of work leaves a broken pipe
            process = self._process()
            assert process.stdin is not None and process.stdout is not None
            try:
                write(process.stdin, job)
            except OSError:
                self._own.process = None
                continue
            answer = read(process.stdout)
            break
        if answer is None:
            self._own.process = None
            raise WorkerFailed("the process ended")
        if answer["error"] is not None:
            raise WorkerFailed(answer["error"])
        return Result(answer["artifact"], answer["seconds"])

    def _process(self) -> subprocess.Popen[bytes]:
        """This thread's process."""
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        if process is None or process.poll() is not None:
            process = self._own.process = subprocess.Popen(
                [sys.executable, "-s", "-c", _START, str(Path(__file__).parent)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Each compiles by itself: pools of pools would be more processes than cores.
                env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
            )
            self._processes.add(process)
        return process


def worker_count(device: torch.device) -> int:
    """How many processes are to compile for `device`: `BLADE_COMPILE_WORKERS`, or by what is free.

    0 is none: graphs are compiled in this process, when they are needed.
    """
    chosen = compile_workers()
    if chosen is not None:
        return chosen
    if device.type != "cuda":
        return 1  # more would take the cores from sampling
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(_MOST, (os.cpu_count() or 1) - 2, free // _VRAM_BYTES))
