"""The report as text that also reads well as Markdown, which ComfyUI's preview node renders."""

from __future__ import annotations

from itertools import groupby
from typing import Any

_NAMED = 20
"""How many names of one list are shown; the JSON holds all."""


def as_text(stats: dict[str, Any]) -> str:
    """Return `stats` (host/model.py) as lines for reading."""
    counters, cache = stats["counters"], stats["cache"]
    lines = [
        f"- graphs compiled {counters['graphs_compiled']} in {counters['compile_seconds']:.1f} s, "
        f"cache hits {counters['cache_hits']}, misses {counters['cache_misses']}, "
        f"failures {counters['compile_failures']}",
        f"- graphs in memory {cache['graphs']} ({cache['bytes'] / 2**20:.1f} MiB of "
        f"{cache['budget_bytes'] / 2**20:.0f} MiB)",
    ]
    if stats["disk"] is not None:
        disk = stats["disk"]
        lines.append(
            f"- graphs on disk {disk['graphs']} ({disk['bytes'] / 2**20:.1f} MiB of "
            f"{disk['budget_bytes'] / 2**20:.0f} MiB), loaded "
            f"{counters['graphs_loaded']} in {counters['load_seconds']:.1f} s"
        )
    if not stats["models"]:
        lines.append("- This model does not run through Blade Optimize Model.")
    for model in stats["models"]:
        lines += ["", *_model(model)]
    for model in _numbered([*stats.get("controlnets", ()), *stats.get("vaes", ())]):
        lines += ["", *_model(model)]
    if stats.get("loras"):
        lines += ["", "LoRAs", "", *_loras(stats["loras"])]
    return "\n".join(lines)


def _numbered(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, with those of one name told apart."""
    names = [model["model"] for model in models]
    return [
        model | {"model": f"{name} {names[: i + 1].count(name)} of {names.count(name)}"}
        if names.count(name) > 1
        else model
        for i, (name, model) in enumerate(zip(names, models, strict=True))
    ]


def _loras(loras: dict[str, Any]) -> list[str]:
    written = loras["switch_ms"]
    lines = [
        f"- {len(loras['rows'])} LoRAs in {loras['weights']} weights, fused in "
        f"{loras['fuse_ms']:.0f} ms, "
        + ("not written yet" if written is None else f"written in {written:.0f} ms")
    ]
    for row in loras["rows"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items())
        ranks = "" if row["ranks"] is None else f", rank {_range(*row['ranks'])}"
        lines.append(
            f"- LoRA {row['name']} (model {row['strength_model']:g}, clip "
            f"{row['strength_clip']:g}{ranks}): {row['keys']} weights ({kinds})"
        )
        for what in ("skipped", "unmatched"):
            if row[what]:
                lines.append(f"- {what} in {row['name']}: {_some(row[what])}")
    return lines


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _model(model: dict[str, Any]) -> list[str]:
    used = ", then ".join(model["compilers"]) or "none"
    settings = f"backend {model['backend']}: {used}; on_failure {model['on_failure']}"
    if model["freeze_weights"]:
        settings += "; weights frozen"
    lines = [f"{model['model']} ({settings})", ""]
    if model["runs_as_stock"]:
        return [*lines, f"- runs as stock: {model['runs_as_stock']}"]
    lines += _captures(model)
    states = [block["state"] for block in model["blocks"]]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    lines.append(f"- {len(states)} blocks: {counts}")
    not_compiled = [b for b in model["blocks"] if b["reasons"]]
    for reasons, blocks in groupby(not_compiled, key=lambda block: block["reasons"]):
        names = ", ".join(block["block"] for block in blocks)
        lines.append(f"- eager: {names}: {'; '.join(reasons)}")
    return lines


def _captures(model: dict[str, Any]) -> list[str]:
    lines = []
    if model["captures"]:
        whole = "images" if model["model"].startswith("VAE ") else "steps"
        lines.append(
            f"- CUDA graphs {model['captures']} ({model['capture_mib']:.0f} MiB), whole {whole} "
            f"replayed in the last run {model['replays']}"
        )
    elif model["replays"]:  # a ControlNet's
        lines.append(
            f"- part of the UNet's CUDA graphs, replayed in the last run {model['replays']}"
        )
    if model["not_captured"]:
        lines.append(f"- not one CUDA graph: {'; '.join(model['not_captured'])}")
    return lines
