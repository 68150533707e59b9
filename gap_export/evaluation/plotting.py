"""What all plots have in common: colours, marks, a light frame, and how they become files."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING

from gap_export.errors import MissingRequirementError
from gap_export.terminal import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
}
"""Colours that the colour-blind can tell apart (Okabe and Ito)."""

COLOURS = tuple(PALETTE[name] for name in ("blue", "vermilion", "green", "purple", "orange", "sky"))
"""In the order in which lines get them."""

MARKS = ("o", "s", "^", "D", "v", "P")
"""Marks that can be told apart in print without colour."""

_DOTS_PER_INCH = 160
_RING_POINTS = 15


def available() -> bool:
    """Whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def check_matplotlib(hint: str = "pip install 'gap-export[report]'") -> None:
    """Refuse before long work where its plot could not be drawn.

    Args:
        hint: what to do without it.

    Raises:
        MissingRequirementError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingRequirementError(
            "is needed to draw the plot and not installed", subject="matplotlib", hint=hint
        ) from error


def hide_frame(axes: Axes) -> None:
    """Leave two of the four sides, and faint lines to read values by."""
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def ring(axes: Axes, x: float, y: float) -> None:
    """Mark the point that was chosen."""
    axes.plot([x], [y], "o", markersize=_RING_POINTS, markerfacecolor="none", color="#222222")


def without_math(text: str) -> str:
    """Text from outside for a title or a label: dollars begin no formula there, and what cannot be seen is written as escapes."""
    return one_line(text).replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """The plot as a PNG file."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=_DOTS_PER_INCH)
    return target.getvalue()


def svg(figure: Figure) -> str:
    """The drawing alone, to stand in a page: the same text for the same numbers."""
    from matplotlib import rc_context

    target = io.StringIO()
    with rc_context({"svg.hashsalt": "gap-export"}):
        figure.savefig(target, format="svg", metadata={"Date": None}, transparent=True)
    text = target.getvalue()
    return text[text.index("<svg") :]
