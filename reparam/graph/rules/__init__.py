"""Rewriting rules, one to a file: each opens with its algebra and refuses with a reason."""
