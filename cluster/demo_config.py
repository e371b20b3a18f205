"""The shape of the demo model: a tiny Qwen2."""

from cluster.demo_tokens import END_OF_TEXT, IM_END

HIDDEN_SIZE = 128
INTERMEDIATE_SIZE = 576
NUM_LAYERS = 4
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS
MAX_POSITIONS = 4096
ROPE_THETA = 10000.0


def config(vocabulary: dict[str, int]) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary[END_OF_TEXT],
        "eos_token_id": vocabulary[IM_END],
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": NUM_KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": len(vocabulary),
    }


def generation_config(vocabulary: dict[str, int]) -> dict[str, object]:
    return {
        "bos_token_id": vocabulary[END_OF_TEXT],
        "eos_token_id": [vocabulary[IM_END], vocabulary[END_OF_TEXT]],
        "pad_token_id": vocabulary[END_OF_TEXT],
        "do_sample": False,
    }
