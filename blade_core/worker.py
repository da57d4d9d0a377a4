"""What a process does that only compiles; jobs.py starts it.

Reads jobs from standard input and writes results to standard output, each a pickle behind its
length; ends when the input does, or after a time without work.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
import threading
import time
import warnings
from contextlib import suppress
from typing import IO, Any

from .backends import BACKENDS

_LENGTH = struct.Struct("<Q")
_IDLE_SECONDS = 60.0
"""On a GPU each of these processes holds half a gigabyte."""


def main() -> None:
    """Compile until there is nothing more to read."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no result
    warnings.simplefilter("ignore")  # whoever can do something about them has seen them
    with suppress(OSError, AttributeError):
        os.nice(10)  # sampling goes on meanwhile
    while True:
        idle = threading.Timer(_IDLE_SECONDS, os._exit, (0,))
        idle.daemon = True
        idle.start()
        job = read(sys.stdin.buffer)
        idle.cancel()
        if job is None:
            return
        start = time.perf_counter()
        try:
            artifact, error = BACKENDS[job["backend"]].compile_job(job["payload"]), None
        except Exception as failure:  # whatever a compiler raises: the other side decides
            artifact, error = None, f"{type(failure).__name__}: {failure}".strip().splitlines()[0]
        seconds = time.perf_counter() - start
        write(results, {"artifact": artifact, "error": error, "seconds": seconds})


def read(stream: IO[bytes]) -> Any:
    """Return what the other side wrote, or None at its end."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    body = stream.read(size)
    return pickle.loads(body) if len(body) == size else None


def write(stream: IO[bytes], value: Any) -> None:
    """Write `value` for `read`."""
    body = pickle.dumps(value)
    stream.write(_LENGTH.pack(len(body)))
    stream.write(body)
    stream.flush()
