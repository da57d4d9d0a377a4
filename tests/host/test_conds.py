"""A run's prompts are moved to where the model is, and nobody else's."""

from __future__ import annotations

from typing import Any

import torch
from blade_tests.host.tiny import DEVICE, conditioning, relative_rms, sample
from comfy.conds import CONDConstant, CONDCrossAttn, CONDList, CONDNoiseShape, CONDRegular
from comfy.patcher_extension import WrappersMP

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.conds import to_device
from blade.blade_core.host.model import Session, optimize_model

EAGER = OptimizeConfig(backend="eager", on_failure="error")
META = torch.device("meta")


class Foreign(CONDRegular):
    """Of another pack, which may count on its tensor."""


def one() -> dict[str, Any]:
    held = {
        "c_crossattn": CONDCrossAttn(torch.randn(1, 77, 8)),
        "y": CONDRegular(torch.randn(1, 8)),
        "c_concat": CONDNoiseShape(torch.randn(1, 4, 8, 8)),
        "number": CONDConstant(3),
        "several": CONDList([torch.randn(2)]),
        "foreign": Foreign(torch.randn(2)),
        "there": CONDRegular(torch.empty(2, device=META)),
    }
    return {"model_conds": held, "strength": 1.0, "uuid": "a"}


def test_tensors_of_the_host_s_kinds_are_moved() -> None:
    first, other = one(), {"strength": 0.5}
    conds: dict[str, Any] = {"positive": [first, other], "negative": None}
    before = dict(first["model_conds"])
    to_device(conds, META)
    moved, same = conds["positive"]
    assert same is other and conds["negative"] is None
    assert {key: moved[key] for key in ("strength", "uuid")} == {"strength": 1.0, "uuid": "a"}
    for key in ("c_crossattn", "y", "c_concat"):
        now = moved["model_conds"][key]
        assert type(now) is type(before[key]) and now.cond.device == META
        assert now.cond.shape == before[key].cond.shape
    for key in ("number", "several", "foreign", "there"):
        assert moved["model_conds"][key] is before[key]
    assert first["model_conds"] == before  # whoever else has it
    assert before["y"].cond.device.type == "cpu"


def test_nothing_is_done_on_the_cpu() -> None:
    first = one()
    conds = {"positive": [first]}
    to_device(conds, torch.device("cpu"))
    assert conds["positive"][0] is first


def test_prompts_arrive_where_the_model_is(session: Session, sd15: Any) -> None:
    """And the prompt that the user wired stays in main memory."""
    seen: list[torch.device] = []
    model = optimize_model(sd15, EAGER)

    def look(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(args[3].device)  # (x, t, c_concat, c_crossattn, ...)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", look)
    positive = conditioning(seed=1)
    actual = sample(model, positive=positive)
    assert seen and set(seen) == {DEVICE}
    assert positive[0][0].device.type == "cpu"
    assert relative_rms(actual, sample(sd15, positive=positive)) <= 1e-4


def test_a_guider_without_conds_is_left_alone(session: Session, sd15: Any) -> None:
    model = optimize_model(sd15, EAGER)
    (wrapper,) = model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, "blade")
    assert wrapper(lambda guider, x: x + 1, object(), 1) == 2
