"""Folders whose weights are quantised: matrices bit for bit as their own packages or definitions
dequantise them, logits as transformers has them with those matrices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mustafar
from mustafar import _core
from support.command import needs_command, run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from support import families, oracle
from support import quantised_folders as quantised

DENSE = mustafar.KVConfig.preset("dense")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def packed(**arguments: Any) -> Any:
    return lambda: quantised.compressed_tensors("pack-quantized", **arguments)


def plain(layout: str, **arguments: Any) -> Any:
    return lambda: quantised.compressed_tensors(layout, **arguments)


# Writer and config, the type of the model, and what is kept.
LAYOUTS: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "ct-int4": (packed(num_bits=4, group_size=32), BF16, "int4, groups of 32"),
    "ct-int4-zeros": (
        packed(num_bits=4, group_size=64, symmetric=False),
        F16,
        "int4, groups of 64, zero points",
    ),
    "ct-int4-row": (packed(num_bits=4, strategy="channel"), F32, "int4, a scale per row"),
    "ct-int4-tensor-zeros": (
        packed(num_bits=4, strategy="tensor", symmetric=False),
        BF16,
        "int4, one scale, zero points",
    ),
    "ct-int4-16": (
        packed(num_bits=4, group_size=16, symmetric=False),
        BF16,
        "int4, groups of 16, zero points: expanded to bf16",
    ),
    "ct-int8": (packed(num_bits=8, group_size=32), BF16, "int8, groups of 32"),
    "ct-int8-row-zeros": (
        packed(num_bits=8, strategy="channel", symmetric=False),
        BF16,
        "int8, a scale per row, zero points",
    ),
    "ct-plain-int8": (
        plain("int-quantized", num_bits=8, strategy="channel"),
        BF16,
        "int8, a scale per row",
    ),
    "ct-plain-int8-zeros": (
        plain("int-quantized", num_bits=8, strategy="channel", symmetric=False),
        F16,
        "int8, a scale per row, zero points",
    ),
    "ct-plain-int4": (
        plain("naive-quantized", num_bits=4, group_size=32),
        BF16,
        "int8, groups of 32",
    ),
    "ct-fp8-tensor": (
        plain("float-quantized", num_bits=8, type="float", strategy="tensor"),
        BF16,
        "fp8, one scale: expanded to bf16",
    ),
    "ct-fp8-row": (
        plain("float-quantized", num_bits=8, type="float", strategy="channel", scale_dtype=F32),
        BF16,
        "fp8, a scale per row: expanded to bf16",
    ),
    "ct-fp8-block": (
        plain(
            "float-quantized",
            num_bits=8,
            type="float",
            strategy="block",
            block_structure=[128, 128],
        ),
        BF16,
        "fp8, blocks of 128 x 128: expanded to bf16",
    ),
    "gptq": (lambda: quantised.gptq(4, 128), F16, "int4, groups of 128, zero points"),
    "gptq-zeros": (
        lambda: quantised.gptq(4, 32, sym=False),
        F16,
        "int4, groups of 32, zero points",
    ),
    "gptq-v2-zeros": (
        lambda: quantised.gptq(4, 32, sym=False, v2=True),
        BF16,
        "int4, groups of 32, zero points",
    ),
    "gptq-row": (lambda: quantised.gptq(4, -1), F16, "int4, a scale per row, zero points"),
    "gptq-int8": (
        lambda: quantised.gptq(8, 64, sym=False),
        F16,
        "int8, groups of 64, zero points",
    ),
    "gptq-desc-act": (
        lambda: quantised.gptq(4, 32, sym=False, desc_act=True),
        F16,
        "int4, groups of 32, zero points, inputs in the order of g_idx: expanded to f16",
    ),
    "awq": (lambda: quantised.awq(32), F16, "int4, groups of 32, zero points"),
    "awq-row": (lambda: quantised.awq(-1), F16, "int4, a scale per row, zero points"),
    "fp8-block": (
        lambda: quantised.fp8("block", 32),
        BF16,
        "fp8, blocks of 32 x 32: expanded to bf16",
    ),
    "fp8-block-bf16-scales": (
        lambda: quantised.fp8("block", 128, BF16),
        BF16,
        "fp8, blocks of 128 x 128: expanded to bf16",
    ),
    "fp8-row": (lambda: quantised.fp8("row"), F16, "fp8, a scale per row: expanded to f16"),
    "fp8-tensor": (lambda: quantised.fp8("tensor"), F32, "fp8, one scale: expanded to f32"),
}


def make(folder: Path, layout: str, family: str = "llama", **fields: Any) -> dict[str, Any]:
    """A small random model's folder in the layout; returns its weights as the layout has them."""
    make_writer, dtype, _ = LAYOUTS[layout]
    shape = {"intermediate_size": 192, "num_hidden_layers": 2, **fields}
    families.save_family(folder, family, dtype=dtype, **shape)
    return quantised.rewrite(folder, *make_writer())


