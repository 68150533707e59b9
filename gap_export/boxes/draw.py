"""The reader's own image with what the model saw and what it answered.

Patches that were pruned lose their colour and fade towards slate, which is visible on white and on black
images alike; kept patches stay as they are, with a hairline around them. Parts that never reached the model
(cut away by a centre crop) count as pruned. A box is amber between two dark lines, drawn outside its edge
so that it hides nothing, however small the object. A band below says what was asked and what came out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gap_export.boxes.codecs import Box, to_pixels
from gap_export.inputs.batch import ImageLayout
from gap_export.positions import Ids

LEAST_LONG_SIDE = 640
"""Smaller images are enlarged to at least this many pixels on the long side."""
TINY = 200
"""Up to this long side, pixels are enlarged as squares; smoothing would invent detail that the model did not
get."""
LEAST_WIDTH = 420
"""Of the canvas, so that the caption under a narrow image can be read."""

_FADED = 0.6
"""How far a pruned pixel goes towards slate."""
_SLATE, _AMBER, _CASING, _HAIRLINE = (72, 77, 86), (255, 196, 0), (12, 14, 18), (255, 255, 255)
_BAND, _TEXT, _FAINT = (18, 20, 26), (245, 246, 248), (158, 166, 178)


def draw(
    image: Image.Image,
    boxes: Sequence[Box],
    kept_indices: Ids,
    grid: tuple[int, int] | None,
    layout: ImageLayout,
    *,
    visual_tokens: int,
    caption: str,
) -> Image.Image:
    """Draw an answer.

    Args:
        image: the original image, any size; RGB as from `load_image`.
        boxes: (x1, y1, x2, y2) each, in pixels of `image`, cut to it where they leave it; empty if the answer had
            none.
        kept_indices: [K] int64 raster indices of the kept patches.
        grid: (rows, columns) of all patches; None where they do not lie on one grid, and none is shaded.
        layout: how the image was fitted, which says where a patch lies on it.
        visual_tokens: N before pruning.
        caption: the expression.

    Returns:
        RGB: the image, at its own size or enlarged, above a caption.

    Raises:
        ValueError: an index outside the grid, a box that is inverted or not finite.
    """
    shown, scale = _enlarged(image.convert("RGB"))
    kept = len(kept_indices)
    if grid is not None:
        kept_RC = _kept_cells(kept_indices, grid)
        kept = int(kept_RC.sum())
        columns_x, rows_y = patch_edges(image.width, image.height, grid, layout)
        shown = _shade(shown, kept_RC, columns_x * scale[0], rows_y * scale[1])
    for box in boxes:
        x1, y1, x2, y2 = _cut_to(image, box)
        _stroke_box(shown, (x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1]))
    return _with_caption(shown, caption, f"kept {kept} of {visual_tokens} patches  ·  {_in_words(boxes)}")


def _in_words(boxes: Sequence[Box]) -> str:
    """What came out, for the caption."""
    if not boxes:
        return "no box in the answer"
    numbers = "; ".join(", ".join(f"{value:.0f}" for value in box) for box in boxes)
    return f"box {numbers}" if len(boxes) == 1 else f"{len(boxes)} boxes {numbers}"


def patch_edges(
    width: int, height: int, grid: tuple[int, int], layout: ImageLayout
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the patch grid lies on the original image.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        grid: (rows, columns).
        layout: how the image was fitted.

    Returns:
        ([columns + 1] x, [rows + 1] y) edges in pixels of the image. Under `pad` they go beyond it.
    """
    rows, columns = grid
    first_x, first_y, span_x, span_y = layout.seen_area((width, height))
    return (
        first_x + span_x * np.arange(columns + 1, dtype=np.float64) / columns,
        first_y + span_y * np.arange(rows + 1, dtype=np.float64) / rows,
    )


def _cut_to(image: Image.Image, box: Box) -> Box:
    """The part of a box in pixels that lies on the image."""
    normalised = (box[0] / image.width, box[1] / image.height, box[2] / image.width, box[3] / image.height)
    return to_pixels(normalised, "image", image.width, image.height, clamp=True)


def _enlarged(image: Image.Image) -> tuple[Image.Image, tuple[float, float]]:
    """The image at a size that can be looked at, and the factors (across, down) it was enlarged by."""
    longest = max(image.size)
    if longest >= LEAST_LONG_SIDE:
        return image, (1.0, 1.0)
    if longest <= TINY:
        factor = -(-LEAST_LONG_SIDE // longest)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST), (
            factor,
            factor,
        )
    width, height = (max(1, round(extent * LEAST_LONG_SIDE / longest)) for extent in image.size)
    enlarged = image.resize((width, height), Image.Resampling.LANCZOS)
    return enlarged, (width / image.width, height / image.height)


