"""Wrong maps are caught: by the assertion the other tests share, and by ``convert`` itself before anything is written.

The three are real ones. The paper's code and the public PyTorch port lose the sign of the last coordinate; theta as the
paper measures it, in float32, cannot resolve the cosines of a long row; and a right angle recognized in the dtype theta
*has* rather than in the one it was stored in loses zeros once theta is widened.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import oracles
import pytest
import torch
from safetensors.torch import save_file
from support import convert_by, gaussian, run, snapshot
from torch import Tensor

from reparam.kernels import hyperspherical
from reparam.parameterizations import PARAMETERIZATIONS, WeightSpec

GMP = PARAMETERIZATIONS["gmp"]
VGG_FAN_IN = 25_088
RIGHT_ENCODE, RIGHT_DECODE = hyperspherical.encode, hyperspherical.decode

Patch = Callable[[pytest.MonkeyPatch], None]


def sign_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last angle over half the circle: atan2(w_{n−1}, |w_n|)."""

    def encode(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return RIGHT_ENCODE(torch.cat([weight[:, :-1], weight[:, -1:].abs()], dim=1), dtype)

    convert_by(monkeypatch, encode=encode)


def colatitude_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """θ = π/2 − t, rounded to float32 as it is stored; decoding otherwise exact."""

    def decode(theta: Tensor, n: int, stored: torch.dtype, radius: Tensor | None = None) -> Tensor:
        colatitude = (math.pi / 2 - theta.double()).float()
        return RIGHT_DECODE(math.pi / 2 - colatitude.double(), n, stored, radius)

    convert_by(monkeypatch, decode=decode)


def snapped_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """After ``.double()`` the right angle is compared with float64's π/2, which no float32 angle equals."""

    def decode(theta: Tensor, n: int, stored: torch.dtype, radius: Tensor | None = None) -> Tensor:
        theta = theta.double()
        return RIGHT_DECODE(theta, n, theta.dtype, radius)

    convert_by(monkeypatch, decode=decode)


def dense(rows: int, n: int) -> Tensor:
    return gaussian(rows, n, seed=n)


def pruned(rows: int, n: int) -> Tensor:
    weight = gaussian(rows, n, seed=n)
    keep = torch.rand(rows, n, generator=torch.Generator().manual_seed(n)) < 0.2
    keep[:, 0] = True
    return weight * keep


CASES: dict[str, tuple[Patch, Tensor, str]] = {
    "last sign lost, n=2": (sign_lost, dense(64, 2), "row error"),
    "last sign lost, n=27": (sign_lost, dense(64, 27), "row error"),
    "colatitude in float32": (colatitude_in_float32, dense(4, VGG_FAN_IN), "row error"),
    "dtype-local snap, n=27": (snapped_in_its_own_dtype, pruned(64, 27), "an exact zero was lost"),
    "dtype-local snap, n=576": (snapped_in_its_own_dtype, pruned(64, 576), "an exact zero was lost"),
}
case = pytest.mark.parametrize(("patch", "weight", "complaint"), CASES.values(), ids=CASES)


def there_and_back(weight: Tensor) -> Tensor:
    spec = WeightSpec(tuple(weight.shape), "F32")
    again, _ = GMP.compose(GMP.decompose(weight, None, spec), spec)
    return again.float()


@case
def test_the_right_map_passes_and_the_wrong_one_fails(
    patch: Patch, weight: Tensor, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracles.assert_came_back(there_and_back(weight), weight, torch.float32)
    patch(monkeypatch)
    with pytest.raises(AssertionError, match=complaint):
        oracles.assert_came_back(there_and_back(weight), weight, torch.float32)


def test_the_colatitude_is_far_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = dense(4, VGG_FAN_IN)
    right = oracles.row_errors(there_and_back(weight), weight).max()
    colatitude_in_float32(monkeypatch)
    wrong = oracles.row_errors(there_and_back(weight), weight).max()
    assert wrong > 20 * oracles.FLOAT32_LONG_ROW
    assert wrong > 50 * right


@case
def test_convert_decodes_what_it_wrote(
    patch: Patch, weight: Tensor, complaint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_file({"layer.weight": weight}, tmp_path / "model.safetensors")
    before = snapshot(tmp_path)
    patch(monkeypatch)
    ran = run("convert", tmp_path / "model.safetensors", "--to", "gmp")
    assert ran.code == 1
    assert ran.out == ""
    assert ("row error" if complaint == "row error" else "exact zero") in ran.err
    assert snapshot(tmp_path) == before
