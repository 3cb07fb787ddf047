"""An HTTP server that OpenAI's clients can talk to; ``mustafar serve`` in the shell.

Needs the extra ``mustafar[server]`` (Starlette and uvicorn)::

    with mustafar.Model(folder) as model, mustafar.Engine(model) as engine:
        uvicorn.run(create_app(engine, Settings(api_keys=("secret",))))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .settings import Settings

if TYPE_CHECKING:
    from .app import create_app

__all__ = ["Settings", "create_app"]

_EXTRA = ("starlette", "uvicorn", "anyio")


def __getattr__(name: str) -> Any:
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .app import create_app
    except ModuleNotFoundError as error:
        raise named(error) from None
    return create_app


def named(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error, with the extra that holds the package where it does."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRA:
        return error
    message = f"the server needs the package {package}: pip install 'mustafar[server]'"
    return ModuleNotFoundError(message, name=error.name)
