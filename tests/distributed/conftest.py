"""A job of two and one of three processes, run once each for all tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.jobs import calibrations_and_trainings, start


@pytest.fixture(scope="session", params=[2, 3], ids=lambda size: f"{size} processes")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("job") / "found"
    return start(calibrations_and_trainings, request.param, folder)
