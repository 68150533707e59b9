"""The layouts of images that there are. A further one is a file with its class, and its place here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gap_export.inputs.batch import ImageLayout, TokenRange
from gap_export.inputs.native_resolution import NativeResolutionLayout
from gap_export.inputs.square import SquareLayout
from gap_export.inputs.tiles import AnyResLayout, DynamicTilesLayout

__all__ = [
    "AnyResLayout",
    "DynamicTilesLayout",
    "ImageLayout",
    "Layout",
    "NativeResolutionLayout",
    "SquareLayout",
    "TokenRange",
]

Layout = Annotated[
    SquareLayout | AnyResLayout | DynamicTilesLayout | NativeResolutionLayout, Field(discriminator="kind")
]
"""Whatever a bundle may hold; `kind` tells which."""
