"""BladeOptimizeModel's promises: the same latents, one compile each, nothing left behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from blade_tests.host.tiny import SD15, SDXL, conditioning, make_model, relative_rms, sample

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session, optimize_model, without_blade

BOUND = 1e-4
EAGER = OptimizeConfig(backend="eager", on_failure="error")


def _lora(model: Any, seed: int = 5, keys: str = "to_q") -> dict[str, Any]:
    """Rank-4 patches for some weights, as the host's loader would hand them to add_patches."""
    generator = torch.Generator().manual_seed(seed)
    loaded = {}
    for key, weight in model.model.state_dict().items():
        if keys in key and key.endswith("weight") and weight.ndim == 2:
            up = torch.randn(weight.shape[0], 4, generator=generator)
            down = torch.randn(4, weight.shape[1], generator=generator)
            loaded[key] = ("diff", (up @ down * 0.05,))
    assert loaded
    return loaded


def _with_lora(model: Any, strength: float = 1.0, **kwargs: Any) -> Any:
    clone = model.clone()
    clone.add_patches(_lora(model, **kwargs), strength)
    return clone


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_latents_equal_stock(session: Session, config: dict[str, Any]) -> None:
    model = make_model(config)
    expected = sample(model)
    assert relative_rms(sample(optimize_model(model, EAGER)), expected) <= BOUND
    assert session.engine.counters["blocks_compiled"] == 10
    assert session.engine.counters["blocks_eager"] == 0


def test_half_precision_is_no_further_from_the_truth_than_stock(session: Session) -> None:
    truth = sample(make_model(SD15))
    half = make_model(SD15, dtype=torch.bfloat16)
    stock = relative_rms(sample(half), truth)
    assert relative_rms(sample(optimize_model(half, EAGER)), truth) <= 1.25 * stock
    assert session.engine.counters["blocks_eager"] == 0


def test_a_clone_without_the_node_is_stock_bit_for_bit(session: Session, sd15: Any) -> None:
    names = list(sd15.model.state_dict())
    strides = {k: v.stride() for k, v in sd15.model.state_dict().items()}
    before = sample(sd15)
    optimized = optimize_model(sd15, EAGER)
    sample(optimized)
    with session.engine.counters.expect(runs=0):
        assert torch.equal(sample(sd15), before)
    assert torch.equal(sample(without_blade(optimized)), before)
    assert list(sd15.model.state_dict()) == names
    assert {k: v.stride() for k, v in sd15.model.state_dict().items()} == strides


def test_fewer_graphs_than_units(session: Session, sdxl: Any) -> None:
    sample(optimize_model(sdxl, EAGER))
    units = sum(len(b["layers"]) for m in session.stats()["models"] for b in m["blocks"])
    graphs = session.engine.counters["graphs_compiled"]
    assert graphs == len({key.id for key in session.engine.cache.all_keys()}) < units


