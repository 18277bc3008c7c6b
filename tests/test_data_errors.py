"""Every dataset that cannot be used is refused by one line, which names the place and the mend."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import (
    LABELS,
    PICTURES,
    class_folders,
    described,
    encoded,
    idx_files,
    image_parquet,
    pictures,
    save_arrays,
)
from PIL import Image

from reparam.errors import DataError
from reparam.training.data import Batches, load_data, parquet

Writer = Callable[[Path], object]


def text(content: str | bytes, name: str = "t.csv") -> Writer:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def arrays(name: str = "t.npz", **values: Any) -> Writer:
    return lambda folder: save_arrays(folder / name, **values)


def folders(change: Callable[[Path], object], kind: str = "PNG") -> Writer:
    def write(folder: Path) -> Path:
        place = class_folders(folder / "set", PICTURES, kind)
        change(place)
        return place

    return write


def metadata(change: Callable[[str], str], kind: str = "csv") -> Writer:
    def write(folder: Path) -> Path:
        place = described(folder / "set", PICTURES, LABELS.tolist(), kind)
        file = place / f"metadata.{kind}"
        file.write_text(change(file.read_text()))
        return place

    return write


def columns(**values: Any) -> Writer:
    def write(folder: Path) -> Path:
        pq.write_table(pa.table(values), folder / "t.parquet")
        return folder / "t.parquet"

    return write


def cut(write: Writer, count: int) -> Writer:
    """A file without its last bytes."""

    def damaged(folder: Path) -> object:
        path = write(folder)
        assert isinstance(path, Path)
        path.write_bytes(path.read_bytes()[:-count])
        return path

    return damaged


def empty_folder(folder: Path) -> Path:
    (folder / "set").mkdir()
    return folder / "set"


def sixteen_bits(place: Path) -> None:
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(place / "cat" / "000.png")


def lying_png(place: Path) -> None:
    """A PNG whose header says 30000 × 30000."""
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    data = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    (place / "cat" / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + data)


HEAD = "a,b,y\n1,2,3\n4,5,6\n"
ABC = {"a": [1.0, 2.0, 3.0], "label": [0, 1, 0]}

CASES: dict[str, tuple[Writer, dict[str, Any], str]] = {
    # paths
    "no such path": (lambda p: p / "none", {}, "none: no such file or folder"),
    "no such file of a reference": (lambda p: f"{p}/none.py:f", {}, r"--data \S+none.py:f: no file `\S+none.py`"),
    "a format of another kind": (text("x", "t.xlsx"), {}, r"t.xlsx: not a format that is read; expected .*\.npz.*file.py:callable"),
    "a folder of nothing": (empty_folder, {}, "set: holds no dataset; expected a folder"),
    "another task": (text(HEAD), {"task": "detect"}, "--task detect: one of classify, regress"),
    # tables
    "an empty table": (text(""), {}, "t.csv: holds no rows"),
    "a header alone": (text("a,b,y\n"), {}, "t.csv: holds a header and no rows"),
    "a column alone": (text("y\n1\n2\n"), {}, "t.csv: no column but the target"),
    "a missing target": (text(HEAD), {"target": "z"}, "t.csv: --target z: no such column; there are a, b, y"),
    "a missing input": (text(HEAD), {"inputs": ("a", "q")}, "t.csv: --inputs q: no such column; there are a, b, y"),
    "an index too large": (text("1,2\n3,4\n"), {"inputs": "0-2"}, "--inputs 0-2: no such column; there are 0 to 1"),
    "a column on both sides": (text(HEAD), {"inputs": "a,y"}, "t.csv: column `y` is both input and target"),
    "a row too short": (text(HEAD + "\n7,8\n"), {}, "t.csv: line 5 has 2 fields, line 1 has 3"),
    "a row too long": (text("1 2 3\n4 5 6 7\n", "t.txt"), {}, "t.txt: line 2 has 4 fields, line 1 has 3"),
    "a word": (text(HEAD + "7,eight,9\n"), {}, "t.csv: line 4, column `b`: 'eight' is not a number; .*--inputs"),
    "a word in an unnamed column": (text("1,2,3\n4,five,6\n"), {}, "t.csv: line 2, column 1: 'five' is not a number"),
    "a missing value": (text(HEAD + "7,,9\n"), {}, "t.csv: line 4, column `b`: no value"),
    "a missing label": (text(HEAD + "7,8,\n"), {}, "t.csv: line 4, column `y`: no value"),
    "NaN": (text(HEAD + "\nnan,8,9\n"), {}, "t.csv: line 5, column `a`: 'nan' is not finite"),
    "NaN as a target": (text(HEAD + "\n7,8,nan\n1,1,0.5\n"), {}, "t.csv: line 5: the target is NaN or infinite"),
    "other bytes": (text(b"a,b\n1,\xff\n"), {}, r"t.csv: not UTF-8 text \(byte 6\)"),
    "an open quote": (text('a,b\n1,"2\n'), {}, "t.csv: line 2: "),
    "a word to regress on": (text("a,y\n1,x\n2,z\n"), {"task": "regress"}, "t.csv: line 2: target 'x' is not a number"),
    "a fraction as a class": (text("a,y\n1,0\n2,1.5\n"), {"task": "classify"}, "line 3: label 1.5 is no integer"),
    "a negative class": (text("a,y\n1,0\n2,-1\n3,0\n"), {"task": "classify"}, "line 3: label -1 is negative"),
    "a huge class": (text("a,y\n1,0\n2,99999999\n"), {"task": "classify"}, "line 3: label 99999999 is too large"),
    "several classes": (text(HEAD), {"task": "classify", "target": "b,y"}, "line 2: 2 targets for each sample"),
    "an empty validation": (text(HEAD), {"validation": 0.1}, "--validation 0.1 of 2 samples leaves no sample for validation"),
    "an empty training": (text(HEAD), {"validation": 0.9}, "--validation 0.9 of 2 samples leaves no sample for training"),
    "a share of two": (text(HEAD), {"validation": 2}, "--validation 2: a share between 0 and 1"),
    "sizes of a table": (text(HEAD), {"size": 8}, "--size 8: resizes encoded images; .*t.csv holds arrays"),
    "two means": (text("a,b,c,y\n1,2,3,4\n5,6,7,8\n"), {"mean": (1, 2), "std": (1, 2), "validation": 0.5},
                  "--mean: 2 values for 3 channels or features"),
    "a mean alone": (text(HEAD), {"mean": (1,), "validation": 0.5}, "--mean alone: give --mean and --std together"),
    "no spread": (text(HEAD), {"mean": (1,), "std": (0,), "validation": 0.5}, "--std 0: has to be finite, above 0"),
    "nothing but constants": (text("a,y\n1,2\n1,3\n1,4\n"), {"validation": 0.4}, "inputs cannot be standardized: all are 1 "),
    # arrays
    "Python objects": (arrays(x=np.array([{}, {}]), y=np.zeros(2)), {}, "array `x` holds Python objects"),
    "other names": (arrays(a=np.zeros(2), b=np.zeros(2)), {}, "which arrays are inputs and targets\\? There are a, b"),
    "no such array": (arrays(x=np.zeros(2), y=np.zeros(2)), {"target": "z"}, "--target z: no such array; there are x, y"),
    "arrays of other lengths": (arrays(x=np.zeros((3, 2)), y=np.zeros(2)), {}, r"`x` is \[3, 2\] and `y` \[2\]; expected"),
    "NaN in an array": (arrays(x=np.array([[0.0], [np.nan]]), y=np.zeros(2)), {}, "array `x`, row 1: holds NaN or Inf"),
    "complex numbers": (arrays(x=np.zeros((2, 2), complex), y=np.zeros(2)), {}, "array `x` holds complex128; expected numbers"),
    "an empty array": (arrays(x=np.zeros((0, 2)), y=np.zeros(0)), {}, "array `x` is empty"),
    "a cut npz": (cut(arrays(x=PICTURES, y=LABELS), 40), {}, "t.npz: cannot be read"),
    "no npz": (text("nothing", "t.npz"), {}, "t.npz: cannot be read"),
    "an npy called npz": (lambda p: (np.save(p / "t.npy", LABELS), (p / "t.npy").rename(p / "t.npz"))[1], {}, "one array, not an archive"),
    "a cut safetensors": (cut(arrays("t.safetensors", x=PICTURES, y=LABELS), 4), {}, "t.safetensors: cannot be read"),
    "validation of another shape": (
        arrays(x_train=np.ones((4, 2)), y_train=np.ones(4), x_test=np.ones((4, 3)), y_test=np.ones(4)), {"task": "regress"},
        r"t.npz: row 0: the input is float32 \[3\], in training \(\S+t.npz: row 0\) float32 \[2\]",
    ),
    # IDX
    "IDX without labels": (
        lambda p: (idx_files(p, "train", pictures(channels=1), LABELS), (p / "train-labels-idx1-ubyte").unlink(), p)[2], {},
        "no train-labels-idx1-ubyte.gz or train-labels-idx1-ubyte",
    ),
    "columns of IDX": (lambda p: idx_files(p, "train", pictures(channels=1), LABELS), {"inputs": "a"}, "--inputs a: chooses columns"),
    # folders of images
    "an empty class": (folders(lambda p: (p / "fox").mkdir()), {}, "set/fox: a class folder without images"),
    "no image": (folders(lambda p: (p / "dog" / "x.png").write_text("no")), {}, "dog/x.png: cannot be decoded .not an image that Pillow knows"),
    "sizes": (folders(lambda p: (p / "dog" / "x.png").write_bytes(encoded(PICTURES[0, :4]))), {},
              "images differ in size: .*cat/000.png is 5x6, .*dog/x.png 5x4; --size N"),
    "more than 8 bits": (folders(sixteen_bits), {}, "cat/000.png: mode I;16 is not 8 bits a channel"),
    "a decompression bomb": (folders(lying_png), {}, "cat/000.png: cannot be decoded .*decompression bomb"),
    "a cut image": (folders(lambda p: cut(lambda _: p / "cat" / "000.jpeg", 200)(p), "JPEG"), {}, "cat/000.jpeg: cannot be decoded"),
    "a value for a class folder": (folders(lambda p: None), {"task": "regress"}, "cat/000.png: has a class, not a value"),
    "a target for class folders": (folders(lambda p: None), {"target": "a"}, "--target a: is a column of metadata.csv"),
    "no pixels": (folders(lambda p: None), {"size": 0}, "--size 0: has to be at least 1"),
    "a class for validation only": (
        lambda p: (class_folders(p / "train", PICTURES), class_folders(p / "val", PICTURES),
                   (p / "val" / "dog").rename(p / "val" / "yak"), p)[3], {},
        r"val/yak/001.png: class 'yak' is unknown to training \(cat, dog, emu\)",
    ),
    "both kinds of parts": (
        lambda p: (class_folders(p / "set", PICTURES), save_arrays(p / "v.npz", x=PICTURES, y=LABELS), p / "set")[2],
        {"val_path": "v.npz"}, "one part holds encoded images, the other arrays",
    ),
    "two parts for validation": (
        lambda p: (class_folders(p / "set", PICTURES), save_arrays(p / "v.npz", x_train=PICTURES, y_train=LABELS, x_test=PICTURES, y_test=LABELS), p / "set")[2],
        {"val_path": "v.npz"}, "--val-path .*v.npz: has two parts of its own",
    ),
    # metadata
    "a file that is not there": (metadata(lambda t: t.replace("3.png", "x.png")), {}, "metadata.csv: line 5: no such file: x.png"),
    "a file elsewhere": (metadata(lambda t: t.replace("3.png", "../x.png")), {}, r"line 5: \.\./x.png lies outside of the folder"),
    "an absolute file": (metadata(lambda t: t.replace("3.png", "/x.png")), {}, "line 5: /x.png lies outside of the folder"),
    "no file names": (metadata(lambda t: t.replace("file_name", "name")), {}, "metadata.csv: no column file_name; there are name, label"),
    "no label": (metadata(lambda t: t.replace("3.png,0", "3.png,")), {}, "line 5, column `label`: no value"),
    "a short line": (metadata(lambda t: t.replace("3.png,0", "3.png")), {}, "line 5 has not the 2 fields of the header"),
    "empty metadata": (metadata(lambda t: ""), {}, "metadata.csv: lists no images"),
    "no JSON": (metadata(lambda t: t + "{", "jsonl"), {}, "metadata.jsonl: line 13: no JSON"),
    "no object": (metadata(lambda t: t + "7\n", "jsonl"), {}, "metadata.jsonl: line 13: not an object"),
    "a list as a label": (metadata(lambda t: t.replace("0}", "[0]}", 1), "jsonl"), {}, "line 1: the target is no number or string"),
    # parquet
    "no parquet": (text("PAR1 and nothing", "t.parquet"), {}, "t.parquet: cannot be read as parquet"),
    "a cut parquet": (cut(lambda p: image_parquet(p / "t.parquet", PICTURES, LABELS.tolist()), 30), {}, "t.parquet: cannot be read as parquet"),
    "no rows": (columns(a=pa.array([], pa.float32()), y=pa.array([], pa.float32())), {}, "t.parquet: holds no rows"),
    "no such column": (columns(**ABC), {"target": "z"}, "t.parquet: --target z: no such column; there are a, label"),
    "a null": (columns(a=[1.0, 2.0, None], y=[1.0, 2.0, 3.0]), {}, "t.parquet: row 2, column `a`: no value"),
    "a null target": (columns(a=[1.0, 2.0, 3.0], y=[1.0, None, 3.0]), {}, "t.parquet: row 1, column `y`: no value"),
    "NaN in a column": (columns(a=[1.0, float("nan"), 3.0], y=[1.0, 2.0, 3.0]), {}, "row 1, column `a`: nan is not finite"),
    "strings as inputs": (columns(a=["x", "y", "z"], y=[1, 2, 3]), {}, "row 0, column `a`: string is not a number"),
    "an image column twice": (columns(a=[b"x"], b=[b"y"], label=[0]), {}, "columns a, b hold images; choose one by --inputs"),
    "images and numbers": (columns(a=[b"x"], b=[1.0], label=[0]), {"inputs": "a,b"}, "images and other columns together"),
    "an image that is none": (columns(a=[encoded(PICTURES[0]), b"x"], label=[0, 1]), {}, "t.parquet: row 1: cannot be decoded"),
    "an image without bytes": (
        columns(image=[{"bytes": encoded(PICTURES[0]), "path": None}, {"bytes": None, "path": "x.png"}], label=[0, 1]), {},
        "t.parquet: row 1, column `image.bytes`: no value",
    ),
    "a label without a name": (
        lambda p: image_parquet(p / "t.parquet", PICTURES, [0, 1, 2, 3] * 3), {},
        r"t.parquet: row 3: label 3 is out of range; 3 classes have names \(cat, dog, emu\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_the_place(tmp_path: Path, case: str) -> None:
    write, options, message = CASES[case]
    path = write(tmp_path)
    if "val_path" in options:
        options = {**options, "val_path": str(tmp_path / options["val_path"])}
    with pytest.raises(DataError, match=message) as caught:
        load_data(str(path), **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_header_may_be_right_and_the_pixels_wrong(tmp_path: Path) -> None:
    """Found when the image is met, in this process or in a worker: the same one line."""
    folder = class_folders(tmp_path / "set", pictures(size=(32, 32)), "JPEG")
    data = load_data(str(folder), mean=(0.5,), std=(0.5,))
    file = Path(data.train.place(4))
    file.write_bytes(file.read_bytes()[:700])
    for workers in (0, 2):
        with pytest.raises(DataError, match=f"{file}: cannot be decoded .image file is truncated") as caught:
            list(Batches(data, data.train, batch_size=2, shuffle=False, workers=workers).epoch(0))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["PIL.Image", "pyarrow", "pyarrow.parquet"])
def test_what_is_not_installed_is_named(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image_parquet(tmp_path / "set.parquet", PICTURES, LABELS.tolist())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"needs {module.split('.')[0]}: pip install 'reparam\[data\]'"):
        load_data(str(path))


def test_more_than_fits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image_parquet(tmp_path / "set.parquet", PICTURES, LABELS.tolist())
    monkeypatch.setattr(parquet.os, "sysconf", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 512}.__getitem__)
    with pytest.raises(DataError, match=r"of data and 0\.0 GB of memory; unpack the images into a folder"):
        load_data(str(path))


def test_shards_of_other_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table(ABC), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"a": [1.0]}), tmp_path / "train-00001-of-00002.parquet")
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet: no column label, which train-00000"):
        load_data(str(tmp_path))


def test_two_columns_of_classes(tmp_path: Path) -> None:
    table = pq.read_table(image_parquet(tmp_path / "set.parquet", PICTURES, LABELS.tolist()))
    metadata = table.schema.metadata[b"huggingface"].replace(
        b'"label":', b'"coarse":{"names":["a"],"_type":"ClassLabel"},"label":'
    )
    table = table.append_column("coarse", pa.array([0] * 12)).replace_schema_metadata(
        {"huggingface": metadata}
    )
    pq.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(DataError, match="columns label, coarse hold classes; choose one by --target"):
        load_data(str(tmp_path / "set.parquet"))
    assert load_data(str(tmp_path / "set.parquet"), target="coarse", validation=0.5).classes == ("a",)


def test_the_tables_above_are_read_undamaged(tmp_path: Path) -> None:
    assert load_data(str(text(HEAD + "7,8,9\n")(tmp_path)), validation=0.4).shape == (2,)
    assert load_data(str(columns(**ABC)(tmp_path)), validation=0.4).targets == 2
