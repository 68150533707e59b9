"""Rotary position embedding of decoders: which kinds there are, and those whose frequencies depend on how long a row is.

Most kinds turn a position id into an angle by frequencies that never change, and transformers' own module is traced as it is. Two
choose them by the length of what they are given, and would take the longest row of a batch for all of them:

    dynamic     NTK-aware scaling: beyond `max_position_embeddings` the base grows with the length
                (transformers, `_compute_dynamic_ntk_parameters`)
    longrope    LongRoPE (arXiv 2402.13753): one table up to `original_max_position_embeddings`, another beyond
                (transformers, `_compute_longrope_parameters`)

Here every row has the frequencies that it would have alone. Keys that are in the cache keep the rotation they were written with, as they
do in transformers.

Shape letters: B batch, S tokens, D half of the head's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gap_export.errors import CheckpointError, first_line, shown
from gap_export.modeling.field_values import ROPE_BASE, is_number

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Values of `rope_type` that decoders can have here."""

_MOST_FACTOR = 10**6

BY_LENGTH = ("dynamic", "longrope")
"""Those whose frequencies depend on the length of a row."""

_WITH_SECTIONS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
_SECTIONS = [16, 24, 24]
"""What M-RoPE's are where a config does not say; those of Qwen3-VL are as many together."""


def check(text_config: Any, file: Path) -> None:
    """Refuse settings of a decoder's rotary embedding that no graph can be made of.

    Args:
        text_config: as transformers reads it, with `rope_parameters` whatever the spelling in the file was.
        file: that they stand in, for the message.

    Raises:
        CheckpointError: an unknown kind, or one that lacks what it needs.
    """
    fault = _fault(text_config) or _fault_of_sections(text_config)
    if fault:
        raise CheckpointError(
            f"rope_scaling of the decoder: {fault}",
            subject=str(file),
            hint="compare it with the model as published",
        )


def check_spellings(config: Mapping[str, Any], text_config: Any, file: Path) -> None:
    """Refuse a file with settings in both spellings, where the base in one of them is lost.

    transformers takes `rope_scaling` whole where both stand there: settings for long contexts, entered into a file that it saved itself.

    Args:
        config: content of the file.
        text_config: as transformers reads it.
        file: for the message.

    Raises:
        CheckpointError: names both.
    """
    for part in (config, config.get("text_config")):
        stated = part.get("rope_parameters") if isinstance(part, dict) and part.get("rope_scaling") else None
        base = stated.get("rope_theta") if isinstance(stated, dict) else None
        taken = (text_config.rope_parameters or {}).get("rope_theta")
        if base is not None and base != taken:
            raise CheckpointError(
                f"has rope_parameters and rope_scaling, of which transformers reads the second alone, with rope_theta {taken!r} and not {base!r}",
                subject=str(file),
                hint="write all of it into rope_parameters, and delete rope_scaling",
            )


def _fault(text_config: Any) -> str:
    """What is wrong; "" where nothing is."""
    rope = text_config.rope_parameters or {}
    kind = rope.get("rope_type")
    if kind not in KINDS:
        return f"{shown(kind)} is not supported (supported: {', '.join(KINDS)})"
    base: Any = rope.get("rope_theta")
    low, high = ROPE_BASE
    if not (is_number(base) and low <= base <= high):
        return f"{kind} with rope_theta {shown(base)}: a number from {low:g} to {high:g} is expected"
    factor = rope.get("factor")
    if factor is not None and not (is_number(factor) and 1 <= factor <= _MOST_FACTOR):
        return f"{kind} with factor {shown(factor)}: a number from 1 to {_MOST_FACTOR} is expected"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"{kind} with partial_rotary_factor {rope['partial_rotary_factor']!r}: heads are rotated whole here"
    if kind == "default":
        return ""
    try:
        frequencies_D, scaling = ROPE_INIT_FUNCTIONS[kind](text_config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError, OverflowError) as error:
        return f"{kind} is incomplete: {first_line(error)}"
    if not (frequencies_D.isfinite().all() and math.isfinite(scaling)):
        return f"{kind} gives frequencies that are no finite numbers"
    return ""


def _fault_of_sections(text_config: Any) -> str:
    """What is wrong with how M-RoPE divides the frequencies among time, height and width; "" where nothing is, or it does not."""
    if text_config.model_type not in _WITH_SECTIONS:
        return ""
    width = (
        getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    )
    sections = text_config.rope_parameters.get("mrope_section", _SECTIONS)
    are_counts = isinstance(sections, list) and all(type(count) is int and count >= 0 for count in sections)
    if are_counts and len(sections) == 3 and sum(sections) == width // 2:
        return ""
    stated = (
        "" if "mrope_section" in text_config.rope_parameters else ", which is not stated and by default is"
    )
    return f"mrope_section{stated} {shown(sections)}: three numbers that add up to {width // 2} are expected, half of the width of a head"


def max_positions(text_config: Any) -> int:
    """How many positions a decoder knows: `dynamic` grows up to `factor` times what it was trained for."""
    trained, rope = int(text_config.max_position_embeddings), text_config.rope_parameters
    return int(trained * rope["factor"]) if rope["rope_type"] == "dynamic" else trained


