"""What a process does that only compiles; pool.py starts it.

Reads jobs from standard input and writes answers to standard output, each a pickle behind its
length; ends when the input does, or after a time without work.

Importing a compiler takes longer than most graphs do. So where processes can fork, one imports it
and forks children, several at a time; elsewhere it does one job after the other.
"""

from __future__ import annotations

import gc
import os
import pickle
import select
import signal
import struct
import sys
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from .backends import BACKENDS

FORKS = hasattr(os, "fork") and sys.platform != "darwin"
"""Whether a process that has imported a compiler can fork. On a Mac its frameworks forbid it."""

_LENGTH = struct.Struct("<Q")
_IDLE_SECONDS = 60.0
"""A process that has compiled may hold half a gigabyte of a GPU."""
_PARENT_SECONDS = 300.0
"""One that forks never asks a GPU: it holds some 0.3 GiB of main memory (seen with torch for CPUs),
and another size, minutes after the first, would wait for its imports again."""


class Job(NamedTuple):
    """A graph to compile: `payload` is what `Backend.job` gave, `number` comes with the answer."""

    number: int
    backend: str
    payload: bytes


class Answer(NamedTuple):
    """The artifact or what went wrong, and how long it took."""

    number: int
    artifact: bytes | None
    error: str | None
    seconds: float


def main(children: int, output: int) -> None:
    """Compile until there is nothing more to read, by so many children at a time.

    output: the descriptor for answers; standard output takes what compilers print.
    """
    jobs = os.fdopen(os.dup(0), "rb", buffering=0)  # what is read ahead cannot be waited for
    answers = os.fdopen(output, "wb")
    warnings.simplefilter("ignore")  # whoever can do something about them has seen them
    with suppress(OSError, AttributeError):
        os.nice(10)  # sampling goes on meanwhile
    if FORKS:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or nobody could wait for a child
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        _by_children(jobs, answers, children)
    else:
        _one_by_one(jobs, answers)


@dataclass(eq=False)
class _Child:
    """A fork that compiles: the ends of its pipes, the job that it has, and what came of that."""

    process: int
    jobs: IO[bytes]
    answers: int
    job: Job | None = None
    content: bytearray = field(default_factory=bytearray)

    def fileno(self) -> int:
        return self.answers

    def begin(self, job: Job) -> None:
        """Give it a job. That it has died shows when it is asked for the answer."""
        self.job = job
        self.content.clear()
        with suppress(BrokenPipeError):
            write(self.jobs, job)

    def has_answered(self) -> bool:
        """Take what has come; whether that is all that is going to."""
        part = os.read(self.answers, 2**20)
        self.content += part
        return not part or self._is_whole()

    def answer(self) -> bytes:
        """What to pass on."""
        assert self.job is not None
        if self._is_whole():
            return bytes(self.content)
        return _packed(Answer(self.job.number, None, "the process ended", 0.0))

    def may_go_on(self) -> bool:
        """Whether another job would not meet what became of this one: a GPU that faulted is lost
        to its process."""
        return (
            self._is_whole() and Answer(*pickle.loads(self.content[_LENGTH.size :])).error is None
        )

    def end(self) -> int:
        """Let it end, which it does by itself; return its process."""
        with suppress(BrokenPipeError):
            self.jobs.close()
        os.close(self.answers)
        return self.process

    def _is_whole(self) -> bool:
        size = len(self.content) - _LENGTH.size
        return size >= 0 and self.content[: _LENGTH.size] == _LENGTH.pack(size)


def _by_children(jobs: IO[bytes], answers: IO[bytes], most: int) -> None:
    """A child lives as long as there is another job for it: the first takes each of them longer,
    and those that wait would hold memory."""
    gc.disable()
    for backend in BACKENDS.values():
        backend.preload()
    gc.freeze()  # what is there stays, and no child needs to look through it
    gc.enable()
    children: list[_Child] = []
    ending: list[int] = []
    while True:
        ending = [process for process in ending if os.waitpid(process, os.WNOHANG)[0] == 0]
        wanted: list[Any] = [*children, *([jobs] if len(children) < most else [])]
        ready = select.select(wanted, [], [], _PARENT_SECONDS)[0]
        if not ready and not children:
            return
        free: list[_Child] = []
        for child in [child for child in children if child in ready and child.has_answered()]:
            answers.write(child.answer())
            answers.flush()
            if child.may_go_on():
                free.append(child)
            else:
                children.remove(child)
                ending.append(child.end())
        while (free or len(children) < most) and _is_readable(jobs):
            job = read(jobs)
            if job is None:
                return
            if not free:
                free.append(_fork(children, jobs, answers))
                children.append(free[-1])
            free.pop().begin(Job(*job))
        for child in free:
            children.remove(child)
            ending.append(child.end())


def _is_readable(stream: IO[bytes]) -> bool:
    return bool(select.select([stream], [], [], 0)[0])


def _fork(others: list[_Child], *mine: IO[bytes]) -> _Child:
    jobs, to_child = os.pipe()
    answers, from_child = os.pipe()
    process = os.fork()
    if process:
        os.close(jobs)
        os.close(from_child)
        return _Child(process, os.fdopen(to_child, "wb"), answers)
    try:
        # Or they would not learn that the other end was closed.
        for end in (
            to_child,
            answers,
            *(end.fileno() for end in mine),
            *(end for o in others for end in (o.jobs.fileno(), o.answers)),
        ):
            os.close(end)
        with os.fdopen(jobs, "rb") as todo, os.fdopen(from_child, "wb") as done:
            while (job := read(todo)) is not None:
                write(done, _compiled(Job(*job)))
    finally:
        os._exit(0)  # nothing of the parent's is to be cleaned up


def _one_by_one(jobs: IO[bytes], answers: IO[bytes]) -> None:
    while True:
        idle = threading.Timer(_IDLE_SECONDS, os._exit, (0,))
        idle.daemon = True
        idle.start()
        job = read(jobs)
        idle.cancel()
        if job is None:
            return
        write(answers, _compiled(Job(*job)))


def _compiled(job: Job) -> Answer:
    start = time.perf_counter()
    try:
        artifact, error = BACKENDS[job.backend].compile_job(job.payload), None
    except Exception as failure:  # whatever a compiler raises: the other side decides
        artifact, error = None, f"{type(failure).__name__}: {failure}".strip().splitlines()[0]
    return Answer(job.number, artifact, error, time.perf_counter() - start)


def read(stream: IO[bytes]) -> Any:
    """Return what the other side wrote, as a plain tuple, or None at its end."""
    head = _exactly(stream, _LENGTH.size)
    if head is None:
        return None
    body = _exactly(stream, *_LENGTH.unpack(head))
    return None if body is None else pickle.loads(body)


def write(stream: IO[bytes], value: Job | Answer) -> None:
    """Write `value` for `read`."""
    stream.write(_packed(value))
    stream.flush()


def _packed(value: Job | Answer) -> bytes:
    # Plain: the host gives this package another name than this process has for it.
    body = pickle.dumps(tuple(value))
    return _LENGTH.pack(len(body)) + body


def _exactly(stream: IO[bytes], size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = stream.read(size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)
