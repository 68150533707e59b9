"""What the values of a configuration's fields must be: types, ranges, bounds. One table, by name: a field means the same wherever it stands.

Bounds are far above what any published model has, and low enough that nothing asks for terabytes or takes minutes before the weights
tell that the configuration is not theirs. How fields must fit each other is checked by `sizes.py`, once defaults are filled in; which
values are supported at all is said in `config_fields.py`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Value:
    """What a value must be.

    Attributes:
        wanted: in words.
        holds: whether one is so.
        null: whether null is the same as no field.
    """

    wanted: str
    holds: Callable[[Any], bool]
    null: bool = True

    def __or__(self, other: Value) -> Value:
        """Either."""
        return Value(
            f"{self.wanted}, or {other.wanted}", lambda value: self.holds(value) or other.holds(value)
        )


def whole(low: int, high: int) -> Value:
    """A whole number; truth values, which Python counts among them, are none."""
    return Value(
        f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high
    )


def number(low: float, high: float) -> Value:
    """A number between bounds, which NaN and infinity are not."""
    return Value(
        f"a number from {low:g} to {high:g}", lambda value: is_number(value) and low <= value <= high
    )


def positive(high: float) -> Value:
    """A number above zero."""
    return Value(f"a number above 0, at most {high:g}", lambda value: is_number(value) and 0 < value <= high)


def several(each: Value, low: int, high: int) -> Value:
    """A list."""
    return Value(
        f"a list of {low if low == high else f'{low} to {high}'}, each {each.wanted}",
        lambda value: isinstance(value, list) and low <= len(value) <= high and all(map(each.holds, value)),
    )


def by_name(each: Value) -> Value:
    """An object."""
    return Value(
        f"an object whose values are {each.wanted}",
        lambda value: isinstance(value, dict) and all(map(each.holds, value.values())),
    )


def is_number(value: Any) -> bool:
    """Whether a value is a number of Python that is finite as a float."""
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST


TRUTH = Value("true or false", lambda value: isinstance(value, bool))
TEXT = Value("text", lambda value: isinstance(value, str) and len(value) <= 1000)
OBJECT = Value("an object", lambda value: isinstance(value, dict))
NULL = Value("null", lambda value: value is None)

WIDTH, LAYERS, HEADS = whole(1, 10**6), whole(1, 1000), whole(1, 10**4)
SIDE, PATCH = whole(1, 2**16), whole(1, 2**10)
"""Of images and of patches, in pixels."""
TOKEN, _ANY_ID = whole(0, 10**8 - 1), whole(-(10**8), 10**8)
POSITIONS = whole(1, 10**9)
PIXELS = whole(1, 10**9)
LAYER = whole(-1000, 1000)
EPSILON = number(1e-30, 1)
ROPE_BASE = (1.0, 1e30)
"""Below, frequencies grow beyond what fp32 holds."""
GRIDS = several(several(SIDE, 2, 2), 1, 1000)
_ELEMENTS = re.compile(r"(torch\.)?(b?float\w*|half|double|auto)")

_IN_ROPE = number(-1e30, 1e30) | TEXT | TRUTH | NULL | several(number(-1e9, 1e9), 0, 10**5)
ROPE = Value(
    "an object of numbers, names, true or false, and lists of numbers",
    lambda value: isinstance(value, dict) and all(map(_IN_ROPE.holds, value.values())),
)


_NAME = re.compile(r"\w{1,100}")


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 100 and pattern.fullmatch(value) is not None


def _table(*rows: tuple[str, Value]) -> Mapping[str, Value]:
    return {name: value for names, value in rows for name in names.split()}


VALUES = _table(
    (
        "model_type vision_feature_select_strategy vision_aspect_ratio mm_vision_tower hidden_act projector_hidden_act",
        TEXT,
    ),
    ("text_config vision_config", OBJECT),
    (
        "attention_bias mlp_bias use_qk_norm use_absolute_position_embeddings use_mean_pooling vision_use_head",
        TRUTH,
    ),
    ("multimodal_projector_bias tie_word_embeddings use_sliding_window", TRUTH),
    ("vocab_size", whole(1, 10**8)),
    ("hidden_size intermediate_size embed_dim out_hidden_size projection_dim", WIDTH),
    ("num_hidden_layers depth", LAYERS),
    ("num_attention_heads num_key_value_heads num_heads", HEADS),
    # Rotary position embedding turns pairs.
    (
        "head_dim",
        Value(
            "an even number from 2 to 16384",
            lambda value: type(value) is int and value in range(2, 2**14 + 1, 2),
        ),
    ),
    ("max_position_embeddings original_max_position_embeddings sliding_window", POSITIONS),
    ("num_position_embeddings", whole(1, 10**7)),
    ("rms_norm_eps layer_norm_eps", EPSILON),
    ("rope_theta", number(*ROPE_BASE)),
    ("rope_scaling rope_parameters", ROPE),
    ("partial_rotary_factor", positive(1)),
    ("layer_types", several(TEXT, 0, 1000)),
    ("norm_type", Value("layer_norm or rms_norm", lambda value: value in ("layer_norm", "rms_norm"))),
    ("image_token_index image_token_id", TOKEN),
    # Original Llamas say -1 for no padding, and some have ids that are in no vocabulary; what embeds is checked by `sizes.py`.
    ("bos_token_id pad_token_id", _ANY_ID | several(_ANY_ID, 0, 1000)),
    ("eos_token_id", _ANY_ID | several(_ANY_ID, 1, 1000)),
    ("vision_feature_layer", LAYER | several(LAYER, 1, 1000)),
    ("mm_vision_select_layer", LAYER | several(LAYER, 1, 1000)),
    ("image_size", SIDE),
    ("patch_size", PATCH),
    ("spatial_merge_size merge_size temporal_patch_size", whole(1, 64)),
    ("window_size", SIDE),
    ("in_channels num_channels in_chans", whole(1, 1000)),
    ("mlp_ratio", positive(1000)),
    ("fullatt_block_indexes deepstack_visual_indexes", several(whole(0, 999), 0, 1000)),
    ("image_grid_pinpoints", GRIDS),
    ("image_seq_length", whole(1, 10**7)),
    ("downsample_ratio", positive(1)),
    # Of image processors.
    ("image_mean", several(number(0, 1), 3, 3)),
    ("image_std", several(positive(1000), 3, 3)),
    ("resample", whole(0, 5)),
    ("size crop_size", PIXELS | by_name(PIXELS | NULL)),
    ("min_patches max_patches", whole(1, 1000)),
    ("min_pixels max_pixels", PIXELS),
    ("image_processor", OBJECT),
    # No effect here, but transformers checks them, would fetch what has an owner's name, and makes as many labels.
    ("torch_dtype dtype", Value("an element type", lambda value: _matches(_ELEMENTS, value))),
    (
        "attn_implementation _attn_implementation _attn_implementation_internal",
        Value("a name", lambda value: _matches(_NAME, value)),
    ),
    ("attention_dropout hidden_dropout_prob projection_dropout dropout", number(0, 1)),
    ("num_labels", replace(whole(0, 10**4), null=False)),
    (
        "id2label",
        Value(
            "an object of names by number",
            lambda value: isinstance(value, dict) and all(map(str.isdecimal, value)),
        ),
    ),
    ("label2id", OBJECT),
    # Any value but none is refused.
    ("auto_map quantization_config", OBJECT),
)
"""Field -> what its value must be."""


def fault(name: str, value: Any, own: Mapping[str, Value]) -> str | None:
    """What a field's value must be, in words, where it is not; None where all is well, or nothing is known of the field.

    Args:
        name: of the field.
        value: of the field.
        own: what fields must be in this object, where that is not what they are elsewhere.
    """
    expected = own.get(name) or VALUES.get(name)
    if expected is None or (value is None and expected.null) or expected.holds(value):
        return None
    return expected.wanted


def division_fault(content: Mapping[str, Any]) -> tuple[str, str] | None:
    """(Field, what it must be) of a number of heads that does not divide what it has to, where one object states both; None else.

    transformers refuses them too, without the field's name.
    """
    divided = {"num_key_value_heads": "num_attention_heads"}
    if content.get("head_dim") is None:
        divided["num_attention_heads"] = "hidden_size"
    for name, whole_name in divided.items():
        part, total = content.get(name), content.get(whole_name)
        if part and total and total % part:
            return name, f"a divisor of {whole_name}, {total}"
    return None


def without_a_row(names: Iterable[str]) -> frozenset[str]:
    """The names of fields of which nothing is said here."""
    return frozenset(names) - VALUES.keys()
