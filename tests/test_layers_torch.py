"""Reparameterized layers under what torch does with modules: compile, export, autocast, checkpointing, DDP, encoders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layer_cases import relative_error
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.checkpoint import checkpoint

from reparam.graph import fold
from reparam.graph.exchange import replace_modules
from reparam.layers import Reparameterized, layer_class

EXACT = 1e-12
# Of g·v/‖v‖ in float32 by torch's kernel against its operations, which a compiler sees; all else is bit for bit.
ROUNDING = {"wn": 1e-6}

VARIANTS = [
    ("gmp", None),
    ("gmp", "mn"),
    ("gmp", "mbn"),
    ("wn", None),
    ("wn", "mbn"),
    ("wn", "mn"),
    ("unit", None),
]


def convert(model: nn.Module, form: str, mean: str | None = None) -> nn.Module:
    def replacement(module: nn.Module) -> nn.Module | None:
        cls = layer_class(form, type(module))
        layer = None if cls is None else cls.from_plain(module)
        return layer if layer is None or mean is None else layer.normalize_mean(mean)

    return replace_modules(model, replacement)


def network(form: str, mean: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    return convert(plain, form, mean)


def images(count: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    model.zero_grad()
    forward(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("form", "mean"), VARIANTS)
def test_compiles_into_one_graph(form: str, mean: str | None) -> None:
    model, x = network(form, mean), images()
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, expected in zip(gradients(model, compiled, x), gradients(eager, eager, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for found, expected in zip(model.buffers(), eager.buffers(), strict=True):
        assert relative_error(found, expected) <= ROUNDING.get(form, 0.0)
    for training in (False, True):
        model.train(training), eager.train(training)
        torch.testing.assert_close(compiled(x), eager(x))


@pytest.mark.parametrize(("form", "mean"), VARIANTS)
def test_exports(form: str, mean: str | None) -> None:
    model, x = network(form, mean).eval(), images()
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
    assert relative_error(exported.module()(images(7)), model(images(7))) <= ROUNDING.get(form, 0.0)
    maps = [node for node in exported.graph.nodes if node.target is torch.ops.reparam.rows.default]
    assert len(maps) == (2 if form == "gmp" else 0)
    assert set(exported.state_dict) == set(model.state_dict())


@pytest.mark.parametrize(("form", "mean"), VARIANTS)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_composes_in_its_type_and_leaves_the_parameters(
    form: str, mean: str | None, compiled: bool
) -> None:
    model, x = network(form, mean), images()
    torch._dynamo.reset()
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = forward(x)
        assert model[0].weight.dtype == torch.bfloat16
        assert model[0].fold().weight.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) <= 2e-2
    out.float().sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize(("form", "mean"), VARIANTS)
def test_activation_checkpointing(form: str, mean: str | None) -> None:
    model, x = network(form, mean), images()

    def forward(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    for found, expected in zip(gradients(model, forward, x), gradients(model, model, x), strict=True):
        assert torch.equal(found, expected)


def _ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(network("gmp"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        model(images(4, step)[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimizer.step()
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    # Its reducer must not be the last to let go of the group: see World.close.
    del model, optimizer
    dist.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    mp.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    model = network("gmp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        model(images(4, step)).square().mean().backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(found[0][key], found[1][key])
        torch.testing.assert_close(found[0][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["gmp", "wn"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_and_their_fast_path(
    form: str, norm_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    ).double()
    model = convert(plain, form)
    assert isinstance(model.self_attn, Reparameterized)
    assert isinstance(model.self_attn.out_proj, Reparameterized)
    assert isinstance(model.linear1, Reparameterized)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])
    assert relative_error(model(x), plain(x)) <= EXACT
    taken = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: taken.append(1) or fast(*a))
    model.eval(), plain.eval()
    with torch.no_grad():
        assert relative_error(model(x), plain(x)) <= EXACT
        kept = ~padding[..., None]
        found, expected = (m(x, src_key_padding_mask=padding) * kept for m in (model, plain))
        assert relative_error(found, expected) <= EXACT
    # The plain layer took it twice. In GmP in_proj_weight is no tensor, so torch leaves it; WN's layer takes it too.
    assert len(taken) == (2 if form == "gmp" else 4)
    folded = fold(model)
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert type(folded.self_attn.out_proj) is NonDynamicallyQuantizableLinear
    with torch.no_grad():
        assert relative_error(folded(x), plain(x)) <= EXACT


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("form", ["gmp", "wn"])
def test_an_encoder_of_several_layers_with_nested_tensors(form: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2).double().eval()
    model = convert(plain, form)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        kept = ~padding[..., None]
        expected = plain(x, src_key_padding_mask=padding) * kept
        assert relative_error(model(x, src_key_padding_mask=padding) * kept, expected) <= EXACT


def test_attention_under_autocast_compile_and_export() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out

    torch.manual_seed(0)
    plain = Attention()
    model, x = convert(plain, "gmp"), torch.randn(2, 5, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(model(x), plain(x)) <= 2e-2
    exported = torch.export.export(model.eval(), (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), plain(x))


def test_a_shared_layer_of_a_replaced_parent_stays_one() -> None:
    attention = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"attention": attention, "also": attention.out_proj})
    converted = convert(model, "gmp")
    assert converted["also"] is converted["attention"].out_proj
    assert isinstance(converted["also"], Reparameterized)
    assert type(model["also"]) is NonDynamicallyQuantizableLinear
    assert model["also"] is attention.out_proj
    folded = fold(converted)
    assert folded["also"] is folded["attention"].out_proj