def matrix(folder: Path, name: str) -> tuple[Any, str]:
    values, kept = _core.folder_matrix(str(folder), name)
    return torch.from_numpy(values), kept


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_matrices_are_those_of_the_layout(layout: str, tmp_path: Path) -> None:
    expected = make(tmp_path / "model", layout)
    assert len(expected) == 14
    _, dtype, description = LAYOUTS[layout]
    for name, weight in expected.items():
        ours, kept = matrix(tmp_path / "model", name)
        # The last group of 64 inputs in groups of 128 is all that there are.
        assert kept == description
        # What is kept as codes is not rounded to the scales' type; what is expanded is, once.
        rounded = ours.to(weight.dtype) if "expanded" not in kept else ours.to(dtype)
        weight = weight if "expanded" not in kept else weight.to(dtype)
        if "expanded to" in kept:
            assert torch.equal(ours, rounded.float())
        assert torch.equal(rounded, weight), name


def assert_logits(folder: Path, reference: Any, tolerance: float = 1e-4, **options: Any) -> None:
    ids = [int(x) for x in np.random.default_rng(1).integers(3, reference.config.vocab_size, 60)]
    expected = oracle.logits(reference, ids)
    with mustafar.Model(folder, device="cpu", dtype="f32", **options) as model:
        with mustafar.Session(model, DENSE) as session:
            assert np.abs(session.prefill(ids[:40]) - expected[39]).max() <= tolerance
            for i in range(40, 60):
                assert np.abs(session.decode(ids[i]) - expected[i]).max() <= tolerance


