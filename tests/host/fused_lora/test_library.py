"""LoRA files are read once, and again when they changed or were too many to hold."""

import gc
import os
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
from blade_tests.host.fused_lora.memory import tensor_bytes
from blade_tests.host.lora_files import (
    SMALL,
    assert_near,
    changed,
    distance,
    fuse,
    loaded,
    make,
    row,
    stock,
    widgets,
)
from blade_tests.host.tiny import make_model

from blade.blade_core.host.model import Session
from blade.nodes.fused_lora import BladeFusedLoRA

WEIGHTS = 1e-6
ONCE = pytest.mark.parametrize("session", ["launched"], indirect=True)


def rewrite(folder: Path, name: str, seed: int, *, seconds: int) -> None:
    """Another LoRA under the same name and of the same size, changed `seconds` later."""
    path = folder / f"{name}.safetensors"
    modified = path.stat().st_mtime_ns
    before = path.stat().st_size
    other = folder / "other.safetensors"
    make(make_model(SMALL), seed=seed).save(folder, "other")
    path.write_bytes(other.read_bytes())  # the same inode: what is mapped would change
    other.unlink()
    assert path.stat().st_size == before
    os.utime(path, ns=(modified, modified + seconds * 10**9))


@ONCE
def test_files_are_read_once(session: Session, own: Path, small: Any) -> None:
    for seed, name in enumerate(("a", "b")):
        make(small, seed=seed).save(own, name)
    a, half, b = [row("a")], [row("a", 0.5)], [row("b")]
    theirs = {}
    for name, rows in (("a", a), ("half", half), ("b", b)):
        theirs[name] = loaded(stock(small, rows)[0])
    comfy.model_management.unload_all_models()
    reads = session.loras.reads
    assert_near(loaded(fuse(small, a)[0]), theirs["a"], WEIGHTS)
    assert_near(loaded(fuse(small, b)[0]), theirs["b"], WEIGHTS)
    assert session.loras.reads == reads + 2
    # Nobody can tell from outside that this file was rewritten: what was read is what counts.
    rewrite(own, "a", 7, seconds=0)
    assert_near(loaded(fuse(small, a)[0]), theirs["a"], WEIGHTS)
    assert_near(loaded(fuse(small, half)[0]), theirs["half"], WEIGHTS)
    assert session.loras.reads == reads + 2
    assert 0 < session.loras.nbytes <= session.loras.budget


@ONCE
def test_a_file_that_changed_is_read_again(session: Session, own: Path, small: Any) -> None:
    make(small, seed=0).save(own, "a")
    rows = [row("a")]
    assert BladeFusedLoRA.IS_CHANGED(**widgets([row("nowhere")])) is not None
    version = BladeFusedLoRA.IS_CHANGED(**widgets(rows))
    assert BladeFusedLoRA.IS_CHANGED(**widgets(rows)) == version
    before = fuse(small, rows)[0]
    old = loaded(before)
    rewrite(own, "a", 7, seconds=1)
    assert BladeFusedLoRA.IS_CHANGED(**widgets(rows)) != version
    after = fuse(small, rows)[0]
    assert after.patches_uuid != before.patches_uuid
    new, theirs = loaded(after), loaded(stock(make_model(SMALL), rows)[0])
    assert_near(new, theirs, WEIGHTS)
    assert distance(new, old, changed(new, old)) > 0.05
    assert_near(loaded(before), old, WEIGHTS)  # a clone keeps what it was made of


def held_bytes(session: Session) -> int:
    """The memory that tensors of files take which nothing but the library keeps alive."""
    gc.collect()
    before = tensor_bytes()
    session.loras = type(session.loras)(session.loras.budget)
    return before - tensor_bytes()


@ONCE
@pytest.mark.parametrize("names", [("lora", "kron"), ("dora", "oft")])
def test_the_budget_counts_what_is_held(
    session: Session, own: Path, small: Any, names: tuple[str, ...]
) -> None:
    make(small, kinds=("oft",), only="attn", seed=6).save(own, "oft")
    for name in names:
        fuse(small, [row(name)])
    counted = session.loras.nbytes
    assert held_bytes(session) <= 1.1 * counted


@ONCE
def test_files_beyond_the_budget_are_read_again(session: Session, own: Path, small: Any) -> None:
    rows = [[row(name)] for name in ("lora", "dora", "kron", "loha")]
    theirs = [loaded(stock(make_model(SMALL), one)[0]) for one in rows]
    fuse(small, [one[0] for one in rows])
    session.loras.budget = session.loras.nbytes // 4
    for _ in range(2):
        for one, expected in zip(rows, theirs, strict=True):
            assert_near(loaded(fuse(small, one)[0]), expected, 1e-5)
    assert session.loras.reads > 8
    together = [one[0] for one in rows]
    expected = loaded(stock(make_model(SMALL), together)[0])
    assert_near(loaded(fuse(small, together)[0]), expected, 1e-5)
