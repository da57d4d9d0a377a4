"""The host on a CUDA GPU. Run on its own: `python dev.py test tests/gpu`."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if torch.cuda.is_available() and "comfy" not in sys.modules:
    os.environ["BLADE_TEST_DEVICE"] = "cuda:0"
    from blade_tests.host.tiny import SD15, SDXL, make_model

    from blade.blade_core import log
    from blade.blade_core.host import model as blade_model

    @pytest.fixture
    def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[blade_model.Session]:
        """A session of this test's own, so that counters and cache start empty."""
        fresh = blade_model.Session()
        log.forget_said()
        monkeypatch.setattr(blade_model, "session", lambda: fresh)
        yield fresh

    @pytest.fixture
    def whole_gpu() -> None:
        """For tests that read how much of the GPU is in use, whoever uses it."""
        if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
            pytest.skip("other tests use the GPU: run it without -n")

    @pytest.fixture(params=["sd15", "sdxl"])
    def model(request: pytest.FixtureRequest) -> Any:
        """A UNet of real widths and fewer stages, in fp16, as the host runs it on a GPU."""
        wide = {"model_channels": 320, "context_dim": 64}
        config = SD15 | wide | {"num_heads": 8}
        if request.param == "sdxl":
            config = SDXL | wide | {"num_head_channels": 64}
        return make_model(config, dtype=torch.float16)

else:
    reason = "no CUDA GPU" if not torch.cuda.is_available() else "the host runs on the CPU here"
    collect_ignore_glob = ["test_*.py"]
    sys.stderr.write(f"tests/gpu left out: {reason}\n")
