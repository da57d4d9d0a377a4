"""The benchmark without ComfyUI: names, jobs, rows, and a report that is up to date."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots, report, rows, run, tables
from benchmarks.jobs import Job, OutOfBudget, plan, rows_of
from benchmarks.kinds import KINDS, kind_of
from benchmarks.loaders import FusedLoras, LoraLoaders
from benchmarks.scenarios import Scenario, expand, parse
from benchmarks.selection import select
from benchmarks.systems import KERNELS, NO_KERNELS, WITHOUT, find_system
from blade.blade_core import config

COMMITTED = rows.read()

# --- scenarios ----------------------------------------------------------------------------------


def test_a_name_says_everything() -> None:
    assert parse("sd15-512-b8") == Scenario("sd15-512-b8", "image", "sd15-full", 512, 8)
    rich = parse("sdxl-1536-b2-s50-cn2-lora8")
    assert (rich.model, rich.size, rich.batch, rich.steps) == ("sdxl-full", 1536, 2, 50)
    assert (rich.controlnets, rich.loras, rich.images_only) == (2, 8, True)
    assert parse("vae-1024-b1").kind == "vae"
    switch = parse("lora-strength-sdxl-5")
    assert (switch.kind, switch.size, switch.loras) == ("strength", 1024, 5)
    assert parse("lora-cold-sd15-2").kind == "cold"


@pytest.mark.parametrize(
    "name", ["sd3-512-b1", "sd15-512", "sd15-512-b1-lora2-cn1", "sd15-500-b1", "sd15-512-b0", ""]
)
def test_a_wrong_name_is_refused_with_the_forms(name: str) -> None:
    with pytest.raises(ValueError, match=r"forms|multiples of 64"):
        parse(name)


def test_groups_are_the_scenarios_that_the_tables_show() -> None:
    assert [s.name for s in expand("main,sd15-512-b1")] == ["sd15-512-b1", "sdxl-1024-b1"]
    table = [s.name for s in expand("table-sd15-512-b1")]
    assert len(table) == 9
    assert {"sd15-512-b1-s20", "sd15-512-b1-s100-cn1", "sd15-512-b1-s50-lora2"} <= set(table)
    assert len(expand("grid-sd15,grid-sdxl,switches,vae")) == 13 + 13 + 10 + 4


def test_a_tiny_scenario_has_a_tiny_model() -> None:
    tiny = parse("sdxl-1024-b4-s50").tiny()
    assert (tiny.model, tiny.size, tiny.batch, tiny.steps) == ("sdxl-dry", 64, 2, 4)
    assert tiny.name == "sdxl-1024-b4-s50"


# --- systems and jobs ---------------------------------------------------------------------------


def test_systems_are_found_by_name() -> None:
    assert find_system("eager").arguments == ()
    assert find_system("blade-fast").arguments == ("--fast",)
    assert find_system("reduce-overhead").allocator == "native"
    assert find_system("blade").loras is find_system("blade-traced-fast").loras is FusedLoras
    assert find_system("blade-loader").loras is find_system("eager").loras is LoraLoaders
    find_system("blade:split_reductions=True")
    assert tuple(KERNELS.values()) == config.KERNELS
    assert WITHOUT["blade-without-late-bias"] == "late_bias" and len(WITHOUT) == len(KERNELS)
    assert all(find_system(system) for system in (NO_KERNELS, *KERNELS, *WITHOUT))
    for name in ("blad", "eager:max_autotune=True"):
        with pytest.raises(ValueError, match="there is no system"):
            find_system(name)


def test_scenarios_share_a_process_as_asked() -> None:
    scenarios = expand("sd15-512-b1,sd15-512-b1-cn1,sd15-768-b1,vae-512-b1")
    systems = ["reduce-overhead", "eager"]
    # Of these one decodes as the other does, so its process of the VAE is left out.
    assert [len(plan(scenarios, systems, share)) for share in ("none", "shape", "model")] == [
        7,
        5,
        3,
    ]
    first = plan(scenarios, systems, "shape")[0]
    assert (first.system, [s.name for s in first.scenarios]) == (
        "eager",
        ["sd15-512-b1", "sd15-512-b1-cn1"],
    )


JOB = Job("eager", tuple(expand("sd15-512-b1,sd15-512-b2")))


def worker(tmp_path: Path, *lines: str) -> list[str]:
    """A command in the worker's place: the first scenario is done, then come `lines`."""
    row = json.dumps({"scenario": "sd15-512-b1", "step_ms": 1.0})
    script = tmp_path / "worker.py"
    code = ["import sys, time", "print('noise')", f"print('ROW ' + {row!r}, flush=True)", *lines]
    script.write_text("\n".join(code))
    return [sys.executable, str(script)]


