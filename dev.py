#!/usr/bin/env python3
"""Developer entry point: sets up what is needed, then runs demo, tests, benchmark or linters."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit(f"dev.py needs Python 3.11 or newer, this is {sys.version.split()[0]}.")

from devtools import ROOT, WORK, DevError
from devtools.base_directory import link_folder
from devtools.environment import Environment, prepare

PACK = ("__init__.py", "nodes", "blade_core")
TOOLS = ("benchmarks", "devtools", "dev.py", "example_workflows", "tests")


def main() -> int:
    """Parse the command line and return the exit code of the work."""
    options, rest = _parser().parse_known_args()
    if rest and (options.command not in ("test", "bench") or getattr(options, "report", False)):
        _parser().error(f"unknown arguments: {' '.join(rest)}")
    try:
        environment = prepare(options.comfy, options.python)
        if options.command == "test":
            return _test(environment, rest)
        if options.command == "bench":
            return _bench(environment, options.report, rest)
        if options.command == "clear-cache":
            return _run(environment, [str(ROOT / "devtools" / "clear_cache.py")])
        if options.command == "lint":
            return _lint(environment)
        return _demo(environment, options)
    except DevError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--comfy", type=Path, help="ComfyUI folder (default: the pinned release)")
    shared.add_argument("--python", type=Path, help="use this interpreter, install nothing")
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", parents=[shared], allow_abbrev=False, help="stock against Blade, with a report"
    )
    demo.add_argument("--checkpoint", type=Path, help="own checkpoint (default: random weights)")
    for name in ("--width", "--height", "--batch", "--steps"):
        demo.add_argument(name, type=int)
    demo.add_argument(
        "--backend", choices=["auto", "torch_blade", "inductor", "eager"], default="auto"
    )
    commands.add_parser(
        "test",
        parents=[shared],
        allow_abbrev=False,
        help="the test suite; further arguments go to pytest",
    )
    bench = commands.add_parser(
        "bench",
        parents=[shared],
        allow_abbrev=False,
        help="rows of the benchmark; further arguments go to benchmarks/run.py",
        epilog="Further arguments, such as --scenarios, --systems and --dry-run, go to "
        "benchmarks/run.py, whose --help explains them.",
    )
    bench.add_argument(
        "--report", action="store_true", help="write docs/performance.md from the committed rows"
    )
    commands.add_parser(
        "clear-cache",
        parents=[shared],
        allow_abbrev=False,
        help="delete the compiled graphs that Blade keeps on disk",
    )
    commands.add_parser("lint", parents=[shared], allow_abbrev=False, help="ruff and mypy")
    return parser


def _run(environment: Environment, arguments: list[str], **more: str) -> int:
    variables = os.environ | {"BLADE_COMFY": str(environment.host)} | more
    command = [str(environment.python), *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


def _test(environment: Environment, arguments: list[str]) -> int:
    WORK.mkdir(exist_ok=True)
    chosen = any((ROOT / a.split("::")[0]).exists() for a in arguments if not a.startswith("-"))
    report = f"--junitxml={WORK / 'junit.xml'}"
    command = ["-m", "pytest", "-c", "tests/pytest.ini", report]
    if chosen:
        return _run(environment, [*command, *arguments])
    # The whole suite in several processes, each of which takes about 3 GiB.
    cores = os.cpu_count() or 1
    processes = min(3, cores)
    spread = ["-n", str(processes), "--dist", "loadscope", "--no-loadscope-reorder"]
    # Their threads, and those of their servers, would wait for each other's turn most of the time.
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes)))
    return _run(environment, [*command, *spread, "tests", *arguments], OMP_NUM_THREADS=threads)


def _bench(environment: Environment, report: bool, arguments: list[str]) -> int:
    if report:
        return _run(environment, [str(ROOT / "benchmarks" / "report.py")])
    os.environ["BLADE_BENCH_PROGRAM"] = "dev.py bench"  # a row says how it was made
    program = str(ROOT / "benchmarks" / "run.py")
    return _run(environment, [program, "--comfy", str(environment.host), *arguments])


def _lint(environment: Environment) -> int:
    paths = [name for name in (*PACK, *TOOLS) if (ROOT / name).exists()]
    failed = False
    for command in (["ruff", "check"], ["ruff", "format", "--check"]):
        print(f"{' '.join(command)} ...", flush=True)
        failed |= _run(environment, ["-m", *command, *paths]) != 0
    return 1 if _mypy(environment) or failed else 0


def _mypy(environment: Environment) -> bool:
    """Check types and return whether there are errors.

    The checkout is a package itself, whatever its folder is called: mypy sees it as `blade`, the
    name the tests use, through a link.
    """
    print("mypy ...", flush=True)
    link = WORK / "mypy" / "blade"
    link.parent.mkdir(parents=True, exist_ok=True)
    link_folder(link, ROOT)
    prefix = f"{link.relative_to(ROOT)}{os.sep}"
    paths = [prefix + name for name in PACK if (ROOT / name).exists()]
    paths += [name for name in TOOLS if (ROOT / name).exists()]
    variables = os.environ | {"MYPYPATH": str(link.parent)}
    command = [str(environment.python), "-m", "mypy", *paths]
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    print((result.stdout + result.stderr).replace(prefix, "").strip(), flush=True)
    return result.returncode != 0


def _demo(environment: Environment, options: argparse.Namespace) -> int:
    arguments = ["--backend", options.backend]
    for name in ("checkpoint", "width", "height", "batch", "steps"):
        value = getattr(options, name)
        if value is not None:
            value = value.expanduser().resolve() if isinstance(value, Path) else value
            arguments += [f"--{name}", str(value)]
    return _run(environment, [str(ROOT / "devtools" / "demo.py"), *arguments])


if __name__ == "__main__":
    sys.exit(main())
