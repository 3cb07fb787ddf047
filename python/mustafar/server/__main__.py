"""``python -m mustafar.server``: see command.py."""

import sys

try:
    from .command import main
except ModuleNotFoundError as error:
    if "mustafar[server]" not in str(error):
        raise
    sys.exit(f"mustafar: {error}")

if __name__ == "__main__":
    sys.exit(main())