def test_a_worker_that_dies_keeps_its_rows_and_names_the_reason(tmp_path: Path) -> None:
    command = worker(tmp_path, "raise MemoryError('too large')")
    first, second = rows_of(JOB, command, timeout=60, end=time.monotonic() + 60)
    assert first["step_ms"] == 1.0 and "error" not in first
    assert second == {"scenario": "sd15-512-b2", "error": "MemoryError: too large"}


def test_a_worker_that_is_late_is_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    command = worker(tmp_path, "time.sleep(60)")
    first, second = rows_of(JOB, command, timeout=3, end=start + 60)
    assert first["step_ms"] == 1.0
    assert second["error"] == "not done in 3 s"
    assert time.monotonic() - start < 30


def test_the_budget_ends_a_worker_without_a_row(tmp_path: Path) -> None:
    found = []
    command = worker(tmp_path, "time.sleep(60)")
    with pytest.raises(OutOfBudget):
        for row in rows_of(JOB, command, timeout=60, end=time.monotonic() + 3):
            found.append(row["scenario"])
    assert found == ["sd15-512-b1"]


def test_a_command_can_be_repeated_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--comfy", "/home/me/comfy", "--out=/tmp/rows", "--systems", "eager,blade"]
    rest = "--comfy PATH --out=PATH --systems eager,blade"
    assert run._command(arguments) == f"python benchmarks/run.py {rest}"
    monkeypatch.setenv("BLADE_BENCH_PROGRAM", "dev.py bench")
    assert run._command(arguments) == f"python dev.py bench {rest}"


# --- rows and the report ------------------------------------------------------------------------


def test_committed_rows_have_the_fields_and_are_real() -> None:
    assert COMMITTED
    for row in COMMITTED:
        assert set(rows.REQUIRED) <= set(row)
        assert row["error"] or row["gpu"] != "CPU"
        assert not row.get("dry_run")
        parse(row["scenario"])
        find_system(row["system"])
        if "started" in row:  # rows of today's benchmark
            expected = {*rows.empty("", ""), *rows.FROM_RUN, "file", "date"}
            assert expected >= set(row)  # older rows lack what came later
            assert not re.search(r"(?<![\w.])/\w|[A-Z]:\\", row["command"])


def row(run: str, scenario: str, system: str, **fields: Any) -> rows.Row:
    common = dict.fromkeys(rows.FROM_RUN) | {"run": run, "file": "f.jsonl", "date": "2026-01-01"}
    common |= {"command": "python benchmarks/run.py"}
    return rows.empty(scenario, system) | common | {"step_ms": 2.0} | fields


def test_a_table_shows_one_run_the_newest_of_the_most_complete() -> None:
    found = [
        row("old", "sd15-512-b1", "eager"),
        row("old", "sd15-512-b1", "blade"),
        row("new", "sd15-512-b1", "eager", step_ms=9.0),
        row("new", "sd15-512-b1", "blade", step_ms=3.0),
        row("part", "sd15-512-b1", "blade", step_ms=1.0),
        row("failed", "sd15-512-b1", "eager", error="no memory"),
        row("failed", "sd15-512-b1", "blade", error="no memory"),
        row("dry", "sd15-512-b1", "eager", dry_run=True),
        row("dry", "sd15-512-b1", "blade", dry_run=True),
    ]
    chosen = select(found, ["sd15-512-b1"], ["eager", "blade"])
    assert {r["run"] for r in chosen.rows} == {"new"}
    assert chosen.value("sd15-512-b1", "blade", "step_ms") == 3.0
    assert chosen.value("sd15-512-b1", "torch-compile", "step_ms") is None
    assert chosen.systems(["eager", "blade"]) == ["eager", "blade"]


