"""Work in forked processes: what comes back, what is raised, and what becomes of the processes."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reparam.checkpoint import convert_checkpoint, running, workers, writing
from reparam.checkpoint.workers import each
from reparam.errors import NonFiniteError, OutputError, ReparamError

pytestmark = pytest.mark.skipif(not workers._CAN_FORK, reason="this system does not fork")

PROMPT = 10.0


@pytest.fixture(autouse=True)
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_item_is_done_once_and_in_another_process() -> None:
    found = dict(each(lambda n: (n * n, os.getpid()), list(range(40)), parallel=True))
    assert {i: square for i, (square, _) in found.items()} == {i: i * i for i in range(40)}
    assert os.getpid() not in {pid for _, pid in found.values()}


def test_little_work_stays_in_this_process_with_one_thread() -> None:
    found = list(each(lambda n: (os.getpid(), torch.get_num_threads()), [1, 2], parallel=False))
    assert found == [(0, (os.getpid(), 1)), (1, (os.getpid(), 1))]
    assert torch.get_num_threads() == 2


def test_an_error_arrives_with_its_type_and_nothing_goes_on(tmp_path: Path) -> None:
    def work(n: int) -> None:
        if n == 3:
            raise NonFiniteError(f"item {n}")
        (tmp_path / str(n)).touch()
        time.sleep(0.01)

    with pytest.raises(NonFiniteError, match="item 3"):
        list(each(work, list(range(200)), parallel=True))
    begun = len(list(tmp_path.iterdir()))
    time.sleep(0.1)
    assert begun < 20
    assert len(list(tmp_path.iterdir())) == begun


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    class OddError(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a} and {b}")

    def work(n: int) -> None:
        raise OddError(n, 2)

    with pytest.raises(RuntimeError, match="OddError: 1 and 2"):
        list(each(work, [1, 1], parallel=True))


def test_a_killed_process_is_an_error_not_a_wait() -> None:
    def work(n: int) -> None:
        if n == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ReparamError, match=r"worker process was killed \(exit code -9\)"):
        list(each(work, list(range(10)), parallel=True))


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    def work(n: int) -> None:
        (tmp_path / f"{os.getpid()}").touch()
        time.sleep(0.02)

    parent = os.fork()
    if parent == 0:
        for _ in each(work, list(range(10_000)), parallel=True):
            pass
        os._exit(0)
    deadline = time.monotonic() + PROMPT
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    pids = [int(file.name) for file in tmp_path.iterdir()]
    assert len(pids) == 2
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_forking_beside_threads_warns_nobody() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert dict(each(lambda n: n, [1, 2], parallel=True)) == {0: 1, 1: 2}
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("to", ["wn", "gmp"])
def test_processes_write_what_one_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    from reparam.checkpoint import mapping

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(50, 7, generator=generator),
        "a.bias": torch.randn(50, generator=generator),
        "b.weight": torch.randn(9, 4, 3, generator=generator),
        "norm": torch.randn(5, generator=generator),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    monkeypatch.setattr(mapping, "_BLOCK", 20)
    alone = convert_checkpoint(tmp_path / "m.safetensors", to, output=tmp_path / "alone.safetensors")
    monkeypatch.setattr(running, "_WORTHWHILE", 0)
    several = convert_checkpoint(tmp_path / "m.safetensors", to, output=tmp_path / "several.safetensors")
    assert (tmp_path / "alone.safetensors").read_bytes() == (tmp_path / "several.safetensors").read_bytes()
    assert alone.layers == several.layers


def test_what_is_written_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece at a time, of which the system may take less."""
    pwrite = os.pwrite
    sizes: list[int] = []
    monkeypatch.setattr(writing, "_PIECE", 64)

    def some(file: int, data: memoryview, at: int) -> int:
        sizes.append(len(data))
        return pwrite(file, data[:37], at)

    monkeypatch.setattr(os, "pwrite", some)
    save_file({"a.weight": torch.arange(600.0).reshape(20, 30)}, tmp_path / "m.safetensors")
    convert_checkpoint(tmp_path / "m.safetensors", "wn")
    assert max(sizes) == 64
    assert torch.equal(load_file(tmp_path / "m.wn.safetensors")["a.weight_v"].flatten(), torch.arange(600.0))


def test_a_bad_value_met_by_a_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(6, 4)
    weight[4, 1] = float("nan")
    save_file({"a.weight": torch.ones(6, 4), "b.weight": weight}, tmp_path / "m.safetensors")
    monkeypatch.setattr(running, "_WORTHWHILE", 0)
    with pytest.raises(NonFiniteError, match=r"m\.safetensors: 'b\.weight' holds NaN or Inf"):
        convert_checkpoint(tmp_path / "m.safetensors", "gmp")
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="nothing is flushed before the end")
def test_a_disk_that_fails_meanwhile_is_an_error_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of it once, and not in the last step."""
    failed = threading.Event()

    def fail_once(handle: int) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "Input/output error")

    save_file({"a.weight": torch.ones(6, 4), "b.weight": torch.ones(6, 4)}, tmp_path / "m.safetensors")
    monkeypatch.setattr(os, "fdatasync", fail_once)
    monkeypatch.setattr(running, "_FLUSH", 0.001)
    with pytest.raises(OutputError, match="Input/output error"):
        convert_checkpoint(tmp_path / "m.safetensors", "wn", progress=lambda *_: failed.wait(60) or None)
    assert failed.is_set()
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
