"""A conversion that is killed leaves nothing under the final name, and the next one succeeds."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import done, gaussian, header_of, python, snapshot

from reparam import load_state_dict

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

COMMAND = [sys.executable, "-c", "import sys; from reparam.cli.main import main; sys.exit(main())"]
#: shares of the output's size at which the process is killed, and once on its way there
MOMENTS = sorted(random.Random(2).random() for _ in range(4))


def a_folder(folder: Path) -> dict[str, torch.Tensor]:
    """24 MB in three shards."""
    folder.mkdir()
    state = {f"layers.{i}.weight": gaussian(512, 1024, seed=i) for i in range(12)}
    for shard in range(3):
        part = {key: state[key] for i, key in enumerate(state) if i % 3 == shard}
        save_file(part, folder / f"model-{shard}.safetensors")
    names = ",".join(f'"{key}":"model-{i % 3}.safetensors"' for i, key in enumerate(state))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{names}}}}}')
    return state


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith(".partial")]


def written(folder: Path) -> int:
    """Bytes of what is being written."""
    total = 0
    with contextlib.suppress(FileNotFoundError):  # it moves on while it is looked at
        for top in temporaries(folder):
            files = top.rglob("*") if top.is_dir() else [top]
            total += sum(path.stat().st_size for path in files if path.is_file())
    return total


def killed_at(arguments: list[str], parent: Path, size: int) -> bool:
    """Start a conversion and kill it once it has written ``size`` bytes; whether it was still at work then."""
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if temporaries(parent) and written(parent) >= size:
                process.kill()
                break
            time.sleep(0.0005)
    return process.returncode == -signal.SIGKILL


def test_a_killed_run_leaves_nothing_and_the_next_succeeds(tmp_path: Path) -> None:
    state = a_folder(tmp_path / "model")
    before = snapshot(tmp_path / "model")
    expected = done("convert", tmp_path / "model", "--to", "gmp", "--dry-run", "--json").json["bytes_after"]
    arguments = ["convert", str(tmp_path / "model"), "--to", "gmp"]
    at_work = 0
    for moment in MOMENTS:
        killed = killed_at(arguments, tmp_path, int(moment * expected))
        at_work += killed
        if killed:
            assert not (tmp_path / "model-gmp").exists()
            assert len(temporaries(tmp_path)) == 1, "each run removes what the one before it left"
        assert snapshot(tmp_path / "model") == before
    assert at_work == len(MOMENTS), "the conversion is too fast to be killed at work"
    done("convert", tmp_path / "model", "--to", "gmp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-gmp"]
    done("convert", tmp_path / "model-gmp", "--to", "sp", "-o", tmp_path / "back")
    back = load_state_dict(tmp_path / "back")[0]
    assert all(torch.allclose(back[key], state[key], rtol=1e-5, atol=1e-6) for key in state)


# Kills itself at the first call of a function, in the last steps where a race would hardly hit.
SUICIDE = """
import os, pathlib, signal, sys
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
for name in sys.argv[1].split(","):
    owner, _, function = name.partition(".")
    setattr({"os": os, "Path": pathlib.Path}[owner], function, die)
from reparam.cli.main import main
main(sys.argv[2:])
"""
STEPS = {"fsync": "os.fsync", "rename": "os.replace,os.rename,Path.replace,Path.rename"}


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_the_last_steps(step: str, tmp_path: Path) -> None:
    save_file({"fc.weight": gaussian(40, 40)}, tmp_path / "model.safetensors")
    ran = python(SUICIDE, STEPS[step], "convert", tmp_path / "model.safetensors", "--to", "gmp")
    assert ran.returncode == -signal.SIGKILL
    assert not (tmp_path / "model.gmp.safetensors").exists()
    assert len(temporaries(tmp_path)) == 1
    done("convert", tmp_path / "model.safetensors", "--to", "gmp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gmp.safetensors", "model.safetensors"]


def test_killed_between_the_two_renames_of_a_replaced_folder(tmp_path: Path) -> None:
    """The old folder has stepped aside, the new one not yet come: neither may be lost for good."""
    (tmp_path / "model").mkdir()
    save_file({"fc.weight": gaussian(40, 40)}, tmp_path / "model" / "model.safetensors")
    done("convert", tmp_path / "model", "--to", "gmp")
    old = (tmp_path / "model-gmp" / "model.safetensors").read_bytes()
    dies_at_the_second = SUICIDE.replace(
        "from reparam", "import itertools; count, real = itertools.count(), os.rename\n"
        "def second(*a, **k): return die() if next(count) else real(*a, **k)\nos.rename = os.replace = second\n"
        "pathlib.Path.rename = pathlib.Path.replace = lambda self, target: second(self, target)\nfrom reparam",
    )  # fmt: skip
    ran = python(dies_at_the_second, "os.link", "convert", tmp_path / "model", "--to", "gmp", "--force")
    assert ran.returncode == -signal.SIGKILL
    kept = [path.read_bytes() for path in tmp_path.rglob("*.safetensors") if "model-gmp" in str(path)]
    assert old in kept
    done("convert", tmp_path / "model", "--to", "gmp", "--force")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model-gmp"], (
        "and nothing is left lying about"
    )


def test_temporaries_of_a_run_at_work_are_left_alone(tmp_path: Path) -> None:
    """Only what a dead process left is removed."""
    save_file({"fc.weight": gaussian(40, 40)}, tmp_path / "model.safetensors")
    ran = python(SUICIDE, "os.fsync", "convert", tmp_path / "model.safetensors", "--to", "gmp")
    assert ran.returncode == -signal.SIGKILL
    (left,) = temporaries(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as sleeper:
        dead = next(part for part in left.name.split(".") if part.isdigit())
        alive = left.with_name(left.name.replace(dead, str(sleeper.pid)))
        left.rename(alive)
        done("convert", tmp_path / "model.safetensors", "--to", "gmp")
        assert alive.exists()
        sleeper.communicate(b"\n")
    done("convert", tmp_path / "model.safetensors", "--to", "gmp", "--force")
    assert not temporaries(tmp_path)
    assert header_of(tmp_path / "model.gmp.safetensors")
