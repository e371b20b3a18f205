"""Bars and lines of text."""

import pytest

from cluster.terminal import bar, one_line


@pytest.mark.parametrize(
    ("part", "drawn"),
    [
        (0.0, "    "),
        (0.5, "██  "),
        (1.0, "████"),
        (7.0, "████"),
        (-1.0, "    "),
        (0.3125, "█▎  "),
        (0.0001, "▏   "),
    ],
)
def test_a_bar_is_as_long_as_its_part(part: float, drawn: str) -> None:
    assert bar(part, cells=4) == drawn


def test_a_text_with_breaks_and_control_characters_is_one_harmless_line() -> None:
    assert one_line("a\nb\x1b[31m\tc\r\nd") == "a b [31m c d"
