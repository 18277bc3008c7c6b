"""How to train: one validated set of options, the same on the command line, in YAML and in Python. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

Kind = Literal["theta", "r", "lambda_", "g", "v", "weight", "bias", "other"]
KINDS: tuple[str, ...] = get_args(Kind)

Rate = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]

#: the section a run folder's config.yaml has besides the recipe
NETWORK = "network"


class Recipe(BaseModel):
    """How to train. Every field has a default that works; ``load_recipe`` makes one and says in a line what is wrong."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: Literal["classify", "regress"] | None = Field(
        default=None, description="What is learned; the data says it without."
    )
    loss: Literal["cross_entropy", "mse", "mae", "huber"] | None = Field(
        default=None, description="Loss; cross_entropy for classes, mse for values without."
    )
    metric: Literal["accuracy", "top5", "rmse", "mae"] | None = Field(
        default=None,
        description="What the best checkpoint is best in; accuracy for classes, rmse for values without.",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of a label spread over all classes."
    )

    epochs: Count = Field(default=10, description="Passes over the training data.")
    steps: Count | None = Field(default=None, description="Optimizer steps, in place of epochs.")
    batch_size: Count = Field(default=128, description="Samples of one optimizer step, over all devices.")
    accumulate: Count = Field(
        default=1, description="Parts a batch is computed in one after the other, where memory is short."
    )

    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="sgd", description="Optimizer.")
    lr: Rate = Field(default=0.01, description="Learning rate of everything but angles.")
    angle_lr: Rate | None = Field(
        default=None,
        description="Learning rate of theta; without, a tenth of lr for sgd, since a step on an angle moves the weight "
        "by up to r² times what it moves a plain weight, and lr for adam and adamw, whose steps do not depend on that.",
    )
    lrs: dict[Kind, Rate] = Field(default={}, description="Learning rates by kind of parameter, kind=rate.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of sgd.")
    nesterov: bool = Field(default=False, description="Nesterov's momentum.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="Decay rates of the moments of adam and adamw."
    )
    weight_decay: Rate = Field(
        default=0.0, description="Weight decay; never of theta, r, lambda_, g and biases."
    )
    decay_all: bool = Field(default=False, description="Weight decay of those too.")
    train: tuple[Kind, ...] = Field(
        default=(), description="Train only these kinds of parameters; all without."
    )
    clip: float | None = Field(default=None, gt=0, description="Largest norm of the whole gradient.")

    schedule: Literal["constant", "cosine", "plateau"] = Field(
        default="constant",
        description="How learning rates change; plateau lowers them when the metric no longer improves.",
    )
    warmup: int = Field(default=0, ge=0, description="Steps over which the learning rates rise from zero.")
    min_lr: Rate = Field(default=0.0, description="Learning rate that cosine and plateau end at.")
    patience: Count = Field(
        default=50, description="Epochs without improvement after which plateau lowers the rates."
    )
    factor: float = Field(default=0.1, gt=0, lt=1, description="By which plateau multiplies them.")
    early_stop: Count | None = Field(
        default=None, description="Stop after this many epochs without improvement."
    )
    ema: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Evaluate and save an exponential moving average with this decay, 0.999 say.",
    )

    amp: Literal["bf16", "fp16"] | None = Field(
        default=None, description="Mixed precision; angles and radii keep float32."
    )
    compile: bool = Field(default=False, description="Compile the network with torch.compile.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to train; auto takes a GPU if there is one."
    )
    workers: int = Field(default=0, ge=0, description="Processes that read and augment the data.")
    dtype: Literal["float32", "float64"] = Field(
        default="float32", description="Precision of the network; float64 for proofs."
    )

    validation: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of the training data held out where the data has no split of its own.",
    )
    size: Count | None = Field(default=None, description="Pixels that images are resized to.")
    normalize: bool = Field(default=True, description="Standardize inputs.")
    mean: tuple[float, ...] | None = Field(
        default=None, description="Mean per channel, pixels in [0, 1]; measured without."
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        default=None, description="Standard deviation per channel; measured without."
    )
    flip: bool = Field(default=False, description="Mirror images at random, left and right.")
    crop: int = Field(
        default=0, ge=0, description="Pad images by this many pixels and crop them back at random."
    )
    resized_crop: bool = Field(default=False, description="Crop a random part of each image and resize it.")
    inputs: tuple[str, ...] = Field(
        default=(), description="Columns the network gets; all but the target without."
    )
    target: tuple[str, ...] = Field(
        default=(), description="Columns it learns; `label` or `target`, or the last, without."
    )

    scratch: bool = Field(default=False, description="Start from new values, not from the checkpoint's.")
    init: Literal["paper", "glorot", "data"] | None = Field(
        default=None,
        description="Those values: r = 1 and uniform directions, Glorot's, or by the data; the layers' own without.",
    )

    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Of the order of the data, augmentation and dropout."
    )
    save_every: Count | None = Field(
        default=None, description="Steps after which to save, besides after each epoch."
    )
    keep: int = Field(default=1, ge=0, description="Earlier checkpoints kept beside best and last.")

    @field_validator("*", mode="before")
    @classmethod
    def _written_short(cls, value: Any, info: ValidationInfo) -> Any:
        """``true`` is no number; one value, or "a,b", stands for a sequence, and "a=1,b=2" for a mapping."""
        assert info.field_name is not None
        kind = str(cls.__annotations__[info.field_name])
        if isinstance(value, bool) and kind != "bool":
            raise ValueError(f"must not be {str(value).lower()}")
        if kind.startswith("tuple["):
            if isinstance(value, str):
                return tuple(part.strip() for part in value.split(",") if part.strip())
            return (value,) if isinstance(value, (int, float)) else value
        if kind.startswith("dict[") and isinstance(value, str):
            return dict(part.strip().partition("=")[::2] for part in value.split(",") if part.strip())
        return value

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        for wrong, why in self._contradictions():
            if wrong:
                raise ValueError(why)
        return self

    def _contradictions(self) -> list[tuple[bool, str]]:
        sizes = {len(values) for values in (self.mean, self.std) if values is not None}
        return [
            (
                self.task is not None and self.loss is not None and self.task != TASK_OF_LOSS[self.loss],
                f"loss {self.loss} does not fit task {self.task}: {fitting(TASK_OF_LOSS, self.task)}",
            ),
            (
                self.task is not None
                and self.metric is not None
                and self.task != TASK_OF_METRIC[self.metric],
                f"metric {self.metric} does not fit task {self.task}: {fitting(TASK_OF_METRIC, self.task)}",
            ),
            (
                self.label_smoothing > 0
                and (self.task == "regress" or self.loss not in (None, "cross_entropy")),
                "label_smoothing needs loss cross_entropy",
            ),
            (self.accumulate > self.batch_size, "accumulate is larger than batch_size: a part has no sample"),
            (
                self.steps is not None and self.warmup >= self.steps,
                f"warmup {self.warmup} takes all steps ({self.steps}): lower it",
            ),
            (
                self.nesterov and (self.optimizer != "sgd" or not self.momentum),
                "nesterov needs optimizer sgd with momentum above 0",
            ),
            (
                self.angle_lr is not None and "theta" in self.lrs,
                "angle_lr and lrs both give the learning rate of theta: leave one out",
            ),
            (self.amp is not None and self.dtype == "float64", f"amp {self.amp} needs dtype float32"),
            (self.amp == "fp16" and self.device == "cpu", "amp fp16 needs a GPU: use amp bf16"),
            ((self.mean is None) != (self.std is None), "mean and std come together: give both or neither"),
            (
                len(sizes) > 1 or 0 in sizes,
                "mean and std must have one value per channel, as many of one as of the other",
            ),
            (bool(sizes) and not self.normalize, "mean and std are given, but normalize is false"),
            (
                self.init is not None and not self.scratch,
                "init needs scratch: a checkpoint's values are kept otherwise",
            ),
        ]

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.steps or self.epochs * steps_per_epoch


TASK_OF_LOSS: Mapping[str, str] = {
    "cross_entropy": "classify",
    "mse": "regress",
    "mae": "regress",
    "huber": "regress",
}
TASK_OF_METRIC: Mapping[str, str] = {
    "accuracy": "classify",
    "top5": "classify",
    "rmse": "regress",
    "mae": "regress",
}


def fitting(table: Mapping[str, str], task: str | None) -> str:
    """The names of a table that fit a task, for messages."""
    return "use " + " or ".join(name for name, of in table.items() if of == task)
