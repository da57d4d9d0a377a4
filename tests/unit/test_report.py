"""The report as text: is it fast, and if not, why."""

from __future__ import annotations

from typing import Any

from blade.blade_core.counters import Counters
from blade.blade_core.report import as_text

HEAD = [
    "- graphs compiled 24 in 81.3 s, cache hits 130, misses 25, failures 1",
    "- graphs in memory 24 (12.5 MiB of 4096 MiB)",
    "- graphs on disk 30 (45.5 MiB of 4096 MiB), loaded 6 in 0.3 s",
]


def stats(*models: dict[str, Any]) -> dict[str, Any]:
    counters = {
        **Counters().snapshot(),
        "graphs_compiled": 24,
        "cache_hits": 130,
        "cache_misses": 25,
        "compile_failures": 1,
        "compile_seconds": 81.26,
        "graphs_loaded": 6,
        "load_seconds": 0.31,
    }
    cache = {"graphs": 24, "bytes": 25 * 2**19, "budget_bytes": 4096 * 2**20, "keys": []}
    disk = {"folder": "/graphs", "graphs": 30, "bytes": 91 * 2**19, "budget_bytes": 2**32}
    return {"counters": counters, "cache": cache, "disk": disk, "models": list(models)}


def model(*blocks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "model": "UNetModel",
        "backend": "auto",
        "compilers": ["inductor"],
        "freeze_weights": False,
        "on_failure": "fallback",
        "runs_as_stock": None,
        "captures": 0,
        "capture_mib": 0.0,
        "replays": 0,
        "not_captured": [],
        "blocks": list(blocks),
        **changes,
    }


def block(name: str, state: str, *reasons: str) -> dict[str, Any]:
    return {"block": name, "state": state, "reasons": list(reasons), "layers": ["ResBlock 4→8"]}


def text_of(*models: dict[str, Any]) -> list[str]:
    lines = as_text(stats(*models)).split("\n")
    assert lines[:3] == HEAD
    return lines[3:]


def test_nothing_is_said_of_a_disk_that_is_not_used() -> None:
    assert as_text(stats() | {"disk": None}).split("\n")[:2] == HEAD[:2]


def test_all_compiled() -> None:
    blocks = [block("input_blocks.0", "compiled"), block("middle_block", "compiled")]
    assert text_of(model(*blocks)) == [
        "",
        "UNetModel (backend auto: inductor; on_failure fallback)",
        "",
        "- 2 blocks: 2 compiled",
    ]


def test_blocks_with_one_reason_share_a_line() -> None:
    blocks = [
        block("input_blocks.0", "compiled"),
        block("input_blocks.1", "eager", "a patch on its attention"),
        block("input_blocks.2", "eager", "a patch on its attention"),
        block("middle_block", "mixed", "its graph failed: x", "there is no context"),
        block("output_blocks.0", "idle"),
    ]
    assert text_of(model(*blocks)) == [
        "",
        "UNetModel (backend auto: inductor; on_failure fallback)",
        "",
        "- 5 blocks: 1 compiled, 2 eager, 1 mixed, 1 idle",
        "- eager: input_blocks.1, input_blocks.2: a patch on its attention",
        "- eager: middle_block: its graph failed: x; there is no context",
    ]


def test_a_model_that_runs_as_stock() -> None:
    blocks = [block("input_blocks.0", "idle")]
    stock = model(*blocks, runs_as_stock="gradients are enabled", backend="inductor")
    assert text_of(stock) == [
        "",
        "UNetModel (backend inductor: inductor; on_failure fallback)",
        "",
        "- runs as stock: gradients are enabled",
    ]


def test_captures_are_counted() -> None:
    middle = block("middle_block", "compiled")
    assert text_of(model(middle, captures=2, capture_mib=1530.6, replays=19))[3:] == [
        "- CUDA graphs 2 (1531 MiB), whole steps replayed in the last run 19",
        "- 1 blocks: 1 compiled",
    ]


def test_what_is_not_captured_is_said() -> None:
    """Beside the pieces that are, if there are any."""
    middle = block("middle_block", "compiled")
    reasons = ["another node's wrapper runs inside the call", "the host passes time_context"]
    said = f"- not one CUDA graph: {'; '.join(reasons)}"
    lines = text_of(model(middle, not_captured=reasons))
    assert lines[3:] == [said, "- 1 blocks: 1 compiled"]
    lines = text_of(model(middle, not_captured=reasons, captures=9, capture_mib=3.4))
    assert lines[3:] == [
        "- CUDA graphs 9 (3 MiB), whole steps replayed in the last run 0",
        said,
        "- 1 blocks: 1 compiled",
    ]


def test_a_model_that_runs_as_stock_says_nothing_of_captures() -> None:
    """They are of an earlier run."""
    stock = model(runs_as_stock="gradients are enabled", captures=2, not_captured=["a patch"])
    assert text_of(stock)[3:] == ["- runs as stock: gradients are enabled"]


def test_frozen_weights_are_said() -> None:
    lines = text_of(model(block("middle_block", "compiled"), freeze_weights=True))
    assert lines[1] == "UNetModel (backend auto: inductor; on_failure fallback; weights frozen)"


def test_compilers_are_named_in_their_order() -> None:
    lines = text_of(model(compilers=["torch_blade", "inductor"]), model(compilers=[]))
    assert lines[1] == "UNetModel (backend auto: torch_blade, then inductor; on_failure fallback)"
    assert lines[5] == "UNetModel (backend auto: none; on_failure fallback)"


def test_several_models() -> None:
    one = model(block("middle_block", "compiled"))
    other = model(block("middle_block", "eager", "no memory"), on_failure="error")
    assert text_of(one, other) == [
        "",
        "UNetModel (backend auto: inductor; on_failure fallback)",
        "",
        "- 1 blocks: 1 compiled",
        "",
        "UNetModel (backend auto: inductor; on_failure error)",
        "",
        "- 1 blocks: 1 eager",
        "- eager: middle_block: no memory",
    ]


def test_no_model() -> None:
    assert text_of() == ["- This model does not run through Blade Optimize Model."]


def test_controlnets_follow_and_are_counted() -> None:
    of_unet = model(block("middle_block", "compiled"))
    control = model(block("zero_convs.0", "compiled"), model="ControlNet", replays=19)
    lines = as_text(stats(of_unet) | {"controlnets": [control]}).split("\n")
    assert lines[-5:] == [
        "",
        "ControlNet (backend auto: inductor; on_failure fallback)",
        "",
        "- part of the UNet's CUDA graphs, replayed in the last run 19",
        "- 1 blocks: 1 compiled",
    ]
    both = as_text(stats(of_unet) | {"controlnets": [control, control]}).split("\n")
    heads = [line for line in both if line.startswith("ControlNet")]
    assert [head.partition(" (")[0] for head in heads] == ["ControlNet 1 of 2", "ControlNet 2 of 2"]


def test_vaes_and_controlnets_of_one_name_are_told_apart() -> None:
    names = ("ControlNet", "VAE decoder", "VAE encoder", "VAE decoder")
    others = [model(block("conv_in", "compiled"), model=name) for name in names]
    data = stats(model()) | {"controlnets": others[:1], "vaes": others[1:]}
    headings = [line.split(" (")[0] for line in as_text(data).split("\n") if "(backend" in line]
    assert headings == [
        "UNetModel",
        "ControlNet",
        "VAE decoder 1 of 2",
        "VAE encoder",
        "VAE decoder 2 of 2",
    ]
