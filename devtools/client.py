"""A client of ComfyUI's HTTP and WebSocket API. Runs inside the environment."""

import json
import struct
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests
import websocket

from devtools import DevError

Workflow = dict[str, Any]
_TEXT_MESSAGE = 3  # protocol.BinaryEventTypes.TEXT of the host
_HTTP_TIMEOUT = 60.0


@dataclass(frozen=True)
class Event:
    """One WebSocket message; progress text comes as kind `progress_text`."""

    kind: str
    data: dict[str, Any]
    at: float
    """Seconds since the prompt was sent."""


@dataclass
class RunResult:
    """What became of one prompt."""

    prompt_id: str
    status: str = "running"
    """`success`, `error` or `interrupted`."""
    seconds: float = 0.0
    """From the server's start of the prompt to its end, so without waiting in the queue."""
    events: list[Event] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    """Node id to its UI output, from the history."""
    error: dict[str, Any] | None = None
    """The data of `execution_error`."""

    @property
    def ok(self) -> bool:
        """Whether the prompt ran to its end."""
        return self.status == "success"

    def of_kind(self, kind: str) -> list[Event]:
        """The events of one kind, in order."""
        return [event for event in self.events if event.kind == kind]

    def progress_texts(self) -> list[str]:
        """All progress texts, in order."""
        return [str(event.data["text"]) for event in self.of_kind("progress_text")]

    def files(self, key: str = "images") -> list[dict[str, str]]:
        """The output files under `key` (`images`, `latents`) of all nodes, for `view`."""
        return [f for out in self.outputs.values() for f in out.get(key, [])]


class PromptRejected(RuntimeError):
    """The server refused a workflow; `details` is its answer, with `node_errors`."""

    def __init__(self, details: dict[str, Any]) -> None:
        self.details = details
        self.node_errors: dict[str, Any] = details.get("node_errors") or {}
        super().__init__(f"The server refused the workflow: {json.dumps(details, indent=1)}")


class ComfyClient:
    """Talks to one server."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def queue(self, workflow: Workflow, client_id: str) -> str:
        """Send an API-format workflow and return its prompt id."""
        body = {"prompt": workflow, "client_id": client_id}
        answer = requests.post(f"{self.url}/prompt", json=body, timeout=_HTTP_TIMEOUT)
        if answer.status_code == 400:
            raise PromptRejected(answer.json())
        answer.raise_for_status()
        return str(answer.json()["prompt_id"])

    def run(
        self,
        workflow: Workflow,
        on_event: Callable[[Event], None] | None = None,
        timeout: float = 1800.0,
    ) -> RunResult:
        """Run a workflow to its end, following the server's messages.

        A failed or interrupted prompt is a result, not an exception.
        """
        client_id = uuid.uuid4().hex
        # Connected before the prompt is sent, so that no message of it is missed.
        address = f"ws://{urlsplit(self.url).netloc}/ws?clientId={client_id}"
        connection = websocket.create_connection(address, timeout=timeout)
        try:
            start = time.monotonic()
            result = RunResult(self.queue(workflow, client_id))
            while True:
                event = _receive(connection, start, timeout)
                if event is None or event.data.get("prompt_id", result.prompt_id) != (
                    result.prompt_id
                ):
                    continue
                result.events.append(event)
                if on_event is not None:
                    on_event(event)
                if event.kind == "executing" and event.data.get("node") is None:
                    break
        finally:
            connection.close()
        self._conclude(result)
        return result

    def interrupt(self) -> None:
        """Interrupt what the server runs now."""
        self._post("/interrupt", {})

    def free(self) -> None:
        """Have the server unload all models and drop its cached results."""
        self._post("/free", {"unload_models": True, "free_memory": True})

    def object_info(self, name: str) -> dict[str, Any]:
        """The definition of a node class; empty where the server does not know it."""
        return dict(self.get_json(f"/object_info/{name}").get(name, {}))

    def get_json(self, path: str) -> Any:
        """GET a JSON answer, such as `/blade/stats`."""
        answer = requests.get(self.url + path, timeout=_HTTP_TIMEOUT)
        answer.raise_for_status()
        return answer.json()

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """The content of an output file."""
        query = {"filename": filename, "subfolder": subfolder, "type": type}
        answer = requests.get(f"{self.url}/view", params=query, timeout=_HTTP_TIMEOUT)
        answer.raise_for_status()
        return answer.content

    def _post(self, path: str, body: dict[str, Any]) -> None:
        requests.post(self.url + path, json=body, timeout=_HTTP_TIMEOUT).raise_for_status()

    def _conclude(self, result: RunResult) -> None:
        """Read status, duration and outputs from the events and the history."""
        times = {event.kind: event.at for event in result.events}
        ends = {
            "execution_success": "success",
            "execution_error": "error",
            "execution_interrupted": "interrupted",
        }
        for kind, status in ends.items():
            if kind in times:
                result.status = status
                result.seconds = times[kind] - times.get("execution_start", 0.0)
        for event in result.of_kind("execution_error"):
            result.error = event.data
        history = self.get_json(f"/history/{result.prompt_id}")
        result.outputs = dict(history.get(result.prompt_id, {}).get("outputs", {}))


def _receive(connection: websocket.WebSocket, start: float, timeout: float) -> Event | None:
    """The next message of interest; raise when the time is up or the server is gone."""
    remaining = start + timeout - time.monotonic()
    try:
        connection.settimeout(max(remaining, 0.01))
        message = connection.recv()
    except websocket.WebSocketTimeoutException as error:
        raise DevError(
            f"The prompt did not end within {timeout:.0f} s.\n"
            "Give more time, or look into the server's log for what it waits for."
        ) from error
    except (websocket.WebSocketConnectionClosedException, ConnectionError) as error:
        raise DevError(
            f"The server closed the connection ({error}).\n"
            "It has probably crashed or run out of memory: its log tells."
        ) from error
    at = time.monotonic() - start
    if isinstance(message, str):
        if not message:
            raise DevError("The server closed the connection. Its log tells why.")
        content = json.loads(message)
        return Event(content["type"], content.get("data") or {}, at)
    return _text_event(message, at)


def _text_event(message: bytes, at: float) -> Event | None:
    """Decode a binary progress text: type, length of the node id, node id, text."""
    if len(message) < 8 or struct.unpack_from(">I", message)[0] != _TEXT_MESSAGE:
        return None
    (length,) = struct.unpack_from(">I", message, 4)
    node, text = message[8 : 8 + length], message[8 + length :]
    return Event("progress_text", {"node": node.decode(), "text": text.decode()}, at)
