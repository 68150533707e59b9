"""How options take numbers: within their bounds, in plain digits."""

from __future__ import annotations

from typing import Any

import typer

from gap_export.bounds import Bound


def number(bound: Bound) -> dict[str, Any]:
    """What an option of such a number is declared with.

    Python's own conversion would also take `1_000`, digits of other scripts, `nan` and `1e999`.
    """

    def parse(given: Any) -> int | float:
        try:
            return bound.read(str(given))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    kind = "int" if bound.whole else "float"
    sign = "<" if bound.above else "<="
    return {"parser": parse, "metavar": f"<{kind}, {bound.least:.15g} {sign} x <= {bound.most:.15g}>"}
