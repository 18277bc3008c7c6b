"""Commands: each parses, makes one library call, and prints. Installed as ``reparam.cli``."""
