"""How the sizes in a configuration must fit each other: heads and widths, patches and images, tokens and vocabulary.

Held against the configuration as transformers reads it, with what a file leaves out filled in. That every size is a sensible number by itself
is known by then (`field_values.py`).
"""

from __future__ import annotations

from typing import Any

from gap_export.modeling.hf_config import ConfigCheck

MOST_PATCHES = 10**6
"""Of one image, or of one tile; published towers have a thousand."""


def check_decoder(text_config: Any, check: ConfigCheck) -> None:
    """Refuse sizes that no decoder can be made of.

    Args:
        text_config: of the decoder.
        check: of the checkpoint that it stands in.

    Raises:
        CheckpointError: names the field.
    """
    heads, kv_heads = text_config.num_attention_heads, text_config.num_key_value_heads
    width = getattr(text_config, "head_dim", None)

    def field(name: str) -> str:
        return check.path("text_config", name)

    check(field("num_key_value_heads"), heads % kv_heads == 0, f"a divisor of the {heads} attention heads")
    if width is None:
        divides = text_config.hidden_size % heads == 0
        check(field("num_attention_heads"), divides, f"a divisor of hidden_size {text_config.hidden_size}")
        width = text_config.hidden_size // heads
    check(field("head_dim"), width % 2 == 0, "even: rotary position embedding turns pairs")
    vocabulary, padding = text_config.vocab_size, text_config.pad_token_id
    check(
        field("pad_token_id"),
        padding is None or -vocabulary <= padding < vocabulary,
        f"a token of the vocabulary, which ends at {vocabulary - 1}",
    )


def check_square_tower(vision_config: Any, check: ConfigCheck, *, cuts_off: bool = False) -> None:
    """Refuse sizes that no tower for images of one size can be made of.

    Args:
        vision_config: of the tower.
        check: of the checkpoint that it stands in.
        cuts_off: whether published towers leave out what is left of the image beyond whole patches: SigLIP's of 384 pixels has patches
            of 14, and so 27 in a row.

    Raises:
        CheckpointError: names the field.
    """
    heads, width = vision_config.num_attention_heads, vision_config.hidden_size
    check(
        check.path("vision_config", "num_attention_heads"),
        width % heads == 0,
        f"a divisor of hidden_size {width}",
    )
    for name in (
        "image_size",
        "patch_size",
    ):  # null may be no field, or one that transformers has no default for
        stated = getattr(vision_config, name) is not None
        check(check.path("vision_config", name), stated, "a number of pixels")
    image, patch = _side(vision_config.image_size), _side(vision_config.patch_size)
    field = check.path("vision_config", "image_size")
    check(field, image >= patch, f"at least patch_size {patch}")
    check(field, cuts_off or image % patch == 0, f"a multiple of patch_size {patch}")
    check(field, (image // patch) ** 2 <= MOST_PATCHES, f"at most {MOST_PATCHES} patches")


def check_native_tower(vision_config: Any, text_config: Any, check: ConfigCheck) -> None:
    """Refuse sizes that no tower for images of any size (Qwen-VL) can be made of.

    Args:
        vision_config: of the tower.
        text_config: of the decoder.
        check: of the checkpoint that both stand in.

    Raises:
        CheckpointError: names the field.
    """
    width = getattr(vision_config, "embed_dim", None) or vision_config.hidden_size
    out = getattr(vision_config, "out_hidden_size", None) or vision_config.hidden_size
    heads, depth = vision_config.num_heads, vision_config.depth
    fits = width % heads == 0 and (width // heads) % 4 == 0
    check("vision_config.num_heads", fits, f"one by which {width} is divided into multiples of 4")
    name = "out_hidden_size" if hasattr(vision_config, "out_hidden_size") else "hidden_size"
    check(
        f"vision_config.{name}",
        out == text_config.hidden_size,
        f"the decoder's width, {text_config.hidden_size}",
    )
    whole = getattr(vision_config, "fullatt_block_indexes", None) or []
    check(
        "vision_config.fullatt_block_indexes",
        all(index < depth for index in whole),
        f"below the {depth} layers of the tower",
    )
    table = getattr(vision_config, "num_position_embeddings", None)
    check(
        "vision_config.num_position_embeddings",
        table is None or round(table**0.5) ** 2 == table,
        "the square of a whole number",
    )


def _side(extent: Any) -> int:
    """Of a square."""
    return int(extent[0] if isinstance(extent, list | tuple) else extent)
