"""A server that starts again: its graphs come from disk."""

from __future__ import annotations

import time
from pathlib import Path

from blade_tests.server.conftest import ServerFactory
from blade_tests.server.test_images import example
from blade_tests.server.workflow import TOLERANCE, Runner, difference

COMPILER = "torch._inductor.compile_fx"
PATIENCE = 60.0


def test_a_restarted_server_compiles_nothing(
    server_factory: ServerFactory,
    models: dict[str, Path],
    graph_store: dict[str, str],
    inductor_cache: dict[str, str],
    tmp_path: Path,
) -> None:
    names_imports = {"PYTHONPROFILEIMPORTTIME": "1"}
    variables = inductor_cache | graph_store | names_imports
    with server_factory("before-restart", variables=variables) as server:
        before = Runner(server, models)
        assert COMPILER not in server.log_text()
        stock = before.ok(example(before, "sd15", "stock")).latent
        first = before.ok(example(before, "sd15", "blade"))
        needed = first.counted["graphs_compiled"] + first.counted["graphs_loaded"]
        assert needed > 0
    # Nothing of torch's own caches is left, as after a cleaned /tmp.
    variables = graph_store | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    with server_factory("restarted", variables=variables | names_imports) as server:
        after = Runner(server, models)
        # Before there is a prompt.
        end = time.monotonic() + PATIENCE
        while COMPILER not in server.log_text():
            assert time.monotonic() < end
            time.sleep(0.5)
        run = after.ok(example(after, "sd15", "blade"))
        assert run.counted["graphs_compiled"] == run.counted["artifacts_dropped"] == 0
        assert run.counted["graphs_loaded"] == needed
        assert run.counted["blocks_eager"] == 0
        assert difference(run.latent, stock) <= TOLERANCE
        assert run.result.progress_texts()[-1].startswith(f"{needed} graphs ready, first step ")
        assert f"loaded {needed} in " in run.text("BladeReport")
