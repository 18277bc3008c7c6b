"""The Triton backend: every test of both files in Triton's interpreter, its compilation, and what a GPU must show."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import gaussian
from torch import Tensor, nn

from reparam.graph import convert
from reparam.kernels import backend
from reparam.kernels.hyperspherical import decode, encode
from reparam.kernels.operator import compose_rows
from reparam.kernels.weight_norm import compose

HERE = Path(__file__).parent
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
F32 = torch.float32

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """In a process of its own: Triton is interpreted from its import on, and so would be every map of this one."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE / "test_backends.py"),
        str(HERE / "test_weight_norm_rows.py"),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-5000:]
    assert "[100%]" in ran.stdout


@needs_triton
@pytest.mark.parametrize("of_one", [False, True])
def test_compiles_without_a_gpu(of_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes what the compiler does not; a launch turns arguments of 1 and None into constants."""
    wide, compute = ("*fp64", "*fp64") if of_one else ("*fp32", "*bf16")
    values: dict[str, Any] = {"WIDE": of_one}
    if of_one:
        values |= {"ROWS": 1024, "COLUMNS": 1, "RUN": 1, "BLOCKS": 1}
        values |= {"rows": 1, "n": 1, "stride_row": 1, "grad_stride_row": 1, "radius": None}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for code in compiled(wide, compute, values):
        assert "atom." not in code  # sums in no fixed order
        assert "red.global" not in code


#: Instructions for the eight weights of a thread, of the map and of its gradient: 630-810 and 1480-1980 with Triton 3.5 to
#: 3.9, where a layout went wrong 2,400 of the map alone.
MOST = (1200, 2600)


@needs_triton
@pytest.mark.parametrize("compute", ["*fp32", "*bf16"])
@pytest.mark.parametrize("aligned", [False, True])
def test_each_thread_does_its_own_part(
    aligned: bool, compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the compiler chooses a layout in which all threads go over the same runs, there are several times as many."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for code, most in zip(compiled("*fp32", compute, {"WIDE": False}, aligned), MOST, strict=True):
        lines = [line for line in code.splitlines() if line.startswith("\t") and line[1:2] != "."]
        assert len(lines) <= most


def compiled(wide: str, compute: str, values: dict[str, Any], aligned: bool = False) -> list[str]:
    """The PTX of both kernels: types of the trained tensors and the others, and what is a constant."""
    import triton
    from triton.backends.compiler import GPUTarget

    from reparam.kernels.triton_kernels import decode_kernel, gradient_kernel

    types = dict.fromkeys(("theta", "radius", "d_radius", "d_theta"), wide)
    types |= dict.fromkeys(("out", "grad"), compute)
    types |= dict.fromkeys(("rows", "n", "stride_row", "grad_stride_row"), "i32")
    values = {"ROWS": 1, "COLUMNS": 1024, "RUN": 8, "BLOCKS": 4} | values
    values = {"stride": 1, "grad_stride": 1, "RIGHT": 1.5, "STRAIGHT": math.inf} | values
    found = []
    for kernel in (decode_kernel, gradient_kernel):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in values else types[name] for name in names}
        constants = {(i,): values[name] for i, name in enumerate(names) if name in values}
        even = {"theta", "radius", "out", "grad", "d_theta", "d_radius", "rows", "n", "grad_stride_row"}
        attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in even}
        source = triton.compiler.ASTSource(
            fn=kernel, signature=signature, constexprs=constants, attrs=attributes if aligned else {}
        )
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS)
        found.append(built.asm["ptx"])
    return found


@needs_triton
def test_programs_for_rows_of_weight_norm_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget

    from reparam.kernels import triton_weight_norm as module

    for kernel in (module._weight_kernel, module._gradient_kernel):
        names = kernel.arg_names
        types = dict.fromkeys(names, "*fp32") | {"n": "i32", "COLUMNS": "constexpr"}
        source = triton.compiler.ASTSource(
            fn=kernel,
            signature={name: types[name] for name in names},
            constexprs={(names.index("COLUMNS"),): 1024},
        )
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS).asm["ptx"]
        assert "sqrt.rn.f64" in code


@pytest.fixture
def only_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where tensors of the CPU ask for Triton and find what the test puts there."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_without_triton_the_reference_runs_and_says_so(
    only_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_imported", lambda path: "No module named 'triton'")
    theta = gaussian(3, 4)
    assert backend.name(theta) == "reference (triton: No module named 'triton')"
    assert torch.equal(compose_rows(None, theta, 5, F32, F32), decode(theta, 5, F32, None, F32))


def test_what_a_backend_refuses_the_reference_maps(only_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments: Any) -> Any:
        return "other"

    module = SimpleNamespace(
        refusal=lambda theta: "too wide" if theta.shape[1] > 4 else None, decode=other, rows_gradient=other
    )
    monkeypatch.setattr(backend, "_imported", lambda path: module)
    assert backend.name(gaussian(2, 5)) == "reference (triton: too wide)"
    chosen = backend.choose(gaussian(2, 4))
    assert (chosen.name, chosen.decode(), chosen.gradient()) == ("triton", "other", "other")
    assert backend.name(gaussian(2, 4)) == "triton"


def test_other_devices_have_the_reference() -> None:
    assert backend.choose(torch.zeros(1, 1, device="meta")) is backend.REFERENCE


@needs_triton
def test_angles_it_does_not_map(monkeypatch: pytest.MonkeyPatch) -> None:
    from reparam.kernels import triton_rows

    assert triton_rows.refusal(gaussian(2, 3, dtype=torch.bfloat16)) == "angles are torch.bfloat16"
    long = torch.zeros(1, 1).expand(1, 1 << 24)
    assert triton_rows.refusal(long) == "rows of 16777216 angles"
    assert triton_rows.refusal(gaussian(2, 3)) is None

    def broken(*arguments: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify")

    monkeypatch.setattr(triton_rows, "decode", broken)
    triton_rows._fault.cache_clear()
    assert triton_rows._fault(torch.device("cpu")) == "Failed to find C compiler."
    triton_rows._fault.cache_clear()


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 30), nn.ReLU(), nn.Linear(30, 4)
    )
    return convert(plain, "gmp").to(device)


def losses(model: nn.Module, step: Any, device: str) -> list[float]:
    x = gaussian(16, 3, 8, 8).to(device)
    y = torch.arange(16, device=device) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    found = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(step(x), y)
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_compiled_without_a_break_it_trains_as_it_does_eager(device: str) -> None:
    eager, model = network(device), network(device)
    torch._dynamo.reset()
    how = {"backend": "aot_eager"} if device == "cpu" else {"mode": "reduce-overhead"}  # CUDA graphs
    found = losses(model, torch.compile(model, fullgraph=True, **how), device)
    expected = losses(eager, eager, device)
    assert found[-1] < 0.9 * found[0]
    torch.testing.assert_close(found, expected, rtol=1e-5 if device == "cpu" else 1e-3, atol=0)


@needs_cuda
@needs_triton
@pytest.mark.parametrize("form", ["gmp", "wn"])
def test_nothing_waits_and_a_cuda_graph_holds_it(form: str) -> None:
    r, theta = (x.cuda() for x in encode(gaussian(64, 1500), F32))
    other_r, other = (x.cuda() for x in encode(gaussian(64, 1500, seed=1), F32))
    grad = gaussian(64, 1500 if form == "gmp" else 1499, seed=2).cuda()
    assert backend.name(theta) == "triton"

    def step() -> list[Tensor]:
        leaves = r.detach().requires_grad_(), theta.detach().requires_grad_()
        # The numbers serve WN as well, for g and v.
        rows = (
            compose_rows(*leaves, 1500, F32, F32) if form == "gmp" else compose(r[:, None], leaves[1], (1,))
        )
        return [rows.detach(), *torch.autograd.grad(rows, leaves[form == "wn" :], grad)]

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    r.copy_(other_r), theta.copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(held, step(), strict=True))
