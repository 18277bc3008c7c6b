"""Where the storages of a PyTorch zip archive lie in the file, looked up record by record."""

from __future__ import annotations

import zipfile
from pathlib import Path

_LOCAL_HEADER = 30


def record_places(path: Path) -> dict[int, int] | None:
    """Offset of its first byte -> size, for every record that is stored as plain little-endian bytes.

    None where tensors cannot be read in place: no zip archive, compressed records, or the other byte order. torch
    computes offsets as its own writer would have laid the records out; any other zip writer lays them out otherwise,
    so what torch computes is only believed where a record of the right size begins.
    """
    if not zipfile.is_zipfile(path):
        return None
    places = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.filename.rpartition("/")[2] == "byteorder" and archive.read(info) != b"little":
                    return None
                if info.compress_type != zipfile.ZIP_STORED:
                    return None
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER)
                lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                places[info.header_offset + _LOCAL_HEADER + lengths] = info.file_size
    except (
        Exception
    ):  # zipfile raises whatever a broken directory makes it stumble over; torch then says what it is
        return None
    return places
