"""The server as an application of Ray Serve, on two replicas of the demo model."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

pytest.importorskip("ray.serve")
httpx2 = pytest.importorskip("httpx2")
openai = pytest.importorskip("openai")

import ray
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

import mustafar
import mustafar.ray
from mustafar.ray import Options
from mustafar.ray.call import Call, begins
from mustafar.ray.gate import Relay, merged
from mustafar.ray.replica import REPLICA_HEADER, Replica
from mustafar.server import Settings
from support.paths import DEMO
from support.server import wait_for

KEY = "secret"
HEADERS = {"Authorization": f"Bearer {KEY}"}
MESSAGES = [{"role": "user", "content": "What does textwrap.dedent do?"}]
LONG = {"max_tokens": 600, "n": 8, "seed": 1, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[int]:
    """Ray on this machine, by itself; the port of its proxy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # More cores than there may be: replicas are set aside some, and hardly compute.
        ray.init(
            num_cpus=8, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield port
            serve.shutdown()
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def url(cluster: int) -> str:
    app = mustafar.ray.build_app(
        DEMO,
        replicas=2,
        dtype="f32",
        settings={"api_keys": [KEY], "model_names": ["demo"]},
        deployment={"health_check_period_s": 1},
    )
    serve.run(app, name="two", route_prefix="/two")
    return f"http://127.0.0.1:{cluster}/two"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0) as made:
        yield made


