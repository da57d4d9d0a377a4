"""BladeWarmUp and BladeClearCache: what was got ready is not compiled, what was cleared is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blade_tests.host.tiny import conditioning, relative_rms, sample
from blade_tests.unit.samples import CPU, request_of

from blade.blade_core.backends import BACKENDS
from blade.blade_core.backends.inductor import InductorBackend
from blade.blade_core.config import OptimizeConfig
from blade.blade_core.engine import Engine
from blade.blade_core.errors import InvalidChoice
from blade.blade_core.host.model import Session, optimize_model
from blade.blade_core.host.warm_up import read_batches, read_sizes, warm_up

BOUND = 1e-4
EAGER = OptimizeConfig(backend="eager", on_failure="error")


def _warm(model: Any, text: str, batches: tuple[int, ...] = (1,), cfg: float = 5.0) -> list[str]:
    prompts = conditioning(seed=5), conditioning(seed=6)
    with torch.inference_mode():
        return warm_up(model, *prompts, read_sizes(text), batches, cfg)


def test_what_was_warmed_up_is_not_compiled_again(session: Session, sd15: Any) -> None:
    expected = [sample(sd15, size=size, batch=2) for size in ((16, 16), (8, 24))]
    model = optimize_model(sd15, EAGER)
    with session.engine.counters.expect(runs=2, graphs_loaded=0, blocks_eager=0):
        lines = _warm(model, "128x128, 192x64", (2,))
    compiled = session.engine.counters["graphs_compiled"]
    assert compiled > 0
    assert [line.split(":")[0] for line in lines] == ["128x128, batch 2", "192x64, batch 2"]
    assert sum(int(line.split(": ")[1].split()[0]) for line in lines) == compiled
    with session.engine.counters.expect(graphs_compiled=0, captures=0):
        for size, stock in zip(((16, 16), (8, 24)), expected, strict=True):
            assert relative_rms(sample(model, size=size, batch=2), stock) <= BOUND


def test_sizes_in_use_are_nothing_new(session: Session, sd15: Any) -> None:
    model = optimize_model(sd15, EAGER)
    sample(model)
    (line,) = _warm(model, "128x128")
    assert line.startswith("128x128, batch 1: 0 graphs compiled, 0 loaded, ")


def test_no_random_number_is_drawn(session: Session, sd15: Any) -> None:
    model = optimize_model(sd15, EAGER)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    _warm(model, "128x128")
    assert torch.equal(torch.rand(3), expected)


def test_a_model_without_blade_is_not_sampled(session: Session, sd15: Any) -> None:
    with session.engine.counters.expect(runs=0):
        (line,) = _warm(sd15, "128x128")
    assert "does not run through Blade Optimize Model" in line


def test_sizes_and_batches_as_people_write_them() -> None:
    assert read_sizes(" 512x768,1024 X 512;\n64\u00d716, 512x768,") == [
        (512, 768),
        (1024, 512),
        (64, 16),
    ]
    assert read_batches("1, 4 8;1") == [1, 4, 8]


@pytest.mark.parametrize(
    "text",
    ["", " , ", "512", "512x", "512x510", "8x64", "512x512x512", "-64x64", "0x64", "99999x64"],
)
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(InvalidChoice, match=r"^sizes (has '|is empty)"):
        read_sizes(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "one", "5000", "1x2"])
def test_what_is_no_batch_size_is_named(text: str) -> None:
    with pytest.raises(InvalidChoice, match=r"^batch_sizes (has '|is empty)"):
        read_batches(text)


def test_what_was_cleared_is_compiled_again(session: Session, sd15: Any) -> None:
    model = optimize_model(sd15, EAGER)
    first = sample(model)
    graphs = len(session.engine.cache)
    assert session.clear(disk=False, memory=False) == []
    assert session.clear(disk=True, memory=True) == [
        f"{graphs} graphs deleted from memory.",
        "Graphs on disk are turned off (BLADE_DISK_CACHE_MIB is 0).",
    ]
    assert session.stats(sd15.model.diffusion_model, EAGER)["models"][0]["captures"] == 0
    with session.engine.counters.expect(graphs_compiled=graphs):
        assert torch.equal(sample(model), first)


def test_graphs_on_disk_outlive_the_memory(session: Session, sd15: Any, tmp_path: Path) -> None:
    session.engine = Engine(store=(tmp_path, 2**30))
    session.captures.counters = counters = session.engine.counters
    model = optimize_model(sd15, EAGER)
    first = sample(model)
    graphs = len(session.engine.cache)
    session.clear(disk=False, memory=True)
    with counters.expect(graphs_compiled=0, graphs_loaded=graphs):
        assert torch.equal(sample(model), first)
    (line,) = session.clear(disk=True, memory=False)
    assert line.startswith(f"{graphs} graphs (") and line.endswith(f" deleted from {tmp_path}.")
    assert list(tmp_path.iterdir()) == []
    session.clear(disk=False, memory=True)
    with counters.expect(graphs_compiled=graphs, graphs_loaded=0):
        assert torch.equal(sample(model), first)


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_graphs_that_were_loaded_ahead_are_deleted_too(
    session: Session, tmp_path: Path, place: str
) -> None:
    inductor = BACKENDS["inductor"]
    request = request_of()
    request = replace(request, key=replace(request.key, backend=inductor.fingerprint()))
    ask: dict[str, Any] = {"checkpoint": lambda: None, "announce": lambda key: None}
    Engine(store=(tmp_path, 2**30)).graph(request.key, inductor, lambda: request, **ask)
    session.engine = engine = Engine(store=(tmp_path, 2**30))
    assert engine.store is not None
    engine.early.start(engine.store, InductorBackend(), CPU, lambda: None)
    engine.early.wait()
    assert len(engine.early) == 1
    (line,) = session.clear(disk=place == "disk", memory=place == "memory")
    assert line.startswith("1 graphs")
    assert len(engine.early) == 0