@pytest.mark.parametrize(
    "layout", ["ct-int4-zeros", "ct-plain-int8", "gptq", "gptq-desc-act", "awq", "fp8-block"]
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_logits_are_those_of_the_dequantised_folder(
    layout: str, family: str, tmp_path: Path
) -> None:
    # Phi-3's fused tensors are cut where no tile of codes ends.
    folder = tmp_path / "model"
    names = make(folder, layout, family)
    weights = {name: matrix(folder, name)[0] for name in names}
    assert_logits(folder, oracle.load(quantised.dense_copy(folder, tmp_path / "dense", weights)))


@pytest.mark.parametrize("layout", ["ct-int4-row", "ct-int4", "ct-plain-int8-zeros"])
def test_logits_are_those_of_transformers_on_the_same_folder(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_writer, _, _ = LAYOUTS[layout]
    # In f32, so that transformers rounds nothing either.
    families.save_family(folder, "llama", intermediate_size=192, num_hidden_layers=2)
    quantised.rewrite(folder, *make_writer())
    config = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=F32, attn_implementation="eager", quantization_config=config
    )
    assert_logits(folder, theirs.eval())


def test_fp8_matrices_are_those_of_transformers(tmp_path: Path) -> None:
    make(tmp_path / "model", "fp8-block")
    tensors = safetensors.load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    theirs = Fp8Dequantize(None)._dequantize_one(
        tensors[name], tensors[name + "_scale_inv"], output_dtype=BF16
    )
    assert torch.equal(matrix(tmp_path / "model", name)[0], theirs.float())


def test_awq_matrices_are_those_of_compressed_tensors(tmp_path: Path) -> None:
    make(tmp_path / "model", "awq")
    module = "model.layers.0.self_attn.k_proj"
    tensors = {
        name: tensor
        for name, tensor in safetensors.load_file(tmp_path / "model" / "model.safetensors").items()
        if name.startswith(module)
    }
    made = AutoAWQConverter(group_size=32).process(tensors)
    shape = made[module + ".weight_shape"]
    codes = unpack_from_int32(made[module + ".weight_packed"], 4, shape)
    scales = made[module + ".weight_scale"]
    zeros = unpack_from_int32(
        made[module + ".weight_zero_point"], 4, torch.Size((shape[0], scales.shape[1])), 0
    )
    weight = (codes - zeros.repeat_interleave(32, 1)) * scales.float().repeat_interleave(32, 1)
    assert torch.equal(matrix(tmp_path / "model", module + ".weight")[0], weight)


def test_head_and_embedding_may_be_quantised(tmp_path: Path) -> None:
    for layout, tied in [("gptq-zeros", False), ("ct-int8", False), ("ct-plain-int8", True)]:
        make_writer, dtype, _ = LAYOUTS[layout]
        folder = tmp_path / layout
        families.save_family(
            folder,
            "llama",
            dtype=dtype,
            intermediate_size=192,
            num_hidden_layers=2,
            tie_word_embeddings=tied,
        )
        head = "embed_tokens.weight" if tied else "lm_head.weight"
        names = quantised.rewrite(
            folder, *make_writer(), matrices=lambda n, h=head: n.endswith((h, "proj.weight"))
        )
        assert any(name.endswith(head) for name in names)
        weights = {name: matrix(folder, name)[0] for name in names}
        dense = quantised.dense_copy(folder, tmp_path / f"{layout}-dense", weights)
        assert_logits(folder, oracle.load(dense))


def test_some_matrices_may_stay_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    families.save_family(folder, "llama", intermediate_size=192, num_hidden_layers=2, dtype=BF16)
    writer, config = quantised.compressed_tensors("pack-quantized", num_bits=4, group_size=32)
    wide, other = quantised.compressed_tensors("float-quantized", num_bits=8, type="float")
    config["format"] = "mixed-precision"
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    config["config_groups"]["group_1"] = other["config_groups"]["group_0"]
    # Activations stay in the arithmetic's type, whatever the config says of them.
    config["config_groups"]["group_1"]["input_activations"] = {"num_bits": 8, "type": "float"}
    quantised.rewrite(
        folder,
        wide,
        config,
        matrices=lambda name: name.endswith("down_proj.weight"),
        extra=lambda module, weight: {"input_scale": torch.ones(1)},
    )
    quantised.rewrite(
        folder,
        writer,
        config,
        matrices=lambda name: name.endswith("proj.weight") and "down" not in name and ".1." in name,
    )
    assert matrix_kind(folder, "model.layers.0.mlp.down_proj.weight").startswith("fp8")
    assert matrix_kind(folder, "model.layers.1.mlp.up_proj.weight") == "int4, groups of 32"
    assert matrix_kind(folder, "model.layers.0.mlp.up_proj.weight") == ""
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    names += [name for name in _names(folder) if ".1." in name and "down" not in name]
    weights = {name: matrix(folder, name)[0] for name in names}
    assert_logits(folder, oracle.load(quantised.dense_copy(folder, tmp_path / "dense", weights)))


def matrix_kind(folder: Path, name: str) -> str:
    return _core.folder_matrix(str(folder), name)[1]


def _names(folder: Path) -> list[str]:
    tensors = safetensors.load_file(folder / "model.safetensors")
    return [n.removesuffix("_packed") for n in tensors if n.endswith("weight_packed")]


def test_an_index_of_compressed_tensors(tmp_path: Path) -> None:
    # Which older versions of the package wrote, and the pinned one no longer reads.
    folder = tmp_path / "model"
    families.save_family(folder, "llama", intermediate_size=192, num_hidden_layers=1, dtype=F16)
    writer, config = quantised.compressed_tensors("pack-quantized", num_bits=4, group_size=32)
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"

    def shuffled(weight: Any) -> Any:
        order = torch.from_numpy(
            np.random.default_rng(weight.shape[1]).permutation(weight.shape[1])
        )
        stored, made = writer(weight[:, order])
        codes = quantised.to_words  # packs along the first axis
        values = (made.float() / stored["weight_scale"].float().repeat_interleave(32, 1)).round()
        unshuffled, weights = torch.empty_like(values), torch.empty_like(made)
        unshuffled[:, order], weights[:, order] = values, made
        stored["weight_packed"] = codes(unshuffled.long().numpy().T + 8, 4).T
        stored["weight_g_idx"] = torch.empty(len(order), dtype=torch.int32)
        stored["weight_g_idx"][order] = torch.arange(len(order), dtype=torch.int32) // 32
        return stored, weights

    for name, weight in quantised.rewrite(folder, shuffled, config).items():
        ours, kept = matrix(folder, name)
        assert kept.endswith("inputs in the order of g_idx: expanded to f16")
        assert torch.equal(ours, weight.float())


CT = {"config_groups": {}, "quant_method": "compressed-tensors"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def groups(**changes: Any) -> dict[str, Any]:
    return {**CT, "config_groups": {"g": {"weights": {**WEIGHTS, **changes}}}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method.*compressed-tensors, gptq, awq or fp8"),
        ({"load_in_4bit": True}, "quant_method.*found nothing"),
        ({**CT, "format": "nvfp4-pack-quantized"}, "format.*nvfp4"),
        ({**CT, "format": "dense"}, "format"),
        ({**CT, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format"),
        ({**CT, "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"quant_method": "compressed-tensors"}, "config_groups.*missing"),
        ({**CT, "config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16.*an object"),
        ({**CT, "config_groups": {"g": {"output_activations": {}}}}, "g.output_activations"),
        (groups(num_bits=3), "weights.num_bits.*4 or 8, found 3"),
        (groups(num_bits=4, type="float"), "weights.num_bits.*expected 8, found 4"),
        (groups(type="posit"), "weights.type"),
        (groups(strategy="tensor_group"), "weights.strategy"),
        (groups(num_bits=8, type="float", symmetric=False), "weights.symmetric"),
        (groups(strategy="block", block_structure=[128]), "block_structure"),
        ({"quant_method": "gptq"}, "bits"),
        ({"quant_method": "gptq", "bits": 3}, "bits.*4 or 8, found 3"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin_format"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
        ({"quant_method": "awq", "bits": 8}, "bits.*expected 4"),
        ({"quant_method": "awq", "version": "gemv"}, "version.*gemv"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size"),
    ],
)
def test_what_is_not_read_is_named(config: Any, message: str, tmp_path: Path) -> None:
    families.save_family(tmp_path, "llama", num_hidden_layers=1)
    families.change_config(tmp_path, quantization_config=config)
    with pytest.raises(
        mustafar.ModelError, match=r'config.json: "quantization_config\..*' + message
    ):
        mustafar.Model(tmp_path, device="cpu")


Change = Callable[[dict[str, Any], str], Any]


def drop(suffix: str) -> Change:
    return lambda tensors, module: tensors.pop(f"{module}.{suffix}")


def put(suffix: str, change: Callable[[Any], Any]) -> Change:
    def apply(tensors: dict[str, Any], module: str) -> None:
        name = f"{module}.{suffix}"
        tensors[name] = change(tensors.get(name)).contiguous()

    return apply


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("ct-int4", drop("weight_scale"), r'weight_scale" is missing'),
        ("ct-int4", drop("weight_shape"), r'weight_shape" is missing'),
        (
            "ct-int4",
            put("weight_packed", lambda t: t[:-1]),
            r"weight_packed.*\[192, 8\].*\[191, 8\]",
        ),
        ("ct-int4", put("weight_packed", lambda t: t.long()), "weight_packed.*expected dtype I32"),
        ("ct-int4", put("weight_shape", lambda t: t + 1), "weight_shape.*192, 64, found 193, 65"),
        ("ct-int4", put("weight_shape", lambda t: t.float()), "weight_shape"),
        ("ct-int4", put("weight_scale", lambda t: t[:, :1]), r"weight_scale.*\[192, 2\]"),
        ("ct-int4", put("weight_scale", lambda t: t.double()), "weight_scale.*F64"),
        (
            "ct-int4",
            put("weight_g_idx", lambda _: torch.full((64,), 2, dtype=torch.int32)),
            "group 2",
        ),
        ("ct-int4", put("weight", lambda _: torch.zeros(192, 64)), "is not part of the model"),
        ("ct-int4-zeros", drop("weight_zero_point"), r'weight_zero_point" is missing'),
        (
            "ct-int4-zeros",
            put("weight_zero_point", lambda t: t[1:]),
            r"weight_zero_point.*\[24, 1\]",
        ),
        ("ct-plain-int8", put("weight", lambda t: t[:, :-1]), r"weight\".*\[192, 64\]"),
        ("ct-plain-int8", put("weight", lambda t: t.to(torch.float8_e4m3fn)), "holds fp8"),
        ("ct-fp8-row", put("weight", lambda t: t.to(torch.int8)), "holds integers"),
        ("ct-fp8-row", put("weight", lambda t: t.to(torch.float8_e5m2)), "F8_E5M2"),
        ("fp8-block", drop("weight_scale_inv"), r'weight_scale_inv" is missing'),
        ("fp8-block", put("weight_scale_inv", lambda t: t[:, :1]), r"weight_scale_inv.*\[6, 2\]"),
        ("gptq-zeros", drop("scales"), r'scales" is missing'),
        ("gptq-zeros", put("qweight", lambda t: t[:-1]), r"qweight.*\[8, 192\].*\[7, 192\]"),
        ("gptq-zeros", put("qzeros", lambda t: t.T), r"qzeros.*\[2, 24\]"),
        ("gptq-zeros", put("scales", lambda t: t.T), r"scales.*\[2, 192\]"),
        ("gptq-zeros", put("g_idx", lambda t: t - 1), "g_idx.*input 0 is in group -1"),
        ("gptq-desc-act", drop("g_idx"), r'g_idx" is missing'),
        ("gptq-zeros", put("bias", lambda _: torch.ones(192)), "bias.*is not part of the model"),
        ("awq", put("qweight", lambda t: t.T), r"qweight.*\[64, 24\]"),
        ("awq", put("g_idx", lambda _: torch.zeros(64)), "is not part of the model"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    layout: str, change: Change, message: str, tmp_path: Path
) -> None:
    make(tmp_path, layout, num_hidden_layers=1)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.load_file(path)
    change(tensors, "model.layers.0.mlp.up_proj")
    safetensors.save_file(tensors, path)
    with pytest.raises(mustafar.ModelError, match=r"model.layers.0.mlp.up_proj[\s\S]*" + message):
        mustafar.Model(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        ("ct-int4", ..., 'proj.weight_packed": config.json has no "quantization_config"'),
        ("gptq", ..., 'proj.qweight": config.json has no "quantization_config"'),
        ("fp8-block", ..., "proj.weight.* found F8_E4M3"),
        ("awq", CT, 'proj.qweight": is none of the method compressed-tensors'),
        ("ct-int4", {"quant_method": "awq"}, 'proj.weight_packed": is none of the method awq'),
    ],
)
def test_tensors_need_their_config(layout: str, config: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path, layout, num_hidden_layers=1)
    families.change_config(tmp_path, quantization_config=config)
    with pytest.raises(mustafar.ModelError, match=message):
        mustafar.Model(tmp_path, device="cpu")


def test_biases_of_zeros_are_none(tmp_path: Path) -> None:
    writer, config = quantised.gptq(4, 64)
    folder = tmp_path / "model"
    families.save_family(folder, "llama", intermediate_size=192, num_hidden_layers=1, dtype=F16)
    names = quantised.rewrite(
        folder, writer, config, extra=lambda module, w: {"bias": torch.zeros(len(w), dtype=F16)}
    )
    weights = {name: matrix(folder, name)[0] for name in names}
    assert_logits(folder, oracle.load(quantised.dense_copy(folder, tmp_path / "dense", weights)))


def test_devices_are_chosen_as_for_other_folders(tmp_path: Path) -> None:
    make(tmp_path, "gptq")

    def device_or_refusal(device: str, folder: Path | None) -> str:
        try:
            with mustafar.Model(folder, device=device) as model:
                return model.device
        except mustafar.DeviceError as error:
            return str(error)

    for device in ("auto", "cuda"):
        assert device_or_refusal(device, tmp_path) == device_or_refusal(device, None)


def test_weights_of_another_type(tmp_path: Path) -> None:
    folder = tmp_path / "int4"
    make(folder, "gptq")
    with pytest.raises(ValueError, match="weights is .*must be auto: .*quantised already .int4"):
        mustafar.Model(folder, device="cpu", weights="int8")
    # What is expanded is rounded as if it had been stored so.
    for layout in ("fp8-block", "gptq-desc-act"):
        folder = tmp_path / layout
        names = make(folder, layout)
        weights = {name: matrix(folder, name)[0] for name in names}
        dense = quantised.dense_copy(folder, tmp_path / f"{layout}-dense", weights)
        ids = list(range(3, 40))
        logits = []
        for path in (folder, dense):
            with mustafar.Model(path, device="cpu", dtype="f32", weights="int8") as model:
                assert model.weights == "int8:32"
                with mustafar.Session(model, DENSE) as session:
                    logits.append(np.array(session.prefill(ids)))
        assert np.array_equal(logits[0], logits[1])


def test_memory_fingerprints_and_states(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    names = make(folder, "ct-int4")
    weights = {name: matrix(folder, name)[0] for name in names}
    dense = quantised.dense_copy(folder, tmp_path / "dense", weights)
    seen: list[tuple[int, int]] = []
    with (
        mustafar.Model(folder, device="cpu", progress=lambda *at: seen.append(at)) as model,
        mustafar.Model(dense, device="cpu") as other,
    ):
        assert model.weights == "auto" and model.dtype == "bf16"
        assert model.memory().weights_bytes < other.memory().weights_bytes
        assert model.fingerprint != other.fingerprint
        with mustafar.Session(model) as session:
            session.prefill(list(range(3, 20)))
            session.save(tmp_path / "state")
        with mustafar.Session.load(model, tmp_path / "state") as session:
            assert session.position == 17
        with pytest.raises(mustafar.StateError):
            mustafar.Session.load(other, tmp_path / "state")
    done = [at for at, _ in seen]
    assert done == sorted(done) and seen[-1][0] == seen[-1][1]


def test_the_config_makes_another_model_of_the_same_tensors(tmp_path: Path) -> None:
    make(tmp_path, "gptq-zeros")
    fingerprints = set()
    for version in ("gptq", "gptq_v2"):
        config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        families.change_config(
            tmp_path, quantization_config={**config, "checkpoint_format": version}
        )
        with mustafar.Model(tmp_path, device="cpu") as model:
            fingerprints.add(model.fingerprint)
    assert len(fingerprints) == 2


def test_default_arithmetic(tmp_path: Path) -> None:
    """Activations rounded to integers beside codes, as beside weights rounded on loading."""
    for layout in ("ct-int4-zeros", "gptq-int8", "awq"):
        folder = tmp_path / layout
        names = make(folder, layout)
        weights = {name: matrix(folder, name)[0] for name in names}
        reference = oracle.load(quantised.dense_copy(folder, tmp_path / f"{layout}-d", weights))
        ids = list(range(3, 40))
        expected = oracle.logits(reference, ids)[-1]
        with mustafar.Model(folder, device="cpu") as model:
            with mustafar.Session(model, DENSE) as session:
                session.prefill(ids[:-4])
                for token in ids[-4:]:
                    logits = np.array(session.decode(token))
        assert oracle.nmse(logits, expected) < (3e-3 if "8" not in layout else 3e-4)


def test_shards(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(whole, "awq")
    shutil.copytree(whole, parts)
    (parts / "model.safetensors").unlink()
    tensors = safetensors.load_file(whole / "model.safetensors")
    index: dict[str, str] = {}
    for i, name in enumerate(sorted(tensors)):  # a module's tensors in different files
        index[name] = f"model-{i % 2}.safetensors"
    for file in set(index.values()):
        some = {name: t for name, t in tensors.items() if index[name] == file}
        safetensors.save_file(some, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with mustafar.Model(whole, device="cpu") as a, mustafar.Model(parts, device="cpu") as b:
        assert a.fingerprint == b.fingerprint


@needs_command
def test_info_says_what_becomes_of_the_matrices(tmp_path: Path) -> None:
    make(tmp_path, "gptq-desc-act")
    info = json.loads(run("info", "-m", tmp_path, "--json", "--tensors", "--device", "cpu").stdout)
    assert info["quantised"] == {
        "method": "gptq",
        "matrices": {LAYOUTS["gptq-desc-act"][2]: 14},
    }
    assert set(info["tensor_bytes"]) == {"f16", "int4"}
    names = {tensor["name"] for tensor in info["tensors"]}
    assert "model.layers.0.mlp.up_proj.qweight" in names and len(names) == info["n_tensors"]
    text = run("info", "-m", tmp_path, "--device", "cpu").stdout
    assert "quantised  gptq, 14 x int4, groups of 32, zero points" in text
