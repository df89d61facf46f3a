"""Names and shapes of a model's tensors in a Hugging Face checkpoint."""

from __future__ import annotations

from qserve.models.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)
ATTENTION_NORM = "input_layernorm.weight"
MLP_NORM = "post_attention_layernorm.weight"
QUERY_NORM = "self_attn.q_norm.weight"
KEY_NORM = "self_attn.k_norm.weight"
NORM_BEFORE = {**dict.fromkeys(QKV, ATTENTION_NORM), **dict.fromkeys(GATE_UP, MLP_NORM)}
"""The norm whose output a linear reads; the other linears read none."""
KEY_CENTER = "self_attn.k_center"
"""[Hkv, D]: what attention subtracts from keys before it stores them; quantized checkpoints only."""

Shape = tuple[int, ...]


def layer_prefix(index: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{index}."


def linear_shapes(config: ModelConfig) -> dict[str, Shape]:
    """[N, K] of each linear of a layer, by its name within the layer, in the order of computation."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    return {
        "self_attn.q_proj": (config.query_size, hidden),
        "self_attn.k_proj": (config.kv_size, hidden),
        "self_attn.v_proj": (config.kv_size, hidden),
        "self_attn.o_proj": (hidden, config.query_size),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of each tensor of a float layer, by its name within the layer."""
    shapes: dict[str, Shape] = {
        ATTENTION_NORM: (config.hidden_size,),
        MLP_NORM: (config.hidden_size,),
    }
    if config.qk_norm:
        shapes |= {QUERY_NORM: (config.head_dim,), KEY_NORM: (config.head_dim,)}
    for linear, shape in linear_shapes(config).items():
        shapes[f"{linear}.weight"] = shape
        if (config.qkv_bias and linear in QKV) or (config.output_bias and linear in OUTPUT):
            shapes[f"{linear}.bias"] = shape[:1]
    return shapes


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of each tensor of a float model, by its full name, in the order of computation."""
    embedding: Shape = (config.vocab_size, config.hidden_size)
    shapes = {EMBEDDING: embedding}
    for index in range(config.num_layers):
        prefix = layer_prefix(index)
        shapes |= {prefix + name: shape for name, shape in layer_shapes(config).items()}
    shapes[FINAL_NORM] = (config.hidden_size,)
    return shapes if config.tie_word_embeddings else {**shapes, LM_HEAD: embedding}
