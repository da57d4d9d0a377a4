"""What attention depends on besides its inputs: flags, free memory, and who else replaced what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as host
import comfy.ops
import pytest
import torch
from blade_tests.host.tiny import SD15, make_model, relative_rms, sample

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.engine import Engine
from blade.blade_core.host import attention
from blade.blade_core.host.model import Session, optimize_model

EAGER = OptimizeConfig(backend="eager", on_failure="error")
BOUND = 1e-4
pytestmark = pytest.mark.parametrize("session", ["launched"], indirect=True)


@pytest.fixture(autouse=True)
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_others", {})


def choose(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As the host does at its start, for a flag or for want of anything else."""
    for chosen in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(host, chosen, getattr(host, name))


@pytest.mark.parametrize("name", ["attention_split", "attention_sub_quad"])
def test_what_asks_for_free_memory_runs_as_stock(
    session: Session, sd15: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A graph would hold what was free when it was traced."""
    choose(monkeypatch, name)
    expected = sample(sd15)
    assert relative_rms(sample(optimize_model(sd15, EAGER)), expected) <= BOUND
    blocks = session.stats(sd15.model.diffusion_model, EAGER)["models"][0]["blocks"]
    reasons = {reason for block in blocks for reason in block["reasons"]}
    assert reasons == {f"its attention is {name}, which asks for free memory while it runs"}
    assert {block["state"] for block in blocks} == {"compiled", "eager"}


@pytest.mark.parametrize("flag", ["forced", "never"])
def test_the_precision_of_attention_is_in_the_key(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str
) -> None:
    """--force-upcast-attention is given at a restart, against black images."""
    choose(monkeypatch, "attention_basic")
    for restarted in (False, True):
        session.engine = Engine(store=(tmp_path, 2**30))
        session.captures.counters = session.engine.counters
        if restarted and flag == "forced":
            monkeypatch.setattr(
                host, "FORCE_UPCAST_ATTENTION_DTYPE", {torch.float16: torch.float32}
            )
        elif restarted:
            monkeypatch.setattr(host.args, "dont_upcast_attention", True)
        with session.engine.counters.expect(graphs_loaded=0):
            sample(optimize_model(make_model(SD15), EAGER))


@pytest.mark.parametrize("owner", [torch.nn.functional, comfy.ops], ids=["torch", "the host"])
def test_another_function_that_attention_calls(
    session: Session, sd15: Any, monkeypatch: pytest.MonkeyPatch, owner: Any
) -> None:
    """Some packs replace torch's own, between two prompts."""
    plain = sample(optimize_model(sd15, EAGER))
    own = owner.scaled_dot_product_attention

    def other(q: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        result: torch.Tensor = own(q * 1.3, *args, **more)
        return result

    monkeypatch.setattr(owner, "scaled_dot_product_attention", other)
    expected = sample(sd15)
    assert relative_rms(expected, plain) > 1e-3
    assert relative_rms(sample(optimize_model(sd15, EAGER)), expected) <= BOUND
    with session.engine.counters.expect(graphs_compiled=0):
        sample(optimize_model(sd15, EAGER))
    monkeypatch.undo()
    assert relative_rms(sample(optimize_model(sd15, EAGER)), plain) <= BOUND


def test_a_prompt_in_autocast_runs_as_stock(session: Session, tmp_path: Path) -> None:
    """It leaves no graphs for prompts without, and costs none of those on disk."""
    session.engine = Engine(store=(tmp_path, 2**30))
    session.captures.counters = session.engine.counters
    expected = sample(make_model(SD15))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sample(make_model(SD15))
        with session.engine.counters.expect(graphs_compiled=0, blocks_compiled=0):
            assert torch.equal(sample(optimize_model(make_model(SD15), EAGER)), cast)
    assert relative_rms(cast, expected) > BOUND
    assert relative_rms(sample(optimize_model(make_model(SD15), EAGER)), expected) <= BOUND
    session.engine = Engine(store=(tmp_path, 2**30))
    session.captures.counters = session.engine.counters
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample(optimize_model(make_model(SD15), EAGER))
    with session.engine.counters.expect(graphs_compiled=0, artifacts_dropped=0):
        sample(optimize_model(make_model(SD15), EAGER))
