"""Devices by name: where the GPU can't be had, "cuda" says what is missing and "auto" is the CPU.

MUSTAFAR_EXPECT_CUDA=ON or OFF says whether the build under test has CUDA, so that a build of the
wrong kind fails; without it both messages are good.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

import mustafar

NO_CUDA = "this build has no CUDA; rebuild with MUSTAFAR_CUDA=ON"
NO_DRIVER = "the NVIDIA driver (libcuda.so.1) was not found"
NO_GPU = "the driver finds no NVIDIA GPU"
EXPECTED = {"ON": [NO_DRIVER, NO_GPU], "OFF": [NO_CUDA], "": [NO_CUDA, NO_DRIVER, NO_GPU]}[
    os.environ.get("MUSTAFAR_EXPECT_CUDA", "")
]


def without_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command where no GPU is visible, whatever the machine has."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    return subprocess.run(arguments, capture_output=True, text=True, env=environment)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return without_gpu(sys.executable, "-c", code)


def command() -> str:
    found = shutil.which("mustafar")
    if found is None:
        pytest.skip("no mustafar command on PATH")
    return found


def test_cuda_says_what_is_missing() -> None:
    result = python(
        "import mustafar\n"
        "try:\n"
        "    mustafar.Model(device='cuda')\n"
        "except mustafar.DeviceError as error:\n"
        "    assert isinstance(error, mustafar.Error)\n"
        "    print(error)\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('device "cuda": ')
    assert any(text in result.stdout for text in EXPECTED), result.stdout


def test_auto_falls_back_to_the_cpu_and_runs() -> None:
    result = python(
        "import mustafar\n"
        "model = mustafar.Model(device='auto')\n"
        "text = mustafar.Session(model).generate('def f(', max_new_tokens=4, temperature=0).text\n"
        "print(model.device, len(text) > 0)\n"
    )
    assert result.stdout == "cpu True\n", result.stderr


def test_the_command_says_what_is_missing() -> None:
    result = without_gpu(command(), "generate", "-p", "x", "-n", "1", "--device", "cuda")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith('mustafar: --device "cuda": '), result.stderr
    assert any(text in result.stderr for text in EXPECTED), result.stderr


def test_a_gpu_is_named_by_its_number() -> None:
    result = python(
        "import mustafar\n"
        "try:\n"
        "    mustafar.Model(device='cuda:1')\n"
        "except mustafar.DeviceError as error:\n"
        "    print(error)\n"
    )
    assert result.stdout.startswith('device "cuda:1": '), result.stderr
    assert any(text in result.stdout for text in EXPECTED), result.stdout
    for run_it in (("generate", "-p", "x", "-n", "1"), ("bench", "-p", "8", "-n", "0")):
        result = without_gpu(command(), *run_it, "--device", "cuda:1")
        assert result.returncode == 1
        assert 'device "cuda:1": ' in result.stderr, result.stderr


def test_the_command_falls_back_to_the_cpu() -> None:
    result = without_gpu(command(), "info", "--device", "auto", "--json")
    assert result.returncode == 0, result.stderr
    assert '"device": "cpu"' in result.stdout


def test_an_unknown_device_is_a_bad_argument() -> None:
    for name in ("gpu", "cuda:", "cuda:x", "cuda:-1"):
        expected = f'expected auto, cpu, cuda or cuda:N .*, got "{name}"'
        with pytest.raises(ValueError, match=expected):
            mustafar.Model(device=name)
