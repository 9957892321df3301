"""Which device gets which layers: in order, in proportion to the budgets, cut between blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from tests.offloadable import Tied
from tierstore.errors import BudgetError
from tierstore.patch.regions import find_regions, named_tensors
from tierstore.patch.shares import Shares, check_shares, share_out
from tierstore.sharing import divided


def shared(model: nn.Module, budgets: Sequence[int]) -> Shares:
    return share_out({"": model}, find_regions(named_tensors({"": model})), budgets)


def total(model: nn.Module) -> int:
    return sum(region.spec.nbytes for region in find_regions(named_tensors({"": model})))


def firsts(shares: Shares) -> list[str]:
    return [part.regions[0].name for part in shares.parts]


def llama(layers: int = 6) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=6, n_head=4, vocab_size=60, n_positions=32))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(d_model=32, d_ff=64, num_layers=4, num_heads=4, d_kv=8, vocab_size=60))


MODELS = {"llama": (llama, "layers"), "gpt2": (gpt2, "h"), "t5": (t5, "block")}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (3, 1), (1, 1, 1), (1, 2, 1, 2)])
def test_blocks_stay_whole_and_shares_come_near_the_budgets(name: str, weights: tuple[int, ...]) -> None:
    make, blocks = MODELS[name]
    model = make()
    size = total(model)
    budgets = [size * weight // (2 * sum(weights)) for weight in weights]  # half of the model fits
    shares = shared(model, budgets)
    assert sum(part.nbytes for part in shares.parts) == size
    largest_block = max(
        sum(t.nbytes for t in (*block.parameters(), *block.buffers()))
        for path, module in model.named_modules()
        if path.endswith(f".{blocks}")
        for block in module.children()
    )
    for part, budget in zip(shares.parts, budgets, strict=True):
        assert abs(part.nbytes - 2 * budget) <= largest_block
    for path, module in model.named_modules():
        if path.endswith(f".{blocks}"):
            for block in module.children():
                own = {
                    region
                    for part in shares.parts
                    for region in part.regions
                    if any(b.tensor is p for b in region.bindings for p in block.parameters())
                }
                assert len([part for part in shares.parts if own & set(part.regions)]) == 1, "a block is cut"


def test_every_module_and_tensor_is_in_one_share_in_order() -> None:
    model = llama()
    shares = shared(model, [10**5, 10**5, 10**5])
    assert sorted(map(id, (m for part in shares.parts for m in part.modules))) == sorted(map(id, model.modules()))
    names = [region.name for part in shares.parts for region in part.regions]
    assert names == [region.name for region in find_regions(named_tensors({"": model}))]
    assert shares.places[model] == (0, 1, 2)
    assert shares.places[model.model.layers[0]] == (0,)
    assert shares.places[model.model.layers[0].mlp.act_fn] == ()


def test_ties_stay_with_the_first_and_take_along_what_the_module_owns() -> None:
    model = Tied()
    model.head.bias = nn.Parameter(torch.zeros(60))
    shares = shared(model, [total(model) // 4] * 2)
    home = {name: number for number, part in enumerate(shares.parts) for r in part.regions for b in r.bindings for name in b.names}
    assert home["embed.weight"] == home["head.weight"] == home["head.bias"] == 0
    assert home["first.weight"] == home["second.weight"]
    assert shares.places[model.head] == (0,)
    assert set(home.values()) == {0, 1}


def test_what_fits_is_made_to_fit() -> None:
    """Budgets that hold the model exactly: the cut goes where both parts fit, inside a block only if it has to."""
    model = llama(3)
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
    rest = total(model) - sum(layers)
    shares = shared(model, [total(model) - layers[2] - rest // 2 + 400, layers[2] + rest // 2 + 400])
    assert firsts(shares)[1].startswith("model.layers.2.")
    inside = layers[0] // 2
    embed = model.model.embed_tokens.weight.nbytes
    shares = shared(model, [embed + inside, total(model) - embed - inside + 8192])
    assert [part.nbytes <= budget for part, budget in zip(shares.parts, (embed + inside, total(model)), strict=True)] == [True, True]
    assert firsts(shares)[1].startswith("model.layers.0.")


def test_layers_without_blocks() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    assert [part.nbytes for part in shared(model, [100, 200]).parts] == [2 * 288, 4 * 288]
    assert [part.nbytes for part in shared(nn.Linear(8, 8), [1000, 1000]).parts] in ([288, 0], [0, 288])


def test_errors_name_the_tensor_the_tier_and_the_bytes() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)), nn.Linear(8, 64, bias=False))
    shares = shared(model, [1000, 2000])
    with pytest.raises(BudgetError, match=r"any operation on '4.weight' needs 2048 bytes .*'gpu:1'") as caught:
        check_shares(shares, ["gpu:0", "gpu:1"], [1000, 2000], None, "+cpu")
    assert (caught.value.required_bytes, caught.value.budget_bytes, caught.value.tier) == (2048, 2000, "gpu:1")
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(8)))
    shares = shared(model, [512, 512])
    check_shares(shares, ["gpu:0", "gpu:1"], [512, 512], 1024, "+cpu")
    with pytest.raises(BudgetError, match=r"from '0.weight' to '3.weight'") as caught:
        check_shares(shares, ["gpu:0", "gpu:1"], [512, 512], 1023, "+cpu")
    assert (caught.value.required_bytes, caught.value.tier) == (1024, "gpu:0+cpu")


@pytest.mark.parametrize(
    ("whole", "needs", "sizes", "parts"),
    [
        (100, [50, 50], [1, 1], [50, 50]),
        (100, [300, 100], [1, 1], [75, 25]),
        (100, [0, 60], [1, 3], [10, 90]),
        (101, [0, 0], [1, 1], [51, 50]),
        (10, [7, 7, 7], [1, 1, 1], [4, 3, 3]),
        (0, [5, 5], [5, 5], [0, 0]),
        (7, [0, 0], [0, 0], [7, 0]),
    ],
)
def test_ram_is_divided_by_what_has_no_room_above(whole: int, needs: list[int], sizes: list[int], parts: list[int]) -> None:
    assert divided(whole, needs, sizes) == parts
    assert sum(parts) == whole


def test_shares_of_several_models() -> None:
    roots = {"a": llama(2), "b": llama(2)}
    regions = find_regions(named_tensors(roots))
    half = sum(region.spec.nbytes for region in regions) // 2
    shares = share_out(roots, regions, [half, half])
    assert [part.regions[0].name.partition(".")[0] for part in shares.parts] == ["a", "b"]
    for first, second in pairwise(shares.parts):
        assert abs(first.nbytes - second.nbytes) < 500
