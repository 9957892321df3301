"""What runs on two devices that differ, in a process of its own; started by `test_crossing`."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.two_devices import CPU, Placed, compare, register, spread, values

register()

PAIR = ("pair:0", "pair:1")
DEVICES = [torch.device(name) for name in PAIR]
WITH_CPU = [("pair:0", "cpu"), ("cpu", "pair:0")]
IDS = torch.arange(12).reshape(2, 6) + 3
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 60}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).eval()


def tied_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)).eval()


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=60, n_positions=32)).eval()


def bert() -> nn.Module:
    return BertModel(BertConfig(**SMALL)).eval()


def t5() -> nn.Module:
    config = T5Config(d_model=32, d_ff=48, num_layers=3, num_heads=4, d_kv=8, vocab_size=60, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


DECODERS = {"llama": llama, "llama, tied": tied_llama, "gpt2": gpt2}


@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS.keys())
def test_decoders(make: Any) -> None:
    compare(make, lambda model: model(IDS, attention_mask=MASK).logits, PAIR)
    compare(make, lambda model: model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False), PAIR)


def test_inputs_by_other_names() -> None:
    def step(model: Any) -> Any:
        return model(input_ids=IDS, attention_mask=MASK).logits, model(inputs_embeds=torch.ones(1, 3, 32)).logits

    compare(llama, step, PAIR)


class Tables(nn.Module):
    """Takes a dict and a list, and returns a tuple with names, of what was never on one device."""

    Result = namedtuple("Result", ["first", "rest"])

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, batch: dict[str, Any], *, scale: list[torch.Tensor]) -> Any:
        first = self.layers[0](batch["x"])
        last = self.layers[3](first) * scale[0]
        return self.Result(first, [last, {"masked": last[batch["mask"]], "text": "kept"}])


def test_containers() -> None:
    mask = torch.tensor([True, False, True])
    where = []

    def step(model: Any) -> Any:
        result = model({"x": torch.ones(3, 8), "mask": mask}, scale=[torch.tensor([2.0])])
        assert type(result) is Tables.Result
        assert result.rest[1]["text"] == "kept"
        where.append({result.first.device, result.rest[0].device, result.rest[1]["masked"].device})
        return result

    compare(Tables, step, PAIR)
    assert where == [{CPU}, {CPU}]


@pytest.mark.parametrize("devices", WITH_CPU, ids=str)
@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS.keys())
def test_gradients_flow_back(make: Any, devices: tuple[str, str]) -> None:
    def step(model: Any) -> Any:
        loss = model(IDS, attention_mask=MASK, labels=IDS).loss
        loss.backward()
        return loss

    compare(make, step, devices, grad=True)


def test_encoder_decoder() -> None:
    compare(t5, lambda model: model(IDS, attention_mask=MASK, labels=IDS).logits, PAIR)
    compare(t5, lambda model: model.generate(IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False), PAIR)
    compare(bert, lambda model: model(IDS, attention_mask=MASK).to_tuple(), PAIR)


def test_results_come_back_to_where_the_inputs_were() -> None:
    seen = []

    def step(model: Any) -> Any:
        output = model(IDS, output_hidden_states=True)
        seen.append({type(output).__name__, output.logits.device, *(state.device for state in output.hidden_states)})
        return output.logits

    compare(llama, step, PAIR)
    assert seen[0] == seen[1] == {"CausalLMOutputWithPast", CPU}


class Convolutions(nn.Module):
    """A small residual network with BatchNorm in training: kernels write to buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)) for _ in range(4)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.layers = nn.ModuleList(nn.RNN(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 60)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        state = None
        for layer in self.layers:
            y, state = layer(x, state)
            x = x + y
        return self.head(x)


class Encoder(nn.Module):
    """Torch's own transformer layers, which take a fused path where no torch function mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4))
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) * self.scale
        return x


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("make", "given"), [(Convolutions, X), (Recurrent, IDS), (Encoder, Y)])
def test_modules_of_torch(make: Any, given: torch.Tensor) -> None:
    compare(lambda: make().eval(), lambda model: model(given), PAIR)
    for devices in WITH_CPU:

        def step(model: Any) -> Any:
            result = model(given)
            result.sum().backward()
            return result, {name: values(buffer) for name, buffer in model.named_buffers()}

        torch.manual_seed(3)
        compare(lambda: make().train(make is Convolutions), step, devices, grad=True)


def test_fused_paths_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of torch compute as they do alone: outside of the mode."""
    calls = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args, **kwargs: calls.append(1) or fused(*args, **kwargs))
    compare(lambda: Encoder().eval(), lambda model: model(Y), ("cpu", "pair:0"))
    assert len(calls) >= 4 + 2  # of the plain model, and of the half that is on the CPU: torch offers it to no other devices


