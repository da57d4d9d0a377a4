"""What Blade adds to a running server: GET /blade/stats, and a look at the graphs at its start."""

from __future__ import annotations

import sys
from typing import Any

from ..blade_core.errors import BladeError
from ..blade_core.host.model import started, stats


def register_routes() -> None:
    """Add both to the host's server; does nothing where there is none (tests, tools).

    The route gives the report of all models, for programs that talk to the server.
    """
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    instance = getattr(server, "instance", None)
    if instance is None:
        return
    instance.app.on_startup.append(_on_startup)
    from aiohttp import web  # the host's own web framework

    @instance.routes.get("/blade/stats")
    async def blade_stats(_: Any) -> Any:
        try:
            return web.json_response(stats())
        except BladeError as error:
            return web.json_response({"error": str(error)}, status=500)


async def _on_startup(_: Any) -> None:
    started()  # all packs are imported by now, and no prompt can have come yet
