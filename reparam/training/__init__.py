"""Fine-tuning a model in the parameterization it is held in."""

from __future__ import annotations

from reparam.training.data import Dataset, Split, load_dataset
from reparam.training.loop import FinetuneResult, Recipe, accuracy, finetune

__all__ = ["Dataset", "FinetuneResult", "Recipe", "Split", "accuracy", "finetune", "load_dataset"]
