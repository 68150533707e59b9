"""Sizes of a model and layouts of its images, against limits and against each other: of a checkpoint before it is traced, of a bundle
whenever it is opened."""

from __future__ import annotations

import math

from gap_export.bundle.check.limits import (
    LARGEST_VOCABULARY,
    MOST_PIXELS,
    MOST_VISUAL_TOKENS,
    Faults,
    outside,
)
from gap_export.bundle.manifest import ModelSpec
from gap_export.errors import InputError, shown
from gap_export.inputs.layouts import (
    AnyResLayout,
    DynamicTilesLayout,
    Layout,
    NativeResolutionLayout,
    SquareLayout,
)

LARGEST_STD, SMALLEST_STD = 1000.0, 0.001
"""Of channels that are scaled to 0..1."""
MOST_TILES, MOST_GRIDS = 256, 1024
_MOST_LINES = 2**18
"""Rows and columns of tokens of all grids together: every one of them is looked at when tokens are counted."""


def model_faults(model: ModelSpec) -> Faults:
    """What is wrong with the sizes of a model by themselves."""
    yield from outside(
        [
            ("spec.hidden_size", model.hidden_size, 1, 2**17),
            ("spec.deepstack_levels", model.deepstack_levels, 0, 64),
            ("spec.layers", model.layers, 1, 2**10),
            ("spec.attention_heads", model.attention_heads, 1, 2**12),
            ("spec.kv_heads", model.kv_heads, 1, model.attention_heads),
            ("spec.head_dim", model.head_dim, 1, 2**13),
            ("spec.vocabulary", model.vocabulary, 1, LARGEST_VOCABULARY),
            ("spec.visual_tokens", model.visual_tokens, 1, MOST_VISUAL_TOKENS),
            ("spec.max_positions", model.max_positions, 1, 2**31),
            (
                "spec.scaled_beyond",
                1 if model.scaled_beyond is None else model.scaled_beyond,
                1,
                model.max_positions,
            ),
        ]
    )
    if model.attention_heads % model.kv_heads:
        yield f"spec.attention_heads is {model.attention_heads}, which {model.kv_heads} kv_heads do not divide"


def layout_faults(layout: Layout) -> Faults:
    """What is wrong with a layout by itself."""
    for name, channels, least, most in (
        ("mean", layout.mean, 0.0, 1.0),
        ("std", layout.std, SMALLEST_STD, LARGEST_STD),
    ):
        yield from outside((f"layout.{name}.{n}", value, least, most) for n, value in enumerate(channels))
    if isinstance(layout, SquareLayout):
        yield from outside([("layout.size", layout.size, 1, math.isqrt(MOST_PIXELS))])
        yield from outside(
            (f"layout.background.{n}", value, 0, 255) for n, value in enumerate(layout.background)
        )
    elif isinstance(layout, AnyResLayout):
        yield from _anyres_faults(layout)
    elif isinstance(layout, DynamicTilesLayout):
        yield from outside(
            [
                ("layout.size", layout.size, 1, math.isqrt(MOST_PIXELS)),
                ("layout.tokens", layout.tokens, 1, MOST_VISUAL_TOKENS),
                ("layout.max_tiles", layout.max_tiles, layout.min_tiles, MOST_TILES),
                ("layout.max_tiles * size**2", layout.max_tiles * layout.size**2, 1, MOST_PIXELS),
            ]
        )
    else:
        yield from _native_faults(layout)


def visual_faults(model: ModelSpec, layout: Layout) -> Faults:
    """Whether a model has the visual tokens that its layout gives; both are known to be well by themselves."""
    try:
        counted = layout.token_range()
    except InputError as error:
        yield f"layout has no tokens for an ordinary image: {error.message}"
        return
    if counted is None:
        if model.token_range is not None:
            yield f"spec.token_range is given, and images of the layout {layout.kind} have all as many visual tokens"
        if model.grid is None or min(model.grid) < 1 or math.prod(model.grid) != model.visual_tokens:
            yield f"spec.grid is {shown(model.grid)}, and there are {model.visual_tokens} visual tokens"
        if model.position_rows == 3:
            yield f"spec.position_rows is 3, and images of the layout {layout.kind} have no grids of their own"
        return
    tokens, most = counted
    if model.grid is not None:
        yield f"spec.grid is {shown(model.grid)}, and images of the layout {layout.kind} differ"
    if model.token_range != tokens:
        yield f"spec.token_range is {shown(model.token_range)}, and the layout's is {shown(tokens)}"
    if model.visual_tokens != most:
        yield f"spec.visual_tokens is {model.visual_tokens}, and the layout's largest image has {most}"
    if model.position_rows == 3 and not isinstance(layout, NativeResolutionLayout):
        yield f"spec.position_rows is 3, and images of the layout {layout.kind} have no grids of their own"


def _anyres_faults(layout: AnyResLayout) -> Faults:
    size, side = layout.size, layout.side
    yield from outside(
        [
            ("layout.size", size, 1, math.isqrt(MOST_PIXELS)),
            ("layout.side", side, 1, math.isqrt(MOST_VISUAL_TOKENS)),
            ("layout.max_tiles", layout.max_tiles or 1, 1, MOST_TILES),
            ("the number of layout.grids", len(layout.grids), 1, MOST_GRIDS),
        ]
    )
    for number, (height, width) in enumerate(layout.grids):
        if min(height, width) < 1 or height % size or width % size:
            yield f"layout.grids.{number} is {shown((height, width))}, no multiple of tiles of {size}"
        yield from outside(
            [
                (f"layout.grids.{number} in pixels", height * width, 1, MOST_PIXELS),
                (f"layout.grids.{number} in tiles", height * width // size**2, 1, MOST_TILES),
                (
                    f"layout.grids.{number} in tokens",
                    height * width // size**2 * side**2,
                    1,
                    MOST_VISUAL_TOKENS,
                ),
            ]
        )
    lines = sum((height + width) // size * side for height, width in layout.grids)
    yield from outside([("layout.grids in rows and columns of tokens", lines, 1, _MOST_LINES)])


def _native_faults(layout: NativeResolutionLayout) -> Faults:
    yield from outside(
        [
            ("layout.patch", layout.patch, 1, 2**10),
            ("layout.merge", layout.merge, 1, 64),
            ("layout.frames", layout.frames, 1, 16),
            ("layout.window", layout.window or 1, 1, 2**10),
            ("layout.max_pixels", layout.max_pixels, layout.min_pixels, MOST_PIXELS),
        ]
    )
