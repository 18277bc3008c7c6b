"""Batches of one split: what an epoch holds is a pure function of (seed, epoch)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reparam.errors import DataError, ReparamError
from reparam.graph.arch import told
from reparam.training.data.augment import Augment
from reparam.training.data.own import joined
from reparam.training.data.randomness import epoch_generator, sample_keys, seeded
from reparam.training.data.types import Data, Samples

Batch = tuple[Tensor, Tensor]


class Batches:
    """Batches of one split, their order a pure function of (seed, epoch): any step can be the first.

    Args:
        data: says how inputs are normalized.
        split: ``data.train`` or ``data.validation``.
        batch_size: of all ranks together; a split that is smaller is one batch.
        shuffle: each epoch has its own order.
        seed: of the order and of ``augment``.
        augment: random changes, for images.
        workers: processes that read and decode; 0 reads in this one.
        pin_memory: batches lie in page-locked memory, where CUDA is at hand.
        rank, world: this process gets the rank-th contiguous part of every batch; parts of an incomplete batch differ
            by at most one sample and may be empty.
        drop_last: leave out a last incomplete batch; as ``shuffle`` without.

    Attributes:
        steps: batches of an epoch.

    Raises:
        DataError: the batch size is below 1 or does not divide by ``world``; ``augment`` without images.
    """

    def __init__(
        self,
        data: Data,
        split: Samples,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        augment: Augment | None = None,
        workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world: int = 1,
        drop_last: bool | None = None,
    ) -> None:
        assert 0 <= rank < world
        if batch_size < 1:
            raise DataError(f"--batch-size {batch_size}: has to be at least 1")
        if batch_size % world:
            raise DataError(
                f"--batch-size {batch_size} is of all {world} processes together: give a multiple of {world}"
            )
        if augment:
            augment.check(data.shape)
        self._data, self._split = data, split
        self._batch_size, self._shuffle, self._seed = batch_size, shuffle, seed
        self._augment = augment
        self._workers = workers
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._rank, self._world = rank, world
        whole, rest = divmod(len(split), batch_size)
        drop_last = shuffle if drop_last is None else drop_last
        self.steps = max(whole, 1) if drop_last else whole + bool(rest)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's part of the batches of an epoch, from step ``start`` on.

        Yields:
            inputs: float32, normalized, (n, *data.shape); integer arrays that are not normalized stay int64.
            targets: int64 (n,) or float32 (n, K).

        Raises:
            DataError: a sample cannot be read, or a worker process died.
        """
        count = len(self._split)
        order = (
            torch.randperm(count, generator=epoch_generator(self._seed, epoch)).tolist()
            if self._shuffle
            else range(count)
        )
        parts = [self._part(order, step) for step in range(start, self.steps)]
        fetch = _Fetch(self._data, self._split, self._augment, self._seed, epoch)
        if not parts:
            return
        if self._workers:
            yield from _from_workers(fetch, parts, self._workers, self._pin_memory)
            return
        for part in parts:
            inputs, targets = fetch.batch(part)
            yield (inputs.pin_memory(), targets.pin_memory()) if self._pin_memory else (inputs, targets)

    def _part(self, order: Sequence[int], step: int) -> list[int]:
        batch = order[step * self._batch_size : (step + 1) * self._batch_size]
        begin, end = (len(batch) * rank // self._world for rank in (self._rank, self._rank + 1))
        return list(batch[begin:end])


def prepare(inputs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Raw inputs as a network takes them.

    Args:
        inputs: (N, C, ...), uint8 pixels or numbers.
        mean, std: per channel, or () for none; see ``Data``.

    Returns:
        float32, but for integers that are not normalized.
    """
    scale = 255.0 if inputs.dtype == torch.uint8 else 1.0
    if not mean:
        return inputs / scale if inputs.dtype == torch.uint8 else inputs
    axes = (-1, *[1] * (inputs.ndim - 2))
    # Promoted to float32 as it is subtracted: two passes over the batch.
    shifted = inputs - (torch.tensor(mean, dtype=torch.float64) * scale).float().reshape(axes)
    return shifted.div_((torch.tensor(std, dtype=torch.float64) * scale).float().reshape(axes))


class _Fetch(Dataset[Batch | ReparamError]):
    """Makes the batch of given samples, in this process or in a worker."""

    def __init__(self, data: Data, split: Samples, augment: Augment | None, seed: int, epoch: int) -> None:
        self._split, self._augment = split, augment
        self._mean, self._std = data.mean, data.std
        self._seed, self._epoch = seed, epoch

    def batch(self, indices: Sequence[int]) -> Batch:
        keys = sample_keys(self._seed, self._epoch, indices)
        if getattr(self._split, "random", False) and len(indices):
            inputs, targets = joined(self._split, indices, list(self._one_by_one(indices, keys.tolist())))
        else:
            inputs, targets = self._split.take(indices)
        if self._augment:
            inputs = self._augment(inputs, keys)
        return prepare(inputs, self._mean, self._std), targets

    def _one_by_one(self, indices: Sequence[int], keys: Sequence[int]) -> Iterator[Batch]:
        """Samples of a dataset that may draw random numbers of its own, each with its own seed."""
        for index, key in zip(indices, keys, strict=True):
            with seeded(key):
                yield self._split.take([index])

    def __getitem__(self, indices: Sequence[int]) -> Batch | ReparamError:
        # Returned, not raised: torch would wrap it in the worker's traceback.
        try:
            return self.batch(indices)
        except ReparamError as error:
            return error


def _from_workers(
    fetch: _Fetch, parts: Sequence[Sequence[int]], workers: int, pin_memory: bool
) -> Iterator[Batch]:
    loader = DataLoader(
        fetch,
        batch_size=None,
        sampler=parts,
        num_workers=min(workers, len(parts)),
        pin_memory=pin_memory,
        # Forked workers share the samples with this process; other ways to start them copy or pickle.
        multiprocessing_context=multiprocessing.get_context("fork") if sys.platform == "linux" else None,
        worker_init_fn=_out_of_reach,
        # One of its own: the global one, from which dropout draws, must not move with the number of workers.
        generator=torch.Generator(),
    )
    try:
        for item in _quietly_started(loader):
            if isinstance(item, ReparamError):
                raise item
            inputs, targets = item  # a list by now
            yield inputs, targets
    except (
        RuntimeError,
        ConnectionError,
        EOFError,
    ) as error:  # the latter two: what it had sent went with it
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"--workers {workers}: a worker process died ({told(error)}); it may have run out of memory: fewer workers or"
            " a smaller --batch-size need less"
        ) from error


def _quietly_started(loader: DataLoader[Batch | ReparamError]) -> Iterator[Batch | ReparamError]:
    """The loader's iterator, without the signal handler by which torch tells of a dead worker: it would raise in the
    midst of whatever this process does, a checkpoint half-written. The iterator finds out when it waits for a batch."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return iterator


def _out_of_reach(worker: int) -> None:
    """A Ctrl-C or SIGTERM meant for the run must not take its workers away while it saves."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
