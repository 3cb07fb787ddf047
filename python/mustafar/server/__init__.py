"""An HTTP server that OpenAI's clients can talk to; ``mustafar serve`` in the shell.

Needs the extra ``mustafar[server]`` (Starlette and uvicorn)::

    with mustafar.Model(folder) as model, mustafar.Engine(model) as engine:
        uvicorn.run(create_app(engine, Settings(api_keys=("secret",))))
"""

from __future__ import annotations

from .settings import Settings

try:
    from .app import create_app
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "anyio"):
        raise
    raise ModuleNotFoundError(
        f"mustafar.server needs the package {error.name}: pip install 'mustafar[server]'",
        name=error.name,
    ) from None

__all__ = ["Settings", "create_app"]
