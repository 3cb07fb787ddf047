"""Sessions on disk: they go on bit-identically, and no damage gets in."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mustafar
from mustafar import KVConfig, Session
from support.sessions import ids_of
from support.state_file import pages_of

KVS = {
    "dense": KVConfig.preset("dense"),
    "group": KVConfig(sparsity=0.5, value_dtype="auto"),
    "row": KVConfig(
        k_sparsity=0.7, v_sparsity=0.3, pattern="row", window=0, sink_tokens=4, value_dtype="auto"
    ),
    "int8": KVConfig(sparsity=0.5, value_dtype="int8"),
    "int4": KVConfig(sparsity=0.5, value_dtype="int4"),
    "hadamard": KVConfig(sparsity=0.5, profile="hadamard", value_dtype="auto"),
    "output_aware": KVConfig(sparsity=0.5, k_policy="output_aware", value_dtype="auto"),
    "channel": KVConfig(sparsity=0.5, v_policy="channel_magnitude", value_dtype="auto"),
}


@pytest.fixture
def saved(model: mustafar.Model, tmp_path: Path) -> tuple[Session, Path]:
    session = Session(model, KVConfig(sparsity=0.5, value_dtype="auto"))
    session.prefill(ids_of(170))
    path = tmp_path / "session.kv"
    session.save(path)
    return session, path


@pytest.mark.parametrize("kv", list(KVS))
@pytest.mark.parametrize("n", [1, 40, 96, 97, 300])
def test_goes_on_bit_identically(model: mustafar.Model, kv: str, n: int, tmp_path: Path) -> None:
    session = Session(model, KVS[kv], max_tokens=450)
    session.prefill(ids_of(n))
    session.decode(5)
    path = tmp_path / "session.kv"
    session.save(path)
    other = Session.load(model, path)
    assert other.tokens == session.tokens
    assert other.max_tokens == 450
    assert other.memory() == session.memory()
    assert np.array_equal(other.logits(), session.logits())
    for token in ids_of(70, seed=2):  # across a block boundary
        assert np.array_equal(other.decode(token), session.decode(token))


@pytest.mark.parametrize(
    "kv",
    [
        *KVS.values(),
        KVConfig(sparsity=0.7, value_dtype="auto"),
        KVConfig(sparsity=0.0, v_sparsity=0.7, value_dtype="auto"),
        KVConfig(sparsity=0.7, k_sparsity=0.3, window=16, sink_tokens=4, value_dtype="auto"),
    ],
    ids=str,
)
def test_the_loaded_config_is_the_saved_one(
    model: mustafar.Model, kv: KVConfig, tmp_path: Path
) -> None:
    session = Session(model, kv)
    session.prefill(ids_of(10))
    session.save(tmp_path / "s")
    loaded = Session.load(model, tmp_path / "s").kv
    assert replace(loaded, profile=None) == replace(kv, profile=None)
    if kv.profile is None:
        assert loaded.profile is None
    else:
        assert loaded.profile.hash() == mustafar.Profile.hadamard(model._core).hash()


def test_the_config_of_a_file_without_its_sparsity(model: mustafar.Model, tmp_path: Path) -> None:
    path = tmp_path / "s"
    session = Session(model, KVConfig(k_sparsity=0.7, v_sparsity=0.3, value_dtype="auto"))
    session.save(path)
    rewrite(path, {}, without="sparsity")
    loaded = Session.load(model, path).kv
    assert (loaded.sparsity, loaded.k_sparsity, loaded.v_sparsity) == (0.7, None, 0.3)


def test_after_a_rewind(model: mustafar.Model, tmp_path: Path) -> None:
    session = Session(model, KVConfig(window=64))
    session.prefill(ids_of(150))
    session.rewind(140)
    session.save(tmp_path / "s")
    other = Session.load(model, tmp_path / "s")
    assert np.array_equal(other.logits(), session.logits())


def test_calibrated_profile_is_needed_and_checked(model: mustafar.Model, tmp_path: Path) -> None:
    texts = [ids_of(400), ids_of(400, 7)]
    profile = mustafar.calibrate(model, texts, "klt")
    session = Session(model, KVConfig(profile=profile))
    session.prefill(ids_of(200))
    path = tmp_path / "s"
    session.save(path)
    with pytest.raises(mustafar.StateError, match=profile.hash()):
        Session.load(model, path)
    with pytest.raises(mustafar.StateError, match="with hash"):
        Session.load(model, path, mustafar.calibrate(model, texts, "balanced"))
    other = Session.load(model, path, profile)
    assert np.array_equal(other.decode(4), session.decode(4))


def test_other_model_dtype_and_profile_are_refused(
    model: mustafar.Model, saved: tuple[Session, Path], tmp_path: Path
) -> None:
    from support.paths import model_folder

    _, path = saved
    with mustafar.Model(model_folder("stories260K")) as other:
        with pytest.raises(mustafar.StateError, match="fingerprint"):
            Session.load(other, path)
    with mustafar.Model(model_folder("story"), dtype="bf16") as other:
        with pytest.raises(mustafar.StateError, match="dtype"):
            Session.load(other, path)
    with pytest.raises(mustafar.StateError, match="without a KV profile"):
        Session.load(model, path, mustafar.Profile.hadamard(model._core))


def test_every_truncation_is_refused(model: mustafar.Model, saved: tuple[Session, Path]) -> None:
    _, path = saved
    whole = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", whole, 16)
    near = range(64 + header_bytes + 200)
    far = np.random.default_rng(0).integers(len(near), len(whole), 60)
    for n in [*near, *map(int, far), len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(mustafar.StateError):
            Session.load(model, path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(mustafar.StateError, match="after its last section"):
        Session.load(model, path)


def test_every_flipped_bit_is_refused(model: mustafar.Model, saved: tuple[Session, Path]) -> None:
    session, path = saved
    whole = bytearray(path.read_bytes())
    (header_bytes,) = struct.unpack_from("<Q", whole, 16)
    rng = np.random.default_rng(0)
    head = 64 + header_bytes
    for at in [*range(head), *map(int, rng.integers(head, len(whole), 300))]:
        bit = 1 << int(rng.integers(8))
        whole[at] ^= bit
        path.write_bytes(whole)
        with pytest.raises(mustafar.StateError):
            Session.load(model, path)
        whole[at] ^= bit
    path.write_bytes(whole)
    assert Session.load(model, path).tokens == session.tokens


def test_foreign_files_are_named(model: mustafar.Model, tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content, what in [
        (b"", "too few"),
        (b"x" * 200, "not a session state file"),
        (b"MSTFKV\r\n" + struct.pack("<II", 1, 0x04030201) + bytes(100), "byte order"),
        (b"MSTFKV\r\n" + struct.pack("<II", 99, 0x01020304) + bytes(100), "version 99"),
        (b"MSTFKV\r\n" + struct.pack("<II", 1, 0x01020304) + bytes(100), "neighbouring dims"),
    ]:
        path.write_bytes(content)
        with pytest.raises(mustafar.StateError, match=what):
            Session.load(model, path)
    with pytest.raises(mustafar.StateError, match="no-such-file"):
        Session.load(model, tmp_path / "no-such-file")
    with pytest.raises(mustafar.StateError):
        Session.load(model, tmp_path)


def rewrite(path: Path, change: dict[str, object], without: str = "") -> None:
    """Writes the file anew with all checksums right: header fields changed, one of kv left out."""

    def words_hash(data: bytes, state: int = 0xCBF29CE484222325) -> int:
        mask = (1 << 64) - 1
        for (word,) in struct.iter_unpack("<Q", data):
            state = (state ^ word) * 0x100000001B3 & mask
            state ^= state >> 29
        return state

    whole = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", whole, 16)
    header = json.loads(whole[64 : 64 + header_bytes])
    body = whole[64 + (header_bytes + 63) // 64 * 64 :]
    for key, value in change.items():
        target = header
        *parents, last = key.split(".")
        for parent in parents:
            target = target[parent]
        target[last] = value
    header["kv"].pop(without, None)
    text = json.dumps(header).encode()
    padded = text + bytes(-len(text) % 64)
    state = words_hash(padded)
    for byte in struct.pack("<q", len(text)):
        state = (state ^ byte) * 0x100000001B3 & ((1 << 64) - 1)
    path.write_bytes(whole[:16] + struct.pack("<QQ", len(text), state) + bytes(32) + padded + body)


@pytest.mark.parametrize(
    "change",
    [
        {"n_tokens": 171},
        {"n_tokens": 10**12},
        {"n_tokens": -1},
        {"max_tokens": 10**9},
        {"max_tokens": 100},
        {"kv.k_sparsity": 0.7},
        {"kv.sparsity": "x"},
        {"kv.sparsity": 1.0},
        {"kv.window": 0},
        {"kv.window": -1},
        {"kv.value_dtype": "int8"},
        {"kv.value_dtype": "int3"},
        {"kv": {}},
        {"sections": []},
        {"sections": "x"},
        {"model_fingerprint": "0" * 16},
    ],
)
def test_inconsistent_headers_are_refused(
    model: mustafar.Model, saved: tuple[Session, Path], change: dict[str, object]
) -> None:
    session, path = saved
    rewrite(path, {})
    assert Session.load(model, path).tokens == session.tokens
    rewrite(path, change)
    with pytest.raises(mustafar.StateError):
        Session.load(model, path)


def test_what_a_sliding_window_dropped(tmp_path: Path) -> None:
    """Files hold the blocks that are left, and say how many went before them."""
    families = pytest.importorskip("support.families")
    fields = {"sliding_window": 96, "max_position_embeddings": 1024}
    folder = families.save_family(tmp_path / "model", "mistral", **fields)
    path = tmp_path / "s"
    kv = KVConfig(value_dtype="auto")
    with mustafar.Model(folder, device="cpu", dtype="f32") as model:
        session = Session(model, kv)
        session.prefill(ids_of(900, vocab=320))
        session.save(path)
        (page_bytes,) = {len(page) for page in pages_of(session, path)}
        assert len(pages_of(session, path)) == 3  # of 13
        assert path.stat().st_size < 13 * page_bytes
        whole = path.read_bytes()
        for dropped in (0, 9, 11, 12, 13, -1, 10**12, "x", None):
            path.write_bytes(whole)
            rewrite(path, {"dropped_blocks": dropped})
            with pytest.raises(mustafar.StateError):
                Session.load(model, path)
        path.write_bytes(whole)
        rewrite(path, {"dropped_blocks": 10})
        with Session.load(model, path) as loaded:
            assert np.array_equal(loaded.decode(5), session.decode(5))
            session.rewind(850)  # by a block: what that sees is there
            session.save(path)
        with Session.load(model, path) as loaded:
            assert loaded.memory() == session.memory()
            assert np.array_equal(loaded.decode(5), session.decode(5))


def test_a_failed_save_keeps_the_old_file(saved: tuple[Session, Path]) -> None:
    session, path = saved
    before = path.read_bytes()
    session.decode(3)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        with pytest.raises(mustafar.Error, match="cannot write"):
            session.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(mustafar.Error, match="nowhere"):
        session.save(path.parent / "nowhere" / "x")
    session.save(path)


def test_a_full_disk_keeps_the_old_file(saved: tuple[Session, Path], tmp_path: Path) -> None:
    session, _ = saved
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True
    )
    if made.returncode != 0:
        pytest.skip("cannot mount a small file system here")
    try:
        (mount / "s").write_bytes(b"old")
        with pytest.raises(mustafar.Error, match="No space left"):
            session.save(mount / "s")
        assert (mount / "s").read_bytes() == b"old"
        assert os.listdir(mount) == ["s"]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_killed_while_saving_leaves_the_old_file(
    model: mustafar.Model, saved: tuple[Session, Path]
) -> None:
    session, path = saved
    before = path.read_bytes()
    script = (
        "import sys, mustafar\n"
        f"m = mustafar.Model({str(model.folder)!r})\n"
        f"s = mustafar.Session.load(m, {str(path)!r})\n"
        "s.decode(3)\n"
        "print('ready', flush=True)\n"
        f"while True: s.save({str(path)!r} + '.new'); s.save({str(path)!r})\n"
    )
    for delay in (0.0, 0.003, 0.011):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        loaded = Session.load(model, path)  # whole: the old one or the new one
        assert loaded.tokens in (session.tokens, session.tokens + [3])
        path.write_bytes(before)


def test_two_writers_leave_one_whole_file(model: mustafar.Model, tmp_path: Path) -> None:
    path = tmp_path / "s"
    sessions = [Session(model), Session(model)]
    for i, session in enumerate(sessions):
        session.prefill(ids_of(150, seed=i))
    threads = [
        threading.Thread(target=lambda s=s: [s.save(path) for _ in range(20)]) for s in sessions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Session.load(model, path).tokens in [s.tokens for s in sessions]
    assert os.listdir(tmp_path) == ["s"]
