"""Ends of lines between the kept tokens of an image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gap_export.inputs.batch import PixelInputs
from gap_export.positions import Ids
from gap_export.prune import Grid


def grids_of(pixels: PixelInputs, whole: int) -> tuple[Grid, ...]:
    """The grids of an image: its whole, and lines of tokens, as the place of the first line's end tells.

    Args:
        pixels: of the image.
        whole: tokens of the tile that shows all of it.
    """
    ends, side = pixels["newline_positions"], round(whole**0.5)
    return Grid(side, side), Grid(len(ends), int(ends[0]) - whole)


def with_lines(kept_KH: Tensor, places_K: Ids, newline_H: Tensor, newlines_R: Ids) -> tuple[Tensor, Ids]:
    """Tokens and their places, ends of lines among them: by place, or behind everything where tokens stand in order of score."""
    ends_RH = newline_H.to(kept_KH.dtype).expand(len(newlines_R), -1)
    places, tokens = np.concatenate([places_K, newlines_R]), torch.cat([kept_KH, ends_RH])
    if (np.diff(places_K) < 0).any():
        return tokens, places
    order = np.argsort(places, kind="stable")
    return tokens[torch.from_numpy(order)], places[order]
