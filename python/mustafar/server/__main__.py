"""``python -m mustafar.server``: see command.py."""

import sys

from . import named
from .options import parser


def main() -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args()  # --help needs no extra
    try:
        from . import command
    except ModuleNotFoundError as error:
        if named(error) is error:
            raise
        print(f"mustafar: {named(error)}", file=sys.stderr)
        return 1
    return command.run(options)


if __name__ == "__main__":
    sys.exit(main())
