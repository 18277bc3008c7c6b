"""The demo: a trained network, real images, and the whole chain on them."""

from __future__ import annotations

from reparam.demo.run import run_demo

__all__ = ["run_demo"]
