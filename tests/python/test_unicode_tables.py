"""The tables of cpp/text/unicode/ are what tools/make_unicode_tables.py writes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("which", ["tokenizer", "python"])
def test_the_script_gives_the_committed_file(which: str) -> None:
    script = ROOT / "tools" / "make_unicode_tables.py"
    written = subprocess.run([sys.executable, script, which], capture_output=True, check=True)
    committed = (ROOT / "cpp" / "text" / "unicode" / f"{which}_tables.cc").read_bytes()
    ours, theirs = written.stdout.splitlines(), committed.splitlines()
    assert ours[0] == theirs[0]
    if ours[1] != theirs[1]:  # the version
        pytest.skip(f"here is {ours[1].decode()}; the file has {theirs[1].decode()}")
    assert written.stdout == committed
