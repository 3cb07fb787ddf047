"""The research harness of tools/: its attention, its schedule and its byte counts."""

import sys
from pathlib import Path

import numpy as np
import pytest

from mustafar import reference

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from kv_codecs.calibration import Basis, Statistics, make_basis
from kv_codecs.codec import Codec, Exact, Rows, accumulated_attention
from kv_codecs.coded import Coded, CodedSparse
from kv_codecs.model import Llama, Rope, Schedule, coded_attention, dense_attention
from kv_codecs.primitives import affine, group_mask, hadamard, symmetric
from kv_codecs.product import Channel, Integers, Pruned, ThinK
from kv_codecs.published import Gear, Kivi, Kvarn, MixedTokens, Spark
from kv_codecs.tokens import HeavyHitters, Streaming
from kv_codecs.transform import StaticBits, entropy_coded, log_scale, one_budget, water_fill

HEADS, KV_HEADS, DIM = 6, 2, 64
ROPE = Rope(10000.0, DIM)


def tensors(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(h, tokens, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS)]
    return draw[0], draw[1], draw[2]


def identity():
    eye = torch.eye(DIM).expand(1, KV_HEADS, DIM, DIM)
    zero, one = torch.zeros(1, KV_HEADS, 1, DIM), torch.ones(1, KV_HEADS, 1, DIM)
    return Basis(eye, eye, zero, one, torch.zeros(1, KV_HEADS, 4, DIM))


@pytest.mark.parametrize("sinks,window", [(0, 0), (1, 16), (4, 32), (0, 128)])
def test_attention_follows_the_schedule(sinks, window):
    """Every query is checked against a mask that is built from the rule alone."""
    tokens = 300
    q, k, v = tensors(tokens)
    coded_k, coded_v = tensors(tokens, 1)[1:]
    got = coded_attention(Schedule(sinks, window), q, k, v, coded_k, coded_v)
    expand = HEADS // KV_HEADS
    for i in (0, sinks + window + 63, sinks + window + 64, 200, 299):
        coded = 64 * max(0, (i - sinks - window) // 64)
        old = torch.zeros(tokens, dtype=torch.bool)
        old[sinks : sinks + coded] = True
        keys = torch.where(old[:, None], coded_k, k)[:, : i + 1].repeat_interleave(expand, 0)
        values = torch.where(old[:, None], coded_v, v)[:, : i + 1].repeat_interleave(expand, 0)
        weights = (q[:, i : i + 1] @ keys.transpose(1, 2) / DIM**0.5).softmax(-1)
        torch.testing.assert_close(got[:, i], (weights @ values)[:, 0], rtol=1e-4, atol=1e-5)


def test_rope_turns_back():
    k = tensors(50)[1]
    torch.testing.assert_close(ROPE(ROPE(k), inverse=True), k, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_key", [True, False])
@pytest.mark.parametrize(
    "coder,bits",
    [
        (lambda: Exact(DIM), 1024),
        (lambda: Pruned(identity(), None, 32), 64 + 512),
        (lambda: Pruned(identity(), 16, 8, 4), 64 + 128 + 16),
        (lambda: Integers(identity(), 4), 256 + 16),
        (lambda: Channel(DIM, 32), 64 + 512 + 16.5),
        (lambda: ThinK(DIM, 32), 512 + 1),
        (lambda: Kivi(DIM, 2), 192),
        (lambda: Spark(DIM, 32), 64 + 512 + 17),
        (lambda: Gear(DIM, 4, 4), 256 + 32 + 128 + 82 * 28 / 64),
        (lambda: Kvarn(DIM, 4), 256 + 32 + 16),
        (lambda: MixedTokens(DIM, 0.25, 8, 2, "channel"), 16 * 8 + 48 * 2 + 32 + 1 + 16),
        (lambda: StaticBits(identity(), 3), 192 + 16),
    ],
)
def test_bits_and_errors_of_coders(coder, bits, is_key):
    """The bits are the sum of the parts; sinks stay exact in coders of blocks; the code is near."""
    q, k, v = tensors(200)
    rows = Rows(0, is_key, q, k, v, Schedule(4, 32), ROPE)
    made = coder()
    assert made.bits == pytest.approx(bits)
    got = made(rows)
    assert got.shape == rows.x.shape
    error = ((got - rows.x)[:, 4:132].pow(2).mean() / rows.x[:, 4:132].pow(2).mean()).item()
    assert error < 0.6


def test_blocks_see_queries_of_their_own_time():
    q, k, v = tensors(250)
    rows = Rows(0, True, q, k, v, Schedule(4, 32), ROPE)
    assert rows.block_ends() == [100, 164, 228]
    torch.testing.assert_close(rows.block_queries()[0].flatten(0, 1), q[:, 68:100])
    torch.testing.assert_close(rows.unblock(rows.blocks()), k)


def test_accumulated_attention_sums_to_the_queries():
    q, k, v = tensors(150)
    rows = Rows(0, True, q, k, v, Schedule(4, 32), ROPE)
    sums = accumulated_attention(rows, [100, 150]).sum(-1)
    expected = torch.tensor([[300.0], [450.0]]).expand(2, KV_HEADS)
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-2)


def test_evicted_tokens_stay_gone():
    q, k, v = tensors(400)
    codec = HeavyHitters("h", "f", DIM, 0.25, Schedule(4, 32))
    seen = codec.visible(0, k, v, q)
    spans = codec.schedule.spans(400)
    assert codec.share(DIM) == pytest.approx(0.25)
    for earlier, later, span in zip(seen, seen[1:], spans[1:], strict=False):
        known = 4 + span[2] - 64
        assert not (later & ~earlier)[:, 4:known].any()
        assert later.sum(-1).tolist() == [round(span[2] * 0.25)] * KV_HEADS
    recent = Streaming("s", "f", DIM, 0.25, Schedule(4, 32)).visible(0, k, v, q)
    coded = spans[-1][2]
    assert recent[-1, 0].nonzero()[0].item() == 4 + coded - round(coded * 0.25)


def test_quantisers():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    exact = symmetric(x, 4)
    assert (symmetric(x, 4, search=True) - x).norm() <= (exact - x).norm()
    assert len(exact[0].unique()) <= 15
    assert len(affine(x, 2)[0].unique()) <= 4
    matrix = hadamard(64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64, dtype=torch.float64))
    mask = group_mask(x.abs(), 16, 8)
    assert mask.unflatten(-1, (16, 4)).sum(-2).tolist() == [[8] * 4] * 5
    scales = log_scale(torch.tensor([1.0, 2.0, 1e9]), 5, 4)
    assert scales.tolist() == pytest.approx([1.0, 2.0, 2**3.75])


