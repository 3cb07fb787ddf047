"""The server on several processes or machines, as an application of Ray Serve.

Needs the extra ``mustafar[ray]``; without it, importing this is an ImportError that says so::

    import mustafar.ray
    from ray import serve

    serve.run(mustafar.ray.build_app("path/to/a/folder", replicas=2))

Ray starts, places, watches and replaces the processes, and carries everything between them.
"""

from __future__ import annotations

try:
    import ray.serve  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"mustafar.ray needs the package {error.name}: pip install 'mustafar[ray]'",
        name=error.name,
    ) from None

from .app import app_builder, build_app
from .options import Options

__all__ = ["Options", "app_builder", "build_app"]
