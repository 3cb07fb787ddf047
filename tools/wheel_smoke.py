"""What an installed wheel must do: python wheel_smoke.py, in the environment it is installed in."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import mustafar

SAY = "import textwrap"


def main() -> None:
    assert mustafar.__version__ == version("mustafar"), mustafar.__version__
    model = mustafar.Model(device="cpu")
    print(model)
    first = mustafar.Session(model, kv=mustafar.KVConfig.preset("mustafar", profile="hadamard"))
    text = first.generate(SAY, max_new_tokens=100, temperature=0).text
    assert text, "the demo model said nothing"
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder) / "state")
        again = mustafar.Session.load(model, Path(folder) / "state")
        assert again.tokens == first.tokens
    batch = model.generate([SAY, "def f("], max_new_tokens=8)
    assert all(result.token_ids for result in batch)
    chat = mustafar.Chat(model).send("What does textwrap.dedent do?", max_new_tokens=16)
    print(chat.text)
    assert chat.token_ids

    command = Path(sys.executable).with_name("mustafar")
    shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert mustafar.__version__ in shown.stdout + shown.stderr, shown
    arguments = ["generate", "-p", SAY, "-n", "8", "--temp", "0"]
    said = subprocess.run([command, *arguments], capture_output=True, text=True, check=True)
    assert said.stdout.strip(), said
    print(f"mustafar {mustafar.__version__} works")


if __name__ == "__main__":
    main()
