"""Draws bytes as text: bars, tables and one-line errors. Knows no model and no language."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vram.errors import Invalid

BAR_CELLS = 24
_EIGHTHS = " ▏▎▍▌▋▊▉█"
# Where the output is no terminal, Rich takes 80 columns and folds; a file has room.
WIDTH_OF_A_FILE = 120
# The list of all known architectures is 2,000 characters; what somebody typed may be a megabyte.
LONGEST_LINE = 4000

errors = Console(stderr=True, highlight=False)


def output() -> Console:
    """Standard output; made when it is used, so that a test or a pipe may replace it before."""
    wide = None if sys.stdout.isatty() else WIDTH_OF_A_FILE
    return Console(highlight=False, width=wide)


def bar(part: float, cells: int = BAR_CELLS) -> str:
    """A share from 0 to 1 as blocks, in eighths of a cell; something is never nothing."""
    eighths = round(min(max(part, 0.0), 1.0) * cells * 8)
    if part > 0:
        eighths = max(eighths, 1)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + _EIGHTHS[rest].strip()).ljust(cells)


def table(*columns: str, right: Iterable[int] = ()) -> Table:
    """A table without frames; the columns in `right` hold numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    numbers = set(right)
    for index, column in enumerate(columns):
        made.add_column(
            escape(column),
            justify="right" if index in numbers else "left",
            no_wrap=index in numbers,
        )
    return made


def print_json(document: Mapping[str, Any]) -> None:
    """For machines: no colours, no folding, text as it is."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")


@contextmanager
def refusal_as_json(is_wanted: bool) -> Iterator[None]:
    """What is asked for wrongly does not fit either: a machine finds the reason where it looks."""
    try:
        yield
    except Invalid as error:
        if is_wanted:
            print_json({"fits": False, "reason": str(error), "setting": error.setting})
        raise


def print_error(text: str) -> None:
    """One line on standard error, whatever the text holds."""
    errors.print(f"[bold red]ballast[/bold red] {escape(one_line(text))}", soft_wrap=True)


def one_line(text: str) -> str:
    """Names come from files and command lines: no line break or control character of theirs."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…"
