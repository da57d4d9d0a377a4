"""One ComfyUI server for all server tests, with the pack linked and all model files in place."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blade_tests.server.workflow import Runner

from devtools import WORK
from devtools.base_directory import make_base_directory
from devtools.fixtures import make_fixtures
from devtools.host import check_host, default_host_path
from devtools.server import ComfyServer

ServerFactory = Callable[..., ComfyServer]
MODELS = ("sd15", "sd15-b", "sdxl", "sd15-lora", "sd15-control")


@pytest.fixture(scope="session")
def host_path() -> Path:
    """The ComfyUI under test: `BLADE_COMFY`, which `dev.py test --comfy` sets."""
    return check_host(Path(os.environ.get("BLADE_COMFY") or default_host_path()))


@pytest.fixture(scope="session")
def base_directory() -> Iterator[Path]:
    """A fresh base directory; in the work folder, so that model files need no second copy."""
    path = WORK / "base" / f"tests-{os.getpid()}"
    yield make_base_directory(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def models(base_directory: Path, host_path: Path) -> dict[str, Path]:
    """Fixture name to model file; `.name` is what a loader node wants."""
    return make_fixtures(base_directory, MODELS, host=host_path)


@pytest.fixture(scope="session")
def server_factory(host_path: Path, base_directory: Path, models: dict[str, Path]) -> ServerFactory:
    """Make a further server, not started: `with server_factory("name", variables={...}) as s`."""

    def make(name: str, **options: object) -> ComfyServer:
        log = WORK / "logs" / f"server-test-{name}.log"
        return ComfyServer(host_path, base_directory, log=log, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def comfy_server(server_factory: ServerFactory) -> Iterator[ComfyServer]:
    """The shared running server."""
    with server_factory("session") as server:
        yield server


@pytest.fixture(scope="session")
def runner(comfy_server: ComfyServer, models: dict[str, Path]) -> Runner:
    """Runs workflows on the shared server."""
    return Runner(comfy_server, models)


@pytest.fixture(scope="session")
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for servers that run Inductor: an empty disk cache, theirs to share."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}


@pytest.fixture(scope="session")
def graph_store(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for servers that keep their graphs on disk, in a folder that they share."""
    folder = tmp_path_factory.mktemp("graphs")
    return {"BLADE_CACHE_DIR": str(folder), "BLADE_DISK_CACHE_MIB": "1024"}
