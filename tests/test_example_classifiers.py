"""The classifiers of examples/models: keys, batch norm folded by hand, noise in training, and real weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from example_cases import DEFAULTS, MODELS, cached, changed, outputs
from graph_cases import EXACT
from proofs.resnet20_surgery import CHECKPOINT, IMAGES, images, logits
from torch import nn

from reparam.graph import load_architecture


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


def test_resnet20_with_its_real_weights_classifies_3992_of_4000_images(shared: Path) -> None:
    """The checkpoint's keys fit strict without `module.`; 99.80 % is what its data's README states."""
    if not ((shared / CHECKPOINT).is_file() and (shared / IMAGES).is_file()):
        pytest.skip("no trained ResNet-20")
    saved = torch.load(shared / CHECKPOINT, map_location="cpu", weights_only=True)["state_dict"]
    model = load_architecture(str(MODELS / "cifar_resnet.py:resnet20")).eval()
    model.load_state_dict({key.removeprefix("module."): value for key, value in saved.items()}, strict=True)
    pixels, labels = images(shared)
    assert pixels.shape == (4000, 3, 32, 32)
    assert int((logits(model, pixels).argmax(1) == labels).sum()) == 3992