def test_a_run_without_blade_says_less_than_one_with_it() -> None:
    scenarios = ["sd15-512-b1", "sd15-512-b2"]
    found = [
        row("with", "sd15-512-b1", "eager"),
        row("with", "sd15-512-b1", "blade"),
        *[row("without", scenario, "eager") for scenario in scenarios],
    ]
    assert {r["run"] for r in select(found, scenarios, ["eager", "blade"]).rows} == {"with"}
    assert {r["run"] for r in select(found[2:], scenarios, ["eager"]).rows} == {"without"}


def test_a_newer_run_is_shown_also_without_fast() -> None:
    systems = ("eager", "torch-compile", "reduce-overhead", "blade")
    old = [row("old", "sd15-512-b1", system) for system in (*systems, "eager-fast")]
    text = report.document(old + [row("new", "sd15-512-b1", system) for system in systems])
    assert "Run [new]" in text and "Run [old]" not in text


def test_the_report_says_what_failed_and_what_is_missing() -> None:
    found = [
        row("r", "sd15-512-b1", "eager", step_ms=8.0),
        row("r", "sd15-512-b1", "torch-compile", error="RuntimeError: no compiler"),
        row("r", "sd15-512-b1", "blade", step_ms=2.0),
    ]
    text = report.document(found)
    none, times = tables.NONE, tables.TIMES
    assert f"| eager | 8.00 ms | {none} | {none} | 4.00{times} | {none} |" in text
    assert "| torch-compile | failed |" in text
    assert "- sd15-512-b1, torch-compile: `RuntimeError: no compiler`" in text
    assert "| reduce-overhead | not measured |" in text


def test_the_report_says_what_a_restart_takes() -> None:
    start = [
        row("r", "sd15-512-b1", "eager", first_image_s=4.0),
        row("r", "sd15-512-b1", "blade", first_image_s=20.0, graphs=26),
    ]
    assert "| loaded |" not in report.document(start)
    again = row("r", "sd15-512-b1", "blade-restart", first_image_s=6.0, graphs_loaded=26)
    text = report.document([*start, again])
    none = tables.NONE
    assert f"| blade-restart | 6.00 s | {none} | {none} | 26 | {none} |" in text
    assert f"| blade | 20.0 s | {none} | 26 | {none} | {none} |" in text
    assert "one after the other |" not in text
    start.append(row("r", "sd15-768-b1", "blade", first_image_s=5.5, graphs=26))
    title = tables.title("sd15-768-b1")
    assert f"| {title} | 5.50 s | {none} | 26 | {none} | {none} |" in report.document(start)


