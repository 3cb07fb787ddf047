"""The `mustafar` command: outputs, JSON, exit codes, interruption, pipes."""

import csv
import io
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.command import COMMAND, needs_command, run
from support.paths import STORY

pytestmark = [
    needs_command,
    pytest.mark.skipif(not STORY.is_dir(), reason=f"no model at {STORY}"),
]


def generate(*arguments: object, **kwargs):
    return run("generate", "-m", STORY, "-t", 2, "--temp", 0, *arguments, **kwargs)


PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def greedy() -> dict:
    """32 greedy tokens of the prompt, as JSON."""
    result = generate("-p", PROMPT, "-n", 32, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_generate_streams_the_continuation_and_ends_with_figures(greedy):
    result = generate("-p", PROMPT, "-n", 32)
    assert result.returncode == 0, result.stderr
    assert result.stdout == greedy["text"] + "\n"
    assert len(greedy["text"]) > 40
    last = result.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"prompt \d+ tokens, [\d.]+ tokens/s \| generated 32 tokens, [\d.]+ tokens/s"
        r" \| KV [\d.]+ [KM]iB, dense [\d.]+ [KM]iB, nothing compressed yet",
        last,
    ), last
    assert "\r" not in result.stderr, "a progress bar outside a terminal"


def test_generate_shows_the_sparsity_once_something_is_compressed():
    result = generate(
        "-p", PROMPT, "-n", 150, "--ignore-eos", "--k-sparsity", 0.5, "--v-sparsity", 0.75
    )
    assert result.returncode == 0, result.stderr
    assert "sparsity K 0.500 V 0.750" in result.stderr


def test_generate_json_has_everything(greedy):
    assert set(greedy) == {
        "text",
        "token_ids",
        "finish_reason",
        "stats",
        "kv",
        "kv_config",
        "model",
        "device",
    }
    assert len(greedy["token_ids"]) == 32
    assert greedy["finish_reason"] == "length"
    stats = greedy["stats"]
    assert stats["generated_tokens"] == 32
    assert stats["prompt_tokens"] > 3
    assert stats["generated_tokens_per_second"] > 0
    kv = greedy["kv"]
    parts = ("masks", "values", "scales", "padding", "tail", "policy")
    assert kv["allocated"] == sum(kv[part] for part in parts)
    assert kv["compressed_tokens"] + kv["dense_tokens"] == stats["prompt_tokens"] + 32
    assert greedy["kv_config"]["k_sparsity"] == 0
    assert greedy["kv_config"]["value_dtype"] == "int8"


def test_generate_logprobs():
    result = generate("-p", PROMPT, "-n", 4, "--json", "--logprobs", 3)
    logprobs = json.loads(result.stdout)["logprobs"]
    assert len(logprobs) == 4
    for token in logprobs:
        assert len(token["top"]) == 3
        assert token["top"][0] == [token["token_id"], token["logprob"]]  # greedy
        assert token["logprob"] < 0


