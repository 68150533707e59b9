"""What the vision graph takes of an image: it follows from how images are laid out."""

from __future__ import annotations

from gap_export.bundle.spec import Dim, TensorSpec, float_spec, int64_spec
from gap_export.inputs.batch import PIXELS, TYPICAL_SIZE
from gap_export.inputs.layouts import (
    AnyResLayout,
    DynamicTilesLayout,
    Layout,
    NativeResolutionLayout,
    SquareLayout,
    TokenRange,
)
from gap_export.inputs.native_resolution import (
    PATCH_POSITIONS,
    TOKEN_SLOTS,
    WINDOW_TOKENS,
    most_windows,
    typical_windows,
)
from gap_export.inputs.tiles import CORNERS, NEWLINES, PLACES, TOKEN_INDEX, WEIGHTS, anyres_places


def image_inputs(layout: Layout, batch: Dim, tokens: TokenRange | None) -> tuple[TensorSpec, ...]:
    """Inputs of the vision graph besides those about expression and count, in the order in which modules take them.

    Args:
        layout: of the images.
        batch: rows of one call; images that differ in size go one by one.
        tokens: how many visual tokens images have, where they differ.
    """
    if isinstance(layout, SquareLayout):
        return (square_images(layout.size, batch),)
    if isinstance(layout, AnyResLayout):
        return anyres_inputs(layout)
    if isinstance(layout, DynamicTilesLayout):
        return (tile_pixels(layout),)
    return native_inputs(layout, layout.token_range()[0] if tokens is None else tokens)


def square_images(size: int, batch: Dim) -> TensorSpec:
    """pixel_values [B, 3, size, size] of images that all have one size."""
    return float_spec(PIXELS, "float32", batch, 3, size, size)


def tile_pixels(layout: AnyResLayout | DynamicTilesLayout) -> TensorSpec:
    """Tiles of one image."""
    typical, most = layout.tile_counts()
    tiles = Dim(name="tiles", minimum=1, optimum=typical, maximum=most)
    size = layout.size
    return float_spec(PIXELS, "float32", tiles, 3, size, size)


def anyres_inputs(layout: AnyResLayout) -> tuple[TensorSpec, ...]:
    """Of one image of AnyResLayout tiles."""
    tokens, _ = layout.token_range()
    prunable = Dim(
        name="prunable", minimum=tokens.min_tokens, optimum=tokens.typical_tokens, maximum=tokens.max_tokens
    )
    typical_lines = len(anyres_places(*TYPICAL_SIZE, layout)[NEWLINES])
    lines = Dim(name="lines", minimum=1, optimum=typical_lines, maximum=tokens.never_pruned)

    sources = (
        (int64_spec(TOKEN_INDEX, prunable),)
        if layout.max_tiles is None
        else (int64_spec(CORNERS, prunable, 4), float_spec(WEIGHTS, "float32", prunable, 4))
    )
    return (tile_pixels(layout), int64_spec(PLACES, prunable), int64_spec(NEWLINES, lines), *sources)


def native_inputs(layout: NativeResolutionLayout, tokens: TokenRange) -> tuple[TensorSpec, ...]:
    """Of one image at its own shape.

    Args:
        layout: of the model; its bounds on the number of pixels do not count, as `tokens` has them.
        tokens: how many visual tokens images have.
    """
    several = Dim(
        name="tokens", minimum=tokens.min_tokens, optimum=tokens.typical_tokens, maximum=tokens.max_tokens
    )
    patches, window = layout.merge**2, layout.window
    samples = 3 * layout.frames * layout.patch**2
    inputs = (
        float_spec(PIXELS, "float32", several, patches, samples),
        int64_spec(PATCH_POSITIONS, several, patches, 2),
    )
    if window is None:
        return inputs
    most = most_windows(tokens, window)
    typical = min(typical_windows(tokens, window), most)
    windows = Dim(name="windows", minimum=1, optimum=typical, maximum=most)
    return (
        *inputs,
        int64_spec(WINDOW_TOKENS, windows, window**2),
        int64_spec(TOKEN_SLOTS, several),
    )
