"""Folders of quantised weights: codes and layout against numpy, compressed-tensors, transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mustafar
from support.command import needs_command, run
from support.paths import DEMO

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
oracle = pytest.importorskip("support.oracle")
families = pytest.importorskip("support.families")

Tensors = dict[str, Any]


def tensors_of(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(safetensors.load_file(file))
    return tensors


def unpacked(words: NDArray[np.int32], bits: int, n: int) -> NDArray[np.int32]:
    """[rows, words] of 32 bits to [rows, n] unsigned codes, the first in the lowest bits."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    parts = words.view(np.uint32)[:, :, None] >> shifts & np.uint32(2**bits - 1)
    return parts.reshape(len(words), -1)[:, :n].astype(np.int32)


def parts_of(tensors: Tensors, name: str, bits: int) -> tuple[Any, Any, Any]:
    """Codes [rows, cols], scales and zeros [rows, groups] of a matrix."""
    rows, cols = tensors[name + "_shape"].tolist()
    codes = unpacked(tensors[name + "_packed"].numpy(), bits, cols)
    scales = tensors[name + "_scale"].float().numpy()
    if name + "_zero_point" not in tensors:
        return codes, scales, np.full(scales.shape, 2 ** (bits - 1), np.int32)
    packed = np.ascontiguousarray(tensors[name + "_zero_point"].numpy().T)
    return codes, scales, unpacked(packed, bits, rows).T


def weights_of(codes: Any, scales: Any, zeros: Any) -> NDArray[np.float32]:
    group = codes.shape[1] // scales.shape[1]
    return (codes - np.repeat(zeros, group, 1)) * np.repeat(scales, group, 1)


def dequantised(folder: Path, out: Path, bits: int) -> Path:
    """The folder with its codes turned back to f32 matrices, by numpy."""
    tensors = tensors_of(folder)
    dense = {}
    for name, tensor in tensors.items():
        if name.endswith("_packed"):
            base = name.removesuffix("_packed")
            weights = weights_of(*parts_of(tensors, base, bits))
            dense[base] = torch.from_numpy(weights.astype(np.float32))
        elif not name.endswith(("_scale", "_zero_point", "_shape")):
            dense[name] = tensor.float()
    out.mkdir()
    safetensors.save_file(dense, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for field in ("quantization_config", "torch_dtype", "dtype"):
        config.pop(field, None)
    (out / "config.json").write_text(json.dumps(config))
    return out


def min_max_error(weights: NDArray[np.float32], bits: int, group: int, symmetric: bool) -> float:
    """What rounding loses with the range of every group as its scale."""
    x = weights.reshape(len(weights), -1, group).astype(np.float64)
    if symmetric:
        scale = np.abs(x).max(2) / (2 ** (bits - 1) - 0.5)
        zero = np.full(scale.shape, 2 ** (bits - 1))
    else:
        low, high = np.minimum(x.min(2), 0), np.maximum(x.max(2), 0)
        scale = (high - low) / (2**bits - 1)
        zero = np.rint(-low / scale)
    q = np.clip(np.rint(x / scale[..., None]) + zero[..., None], 0, 2**bits - 1)
    return float((((q - zero[..., None]) * scale[..., None] - x) ** 2).sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32), (8, 128)])
