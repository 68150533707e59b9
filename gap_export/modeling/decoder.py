"""The decoder as a graph: one for prefill and decode, where every layer sees the same tokens.

The language model of transformers is traced as it is. Decoders that drop tokens between their layers are in `staged.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from gap_export.modeling.attention import SlotCache, slot_mask


class Decoder(nn.Module):
    """The language model over a static cache: one graph for prefill and decode, logits of one row.

    Args:
        language_model: of transformers.
        lm_head: hidden states to logits.
        deepstack_levels: how many features of DeepStack lie behind each embedding.
    """

    def __init__(
        self, language_model: PreTrainedModel, lm_head: nn.Module, *, deepstack_levels: int = 0
    ) -> None:
        super().__init__()
        self.language_model: Any = language_model
        self.deepstack_levels = deepstack_levels
        if deepstack_levels:
            # transformers adds a plane to the visual tokens alone, by a mask; ours is zero elsewhere.
            self.language_model._deepstack_process = lambda hidden_BSH, _mask, plane_BSH: (
                hidden_BSH + plane_BSH
            )
        self.language_model.embed_tokens = None  # embeddings come in; the table lives in `splice` and `embed`
        self.lm_head = lm_head

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
            past: key and value of every layer, [B, Hkv, C, D].

        Returns:
            logits [B, V] float32, then the updated caches.
        """
        cache = SlotCache(past, write_index)
        embeds_BSH, *deepstack_levels = inputs_embeds.chunk(1 + self.deepstack_levels, dim=-1)
        stacked = (
            {"visual_pos_masks": None, "deepstack_visual_embeds": deepstack_levels}
            if deepstack_levels
            else {}
        )
        hidden_BSH = self.language_model(
            inputs_embeds=embeds_BSH,
            position_ids=position_ids,
            attention_mask=slot_mask(write_index, inputs_embeds.shape[1], past[0].shape[2]),
            past_key_values=cache,
            use_cache=True,
            **stacked,
        ).last_hidden_state
        row_B1H = last_index[:, None, None].expand(-1, 1, hidden_BSH.shape[-1])
        logits_BV = self.lm_head(hidden_BSH.gather(1, row_B1H)[:, 0]).float()
        return (logits_BV, *cache.present)
