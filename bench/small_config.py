"""Shrinks any transformers config to a few hundred kilobytes of weights.

[Note: two recipes] Configs come in hundreds of shapes, so fields are recognised by name and value, not by model.
*Uniform* gives every width of a config tree the same small value: all "these two must be equal" hold at once.
*Ratio* divides every width by one number: all "this is a multiple of that" hold. What neither can know is in
`overrides.py`, each entry with its reason.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from transformers import PretrainedConfig

Value: TypeAlias = "int | float | str | bool | None | list[Value] | dict[str, Value]"
Node: TypeAlias = dict[str, Value]

VOCAB = 128
WIDTH = 64
HEADS = 4
HEAD_DIM = WIDTH // HEADS
STAGE_WIDTH = 16


@dataclass(frozen=True)
class Recipe:
    """How far to shrink: `divisor` is used by the ratio mode only, `image` in pixels (0 keeps the default)."""

    mode: Literal["uniform", "ratio"] = "uniform"
    layers: int = 3
    divisor: int = 16
    image: int = 64
    sections: bool = False


@dataclass
class Tree:
    """What holds for the whole config tree while it is walked: the recipe and the token ids handed out so far."""

    recipe: Recipe
    ids: dict[int, int] = field(default_factory=dict)

    def token(self, old: int) -> int:
        """Returns a small token id, the same for equal old ids and another one for different ones."""
        if old < VOCAB // 2:
            return old
        return self.ids.setdefault(old, VOCAB - 1 - len(self.ids))


RECIPES = (
    Recipe(),
    Recipe(sections=True),
    Recipe(image=0),
    Recipe("ratio", divisor=16, image=0),
    Recipe("ratio", divisor=8, image=0),
    Recipe("ratio", divisor=4, image=0),
    Recipe("ratio", divisor=1, image=0),
)


def at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


# Fields of one integer, first match wins. Names that no rule knows keep their value.
KEEP = re.compile(
    r"num_channels|kernel|stride|padding|dilation|_ratio|factor|_rate$|period|interval|seed|_cost|coefficient|_weight|labels"
    r"|merge|num_feature_levels|window_size$|query_dim|num_mel_bins|in_chans|_mult$|expansion|_token_size|train_size|time_size"
    r"|chunk_size|block_size$|batch_size|crop_size|_fps|_sample_rate|sampling_rate|^scale|temperature|quantile|_sec|^in_channels$"
)
COUNTS: tuple[tuple[str, Callable[[int], int]], ...] = (
    (r"vocab(_size)?$|codebook_size$|num_embeds$|num_embeddings$|vectors_per_group$|_vocab_size_", at_most(VOCAB)),
    (r"experts_per_tok(en)?$|^moe_(k|topk)$|top_k_experts|^num_selected_experts|experts_top_k", at_most(2)),
    (r"shared_experts$", at_most(1)),
    (r"^(moe_)?(num|n)_?(\w+_)?experts$", at_most(4)),
    (r"^(n|num_expert)_groups?$", at_most(2)),
    (r"topk_group$|first_k_dense_replace|num_dense_layers|num_kv_shared_layers|nextn_predict_layers", at_most(1)),
    (r"(key_value|kv)_heads?$", at_most(2)),
    (r"heads?$", at_most(HEADS)),
    (r"qk_(rope|nope)_head_dim$", at_most(HEAD_DIM // 2)),
    (r"head_dim$|^d_kv$|^d_head$|^dim_head$|head_size$|^kv_channels$|^mamba_d_head$|_dim_head$", at_most(HEAD_DIM)),
    (r"position_embeddings$|^n_positions$|^n_ctx$|max_(source|target)_positions$|max_pos_emb|max_seq_len$|context_length$", at_most(256)),
    (r"num_conv_pos_embeddings", at_most(16)),
    (r"num_(conv_pos_embedding_)?groups", at_most(4)),
    (r"num_queries$|num_detection_tokens$|num_denoising$|num_proposals$|num_(object_)?quer(y|ies)\w*$|num_latents\w*$", at_most(16)),
    (r"(^|_)(layers?|depth|blocks)$|^(n|num)_(\w+_)?(layers?|blocks)$", at_most(-1)),
)
WIDE = re.compile(
    r"(^|_)(hidden_size|d_model|(d|dim|n)_embd|embed_dim|width|dim|size|channels?|units|features|planes|rank|ssm|state|dff?|d_ff|embd|inner|proj)s?\d?(_\w+)?$"
    r"|hidden_size|_dim_|^d_|embedding_dim|_size_"
)
FFN = re.compile(r"intermediate_size|ffn_dim|^d_ff|^dff$|^mlp_dim|feedforward|feed_forward|ffn_hidden|^dim_ff|^n_inner|^d_inner|linear_units|mlp_hidden")
MOE = re.compile(r"moe|expert")
TOKEN = re.compile(r"token(_\w+)?_(id|index)$|_token$|^_?(bos|eos|pad|sep|cls|unk|mask|im_\w+|audio_\w+|image_\w+|tag_pad|subs_pad|codebook_pad)_(id|index)$")
IMAGE = re.compile(r"(^|_)(image|img)_size$|^(input|spec)_size$|^image_embedding_size$|^resolution$")
SKIP = ("id2label", "label2id", "rope_scaling", "quantization_config", "torch_dtype", "dtype", "model_type", "transformers_version")


def small_config(config_class: type[PretrainedConfig], recipe: Recipe, start: Mapping[str, Value]) -> PretrainedConfig:
    """Returns a small config of a class; `start` are settings that shrinking must not touch."""
    whole = {k: v for k, v in config_class(**start).to_dict().items() if k not in SKIP}
    small = shrink_node(whole, Tree(recipe))
    changed = {k: v for k, v in small.items() if v != whole[k]}
    return config_class(**{**changed, **start})


def shrink_node(node: Node, tree: Tree) -> Node:
    """Returns one level of a config with its numbers, lists and sub-configs made small."""
    small = {key: shrink_value(key, value, node, tree) for key, value in node.items()}
    return fit_layer_lists(small, node)


def shrink_value(key: str, value: Value, node: Node, tree: Tree) -> Value:
    if key in SKIP or isinstance(value, (bool, str, float)) or value is None:
        return value
    if isinstance(value, dict):
        return shrink_rope(value, node, tree) if "rope" in key else shrink_node(value, tree)
    if isinstance(value, (list, tuple)):
        return shrink_list(key, list(value), tree)
    return shrink_int(key, value, node, tree)


def shrink_int(key: str, value: int, node: Node, tree: Tree) -> int:
    if TOKEN.search(key):
        return tree.token(value)
    if IMAGE.search(key):
        return min(value, tree.recipe.image or value)
    if KEEP.search(key):
        return value
    if re.search(r"(key_value|kv)_heads?$", key) and value in (node.get("num_attention_heads"), node.get("num_heads")):
        key = "num_attention_heads"
    for pattern, limit in COUNTS:
        if re.search(pattern, key):
            ratio_heads = tree.recipe.mode == "ratio" and "head" in pattern
            return ratio(key, value, tree.recipe) if ratio_heads else min(value, tree.recipe.layers) if limit(10**9) < 0 else limit(value)
    if FFN.search(key) or WIDE.search(key):
        return width(key, value, node, tree.recipe)
    return value


def width(key: str, value: int, node: Node, recipe: Recipe) -> int:
    """Returns a small width; a config with a list of depths doubles its width at each stage, so it starts lower."""
    if recipe.mode == "ratio":
        return ratio(key, value, recipe)
    staged = any(isinstance(node.get(k), (list, tuple)) for k in ("depths", "num_heads", "num_attention_heads", "hidden_sizes"))
    if staged and re.search("embed_dim|hidden_size|embedding_size", key):
        return min(value, STAGE_WIDTH)
    if FFN.search(key) and not MOE.search(key):
        return min(value, 2 * WIDTH)
    return min(value, WIDTH // 2 if MOE.search(key) else WIDTH)


def ratio(key: str, value: int, recipe: Recipe) -> int:
    """Divides a width by the recipe's number; head counts and head sizes share it between them."""
    root = max(1, int(recipe.divisor**0.5))
    by = root if "head" in key else recipe.divisor
    return value // by if value % by == 0 and value // by >= 1 else value


