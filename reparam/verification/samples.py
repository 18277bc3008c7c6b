"""The inputs a file is judged on: seeded, pooled by loudness.

noise of deviation 0.1, 1, 10   with leading axes of 1, 2, 3 and other dynamic axes of 32, 64, 96, in turn
spare ones of the same          with leading axes of 7, 8, 9: run where the first give too few values to judge by
the same at deviation 0.1       of the first that the original overflows on, so that all sizes are compared
integers                        below the size of the table they are looked up in
masks: those nothing looks up   ones, then zeros: sequences of several lengths
real data                       where given, as it is
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from reparam.errors import DataError
from reparam.graph.inputs import FEWEST, InputSpec
from reparam.verification.exact import Float64, Run, in_float64, run

NOISE = (0.1, 1.0, 10.0)
_FIRST, _OTHER, _SPARE = (1, 2, 3), (32, 64, 96), 6
#: real inputs that are computed at a time
_BATCH = 128


@dataclass(frozen=True)
class Sample:
    """Inputs of one run.

    Attributes:
        group: inputs of one group are judged together: "scale 0.1", "data".
        inputs: one tensor an input.
        sizes: the extents of the dynamic axes.
        scale: the deviation of its noise; None where it has none.
        spare: needed only where the others give too few values to judge by.
        exact: what the original gives in float64, where it was run to see whether it takes such inputs.
    """

    group: str
    inputs: tuple[Tensor, ...]
    sizes: Mapping[str, int]
    scale: float | None = None
    spare: bool = False
    exact: Run | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"input {' '.join(str(list(x.shape)) for x in self.inputs)} at {self.group}"

    def run_exactly(self, original: nn.Module) -> Run:
        """What ``original`` gives in float64."""
        return run(original, self.inputs, Float64()) if self.exact is None else self.exact

    def cast(self, kinds: Sequence[torch.dtype | None]) -> Sample:
        """With floating inputs of these types, one an input; itself where it has them. None: as it is."""
        inputs = tuple(
            x.to(kind) if kind is not None and x.is_floating_point() else x
            for x, kind in zip(self.inputs, kinds, strict=True)
        )
        same = all(a is b for a, b in zip(inputs, self.inputs, strict=True))
        return self if same else replace(self, inputs=inputs, exact=None)

    def quietest(self) -> Sample | None:
        """The same noise at the least deviation; None where it has that, has none, or is spare."""
        if self.scale is None or self.scale <= NOISE[0] or self.spare:
            return None
        factor = NOISE[0] / self.scale
        inputs = tuple(x * factor if x.is_floating_point() else x for x in self.inputs)
        return Sample(f"scale {NOISE[0]:g}", inputs, self.sizes, NOISE[0])

    def tried(self, original: nn.Module) -> Sample | str:
        """With what ``original`` gives in float64; or that it does not take such inputs."""
        try:
            return replace(self, exact=self.run_exactly(original))
        except Exception as error:  # whatever a forward pass raises
            lines = str(error).strip().splitlines()
            why = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        told = ", ".join(f"{axis}={extent}" for axis, extent in self.sizes.items()) or "such inputs"
        return f"the original does not take {told}: left out ({why})"


def samples(
    model: nn.Module,
    specs: Sequence[InputSpec],
    seed: int,
    data: Sequence[tuple[Tensor, ...]] = (),
    spare: bool = False,
) -> Iterator[Sample | str]:
    """The set of inputs; and, a line each, the sizes that ``model`` refuses.

    Args:
        model: the original, in evaluation mode.
        specs: its inputs.
        seed: of the noise.
        data: real inputs.
        spare: whether spare ones are among them.
    """
    generator = torch.Generator().manual_seed(seed)
    model = in_float64(model)  # takes inputs of any type
    highs = [None if spec.is_float else _rows(model, specs, i) for i, spec in enumerate(specs)]
    noisy = any(spec.is_float for spec in specs)
    loudness = NOISE if noisy else NOISE[1:2]

    def draw(scale: float, sizes: Mapping[str, int], spare: bool = False) -> Sample:
        inputs = tuple(
            _mask(spec, generator, sizes)
            if high is None and spec.dtype in ("int64", "int32") and len(spec.axes) > 1
            else spec.sample(generator, sizes, scale, high)
            for spec, high in zip(specs, highs, strict=True)
        )
        return Sample(f"scale {scale:g}", inputs, sizes, scale if noisy else None, spare)

    accepted: list[Mapping[str, int]] = []
    for choices in _sizes(specs):
        for sizes in choices:
            tried = draw(loudness[len(accepted) % len(loudness)], sizes).tried(model)
            yield tried
            if isinstance(tried, Sample):
                accepted.append(sizes)
                break
    for i in range(len(accepted), len(loudness) if accepted else 0):
        yield draw(loudness[i], accepted[i % len(accepted)]).tried(model)
    for i, scale in enumerate(loudness if accepted and spare else ()):
        known, leading = accepted[(i + 1) % len(accepted)], _leading(specs)
        larger = {axis: extent + _SPARE if axis in leading else extent for axis, extent in known.items()}
        yield draw(scale, larger, spare=True)
    for inputs in data:
        given = [
            pair
            for spec, x in zip(specs, inputs, strict=True)
            for pair in zip(spec.axes, x.shape, strict=True)
        ]
        yield Sample("data", inputs, {axis: extent for axis, extent in given if isinstance(axis, str)})


def _sizes(specs: Sequence[InputSpec]) -> Iterator[list[dict[str, int]]]:
    """Choices of extents for the dynamic axes, of which the first that the model takes does: at best all different."""
    leading = _leading(specs)
    dynamic = list(dict.fromkeys(axis for spec in specs for axis in spec.dynamic))
    others = [axis for axis in dynamic if axis not in leading]
    for k, first in enumerate(_FIRST if dynamic else _FIRST[:1]):
        batch = {axis: first for axis in dynamic if axis in leading}
        apart = {axis: _OTHER[(k + i) % 3] for i, axis in enumerate(others)}
        alike = dict.fromkeys(others, _OTHER[k])
        short = dict.fromkeys(others, k + 3)
        distinct = dict.fromkeys(tuple((batch | rest).items()) for rest in (apart, alike, short))
        yield [dict(sizes) for sizes in distinct]


def _leading(specs: Sequence[InputSpec]) -> set[int | str]:
    return {spec.axes[0] for spec in specs if spec.axes}


def _mask(spec: InputSpec, generator: torch.Generator, sizes: Mapping[str, int]) -> Tensor:
    """Ones, then zeros, along the last axis, as sequences of several lengths are padded.

    No coins: an attention of which a mask leaves nothing is a matter of taste, to which runtimes differ.
    """
    shape = spec.shape(sizes)
    lengths = torch.randint(1, shape[-1] + 1, shape[:-1], generator=generator)
    return (torch.arange(shape[-1]) < lengths.unsqueeze(-1)).to(spec.torch_dtype)


def _rows(model: nn.Module, specs: Sequence[InputSpec], index: int) -> int | None:
    """Below what the integers of an input must stay: seen by which lookups follow it from all 0 to all 1.

    None if no lookup does.
    """
    sizes = {axis: 3 for spec in specs for axis in spec.dynamic}
    found = []
    for value in (0, 1):
        generator = torch.Generator().manual_seed(0)
        inputs = [spec.sample(generator, sizes) for spec in specs]
        inputs[index] = torch.full_like(inputs[index], value)
        try:
            found.append(run(model, inputs, Float64()).recorder.lookups)
        except Exception:  # as above; sizes it does not take are reported elsewhere
            return FEWEST
    highs = [
        rows - max(0, int(zeros.max()))  # an offset added to the ids before
        for (_, rows, zeros), (_, _, ones) in zip(*found, strict=False)
        if zeros.shape == ones.shape and zeros.numel() and _looked_up(zeros, ones)
    ]
    return max(FEWEST, min(highs)) if highs else None


def _looked_up(zeros: Tensor, ones: Tensor) -> bool:
    """Whether indices follow an input by ones; those of positions that a mask counts go up by more."""
    apart = ones - zeros
    return bool((apart == 1).any()) and bool(((apart == 0) | (apart == 1)).all())


def load_data(path: Path, specs: Sequence[InputSpec]) -> list[tuple[Tensor, ...]]:
    """Real inputs from a file of tensors: safetensors, a PyTorch file, npz or npy; in batches, where batches are dynamic.

    Args:
        path: its tensors have the names of the inputs; a single one may have any.
        specs: the inputs; shapes and kinds of type must fit them.

    Raises:
        DataError: a tensor is missing, or of another shape or type, or holds NaN or Inf.
    """
    tensors = _read(path)
    if len(specs) == len(tensors) == 1:
        tensors = {specs[0].name: next(iter(tensors.values()))}
    inputs = []
    for spec in specs:
        if spec.name not in tensors:
            raise DataError(f"{path}: holds {', '.join(tensors) or 'nothing'}, but no input `{spec.name}`")
        value = tensors[spec.name]
        fits = value.dim() == len(spec.axes) and all(
            isinstance(axis, str) or axis == extent
            for axis, extent in zip(spec.axes, value.shape, strict=True)
        )
        if not fits or value.is_floating_point() != spec.is_float:
            raise DataError(
                f"{path}: `{spec.name}` is {value.dtype} {list(value.shape)}, --input says {spec.dtype} "
                f"{','.join(map(str, spec.axes))}"
            )
        if spec.is_float and not bool(torch.isfinite(value).all()):
            raise DataError(f"{path}: `{spec.name}` holds NaN or Inf")
        inputs.append(value.to(spec.torch_dtype))
    leading = {spec.axes[0] if spec.axes else 0 for spec in specs}
    if len(leading) > 1 or not isinstance(leading.pop(), str):
        return [tuple(inputs)]
    return list(zip(*(torch.split(value, _BATCH) for value in inputs), strict=True))


def _read(path: Path) -> dict[str, Tensor]:
    import numpy as np

    from reparam.checkpoint import load_state_dict

    if path.suffix not in (".npz", ".npy"):
        return load_state_dict(path)[0]
    try:
        loaded = np.load(path, allow_pickle=False)
        found = {path.stem: loaded} if path.suffix == ".npy" else dict(loaded)
        return {name: torch.from_numpy(np.array(value)) for name, value in found.items()}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
