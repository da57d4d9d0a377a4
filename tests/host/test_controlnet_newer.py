"""What newer hosts do with a ControlNet: dynamic VRAM, and several GPUs."""

import gc
import weakref
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from blade_tests.host.control_nets import (
    BOUND,
    applied,
    changes,
    make_controlnet,
    prompts,
    state_of,
)
from blade_tests.host.tiny import DEVICE, SD15, relative_rms, sample

from blade.blade_core.host.model import Session

DYNAMIC: Any = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
needs_dynamic = pytest.mark.skipif(DYNAMIC is None, reason="this host has no dynamic VRAM")


@needs_dynamic
def test_under_dynamic_vram_a_twin_runs(session: Session, sd15: Any) -> None:
    """One for each model, over the same main memory."""
    control = make_controlnet(SD15)
    expected = sample(sd15, **applied(control, **prompts(), config=None), steps=4)
    classic, model = control.control_model_wrapped, control.control_model
    with pytest.MonkeyPatch.context() as patch:  # pinned memory, which only a GPU has
        patch.setattr("comfy_aimdo.host_buffer.HostBuffer", lambda *_: None)
        dynamic = DYNAMIC(model, torch.device("cuda:0"), torch.device("cpu"))
    control.control_model_wrapped = dynamic
    before = state_of(control)
    found = [applied(control, **prompts())["positive"][0][1]["control"] for _ in range(2)]
    (twin,), (again,) = (c.get_models() for c in found)
    assert twin is again is not dynamic and not twin.is_dynamic()
    assert twin.model is not model
    memory = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    assert memory == {name: weight.data_ptr() for name, weight in twin.model.named_parameters()}
    twin.load_device = DEVICE
    actual = sample(sd15, **applied(control, **prompts()), steps=4)
    assert relative_rms(actual, expected) <= BOUND
    assert changes(before, state_of(control)) == []
    control.control_model_wrapped = classic
    assert torch.equal(
        sample(sd15, **applied(control, **prompts(), config=None), steps=4), expected
    )
    gone = weakref.ref(twin.model)
    del control, model, classic, dynamic, found, twin, again, before
    comfy.model_management.unload_all_models()
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(
    not hasattr(comfy.controlnet.ControlNet, "deepclone_multigpu"), reason="one GPU only"
)
def test_a_clone_for_another_gpu(session: Session, sd15: Any) -> None:
    control = make_controlnet(SD15)
    expected = sample(sd15, **applied(control, **prompts(), config=None), steps=4)
    both = applied(control, **prompts())
    ours = both["positive"][0][1]["control"]
    clone = ours.deepclone_multigpu(DEVICE, autoregister=True)
    assert clone.control_model_wrapped is not ours.control_model_wrapped
    assert relative_rms(sample(sd15, **both, steps=4), expected) <= BOUND
    for side in both.values():
        side[0][1]["control"] = clone
    assert relative_rms(sample(sd15, **both, steps=4), expected) <= BOUND
