"""Quantised weights: codes bit for bit as the reference makes them, and logits with those codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mustafar
from mustafar import _core, reference
from support.command import needs_command, run

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
oracle = pytest.importorskip("support.oracle")
families = pytest.importorskip("support.families")

DENSE = mustafar.KVConfig.preset("dense")
FORMATS = {
    "int8:32": (8, 32),
    "int8:128": (8, 128),
    "int8:row": (8, 0),
    "int4:32": (4, 32),
    "int4:64": (4, 64),
    "int4:row": (4, 0),
}


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (37, 100), (50, 577)])
def test_codes_are_those_of_the_reference(name: str, shape: tuple[int, int]) -> None:
    bits, group = FORMATS[name]
    random = np.random.default_rng(3)
    weights = (random.standard_t(4, shape) * 0.02).astype(np.float32)
    weights[-1, -1] = 0
    weights[0, : shape[1] // 2] = np.float32(0.25)  # ties
    codes, scales, minimums = reference.quantise_matrix(weights, bits, group)
    ours, our_scales, our_minimums = _core.quantise_weights(weights, name)
    assert np.array_equal(our_scales.view(np.uint16), scales.view(np.uint16))
    assert np.array_equal(our_minimums.view(np.uint16), minimums.view(np.uint16))
    assert np.array_equal(ours, codes)


def dequantised(folder: Path, out: Path, name: str) -> None:
    """The folder with its matrices rounded as `name` says, by the reference, in f32."""
    bits, group = FORMATS[name]
    shutil.copytree(folder, out)
    tensors = safetensors.load_file(out / "model.safetensors")
    for key, tensor in tensors.items():
        if tensor.ndim != 2:
            tensors[key] = tensor.float()
            continue
        vocabulary = "embed_tokens" in key or "lm_head" in key
        chosen = (8, 32) if vocabulary and bits == 4 else (bits, group)
        rounded = reference.quantise_matrix(tensor.float().numpy(), *chosen)
        tensors[key] = torch.from_numpy(reference.dequantise_matrix(*rounded, chosen[1]))
    safetensors.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    for field in ("torch_dtype", "dtype"):
        config.pop(field, None)
    (out / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["int8:32", "int4:32", "int4:row"])
@pytest.mark.parametrize(
    "layout",
    # Phi-3's fused tensors are cut where no tile of codes ends, Granite scales the embedding.
    [{"hidden": 96, "tied": True}, {"qkv_bias": True}, {"family": "phi3"}, {"family": "granite"}],
    ids=["tied", "bias", "phi3", "granite"],
)
def test_logits_are_those_of_the_dequantised_folder(
    name: str, layout: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if "family" in layout:
        families.save_family(folder, **layout)
    else:
        oracle.make_model(folder, **layout)
    dequantised(folder, tmp_path / "dequantised", name)
    theirs = oracle.load(tmp_path / "dequantised")
    ids = [int(x) for x in np.random.default_rng(1).integers(3, theirs.config.vocab_size, 90)]
    expected = oracle.logits(theirs, ids)
    with mustafar.Model(folder, device="cpu", dtype="f32", weights=name) as model:
        assert model.weights == name
        with mustafar.Session(model, DENSE) as session:
            assert np.abs(session.prefill(ids[:60]) - expected[59]).max() <= 1e-4
            for i in range(60, 90):
                assert np.abs(session.decode(ids[i]) - expected[i]).max() <= 1e-4


def test_a_batch_gives_what_each_prompt_gives_alone() -> None:
    with mustafar.Model(weights="int4", device="cpu") as model:
        prompts = ["Once upon a time", "The cat", "One day, Tim"]
        together = model.generate(prompts, max_new_tokens=20, temperature=0)
        for prompt, result in zip(prompts, together, strict=True):
            alone = model.generate([prompt], max_new_tokens=20, temperature=0)[0]
            assert alone.token_ids == result.token_ids
        with mustafar.Session(model) as session:
            session.prefill(model.tokenizer.encode(prompts[0]))
            with session.fork() as other:
                assert np.array_equal(other.decode(5), session.decode(5))


def test_names_and_memory() -> None:
    with pytest.raises(ValueError, match='weights is "int5", must be auto, int8 or int4'):
        mustafar.Model(weights="int5")  # type: ignore[arg-type]
    sizes = {}
    for weights in ("auto", "int8", "int4"):
        with mustafar.Model(weights=weights, device="cpu") as model:  # type: ignore[arg-type]
            sizes[weights] = model.memory().weights_bytes
    assert sizes["int4"] < sizes["int8"] < sizes["auto"]


def device_or_refusal(device: str, weights: str) -> str:
    try:
        with mustafar.Model(device=device, weights=weights) as model:  # type: ignore[arg-type]
            return model.device
    except mustafar.DeviceError as error:
        return str(error)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_devices_are_chosen_as_for_other_weights(device: str) -> None:
    expected = device_or_refusal(device, "auto")
    for weights in ("int8", "int4:64"):
        assert device_or_refusal(device, weights) == expected


@needs_command
def test_the_command_takes_weights() -> None:
    info = json.loads(run("info", "--json", "-w", "int4:64", "--device", "cpu").stdout)
    assert info["weights"] == "int4:64"
    assert info["memory"]["weights_bytes"] < sum(info["tensor_bytes"].values())
    text = run("info", "--weights", "int8", "--device", "cpu").stdout
    assert "as int8:32, " in text
    assert run("generate", "-w", "int8", "-p", "Once", "-n", "5", "-s", "1").returncode == 0
    refused = run("generate", "-w", "int2", "-p", "Once")
    assert refused.returncode != 0
    assert '-w is "int2", must be auto' in refused.stderr
