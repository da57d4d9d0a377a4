"""Processes that compile: how many, their start, what they are told and what they answer."""

from __future__ import annotations

import atexit
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import compile_workers
from .graph import GraphFunction
from .log import logger
from .machine import cores, free_memory
from .worker import FORKS, Answer, Job, read, write

_START = """
import sys
if sys.path[0] == "":
    del sys.path[0]  # the working directory: ComfyUI itself imports nothing from there
import importlib.util, os
folder, children = sys.argv[1:]
answers = os.dup(1)
os.dup2(2, 1)  # what is printed, by imports too, is no answer
spec = importlib.util.spec_from_file_location(
    "blade_core", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["blade_core"] = importlib.util.module_from_spec(spec)
from blade_core.worker import main
main(int(children), answers)
"""
"""Without the host, and by no name that the host gave the pack."""

_VARIABLES = {
    # Each compiles by itself: pools of pools would be more processes than cores.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    # Asking CUDA itself would spoil it for children.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}

_MOST = 16
_VRAM_BYTES, _MEMORY_BYTES = 2**30, 2**30
"""Free memory of a GPU and of the machine for each process that compiles: few take half of the
first, most nothing; each takes half of the second."""


@dataclass(eq=False)
class Result:
    """A graph as `Backend.load` takes it, and how long it took; `call` if it is loaded already."""

    artifact: bytes
    seconds: float
    call: GraphFunction | None = None


class WorkerFailed(Exception):
    """A process could not compile a graph, or ended."""


class Workers:
    """A pool of processes, started when there is work; they end by themselves without it."""

    def __init__(self, count: int) -> None:
        self.count = count
        # One that forks children, or as many as there may be, each of which does one job at a time.
        self._servers = [_Server(count) for _ in range(min(1, count) if FORKS else count)]
        atexit.register(self.close)

    def submit(self, backend: str, payload: bytes) -> Future[Result]:
        """Compile `payload`; fails with WorkerFailed."""
        return min(self._servers, key=lambda server: server.busy).submit(backend, payload)

    def processes(self) -> list[subprocess.Popen[bytes]]:
        """Those that run."""
        found = [server.process for server in self._servers]
        return [process for process in found if process is not None and process.poll() is None]

    def close(self) -> None:
        """End all processes, also in the middle of their work."""
        atexit.unregister(self.close)
        for server in self._servers:
            server.closed = True
        for process in self.processes():
            _end(process)


class _Server:
    """One process that compiles, and two threads that talk with it.

    Nobody else is held up when it does not listen: it imports a compiler first. The threads die
    with this process without being waited for.
    """

    def __init__(self, children: int) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.closed = False
        self._children = children
        self._numbers = itertools.count()
        self._todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._waiting: dict[int, Future[Result]] = {}
        self._told: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    @property
    def busy(self) -> int:
        return len(self._waiting)

    def submit(self, backend: str, payload: bytes) -> Future[Result]:
        job, future = Job(next(self._numbers), backend, payload), Future[Result]()
        self._waiting[job.number] = future
        self._todo.put(job)
        if job.number == 0:
            self._thread(self._tell)
        return future

    def _tell(self) -> None:
        while True:
            job = self._todo.get()
            # A process that ended for want of work leaves a broken pipe.
            if not any(self._told_it(job) for _ in range(2)):
                self._fail([job.number], "it cannot be started")

    def _told_it(self, job: Job) -> bool:
        with self._lock:
            try:
                process = self._told[job.number] = self._running()
                assert process.stdin is not None
                write(process.stdin, job)
                return True
            except Exception:  # a broken pipe; no process or no thread to be had
                logger.debug("a process cannot be told what to compile", exc_info=True)
                self._told.pop(job.number, None)
                _end(self.process)
                self.process = None
                return False

    def _running(self) -> subprocess.Popen[bytes]:
        if self.closed:
            raise WorkerFailed("there are to be none any more")
        if self.process is None or self.process.poll() is not None:
            folder = str(Path(__file__).parent)
            alike = ["-s"] if sys.flags.no_user_site else []  # or it would find another torch
            self.process = subprocess.Popen(
                [sys.executable, *alike, "-c", _START, folder, str(self._children)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | _VARIABLES,
                start_new_session=FORKS,
            )
            if self.closed:  # meanwhile
                _end(self.process)
            self._thread(self._listen, self.process)
        return self.process

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        try:
            while (answer := read(process.stdout)) is not None:
                number, artifact, error, seconds = Answer(*answer)
                if artifact is None:
                    self._fail([number], str(error))
                else:
                    self._done(number).set_result(Result(artifact, seconds))
        except Exception:  # what came is no answer
            logger.debug("a process that compiles is not understood", exc_info=True)
            _end(process)
        process.wait()
        with self._lock:  # what comes later is told to another
            lost = [number for number, told in list(self._told.items()) if told is process]
        self._fail(lost, "the process ended")

    def _fail(self, numbers: list[int], reason: str) -> None:
        for number in numbers:
            self._done(number).set_exception(WorkerFailed(reason))

    def _done(self, number: int) -> Future[Result]:
        # Without the lock, which is held while a job is told: a process with answers that nobody
        # reads reads no jobs either.
        self._told.pop(number, None)
        return self._waiting.pop(number)

    @staticmethod
    def _thread(target: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=target, args=args, name="blade-compile", daemon=True).start()


def _end(process: subprocess.Popen[bytes] | None) -> None:
    """End it at once, with its children."""
    if process is not None and process.poll() is None:
        with suppress(OSError):  # it has ended by now
            if FORKS:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()


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
    room = min(free // _VRAM_BYTES, free_memory() // _MEMORY_BYTES)
    return max(1, min(_MOST, cores() - 2, room))