Switch = Callable[[Any], torch.Tensor]
SWITCHES: dict[str, Switch] = {
    "prompt": lambda m: sample(m, positive=conditioning(seed=8)),
    "seed": lambda m: sample(m, seed=3),
    "steps": lambda m: sample(m, steps=4),
    "sampler": lambda m: sample(m, sampler="dpmpp_2m"),
    "second-order sampler": lambda m: sample(m, sampler="heun"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switching_compiles_nothing(session: Session, sd15: Any, name: str) -> None:
    optimized = optimize_model(sd15, EAGER)
    sample(optimized)
    with session.engine.counters.expect(graphs_compiled=0, cache_misses=0, blocks_eager=0):
        actual = SWITCHES[name](optimized)
    assert relative_rms(actual, SWITCHES[name](sd15)) <= BOUND


def test_loras_before_and_after_the_node_compile_nothing(session: Session, sd15: Any) -> None:
    sample(optimize_model(sd15, EAGER))
    plain = sample(sd15)
    expected = sample(_with_lora(sd15))
    assert relative_rms(expected, plain) > 0.01  # the LoRA does something
    with session.engine.counters.expect(graphs_compiled=0, blocks_eager=0):
        assert relative_rms(sample(optimize_model(_with_lora(sd15), EAGER)), expected) <= BOUND
        assert relative_rms(sample(_with_lora(optimize_model(sd15, EAGER))), expected) <= BOUND
        other = sample(_with_lora(optimize_model(sd15, EAGER), strength=-0.5))
        assert relative_rms(sample(optimize_model(sd15, EAGER)), plain) <= BOUND
    assert relative_rms(other, sample(_with_lora(sd15, strength=-0.5))) <= BOUND


def test_another_checkpoint_of_the_architecture_compiles_nothing(session: Session) -> None:
    first, second = make_model(SD15, seed=0), make_model(SD15, seed=9)
    sample(optimize_model(first, EAGER))
    with session.engine.counters.expect(graphs_compiled=0):
        actual = sample(optimize_model(second, EAGER))
    assert relative_rms(actual, sample(second)) <= BOUND


def test_two_nodes_in_a_graph_share_their_graphs(session: Session, sd15: Any) -> None:
    one = optimize_model(sd15, EAGER)
    two = optimize_model(optimize_model(sd15, EAGER), EAGER)
    sample(one)
    with session.engine.counters.expect(graphs_compiled=0, runs=1):
        sample(two)


SHAPES: dict[str, dict[str, Any]] = {
    "resolution": {"size": (24, 16)},
    "odd resolution": {"size": (9, 13)},
    "batch 2": {"batch": 2},
    "batch 4": {"batch": 4},
    "cfg 1": {"cfg": 1.0},
    "154 tokens": {"positive": conditioning(154), "negative": conditioning(154)},
    "77 and 154 tokens": {"positive": conditioning(154)},
    "154 and 231 tokens": {"positive": conditioning(231), "negative": conditioning(154)},
    "area": {"positive": conditioning() + conditioning(seed=4, area=(8, 8, 0, 4))},
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_is_right_and_compiled_once(session: Session, sd15: Any, name: str) -> None:
    optimized = optimize_model(sd15, EAGER)
    sample(optimized)
    before = session.engine.counters["graphs_compiled"]
    actual = sample(optimized, **SHAPES[name])
    assert relative_rms(actual, sample(sd15, **SHAPES[name])) <= BOUND
    assert session.engine.counters["graphs_compiled"] > before
    with session.engine.counters.expect(graphs_compiled=0, blocks_eager=0):
        sample(optimized)
        sample(optimized, **SHAPES[name], seed=2)


def test_progress_ends_after_every_call_that_compiles(
    session: Session, sd15: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An area's size comes up in the second call of a run: its bar must be taken off too."""
    texts: list[str] = []
    monkeypatch.setattr(
        "blade.blade_core.host.progress.say", lambda text, node_id: texts.append(text)
    )
    sample(optimize_model(sd15, EAGER), **SHAPES["area"])
    ends = [index for index, text in enumerate(texts) if "graphs ready" in text]
    assert len(ends) == 2 and ends[-1] == len(texts) - 1
    assert all(" of " not in text and "/19 " in text for text in texts if "ready" not in text)


@pytest.mark.parametrize("session", ["launched"], indirect=True)  # a tape sees torch's own only
def test_inductor_equals_stock(session: Session, sd15: Any) -> None:
    """The one real compile of this folder; the server tests have whole checkpoints."""
    actual = sample(optimize_model(sd15, OptimizeConfig("inductor", on_failure="error")))
    assert relative_rms(actual, sample(sd15)) <= BOUND
    assert session.engine.counters["blocks_eager"] == 0


def test_the_state_dies_with_the_model(session: Session) -> None:
    sample(optimize_model(make_model(SD15), EAGER))
    import gc

    gc.collect()
    assert session.stats()["models"] == []
    assert len(session.engine.cache) > 0  # graphs outlive models: the next one uses them
