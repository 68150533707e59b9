"""What GGUF calls the weights of a Llama decoder."""

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
AROUND = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
"""Names of a Llama decoder's weights -> those of GGUF."""
