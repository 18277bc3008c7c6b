"""Architectures of the literature in plain PyTorch, one a file; README.md lists them."""
