"""Text from outside is text wherever it is shown: on the terminal, in Markdown, in plots and on pages."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

import gap_export
from gap_export.evaluation.plotting import without_math
from gap_export.evaluation.sweep.show import _in_markdown
from gap_export.terminal import Terminal, one_line, styled, visible

PACKAGE = Path(gap_export.__file__).parent
HOSTILE = (
    "[/red]",
    "[red]x",
    "[link=file:///x]y[/link]",
    r"\[bold]",
    ":warning:",
    "\x1b[31mred\x1b[0m",
    "\x1b]8;;file:///x\x07y",
    "a\rb",
    "a\bb",
    "\x9b31m",
    "\u202eabc",
    "\udcff",
    "\x00",
    "a\u2028b",
)


def shown(*parts: str | tuple[str, str]) -> str:
    """What a terminal that understands colours gets."""
    file = io.StringIO()
    Terminal(file=file, width=200).say(*parts)
    return file.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_as_it_is(text: str) -> None:
    for said in (shown(text), shown((text, "bold")), shown("a ", text)):
        assert visible(text) in said
        assert not set(said) & set("\x1b\x9b\r\b\x07\x00\u202e")
        said.encode("utf-8")


@pytest.mark.parametrize("text", HOSTILE)
def test_tables_and_titles_show_text_as_it_is(text: str) -> None:
    file = io.StringIO()
    table = Table(text, title=text)
    table.add_row(text)
    terminal = Terminal(file=file, width=200)
    terminal.print(table)
    assert file.getvalue().count(visible(text).splitlines()[0]) == 3


def test_without_the_guard_markup_is_lost() -> None:
    file = io.StringIO()
    Console(file=file).print("[red]x")
    assert file.getvalue() == "x\n"


@given(st.text())
def test_any_text_can_be_shown_on_one_line(text: str) -> None:
    line = one_line(text)
    assert line.isprintable() or not set(line) & {"\n", "\r", "\t", "\x1b"}
    assert visible(line) == line, "shown once and twice is the same"
    assert shown(line).rstrip("\n") == styled(line).plain.rstrip("\n")


def test_styles_stand_beside_the_text() -> None:
    file = io.StringIO()
    Terminal(file=file, force_terminal=True, color_system="standard").say(("[red]", "bold"), " ok")
    assert file.getvalue() == "\x1b[1m[red]\x1b[0m ok\n"


@pytest.mark.parametrize(
    "text", ["a|b", "<script>", "[x](file:///y)", "*b*", "_b_", "`c`", "$x$", "&amp;", "~~s~~", "a\nb", "\\"]
)
def test_markdown_marks_mean_nothing(text: str) -> None:
    written = _in_markdown(text)
    assert "\n" not in written
    for place, character in enumerate(written):
        if character in "|<[]*`$&~>":
            assert written[place - 1] == "\\"
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", written) == one_line(text)


def test_names_within_words_stay_readable_in_markdown() -> None:
    assert _in_markdown("cls_attention, 0.25 (36 of 144)") == "cls_attention, 0.25 (36 of 144)"


def test_dollars_are_no_formula() -> None:
    from matplotlib.figure import Figure

    from gap_export.evaluation.plotting import png

    figure = Figure()
    figure.subplots().set_title(without_math(r"$\frac{$ a $x$"))
    assert png(figure).startswith(b"\x89PNG")
    broken = Figure()
    broken.subplots().set_title(r"$\frac{$ a $x$")
    with pytest.raises(ValueError, match="Expected"):
        png(broken)


def test_nothing_else_makes_consoles_or_reads_markup() -> None:
    """The guard stands in one place; a console or a text made elsewhere would go around it."""
    for path in PACKAGE.rglob("*.py"):
        if path.name == "terminal.py" and path.parent == PACKAGE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called.rpartition(".")[2] not in {"Console", "from_markup", "Text"}, (
                    f"{path}: {called}"
                )
