"""``mustafar bench-serve``: what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from collections.abc import Sequence

from .options import read

_EXIT_ERROR, _EXIT_USAGE, _EXIT_INTERRUPT = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = read(sys.argv[1:] if arguments is None else arguments)
    try:
        from .http import HttpError
    except ModuleNotFoundError as error:
        if error.name != "h11":
            raise
        print("mustafar: bench-serve needs h11: pip install 'mustafar[server]'", file=sys.stderr)
        return _EXIT_ERROR
    from .process import StartError
    from .report import table
    from .run import measure

    try:
        _allow_connections()
        report = asyncio.run(measure(options))
    except KeyboardInterrupt:
        return _EXIT_INTERRUPT
    except ValueError as error:
        print(f"mustafar: {error}", file=sys.stderr)
        return _EXIT_USAGE
    except (OSError, HttpError, StartError) as error:
        print(f"mustafar: {error}", file=sys.stderr)
        return _EXIT_ERROR
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 0 if report["requests"]["ok"] else _EXIT_ERROR


def _allow_connections() -> None:
    """As many files as the system lets a process have: every request has a connection."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
