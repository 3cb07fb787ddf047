"""The native packer against the numpy reference, byte for byte, and the reference against itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import DataObject, data, floats, integers, just, lists

import mustafar
from mustafar import reference

HEAD_DIMS = (8, 16, 32, 64, 80, 96, 128, 256)


def rows_of(kind: str, head_dim: int, tokens: int = 128) -> np.ndarray:
    random = np.random.default_rng(head_dim)
    x = random.standard_normal((tokens, head_dim)).astype(np.float32)
    if kind == "tied":
        x = np.round(x).astype(np.float32)
    elif kind == "zero":
        x[:] = 0
        x[1::2, ::3] = -0.0
    elif kind == "outlier":
        x[::3, 5] *= 1e4
        x[1::3] *= 1e-30
        x[2, :] = 65519.0
        x[4, 3] = 1e-45
    elif kind == "nan":
        x[random.random(x.shape) < 0.2] = np.nan
        x[random.random(x.shape) < 0.2] = np.inf
        x[random.random(x.shape) < 0.2] = -np.inf
    return x


def expected_bytes(slot: reference.Slot, x: np.ndarray, weight=None) -> np.ndarray:
    blocks = slot.stored(x).reshape(-1, 64, x.shape[-1])
    weight = None if weight is None else slot.stored(weight)
    return np.stack([reference.pack_block(slot, b, slot.masks(b, weight)) for b in blocks])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("value_dtype", reference.VALUE_DTYPES)
@pytest.mark.parametrize("kind", ["random", "tied", "zero", "outlier", "nan"])
def test_packing_equals_the_reference(kind: str, value_dtype: str, head_dim: int) -> None:
    x = rows_of(kind, head_dim)
    for pattern in ("group", "row"):
        for is_key in (True, False):
            for sparsity in (0.0, 0.3, 0.625, 0.75, 0.98):
                slot = reference.Slot(head_dim, value_dtype, sparsity, pattern, is_key)
                options = {"sparsity": sparsity, "pattern": pattern, "is_key": is_key}
                if kind == "nan" and value_dtype.startswith("int"):
                    with pytest.raises(ValueError, match="not finite"):
                        mustafar.compress(x, value_dtype=value_dtype, **options)
                    with pytest.raises(ValueError, match="not finite"):
                        expected_bytes(slot, x)
                    continue
                blocks = mustafar.compress(x, value_dtype=value_dtype, **options)
                expected = expected_bytes(slot, x)
                np.testing.assert_array_equal(blocks.data, expected)
                assert blocks.nbytes == expected.size
                unpacked = [reference.unpack_block(slot, b) for b in expected]
                np.testing.assert_array_equal(
                    blocks.decompress(),
                    slot.natural(np.concatenate([rows for rows, _ in unpacked])),
                )
                np.testing.assert_array_equal(
                    blocks.masks, slot.natural(np.concatenate([masks for _, masks in unpacked]))
                )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_ranking_weights(head_dim: int) -> None:
    x = rows_of("random", head_dim)
    weight = np.abs(rows_of("random", head_dim)[3])
    weight[0] = 0
    x[7, 0] = np.inf
    slot = reference.Slot(head_dim, "f16", 0.5)
    data = mustafar.compress(x, value_dtype="f16", weight=weight).data
    np.testing.assert_array_equal(data, expected_bytes(slot, x, weight))
    assert not np.array_equal(data, expected_bytes(slot, x))


@pytest.mark.parametrize("value_dtype", reference.VALUE_DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_ragged_masks(head_dim: int, value_dtype: str) -> None:
    x = rows_of("random", head_dim, 64)
    slot = reference.Slot(head_dim, value_dtype, 0.6, ragged=True)
    order = np.argsort(-np.abs(x), axis=0, kind="stable")
    mask = np.zeros(x.shape, dtype=bool)
    np.put_along_axis(mask, order[: slot.keep], True, axis=0)
    blocks = mustafar.compress(x, sparsity=0.6, value_dtype=value_dtype, mask=mask)
    np.testing.assert_array_equal(blocks.data[0], reference.pack_block(slot, x, mask))
    np.testing.assert_array_equal(blocks.masks, mask)
    np.testing.assert_array_equal(
        blocks.decompress(), reference.unpack_block(slot, blocks.data[0])[0]
    )
    if head_dim == 8 and value_dtype == "int4":
        return  # rounded up to whole words, the slot has room for everything
    with pytest.raises(ValueError, match="holds"):
        mustafar.compress(x, sparsity=0.9, value_dtype=value_dtype, mask=np.ones(x.shape, bool))


def test_compress_keeps_shapes_and_names_errors() -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 128, 64)).astype(np.float16)
    blocks = mustafar.compress(x, sparsity=0.5)
    assert blocks.layout.value_dtype == "f16"
    assert blocks.data.shape == (2, 3, 2, blocks.layout.slot_bytes)
    assert blocks.sparsity == 0.5
    back = mustafar.decompress(blocks)
    assert back.shape == x.shape
    np.testing.assert_array_equal(back, np.where(blocks.masks, x, 0))
    for bad in (x[..., :100, :], x[0, 0, 0], x.astype(np.int32)):
        with pytest.raises(ValueError, match="array"):
            mustafar.compress(bad)
    for options in (
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"pattern": "column"},
        {"value_dtype": "int2"},
        {"weight": np.ones(3, np.float32)},
        {"mask": np.ones(3, bool)},
    ):
        with pytest.raises(ValueError):
            mustafar.compress(x, **options)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", ["random", "tied", "zero", "outlier"])
def test_coded_packing_equals_the_reference(kind: str, head_dim: int) -> None:
    x = rows_of(kind, head_dim)
    if kind == "outlier":
        x[2, :] = 1e3
    random = np.random.default_rng(head_dim)
    sigma = np.exp(1.5 * random.standard_normal(head_dim)).astype(np.float32)
    sigma[::3] = sigma[0]
    for bits in (1.0, 2.3, 3.0, 7.0):
        blocks = mustafar.compress(x * sigma, value_dtype="coded", bits=bits, sigma=sigma)
        halves = (x * sigma).reshape(-1, 64, head_dim)
        expected = np.stack([reference.pack_coded_block(b, sigma, bits) for b in halves])
        np.testing.assert_array_equal(blocks.data, expected)
        rows = [reference.unpack_coded_block(b, sigma, bits) for b in expected]
        np.testing.assert_array_equal(blocks.decompress(), np.concatenate(rows))
        assert blocks.masks.all()


@settings(deadline=None, max_examples=60)
@given(data())
def test_any_coded_block_equals_the_reference(draw: DataObject) -> None:
    head_dim = draw.draw(integers(1, 40))
    bits = draw.draw(floats(1, 7))
    number = floats(-1e4, 1e4, width=32)
    sigma = np.array(
        draw.draw(
            lists(just(0.0) | floats(2**-20, 1e3, width=32), min_size=head_dim, max_size=head_dim)
        ),
        np.float32,
    )
    few = draw.draw(lists(number, min_size=1, max_size=3 * head_dim))
    x = np.resize(np.array(few, np.float32), (64, head_dim))
    data = mustafar.compress(x, value_dtype="coded", bits=bits, sigma=sigma).data
    np.testing.assert_array_equal(data[0], reference.pack_coded_block(x, sigma, bits))


def test_coded_errors() -> None:
    x = rows_of("random", 64)
    sigma = np.ones(64, np.float32)
    with pytest.raises(ValueError, match="needs sigma"):
        mustafar.compress(x, value_dtype="coded")
    with pytest.raises(ValueError, match="sigma goes with"):
        mustafar.compress(x, value_dtype="int8", sigma=sigma)
    with pytest.raises(ValueError, match="sigma must be 64"):
        mustafar.compress(x, value_dtype="coded", sigma=sigma[:5])
    with pytest.raises(ValueError, match="sigma must be 64"):
        mustafar.compress(x, value_dtype="coded", sigma=-sigma)
    with pytest.raises(ValueError, match="bits must be in"):
        mustafar.compress(x, value_dtype="coded", sigma=sigma, bits=7.5)
    with pytest.raises(ValueError, match="prunes nothing"):
        mustafar.compress(x, value_dtype="coded", sigma=sigma, weight=sigma)
    x[70, 3] = np.nan
    with pytest.raises(ValueError, match="row 70 is not finite"):
        mustafar.compress(x, value_dtype="coded", sigma=sigma)


def test_bf16_rounds_half_to_even() -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(2).standard_normal(10000).astype(np.float32)
    x[:4] = [np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8]
    expected = torch.tensor(x).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(reference.round_to(x, "bf16"), expected)


def test_schedule_and_exact_first_prefill() -> None:
    random = np.random.default_rng(3)
    slot = reference.Slot(32, "f32", 0.5)
    cache = reference.HeadCache(slot, slot, window=32, sink_tokens=4)
    q = random.standard_normal((180, 2, 32)).astype(np.float32)
    k, v = random.standard_normal((2, 180, 32)).astype(np.float32)
    out = cache.call(q[:150], k[:150], v[:150])
    for i in (0, 77, 149):
        np.testing.assert_allclose(out[i], reference.attend(q[i], k[: i + 1], v[: i + 1]))
    assert len(cache.blocks) == 1 and len(cache.k_dense) == 150 - 64
    for i in range(150, 180):
        keys, values = cache.rows()
        out = cache.call(q[i : i + 1], k[i : i + 1], v[i : i + 1])
        expected = reference.attend(
            q[i], np.concatenate([keys, k[i : i + 1]]), np.concatenate([values, v[i : i + 1]])
        )
        np.testing.assert_allclose(out[0], expected)
        assert len(cache.blocks) * 64 == reference.compressed_tokens(i + 1, 4, 32)
    keys, _ = cache.rows()
    np.testing.assert_array_equal(keys[:4], k[:4])
    kept = slot.natural(slot.masks(slot.stored(k[4:132])))
    np.testing.assert_array_equal(keys[4:132], np.where(kept, k[4:132], 0))
    np.testing.assert_array_equal(keys[132:], k[132:180])


@pytest.mark.parametrize("sees", [1, 20, 64, 100])
def test_a_sliding_window(sees: int) -> None:
    random = np.random.default_rng(4)
    slot = reference.Slot(32, "f32", 0.5)
    cache = reference.HeadCache(slot, slot, window=32, sink_tokens=4, sees=sees)
    q = random.standard_normal((240, 2, 32)).astype(np.float32)
    k, v = random.standard_normal((2, 240, 32)).astype(np.float32)
    out = cache.call(q[:150], k[:150], v[:150])
    for i in (0, 19, 77, 149):
        seen = slice(max(0, i + 1 - sees), i + 1)
        np.testing.assert_allclose(out[i], reference.attend(q[i], k[seen], v[seen]))
    keys, values = cache.rows()
    keys, values = np.concatenate([keys, k[150:]]), np.concatenate([values, v[150:]])
    out = cache.call(q[150:], k[150:], v[150:])
    for i in (0, 50, 89):
        seen = slice(151 + i - sees, 151 + i)
        np.testing.assert_allclose(out[i], reference.attend(q[150 + i], keys[seen], values[seen]))


def test_a_groups_members_are_dealt_round_the_row() -> None:
    slot = reference.Slot(64, "f32", 0.5)
    x = np.zeros((64, 64), np.float32)
    x[:, :32] = np.arange(1, 33)  # strong neighbours: groups of neighbours would keep half of them
    blocks = mustafar.compress(x)
    np.testing.assert_array_equal(blocks.masks, np.arange(64) < 32 + np.zeros((64, 1)))
    np.testing.assert_array_equal(blocks.decompress(), x)
    assert list(slot.order[:16]) == list(range(0, 64, 4))
    np.testing.assert_array_equal(slot.order, blocks.layout.order)
    np.testing.assert_array_equal(slot.natural(slot.stored(x)), x)
    wide = reference.Slot(128, "f32", 0.5)
    assert list(wide.order[32:35]) == [1, 5, 9]
    for flat in (reference.Slot(64, "f32", 0.5, "row"), reference.Slot(64, "f32", 0.0)):
        assert list(flat.order) == list(range(64))


def test_pages_tile() -> None:
    k, v = reference.Slot(64, "f16", 0.5), reference.Slot(64, "int8", 0.75, is_key=False)
    offsets = [
        reference.slot_offset(k, v, 2, layer, head, is_key)
        for layer in range(3)
        for head in range(2)
        for is_key in (True, False)
    ]
    sizes = np.diff([*offsets, reference.page_bytes(k, v, 3, 2)])
    np.testing.assert_array_equal(sizes, [k.slot_bytes, v.slot_bytes] * 6)
