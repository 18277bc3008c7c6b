"""Scans along the rows of a block: threads go over runs of its columns, and an associative scan over the threads' results.

A scan by shuffles alone exchanges every element at every level; going over a run first exchanges one in RUN. A block comes
from memory with neighbouring columns in neighbouring threads; splitting and joining give each thread a run, and back.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton takes tuples apart by no star)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _products(before_1, through_1, before_2, through_2):
    """Products of a run of factors without its last and with it: an exclusive scan beside the inclusive one."""
    return through_1 * before_2, through_1 * through_2


@triton.jit
def _affine(beyond_a1, beyond_b1, a1, b1, beyond_a2, beyond_b2, a2, b2):
    """The map x ↦ a·x + b of a run of coordinates, that of its first left out and in; run 2 comes before run 1."""
    return beyond_a2 * a1, beyond_a2 * b1 + beyond_b2, a2 * a1, a2 * b1 + b2


@triton.jit
def _halves(x):
    """(rows, 2·w, runs) → twice (rows, w, runs)."""
    first, second = tl.split(
        tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2, x.shape[2])), (0, 2, 3, 1))
    )
    return first, second


@triton.jit
def _whole(first, second):
    """Inverse of :func:`_halves`."""
    shape: tl.constexpr = (first.shape[0], 2 * first.shape[1], first.shape[2])
    return tl.reshape(tl.permute(tl.join(first, second), (0, 3, 1, 2)), shape)


@triton.jit
def apart(x, RUN: tl.constexpr):
    """(rows, columns) → the first column of every run, the second, …: RUN times (rows, runs)."""
    RUNS: tl.constexpr = x.shape[1] // RUN
    # The runs last: their axis is what threads are laid out on.
    parts = (tl.permute(tl.reshape(x, (x.shape[0], RUNS, RUN)), (0, 2, 1)),)
    for _ in tl.static_range(_levels(RUN)):
        finer = ()
        for i in tl.static_range(len(parts)):
            finer = finer + _halves(parts[i])
        parts = finer
    columns = ()
    for i in tl.static_range(RUN):
        columns = columns + (tl.reshape(parts[i], (x.shape[0], RUNS)),)
    return columns


@triton.jit
def _together(columns, RUN: tl.constexpr):
    """Inverse of :func:`apart`."""
    ROWS: tl.constexpr = columns[0].shape[0]
    RUNS: tl.constexpr = columns[0].shape[1]
    parts = ()
    for i in tl.static_range(RUN):
        parts = parts + (tl.reshape(columns[i], (ROWS, 1, RUNS)),)
    for _ in tl.static_range(_levels(RUN)):
        coarser = ()
        for i in tl.static_range(len(parts) // 2):
            coarser = coarser + (_whole(parts[2 * i], parts[2 * i + 1]),)
        parts = coarser
    return tl.reshape(tl.permute(parts[0], (0, 2, 1)), (ROWS, RUNS * RUN))


@triton.constexpr_function
def _levels(run):
    return run.bit_length() - 1


@triton.jit
def block_product(factor):
    """The product of every row, (rows, 1)."""
    return tl.reduce(factor, 1, _multiply, keep_dims=True)


@triton.jit
def _run_product(factors, RUN: tl.constexpr):
    """Of every run, (rows, runs)."""
    product = tl.full(factors[0].shape, 1.0, tl.float64)
    for i in tl.static_range(RUN):
        product *= factors[i]
    return product


@triton.jit
def prefix_products(factors, dtype: tl.constexpr, RUN: tl.constexpr):
    """∏_{j<i} factor_j at every column i, (rows, columns) as ``dtype``; ``factors`` are :func:`apart` and float64."""
    through = _run_product(factors, RUN)
    before, _ = tl.associative_scan((tl.full(through.shape, 1.0, tl.float64), through), 1, _products)
    found = ()
    for i in tl.static_range(RUN):
        found = found + (before.to(dtype),)
        before *= factors[i]
    return _together(found, RUN)


@triton.jit
def suffix_states(factors, drives, state, dtype: tl.constexpr, RUN: tl.constexpr):
    """S_{i+1} at every column i, (rows, columns) as ``dtype``; and S of the first, (rows, 1).

    S_i = drive_i + factor_i·S_{i+1}, past the end S = ``state`` (rows, 1). Both are :func:`apart`; all but ``drives``, which
    may be narrower, are float64.
    """
    a = _run_product(factors, RUN)
    one, zero = tl.full(a.shape, 1.0, tl.float64), tl.zeros_like(a)
    b = zero
    for back in tl.static_range(1, RUN + 1):
        b = factors[RUN - back] * b + drives[RUN - back].to(tl.float64)
    beyond_a, beyond_b, a, b = tl.associative_scan((one, zero, a, b), 1, _affine, reverse=True)
    later = beyond_a * state + beyond_b
    found = ()
    for back in tl.static_range(1, RUN + 1):
        found = (later.to(dtype),) + found
        later = factors[RUN - back] * later + drives[RUN - back].to(tl.float64)
    first = tl.arange(0, a.shape[1])[None, :] == 0
    return _together(found, RUN), tl.sum(tl.where(first, a * state + b, 0.0), 1, keep_dims=True)
