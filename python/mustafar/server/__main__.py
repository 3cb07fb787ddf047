"""``python -m mustafar.server``: see command.py."""

import sys

from . import named

try:
    from .command import main
except ModuleNotFoundError as error:
    if named(error) is error:
        raise
    sys.exit(f"mustafar: {named(error)}")

if __name__ == "__main__":
    sys.exit(main())