def _kept_cells(kept_indices: Ids, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """[rows, columns] whether each patch was kept."""
    rows, columns = grid
    indices = np.asarray(kept_indices, np.int64).reshape(-1)
    if indices.size and not 0 <= indices.min() <= indices.max() < rows * columns:
        raise ValueError(f"kept indices must be within 0..{rows * columns - 1}")
    cells = np.zeros(rows * columns, np.bool_)
    cells[indices] = True
    return cells.reshape(rows, columns)


def _shade(
    shown: Image.Image,
    kept_RC: NDArray[np.bool_],
    columns_x: NDArray[np.float64],
    rows_y: NDArray[np.float64],
) -> Image.Image:
    """Fade what was pruned and draw a hairline around what was kept."""
    column_of_x = np.searchsorted(columns_x, np.arange(shown.width) + 0.5, side="right") - 1
    row_of_y = np.searchsorted(rows_y, np.arange(shown.height) + 0.5, side="right") - 1
    # One ring of pruned cells around the grid catches the pixels that lie outside it.
    ringed = np.pad(kept_RC, 1)
    visible_HW = ringed[np.ix_(row_of_y + 1, column_of_x + 1)]
    if visible_HW.all():
        return shown

    # In three steps over 8-bit images and not in float32 at once, which would take 300 MB for a
    # 12-megapixel photo.
    grey = shown.convert("L").convert("RGB")
    faded = Image.blend(Image.blend(shown, grey, 0.8), Image.new("RGB", shown.size, _SLATE), _FADED)
    shaded = Image.composite(shown, faded, Image.fromarray(visible_HW.astype(np.uint8) * 255))
    border_HW = _border(visible_HW, thickness=max(1, round(max(shown.size) / 900)))
    hairline = Image.new("RGB", shown.size, _HAIRLINE)
    return Image.composite(hairline, shaded, Image.fromarray(border_HW.astype(np.uint8) * 150))


def _border(visible_HW: NDArray[np.bool_], thickness: int) -> NDArray[np.bool_]:
    """[H, W] the visible pixels within `thickness` of one that is not; the rim of the image is no
    border."""
    inner = visible_HW.copy()
    for axis in (0, 1):
        for step in range(1, thickness + 1):
            extent = visible_HW.shape[axis]
            if step >= extent:
                break
            ahead, behind = [slice(None), slice(None)], [slice(None), slice(None)]
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            inner[tuple(behind)] &= visible_HW[tuple(ahead)]
            inner[tuple(ahead)] &= visible_HW[tuple(behind)]
    return visible_HW & ~inner


def _stroke_box(shown: Image.Image, box: Box) -> None:
    """Draw a cased line around a box, in place; where the box touches the rim, the line moves inwards."""
    line = max(3, round(max(shown.size) / 180))
    casing = max(1, line // 3)
    total = line + 2 * casing
    left, top = max(0, round(box[0]) - total), max(0, round(box[1]) - total)
    right, bottom = min(shown.width, round(box[2]) + total), min(shown.height, round(box[3]) + total)
    pen = ImageDraw.Draw(shown)
    for inset, thickness, colour in ((0, total, _CASING), (casing, line, _AMBER)):
        corners = (left + inset, top + inset, right - 1 - inset, bottom - 1 - inset)
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            pen.rectangle(corners, outline=colour, width=thickness)


# ------------------------------------------------------------------------------------------------------------
# Caption


@dataclass(frozen=True)
class _Line:
    """One line of the caption band."""

    text: str
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    colour: tuple[int, int, int]
    height: int


def _with_caption(shown: Image.Image, expression: str, facts: str) -> Image.Image:
    """The image, centred, above a band with the expression and a line of facts."""
    width = max(shown.width, LEAST_WIDTH)
    unit = max(18, round(max(width, min(shown.size)) / 36))
    margin = unit
    large, small = ImageFont.load_default(unit), ImageFont.load_default(max(13, round(unit * 0.72)))
    available = width - 2 * margin
    words = "".join(character if character.isprintable() else " " for character in expression).split()
    lines = [
        _Line(text, large, _TEXT, round(unit * 1.35)) for text in _wrapped(words, large, available, at_most=3)
    ]
    lines += [
        _Line(text, small, _FAINT, round(unit * 1.05))
        for text in _wrapped(facts.split(" "), small, available, 2)
    ]
    band = sum(line.height for line in lines) + round(unit * 1.3)
    canvas = Image.new("RGB", (width, shown.height + band), _BAND)
    canvas.paste(shown, ((width - shown.width) // 2, 0))
    pen = ImageDraw.Draw(canvas)
    y = shown.height + round(unit * 0.6)
    for line in lines:
        pen.text((margin, y), line.text, font=line.font, fill=line.colour)
        y += line.height
    return canvas


def _wrapped(
    words: list[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, at_most: int
) -> list[str]:
    """Words in lines no wider than `width` pixels; what does not fit into `at_most` lines ends in an
    ellipsis."""
    lines: list[str] = []
    rest = list(words)
    while rest:
        taken = 1
        while taken < len(rest) and font.getlength(" ".join(rest[: taken + 1])) <= width:
            taken += 1
        line, rest = " ".join(rest[:taken]), rest[taken:]
        cut_short = bool(rest) and len(lines) + 1 == at_most
        lines.append(_shortened(line, font, width, cut_short))
        if cut_short:
            break
    return lines


def _shortened(
    line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, cut_short: bool
) -> str:
    """A line that fits, with an ellipsis if anything was cut from it or after it."""
    if not cut_short and font.getlength(line) <= width:
        return line
    fits, too_long = 0, len(line) + 1  # bisection: a single word may have thousands of letters
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if font.getlength(line[:middle] + "...") <= width:
            fits = middle
        else:
            too_long = middle
    return line[:fits].rstrip() + "..."