def test_the_report_says_what_a_kernel_gives_alone() -> None:
    found = [row("newer", "sd15-512-b1", "blade", step_kernel_ms=1.0)]
    assert "| gained |" not in report.document(found)
    for system, busy in ((NO_KERNELS, 6.0), ("blade-geglu", 5.5), ("blade", 5.0)):
        found.insert(0, row("r", "sd15-512-b1", system, step_kernel_ms=busy, kernels_per_step=600))
    text = report.document(found)
    none = tables.NONE
    assert f"| {NO_KERNELS} | 2.00 ms | 6.00 ms | {none} | 600 | {none} |" in text
    assert f"| blade-geglu | 2.00 ms | 5.50 ms | 0.50 ms | 600 | {none} |" in text
    assert f"| blade | 2.00 ms | 5.00 ms | 1.00 ms | 600 | {none} |" in text
    assert "| worth |" not in text
    beside = (("blade-without-geglu", 5.25), ("blade", 5.0))
    found += [row("s", "sd15-512-b1", system, step_kernel_ms=busy) for system, busy in beside]
    text = report.document(found)
    assert f"| blade-without-geglu | 2.00 ms | 5.25 ms | 0.25 ms | {none} | {none} |" in text
    assert f"| blade | 2.00 ms | 5.00 ms | {none} | {none} | {none} |" in text
    assert f"| {NO_KERNELS} | 2.00 ms | 6.00 ms | {none} | 600 | {none} |" in text


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_64x64>", "products"),
        ("geglu", "products"),
        (
            "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc",
            "convolutions",
        ),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64", "attention"),
        ("attend_blocks", "attention"),
        ("group_norm_apply", "norms"),
        ("triton_red_fused_native_group_norm_silu_3", "norms"),
        ("triton_poi_fused_convolution_silu_1", "other"),
        ("void at::native::elementwise_kernel<128, 4>", "other"),
        ("Memset (Device)", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
    ],
)
def test_what_a_kernel_does_is_told_by_its_name(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind and kind in KINDS


def test_the_report_says_what_the_gpu_does() -> None:
    noted = dict.fromkeys(KINDS, 1.5)
    found = [row("r", "sd15-512-b1", "blade", step_ms=2.0, kinds_ms=noted)]
    assert f"| **blade** | {' | '.join(['1.50 ms'] * len(KINDS))} |" in report.document(found)
    assert "each kind's time" not in report.document([row("r", "sd15-512-b1", "blade")])


def test_the_report_holds_without_any_row() -> None:
    text = report.document([])
    assert "not measured" in text
    assert "<sub>" not in text and ".svg" not in text


def test_the_share_of_the_peak() -> None:
    measured = row("r", "sd15-512-b1", "eager", tflop_per_step=2.0, step_kernel_ms=4.0)
    assert rows.with_peak_share(measured, 1000.0)["peak_share"] == 0.5
    assert rows.with_peak_share(measured, None)["peak_share"] is None


def test_the_floor_of_a_switch_is_a_copy_of_what_it_touches() -> None:
    measured = row("r", "lora-switch-sd15-1", "eager", touched_mib=1000.0)
    assert rows.with_floor(measured, 2 * 1048.576)["floor_ms"] == 1.0
    assert rows.with_floor(measured, None)["floor_ms"] is None


NEW = ("floor_ms", "read_ms", "worst_switch_ms", "switched_step_ms", "switch_captures")


def test_a_switch_is_shown_beside_stocks_and_its_floor() -> None:
    name, cold = "lora-switch-sdxl-5", "lora-cold-sdxl-5"
    found = [
        row("r", name, "eager", chain_ms=1960.0, switch_ms=2400.0, floor_ms=2.0),
        row("r", name, "blade", chain_ms=20.0, switch_ms=30.0, switch_captures=0),
        row("r", cold, "eager", chain_ms=2000.0, switch_ms=2400.0, floor_ms=2.0, read_ms=600.0),
        row("r", cold, "blade", chain_ms=800.0, switch_ms=80.0, floor_ms=2.1, read_ms=580.0),
    ]
    times, none, what = tables.TIMES, tables.NONE, tables.NOT_MEASURED
    switch = f"| 1,960 + 2,400 = 4,360 | {what} | 20.0 + 30.0 = 50.0 (87.2{times}) |"
    text = report.document(found)
    assert f"{switch} 2.00 |" in text
    assert f"| 800 + 80.0 = 880 (5.00{times}) | 580 + 2.00 |" in text
    assert f"| {none} / 0 / {none} |" in text
    older = [{key: one[key] for key in one if key not in NEW} for one in found]
    assert f"{switch} {none} |" in report.document(older)


def test_the_committed_report_is_up_to_date() -> None:
    """`python dev.py bench --report` makes it so."""
    assert report.DOCUMENT.read_text(encoding="utf-8") == report.document(COMMITTED)
    wanted = plots.plots(COMMITTED, report.MAIN_SCENARIOS)
    assert wanted
    drawn = {file.name: plots.drawn_digest(file) for file in report.IMAGES.glob("performance-*")}
    assert drawn == {plot.file: plot.digest for plot in wanted}


def test_a_plot_is_drawn_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scenarios = expand("grid-sd15")
    found = [
        row("r", s.name, system, step_ms=float(s.batch * s.size), step_kernel_ms=1.0, host_ms=2.0)
        for s in scenarios
        for system in plots.GRID
    ]
    wanted = plots.plots(found, ["sd15-512-b1"])
    assert [plot.name for plot in wanted] == ["step", "host", "grid-sd15"]
    places = [[x for x, _ in panel.series["blade"]] for panel in wanted[2].panels]
    assert places == [[1, 2, 4, 8, 16], [512, 768, 1024, 1536, 2048], [0, 1, 2, 4, 8]]
    for plot in wanted:
        first = plots.draw(plot, tmp_path).read_bytes()
        assert plots.draw(plot, tmp_path).read_bytes() == first
        assert plots.drawn_digest(tmp_path / plot.file) == plot.digest
