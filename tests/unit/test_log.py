"""The log: a warning is said once, however many steps fall back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blade.blade_core.log import forget_said, logger, warn_once


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    forget_said()
    yield
    forget_said()


def test_a_warning_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for message in ("one", "two", "one", "100 %s"):
        warn_once(message)
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("blade", "WARNING", "one"),
        ("blade", "WARNING", "two"),
        ("blade", "WARNING", "100 %s"),
    ]


def test_it_is_said_again_when_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    warn_once("one")
    forget_said()
    warn_once("one")
    assert caplog.messages == ["one", "one"]


def test_it_does_not_keep_others_from_being_said(caplog: pytest.LogCaptureFixture) -> None:
    warn_once("one")
    logger.warning("one")
    assert caplog.messages == ["one", "one"]
