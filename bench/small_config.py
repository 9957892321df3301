"""Shrinks any transformers config to some hundred kilobytes of weights.

[Note: two recipes] Configs come in hundreds of shapes, so fields are recognised by name and value, not by model.
*Uniform* gives every width of a config tree the same small value: all "these two must be equal" hold at once.
*Ratio* divides every width by one number: all "this is a multiple of that" hold.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from transformers import PretrainedConfig

Value: TypeAlias = "int | float | str | bool | list[Value] | dict[str, Value] | None"
Node: TypeAlias = dict[str, Value]

VOCAB = 128
WIDTH = 64
HEADS = 4
HEAD_DIM = WIDTH // HEADS
STAGE_WIDTH = 16
PATCH = 8
MANY_LAYERS = 5  # a list longer than this has an entry for each layer, a shorter one for each stage


@dataclass(frozen=True)
class Recipe:
    """How far to shrink.

    `divisor` is used by the ratio mode, `image` is in pixels (0 keeps the default). `sections` adds the rope sections
    that some models only imply, `fill` gives numbers to sizes that are `None` by default.
    """

    mode: Literal["uniform", "ratio"] = "uniform"
    layers: int = 3
    divisor: int = 1
    image: int = 64
    sections: bool = False
    fill: bool = False


RECIPES = (
    Recipe(),
    Recipe(image=0),
    Recipe(sections=True),
    Recipe(fill=True),
    Recipe(mode="ratio", divisor=16),
    Recipe(mode="ratio", divisor=16, image=0),
    Recipe(mode="ratio", divisor=8, image=0),
    Recipe(mode="ratio", divisor=4, image=0),
    Recipe(mode="ratio", image=0),
)

SKIP = ("id2label", "label2id", "quantization_config", "dtype", "model_type", "transformers_version", "architectures")
ONE_PER_LAYER = r"(^|_)(layers?|depth|blocks)$|^(n|num)_(\w+_)?(layers?|blocks)$"
STAGED = ("depths", "num_heads", "num_attention_heads", "hidden_sizes", "embed_dim_per_stage")
TOKEN = re.compile(
    r"token(_\w+)?_(id|index)$|(?<!per)_token$|^_?(bos|eos|pad|sep|cls|unk|mask|im_\w+|audio_\w+|image_\w+|tag_pad|subs_pad|codebook_pad)_(id|index)$"
)
IMAGE = re.compile(r"(^|_)(image|img)_size$|^(input|spec)_size$|^resolution$")
LAYER_NUMBERS = re.compile(r"ind(ex|ic|x)|idx|layer|_ids$|blocks$")
KEEP = re.compile(
    r"num_channels|kernel|stride|padding|dilation|ratio|factor|_rate$|period|interval|seed|_cost|coefficient|_weight|(?<!bpe_)(?<!wordpiece_)(?<!character_)labels"
    r"|merge|num_feature_levels|window_size$|query_dim|num_mel_bins|in_chans|_mult$|expansion|_token_size|train_size|time_size"
    r"|chunk_size|block_size$|batch_size|crop_size|_fps|_sample_rate|sampling_rate|^scale|temperature|quantile|_sec|levels$"
)
# Every second layer is another kind, so that few layers have both.
EXACT = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
# The most that a count may be, first match wins.
LIMITS: tuple[tuple[str, int], ...] = (
    (r"vocab(_size)?$|codebook_size$|num_embeds$|num_embeddings$|vectors_per_group$|_vocab_size_", VOCAB),
    (r"experts_per_tok(en)?$|^moe_(k|topk)$|top_k_experts|^num_selected_experts|experts_top_k", 2),
    (r"shared_experts$", 1),
    (r"^(moe_)?(num|n)_?(\w+_)?experts$", 4),
    (r"^n_groups?$|^num_expert_groups?$", 2),
    (r"topk_group$|first_k_dense_replace|num_dense_layers|num_kv_shared_layers|nextn_predict_layers", 1),
    (r"(key_value|kv)_heads?$", 2),
    (r"^mamba_(n|num)_heads$|^n_mamba_heads$", 2 * HEADS),
    (r"qk_head_dim$", 2 * HEAD_DIM),
    (r"head_?dim$|^d_kv$|^d_head$|^dim_head$|head_size$|^kv_channels$|^mamba_d_head$|_dim_head$", HEAD_DIM),
    (r"heads?(_per_layer)?$", HEADS),
    (r"position_embeddings$|^n_positions$|^n_ctx$|max_(source|target)_positions$|max_pos_emb|max_seq_len$|context_length$", 256),
    (r"num_conv_pos_embeddings", 16),
    (r"^num_codebooks$", 4),
    (r"^mm_tokens_per_image$", 4),
    (r"groups$", 4),
    (r"num_queries$|num_detection_tokens$|num_denoising$|num_proposals$|num_(\w+_)?quer(y|ies)\w*$|num_latents\w*$", 16),
    (r"^(num|n)_filters$", 4),
    (r"^base_channels$", 32),
    (r"^num_pos_feats$", WIDTH // 2),
    (r"^rotary_dim$|^pos_emb_(height|width)$|^prompt_(types|length)$|^zero_expert_num$", 8),
    (r"^num_(bpe|wordpiece|character)_labels$|^num_hash_buckets$|^max_speech_positions$", 256),
)
WIDE = re.compile(
    r"(^|_)(hidden_size|d_model|embd|embed_dim|width|dim|dims|size|channels?|units|features?|planes|rank|ssm|state|dff|embd|inner|proj|dimension)s?\d?(_\w+)?$"
    r"|hidden_size|_dim_|^d_|embedding_dim|_size_|upsample_groups"
)
FFN = re.compile(
    r"intermediate_size|ffn_dim|^d_ff|^dff$|^mlp_dim|feed_?forward|ffn_hidden|^dim_ff|^n_inner|^d_inner|linear_units|mlp_hidden|d_ssm"
)
MOE = re.compile(r"moe|expert")
UNSET = {
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_key_value_heads": HEADS,
    "pad_token_id": 0,
    "mask_token_id": 5,
    "sliding_window": 8,
}


@dataclass
class Tree:
    """What holds for a whole config tree while it is walked: the recipe and the token ids handed out so far."""

    recipe: Recipe
    ids: dict[int, int] = field(default_factory=dict)

    def token(self, old: int) -> int:
        """Returns a small token id, the same for equal old ids and another one for different ones."""
        if old < VOCAB // 2:
            return old
        return self.ids.setdefault(old, VOCAB - 1 - len(self.ids))


def small_config(config_class: type[PretrainedConfig], recipe: Recipe, start: Mapping[str, Value]) -> PretrainedConfig:
    """Returns a small config of a class; `start` are settings that shrinking must not touch."""
    whole = {k: v for k, v in config_class(**start).to_dict().items() if k not in SKIP}
    small = shrink_node(whole, Tree(recipe))
    changed = {k: v for k, v in small.items() if v != whole[k]}
    return config_class(**{**changed, **start})


def shrink_node(node: Node, tree: Tree) -> Node:
    """Returns one level of a config with its numbers, lists and sub-configs made small."""
    if node.get("model_type") == "timm_backbone":
        return {
            "model_type": "resnet",
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 32, 64, 64],
            "embedding_size": 16,
            "out_indices": node["out_indices"],
        }
    node = drop_layers(node, tree.recipe.layers)
    return {key: shrink_value(key, value, node, tree) for key, value in node.items()}


def shrink_value(key: str, value: Value, node: Node, tree: Tree) -> Value:
    if value is None and tree.recipe.fill:
        return UNSET.get(key)
    if key in SKIP or isinstance(value, (bool, str, float)) or value is None:
        return value
    if isinstance(value, dict):
        return shrink_rope(value, node, tree) if "rope" in key else shrink_node(value, tree)
    if isinstance(value, (list, tuple)):
        return type(value)(shrink_list(key, list(value), tree))
    return shrink_int(key, value, node, tree)


def shrink_int(key: str, value: int, node: Node, tree: Tree) -> int:
    if TOKEN.search(key):
        return tree.token(value)
    if IMAGE.search(key):
        return min(value, tree.recipe.image or value)
    if key in EXACT:
        return EXACT[key]
    if key == "num_heads" and "expand" in node and tree.recipe.mode == "uniform":
        return min(value, 2 * HEADS)  # a Mamba whose heads share the expanded width
    if key == "encoder_hidden_size" and isinstance(node.get("downsampling_ratios"), (list, tuple)):
        return min(value, 4)  # doubles with every ratio
    if key == "image_embedding_size" and isinstance(node.get("patch_size"), int) and isinstance(node.get("image_size"), int):
        return shrink_int("image_size", node["image_size"], node, tree) // shrink_int("patch_size", node["patch_size"], node, tree)
    if key.endswith("patch_size"):
        return min(value, PATCH) if tree.recipe.image else value
    if KEEP.search(key) or re.search(ONE_PER_LAYER, key):
        return value
    if re.search(r"(key_value|kv)_heads?$", key) and value in (node.get("num_attention_heads"), node.get("num_heads")):
        key = "num_attention_heads"
    uniform = tree.recipe.mode == "uniform"
    for pattern, limit in LIMITS:
        if re.search(pattern, key):
            return min(value, limit) if uniform or "head" not in pattern else ratio(key, value, tree.recipe)
    return width(key, value, node, tree.recipe) if FFN.search(key) or WIDE.search(key) else value


def width(key: str, value: int, node: Node, recipe: Recipe) -> int:
    """Returns a small width; a config with a list of stages doubles its width at each, so it starts lower."""
    if recipe.mode == "ratio":
        return ratio(key, value, recipe)
    if any(isinstance(node.get(k), (list, tuple)) for k in STAGED) and re.search("embed_dim|hidden_size|embedding_size", key):
        return min(value, STAGE_WIDTH)
    if FFN.search(key) and not MOE.search(key):
        return min(value, 2 * WIDTH)
    return min(value, WIDTH // 2 if MOE.search(key) else WIDTH)


def ratio(key: str, value: int, recipe: Recipe) -> int:
    """Divides a width by the recipe's number; head counts and head sizes share it between them."""
    by = max(1, int(recipe.divisor**0.5)) if "head" in key else recipe.divisor
    return value // by if value % by == 0 and value > 3 else value


