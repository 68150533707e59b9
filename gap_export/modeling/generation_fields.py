"""The fields of `generation_config.json`: see `config_fields.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gap_export.modeling.fields import Fields, names

# Settings that change which token is the likeliest.
OTHER_TOKENS: dict[str, tuple[Any, ...]] = {
    "min_length": (0, None),
    "no_repeat_ngram_size": (0, None),
    "encoder_no_repeat_ngram_size": (0, None),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
}

# How to search and to sample, and how fast: answers here are the likeliest tokens one by one.
GENERATED = Fields(
    followed=names("eos_token_id"),
    only={
        **OTHER_TOKENS,
        "min_new_tokens": (0, None),
        "repetition_penalty": (1.0, None),
        "encoder_repetition_penalty": (1.0, None),
        "force_words_ids": (None,),
        "constraints": (None,),
        "sequence_bias": (None,),
        "guidance_scale": (1.0, None),
        "stop_strings": (None,),
        "watermarking_config": (None,),
    },
    without_effect=names(
        """_from_model_config transformers_version bos_token_id pad_token_id decoder_start_token_id max_length max_new_tokens
        max_time do_sample temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff penalty_alpha num_beams
        num_beam_groups diversity_penalty length_penalty early_stopping exponential_decay_length_penalty
        renormalize_logits remove_invalid_values low_memory dola_layers num_return_sequences output_attentions
        output_hidden_states output_scores output_logits return_dict_in_generate use_cache cache_implementation cache_config
        max_cache_len prefill_chunk_size compile_config disable_compile continuous_batching_config is_assistant
        num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit
        assistant_ensemble_weight assistant_lookbehind target_lookbehind prompt_lookup_num_tokens max_matching_ngram_size
        speculation_type token_healing use_mtp chat_format max_window_size"""
    ),
)

# Qwen publishes a penalty on repetition together with its sampling, and several.
_PENALTY = "repetition_penalty"
QWEN_GENERATED = replace(
    GENERATED,
    only={name: values for name, values in GENERATED.only.items() if name != _PENALTY},
    without_effect=GENERATED.without_effect | {_PENALTY},
)
