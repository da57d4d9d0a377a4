"""What a process does that only compiles; jobs.py starts it.

Reads jobs from standard input and writes answers to standard output, each a pickle behind its
length; ends when the input does, or after a time without work.

Importing a compiler takes longer than most graphs do. So where processes can fork, one imports it
and forks a child for each job, several at a time; elsewhere it does one job after the other.
"""

from __future__ import annotations

import os
import pickle
import select
import struct
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from .backends import BACKENDS

FORKS = hasattr(os, "fork")

_LENGTH = struct.Struct("<Q")
_IDLE_SECONDS = 60.0
"""On a GPU a process that has compiled holds half a gigabyte."""


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


def main(children: int) -> None:
    """Compile until there is nothing more to read, by so many children at a time."""
    jobs = os.fdopen(os.dup(0), "rb", buffering=0)  # what is read ahead cannot be waited for
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no answer
    warnings.simplefilter("ignore")  # whoever can do something about them has seen them
    with suppress(OSError, AttributeError):
        os.nice(10)  # sampling goes on meanwhile
    if FORKS:
        _by_children(jobs, answers, children)
    else:
        _one_by_one(jobs, answers)


@dataclass
class _Child:
    """A fork that compiles one job: the end of its pipe, and what came through that so far."""

    job: Job
    process: int
    pipe: int
    content: bytearray = field(default_factory=bytearray)

    def fileno(self) -> int:
        return self.pipe

    def has_ended(self) -> bool:
        """Take what has come."""
        part = os.read(self.pipe, 2**20)
        self.content += part
        return not part

    def answer(self) -> bytes:
        """What to pass on, once it has ended."""
        os.close(self.pipe)
        os.waitpid(self.process, 0)
        whole = self.content[: _LENGTH.size] == _LENGTH.pack(len(self.content) - _LENGTH.size)
        if whole:
            return bytes(self.content)
        return _packed(Answer(self.job.number, None, "the process ended", 0.0))


def _by_children(jobs: IO[bytes], answers: IO[bytes], most: int) -> None:
    for backend in BACKENDS.values():
        backend.preload()
    children: list[_Child] = []
    while True:
        wanted: list[Any] = [*children, *([jobs] if len(children) < most else [])]
        ready = select.select(wanted, [], [], _IDLE_SECONDS)[0]
        if not ready and not children:
            return
        for source in ready:
            if not isinstance(source, _Child):
                job = read(jobs)
                if job is None:
                    return
                children.append(_fork(Job(*job), children))
            elif source.has_ended():
                children.remove(source)
                answers.write(source.answer())
                answers.flush()


def _fork(job: Job, others: list[_Child]) -> _Child:
    reads, writes = os.pipe()
    process = os.fork()
    if process:
        os.close(writes)
        return _Child(job, process, reads)
    try:
        for pipe in (reads, *(other.pipe for other in others)):
            os.close(pipe)
        with os.fdopen(writes, "wb") as stream:
            write(stream, _compiled(job))
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
