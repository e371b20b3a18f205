"""Runs the `ballast` command as a shell would, in this process or in one of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.cli import main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "tests/vram/configs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    code: int
    out: str
    err: str
    cpu_s: float = 0.0
    peak_bytes: int = 0

    @property
    def only_error(self) -> str:
        """Of a command that refused: one line, nothing else."""
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        assert self.err.startswith("ballast ")
        assert self.err.count("\n") == 1
        assert "Traceback" not in self.err
        return self.err


def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> Ran:
    monkeypatch.setattr(sys, "argv", ["ballast", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    code = ended.value.code
    return Ran(
        code=code if isinstance(code, int) else int(code is not None),
        out=captured.out,
        err=captured.err,
    )


BALLAST = (sys.executable, "-m", "cluster.cli")
# A child counts as large as what it was forked from, and a test process is large.
LAUNCHER = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024], file)
sys.exit(code)
"""


def run_alone(*words: str, env: Mapping[str, str] | None = None) -> Ran:
    """With what it used of the processor and of the memory."""
    with tempfile.NamedTemporaryFile() as used:
        ran = subprocess.run(
            [sys.executable, "-c", LAUNCHER, used.name, *BALLAST, *words],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
        )
        cpu_s, peak_bytes = json.loads(Path(used.name).read_text())
    return Ran(
        code=ran.returncode, out=ran.stdout, err=ran.stderr, cpu_s=cpu_s, peak_bytes=peak_bytes
    )
