"""Settings that a model type needs and that no rule can know, each with its reason."""

from small_config import Node, Value

HORIZON: Node = {"prediction_length": 8}  # what to predict has no default
EXPERTS: Node = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROPE: Node = {"rope_type": "default", "rope_theta": 10000.0}
CHANNELS: dict[str, list[Value]] = {  # a stage's input is the output before it; the small coefficient makes both small
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
}

START: dict[str, Node] = {
    "align_vision_model": {"width_coefficient": 0.25, **CHANNELS},
    "autoformer": HORIZON,
    "bamba": {"attn_layer_indices": [1]},  # by default no layer has attention, and its cache then fails
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},  # empty by default
    "cvt": {"depth": [1, 2, 3]},  # the last stage reads the third of its own drop rates
    "deepseek_v2": {**EXPERTS, "n_group": 1, "topk_group": 1},  # how many experts a token has is unset by default
    "dots1": EXPERTS,  # the number of experts is unset by default
    "efficientnet": {"width_coefficient": 0.25, **CHANNELS},
    "gemma3n_text": {  # a layer that shares its cache needs one of its own kind before it
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "intermediate_size": [128, 128, 128, 128],
    },
    "informer": HORIZON,
    "instructblip": {"image_token_index": 100},  # unset by default
    "instructblipvideo": {"video_token_index": 100},  # unset by default
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},  # unset by default
    "mobilenet_v1": {"depth_multiplier": 0.25},  # the only setting that its widths follow
    "mobilenet_v2": {"depth_multiplier": 0.35},  # the only setting that its widths follow
    "time_series_transformer": HORIZON,
    "xmod": {"default_language": "en_XX"},  # the first language must be chosen
}
