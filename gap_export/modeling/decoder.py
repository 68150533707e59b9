"""The decoder as a graph: one for prefill and decode, where every layer sees the same tokens.

The language model of transformers is traced as it is. Decoders that drop tokens between their layers are in `staged.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from gap_export.modeling.attention import CallSlots, Mask, SlotCache, causal
from gap_export.modeling.rope import own_ids

BetweenLayers = Callable[[Any, Sequence[Tensor]], dict[str, Any]]
"""Given the language model and what is to be added after its first layers, one [B, S, H] for each: arguments for calling it."""


@dataclass(frozen=True)
class DecoderHooks:
    """What a family's decoder does otherwise than others.

    Attributes:
        mask: which slots a token sees. The model's spec says so too (`ModelSpec.attention_mask`), and lint compares the two.
        between_layers: how features reach the hidden states between the layers, where there are any
            (`ModelSpec.deepstack_levels`).
    """

    mask: Mask = causal
    between_layers: BetweenLayers | None = None


class Decoder(nn.Module):
    """The language model over a static cache: one graph for prefill and decode, logits of one row.

    Args:
        language_model: of transformers.
        lm_head: hidden states to logits.
        hooks: of the family.
        deepstack_levels: how many features of DeepStack lie behind each embedding.
        takes_image_slots: whether `image_slots` is among the inputs.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        lm_head: nn.Module,
        hooks: DecoderHooks,
        *,
        deepstack_levels: int = 0,
        takes_image_slots: bool = False,
    ) -> None:
        super().__init__()
        self.language_model: Any = language_model
        self.language_model.embed_tokens = None  # embeddings come in; the table lives in `splice` and `embed`
        self.lm_head = lm_head
        self._hooks, self._levels, self._takes_image_slots = hooks, deepstack_levels, takes_image_slots

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        last_index: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """One call.

        Args:
            inputs_embeds: [B, S, (1 + deepstack_levels) * H].
            position_ids: [B, S] int64 (M-RoPE [3, B, S]): what RoPE reads.
            write_index: [B] int64: the slot of the first token of this call.
            last_index: [B] int64: the row of S whose logits are wanted.
            past: key and value of every layer, [B, Hkv, C, D]; before them, where the mask looks at images, image_slots
                [B, I, 2] int64.

        Returns:
            logits [B, V] float32, then the updated caches.
        """
        image_slots = None
        if self._takes_image_slots:
            image_slots, *past = past  # type: ignore[assignment]
        cache = SlotCache(past, write_index)
        embeds_BSH, *levels = inputs_embeds.chunk(1 + self._levels, dim=-1)
        between = self._hooks.between_layers
        hidden_BSH = self.language_model(
            inputs_embeds=embeds_BSH,
            position_ids=own_ids(self.language_model.rotary_emb, position_ids, last_index),
            attention_mask=self._hooks.mask(
                CallSlots(write_index, inputs_embeds.shape[1], past[0].shape[2], image_slots)
            ),
            past_key_values=cache,
            use_cache=True,
            **({} if between is None else between(self.language_model, levels)),
        ).last_hidden_state
        row_B1H = last_index[:, None, None].expand(-1, 1, hidden_BSH.shape[-1])
        logits_BV = self.lm_head(hidden_BSH.gather(1, row_B1H)[:, 0]).float()
        return (logits_BV, *cache.present)
