"""The application: gates before replicas."""

# Annotations are not made texts of here: Ray looks at app_builder's.

import os
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve import Application

from .gate import Gate
from .options import Options
from .replica import Replica


def build_app(model: str | os.PathLike[str] | None = None, **options: Any) -> Application:
    """An application for Ray's ``serve.run``: OpenAI's API, answered by several processes.

    Args:
        model: Folder, there on every machine, or ORGANISATION/NAME of the Hugging Face hub; None:
            the demo model.
        options: The other fields of :class:`Options`.

    Raises:
        ValueError: A field that there is not, or a value out of range.
        TypeError: A value of the wrong kind.
        ImportError: ``router="prefix"`` without ``ray[llm]``.
    """
    return app_builder(Options(model=None if model is None else os.fspath(model), **options))


def app_builder(args: Options) -> Application:
    """The same for ``serve run mustafar.ray:app_builder FIELD=VALUE ...`` and Ray's config files.

    ``MUSTAFAR_API_KEY``, where it is set, is a further key.
    """
    args.cache()  # what is wrong with it is said here, not by every process
    settings = args.limits()
    if key := os.environ.get("MUSTAFAR_API_KEY"):
        settings = replace(settings, api_keys=(*settings.api_keys, key))
    replicas = serve.deployment(name="Replica", **args.replica_deployment())(Replica)
    gates = serve.deployment(name="Gate", **args.gate_deployment())(Gate)
    app: Application = gates.bind(replicas.bind(args), settings, args.beginning)
    return app
