"""The Python environment of the tooling: a virtual environment next to the checkout.

A stamp in it holds a hash of what was asked for, so an unchanged environment costs nothing to
check and a changed pin brings it up to date. Standard library only.
"""

import hashlib
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import tomllib

from devtools import ROOT, WORK, DevError
from devtools.host import check_host, fetch_default_host, host_requirements

TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
_HOOK = ROOT / "devtools" / "torchvision_cpu.py"
_HOOK_MODULE = "blade_torchvision_cpu"
_STAMP = "blade-dev-stamp.txt"


@dataclass(frozen=True)
class Environment:
    """A Python interpreter and the ComfyUI folder to run with it."""

    python: Path
    host: Path


def prepare(comfy: Path | None = None, python: Path | None = None) -> Environment:
    """Return the environment for `comfy` (default: the pinned host), creating what is missing.

    With `python` that interpreter is used as it is and nothing is installed into it.
    """
    if python is not None:
        # Not resolved: a venv's interpreter is a link, and its target is another environment.
        interpreter = Path(os.path.abspath(python.expanduser()))
        if not interpreter.is_file():
            raise DevError(f"--python {python}: there is no such file.\nGive an interpreter.")
        host = check_host(comfy) if comfy else fetch_default_host(interpreter)
        return Environment(interpreter, host)
    default = ROOT / ".venv"
    if comfy is None:
        _create(default)
        host = fetch_default_host(venv_python(default))
        return Environment(_install(default, host_requirements(host)), host)
    host = check_host(comfy)
    requirements = host_requirements(host)
    digest = _digest(requirements)
    if _stamp(default) == digest:
        return Environment(venv_python(default), host)
    folder = ROOT / f".venv-{hashlib.sha256(repr(requirements).encode()).hexdigest()[:8]}"
    _create(folder)
    return Environment(_install(folder, requirements), host)


def venv_python(folder: Path) -> Path:
    """The interpreter of the virtual environment at `folder`."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def tool_requirements() -> list[str]:
    """The pinned developer tools: the extra `dev` in pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    return list(extras["dev"])


def _digest(requirements: list[str]) -> str:
    asked = [sys.version.split()[0], TORCH, TORCHVISION, *requirements, *tool_requirements()]
    return hashlib.sha256("\n".join(asked).encode() + _HOOK.read_bytes()).hexdigest()


def _stamp(folder: Path) -> str:
    file = folder / _STAMP
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _create(folder: Path) -> None:
    if venv_python(folder).is_file():
        return
    print(f"Creating the virtual environment {folder.name} ...", flush=True)
    venv.EnvBuilder(with_pip=True, clear=folder.exists()).create(folder)


def _install(folder: Path, requirements: list[str]) -> Path:
    python = venv_python(folder)
    digest = _digest(requirements)
    if _stamp(folder) == digest:
        return python
    (folder / _STAMP).unlink(missing_ok=True)
    print(
        f"Installing {TORCH} into {folder.name} (a large download the first time) ...", flush=True
    )
    _pip(python, [TORCH])
    # Its dependencies are there; asked for, they could replace the pinned torch.
    _pip(python, ["--no-deps", TORCHVISION])
    packages = [*requirements, *tool_requirements()]
    print(f"Installing ComfyUI's requirements and the tools ({len(packages)}) ...", flush=True)
    _pip(python, [TORCH, *packages])
    _install_hook(python)
    (folder / _STAMP).write_text(digest + "\n", encoding="utf-8")
    return python


def _pip(python: Path, arguments: list[str]) -> None:
    log = WORK / "logs" / "pip.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    with log.open("w", encoding="utf-8") as output:
        result = subprocess.run([*command, *arguments], stdout=output, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise DevError(
            f"pip install {' '.join(arguments)} failed (exit {result.returncode}):\n{tail}\n"
            f"The whole log is {log}. Fix the cause and start again: what is installed is kept."
        )


def _install_hook(python: Path) -> None:
    """Put the import hook into the environment, run at interpreter start by a .pth file."""
    query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    answer = subprocess.run([str(python), "-c", query], capture_output=True, text=True, check=True)
    packages = Path(answer.stdout.strip())
    (packages / f"{_HOOK_MODULE}.py").write_bytes(_HOOK.read_bytes())
    line = f"import {_HOOK_MODULE}; {_HOOK_MODULE}.install()\n"
    (packages / f"{_HOOK_MODULE}.pth").write_text(line, encoding="utf-8")
