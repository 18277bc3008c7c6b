"""examples/models: sizes known from elsewhere, shapes, capture by torch.fx, and one network with its real weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reparam.graph import load_architecture

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "examples" / "models"
README = (MODELS / "README.md").read_text(encoding="utf-8")
SHARED = Path(os.environ.get("REPARAM_SHARED", ROOT.parent / "shared"))
CHECKPOINT = SHARED / "data" / "checkpoints" / "resnet_cifar10" / "resnet20-12fca82f.th"
IMAGES = SHARED / "data" / "cifar10" / "train_first4000_lossless.npz"
needs_shared = pytest.mark.skipif(not (CHECKPOINT.exists() and IMAGES.exists()), reason="no shared folder")

EXACT = 1e-12

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One network: inputs and outputs without their batch axis."""

    ref: str
    parameters: int
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    args: tuple[tuple[str, str], ...] = ()

    @property
    def id(self) -> str:
        return " ".join([self.ref, *(f"{key}={value}" for key, value in self.args)])

    def build(self) -> nn.Module:
        return load_architecture(str(MODELS / self.ref), dict(self.args)).eval()

    def sample(self, batch: int, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand((batch, *shape), generator=generator) for shape in self.inputs]


def conv(inputs: int, outputs: int, kernel: int, bias: bool = True) -> int:
    """Parameters of a convolution of square kernel, as a textbook counts them."""
    return outputs * (inputs * kernel**2 + bias)


def dense(inputs: int, outputs: int) -> int:
    return outputs * (inputs + 1)


def lstm(inputs: int, hidden: int) -> int:
    """Four gates, each reading the input and the state; torch keeps two biases a gate."""
    return 4 * hidden * (inputs + hidden + 2)


