"""Graphs on disk: what is read back, what is not, and whose files are never opened."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blade.blade_core.config import store_bytes, store_folder
from blade.blade_core.counters import Counters
from blade.blade_core.errors import InvalidChoice
from blade.blade_core.key import GraphKey
from blade.blade_core.log import forget_said
from blade.blade_core.private import why_not_private
from blade.blade_core.store import GraphStore

posix = pytest.mark.skipif(sys.platform == "win32", reason="modes say nothing on Windows")
MIB = 2**20


@pytest.fixture(autouse=True)
def _say_everything() -> Iterator[None]:
    forget_said()
    yield
    forget_said()


def store_of(folder: Path, budget: int = MIB) -> GraphStore:
    return GraphStore(folder, budget, Counters())


def key_of(number: int = 0) -> GraphKey:
    return GraphKey(f"structure {number}", ((2, 4),), "layout", "fake 1.0", "cpu", label="Unit 4→8")


def path_of(folder: Path, key: GraphKey) -> Path:
    return folder / f"{key.id}.graph"


# --- the folder ---------------------------------------------------------------------------------


def test_what_was_written_is_read(folder: Path) -> None:
    artifact = b"\n\x00 any bytes \n" * 3
    store_of(folder).write(key_of(), artifact)
    other = store_of(folder)
    assert other.read(key_of()) == artifact
    assert other.read(key_of(1)) is None
    assert other.stored().graphs == 1
    assert [path.name for path in folder.iterdir()] == [f"{key_of().id}.graph"]


def test_a_missing_folder_is_made_for_its_user_only(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a" / "b")
    assert store.read(key_of()) is None
    assert store.stored() == store.clear() == (0, 0)
    assert not store.folder.exists()
    store.write(key_of(), b"graph")
    assert store.read(key_of()) == b"graph"
    if sys.platform != "win32":
        assert store.folder.stat().st_mode & 0o777 == 0o700
        assert path_of(store.folder, key_of()).stat().st_mode & 0o777 == 0o600


def test_a_file_says_in_its_first_line_what_it_is(folder: Path) -> None:
    store_of(folder).write(key_of(), b"graph")
    with path_of(folder, key_of()).open("rb") as file:
        said = json.loads(file.readline())
    assert said["label"] == "Unit 4→8"
    assert said["key"] == key_of().text
    assert said["bytes"] == 5


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _say(name: str, value: Any) -> Any:
    def say(path: Path) -> None:
        head, _, artifact = path.read_bytes().partition(b"\n")
        path.write_bytes(json.dumps(json.loads(head) | {name: value}).encode() + b"\n" + artifact)

    return say


DAMAGE = {
    "cut off": _cut,
    "one bit flipped": _flip,
    "empty": lambda path: path.write_bytes(b""),
    "no line": lambda path: path.write_bytes(b"\xff" * 100),
    "no object": lambda path: path.write_bytes(b"[1, 2]\ngraph"),
    "of another key": _say("key", key_of(9).text),
    "of another format": _say("format", 0),
    "without a checksum": _say("sha256", None),
}


@pytest.mark.parametrize("spoil", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_deleted_with_one_message(
    spoil: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of(folder)
    for number in range(2):
        store.write(key_of(number), b"graph")
        spoil(path_of(folder, key_of(number)))
    with caplog.at_level(logging.WARNING, "blade"):
        assert store.read(key_of(0)) is store.read(key_of(1)) is None
    assert list(folder.iterdir()) == []
    assert store._counters["artifacts_dropped"] == 2
    assert len(caplog.messages) == 1 and "damaged or out of date" in caplog.messages[0]


def test_the_least_recently_used_go_first(folder: Path) -> None:
    size = 10_000
    store = store_of(folder, budget=3 * size + 3000)
    for number in range(3):
        store.write(key_of(number), b"x" * size)
        os.utime(path_of(folder, key_of(number)), (number + 1, number + 1))
    assert store.read(key_of(0)) is not None  # used now
    store.write(key_of(3), b"x" * size)
    there = [number for number in range(4) if store.read(key_of(number)) is not None]
    assert there == [0, 2, 3]
    assert store.stored().nbytes <= store.budget


def test_what_is_larger_than_the_budget_is_not_stored(folder: Path) -> None:
    store = store_of(folder, budget=1000)
    store.write(key_of(), b"small")
    store.write(key_of(1), b"x" * 1001)
    assert store.read(key_of()) == b"small"
    assert store.stored().graphs == 1


def test_clear_says_what_it_deleted(folder: Path) -> None:
    store = store_of(folder)
    store.write(key_of(), b"graph")
    other = folder / "readme.txt"
    other.write_text("not a graph")
    stored = store.stored()
    assert stored.graphs == 1 and store.clear() == stored
    assert list(folder.iterdir()) == [other]


def test_what_a_dead_process_left_half_written_goes(folder: Path) -> None:
    store = store_of(folder)
    for name, age in ((".old.graph.new", 7200.0), (".young.graph.new", 5.0)):
        (folder / name).write_bytes(b"half")
        then = time.time() - age
        os.utime(folder / name, (then, then))
    store.write(key_of(), b"graph")
    assert sorted(p.name for p in folder.glob(".*")) == [".young.graph.new"]


def test_a_write_that_fails_leaves_nothing_and_warns_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = store_of(folder)
    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING, "blade"):
        store.write(key_of(), b"graph")
        store.write(key_of(1), b"graph")
    assert list(folder.iterdir()) == []
    (message,) = caplog.messages
    assert "No space left" in message and "BLADE_CACHE_DIR" in message


def test_processes_may_write_and_clear_beside_each_other(folder: Path) -> None:
    """Whoever reads sees a whole graph or none."""
    end = time.monotonic() + 1.0
    wrong: list[object] = []

    def write(number: int) -> None:
        store = store_of(folder, budget=40_000)
        while time.monotonic() < end:
            for n in range(6):
                store.write(key_of(n), bytes([n]) * 9_000)
            if number == 0:
                store.clear()

    def read() -> None:
        store = store_of(folder)
        while time.monotonic() < end:
            for n in range(6):
                found = store.read(key_of(n))
                if found is not None and found != bytes([n]) * 9_000:
                    wrong.append(found)
        wrong.extend(["dropped"] * store._counters["artifacts_dropped"])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert list(folder.glob(".*")) == []


# --- whose it is --------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("mode", [0o777, 0o702, 0o1777], ids=oct)
def test_a_folder_that_others_may_write_to_is_not_used(
    mode: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store_of(folder).write(key_of(), b"graph")
    folder.chmod(mode)
    store = store_of(folder)
    with caplog.at_level(logging.WARNING, "blade"):
        assert store.read(key_of()) is None
        store.write(key_of(1), b"graph")
    assert not path_of(folder, key_of(1)).exists()
    assert path_of(folder, key_of()).exists()  # not ours to delete
    (message,) = caplog.messages
    assert "other users may write to" in message


@posix
def test_a_folder_above_counts_too(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "graphs"
    folder.mkdir(parents=True)
    assert why_not_private(folder) is None
    folder.parent.chmod(0o777)
    assert why_not_private(folder) == f"other users may write to {folder.parent}"
    folder.parent.chmod(0o1777)  # as /tmp is: others cannot rename what is not theirs
    assert why_not_private(folder) is None


@posix
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give away")
def test_what_belongs_to_another_user_is_not_used(folder: Path) -> None:
    os.chown(folder, 1234, 1234)
    assert why_not_private(folder) == f"{folder} belongs to another user"


@posix
@pytest.mark.parametrize("how", ["writable", "link"])
def test_a_file_that_others_can_have_written_is_not_opened(how: str, folder: Path) -> None:
    store = store_of(folder)
    store.write(key_of(), b"graph")
    path = path_of(folder, key_of())
    if how == "writable":
        path.chmod(0o666)
    else:
        path.rename(folder / "elsewhere")
        path.symlink_to(folder / "elsewhere")
    assert store.read(key_of()) is None
    assert store._counters["artifacts_dropped"] == 1


# --- where it is --------------------------------------------------------------------------------


def test_folder_and_budget_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLADE_CACHE_DIR", str(tmp_path))
    assert store_folder() == tmp_path
    monkeypatch.delenv("BLADE_CACHE_DIR")
    if sys.platform != "win32":
        monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
        assert store_folder() == Path("/caches/comfyui-blade")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert store_folder() == Path.home() / ".cache" / "comfyui-blade"
    for text, mib in (("0", 0), ("7", 7), (None, 4096)):
        if text is None:
            monkeypatch.delenv("BLADE_DISK_CACHE_MIB")
        else:
            monkeypatch.setenv("BLADE_DISK_CACHE_MIB", text)
        assert store_bytes() == mib * MIB
    monkeypatch.setenv("BLADE_DISK_CACHE_MIB", "much")
    with pytest.raises(InvalidChoice, match="BLADE_DISK_CACHE_MIB is 'much'"):
        store_bytes()
