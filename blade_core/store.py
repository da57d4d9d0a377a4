"""Graphs on disk: compiled once for a kind of GPU and of model, loaded by every later process.

One file a graph, named by its key. Whoever can write such a file can make ComfyUI run any code,
so that files are only read from a folder that is its user's own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .config import FORMAT_VERSION
from .counters import Counters
from .errors import first_line
from .key import GraphKey
from .log import logger, warn_once
from .private import read_private, why_not_private

_SUFFIX = ".graph"
_ABANDONED_SECONDS = 3600.0
"""Age at which a half-written file belongs to a process that is gone."""


class Stored(NamedTuple):
    """How many graphs, of how many bytes."""

    graphs: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.graphs} graphs ({self.nbytes / 2**20:.1f} MiB)"


class GraphStore:
    """A folder of graphs within a budget in bytes, least recently used out first.

    Any number of processes may share the folder. A file is a line of JSON that says what it
    holds, and the bytes that `Backend.compile` gave for it. What is damaged, or not what its
    key says, is deleted and compiled again.
    """

    def __init__(self, folder: Path, budget: int, counters: Counters) -> None:
        self.folder = folder
        self.budget = budget
        self._counters = counters
        self._usable: bool | None = None  # asked when it is first needed

    def __contains__(self, key: GraphKey) -> bool:
        return os.path.isfile(self._path(key))  # False too where nobody may look

    def read(self, key: GraphKey) -> bytes | None:
        """Return what was stored for `key`, or None."""
        path = self._path(key)
        if key not in self or not self._is_ours():
            return None
        try:
            head, _, artifact = read_private(path).partition(b"\n")
            damage = _damage(head, artifact, key)
            if damage is None:
                self.touch(key)
                return artifact
        except FileNotFoundError:  # another process made room
            return None
        except OSError as error:
            if error.errno not in (None, errno.ELOOP):  # the disk's fault, not the file's
                warn_once(f"Blade cannot read {path} ({first_line(error)}) and compiles it again.")
                return None
            damage = first_line(error)
        except ValueError as error:
            damage = first_line(error)
        self.drop(key, damage)
        return None

    def touch(self, key: GraphKey) -> None:
        """The graph of `key` is used now."""
        with suppress(OSError):  # of a folder that may only be read
            os.utime(self._path(key))

    def latest(self, count: int, seconds: float) -> Iterator[tuple[str, str, bytes]]:
        """(id and text of the key, artifact) of up to `count` graphs, the one used last in front,
        and others that were used in the `seconds` before it.

        What is damaged is left out, for `read` to say so.
        """
        files = self._files()
        if not files or not self._is_ours():
            return
        for used, _, path in reversed(files[-count:]):
            if used < files[-1][0] - seconds:
                return
            with suppress(OSError, ValueError):
                head, _, artifact = read_private(path).partition(b"\n")
                found = json.loads(head)
                if isinstance(found, dict) and found == found | _content(artifact):
                    yield path.name.removesuffix(_SUFFIX), str(found.get("key")), artifact

    def write(self, key: GraphKey, artifact: bytes) -> None:
        """Store the artifact of `key`; a disk that is full or read-only costs a warning."""
        if len(artifact) > self.budget:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_ours():
                return
            head = json.dumps(_manifest(key, artifact)).encode()
            _write_whole(self._path(key), head + b"\n" + artifact)
            self._make_room()
        except OSError as error:
            warn_once(
                f"Blade cannot keep compiled graphs in {self.folder} ({first_line(error)}): they "
                "are compiled again after a restart. Free space there, or set BLADE_CACHE_DIR to "
                "a folder that ComfyUI may write to."
            )

    def drop(self, key: GraphKey, reason: str) -> None:
        """Delete a file that cannot be used."""
        self._counters.add("artifacts_dropped")
        logger.debug("stored graph %s dropped: %s", key, reason)
        warn_once(
            f"Some compiled graphs in {self.folder} were damaged or out of date; Blade deletes "
            f"them and compiles them again. (First: {key.label}, {reason}.)"
        )
        with suppress(OSError):
            self._path(key).unlink()

    def stored(self) -> Stored:
        """What is in the folder now."""
        sizes = [size for _, size, _ in self._files()]
        return Stored(len(sizes), sum(sizes))

    def used_within(self, seconds: float) -> bool:
        """Whether a graph was written or read in the last `seconds`."""
        files = self._files()
        return bool(files) and time.time() - files[-1][0] < seconds

    def report(self) -> dict[str, str | int]:
        """Where graphs lie and how many, as plain data."""
        graphs, nbytes = self.stored()
        return {
            "folder": str(self.folder),
            "graphs": graphs,
            "bytes": nbytes,
            "budget_bytes": self.budget,
        }

    def clear(self) -> Stored:
        """Delete all graphs; return what was deleted."""
        deleted = [size for _, size, path in self._files() if _delete(path)]
        return Stored(len(deleted), sum(deleted))

    def _path(self, key: GraphKey) -> Path:
        return self.folder / f"{key.id}{_SUFFIX}"

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of each graph, the least recently used first."""
        found = []
        with suppress(OSError):
            for entry in os.scandir(self.folder):
                if entry.name.endswith(_SUFFIX):
                    with suppress(OSError):  # gone by now
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return sorted(found)

    def _make_room(self) -> None:
        for path in self.folder.glob(f"*{_SUFFIX}.new"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
        files = self._files()
        excess = sum(size for _, size, _ in files) - self.budget
        for _, size, path in files[:-1]:  # the newest is what was just written
            if excess <= 0:
                break
            if _delete(path):
                excess -= size

    def _is_ours(self) -> bool:
        """Whether nobody else can put files into the folder."""
        if self._usable is None:
            try:
                reason = why_not_private(self.folder)
            except OSError as error:  # of a folder above it
                reason = first_line(error)
            self._usable = reason is None
            if reason is not None:
                warn_once(
                    f"Blade does not use the compiled graphs in {self.folder}: {reason}, and a "
                    "graph is code. Take the permission away, or set BLADE_CACHE_DIR to a folder "
                    "of your own."
                )
        return self._usable


def _manifest(key: GraphKey, artifact: bytes) -> dict[str, str | int]:
    return {
        "label": key.label,
        "key": key.text,
        **_content(artifact),
    }


def _content(artifact: bytes) -> dict[str, str | int]:
    digest = hashlib.sha256(artifact).hexdigest()
    return {"format": FORMAT_VERSION, "bytes": len(artifact), "sha256": digest}


def _damage(head: bytes, artifact: bytes, key: GraphKey) -> str | None:
    expected = _manifest(key, artifact)
    found = json.loads(head)
    if not isinstance(found, dict):
        return "it says nothing of what it holds"
    wrong = [name for name in expected if name != "label" and found.get(name) != expected[name]]
    return f"another {wrong[0]}" if wrong else None


def _write_whole(path: Path, content: bytes) -> None:
    """Write so that nobody ever reads a part: beside it first, then renamed."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=f"{_SUFFIX}.new")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        _delete(Path(name))
        raise


def _delete(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:  # gone already, or (Windows) another process reads it
        return False
    return True
