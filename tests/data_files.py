"""Small datasets in every format that is read, all of the same samples, and what is read of them."""

from __future__ import annotations

import gzip
import io
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from reparam.training.data import Data, Samples
from reparam.training.data.split import Subset

CLASSES = ("cat", "dog", "emu")
Pixels = NDArray[np.uint8]
Writer = Callable[[Path], Path]
#: of statistics and pixels that were computed in float32
FLOAT32 = 1e-6


def pictures(count: int = 12, channels: int = 3, size: tuple[int, int] = (6, 5), seed: int = 0) -> Pixels:
    """(N, H, W, C) random bytes, (N, H, W) for one channel."""
    shape = (count, *size, channels) if channels > 1 else (count, *size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels_of(count: int = 12) -> NDArray[np.int64]:
    """0, 1, 2, 0, 1, 2, ..."""
    return np.arange(count) % len(CLASSES)


#: the samples themselves, which are written in every format
PICTURES, LABELS = pictures(), labels_of()
NAMES = [CLASSES[label] for label in LABELS]


def stored(pixels: Pixels) -> Tensor:
    """(N, C, H, W), as samples hold them."""
    return torch.from_numpy(pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2).copy())


def encoded(pixels: Pixels, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def class_folders(folder: Path, pixels: Pixels, kind: str = "PNG") -> Path:
    """cat/000.png, dog/001.png, ...: sorted by class, so samples 0, 3, 6, ... come first."""
    for index, image in enumerate(pixels):
        place = folder / CLASSES[index % len(CLASSES)]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:03}.{kind.lower()}").write_bytes(encoded(image, kind))
    return folder


def described(folder: Path, pixels: Pixels, labels: Sequence[object], kind: str = "csv") -> Path:
    """Images with metadata.csv or metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(f"{index}.png", label) for index, label in enumerate(labels)]
    for (name, _), image in zip(rows, pixels, strict=True):
        (folder / name).write_bytes(encoded(image))
    if kind == "csv":
        text = "file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows)
    else:
        text = "".join(json.dumps({"file_name": name, "label": label}) + "\n" for name, label in rows)
    (folder / f"metadata.{kind}").write_text(text)
    return folder


def image_parquet(file: Path, pixels: Pixels, labels: Sequence[int], named: bool = True) -> Path:
    """As Hugging Face writes a set of images."""
    file.parent.mkdir(parents=True, exist_ok=True)
    column = [{"bytes": encoded(image), "path": f"{index}.png"} for index, image in enumerate(pixels)]
    table = pa.table({"image": column, "label": pa.array(list(labels), pa.int64())})
    if named:
        features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=5)
    return file


def idx_files(folder: Path, part: str, pixels: Pixels, labels: NDArray[np.int64]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels.astype(np.uint8)))
    return folder


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def numbers(count: int = 12) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features (N, 3) and a target (N,), which two decimals write exactly enough for float32."""
    random = np.random.default_rng(1)
    return (
        (random.integers(-999, 999, (count, 3)) / 100).astype(np.float32),
        (random.integers(-999, 999, count) / 100 + 0.001).astype(np.float32),
    )


def table_text(delimiter: str, header: bool) -> str:
    features, target = numbers()
    rows = [["a", "b", "c", "y"]] if header else []
    rows += [[*(f"{v:.2f}" for v in row), f"{y:.3f}"] for row, y in zip(features, target, strict=True)]
    return "".join(delimiter.join(row) + "\n" for row in rows)


def save_arrays(path: Path, **arrays: NDArray[np.generic]) -> Path:
    """.npz or .safetensors, by the suffix."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file(
            {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, path
        )
    return path


def everything(samples: Samples) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all samples."""
    return samples.take(range(len(samples)))


def whole(data: Data) -> tuple[Tensor, Tensor]:
    """All samples in the order of the file, though they are drawn into two parts."""
    assert isinstance(data.train, Subset)
    assert isinstance(data.validation, Subset)
    both = sorted([*data.train.indices, *data.validation.indices])
    assert both == list(range(12))
    return everything(data.train.samples)
