"""What an application of Ray Serve is made of."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..server.options import name_of, size
from ..server.settings import Settings
from ..types import KVConfig

# Ray's own. The first two send requests that begin alike to the same replica.
_ROUTERS = {
    "sticky": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    "prefix": "ray.serve.llm.request_router.PrefixCacheAffinityRouter",
    "load": None,
}
_GRACE_SECONDS = 30.0


class Options(BaseModel):
    """What to serve, and by how many processes.

    ``serve run`` takes fields of one value as ``field=value``; a configuration file of Ray Serve
    takes all of them, under ``args``.

    Attributes:
        model: Folder, there on every machine, or ORGANISATION/NAME of the Hugging Face hub; None:
            the demo model.
        replicas: Processes that each hold the model; Ray decides where they run, and replaces those
            that end.
        cpus: Cores that Ray sets aside for one of them; it starts only where they are free.
        threads: CPU threads of one of them; 0: as many as ``cpus``, and at least one.
        device, dtype, weights: As of :class:`mustafar.Model`. For ``"cuda"`` set a GPU aside:
            ``deployment={"ray_actor_options": {"num_gpus": 1}}``. Ray shows a process no
            other GPU, so that on machines of several, too, it is ``"cuda"``, the first.
        kv_budget: Bytes of KV caches of one process at most, also as ``"512M"``; 0: no limit.
        kv: The cache's setting: a preset's name, fields with or without ``preset``, or a
            :class:`mustafar.KVConfig`.
        engine: Further arguments of :class:`mustafar.Engine`, as ``max_batch``, of every replica.
        settings: Fields of :class:`mustafar.server.Settings`, or those. Keys, hosts and sizes are
            checked once for all replicas, limits of numbers (``max_streams``) by each for itself.
        router: How requests find a replica, by a router of Ray's: ``"sticky"``, its
            ConsistentHashRouter: those that begin alike get the same one, while it has room.
            ``"prefix"``, its PrefixCacheAffinityRouter: the one that has seen most of the prompt;
            needs ``ray[llm]``. ``"load"``: the less busy of two. Or fields of Ray's
            RequestRouterConfig.
        beginning: Characters of a text, from its first, that tell one beginning from another, and
            four times the token ids. Of a conversation all to the user's first message tells.
        gates: Processes that take requests in and hand them to replicas.
        deployment: Further options of Ray's ``serve.deployment`` for the replicas, as
            ``autoscaling_config`` (then ``replicas`` does not count) or ``health_check_period_s``.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str | None = None
    replicas: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)
    threads: int = Field(0, ge=0)
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "auto"
    kv_budget: int = Field(0, ge=0)
    kv: str | dict[str, Any] | KVConfig = "lossless"
    engine: dict[str, Any] = {}
    settings: dict[str, Any] | Settings = {}
    router: str | dict[str, Any] = "sticky"
    beginning: int = Field(256, ge=1)
    gates: int = Field(1, ge=1)
    deployment: dict[str, Any] = {}

    @field_validator("kv_budget", mode="before")
    @classmethod
    def _bytes(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        try:
            return size(given)
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None

    def cache(self) -> KVConfig:
        """The cache's setting; raises ValueError or TypeError as KVConfig does."""
        if isinstance(self.kv, KVConfig):
            return self.kv
        fields: dict[str, Any]
        fields = {"preset": self.kv} if isinstance(self.kv, str) else dict(self.kv)
        preset = fields.pop("preset", None)
        return KVConfig(**fields) if preset is None else KVConfig.preset(preset, **fields)

    def limits(self) -> Settings:
        """The server's settings; raises ValueError or TypeError as Settings does."""
        if isinstance(self.settings, Settings):
            given = self.settings
        else:
            # Lists, as files have them.
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in self.settings.items()
            }
            given = Settings(**fields)
        return given if given.model_names else replace(given, model_names=(name_of(self.model),))

    def router_config(self) -> Mapping[str, Any] | None:
        """Fields of Ray's RequestRouterConfig; None: Ray's default.

        Raises:
            ValueError: No such router.
            ImportError: ``"prefix"`` without ``ray[llm]``.
        """
        if not isinstance(self.router, str):
            return self.router
        if self.router not in _ROUTERS:
            known = ", ".join(map(repr, _ROUTERS))
            raise ValueError(f"router must be one of {known} or a dict, not {self.router!r}")
        path = _ROUTERS[self.router]
        if self.router == "prefix":
            try:
                importlib.import_module("ray.serve.llm.request_router")
            except ImportError as error:
                raise ImportError(
                    "router='prefix' is Ray's PrefixCacheAffinityRouter, which Ray lets in only "
                    f"with its own LLM engines: pip install 'ray[llm]' ({error})"
                ) from error
        return None if path is None else {"request_router_class": path}

    def replica_deployment(self) -> dict[str, Any]:
        """Options of Ray's deployment of the replicas."""
        options: dict[str, Any] = {
            # More go to the next replica, or wait in the gate.
            "max_ongoing_requests": self.engine.get("max_batch", 64),
            "max_queued_requests": self.engine.get("max_waiting", 1024),
            "graceful_shutdown_timeout_s": _GRACE_SECONDS,
            **self.deployment,
        }
        actor = {"num_cpus": self.cpus, **options.get("ray_actor_options", {})}
        options["ray_actor_options"] = actor
        if "autoscaling_config" not in options:
            options.setdefault("num_replicas", self.replicas)
        if (router := self.router_config()) is not None:
            options["request_router_config"] = router
        return options

    def gate_deployment(self) -> dict[str, Any]:
        """Options of Ray's deployment of the gates."""
        return {
            "num_replicas": self.gates,
            # A gate only passes on: its replicas' limits are those that hold.
            "max_ongoing_requests": 1_000_000,
            "graceful_shutdown_timeout_s": _GRACE_SECONDS,
            "ray_actor_options": {"num_cpus": 0},
        }
