"""Serves a model by two processes on this machine: python ray_serve.py [MODEL_FOLDER [PORT]]

Needs the extra mustafar[ray]. Prints which replica answers, and what, until both have.
"""

import http.client
import json
import sys

import ray
from ray import serve

import mustafar.ray

REPLICAS = 2
NAMES = ["textwrap.dedent", "os.walk", "json.dumps", "shutil.move", "re.sub", "math.hypot", "zip"]


def ask(port: int, messages: list[dict[str, str]]) -> tuple[str, str]:
    """Streams a reply; returns it, and the replica's name."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {"messages": messages, "max_tokens": 24, "temperature": 0, "stream": True}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    replica = answer.headers["x-mustafar-replica"]
    print(f"{replica}: ", end="")
    reply = ""
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        if "error" in chunk:
            raise RuntimeError(chunk["error"]["message"])
        piece = chunk["choices"][0]["delta"].get("content", "")
        print(piece.replace("\n", " "), end="", flush=True)
        reply += piece
    print()
    return reply, replica


def main() -> None:
    """Starts Ray, asks, and ends it."""
    folder = sys.argv[1] if len(sys.argv) > 1 else None
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 8000
    ray.init(num_cpus=REPLICAS, object_store_memory=100 << 20, include_dashboard=False)
    serve.start(http_options={"port": port})
    serve.run(mustafar.ray.build_app(folder, replicas=REPLICAS))
    seen = set()
    for name in NAMES:
        messages = [{"role": "user", "content": f"What does {name} do?"}]
        reply, replica = ask(port, messages)
        messages.append({"role": "assistant", "content": reply})
        messages.append({"role": "user", "content": "Why?"})
        ask(port, messages)  # by the same replica, which knows how it begins
        seen.add(replica)
        if len(seen) == REPLICAS:
            break
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
