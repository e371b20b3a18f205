"""What holds for the whole suite."""

import os

import pytest
from hypothesis import settings

# Ray's workers and servers that tests start inherit it: no test learns from another, or from what
# this machine has measured before.
os.environ["BALLAST_CALIBRATION"] = os.devnull
os.environ["BALLAST_STATE"] = os.devnull  # no folder, so nothing is kept there

# Time is no property of the code on a machine that does other things besides.
settings.register_profile("ballast", deadline=None)
settings.load_profile("ballast")


@pytest.fixture(autouse=True)
def _plain_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are in English, in whichever country the tests run."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG", "LANGUAGE"):
        monkeypatch.delenv(name, raising=False)