def test_prompt_from_file_pipe_and_escapes(greedy, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    expected = greedy["text"] + "\n"
    assert generate("-f", file, "-n", 32, "-q").stdout == expected
    assert generate("-n", 32, "-q", stdin=PROMPT + "\n").stdout == expected
    assert generate("-f", "-", "-n", 32, "-q", stdin=PROMPT).stdout == expected
    assert generate("-e", "-p", PROMPT.replace(" a", "\\ta"), "-n", 0, "--echo", "-q").stdout == (
        PROMPT.replace(" a", "\ta") + "\n"
    )


def test_echo_and_quiet(greedy):
    result = generate("-p", PROMPT, "-n", 32, "--echo", "-q")
    assert result.stdout == PROMPT + greedy["text"] + "\n"
    assert result.stderr == ""


def test_stop_text_ends_the_output(greedy):
    stop = greedy["text"][10:14]
    result = generate("-p", PROMPT, "-n", 32, "--stop", stop, "--json")
    out = json.loads(result.stdout)
    assert out["text"] == greedy["text"][: greedy["text"].index(stop)]
    assert out["finish_reason"] == "stop"


def test_same_seed_same_text():
    def sample(seed: int) -> str:
        result = run(
            "generate", "-m", STORY, "-p", PROMPT, "-n", 40, "--temp", 1.2, "-s", seed, "-q"
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)


def test_logit_bias_forbids_a_token(greedy):
    first = greedy["token_ids"][0]
    result = generate("-p", PROMPT, "-n", 1, "--logit-bias", f"{first}-100", "--json")
    assert json.loads(result.stdout)["token_ids"][0] != first


def test_the_context_limit_ends_the_output_or_refuses_the_prompt():
    out = json.loads(generate("-p", PROMPT, "-n", -1, "-c", 24, "--ignore-eos", "--json").stdout)
    assert out["finish_reason"] == "context"
    assert out["stats"]["prompt_tokens"] + out["stats"]["generated_tokens"] == 24
    result = generate("-p", PROMPT * 20, "-c", 24)
    assert result.returncode == 1
    assert "-c = 24" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.5"], "sparsity must be at least 0"),
        (["--sparsity", "nan"], "sparsity must be at least 0"),
        (["--sparsity", "half"], "--sparsity"),
        (["--kv-dtype", "q8_0"], "--kv-dtype must be one of"),
        (["--pattern", "rows"], "--pattern must be one of"),
        (["--v-policy", "output_aware"], "ranks keys only"),
        (["--temp", "-1"], "--temp must be"),
        (["--top-p", "2"], "--top-p must be"),
        (["-n", "-2"], "-n must be -1"),
        (["-c", "-5"], "-c must be 0"),
        (["-c", "1000000000"], "context"),
        (["-s", "-3"], "-s must be -1"),
        (["--logit-bias", "12"], "--logit-bias"),
        (["--logit-bias", "99999999+1"], "--logit-bias must be"),
        (["--stop", ""], "stop"),
        (["--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:x"], 'got "cuda:x"'),
        (["--dtype", "q4"], "--dtype"),
        (["-t", "-1"], "-t is -1"),
        (["--kv-budget", "lots"], "--kv-budget"),
        (["-f", "x"], "excludes"),
        (["--no-such-flag"], "no-such-flag"),
        (["stray"], "stray"),
    ],
)
def test_bad_options_are_usage_errors(arguments, message):
    result = generate("-p", PROMPT, "-n", 1, *arguments)
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert message in result.stderr
    assert result.stdout == ""


def test_failures_are_errors_with_a_message(tmp_path):
    result = run("generate", "-m", tmp_path / "nothing", "-p", "x")
    assert result.returncode == 1
    assert str(tmp_path / "nothing") in result.stderr
    result = generate("-f", tmp_path / "no-file")
    assert result.returncode == 1
    assert "no-file" in result.stderr
    assert generate("-f", tmp_path).returncode == 1
    result = generate("-p", PROMPT, "--profile", tmp_path / "no-profile")
    assert result.returncode == 1
    assert "no-profile" in result.stderr
    result = generate("-p", PROMPT * 50, "--kv-budget", "1K")
    assert result.returncode == 1
    assert "--kv-budget" in result.stderr


def test_calibrate_writes_a_profile(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once there was a dog who liked to run in the park. " * 30)
    made = tmp_path / "made.safetensors"
    result = run("calibrate", "-m", STORY, "-f", text, "-f", text, "-o", made, "--scale-power", 0.5)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no terminal, no bar
    assert re.fullmatch(rf"{made}: balanced, hash [0-9a-f]{{16}}\n", result.stdout)
    result = generate("-p", PROMPT, "-n", 4, "--profile", made)
    assert result.returncode == 0, result.stderr

    result = run("calibrate", "-m", STORY, "-o", tmp_path / "h", "--kind", "hadamard")
    assert result.returncode == 0, result.stderr
    for arguments, code, message in [
        (["-o", tmp_path / "x"], 2, "-f FILE is needed"),
        (["-o", tmp_path / "x", "-f", tmp_path / "none"], 1, "none"),
        (["-o", tmp_path / "x", "-f", text, "--balance", 2], 2, "balance is 2"),
        (["-o", tmp_path / "x", "-f", text, "-n", 4], 2, "needs text"),
        (["-f", text], 2, "--output is required"),
        (["-o", tmp_path / "no" / "x", "-f", text], 1, "cannot create"),
    ]:
        result = run("calibrate", "-m", STORY, *arguments)
        assert (result.returncode, message in result.stderr) == (code, True), result
        assert result.stdout == "" and not (tmp_path / "x").exists()


def test_no_command_help_and_version():
    assert run().returncode == 2
    assert run("no-such-command").returncode == 2
    for arguments in (["--help"], ["generate", "--help"], ["bench", "--help"], ["--version"]):
        result = run(*arguments)
        assert result.returncode == 0
        assert result.stdout
    assert "--kv-dtype" in run("generate", "--help").stdout


def test_the_demo_model_is_the_default(greedy, tmp_path):
    arguments = ["generate", "-p", PROMPT, "-n", 32, "--temp", 0, "-q"]
    result = run(*arguments, MUSTAFAR_DEMO_MODEL=str(STORY))
    assert result.stdout == greedy["text"] + "\n"
    result = run(*arguments, MUSTAFAR_DEMO_MODEL=str(tmp_path / "gone"))
    assert result.returncode == 1
    assert "gone" in result.stderr


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_interrupting_a_reply_stops_it_cleanly(tmp_path):
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(STORY / name)
    config = json.loads((STORY / "config.json").read_text())
    config["max_position_embeddings"] = 1 << 20  # minutes of text
    (tmp_path / "config.json").write_text(json.dumps(config))
    process = start("generate", "-m", tmp_path, "-p", PROMPT, "-n", -1, "--ignore-eos")
    first = process.stdout.read(20)  # once text comes, the reply is under way
    process.send_signal(signal.SIGINT)
    rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first) == 20
    assert rest.endswith("\n")
    assert "tokens/s" in stderr


