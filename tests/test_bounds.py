"""Numbers from users: within their bounds, in plain digits, said in one line."""

from __future__ import annotations

import math
import sys
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export import bounds, cli
from gap_export.bounds import Bound, several
from gap_export.cli.app import app
from gap_export.errors import InputError

BOUNDS = [value for value in vars(bounds).values() if isinstance(value, Bound)]
NO_NUMBERS = [
    "1_000",
    "",
    " ",
    " 1",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "9" * 26,
    "9" * 5000,
    "0x10",
    "1,5",
    "--1",
    "\uff11\uff12",
    "\u0661",
    "1e5000",
    "true",
    "1\n",
    "\u00bd",
    "1j",
]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_plain_number_is_refused(text: str, bound: Bound) -> None:
    with pytest.raises(ValueError, match="is not a"):
        bound.read(text)


@given(st.sampled_from(BOUNDS), st.floats() | st.integers())
def test_numbers_are_read_if_and_only_if_they_are_within(bound: Bound, value: float) -> None:
    """Against the bounds themselves, for every number and every quantity."""
    text = repr(value)
    within = (
        math.isfinite(value)
        and bound.least <= value <= bound.most
        and not (bound.above and value == bound.least)
    )
    written = isinstance(value, int) or not bound.whole
    if within and written:
        assert bound.read(text) == value
    else:
        with pytest.raises(ValueError, match="is not a"):
            bound.read(text)


@pytest.mark.parametrize(
    "text",
    [
        *(each for each in NO_NUMBERS if each not in (" 1", "1\n")),
        "0.5,",
        ",",
        "0.5,,0.25",
        "0.5;0.25",
        "0.5,0.50",
    ],
)
def test_lists_of_fractions_say_which_entry_is_none(text: str) -> None:
    with pytest.raises(InputError, match="--keep"):
        several(text, bounds.FRACTION, "--keep")


def test_lists_are_read_in_their_order() -> None:
    assert several("0.5, 1,.25", bounds.FRACTION, "--keep") == [0.5, 1, 0.25]


@pytest.mark.parametrize("value", [0, -1, 10**12, math.nan, math.inf, True, "8", 1.5])
def test_arguments_in_python_are_held_to_the_same_bounds(value: object) -> None:
    with pytest.raises(InputError, match="limit"):
        bounds.check(limit=value)  # type: ignore[arg-type]
    bounds.check(limit=None, threads=0, min_box_iou=1.0)


def _options_of_numbers() -> list[tuple[str, str, Any]]:
    """Command, option, and how it is declared, of every option whose type is a number."""
    found = []
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        for parameter, hint in get_type_hints(command.callback, include_extras=True).items():
            kinds = {hint, *get_args(hint), *(inner for outer in get_args(hint) for inner in get_args(outer))}
            if kinds & {int, float}:
                declared = next(each for each in get_args(hint) if hasattr(each, "parser"))
                long = next((each for each in declared.param_decls or () if each.startswith("--")), None)
                found.append((name, long or f"--{parameter.replace('_', '-')}", declared))
    return found


def test_no_option_converts_numbers_by_itself() -> None:
    """One that is not declared with a bound would take `1_000`, and hang on it."""
    options = _options_of_numbers()
    assert len(options) > 30
    for command, option, declared in options:
        assert declared.parser is not None, f"{command} {option}: declare it with number(...)"


@pytest.mark.parametrize(("command", "option"), [each[:2] for each in _options_of_numbers()])
def test_every_option_of_a_number_is_bounded(
    command: str, option: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for text in ("1_000", "9" * 26, "nan", "1e999"):
        monkeypatch.setattr(sys, "argv", ["gap-export", command, option, text])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        err = capfd.readouterr().err
        assert stop.value.code == 2
        assert err.startswith(f"usage: command line: Invalid value for '{option}'")
        assert "is not a" in err
        assert err.count("\n") == 2
