"""Outputs appear whole or not at all: nothing is overwritten unasked, nothing in place."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from support import convert, done, refused, working_in


def test_an_existing_file_is_not_overwritten_unasked(source: Path) -> None:
    out = source.with_name("model.gmp.safetensors")
    out.write_bytes(b"precious")
    refused(
        "convert",
        source,
        "--to",
        "gmp",
        naming=("model.gmp.safetensors", "--force", "-o"),
        leaving=source.parent,
    )
    done("convert", source, "--to", "gmp", "--force")
    assert set(load_file(out)) == {"fc.r", "fc.theta", "fc.lambda_"}
    assert sorted(p.name for p in source.parent.iterdir()) == ["model.gmp.safetensors", "model.safetensors"]


def test_an_existing_folder_is_not_overwritten_unasked(folder: Path) -> None:
    done("convert", folder, "--to", "gmp")
    refused("convert", folder, "--to", "gmp", naming=("model-gmp", "--force"), leaving=folder.parent)
    (folder.parent / "model-gmp" / "notes.txt").write_text("my own")
    naming = ("model-gmp", "notes.txt", "--force would remove")
    refused("convert", folder, "--to", "gmp", "--force", naming=naming, leaving=folder.parent)
    (folder.parent / "model-gmp" / "notes.txt").unlink()
    done("convert", folder, "--to", "gmp", "--force")
    assert sorted(p.name for p in (folder.parent / "model-gmp").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model", "model-gmp"]


def test_an_empty_folder_is_not_overwritten_unasked(folder: Path) -> None:
    (folder.parent / "out").mkdir()
    refused(
        "convert", folder, "--to", "gmp", "-o", folder.parent / "out", naming=("out",), leaving=folder.parent
    )
    done("convert", folder, "--to", "gmp", "-o", folder.parent / "out", "--force")


def test_force_does_not_replace_a_folder_that_holds_no_checkpoint(folder: Path, source: Path) -> None:
    home = folder.parent / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    for arguments in ((folder, "-o", home), (source, "-o", home)):
        refused("convert", *arguments, "--to", "gmp", "--force", naming=("home",), leaving=folder.parent)
    (home / "thesis.tex").rename(folder.parent / "model.gmp.safetensors")
    (home / "x").mkdir()
    home.rename(folder.parent / "model.wn.safetensors")
    refused(
        "convert", source, "--to", "wn", "--force", naming=("model.wn.safetensors",), leaving=folder.parent
    )


def test_links_are_not_followed_into_what_they_name(source: Path) -> None:
    out, precious = source.with_name("out.safetensors"), source.with_name("precious")
    precious.write_bytes(b"precious")
    out.symlink_to(precious)
    refused("convert", source, "--to", "gmp", "-o", out, naming=("out.safetensors",), leaving=source.parent)
    done("convert", source, "--to", "gmp", "-o", out, "--force")
    assert precious.read_bytes() == b"precious"
    assert not out.is_symlink()
    dangling = source.with_name("dangling.safetensors")
    dangling.symlink_to(source.with_name("nowhere"))
    refused("convert", source, "--to", "gmp", "-o", dangling, naming=("dangling.safetensors",))


def test_never_in_place(source: Path, folder: Path) -> None:
    link = source.with_name("link.safetensors")
    link.symlink_to(source)
    gmp = source.with_name("gmp.safetensors")
    convert(source, "gmp", gmp)
    for options in ([], ["--force"], ["--force", "--dry-run"]):
        refused(
            "convert",
            source,
            "--to",
            "gmp",
            "-o",
            source,
            *options,
            naming=("in place",),
            leaving=source.parent,
        )
        refused(
            "convert",
            source,
            "--to",
            "gmp",
            "-o",
            link,
            *options,
            naming=("in place",),
            leaving=source.parent,
        )
        refused(
            "convert",
            link,
            "--to",
            "gmp",
            "-o",
            source,
            *options,
            naming=("in place",),
            leaving=source.parent,
        )
        refused(
            "convert", gmp, "--to", "sp", "-o", gmp, *options, naming=("in place",), leaving=source.parent
        )
        for place in (folder, folder.parent, folder / "..", folder / "." / "..", Path("/")):
            refused("convert", folder, "--to", "gmp", "-o", place, *options, leaving=folder.parent)
    with working_in(folder):
        refused(
            "convert", ".", "--to", "gmp", "-o", ".", "--force", naming=("in place",), leaving=folder.parent
        )
        refused(
            "convert", ".", "--to", "gmp", "-o", "..", "--force", naming=("in place",), leaving=folder.parent
        )


def test_names_of_the_wrong_kind(source: Path, folder: Path) -> None:
    wrong = {
        (source, "out.pt"): "out.safetensors",
        (source, "out"): "out.safetensors",
        (source, "."): "-o",
        (source, "gone/out.safetensors"): "no such folder",
        (source, "model.safetensors/out.safetensors"): "no such folder",
        (source, "x" * 300 + ".safetensors"): "",
        (source, ""): "-o",
        (folder, "out.safetensors"): "folder",
        (folder, "gone/out"): "no such folder",
    }
    with working_in(source.parent):
        for (path, name), names in wrong.items():
            refused("convert", path, "--to", "gmp", "-o", name, naming=(names,), leaving=source.parent)


def test_an_output_within_its_input(folder: Path) -> None:
    """Does not copy itself into itself."""
    done("convert", folder, "--to", "gmp", "-o", folder / "gmp")
    assert sorted(p.name for p in (folder / "gmp").iterdir()) == ["config.json", "model.safetensors"]
