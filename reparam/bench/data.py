"""Decoding and augmenting images against the least one can do: a loop over Pillow, one image after the other.

Both read the same encoded bytes, mirror at random, pad, cut out at random, normalize and stack float32 batches. Jobs are
interleaved, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import io
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reparam.bench.machine import describe
from reparam.errors import DataError
from reparam.training.data import Augment, Batches, Data, Samples, load_data
from reparam.training.data.extra import need
from reparam.training.data.images import Images
from reparam.training.data.labels import Labelled
from reparam.training.data.split import Subset

PLAIN = "Pillow loop"
_CLASSES = 2


@dataclass(frozen=True)
class JobResult:
    """Medians over the repeats of one job.

    Attributes:
        name: of the job.
        seconds: wall time of one pass, the start of workers counted.
        ratio: median over the repeats of this job's time to the plain loop's of the same repeat.
        images_per_second: from ``seconds``.
    """

    name: str
    seconds: float
    ratio: float
    images_per_second: float


def bench_data(
    path: str | None,
    images: int,
    pixels: int,
    batch_size: int,
    workers: Sequence[int],
    repeats: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Time one pass over encoded images, flipped and cropped at random.

    Args:
        path: a dataset of encoded images, all of one size; generated JPEG files without.
        images: so many of its training part are read.
        pixels: width and height of the generated ones.
        batch_size: images of a batch.
        workers: process counts, a job each.
        repeats: of every job; medians are reported.
        tell: told what is being done.

    Returns:
        JSON value: machine, settings, and a :class:`JobResult` a job.

    Raises:
        DataError: the dataset cannot be read, or holds no encoded images.
    """
    folder = Path(tempfile.mkdtemp(prefix="reparam-bench-"))
    try:
        if path is None:
            tell(f"generating {images} JPEG files of {pixels}x{pixels}")
            generate(folder, images, pixels)
        data = load_data(path or str(folder))
        data = replace(data, train=Subset(data.train, range(min(images, len(data.train)))))
        encoded = _encoded(data)
        jobs: dict[str, Callable[[], Iterator[Tensor]]] = {PLAIN: lambda: _plain(encoded, data, batch_size)}
        for count in workers:
            name = f"Batches, {count} worker{'s' * (count != 1)}" if count else "Batches"
            jobs[name] = lambda count=count: _batches(data, batch_size, count)  # type: ignore[misc]
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        for repeat in range(repeats):
            for name, job in jobs.items():
                tell(f"repeat {repeat + 1} of {repeats}: {name}")
                seconds[name].append(_seconds(job))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results = [_median(name, found, seconds[PLAIN], len(data.train)) for name, found in seconds.items()]
    return {
        "what": "data",
        "machine": describe(),
        "settings": {
            "images": len(data.train),
            "shape": list(data.shape),
            "batch_size": batch_size,
            "repeats": repeats,
        },
        "results": [vars(result) for result in results],
    }


def generate(folder: Path, count: int, pixels: int) -> None:
    """Class folders of smooth random JPEG files."""
    pillow = need("PIL.Image", "generating images")
    generator = np.random.default_rng(0)
    for index in range(count):
        place = folder / str(index % _CLASSES)
        place.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = pillow.fromarray(coarse).resize((pixels, pixels), pillow.Resampling.BICUBIC)
        image.save(place / f"{index}.jpg", quality=90)


def _encoded(data: Data) -> list[bytes]:
    """The images' files, in the order of the training part."""
    found: list[bytes] = []
    for index in range(len(data.train)):
        samples: Samples = data.train
        place = index
        while isinstance(samples, Subset):
            place = samples.indices[place]
            samples = samples.samples
        if not isinstance(samples, Labelled) or not isinstance(samples.inputs, Images):
            raise DataError(f"{data.train.place(0)}: holds no encoded images, which are what is measured")
        source = samples.inputs.encoded.source(place)
        found.append(Path(source).read_bytes() if isinstance(source, str) else source.read())
    return found


def _plain(encoded: Sequence[bytes], data: Data, batch_size: int) -> Iterator[Tensor]:
    image_module, ops = need("PIL.Image", "decoding"), need("PIL.ImageOps", "decoding")
    draw = random.Random(0)
    channels, height, width = data.shape
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (data.mean, data.std))
    order = draw.sample(range(len(encoded)), len(encoded))
    pad = _augment(data).crop
    for begin in range(0, len(order) - len(order) % batch_size, batch_size):
        batch = []
        for index in order[begin : begin + batch_size]:
            image = image_module.open(io.BytesIO(encoded[index])).convert("L" if channels == 1 else "RGB")
            image = ops.expand(ops.mirror(image) if draw.random() < 0.5 else image, pad)
            left, top = draw.randint(0, 2 * pad), draw.randint(0, 2 * pad)
            pixels = np.array(image.crop((left, top, left + width, top + height)))
            tensor = torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1)
            batch.append((tensor.float() / 255 - mean) / std)
        yield torch.stack(batch)


def _batches(data: Data, batch_size: int, workers: int) -> Iterator[Tensor]:
    batches = Batches(
        data, data.train, batch_size=batch_size, shuffle=True, augment=_augment(data), workers=workers
    )
    return (inputs for inputs, _ in batches.epoch(0))


def _augment(data: Data) -> Augment:
    """Flips, and the padding of the CIFAR recipes in proportion."""
    return Augment(flip=True, crop=data.shape[-1] // 8)


def _seconds(job: Callable[[], Iterator[Tensor]]) -> float:
    began = time.perf_counter()
    for _ in job():
        pass
    return time.perf_counter() - began


def _median(name: str, seconds: Sequence[float], plain: Sequence[float], images: int) -> JobResult:
    median = statistics.median(seconds)
    ratio = statistics.median(own / base for own, base in zip(seconds, plain, strict=True))
    return JobResult(name, median, ratio, images / median)
