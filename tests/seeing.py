"""Small models that also see, and folders of them."""

import transformers as T
from builders import make_tokenizer

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
MIXED = {"num_hidden_layers": 4, "head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}  # fmt: skip


def qwen25_vl():
    """Four layers, and a vision tower of four as well: only their tensors tell them apart."""
    eyes = {"hidden_size": 32, "intermediate_size": 48, "depth": 4, "num_heads": 2, "patch_size": 14,
            "out_hidden_size": 32, "fullatt_block_indexes": [1]}  # fmt: skip
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 58, "vision_end_token_id": 59}
    config = T.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=eyes, **ids)
    return T.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl():
    eyes = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 14,
            "out_hidden_size": 32, "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16}  # fmt: skip
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 58, "vision_end_token_id": 59}
    rope = {**ROPE, "mrope_interleaved": True}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope}
    return T.Qwen3VLForConditionalGeneration(T.Qwen3VLConfig(text_config=text, vision_config=eyes, **ids))


def gemma3():
    eyes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    ids = {"boi_token_index": 60, "eoi_token_index": 61, "image_token_index": 62, "mm_tokens_per_image": 4}
    text = {**TEXT, "head_dim": 8, "sliding_window": 16}
    return T.Gemma3ForConditionalGeneration(T.Gemma3Config(text_config=text, vision_config=eyes, **ids))


def llama4():
    text = {**TEXT, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2,
            "attention_chunk_size": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}  # fmt: skip
    eyes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32,
            "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5}  # fmt: skip
    return T.Llama4ForConditionalGeneration(
        T.Llama4Config(text_config=text, vision_config=eyes, image_token_index=62)
    )


SEEING = {"qwen2.5-vl": qwen25_vl, "qwen3-vl": qwen3_vl, "gemma3": gemma3, "llama4": llama4}


def saved(model, folder):
    """The folder of a model with a tokenizer."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