def test_water_filling_spends_its_bits():
    sigma = torch.logspace(0, -3, 64)[None]
    bits = water_fill(sigma, 3.0)
    assert 2.9 < bits.mean().item() <= 3.0
    assert (bits[0, :-1] >= bits[0, 1:]).all()


def test_bases_are_inverse_and_sorted():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, KV_HEADS, 500, DIM, generator=generator) * torch.linspace(3, 0.1, DIM)
    root = torch.randn(1, KV_HEADS, DIM, DIM, generator=generator)
    metric = root @ root.transpose(-1, -2)
    statistics = Statistics(x, x, x, *([metric] * 6))
    for kind in ("none", "hadamard", "oscar", "klt", "balanced", "fisher"):
        basis = make_basis(statistics, True, kind, centred=True)
        product = basis.forward @ basis.backward
        assert np.allclose(product, torch.eye(DIM).expand_as(product), atol=1e-3)
        rms = basis.samples(0).pow(2).mean(1).sqrt()
        torch.testing.assert_close(rms, basis.sigma[0, :, 0], rtol=1e-3, atol=1e-3)
        if kind in ("klt", "balanced", "fisher"):
            assert (basis.sigma[..., :-1] >= basis.sigma[..., 1:] * 0.999).all()


def test_codes_of_many_bits_are_exact_in_any_basis():
    """Before RoPE and over joint heads too: what a basis does, it undoes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, KV_HEADS, 500, DIM, generator=generator)
    metric = torch.eye(DIM).expand(1, KV_HEADS, DIM, DIM)
    statistics = Statistics(x, x, x, *([metric] * 6))
    q, k, v = tensors(200)
    for options in ({}, {"before_rope": True}, {"before_rope": True, "joint": True}):
        bases = tuple(make_basis(statistics, key, "fisher", **options) for key in (True, False))
        coders = one_budget(bases, 8.0 + 5 / 64, heads=KV_HEADS if options.get("joint") else 1)
        for coder, is_key in zip(coders, (True, False), strict=True):
            rows = Rows(0, is_key, q, k, v, Schedule(), ROPE)
            assert (coder(rows) - rows.x).norm() < 0.02 * rows.x.norm()
    key, value = entropy_coded(make_pair(statistics), 4.0)
    rows = Rows(0, True, q, k, v, Schedule(), ROPE)
    key.start()
    assert (key(rows) - k).norm() < 0.2 * k.norm()
    assert 3.0 * DIM < key.bits < 6.0 * DIM


def make_pair(statistics):
    return tuple(make_basis(statistics, is_key, "fisher") for is_key in (True, False))


def test_codec_counts_dense_tokens():
    codec = Codec("c", "f", Integers(identity(), 4), Integers(identity(), 4))
    assert codec.share(DIM) == pytest.approx(34 / 128)
    assert codec.share_at(1024, DIM) == pytest.approx((960 * 34 / 128 + 64) / 1024)


def test_forward_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = Llama(tmp_path)
    ids = torch.randint(100, (200,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0].log_softmax(-1)
        got = ours.forward(ids, dense_attention)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_coded_rows_are_those_of_the_runtime():
    """Against the reference's packing, scale by scale: power 0, as profiles without weights are."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.logspace(0, -1.5, DIM)
    rows = torch.randn(64, DIM, generator=generator) * sigma
    basis = Basis(*[torch.eye(DIM).expand(1, 1, DIM, DIM)] * 2, torch.zeros(1, 1, 1, DIM),
                  sigma.expand(1, 1, 1, DIM), rows[None, None])  # fmt: skip
    coder = Coded(basis, 2.5, power=0.0)
    widths = reference.deal_widths(sigma.numpy(), 20)
    assert coder.widths.flatten().tolist() == widths.tolist() and coder.bits == 160 + 16
    packed = reference.pack_coded_block(rows.numpy(), sigma.numpy(), 2.5)
    expected = reference.unpack_coded_block(packed, sigma.numpy(), 2.5)
    got = coder(Rows(0, True, rows[None], rows[None], rows[None], Schedule(), ROPE))[0].numpy()
    same = np.isclose(got, expected, rtol=1e-4, atol=1e-6).all(1)
    assert same.mean() > 0.95  # a scale or a level on the border may be another
    for positions in ("bitmap", "index", "ideal"):
        mended = CodedSparse(basis, 2.5, weak=7, keep=2, value_bits=4, positions=positions)
        assert mended.widths.sum() < coder.widths.sum() and mended.bits <= coder.bits
