"""Models of transformers with random weights: converted module by module, trained a step, folded, loaded strict.

float64 throughout. What a converted model computes is held against the untouched original; what its fold computes,
against the converted model after every converted parameter was changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from layer_cases import perturb
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from reparam import Outcome, convert, fold
from reparam.layers import Reparameterized

EXACT = 1e-12  # of each output's scale
GRADIENT = 1e-10  # of each gradient's scale: it went through the whole network and back

WORDS, CLASSES = 40, 3
END = WORDS - 1


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        make: a model of it, weights as transformers draws them.
        batch: what it is called with.
        layers: how many layers are to be converted, counted by hand: all linear layers and convolutions but the head.
        tied: its head shares the weight of its embedding.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    layers: int
    tied: bool


def numbers(high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def images(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64) + 0.3


def words() -> dict[str, Tensor]:
    """Three sentences of seven words, one of them padded; CLIP reads the text where it ends."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    ids = numbers(END, 3, 7)
    ids[:, 4] = END
    return {"input_ids": ids, "attention_mask": mask}


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGES = {"image_size": 8, "patch_size": 4}
ENDS = {"bos_token_id": 0, "eos_token_id": END}


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(vocab_size=WORDS, max_position_embeddings=8, **SIZES))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(num_labels=CLASSES, **IMAGES, **SIZES))


def clip() -> nn.Module:
    text = {"vocab_size": WORDS, "max_position_embeddings": 8, **ENDS, **SIZES}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=IMAGES | SIZES, projection_dim=12))


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=WORDS, n_positions=8, n_embd=16, n_layer=2, n_head=2, use_cache=False, **ENDS
    )
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=WORDS, max_position_embeddings=8, num_key_value_heads=1, use_cache=False, **SIZES
    )
    return LlamaForCausalLM(config)


CASES = {
    # query, key, value, out, two of the MLP; the dense layer before the head
    "bert": Case(bert, words, 2 * 6 + 1, tied=True),
    # the same, and the convolution that cuts patches
    "vit": Case(
        vit,
        lambda: {"pixel_values": images()},
        2 * 6 + 1,
        False,
    ),
    # two such towers, one with a convolution, and a projection of each
    "clip": Case(clip, lambda: words() | {"pixel_values": images()}, 2 * 2 * 6 + 1 + 2, False),
    # Conv1D: query, key and value in one, out, two of the MLP
    "gpt2": Case(gpt2, words, 2 * 4, tied=True),
    # query, key, value, out, gate, up, down
    "llama": Case(llama, words, 2 * 7, tied=False),
}

EVERY = [(name, form) for name in CASES for form in ("gmp", "wn")]


def original(name: str) -> nn.Module:
    """The model in float64 and evaluation mode; no bias is zero, no norm's weight one."""
    torch.manual_seed(0)
    return perturb(CASES[name].make().double().eval(), 0.1)


def converted_layers(model: nn.Module) -> list[Reparameterized]:
    return [module for module in model.modules() if isinstance(module, Reparameterized)]


def outputs(model: nn.Module, name: str) -> list[Tensor]:
    """Every number the model returns, hidden states among them."""

    def tensors(value: object) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            for part in value:
                yield from tensors(part)
        else:
            assert value is None, type(value)

    with torch.no_grad():
        found = model(**CASES[name].batch(), output_hidden_states=True)
        return list(tensors(found.to_tuple()))


def by_hand(layer: Reparameterized) -> tuple[Tensor, Tensor | None]:
    """The plain weight and bias by the formulas of DESIGN §1."""
    held = dict(layer.named_parameters())
    if (
        "theta" not in held
    ):  # the norm over all axes but the first, as torch has it by default, also for Conv1D
        g, v = held["weight_g"], held["weight_v"]
        norm = v.square().flatten(1).sum(1).sqrt()
        return g * v / norm.reshape(g.shape), held.get("bias")
    r, theta = held["r"][:, None], held["theta"]
    one = torch.ones_like(r)
    rows = r * torch.cat([theta.sin(), one], 1) * torch.cat([one, theta.cos().cumprod(1)], 1)
    bias = held["r"] * held["lambda_"] if "lambda_" in held else None
    return rows.t() if isinstance(layer, Conv1D) else rows.reshape(layer.weight.shape), bias


