"""Loops over the angles of rows, forward and backward, compiled by numba.

With P_j = ∏_{i<j} cos t_i and S_j = sin t_j·g_j + cos t_j·S_{j+1}, S_n = g_n,

    w_j = r·P_j·sin t_j        ∂L/∂r = S_1        ∂L/∂t_j = r·P_j·(cos t_j·g_j − sin t_j·S_{j+1})

which divides by no cosine: no angle needs a second way. A row is cut into blocks. Sines and cosines of a block are
computed side by side, in float64 throughout; P and S are chains of multiplications, each of which waits for the one
before, so four rows are run next to one another. The gradient goes through the cosines twice: once to know P at every
block, once from the last block to the first.

Built when first used (seconds), and kept on disk for the next process where there is a place to keep it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

# Angles of one block: four buffers of four rows fill a core's first cache. Shorter ones read memory backwards in pieces
# too small for it to be fetched ahead.
BLOCK = 256
# Rows whose chains run next to one another.
LANES = 4
_LANED = (LANES, BLOCK)

# Up to here the series need no reduction; up to there three parts of π/2, 33 bits each of the first two, reduce exactly.
_QUARTER, _FAR = math.pi / 4, 1e6
_QUADRANTS = 2 / math.pi
_HALF_PI = (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
# sin t = t + t³·(S_0 + S_1·t² + …), cos t = 1 − t²/2 + t⁴·(C_0 + …) for |t| ≤ π/4 to 2⁻⁵⁷ (FreeBSD msun, k_sin.c, k_cos.c)
_S0, _S1, _S2 = -1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04
_S3, _S4, _S5 = 2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10
_C0, _C1, _C2 = 4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05
_C3, _C4, _C5 = -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiler(*freedoms: str) -> Callable[[_Function], _Function]:
    """numba's, with these freedoms in floating-point arithmetic."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(freedoms)}

    def decorate(function: _Function) -> _Function:
        try:
            made = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither beside this file nor in the user's home can anything be kept
            made = numba.njit(**options)(function)
        return made  # type: ignore[no-any-return]

    return decorate


#: numba's compiler as all loops here take it
compiled = _compiler("contract")
_in_any_order = _compiler("contract", "reassoc")


@compiled
def _sine_cosine(t: Any, right: float, sine: Any, cosine: Any) -> None:
    """Of one block. Counting what is large compiles to vector code, as looking for the largest would not."""
    large, far = 0, 0
    for j in range(len(t)):
        large += not (abs(t[j]) <= _QUARTER)
    if large == 0:
        for j in range(len(t)):
            x = np.float64(t[j])
            z = x * x
            sine[j] = x + x * z * (_S0 + z * (_S1 + z * (_S2 + z * (_S3 + z * (_S4 + z * _S5)))))
            cosine[j] = 1 - 0.5 * z + z * z * (_C0 + z * (_C1 + z * (_C2 + z * (_C3 + z * (_C4 + z * _C5)))))
        return
    for j in range(len(t)):
        far += not (abs(t[j]) <= _FAR)
    if far > 0:  # NaN among them
        for j in range(len(t)):
            x = np.float64(t[j])
            sine[j], cosine[j] = math.sin(x), 0.0 if abs(x) == right else math.cos(x)
        return
    for j in range(len(t)):
        x = np.float64(t[j])
        k = np.rint(x * _QUADRANTS)
        quadrant = np.int32(k)
        y = x - k * _HALF_PI[0] - k * _HALF_PI[1] - k * _HALF_PI[2]
        z = y * y
        s = y + y * z * (_S0 + z * (_S1 + z * (_S2 + z * (_S3 + z * (_S4 + z * _S5)))))
        c = 1 - 0.5 * z + z * z * (_C0 + z * (_C1 + z * (_C2 + z * (_C3 + z * (_C4 + z * _C5)))))
        turned = c if quadrant & 1 else s
        other = s if quadrant & 1 else c
        sine[j] = -turned if quadrant & 2 else turned
        other = -other if (quadrant + 1) & 2 else other
        cosine[j] = 0.0 if abs(x) == right else other


@_in_any_order
def _cosines(t: Any, right: float, sine: Any, cosine: Any) -> float:
    """The product of the cosines of one block; ``sine`` and ``cosine`` may be overwritten."""
    large, product = 0, 1.0
    for j in range(len(t)):
        large += not (abs(t[j]) <= _QUARTER)
    if large > 0:
        _sine_cosine(t, right, sine, cosine)
        for j in range(len(t)):
            product *= cosine[j]
        return product
    for j in range(len(t)):
        z = np.float64(t[j]) * np.float64(t[j])
        product *= 1 - 0.5 * z + z * z * (_C0 + z * (_C1 + z * (_C2 + z * (_C3 + z * (_C4 + z * _C5)))))
    return product


