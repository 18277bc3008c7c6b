"""float64 sines and cosines of angles in rows, most of which are small.

The angles of a long row are small but for the last ones (t_i ~ 1/√(n − i)). For |t| ≤ 1/2 Taylor's polynomials,

    sin t = t·Σ_k (−t²)^k/(2k+1)!  (7 terms)        cos t = Σ_k (−t²)^k/(2k)!  (8 terms)

end below 2⁻⁵⁴ of the value, and whole matrices of them cost less than the library's functions, which reduce and branch.
Which of the two computes an angle depends on the angle and its place in the row alone, so that a row comes out the same
in any chunk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SMALL = 0.5
# The last angles of a row belong to short suffixes: not small, and the last goes over the full circle.
_LAST = 128
# Rows shorter than this are not worth two ways.
_LONG = 1024
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(7)]
_COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(8)]


def sine_cosine(angle: Tensor, sine: Tensor, cosine: Tensor, work: Tensor) -> None:
    """Fill ``sine`` and ``cosine``.

    Args:
        angle: float64 radians, shape (rows, columns).
        sine, cosine: float64, shaped like ``angle``; ``cosine`` may be ``angle`` itself, ``sine`` may not.
        work: the same, overwritten.
    """
    columns = angle.shape[1]
    if columns < _LONG:
        torch.sin(angle, out=sine)
        torch.cos(angle, out=cosine)
        return
    head, last = slice(0, columns - _LAST), slice(columns - _LAST, columns)
    small, square = angle[:, head], work[:, head]
    torch.abs(small, out=square)
    # A NaN counts as large: other angles of the chunk must not be taken for small with it.
    large = None if float(square.amax()) <= _SMALL else (square > _SMALL).nonzero(as_tuple=True)
    exact = small[large] if large is not None else None
    torch.sin(angle[:, last], out=sine[:, last])
    torch.cos(angle[:, last], out=cosine[:, last])
    torch.mul(small, small, out=square)
    _series(square, _SINE, sine[:, head]).mul_(small)
    _series(square, _COSINE, cosine[:, head])
    if exact is not None:
        sine[large] = exact.sin()
        cosine[large] = exact.cos()


def _series(x: Tensor, coefficients: list[float], out: Tensor) -> Tensor:
    """Σ_k c_k·x^k by Horner's rule, in ``out``, which is not ``x``."""
    *lower, last, highest = coefficients
    torch.add(x.new_tensor(last), x, alpha=highest, out=out)
    for c in reversed(lower):
        torch.addcmul(x.new_tensor(c), out, x, out=out)
    return out