def test_codes_are_nearest_and_scales_fitted(
    bits: Any, group: Any, symmetric: bool, tmp_path: Path
) -> None:
    source = oracle.make_model(tmp_path / "m", hidden=128, heads=8)
    result = mustafar.quantize(
        source, tmp_path / "q", bits=bits, group=group, symmetric=symmetric, threads=2
    )
    stored, made = tensors_of(source), tensors_of(tmp_path / "q")
    n = 0
    for name, tensor in stored.items():
        if "layers" not in name or tensor.ndim != 2:
            assert torch.equal(tensor, made[name]), name
            continue
        own = group
        while tensor.shape[1] % own:
            own //= 2
        if own < 32:
            assert torch.equal(tensor, made[name]), name
            continue
        n += 1
        weights = tensor.numpy()
        codes, scales, zeros = parts_of(made, name, bits)
        assert scales.shape == (len(weights), weights.shape[1] // own)
        wide, level = np.repeat(scales, own, 1), np.repeat(zeros, own, 1)
        exact = weights / wide + level
        # In f32, so that what lies within rounding of a tie may go either way.
        assert (np.abs(np.clip(exact, 0, 2**bits - 1) - codes) <= 0.5 + 1e-4).all()
        error = float(((weights_of(codes, scales, zeros) - weights) ** 2).sum())
        # Of 8 bits the fit wins little; the stored scale has 8 bits itself, the range's has 53.
        assert error < min_max_error(weights, bits, own, symmetric) * (0.96 if bits == 4 else 1.03)
    assert n == result.matrices > 0
    assert result.stored_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert result.bytes == sum(t.numel() * t.element_size() for t in made.values())


def test_weights_that_codes_hold_exactly_come_back(tmp_path: Path) -> None:
    source = oracle.make_model(tmp_path / "m", dtype=torch.bfloat16)
    tensors = tensors_of(source)
    rng = np.random.default_rng(1)
    for name, tensor in tensors.items():
        if "layers" in name and tensor.ndim == 2:
            rows, cols = tensor.shape
            q = rng.integers(0, 16, (rows, cols // 8, 8))
            q[:, :, 0], q[:, :, 1] = 0, 15  # every group spans its range
            zero = rng.integers(0, 16, (rows, 1, 1))
            scale = 2.0 ** rng.integers(-9, -3, (rows, 1, 1))
            exact = ((q - zero) * scale).reshape(rows, cols)
            tensors[name] = torch.from_numpy(exact).bfloat16()
    safetensors.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    mustafar.quantize(source, tmp_path / "q", group=32)
    back = tensors_of(dequantised(tmp_path / "q", tmp_path / "d", 4))
    for name, tensor in tensors.items():
        assert torch.equal(tensor.float(), back[name]), name


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ({"hidden": 128, "heads": 8}, {"group": 64}),
        ({"hidden": 96, "tied": True}, {"symmetric": True, "group": 64, "bits": 8}),
        ({"hidden": 96, "dtype": torch.bfloat16}, {"group": 128}),
        ({"qkv_bias": True}, {"bits": 8, "group": 32}),
        ({"family": "phi3"}, {"group": 32}),
    ],
    ids=["4 bits", "symmetric", "mixed groups", "8 bits", "fused"],
)
def test_transformers_reads_the_folder(
    layout: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = tmp_path / "m"
    if "family" in layout:
        families.save_family(source, **layout)
    else:
        oracle.make_model(source, **layout)
    mustafar.quantize(source, tmp_path / "q", **options)
    dense = oracle.load(dequantised(tmp_path / "q", tmp_path / "d", options.get("bits", 4)))
    coded = set()
    for name, parameter in dense.named_parameters():
        if f"{name}_packed" in tensors_of(tmp_path / "q"):
            coded.add(name)
            parameter.data = parameter.data.bfloat16().float()  # as compressed-tensors makes them
    assert coded
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q",
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=CompressedTensorsConfig(dequantize=True),
    ).eval()
    assert set(dict(read.named_parameters())) == set(dict(dense.named_parameters()))
    ids = list(range(3, 40))
    assert np.array_equal(oracle.logits(read, ids), oracle.logits(dense, ids))


def gptq(weights: Any, inputs: Any, scales: Any, zeros: Any, bits: int) -> NDArray[np.int64]:
    """Codes [rows, cols] as GPTQ (arXiv:2210.17323, algorithm 1) chooses them.

    Inputs come by falling energy. inputs: [tokens, cols]. scales and zeros: of every group, given.
    """
    rows, cols = weights.shape
    hessian = inputs.T.astype(np.float64) @ inputs
    order = np.argsort(-np.diag(hessian), kind="stable")
    hessian = hessian[np.ix_(order, order)] + 0.01 * np.trace(hessian) / cols * np.eye(cols)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    w = weights[:, order].astype(np.float64)
    group = cols // scales.shape[1]
    codes = np.empty((rows, cols), np.int64)
    for i, column in enumerate(order):
        scale, zero = scales[:, column // group], zeros[:, column // group]
        codes[:, column] = np.clip(np.rint(w[:, i] / scale + zero), 0, 2**bits - 1)
        off = (w[:, i] - scale * (codes[:, column] - zero)) / upper[i, i]
        w[:, i:] -= off[:, None] * upper[i, i:]
    return codes


def inputs_of(model: Any, names: list[str], pieces: list[list[int]]) -> dict[str, Any]:
    """What the modules read, [tokens of all pieces, inputs]."""
    seen: dict[str, list[Any]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen[name].append(given[0][0].detach().numpy())
        )
        for name in names
    ]
    for piece in pieces:
        oracle.logits(model, piece)
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3", "granite", "olmo2"])
def test_calibrated_codes_are_gptq_on_the_activations_of_transformers(
    family: str, tmp_path: Path
) -> None:
    source = families.save_family(tmp_path / "m", family, intermediate_size=160)
    rng = np.random.default_rng(2)
    pieces = [rng.integers(3, 320, n).tolist() for n in (190, 70)]
    result = mustafar.quantize(source, tmp_path / "q", pieces, group=32, threads=1)
    assert result.tokens == 260
    model, made = oracle.load(source), tensors_of(tmp_path / "q")
    parameters = dict(model.named_parameters())
    fused = family == "phi3"
    halves = [
        [["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"], ["o_proj"]],
        [["gate_up_proj"] if fused else ["gate_proj", "up_proj"], ["down_proj"]],
    ]
    n = 0
    for layer in range(3):
        for part, half in zip(("self_attn", "mlp"), halves, strict=True):
            named = [[f"model.layers.{layer}.{part}.{name}" for name in names] for names in half]
            inputs = inputs_of(model, [names[0] for names in named], pieces)
            for names in named:
                for name in names:
                    n += 1
                    codes, scales, zeros = parts_of(made, name + ".weight", 4)
                    weights = parameters[name + ".weight"].detach().numpy()
                    expected = gptq(weights, inputs[names[0]], scales, zeros, 4)
                    # A weight on the edge between two codes may take the other one, and what
                    # follows in its row with it.
                    assert (expected == codes).mean() > 0.98, name
            for name in (name for names in named for name in names):
                rounded = weights_of(*parts_of(made, name + ".weight", 4)).astype(np.float32)
                parameters[name + ".weight"].data = torch.from_numpy(rounded)
    assert n == result.matrices


def test_calibration_brings_logits_closer(tmp_path: Path) -> None:
    sources = sorted((Path(mustafar.__file__).parent / "reference").glob("*.py"))
    texts = [path.read_text() for path in sources[1:]]
    mustafar.quantize(DEMO, tmp_path / "p", group=64)
    result = mustafar.quantize(DEMO, tmp_path / "c", texts, group=64, max_tokens=4096, threads=1)
    assert result.tokens == 4096
    ids = mustafar.Tokenizer(DEMO).encode(sources[0].read_text())[:256]
    dense = mustafar.KVConfig.preset("dense")
    rows = {}
    for name, folder in {
        "stored": DEMO,
        "rounded": dequantised(tmp_path / "p", tmp_path / "pd", 4),
        "calibrated": dequantised(tmp_path / "c", tmp_path / "cd", 4),
        "as it is": tmp_path / "c",
    }.items():
        with mustafar.Model(folder, "cpu", "f32", 2) as model:
            logits = mustafar.Session(model, kv=dense).score_logits(ids).astype(np.float64)
        rows[name] = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    divergence = {
        name: (np.exp(rows["stored"]) * (rows["stored"] - rows[name])).sum(1).mean()
        for name in ("rounded", "calibrated")
    }
    assert divergence["calibrated"] < 0.6 * divergence["rounded"], divergence
    np.testing.assert_allclose(rows["as it is"], rows["calibrated"], rtol=0, atol=1e-4)
    # The same bytes whatever the number of threads.
    mustafar.quantize(DEMO, tmp_path / "c2", texts, group=64, max_tokens=4096, threads=2)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("c", "c2"))
    assert one == two


