"""The tables of ``reparam bench``, one function a benchmark."""

from __future__ import annotations

from typing import Any

from . import text


def show(value: dict[str, Any]) -> None:
    """Print what a benchmark gave, or all did."""
    if value["what"] != "all":
        _TABLES[value["what"]](value)
        return
    for what, one in value["benchmarks"].items():
        print(f"bench {what}\n")
        show(one)
        print()


def convert(value: dict[str, Any]) -> None:
    rows = [
        [r["name"], f"{r['ratio']:.2f}×", f"{r['durable_ratio']:.2f}×", f"{r['seconds']:.2f}", f"{r['peak_mb']:.0f}",
         f"{r['read_mb']:.0f}", f"{r['written_mb']:.0f}"]
        for r in value["results"]
    ]  # fmt: skip
    text.table(["job", "time", "time to + fsync", "seconds", "peak MB", "read MB", "written MB"], rows)
    settings = value["settings"]
    print(
        f"\n{settings['gigabytes']:.3g} GB of {settings['dtype']}, the map by {settings['backend']},"
        f" {text.count(settings['repeats'], 'repeat')}; {_machine(value)}, {text.count(value['machine']['torch_threads'], 'thread')}"
    )


def kernel(value: dict[str, Any]) -> None:
    rows = []
    for r in value["results"]:
        bar = r["bar"] or {}
        least = bar.get("bandwidth")
        rows.append(
            [
                text.shape(r["shape"]),
                r["name"],
                *(_ratio(r[key], bar.get(key)) for key in ("to_weight_norm", "to_naive", "to_copy")),
                f"{r['gigabytes_per_second']:.1f}",
                f"{r['bandwidth']:.0%}" + ("" if least is None else f" (bar {least:.0%})"),
                f"{r['seconds'] * 1e3:.3f}",
            ]
        )
    headings = ["shape", "job", "to weight norm", "to naive", "to copy", "GB/s", "of copy's", "ms"]
    text.table(headings, rows)
    settings = value["settings"]
    print(
        f"\n{settings['pass']} in {settings['dtype']} on {settings['device']}, the map by {settings['backend']},"
        f" {text.count(settings['repeats'], 'repeat')}; {_machine(value)}, {text.count(value['machine']['torch_threads'], 'thread')}"
    )


def step(value: dict[str, Any]) -> None:
    rows = [
        [
            r["model"],
            "compiled" if r["compiled"] else "eager",
            r["name"],
            _ratio(r["ratio"], r["bar"]),
            f"{r['seconds'] * 1e3:.1f}",
            "n/a" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}",
        ]
        for r in value["results"]
    ]
    text.table(["network", "run", "weights", "to SP", "ms", "peak MB"], rows)
    settings = value["settings"]
    images = ", ".join(f"{name} {side}×{side}" for name, side in settings["pixels"].items())
    print(
        f"\ntraining step, {settings['batch_size']} images ({images}) in {settings['dtype']} on {settings['device']}, "
        f"the map by {settings['backend']}, {text.count(settings['repeats'], 'repeat')}; {_machine(value)}, "
        f"{text.count(value['machine']['torch_threads'], 'thread')}"
    )


def data(value: dict[str, Any]) -> None:
    rows = [
        [r["name"], f"{r['ratio']:.2f}×", f"{r['seconds']:.2f}", f"{r['images_per_second']:.0f}"]
        for r in value["results"]
    ]
    text.table(["job", "time to the loop's", "seconds", "images a second"], rows)
    settings = value["settings"]
    print(
        f"\n{settings['images']} images of {text.shape(settings['shape'])} in batches of {settings['batch_size']}, "
        f"{text.count(settings['repeats'], 'repeat')}; {_machine(value)}"
    )


def export(value: dict[str, Any]) -> None:
    rows = [
        [
            s["name"],
            f"{s['seconds']:.2f}",
            f"{s['ratio']:.2f}×",
            f"{s['cpu_seconds']:.2f}",
            f"{s['cpu_ratio']:.2f}×",
        ]
        for s in value["stages"]
    ]
    text.table(["stage", "seconds", "to torch", "CPU seconds", "to torch"], rows)
    files = value["files"]
    print()
    rows = [
        [f["name"], f"{f['milliseconds']:.3f}", f"{f['ratio']:.2f}×", text.size(f["nbytes"])] for f in files
    ]
    text.table(["file", "ms", "to torch's", "size"], rows)
    print()
    operators = dict.fromkeys(name for file in files for name in file["operators"])
    rows = [[name, *(str(file["operators"].get(name, 0)) for file in files)] for name in operators]
    text.table(["operator", *(file["name"] for file in files)], rows)
    settings = value["settings"]
    print(
        f"\n{settings['model']} from {settings['to']}, {text.count(settings['repeats'], 'repeat')}, files {settings['turns']} times; "
        f"{_machine(value)}"
    )


_TABLES = {"convert": convert, "kernel": kernel, "step": step, "data": data, "export": export}


def _ratio(ratio: float, bar: float | None) -> str:
    """A ratio beside the bar it is held to."""
    return f"{ratio:.2f}×" + ("" if bar is None else f" (bar {bar:g}×)")


def _machine(value: dict[str, Any]) -> str:
    machine = value["machine"]
    processor = f"{machine['processor']}, {machine['cores']} cores"
    return f"{machine.get('gpu', processor)}, torch {machine['torch']}, {machine['date']}"
