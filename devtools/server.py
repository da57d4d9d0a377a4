"""Start and stop a ComfyUI server for tests and the demo. Runs inside the environment."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import requests

from devtools import WORK, DevError

# The host starts, and exits 0, with a pack that could not be imported: only its log tells.
_IMPORT_FAILURE = re.compile(r"(Cannot import|\(IMPORT FAILED\)).*custom_nodes")
_TAIL = 60


def device_arguments() -> list[str]:
    """What the host needs to run on this machine: nothing with a GPU, else CPU mode."""
    import torch

    if torch.cuda.is_available():
        return []
    return ["--cpu", "--use-pytorch-cross-attention"]


class ComfyServer:
    """A ComfyUI process as a context manager; `url` is valid while it runs."""

    def __init__(
        self,
        host: Path,
        base: Path,
        *,
        python: Path | None = None,
        arguments: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        log: Path | None = None,
        start_timeout: float = 300.0,
    ) -> None:
        """`arguments` are added to the command line and `variables` to the environment."""
        self.host = host.resolve()
        self.base = base.resolve()
        self.log = log or WORK / "logs" / f"server-{base.name}.log"
        self.port = 0
        self._python = python or Path(sys.executable)
        self._arguments = list(arguments)
        self._variables = dict(variables or {})
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: IO[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's address, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The id of the running process."""
        if self._process is None:
            raise DevError("The server is not running. Use it inside its `with` block.")
        return self._process.pid

    def __enter__(self) -> "ComfyServer":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def log_text(self) -> str:
        """All the server wrote so far."""
        if not self.log.is_file():
            return ""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def start(self) -> None:
        """Start the server and wait until it answers; raise where it or the pack fails."""
        self.port = _free_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = self.log.open("wb")
        # Unbuffered and UTF-8 whatever the console: the log is read while the server runs.
        variables = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"} | self._variables
        own_group: dict[str, int | bool] = {"start_new_session": True}
        if os.name == "nt":
            own_group = {"creationflags": 0x200}  # CREATE_NEW_PROCESS_GROUP
        self._process = subprocess.Popen(
            self._command(),
            cwd=self.host,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            **own_group,  # type: ignore[call-overload]
        )
        try:
            self._wait_until_ready()
            self._check_imports()
        except BaseException:
            self.stop()
            raise

    def stop(self, patience: float = 15.0) -> None:
        """End the server, politely first, and everything it started."""
        process, self._process = self._process, None
        if process is None:
            return
        # A shell's background job ignores SIGINT, and so does what it starts.
        deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        polite = signal.SIGTERM if deaf else signal.SIGINT
        if os.name == "nt":
            polite = signal.Signals(1)  # CTRL_BREAK_EVENT
        if process.poll() is None:
            process.send_signal(polite)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        _kill_group(process)
        process.wait()
        if self._log_file is not None:
            self._log_file.close()

    def _command(self) -> list[str]:
        return [
            str(self._python),
            str(self.host / "main.py"),
            "--base-directory",
            str(self.base),
            "--port",
            str(self.port),
            "--disable-api-nodes",
            "--disable-auto-launch",
            "--database-url",
            "sqlite:///:memory:",
            *device_arguments(),
            *self._arguments,
        ]

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_timeout
        while time.monotonic() < deadline:
            code = self._process.poll()
            if code is not None:
                raise self._failure(f"ComfyUI ended with exit code {code} while starting")
            try:
                if requests.get(f"{self.url}/system_stats", timeout=5).ok:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.2)
        raise self._failure(f"ComfyUI did not answer within {self._start_timeout:.0f} s")

    def _check_imports(self) -> None:
        found = _IMPORT_FAILURE.search(self.log_text())
        if found:
            raise self._failure(f"ComfyUI could not import the pack ({found.group(1)})")

    def _failure(self, what: str) -> DevError:
        tail = "\n".join(self.log_text().splitlines()[-_TAIL:])
        return DevError(
            f"{what}. The end of its log:\n{tail}\n"
            f"Command: {' '.join(self._command())}\nThe whole log is {self.log}."
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of the process and its children, such as compile workers."""
    if os.name == "nt":
        command = ["taskkill", "/PID", str(process.pid), "/T", "/F"]
        subprocess.run(command, capture_output=True)
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
