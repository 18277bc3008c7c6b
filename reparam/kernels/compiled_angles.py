"""Loops from rows of weights to radius and angles, compiled by numba.

    t_i = atan(w_i / ‖w_{i+1:}‖)  (i < n−1),     t_{n−1} = atan2(w_{n−1}, w_n)  over the full circle

A row is cut into the blocks of :mod:`reparam.kernels.compiled_loops`, and gone through from its last one to its first.
The squares of a block are summed from its own end, then what lies behind is added: a sum in two levels, whose error does
not grow with the row as that of one running sum. Each such sum waits for the one before, so four rows are run next to one
another; roots and arctangents have no such chain, and become vector code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from reparam.kernels.compiled_loops import BLOCK, LANES, compiled

# tan(π/8) and its inverse: between them atan a = π/4 + atan((a − 1)/(a + 1)), beyond atan a = π/2 − atan(1/a).
_LOW, _HIGH = math.sqrt(2) - 1, math.sqrt(2) + 1
_HALF_PI, _QUARTER_PI = math.pi / 2, math.pi / 4
# atan x = x − x·(A_0·x² + A_1·x⁴ + …) for |x| ≤ 7/16 to 2⁻⁵⁷ (FreeBSD msun, s_atan.c)
_A0, _A1, _A2 = 3.33333333333329318027e-01, -1.99999999998764832476e-01, 1.42857142725034663711e-01
_A3, _A4, _A5 = -1.11111104054623557880e-01, 9.09088713343650656196e-02, -7.69187620504482999495e-02
_A6, _A7, _A8 = 6.66107313738753120669e-02, -5.83357013379057348645e-02, 4.97687799461593236017e-02
_A9, _A10 = -3.65315727442169155270e-02, 1.62858201153657823623e-02


@compiled
def _suffix_sums(squared: Any, m: int, s: Any) -> None:
    """Replace m squares of every lane by the sum of all behind each; ``s``, what lies behind the block, goes on."""
    b0, b1, b2, b3 = s[0], s[1], s[2], s[3]
    s0 = s1 = s2 = s3 = 0.0
    for back in range(m):
        j = np.uint64(m - 1 - back)
        q0, q1, q2, q3 = squared[0, j], squared[1, j], squared[2, j], squared[3, j]
        squared[0, j], squared[1, j], squared[2, j], squared[3, j] = b0 + s0, b1 + s1, b2 + s2, b3 + s3
        s0 += q0
        s1 += q1
        s2 += q2
        s3 += q3
    s[0], s[1], s[2], s[3] = b0 + s0, b1 + s1, b2 + s2, b3 + s3


@compiled
def _arctangents(w: Any, squared: Any, out: Any) -> None:
    """atan(w/√squared) of one block, with one division each and no branch; 0 for 0/0."""
    for j in range(len(w)):
        x = np.float64(w[j])
        a, d = abs(x), math.sqrt(squared[j])
        steep, middle = a > _HIGH * d, a > _LOW * d
        above = -d if steep else (a - d if middle else a)
        below = a if steep else (a + d if middle else d)
        offset = _HALF_PI if steep else (_QUARTER_PI if middle else 0.0)
        t = above / (1.0 if below == 0 else below)
        z = t * t
        p = _A4 + z * (_A5 + z * (_A6 + z * (_A7 + z * (_A8 + z * (_A9 + z * _A10)))))
        angle = offset + (t - t * z * (_A0 + z * (_A1 + z * (_A2 + z * (_A3 + z * p)))))
        out[j] = -angle if x < 0 else angle


@compiled
def angles(weight: Any, length: Any, theta: Any) -> None:
    """Fill norms and angles of rows.

    Args:
        weight: float32, shape (rows, n) with n ≥ 2; contiguous like all arrays here.
        length: float64, shape (rows,).
        theta: shape (rows, n − 1).
    """
    count, n = weight.shape
    width = n - 1
    squared, s = np.empty((LANES, BLOCK)), np.empty(LANES)
    for row in range(0, count, LANES):
        # Lanes beyond the last row do that row over again.
        for k in range(LANES):
            x = np.float64(weight[min(row + k, count - 1), width])
            s[k] = x * x
        for b in range((width - 1) // BLOCK, -1, -1):
            start = b * BLOCK
            m = min(BLOCK, width - start)
            for k in range(LANES):
                block, square = weight[min(row + k, count - 1), start : start + m], squared[k]
                for j in range(m):
                    x = np.float64(block[j])
                    square[j] = x * x
            _suffix_sums(squared, m, s)
            for k in range(LANES):
                i = min(row + k, count - 1)
                _arctangents(weight[i, start : start + m], squared[k], theta[i, start : start + m])
        for k in range(LANES):
            i = min(row + k, count - 1)
            length[i] = math.sqrt(s[k])
            # −0.0 becomes 0.0, whose angle would otherwise be −π beside a negative last coordinate.
            y, x = np.float64(weight[i, width - 1]) + 0.0, np.float64(weight[i, width]) + 0.0
            theta[i, width - 1] = math.atan2(y, x)
