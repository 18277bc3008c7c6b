"""Where a file runs: on the provider that was asked for, or not at all. No GPU is needed: sessions are played."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from deployment_cases import ROWS, Net, graph, linear, names, to
from onnx import TensorProto

from reparam.verification import compare_onnx, runtime
from reparam.verification.runtime import CPU, CUDA, RuntimeFailed, open_session


class Played:
    """ONNX Runtime's CPU under the name of another provider.

    Attributes:
        asked: what sessions were asked for.
        settles: the providers in use whatever is asked for; None for those.
        error: added to what CUDA computes.
    """

    def __init__(self, settles: list[str] | None = None, error: float = 0.0) -> None:
        self.asked: list[Any] = []
        self.settles, self.error = settles, error
        self.real = ort.InferenceSession

    def __call__(self, source: Any, options: Any, providers: Sequence[Any], **more: Any) -> Any:
        self.asked.append((providers, more))
        first = providers[0] if isinstance(providers[0], str) else providers[0][0]
        session = self.real(source, options, providers=[CPU])
        error = self.error if first == CUDA else 0.0
        used = self.settles if self.settles is not None and first == CUDA else [first]

        class Session:
            def get_providers(self) -> list[str]:
                return used

            def get_outputs(self) -> Any:
                return session.get_outputs()

            def run(self, outputs: Any, feeds: Any) -> list[Any]:
                return [value + np.float32(error) for value in session.run(outputs, feeds)]

        return Session()


def played(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Played:
    made = Played(**options)
    monkeypatch.setattr(ort, "InferenceSession", made)
    monkeypatch.setattr(runtime, "cuda_obstacle", lambda: None)
    monkeypatch.setattr("reparam.verification.deployment.cuda_obstacle", lambda: None)
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return graph(to("Identity"), tmp_path / "m.onnx")


def test_with_a_gpu_the_file_is_judged_there_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = played(monkeypatch)
    report = compare_onnx(Net(linear), path, ROWS)
    assert report.passed
    assert names(report) == ["largest error", "rms error", "CUDA: largest error", "CUDA: rms error"]
    assert [providers for providers, _ in made.asked] == [[CPU], [(CUDA, {"use_tf32": "0"})]]
    assert all(more == {"enable_fallback": 0} for _, more in made.asked)
    assert not any("CUDA" in note for note in report.notes)


def test_a_file_that_is_wrong_on_the_gpu_alone_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch, error=1e-3)
    report = compare_onnx(Net(linear), path, ROWS)
    assert [check.name for check in report.failures] == ["CUDA: largest error", "CUDA: rms error"]


def test_a_gpu_that_is_not_really_used_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime lists CUDA, loads, and computes on the CPU: which proves nothing of CUDA."""
    played(monkeypatch, settles=[CPU])
    report = compare_onnx(Net(linear), path, ROWS)
    assert report.passed
    assert names(report) == ["largest error", "rms error"]
    assert report.notes == (f"CUDA: not run, {CUDA} did not load, ONNX Runtime would use {CPU} instead",)


@pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="an ONNX Runtime without CUDA")
def test_where_no_gpu_is_cuda_does_not_load_and_nothing_is_printed(
    path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if runtime.cuda_obstacle() is None:
        pytest.skip("a GPU")
    with pytest.raises(RuntimeFailed):
        open_session(onnx.load(path), path, provider=CUDA)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_logits_are_judged_on_the_gpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph(to("Softmax", axis=1), tmp_path / "m.onnx", [("y", TensorProto.FLOAT)])
    made = played(monkeypatch)
    report = compare_onnx(Net(lambda x, w: linear(x, w).softmax(1)), path, ROWS)
    assert report.passed
    assert len(report.checks) == 8
    assert len(made.asked) == 4