def test_interrupting_a_benchmark_stops_it():
    process = start("bench", "-m", STORY, "-p", 512, "-n", 128, "-r", 100000)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in stderr


def test_a_closed_pipe_is_an_error_not_a_crash():
    process = start("generate", "-m", STORY, "-p", PROMPT, "-n", 1500, "--ignore-eos")
    process.stdout.close()
    process.stdout = None
    assert process.wait(timeout=120) == 1
    assert "could not write" in process.stderr.read()


def test_info_text_and_json():
    result = run("info", "-m", STORY)
    assert result.returncode == 0, result.stderr
    for word in ("model", "shape", "context", "weights", "device", "tokenizer", "bytes/token"):
        assert word in result.stdout
    info = json.loads(run("info", "-m", STORY, "--json", "--tensors", "--kv", "dense").stdout)
    config = json.loads((STORY / "config.json").read_text())
    assert info["config"]["n_layers"] == config["num_hidden_layers"]
    assert info["config"]["vocab_size"] == config["vocab_size"]
    assert info["n_tensors"] == len(info["tensors"])
    assert sum(t["bytes"] for t in info["tensors"]) == sum(info["tensor_bytes"].values())
    assert info["memory"]["weights_bytes"] > 0
    assert info["tokenizer"]["vocab_size"] == config["vocab_size"]
    rows = {row["setting"]: row for row in info["kv_cache"]}
    assert rows["as given"]["bytes_per_token"] == rows["dense"]["bytes_per_token"]
    assert rows["K .5 V .5"]["bytes_per_token"] < rows["dense"]["bytes_per_token"]
    assert rows["K .5 V .5 int8"]["of_dense"] < rows["K .5 V .5"]["of_dense"]


def test_info_says_which_layers_have_a_window(tmp_path: Path):
    def window(**fields: object) -> str:
        config = json.loads((STORY / "config.json").read_text())
        for path in STORY.iterdir():
            if path.name != "config.json" and not (tmp_path / path.name).exists():
                (tmp_path / path.name).symlink_to(path)
        (tmp_path / "config.json").write_text(json.dumps(config | fields))
        result = run("info", "-m", tmp_path, "--device", "cpu")
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stdout.splitlines() if line.startswith("window")]
        return lines[0].split(maxsplit=1)[1] if lines else ""

    assert window() == ""
    assert window(model_type="mistral", sliding_window=96) == "96 tokens in all layers"
    n = json.loads((STORY / "config.json").read_text())["num_hidden_layers"]
    types = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(n)]
    some = window(
        model_type="smollm3", layer_types=types, sliding_window=96, no_rope_layers=[1] * n
    )
    assert some.startswith("96 tokens in layer") and some.endswith(", the others see all")


