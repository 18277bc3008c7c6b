"""``python -m reparam``, the same as the ``reparam`` command."""

import sys

from reparam.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