def test_the_reference_implementation_unpacks_the_same(tmp_path: Path) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    mustafar.quantize(DEMO, tmp_path / "q", group=64)
    tensors = tensors_of(tmp_path / "q")
    name = "model.layers.1.self_attn.k_proj.weight"
    codes, scales, zeros = parts_of(tensors, name, 4)
    shape = torch.Size(tensors[name + "_shape"].tolist())
    theirs = helpers.unpack_from_int32(tensors[name + "_packed"], 4, shape)
    assert np.array_equal(theirs.numpy() + 8, codes)
    shape = torch.Size(scales.shape)
    theirs = helpers.unpack_from_int32(tensors[name + "_zero_point"], 4, shape, packed_dim=0)
    assert np.array_equal(theirs.numpy() + 8, zeros)


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    whole = mustafar.quantize(DEMO, tmp_path / "whole")
    cut = mustafar.quantize(DEMO, tmp_path / "cut", shard_bytes=500_000)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole.bytes == cut.bytes
    one, many = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "cut")
    assert set(one) == set(many) == set(index["weight_map"])
    assert all(torch.equal(one[name], many[name]) for name in one)
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        assert all(index["weight_map"][name] == file.name for name in safetensors.load_file(file))


def test_config_and_other_files(tmp_path: Path) -> None:
    source = tmp_path / "m"
    shutil.copytree(DEMO, source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_text("weights")
    text = (source / "config.json").read_text()
    mustafar.quantize(source, tmp_path / "q" / "", bits=8, group=128, symmetric=True)
    made = tmp_path / "q"
    assert sorted(p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()) == [
        "README.md",
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in ("tokenizer.json", "generation_config.json"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((made / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads(text)
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "pack-quantized"
    assert quantization["ignore"] == ["lm_head"]
    scheme = quantization["config_groups"]["group_0"]
    assert scheme["targets"] == ["Linear"]
    assert scheme["weights"].items() >= {
        "num_bits": 8, "group_size": 128, "symmetric": True, "strategy": "group", "type": "int",
    }.items()  # fmt: skip


def test_what_can_not_be_quantised_is_refused(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").touch()
    with pytest.raises(mustafar.Error, match="there, and not an empty folder"):
        mustafar.quantize(DEMO, there)
    with pytest.raises(mustafar.Error, match="nowhere"):
        mustafar.quantize(DEMO, tmp_path / "nowhere" / "q")
    with pytest.raises(ValueError, match="bits is 3"):
        mustafar.quantize(DEMO, tmp_path / "q", bits=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group is 48"):
        mustafar.quantize(DEMO, tmp_path / "q", group=48)  # type: ignore[arg-type]
    small = oracle.make_model(tmp_path / "small", hidden=24, heads=2, head_dim=8)
    with pytest.raises(mustafar.ModelError, match="groups of 32"):
        mustafar.quantize(small, tmp_path / "q")
    mustafar.quantize(DEMO, tmp_path / "once")
    with pytest.raises(mustafar.ModelError, match="quantis"):
        mustafar.quantize(tmp_path / "once", tmp_path / "twice")
    source = oracle.make_model(tmp_path / "m")
    tensors = tensors_of(source)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    safetensors.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(mustafar.ModelError, match=r"layers\.1\.mlp\.up_proj.*finite"):
        mustafar.quantize(source, tmp_path / "q")
    with pytest.raises(ValueError, match="no token"):
        mustafar.quantize(DEMO, tmp_path / "q", [[]])
    with pytest.raises(ValueError, match="9999"):
        mustafar.quantize(DEMO, tmp_path / "q", [[1, 9999]])
    with pytest.raises(ValueError, match="max_tokens is -2"):
        mustafar.quantize(DEMO, tmp_path / "q", ["text"], max_tokens=-2)
    with pytest.raises(mustafar.TokenizerError):
        mustafar.quantize(source, tmp_path / "q", ["text"])  # a folder without tokenizer
    with pytest.raises(TypeError, match="list of texts"):
        mustafar.quantize(DEMO, tmp_path / "q", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "once", "small", "there"]


@pytest.mark.parametrize("texts", [[], ["def f(x):\n    return x\n" * 20]])
def test_stopping_leaves_nothing(texts: list[str], tmp_path: Path) -> None:
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done * 2 > total:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        mustafar.quantize(DEMO, tmp_path / "q", texts, progress=stop)
    assert len(seen) > 2 and list(tmp_path.iterdir()) == []


@needs_command
def test_command(tmp_path: Path) -> None:
    result = run("quantize", "-m", DEMO, "-o", tmp_path / "q", "--group", 32, "-t", 1)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "42 matrices of 4 bits" in result.stdout
    mustafar.quantize(DEMO, tmp_path / "p", group=32)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "p" / name).read_bytes()
    for arguments, code, message in [
        (["-o", tmp_path / "q"], 1, "not an empty folder"),
        (["-o", tmp_path / "x", "--bits", 5], 2, "--bits"),
        (["-o", tmp_path / "x", "-t", -1], 2, "-t is -1"),
        ([], 2, "--output is required"),
        (["-o", tmp_path / "x", "-m", tmp_path / "none"], 1, "none"),
    ]:
        result = run("quantize", "-m", DEMO, *arguments)
        assert (result.returncode, message in result.stderr) == (code, True), result
        assert not (tmp_path / "x").exists()