def bench(*arguments: object):
    result = run(
        "bench", "-m", STORY, "-t", 2, "-r", 2, "-p", 16, "-n", 4, "--no-rotate", *arguments
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


ROW_KEYS = {
    "model", "model_size", "model_n_params", "backend", "device", "n_threads", "kv", "kv_config",
    "kv_bytes", "kv_dense_bytes", "test", "n_prompt", "n_gen", "n_depth", "n_batch", "avg_ns", "median_ns",
    "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "bytes_per_second", "read_bandwidth",
    "bandwidth_fraction", "working_set_bytes", "replicas",
}  # fmt: skip


def test_bench_json_is_a_cross_product():
    rows = json.loads(
        bench(
            "-d",
            "0,256",
            "--sparsity",
            "0,0.5/0.75",
            "--kv-dtype",
            "auto,int8",
            "-pg",
            "8,2",
            "-o",
            "json",
        )
    )
    assert len(rows) == 2 * 3 * 4
    assert {row["test"] for row in rows} == {
        "pp16",
        "tg4",
        "pp8+tg2",
        "pp16 @ d256",
        "tg4 @ d256",
        "pp8+tg2 @ d256",
    }
    assert len({row["kv"] for row in rows}) == 4
    for row in rows:
        assert set(row) == ROW_KEYS
        assert len(row["samples_ns"]) == 2
        tokens = row["n_prompt"] + row["n_gen"]
        rates = [tokens / (ns * 1e-9) for ns in row["samples_ns"]]
        assert row["avg_ts"] == pytest.approx(sum(rates) / 2)
        assert row["n_threads"] == 2
        assert row["read_bandwidth"] > 0
        assert row["replicas"] == 1
    at_depth = {row["kv"]: row["kv_bytes"] for row in rows if row["test"] == "tg4 @ d256"}
    assert at_depth["int8 K.50 V.75"] < at_depth["auto K.50 V.75"] < at_depth["auto dense"]


def test_bench_markdown_csv_and_jsonl():
    lines = bench().splitlines()
    assert lines[0].split("|")[1].strip() == "model"
    assert set(lines[1]) <= set("|-:")
    assert len(lines) == 2 + 4  # pp16 and tg4, dense and 0.5
    assert all(re.search(r"\d+\.\d\d ± \d+\.\d\d", line) for line in lines[2:])
    rows = list(csv.DictReader(io.StringIO(bench("-o", "csv"))))
    assert len(rows) == 4
    assert set(rows[0]) == ROW_KEYS
    assert [json.loads(line)["kv"] for line in bench("-o", "jsonl").splitlines()] == [
        "auto dense",
        "auto K.50 V.50",
        "auto dense",
        "auto K.50 V.50",
    ]


def test_bench_rotates_over_copies_until_the_cache_is_exceeded():
    result = run(
        "bench", "-m", STORY, "-t", 1, "-r", 1, "-p", 0, "-n", 4, "--sparsity", 0, "-o", "jsonl"
    )
    row = json.loads(result.stdout)
    assert row["replicas"] > 1


def test_bench_random_shape():
    result = run(
        "bench",
        "--shape",
        "tinyllama-1.1b:1",
        "-r",
        1,
        "-p",
        8,
        "-n",
        2,
        "--sparsity",
        "0.5",
        "-o",
        "json",
    )
    rows = json.loads(result.stdout)
    assert rows[0]["model"] == "tinyllama-1.1b:1"
    assert rows[0]["model_n_params"] == 2 * 32000 * 2048 + 2048 * 2048 * 2 + 2 * 256 * 2048 + (
        3 * 2048 * 5632
    )


def test_bench_of_sequences_together():
    rows = json.loads(bench("-b", "1,3", "-d", "96", "--sparsity", "0.5", "-o", "json"))
    assert [row["test"] for row in rows] == ["pp16 @ d96", "tg4 @ d96", "3 x tg4 @ d96"]
    one, three = rows[1:]
    assert (one["n_batch"], three["n_batch"]) == (1, 3)
    assert three["avg_ts"] == pytest.approx(
        sum(3 * 4e9 / ns for ns in three["samples_ns"]) / len(three["samples_ns"])
    )
    # The weights are read once for all of them, each cache by itself.
    read = [row["bytes_per_second"] * row["median_ns"] / 1e9 / 4 for row in (one, three)]
    assert read[0] < read[1] < 3 * read[0]
    assert one["kv_bytes"] == three["kv_bytes"] > 0


def test_bench_break_even():
    rows = json.loads(bench("--break-even", "-d", "0,128,384", "--sparsity", "0.5", "-o", "json"))
    fits = [row for row in rows if row["test"] == "break-even"]
    assert [fit["kv"] for fit in fits] == ["auto dense", "auto K.50 V.50"]
    assert fits[0]["faster_than_dense_from"] == "is the dense cache"
    depth = fits[1]["faster_than_dense_from"]
    assert depth in ("never", "lost in the noise") or depth >= 0
    assert {row["n_depth"] for row in rows if row["test"] != "break-even"} == {0, 128, 384}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "xml"], "-o must be"),
        (["-r", "0"], "-r must be"),
        (["-p", "-1"], "-p takes"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-pg", "5"], "-pg takes"),
        (["--shape", "gpt-5"], "--shape must be one of"),
        (["--shape", "llama-3-8b:0"], "1 to 1000"),
        (["--sparsity", "0.5/"], "--sparsity takes"),
        (["--sparsity", "2"], "sparsity must be"),
        (["-d", "-4"], "-d takes"),
        (["-b", "0"], "-b takes"),
        (["-b", "2", "--break-even"], "leave -b out"),
        (["-t", "-1"], "-t must be"),
    ],
)
def test_bench_usage_errors(arguments, message):
    result = run("bench", "-m", STORY, *arguments)
    assert result.returncode == 2, result.stdout
    assert message in result.stderr
