"""Datasets for training: one input format a file, all of them read by ``load_data``."""

from __future__ import annotations

from reparam.training.data.augment import Augment
from reparam.training.data.loader import Batches
from reparam.training.data.loading import load_data
from reparam.training.data.types import Data, Samples

__all__ = ["Augment", "Batches", "Data", "Samples", "load_data"]
