"""Models under dynamic VRAM leave it once, through their loader, and never twice."""

from typing import Any

import comfy.model_patcher
import pytest
import torch
from blade_tests.host.tiny import SD15, make_model, relative_rms, sample

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.errors import BladeError
from blade.blade_core.host.dynamic import non_dynamic_clone
from blade.blade_core.host.model import Session, optimize_model

DYNAMIC: Any = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
EAGER = OptimizeConfig(backend="eager", on_failure="error")

needs_dynamic = pytest.mark.skipif(DYNAMIC is None, reason="this host has no dynamic VRAM")


def _dynamic(loads: list[bool]) -> Any:
    """A dynamic patcher as a core loader leaves it: it knows how to load its model again.

    Dynamic patchers serve GPUs only; nothing is loaded here before the twin moves to the CPU.
    """
    model = make_model(SD15).model
    with pytest.MonkeyPatch.context() as patch:  # pinned memory, which only a GPU has
        patch.setattr("comfy_aimdo.host_buffer.HostBuffer", lambda *_: None)
        patcher = DYNAMIC(model, torch.device("cuda:0"), torch.device("cpu"))

    def load(*, disable_dynamic: bool) -> Any:
        loads.append(disable_dynamic)
        return make_model(SD15)

    patcher.cached_patcher_init = (load, ())
    return patcher


@needs_dynamic
def test_one_twin_per_model(session: Session) -> None:
    loads: list[bool] = []
    dynamic = _dynamic(loads)
    first, second = optimize_model(dynamic, EAGER), optimize_model(dynamic.clone(), EAGER)
    assert loads == [True]
    assert not first.is_dynamic() and first.model is second.model is not dynamic.model
    first.load_device = torch.device("cpu")
    assert relative_rms(sample(first), sample(make_model(SD15))) <= 1e-4
    assert session.engine.counters["blocks_compiled"] == 10


@needs_dynamic
def test_a_loader_that_cannot_load_again_is_an_error(session: Session) -> None:
    dynamic = _dynamic([])
    dynamic.cached_patcher_init = None
    with pytest.raises(BladeError, match="Load it with one of ComfyUI's own loaders"):
        optimize_model(dynamic, EAGER)


def test_a_classic_model_is_only_cloned(sd15: Any) -> None:
    clone = non_dynamic_clone(sd15)
    assert clone is not sd15 and clone.model is sd15.model
