"""GET /blade/stats: the report of all models, for programs that talk to the server."""

from __future__ import annotations

import sys
from typing import Any

from ..blade_core.errors import BladeError
from ..blade_core.host.model import stats


def register_routes() -> None:
    """Add the route to the running server; does nothing where there is none (tests, tools)."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    instance = getattr(server, "instance", None)
    if instance is None:
        return
    from aiohttp import web  # the host's own web framework

    @instance.routes.get("/blade/stats")
    async def blade_stats(_: Any) -> Any:
        try:
            return web.json_response(stats())
        except BladeError as error:
            return web.json_response({"error": str(error)}, status=500)