def shrink_list(key: str, values: list[Value], tree: Tree) -> list[Value]:
    """Returns a list of the same length with small numbers; lists of numbers that are not widths stay as they are."""
    if any(isinstance(v, (dict, list, tuple)) for v in values):
        return [
            shrink_node(v, tree) if isinstance(v, dict) else shrink_list(key, list(v), tree) if isinstance(v, (list, tuple)) else v
            for v in values
        ]
    numbers = [v for v in values if type(v) is int]
    if len(numbers) < len(values) or not values or KEEP.search(key):
        return values
    if IMAGE.search(key):
        return [min(v, tree.recipe.image or v) for v in numbers]
    if "patch" in key:
        return values
    if TOKEN.search(key):
        return [tree.token(v) for v in numbers]
    if re.search(r"depths?$|num_(block_)?repeats|layers$|blocks", key):
        return [min(v, 2) for v in numbers]
    if key.endswith("_per_layer"):
        return [shrink_int(key, v, {}, tree) for v in numbers]
    if re.search(r"heads?(_per_stage)?$", key) and tree.recipe.mode == "uniform":
        return [min(1 << i, HEADS) for i in range(len(values))]
    return stage_widths(numbers, key, tree.recipe) if WIDE.search(key) or FFN.search(key) else values


def stage_widths(values: list[int], key: str, recipe: Recipe) -> list[Value]:
    """Returns widths that grow where the old ones grew: 16, 32, 64 for three stages in the uniform mode."""
    if recipe.mode == "ratio":
        return [ratio(key, v, recipe) for v in values]
    ranks = {v: i for i, v in enumerate(sorted(set(values)))}
    if len(ranks) == 1:
        return [min(values[0], WIDTH // 2)] * len(values)
    return [min(v, STAGE_WIDTH << min(ranks[v], 3)) for v in values]


def shrink_rope(rope: Node, node: Node, tree: Tree) -> Node:
    """Returns rope settings whose sections still fill the same share of a head."""
    heads, hidden = node.get("num_attention_heads"), node.get("hidden_size")
    old = node.get("head_dim") or (hidden // heads if isinstance(heads, int) and isinstance(hidden, int) else 0)
    if not isinstance(old, int) or not old:
        return rope
    new = shrink_int("head_dim", old, node, tree)
    small = dict(rope)
    if tree.recipe.sections and "rope_theta" in rope and "mrope_section" not in rope:
        share = rope.get("partial_rotary_factor", 1.0)
        small["mrope_section"] = apportion([16, 24, 24], max(3, int(new // 2 * float(str(share)))))
    for key, value in rope.items():
        if isinstance(value, dict):
            small[key] = shrink_rope(value, node, tree)
        elif key.endswith("section") and isinstance(value, list):
            small[key] = apportion([int(str(v)) for v in value], max(len(value), sum(map(int, value)) * new // old))
    return small


def apportion(parts: list[int], total: int) -> list[Value]:
    """Splits a total in the proportions of some parts, at least 1 to each."""
    ends = [sum(parts[: i + 1]) * total // sum(parts) for i in range(len(parts))]
    return [max(1, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def drop_layers(node: Node, most: int) -> Node:
    """Returns a config level with few layers of each stack, and what it says of single layers changed to match.

    Kept is one layer of each kind, and every layer that a short list of layer numbers asks for.
    """
    stages = {len(v) for v in node.values() if isinstance(v, (list, tuple)) and len(v) <= MANY_LAYERS}
    counts = {v for k, v in node.items() if re.search(ONE_PER_LAYER, k) and type(v) is int and v > most and v not in stages}
    for count in counts:
        kept = kept_layers(node, count, most)
        node = {key: only_layers(key, value, count, kept, node) for key, value in node.items()}
    return node


def kept_layers(node: Node, count: int, most: int) -> list[int]:
    kinds: list[list[str]] = [[] for _ in range(count)]
    asked: set[int] = set()
    for key, value in node.items():
        if isinstance(value, (list, tuple)) and len(value) == count:
            for kind, entry in zip(kinds, value, strict=True):
                kind.append(str(entry))
        elif numbers := layer_numbers(key, value, count, node):
            asked |= set(numbers) if len(numbers) <= MANY_LAYERS and not isinstance(value, dict) else set()
            for i, kind in enumerate(kinds):
                kind.append(str(i in numbers))
    first: dict[str, int] = {}
    for i, kind in enumerate(kinds):
        first.setdefault(" ".join(kind), i)
    order = [*sorted(asked), *first.values(), *range(count)]
    return sorted(list(dict.fromkeys(order))[: max(most, len(asked))])


def layer_numbers(key: str, value: Value, count: int, node: Node) -> list[int]:
    """Returns the layers that a field names, counted from 0, or nothing where it names none."""
    numbers = [int(k) for k in value if str(k).isdigit()] if isinstance(value, dict) and key == "per_layer_config" else value
    if not isinstance(numbers, (list, tuple)) or not numbers or not all(type(v) is int for v in numbers):
        return []
    if not LAYER_NUMBERS.search(key) or len(set(numbers)) < len(numbers) or max(numbers) > count:
        return []
    base = counted_from(numbers, count, node)
    return [v - base for v in numbers if 0 <= v - base < count]


def counted_from(numbers: Sequence[int], count: int, node: Node) -> int:
    """Returns the number that a list gives to the first layer: a backbone calls its stem 0."""
    return int("stage_names" in node or max(numbers) == count)


def only_layers(key: str, value: Value, count: int, kept: list[int], node: Node) -> Value:
    """Returns a field after all layers but the kept ones are gone."""
    if type(value) is int:
        return len(kept) if value == count and re.search(ONE_PER_LAYER, key) else value
    if isinstance(value, (list, tuple)) and len(value) == count:
        return [value[i] for i in kept]
    if key == "stage_names" and isinstance(value, (list, tuple)):
        return ["stem", *(f"stage{i + 1}" for i in range(len(kept)))]
    if key == "out_features" and "stage_names" in node:
        return None
    numbers = layer_numbers(key, value, count, node)
    if not numbers:
        return value
    if isinstance(value, dict):
        return {str(kept.index(int(k))): v for k, v in value.items() if int(k) in kept}
    base = counted_from(value, count, node)
    return [kept.index(i) + base for i in numbers if i in kept]
