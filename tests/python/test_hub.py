"""Models by repository id: from the local cache of the Hugging Face hub, or downloaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import mustafar
from support.paths import DEMO

ID = "somebody/demo-model.1"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, without the hub's package and away from any folder of the id's name."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hf" / "hub"


def add_snapshot(hub: Path, commit: str = "0a1b") -> Path:
    """The demo model as huggingface_hub lays it out: links into blobs, the commit in refs."""
    repository = hub / ("models--" + ID.replace("/", "--"))
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in DEMO.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def test_a_snapshot_in_the_cache_is_loaded(hub: Path) -> None:
    snapshot = add_snapshot(hub)
    model = mustafar.Model(ID)
    assert model.folder == snapshot
    assert model.fingerprint == mustafar.Model().fingerprint
    assert mustafar.Session(ID).generate("def f(", max_new_tokens=2).token_ids


def test_the_command_takes_the_same_id(hub: Path) -> None:
    add_snapshot(hub)
    if shutil.which("mustafar") is None:
        pytest.skip("no mustafar command on the PATH")
    done = subprocess.run(
        ["mustafar", "generate", "-m", ID, "-p", "def f(", "-n", "2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_missing_names_the_cache_and_the_extra(hub: Path) -> None:
    with pytest.raises(
        mustafar.ModelError, match=r"models--somebody--demo-model\.1.*mustafar\[hub\]"
    ):
        mustafar.Model(ID)
    with pytest.raises(mustafar.ModelError, match="expected a model folder"):
        mustafar.Model("no/such/folder")


def test_the_hubs_package_downloads(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append(repo_id)
        assert "*.safetensors" in allow_patterns
        return str(add_snapshot(hub))

    package = types.ModuleType("huggingface_hub")
    package.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    assert mustafar.Model(ID).folder.name == "0a1b"
    assert mustafar.Model(ID).folder.name == "0a1b"  # from the cache now
    assert asked == [ID]


def test_a_failed_download_is_a_model_error(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        raise OSError("no route to the hub")

    package = types.ModuleType("huggingface_hub")
    package.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    with pytest.raises(mustafar.ModelError, match="no route to the hub"):
        mustafar.Model(ID)
