"""docs/estimate.md shows what the command says today."""

import re
from pathlib import Path

import pytest
from commands import ROOT, run_here

PAGE = ROOT / "docs/estimate.md"


def test_the_answer_on_the_page_is_that_of_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a change of the formulas: paste the new output."""
    page = PAGE.read_text()
    command = re.search(r"\(`ballast (estimate [^`]*)`\)", page)
    shown = re.search(r"```text\n(.*?)```", page, re.DOTALL)
    assert command is not None
    assert shown is not None
    monkeypatch.chdir(Path(ROOT))
    ran = run_here(monkeypatch, capsys, *command[1].split())
    said = "\n".join(line.rstrip() for line in ran.out.splitlines())
    assert shown[1].rstrip() == said.rstrip()