class Writing(nn.Module):
    """Blocks that write into what they are given, and into a buffer that an earlier device made."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x: torch.Tensor, log: torch.Tensor, number: int) -> torch.Tensor:
            y = self.inner[0](x)
            log[number] = y[0]
            x += y
            x[:, 0].mul_(y[:, 1])
            return torch.where(y > 0, y, x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(6))

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        x = x * 2
        kept, log = x, x.new_zeros(6, 8)
        for number, block in enumerate(self.blocks):
            y = block(x, log, number)
        torch.add(x, y, out=log[:3])
        return y, kept, {"log": [log]}


def test_what_is_written_into_stays_where_it_is() -> None:
    compare(Writing, lambda model: model(torch.ones(3, 8)), PAIR)


class Uncalled(nn.Module):
    """Uses weights of modules that it never calls, from every device, and indexes with what another device made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x @ layer.weight.t() + layer.bias
        order = x[0].argsort()
        joined = torch.cat([layer.weight for layer in self.layers])
        return joined[order] @ self.layers[0].weight[order] + torch.stack([self.layers[0].bias, x[0]]).sum(0)


def test_weights_without_their_modules() -> None:
    compare(Uncalled, lambda model: model(torch.ones(2, 16)), PAIR)
    compare(Uncalled, lambda model: (model(torch.ones(2, 16)).sum().backward(),), WITH_CPU[1], grad=True)


class Checkpointed(nn.Module):
    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    def make() -> nn.Module:
        model = Checkpointed()
        model.reentrant = reentrant
        return model

    def step(model: nn.Module) -> Any:
        x = torch.ones(3, 16, requires_grad=True)
        model(x).sum().backward()
        return x.grad

    for devices in WITH_CPU:
        compare(make, step, devices, grad=True)


def test_a_tensor_crosses_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask or a table that every layer of a later device reads is copied once a call, however many layers there are."""
    copies: list[str] = []
    to = torch.Tensor.to

    def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.device in DEVICES:
            copies.extend(f"to {arg}" for arg in (*args, *kwargs.values()) if arg in DEVICES and arg != self.device)
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    found = []
    for layers in (4, 12):
        model = spread(LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": layers}, num_key_value_heads=2)).eval(), DEVICES)
        copies.clear()
        with torch.no_grad():
            model(IDS, attention_mask=MASK)
        found.append(sorted(copies))
    assert found[0] == found[1]
    assert "to pair:1" in found[0]


class Forces(nn.Module):
    """Differentiates in its forward, by tensors of both devices, and copies between them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            first = self.layers[0](x)
            last = self.layers[3](first.tanh())
            forces = torch.autograd.grad((first * last).sum(), [first, last])
        kept = torch.empty_like(last).copy_(first)
        halves = [first.detach(), last.detach()]
        torch._foreach_mul_(halves, 0.5)
        return *forces, kept.type_as(last), last.to(first).view_as(x), *halves


@pytest.mark.parametrize("devices", WITH_CPU, ids=str)
def test_what_takes_tensors_of_several_devices(devices: tuple[str, str]) -> None:
    where = []

    def step(model: Any) -> Any:
        with torch.no_grad():
            result = model(torch.ones(2, 8))
        where.append([tensor.device for tensor in result])
        return result

    compare(Forces, step, devices)
    assert set(where[1]) == {CPU}


def test_devices_of_others_are_left_to_torch() -> None:
    def step(model: Any) -> Any:
        return model.layers[0].weight + Placed(torch.ones(16, 16), torch.device("pair:1"))

    with pytest.raises(RuntimeError, match="one device"):
        compare(Uncalled, step, ("pair:0", "cpu"))