def replica_of(url: str, body: dict[str, Any], **headers: str) -> str:
    """Which replica answers a request."""
    route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = httpx2.post(
        url + route, json={"max_tokens": 1, **body}, headers={**HEADERS, **headers}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    return str(answer.headers[REPLICA_HEADER])


def one_for_each(url: str) -> dict[str, str]:
    """A beginning of a prompt for each replica, by the replica's name."""
    found: dict[str, str] = {}
    for number in range(100):
        prompt = f"{number} sheep"
        found.setdefault(replica_of(url, {"prompt": prompt}), prompt)
        if len(found) == 2:
            return found
    raise AssertionError(f"only {found} answer")


def test_a_reply_is_that_of_the_library(url: str, client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    with mustafar.Model(DEMO, dtype="f32", threads=1) as model:
        own = model.chat_completion(**body)
    assert isinstance(own, dict)
    text = own["choices"][0]["message"]["content"]
    whole = client.chat.completions.create(model="demo", **body)
    assert whole.choices[0].message.content == text
    chunks = list(client.chat.completions.create(model="demo", stream=True, **body))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert len(chunks) > 5
    assert [model.id for model in client.models.list()] == ["demo"]


def test_what_the_server_checks_is_checked(url: str) -> None:
    def code(answer: Any) -> str:
        return f"{answer.status_code} {answer.json()['error']['code']}"

    route, body = url + "/v1/completions", {"prompt": "a", "max_tokens": 1}
    assert code(httpx2.post(route, json=body)) == "401 invalid_api_key"
    assert code(httpx2.post(route, content=b"x", headers=HEADERS)) == "415 unsupported_media_type"
    assert code(httpx2.post(route, json={"prompt": 5}, headers=HEADERS)) == "400 invalid_type"
    big = {"prompt": "a" * (5 << 20)}
    assert code(httpx2.post(route, json=big, headers=HEADERS)) == "413 body_too_large"
    assert code(httpx2.get(url + "/v1/nothing", headers=HEADERS)) == "404 unknown_url"
    assert code(httpx2.get(route, headers=HEADERS)) == "405 method_not_allowed"
    assert httpx2.get(url + "/health").json() == {"status": "ok"}  # needs no key
    assert "page.js" in httpx2.get(url + "/").text
    answer = httpx2.post(route, json=body, headers={**HEADERS, "x-request-id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_requests_that_begin_alike_go_to_one_replica(url: str) -> None:
    used = set()
    for number in range(24):
        shared = f"{number} " + "is a number, and what is more, " * 10
        here = {replica_of(url, {"prompt": shared + end}) for end in ("one", "two", "three")}
        assert len(here) == 1
        used |= here
    assert len(used) == 2

    conversation = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    first = replica_of(url, {"messages": conversation})
    for word in ("why", "how"):
        conversation += [
            {"role": "assistant", "content": "It does."},
            {"role": "user", "content": word},
        ]
        assert replica_of(url, {"messages": conversation}) == first
    named = {replica_of(url, {"prompt": text}, **{"x-session-id": "s"}) for text in "abcdefgh"}
    assert len(named) == 1


def number(url: str, name: str, replica: str = "") -> float:
    """A number of the metrics, of one replica or their sum."""
    page = httpx2.get(url + "/metrics", headers=HEADERS).text
    return sum(
        float(line.rpartition(" ")[2])
        for line in page.splitlines()
        if line.startswith(name + "{") and replica in line
    )


def test_metrics_are_those_of_all_replicas(url: str) -> None:
    names = set(one_for_each(url))
    assert httpx2.get(url + "/metrics").status_code == 401
    page = httpx2.get(url + "/metrics", headers=HEADERS).text
    running = [line for line in page.splitlines() if line.startswith("mustafar_requests_running{")]
    assert {line.split('"')[1] for line in running} == names
    assert page.count("# TYPE mustafar_requests_running gauge") == 1


def test_a_client_that_is_gone_ends_its_request(url: str) -> None:
    before = number(url, "mustafar_requests_cancelled_total")
    body = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True, "n": 8}
    with httpx2.stream("POST", url + "/v1/completions", json=body, headers=HEADERS) as reply:
        next(reply.iter_lines())
    wait_for(lambda: number(url, "mustafar_requests_cancelled_total") > before)
    wait_for(lambda: number(url, "mustafar_requests_running") == 0)


def kill(replica: str) -> None:
    """Ends a replica's process, as the kernel does where memory is short."""
    name = next(
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].endswith(replica)
    )
    actor = ray.get_actor(name, namespace="serve")
    os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)


def test_a_killed_replica_is_replaced_and_its_requests_are_told(
    url: str, client: openai.OpenAI
) -> None:
    prompts = one_for_each(url)
    killed, other = prompts
    went_on: list[Any] = []
    failed: dict[str, BaseException] = {}

    def stream(replica: str) -> Any:
        return client.completions.create(model="demo", prompt=prompts[replica], stream=True, **LONG)

    def whole() -> None:
        try:
            client.completions.create(model="demo", prompt=prompts[killed], **LONG)
        except openai.APIError as error:
            failed["whole"] = error

    streams = {replica: stream(replica) for replica in prompts}
    for each in streams.values():
        next(each)
    threads = [
        threading.Thread(target=whole),
        threading.Thread(target=lambda: went_on.extend(streams[other])),
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: number(url, "mustafar_requests_running", killed) == 2 * LONG["n"])
    kill(killed)
    with pytest.raises(openai.APIError, match="has ended; send the request again") as told:
        list(streams[killed])
    assert told.value.code == "replica_lost"
    for thread in threads:
        thread.join()
    lost = failed["whole"]
    assert isinstance(lost, openai.InternalServerError) and lost.status_code == 503
    assert lost.code == "replica_lost" and lost.type == "server_error"
    assert lost.response.headers["retry-after"] == "1"
    # The other one's stream is whole: as many choices came to their end as there are.
    ends = [choice.finish_reason for chunk in went_on for choice in chunk.choices]
    assert ends.count("length") == LONG["n"]

    assert replica_of(url, {"prompt": prompts[killed]})  # at once, by the other or the new one
    wait_for(lambda: killed not in one_for_each(url))
    names = set(one_for_each(url))
    assert other in names and len(names) == 2


# Without Ray's processes


def test_health_is_a_token_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    context = types.SimpleNamespace(replica_tag="one")
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    replica = Replica(Options(model=str(DEMO)))
    engine = replica._engine

    async def look() -> int:
        await replica.check_health()
        return engine.stats().finished

    assert asyncio.run(look()) == 1
    engine.submit("a", max_new_tokens=1).result()
    assert asyncio.run(look()) == 2  # that one says enough
    engine.close()
    with pytest.raises(mustafar.StateError, match="closed"):
        asyncio.run(look())
    replica.__del__()
    with pytest.raises(mustafar.Error):
        mustafar.Session(replica._model)


class Handle:
    """Replicas whose every answer is some messages, and then an error."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, *_: Any, **__: Any) -> Handle:
        return self

    def cancel(self) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item


def relayed(*items: Any) -> list[Any]:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [],
        "mustafar.request_id": "x",
    }
    asyncio.run(Relay(Handle(*items), Settings(retry_after=7), 256)(scope, receive, send))  # type: ignore[arg-type]
    return sent


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ActorDiedError(), 503, "replica_lost"),
        (BackPressureError(5, 5), 429, "queue_full"),
        (DeploymentUnavailableError("Replica"), 503, "no_replica"),
        (RuntimeError("about a prompt"), 500, "internal_error"),
    ],
)
def test_failures_between_the_processes(error: Exception, status: int, code: str) -> None:
    with pytest.raises(Exception) as told:
        relayed(error)
    known: Any = told.value
    assert (known.status, known.code) == (status, code)
    assert "about a prompt" not in str(known)
    assert known.headers.get("Retry-After") == (None if status == 500 else "7")

    start = {"type": "http.response.start", "status": 200}
    piece = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
    stream = {**start, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
    *before, last = relayed(stream, piece, error)
    assert before == [stream, piece] and last["more_body"] is False
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == code
    with pytest.raises(type(error)):  # the connection breaks
        relayed({**start, "headers": []}, piece, error)


def test_how_a_request_begins() -> None:
    def of(**body: Any) -> Any:
        return begins(json.dumps(body).encode(), 8)

    assert (
        of(prompt="12345678 and").key == of(prompt="12345678 or").key != of(prompt="1234567x").key
    )
    assert of(prompt="12345678 and").prompt == "12345678 and"
    assert of(prompt=["abc", "d"]) == of(prompt="abc")
    assert of(prompt=[1, 2, 3]).key == of(prompt=[[1, 2, 4]]).key != of(prompt=[1, 3, 3]).key
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    say = {"role": "user", "content": "ab"}
    assert of(messages=[{"role": "user", "content": parts}]) == of(messages=[say])
    assert of(messages=[say, say]).key == of(messages=[say]).key
    assert of(messages=[say, say]).prompt == "ab\nab"
    assert of(prompt="\ud800").key
    nothing = [
        of(),
        of(prompt=""),
        of(prompt=5),
        of(messages=[]),
        of(messages=[5]),
        of(prompt=[None]),
    ]
    nothing += [begins(body, 8) for body in (b"", b"{", b"[]", b"[" * 100_000, b"\xff")]
    assert all(each.key == "" or each.prompt for each in nothing)
    call = Call("id", "POST", "/", b"", b"{}", b"").with_prompt("long")
    assert pickle.loads(pickle.dumps(call)).prompt == "" and call.prompt == "long"


def test_pages_of_metrics_become_one() -> None:
    page = '# HELP a A.\n# TYPE a counter\na 1\na{x="} y"} 2\n# HELP b B.\n# TYPE b gauge\n'
    assert merged({"r": page, "q": page + "b 3\n"}) == (
        "# HELP a A.\n# TYPE a counter\n"
        'a{replica="q"} 1\na{x="} y",replica="q"} 2\n'
        'a{replica="r"} 1\na{x="} y",replica="r"} 2\n'
        '# HELP b B.\n# TYPE b gauge\nb{replica="q"} 3\n'
    )


def test_options() -> None:
    # As a shell has them.
    told = Options.model_validate(
        {"model": "m", "replicas": "2", "kv_budget": "1.5K", "kv": "balanced"}
    )
    assert (
        told.replicas == 2
        and told.kv_budget == 1536
        and told.cache() == mustafar.KVConfig.preset("balanced")
    )
    assert told.limits().model_names == ("m",)
    fields = Options(kv={"preset": "mustafar", "window": 64}, settings={"api_keys": ["a"]})
    assert fields.cache() == mustafar.KVConfig.preset("mustafar", window=64)
    assert fields.limits().api_keys == ("a",)
    own = Options(kv=mustafar.KVConfig(), settings=Settings(timeout=1), engine={"max_batch": 3})
    assert own.cache() == mustafar.KVConfig() and own.limits().timeout == 1
    assert own.replica_deployment()["max_ongoing_requests"] == 3
    scaled = Options(cpus=2, deployment={"autoscaling_config": {"max_replicas": 3}})
    ray_options = scaled.replica_deployment()
    assert "num_replicas" not in ray_options
    assert ray_options["ray_actor_options"] == {"num_cpus": 2}
    mustafar.ray.build_app(deployment={"autoscaling_config": {"max_replicas": 3}}, gates=2)
    for wrong in (
        {"replica": 2},
        {"replicas": 0},
        {"kv_budget": "x"},
        {"router": "x"},
        {"settings": {"x": 1}},
    ):
        with pytest.raises(
            (ValueError, TypeError), match="replica|budget|router|unexpected keyword"
        ):
            mustafar.ray.build_app(**wrong)
    with pytest.raises(ValueError, match="lossless"):
        mustafar.ray.build_app(kv="tiny")


def test_ray_reads_the_fields_of_its_command_and_files() -> None:
    builder = inspect.signature(mustafar.ray.app_builder).parameters["args"]
    assert builder.annotation is Options  # a text would leave Ray with a dict


def test_the_router_that_is_not_there_is_named() -> None:
    if importlib.util.find_spec("vllm") or importlib.util.find_spec("sglang"):
        pytest.skip("it is there")
    with pytest.raises(ImportError, match=r"ray\[llm\]"):
        mustafar.ray.build_app(router="prefix")


def test_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSTAFAR_API_KEY", "b")
    app = mustafar.ray.build_app(settings={"api_keys": ["a"]})
    assert app._bound_deployment.init_args[1].api_keys == ("a", "b")


def test_the_extra_is_named_where_it_is_missing() -> None:
    code = "import sys; sys.modules['ray'] = None; import mustafar.ray"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "pip install 'mustafar[ray]'" in run.stderr
    assert "ModuleNotFoundError: mustafar.ray needs the package ray" in run.stderr