def scaled_beyond(text_config: Any) -> int | None:
    """The position from which on a decoder's frequencies follow the length of what it reads; None where they never do."""
    rope = text_config.rope_parameters
    if rope["rope_type"] not in BY_LENGTH:
        return None
    stated = rope.get("original_max_position_embeddings") if rope["rope_type"] == "longrope" else None
    return int(stated or text_config.max_position_embeddings)


def by_row(rotary: nn.Module) -> nn.Module:
    """A decoder's rotary embedding with frequencies that follow each row's own length; itself, where they depend on none.

    Args:
        rotary: of transformers, its buffers filled.
    """
    return RowRotary(rotary) if getattr(rotary, "rope_type", "default") in BY_LENGTH else rotary


class RowRotary(nn.Module):
    """`dynamic` and `longrope`, row by row.

    Args:
        rotary: of transformers: its settings, and how it composes the three angles of M-RoPE, are read from it.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        config = rotary.config
        self._scaling: float = rotary.attention_scaling
        self._compose: Callable[[Tensor], Tensor] = getattr(rotary, "recomposition_frequencies", _both_halves)
        self._inv_freq_of: Callable[[Tensor], Tensor] = (
            _Dynamic(config, rotary.original_inv_freq)
            if rotary.rope_type == "dynamic"
            else _LongRope(config, rotary.original_inv_freq)
        )

    def forward(
        self, x: Tensor, position_ids: Tensor, largest_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token's angles.

        Args:
            x: gives the element type.
            position_ids: [B, S] int64 (M-RoPE [3, B, S]).
            largest_B: [B] int64, the largest id of each row, where it is not among the ids.

        Returns:
            cos and sin, [B, S, 2 D].
        """
        if largest_B is None:
            ids_BS = position_ids if position_ids.dim() == 2 else position_ids.amax(dim=0)
            largest_B = ids_BS.amax(dim=1)
        inv_freq_B1D = self._inv_freq_of(largest_B + 1)[:, None]
        angles = position_ids[..., None].float() * inv_freq_B1D
        cos, sin = angles.cos() * self._scaling, angles.sin() * self._scaling
        return self._compose(cos).to(x.dtype), self._compose(sin).to(x.dtype)


def own_ids(rotary: nn.Module, position_ids: Tensor, last_index: Tensor) -> Tensor:
    """Position ids among which no row's padding, whose ids go on counting, makes the row look longer than it is.

    Args:
        rotary: of the decoder; the ids are left alone where frequencies follow no length.
        position_ids: [B, S] int64 (M-RoPE [3, B, S]).
        last_index: [B] int64: the row of S with the last real token.
    """
    if not isinstance(rotary, RowRotary):
        return position_ids
    slots_S = torch.arange(position_ids.shape[-1], device=position_ids.device)
    is_padding_BS = slots_S > last_index[:, None]
    largest = position_ids.masked_fill(is_padding_BS, 0).amax(dim=-1, keepdim=True)
    return torch.minimum(position_ids, largest)


class _Dynamic(nn.Module):
    """Length [B] -> inverse frequencies [B, D] of dynamic NTK scaling."""

    exponents_D: Tensor
    trained_D: Tensor

    def __init__(self, config: Any, trained_D: Tensor) -> None:
        super().__init__()
        rope = config.rope_parameters
        self._base, self._factor = float(rope["rope_theta"]), float(rope["factor"])
        self._trained_length, self._width = int(config.max_position_embeddings), 2 * len(trained_D)
        self.register_buffer("exponents_D", torch.arange(0, self._width, 2) / self._width, persistent=False)
        self.register_buffer("trained_D", trained_D.clone(), persistent=False)

    def forward(self, length_B: Tensor) -> Tensor:
        """Up to the trained length those of the model as trained."""
        width = self._width
        stretch_B = self._factor * length_B.float() / self._trained_length - (self._factor - 1)
        base_B = self._base * stretch_B.clamp(min=1) ** (width / (width - 2))
        grown_BD = 1.0 / base_B[:, None] ** self.exponents_D
        return torch.where((length_B > self._trained_length)[:, None], grown_BD, self.trained_D)


class _LongRope(nn.Module):
    """Length [B] -> inverse frequencies [B, D] of LongRoPE."""

    short_D: Tensor
    long_D: Tensor

    def __init__(self, config: Any, short_D: Tensor) -> None:
        super().__init__()
        self._short_length = int(config.rope_parameters["original_max_position_embeddings"])
        long_D, _ = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=self._short_length + 1)
        self.register_buffer("short_D", short_D.clone(), persistent=False)
        self.register_buffer("long_D", long_D, persistent=False)

    def forward(self, length_B: Tensor) -> Tensor:
        """Those of long rows where a row is longer than the model was first trained for."""
        return torch.where((length_B > self._short_length)[:, None], self.long_D, self.short_D)


def _both_halves(values: Tensor) -> Tensor:
    """[..., D] -> [..., 2 D]: both halves of a head turn by the same angles."""
    return torch.cat((values, values), dim=-1)