@compiled
def _prefix(cosine: Any, m: int, p: Any, prefix: Any) -> None:
    """P of m angles of every lane; ``p`` goes on from where it was."""
    p0, p1, p2, p3 = p[0], p[1], p[2], p[3]
    for j in range(m):
        prefix[0, j], prefix[1, j], prefix[2, j], prefix[3, j] = p0, p1, p2, p3
        p0 *= cosine[0, j]
        p1 *= cosine[1, j]
        p2 *= cosine[2, j]
        p3 *= cosine[3, j]
    p[0], p[1], p[2], p[3] = p0, p1, p2, p3


@compiled
def _suffix(cosine: Any, m: int, s: Any, drive: Any) -> None:
    """Replace sin t_j·g_j by S_{j+1} in every lane, the last first; ``s`` goes on from where it was."""
    s0, s1, s2, s3 = s[0], s[1], s[2], s[3]
    for back in range(m):
        j = np.uint64(m - 1 - back)
        d0, d1, d2, d3 = drive[0, j], drive[1, j], drive[2, j], drive[3, j]
        drive[0, j], drive[1, j], drive[2, j], drive[3, j] = s0, s1, s2, s3
        s0 = d0 + cosine[0, j] * s0
        s1 = d1 + cosine[1, j] * s1
        s2 = d2 + cosine[2, j] * s2
        s3 = d3 + cosine[3, j] * s3
    s[0], s[1], s[2], s[3] = s0, s1, s2, s3


@compiled
def rows(theta: Any, radius: Any, out: Any, right: float, straight: float) -> None:
    """Fill ``out``, shape (rows, n), with r·u(theta).

    Args:
        theta: shape (rows, max(n − 1, 1)); contiguous like all arrays here.
        radius: float64, shape (rows,).
        right, straight: the angles whose cosine, and for the last one of a row sine, is exactly zero.
    """
    count, width = theta.shape
    n = out.shape[1]
    sine, cosine, prefix = np.empty(_LANED), np.empty(_LANED), np.empty(_LANED)
    p = np.empty(LANES)
    for row in range(0, count, LANES):
        # Lanes beyond the last row do that row over again.
        for k in range(LANES):
            p[k] = radius[min(row + k, count - 1)]
        for start in range(0, width, BLOCK):
            m = min(BLOCK, width - start)
            for k in range(LANES):
                _sine_cosine(theta[min(row + k, count - 1), start : start + m], right, sine[k], cosine[k])
            _prefix(cosine, m, p, prefix)
            for k in range(LANES):
                i = min(row + k, count - 1)
                if start + m == width and n > 1 and abs(theta[i, width - 1]) == straight:
                    sine[k, m - 1] = 0.0
                block, s, before = out[i, start : start + m], sine[k], prefix[k]
                for j in range(m):
                    block[j] = before[j] * s[j]
        if n > 1:
            for k in range(LANES):
                out[min(row + k, count - 1), n - 1] = p[k]


@compiled
def gradient(
    theta: Any, radius: Any, grad: Any, d_radius: Any, d_theta: Any, right: float, straight: float
) -> None:
    """Fill the gradients, float64 for the radius and shaped like ``theta``; the latter is of no meaning for n = 1."""
    count, width = theta.shape
    n = grad.shape[1]
    sine, cosine, prefix, state = np.empty(_LANED), np.empty(_LANED), np.empty(_LANED), np.empty(_LANED)
    blocks = (width - 1) // BLOCK + 1
    at = np.empty((blocks + 1, LANES))  # r·P at the first angle of every block
    s = np.empty(LANES)
    for row in range(0, count, LANES):
        for k in range(LANES):
            i = min(row + k, count - 1)
            at[0, k] = radius[i]
            s[k] = grad[i, n - 1] if n > 1 else 0.0
        for b in range(blocks - 1):
            start = b * BLOCK
            for k in range(LANES):
                block = theta[min(row + k, count - 1), start : start + BLOCK]
                at[b + 1, k] = at[b, k] * _cosines(block, right, sine[k], cosine[k])
        for b in range(blocks - 1, -1, -1):
            start = b * BLOCK
            m = min(BLOCK, width - start)
            for k in range(LANES):
                i = min(row + k, count - 1)
                _sine_cosine(theta[i, start : start + m], right, sine[k], cosine[k])
                if start + m == width and n > 1 and abs(theta[i, width - 1]) == straight:
                    sine[k, m - 1] = 0.0
                g, u, v = grad[i, start : start + m], sine[k], state[k]
                for j in range(m):
                    v[j] = u[j] * np.float64(g[j])
            _prefix(cosine, m, at[b], prefix)
            _suffix(cosine, m, s, state)
            for k in range(LANES):
                i = min(row + k, count - 1)
                g, block = grad[i, start : start + m], d_theta[i, start : start + m]
                u, c, before, later = sine[k], cosine[k], prefix[k], state[k]
                for j in range(m):
                    block[j] = before[j] * (c[j] * np.float64(g[j]) - u[j] * later[j])
        for k in range(LANES):
            d_radius[min(row + k, count - 1)] = s[k]