def shrink_list(key: str, values: list[Value], tree: Tree) -> list[Value]:
    if any(isinstance(v, dict) for v in values):
        return [shrink_node(v, tree) if isinstance(v, dict) else v for v in values]
    if not all(type(v) is int for v in values) or not values:
        return values
    if TOKEN.search(key):
        return [tree.token(v) for v in values]
    if KEEP.search(key) or IMAGE.search(key):
        return values
    if re.search(r"depths?$|num_(block_)?repeats|layers$|blocks", key):
        return [min(v, 2) for v in values]
    if re.search(r"heads?$", key) and tree.recipe.mode == "uniform":
        return [min(1 << i, HEADS) for i in range(len(values))]
    if WIDE.search(key) or FFN.search(key):
        return stage_widths(values, key, tree.recipe)
    return values


def stage_widths(values: list[int], key: str, recipe: Recipe) -> list[int]:
    """Returns widths that grow where the old ones grew: 16, 32, 64 for three stages in the uniform mode."""
    if recipe.mode == "ratio":
        return [ratio(key, v, recipe) for v in values]
    ranks = {v: i for i, v in enumerate(sorted(set(values)))}
    if len(ranks) == 1:
        return [min(values[0], WIDTH // 2)] * len(values)
    return [min(v, STAGE_WIDTH << min(ranks[v], 2 + (ranks[v] > 2))) for v in values]


def shrink_rope(rope: Node, node: Node, tree: Tree) -> Node:
    """Returns rope settings whose sections still fill the same share of a head."""
    heads, hidden = node.get("num_attention_heads"), node.get("hidden_size")
    old = node.get("head_dim") or (hidden // heads if isinstance(heads, int) and isinstance(hidden, int) else 0)
    if not isinstance(old, int) or not old:
        return rope
    new = shrink_int("head_dim", old, node, tree)
    small = dict(rope)
    if tree.recipe.sections and "rope_theta" in rope and "mrope_section" not in rope:
        small["mrope_section"] = apportion([16, 24, 24], max(3, new // 2))
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


def fit_layer_lists(small: Node, old: Node) -> Node:
    """Shortens lists with one entry for each layer, keeping every kind of layer, and layer numbers in range."""
    lengths = {v: small[k] for k, v in old.items() if re.search(r"layers?$|depth$", k) and type(v) is int and small[k] != v}
    for key, value in old.items():
        if isinstance(value, (list, tuple)) and len(value) in lengths and len(value) > 3:
            small[key] = spread(list(value), lengths[len(value)])
    return small


def spread(values: list[Value], count: int) -> list[Value]:
    """Returns `count` of the values in order, with as many different ones as fit."""
    firsts = sorted({str(v): i for i, v in reversed(list(enumerate(values)))}.values())[:count]
    rest = [i for i in range(len(values)) if i not in firsts][: count - len(firsts)]
    return [values[i] for i in sorted(firsts + rest)]