VGG_CONVS = [(3, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
VGG = sum(conv(i, o, 3) for i, o in VGG_CONVS)
CONVPOOL_CONVS = [(3, 96), (96, 96), (96, 96), (96, 192), (192, 192), (192, 192)]
# He et al., table 6, say 0.27 M. A batch norm has two numbers a channel.
RESNET20 = (
    conv(3, 16, 3, False)
    + 6 * conv(16, 16, 3, False)
    + conv(16, 32, 3, False)
    + 5 * conv(32, 32, 3, False)
    + conv(32, 64, 3, False)
    + 5 * conv(64, 64, 3, False)
    + 2 * (7 * 16 + 6 * 32 + 6 * 64)
    + dense(64, 10)
)

VAE = (
    conv(1, 32, 4)
    + conv(32, 64, 4)
    + 2 * dense(3136, 32)
    + dense(32, 3136)
    + conv(64, 32, 4)
    + conv(32, 1, 4)
)
# A read gives 2·2·2 numbers, a write takes 5·5, each window is placed by five.
DRAW = lstm(8 + 256, 256) + lstm(100, 256) + 2 * dense(256, 100) + dense(256, 25) + 2 * dense(256, 5)

DEFAULTS = [
    Case("mlp.py:mlp", 1_501, ((13,),), ((1,),)),
    Case("vgg6.py:vgg6", VGG + dense(512, 1000), ((3, 32, 32),), ((1000,),)),
    # torchvision's documented counts.
    Case("resnet.py:resnet18", 11_689_512, ((3, 224, 224),), ((1000,),)),
    Case("resnet.py:resnet34", 21_797_672, ((3, 224, 224),), ((1000,),)),
    Case("cifar_resnet.py:resnet20", RESNET20, ((3, 32, 32),), ((10,),)),
    Case(
        "convpool_cnn_c.py:convpool_cnn_c",
        sum(conv(i, o, 3) for i, o in CONVPOOL_CONVS) + dense(192 * 8 * 8, 512) + dense(512, 10),
        ((3, 32, 32),),
        ((10,),),
    ),
    # The blog's own figure.
    Case("mini_vgg.py:mini_vgg", 1_250_858, ((3, 32, 32),), ((10,),)),
    Case(
        "dqn.py:dqn",
        conv(4, 32, 8) + conv(32, 64, 4) + conv(64, 64, 3) + dense(3136, 512) + dense(512, 6),
        ((4, 84, 84),),
        ((6,),),
    ),
    Case("conv_vae.py:conv_vae", VAE, ((1, 28, 28), (32,)), ((1, 28, 28), (32,), (32,))),
    Case("draw.py:draw", DRAW, ((1, 28, 28), (10, 100)), ((1, 28, 28), (10, 100), (10, 100))),
]

OPTIONS = [
    Case("mlp.py:mlp", dense(1, 10) + dense(10, 1), ((1,),), ((1,),), (("inputs", "1"), ("hidden", "10"))),
    Case(
        "vgg6.py:vgg6",
        VGG + dense(512, 10) + 2 * 2 * (128 + 256 + 512),
        ((3, 40, 24),),
        ((10,),),
        (("batch_norm", "True"), ("classes", "10")),
    ),
    # The widely used CIFAR versions with a 3×3 stem and ten classes.
    Case("resnet.py:resnet18", 11_173_962, ((3, 32, 32),), ((10,),), (("stem", "cifar"), ("classes", "10"))),
    Case("resnet.py:resnet34", 21_282_122, ((3, 32, 32),), ((10,),), (("stem", "cifar"), ("classes", "10"))),
    # Two numbers a channel of batch norm become one of bias: 4,800 and 8,512 channels.
    Case("resnet.py:resnet18", 11_689_512 - 4_800, ((3, 64, 64),), ((1000,),), (("batch_norm", "False"),)),
    Case("resnet.py:resnet34", 21_797_672 - 8_512, ((3, 33, 65),), ((1000,),), (("batch_norm", "False"),)),
    Case("dqn.py:dqn", 1_693_362, ((4, 84, 84),), ((18,),), (("actions", "18"),)),
    Case(
        "conv_vae.py:conv_vae",
        conv(3, 32, 4)
        + conv(32, 64, 4)
        + 2 * dense(4096, 8)
        + dense(8, 4096)
        + conv(64, 32, 4)
        + conv(32, 3, 4),
        ((3, 32, 32), (8,)),
        ((3, 32, 32), (8,), (8,)),
        (("channels", "3"), ("size", "32"), ("latent", "8")),
    ),
    Case(
        "draw.py:draw",
        DRAW + 4 * 256 * 2 * 2 * 2**2 + 2 * dense(256, 25),
        ((3, 20, 20), (2, 100)),
        ((3, 20, 20), (2, 100), (2, 100)),
        (("channels", "3"), ("size", "20"), ("steps", "2")),
    ),
]

every_default = pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.id)
every_case = pytest.mark.parametrize("case", DEFAULTS + OPTIONS, ids=lambda case: case.id)


@cache
def cached(case: Case) -> nn.Module:
    """Built once with seed 0; only read."""
    torch.manual_seed(0)
    return case.build()


@torch.no_grad()
def outputs(model: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = model(*inputs)
    return out if isinstance(out, tuple) else (out,)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def changed(model: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter drawn anew, so that no zero of an initialization hides a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@every_case
def test_parameters_and_shapes(case: Case) -> None:
    model = cached(case)
    assert count(model) == case.parameters
    for batch in (1, 3):
        out = outputs(model, case.sample(batch))
        assert [tuple(tensor.shape) for tensor in out] == [(batch, *shape) for shape in case.outputs]
        assert all(bool(tensor.isfinite().all()) for tensor in out)


@every_case
def test_torch_fx_captures_the_network(case: Case) -> None:
    model = cached(case)
    traced = torch.fx.symbolic_trace(model)
    assert {name for name, _ in traced.named_parameters()} == {name for name, _ in model.named_parameters()}
    # Two batch sizes: neither may be baked in.
    for batch in (1, 2):
        inputs = case.sample(batch)
        for found, expected in zip(outputs(traced, inputs), outputs(model, inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_default
def test_the_same_seed_and_inputs_give_the_same_outputs(case: Case) -> None:
    torch.manual_seed(0)
    again = case.build()
    inputs = case.sample(2)
    first = outputs(cached(case), inputs)
    torch.manual_seed(123)
    for model in (cached(case), again):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs(model, inputs), strict=True))


@every_default
def test_gradients_reach_every_parameter(case: Case) -> None:
    small = {"resnet18": (3, 32, 32), "resnet34": (3, 32, 32)}.get(case.ref.partition(":")[2])
    torch.manual_seed(0)
    model = case.build()
    inputs = [torch.rand(2, *small)] if small else case.sample(2)
    out = model(*inputs)
    sum(tensor.square().sum() for tensor in (out if isinstance(out, tuple) else (out,))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


def test_the_table_holds_every_network_with_its_measured_size() -> None:
    rows = re.findall(
        r"^\| \[(.+?)\]\((.+?)\) \| (.+?) \| ([\d,]+) \| (.+?) \| (.+?) \|$", README, re.MULTILINE
    )
    assert [(ref, size, spec) for ref, _, _, size, spec, _ in rows] == [
        (case.ref, f"{count(cached(case)):,}", "; ".join(",".join(["N", *map(str, s)]) for s in case.inputs))
        for case in DEFAULTS
    ]
    assert all(ref.startswith(f"{link}:") for ref, link, *_ in rows)
    listed = {link for _, link, *_ in rows}
    assert listed == {path.name for path in MODELS.glob("*.py")} - {"__init__.py"}


def test_the_command_lines_of_the_readme_build() -> None:
    lines = re.findall(r"^    --arch (.+)$", README, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        ref, *args = line.split(" --arch-arg ")
        load_architecture(str(ROOT / ref), dict(arg.split("=", 1) for arg in args))


def test_a_stated_size_in_a_docstring_is_the_measured_one() -> None:
    """In every file, with the thousands separated."""
    for case in DEFAULTS:
        text = (MODELS / case.ref.partition(":")[0]).read_text(encoding="utf-8")
        assert f"{case.parameters:,}" in text, case.ref


def torchvision_keys(blocks: list[int]) -> list[str]:
    def norm(name: str) -> list[str]:
        kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{name}.{kind}" for kind in kinds]

    keys = ["conv1.weight", *norm("bn1")]
    for stage, depth in enumerate(blocks, start=1):
        for block in range(depth):
            at = f"layer{stage}.{block}"
            keys += [f"{at}.conv1.weight", *norm(f"{at}.bn1"), f"{at}.conv2.weight", *norm(f"{at}.bn2")]
            if stage > 1 and block == 0:
                keys += [f"{at}.downsample.0.weight", *norm(f"{at}.downsample.1")]
    return [*keys, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("name", "blocks", "total"), [("resnet18", [2, 2, 2, 2], 122), ("resnet34", [3, 4, 6, 3], 218)]
)
def test_resnet_keys_are_torchvisions(name: str, blocks: list[int], total: int) -> None:
    model = cached(next(case for case in DEFAULTS if case.ref == f"resnet.py:{name}"))
    assert list(model.state_dict()) == torchvision_keys(blocks)
    assert len(model.state_dict()) == total
    assert model.state_dict()["conv1.weight"].shape == (64, 3, 7, 7)
    assert model.state_dict()["layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1)


def test_an_unknown_stem_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stem is 'CIFAR', expected 'imagenet' or 'cifar'"):
        load_architecture(str(MODELS / "resnet.py:resnet18"), {"stem": "CIFAR"})


@pytest.mark.parametrize("ref", ["vgg6.py:vgg6", "resnet.py:resnet18"])
def test_folding_batch_norm_by_hand_gives_weights_of_the_plain_network(ref: str) -> None:
    """w' = w·γ/σ, b' = (b − μ)·γ/σ + β under the keys of `batch_norm=False`, float64: the same function."""
    path = str(MODELS / ref)
    source = changed(load_architecture(path, {"batch_norm": "True"}).double().eval())
    plain = load_architecture(path, {"batch_norm": "False"}).double().eval()
    modules = dict(source.named_modules())
    generator = torch.Generator().manual_seed(2)
    tensors = {key: value for key, value in source.state_dict().items() if key in plain.state_dict()}
    for name, norm in modules.items():
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        conv_name = name.replace("downsample.1", "downsample.0").replace("bn", "conv")
        layer = modules[conv_name]
        assert isinstance(layer, nn.Conv2d)
        channels = norm.num_features
        mean = torch.randn(channels, generator=generator, dtype=torch.float64)
        variance = 0.5 + torch.rand(channels, generator=generator, dtype=torch.float64)
        norm.running_mean, norm.running_var = mean, variance
        scale = norm.weight.detach() / torch.sqrt(variance + norm.eps)
        before = 0 if layer.bias is None else layer.bias.detach()
        tensors[f"{conv_name}.weight"] = layer.weight.detach() * scale.view(-1, 1, 1, 1)
        tensors[f"{conv_name}.bias"] = (before - mean) * scale + norm.bias.detach()
    plain.load_state_dict(tensors, strict=True)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=generator)
    (expected,), (found,) = outputs(source, [x]), outputs(plain, [x])
    assert float((found - expected).abs().max() / expected.abs().max()) <= EXACT


def test_the_noise_of_convpool_cnn_c_is_added_in_training_only() -> None:
    model = load_architecture(str(MODELS / "convpool_cnn_c.py:convpool_cnn_c"))
    noise = model.get_submodule("features.noise")
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    added = noise(x) - x
    assert float(added.std()) == pytest.approx(0.15, rel=0.03)
    assert abs(float(added.mean())) < 0.01
    assert torch.equal(noise.eval()(x), x)


def test_convpool_cnn_c_has_the_slides_leak() -> None:
    model = cached(next(case for case in DEFAULTS if "convpool" in case.ref))
    slopes = [module.negative_slope for module in model.modules() if isinstance(module, nn.LeakyReLU)]
    assert slopes == [0.1] * 6
    dropped = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropped == [0.5] * 3


def test_the_vae_samples_where_its_noise_says() -> None:
    """Noise e gives what the decoder makes of mean + e·deviation; zero noise the mean's image."""
    model = changed(load_architecture(str(MODELS / "conv_vae.py:conv_vae"))).double().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64, generator=generator)
    noise = torch.randn(2, 32, dtype=torch.float64, generator=generator)
    logits, mean, log_variance = outputs(model, [x, noise])
    decode: Callable[[Tensor], Tensor] = model.decode  # type: ignore[assignment]
    deviation = log_variance.exp().sqrt()
    torch.testing.assert_close(logits, decode(mean + deviation * noise), rtol=EXACT, atol=EXACT)
    at_mean, *_ = outputs(model, [x, torch.zeros_like(noise)])
    assert torch.equal(at_mean, decode(mean))
    assert not torch.allclose(at_mean, logits)


def window_by_the_paper(head: np.ndarray, window: int, size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Gregor et al., eq. 19-26, one scalar after the other: F_Y, F_X (window, size) and the gain of one image."""
    gx, gy, log_variance, log_stride, log_gain = head
    gx, gy = (size + 1) / 2 * (gx + 1), (size + 1) / 2 * (gy + 1)
    stride = (size - 1) / (window - 1) * np.exp(log_stride)
    filters = np.zeros((2, window, size))
    for which, centre in enumerate((gy, gx)):
        for i in range(1, window + 1):
            mean = centre + (i - window / 2 - 0.5) * stride
            for a in range(1, size + 1):
                filters[which, i - 1, a - 1] = np.exp(-((a - mean) ** 2) / (2 * np.exp(log_variance)))
            filters[which, i - 1] /= filters[which, i - 1].sum()
    return filters[0], filters[1], float(np.exp(log_gain))


@torch.no_grad()
def test_draw_computes_the_papers_equations() -> None:
    """Two steps of two images against eq. 3-8 and 19-29 written out in numpy; float64."""
    size, code, steps = 9, 4, 2
    args = {"channels": "1", "size": str(size), "steps": str(steps), "hidden": "6", "code": str(code)}
    model = load_architecture(str(MODELS / "draw.py:draw"), args | {"read": "2", "write": "3"})
    model = changed(model).double().eval()
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(2, 1, size, size, dtype=torch.float64, generator=generator)
    noise = torch.randn(2, steps, code, dtype=torch.float64, generator=generator)
    found = outputs(model, [x, noise])
    w = {key: value.numpy() for key, value in model.state_dict().items()}

    def linear(name: str, v: np.ndarray) -> np.ndarray:
        return np.asarray(w[f"{name}.weight"] @ v + w[f"{name}.bias"])

    def sigmoid(v: np.ndarray) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-v)))

    def lstm_step(name: str, v: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gates = (
            w[f"{name}.weight_ih"] @ v
            + w[f"{name}.bias_ih"]
            + w[f"{name}.weight_hh"] @ h
            + w[f"{name}.bias_hh"]
        )
        enter, forget, new, out = np.split(gates, 4)
        c = sigmoid(forget) * c + sigmoid(enter) * np.tanh(new)
        return sigmoid(out) * np.tanh(c), c

    for item in range(2):
        image = x[item, 0].numpy()
        canvas = np.zeros((size, size))
        eh = ec = dh = dc = np.zeros(6)
        for step in range(steps):
            error = image - sigmoid(canvas)
            fy, fx, gain = window_by_the_paper(linear("read_window.placement", dh), 2, size)
            glimpse = gain * np.concatenate([(fy @ image @ fx.T).ravel(), (fy @ error @ fx.T).ravel()])
            eh, ec = lstm_step("encoder", np.concatenate([glimpse, dh]), eh, ec)
            mean, log_deviation = linear("mean", eh), linear("log_deviation", eh)
            dh, dc = lstm_step("decoder", mean + np.exp(log_deviation) * noise[item, step].numpy(), dh, dc)
            fy, fx, gain = window_by_the_paper(linear("write_window.placement", dh), 3, size)
            canvas = canvas + fy.T @ linear("patch", dh).reshape(3, 3) @ fx / gain
            np.testing.assert_allclose(found[1][item, step], mean, rtol=EXACT, atol=EXACT)
            np.testing.assert_allclose(found[2][item, step], log_deviation, rtol=EXACT, atol=EXACT)
        np.testing.assert_allclose(found[0][item, 0], canvas, rtol=EXACT, atol=EXACT)


@torch.no_grad()
def test_a_draw_window_far_outside_the_image_stays_finite() -> None:
    model = load_architecture(str(MODELS / "draw.py:draw"), {"steps": "1"})
    model.get_submodule("read_window.placement").bias.copy_(torch.tensor([50.0, 50.0, -5.0, 0.0, 0.0]))  # type: ignore[operator]
    out = outputs(model, [torch.rand(1, 1, 28, 28), torch.zeros(1, 1, 100)])
    assert all(bool(tensor.isfinite().all()) for tensor in out)


@needs_shared
def test_resnet20_with_its_real_weights_classifies_3992_of_4000_images() -> None:
    """The checkpoint's keys fit strict without `module.`; 99.80 % is what its data's README states."""
    saved = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)["state_dict"]
    model = load_architecture(str(MODELS / "cifar_resnet.py:resnet20")).eval()
    model.load_state_dict({key.removeprefix("module."): value for key, value in saved.items()}, strict=True)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with np.load(IMAGES) as data:
        images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(data["y"]).long()
    assert images.shape == (4000, 3, 32, 32)
    right = 0
    for pixels, label in zip(images.split(500), labels.split(500), strict=True):
        (logits,) = outputs(model, [(pixels / 255 - mean) / deviation])
        right += int((logits.argmax(1) == label).sum())
    assert right == 3992