def loss_of(model: nn.Module, name: str) -> Tensor:
    """A cross-entropy of our own: transformers' language models compute theirs in float32."""
    torch.manual_seed(3)  # of the dropout
    out = model(**CASES[name].batch())
    logits = out.logits_per_image if name == "clip" else out.logits
    assert logits.dtype == torch.float64
    logits = logits.flatten(0, -2)
    return F.cross_entropy(logits, numbers(logits.shape[1], len(logits), seed=2))


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest error of any tensor, relative to that tensor's largest number."""
    assert [t.shape for t in found] == [t.shape for t in expected]
    assert {t.dtype for t in found} == {torch.float64}
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def assert_tied(model: nn.Module, name: str) -> None:
    same = CASES[name].tied
    head = model.get_output_embeddings()
    assert (head is not None and head.weight is model.get_input_embeddings().weight) == same


@pytest.mark.parametrize(("name", "form"), EVERY)
def test_computes_what_the_original_computes(name: str, form: str) -> None:
    plain = original(name)
    before = copy.deepcopy(plain.state_dict())
    model = convert(plain, form, scale="inside")
    assert len(converted_layers(model)) == CASES[name].layers
    assert not any(type(m) in (nn.Conv2d, Conv1D) for m in model.modules())
    assert worst(outputs(model, name), outputs(plain, name)) <= EXACT
    assert_tied(plain, name)
    assert_tied(model, name)
    perturb(model)
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("bert", {"cls.predictions.decoder": "output layer, says the model"}),
        ("vit", {"classifier": "default list (classifier)"}),
        ("clip", {}),
        ("gpt2", {"lm_head": "output layer, says the model"}),
        ("llama", {"lm_head": "output layer, says the model"}),
    ],
)
def test_what_is_left_by_default(name: str, left: dict[str, str]) -> None:
    report: list[Outcome] = []
    model = convert(original(name), "wn", report=report)
    said = {o.layer: o.why for o in report if o.rule == "swap" and not o.applied}
    assert said.keys() == left.keys()
    assert all(reason in said[layer] for layer, reason in left.items())
    assert len(converted_layers(model)) == CASES[name].layers
    assert sum(o.rule == "graph" and "chosen by their names" in o.why for o in report) == 1


@pytest.mark.parametrize(("name", "form"), EVERY)
def test_trains(name: str, form: str) -> None:
    plain = original(name).train()
    model = convert(plain, form, scale="inside")
    loss = loss_of(model, name)
    expected = loss_of(plain, name)
    assert abs(float((loss - expected).detach())) <= EXACT * float(expected.detach())
    loss.backward()
    expected.backward()
    for layer in converted_layers(model):
        for parameter in layer.parameters():
            assert parameter.requires_grad
            assert bool(torch.isfinite(parameter.grad).all())
        direction = layer.theta if form == "gmp" else layer.weight_v
        assert bool(direction.grad.any())
    # What was not converted gets the gradient it gets in the original.
    inside = {id(p) for layer in converted_layers(model) for p in layer.parameters()}
    left = {key: p.grad for key, p in model.named_parameters() if id(p) not in inside and p.grad is not None}
    scale = max(float(grad.abs().max()) for grad in left.values())
    for key, grad in left.items():
        assert float((grad - plain.get_parameter(key).grad).abs().max()) <= GRADIENT * scale, key
    before = float(loss_of(model.eval(), name).detach())
    for optimizer in (
        torch.optim.SGD(model.parameters(), lr=1e-3),
        torch.optim.AdamW(model.parameters(), lr=1e-4),
    ):
        optimizer.zero_grad()
        loss_of(model, name).backward()
        optimizer.step()
        after = float(loss_of(model, name).detach())
        assert after < before
        before = after
    assert_tied(model, name)
    assert worst(outputs(fold(model), name), outputs(model, name)) <= EXACT


@pytest.mark.parametrize(("name", "form"), EVERY)
def test_folds_into_the_original_class(name: str, form: str) -> None:
    plain = original(name)
    model = convert(plain, form, scale="inside")
    for i, layer in enumerate(converted_layers(model)):
        perturb(layer, 0.3, seed=i)
    if form == "gmp":
        assert any(bool((layer.r < 0).any()) for layer in converted_layers(model))
    with torch.no_grad():
        for key, layer in model.named_modules():
            if isinstance(layer, Reparameterized):
                weight, bias = by_hand(layer)
                module = plain.get_submodule(key)
                assert (bias is None) == (module.bias is None)
                module.weight.copy_(weight)
                if bias is not None:
                    module.bias.copy_(bias)
    expected = outputs(plain, name)
    assert worst(outputs(model, name), expected) <= EXACT
    folded = fold(model)
    assert [(n, type(m)) for n, m in folded.named_modules()] == [
        (n, type(m)) for n, m in plain.named_modules()
    ]
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert_tied(folded, name)
    assert worst(outputs(folded, name), expected) <= EXACT
    fresh = CASES[name].make().double().eval()
    assert worst(outputs(fresh, name), expected) > 1e-3
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert worst(outputs(fresh, name), expected) <= EXACT
