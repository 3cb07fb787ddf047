// Decode attention for AVX2. A sparse tile is first expanded to dense rows of its own type in
// scratch that stays in the first-level cache (a table of byte shuffles, eight dims at a time),
// then one kernel per type goes over dense rows: up to four query heads at a time, f32 arithmetic
// for floats, 16-bit multiplies with 32-bit sums for integers.
#include <immintrin.h>

#include "backend/cpu/attention/decode_avx2_ints.h"
#include "backend/cpu/attention/decode_avx2_softmax.h"

namespace mustafar {
namespace {

// Lane i of the result is the sum of v[i]'s lanes.
inline __m256 sums_of_8(const __m256* v) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// scores of a tile's rows. q: prepared queries, f32 [n_queries][head_dim]; of ints int16 in the
// same places.
template <Kind kKind, int NH>
void tile_scores(const Rows& rows, int32_t n_rows, int32_t head_dim, const float* q, float* scores,
                 Prefetch& prefetch_inout) {
  constexpr int R = 8 / NH, kSteps = kKind == Kind::kInt ? 2 : 4;
  Prefetch prefetch = prefetch_inout;
  for (int32_t r = 0; r < n_rows; r += R) {
#pragma GCC unroll 8
    for (int i = 0; i < kSteps; i++) prefetch.step();
    const uint8_t* row = rows.values + r * rows.row_bytes;
    __m256 acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) acc[i] = _mm256_setzero_ps();
    if constexpr (kKind == Kind::kInt) {
      for (int32_t d = 0; d < head_dim; d += 16) {
        __m256i k[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
          k[i] = _mm256_cvtepi8_epi16(load_bytes(row + i * rows.row_bytes, d));
        }
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
          const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(
              reinterpret_cast<const int16_t*>(q + h * head_dim) + d));
#pragma GCC unroll 8
          for (int i = 0; i < R; i++) {
            add_dwords(acc[h * R + i], _mm256_madd_epi16(k[i], x));
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) acc[i] = _mm256_cvtepi32_ps(_mm256_castps_si256(acc[i]));
    } else {
      for (int32_t d = 0; d < head_dim; d += 8) {
        __m256 k[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) k[i] = load_floats<kKind>(row + i * rows.row_bytes, d);
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
          const __m256 x = _mm256_load_ps(q + h * head_dim + d);
#pragma GCC unroll 8
          for (int i = 0; i < R; i++) acc[h * R + i] = _mm256_fmadd_ps(k[i], x, acc[h * R + i]);
        }
      }
    }
    alignas(32) float sums[8];
    _mm256_store_ps(sums, sums_of_8(acc));
#pragma GCC unroll 4
    for (int h = 0; h < NH; h++) {
      for (int i = 0; i < R; i++) scores[h * kTileTokens + r + i] = sums[h * R + i];
    }
  }
  prefetch_inout = prefetch;
}

// o [NH][head_dim] = o * rescale + weights V. weights: f32 [NH][64]; ints: int16 [NH][64], times
// unit.
template <Kind kKind, int NH>
void tile_values(const Rows& rows, int32_t n_rows, int32_t head_dim, const uint8_t* weights,
                 const float* rescale, const float* unit, float* o, Prefetch prefetch) {
  for (int32_t d = 0; d < head_dim; d += 16) {
    __m256 acc[NH][2];
    for (int h = 0; h < NH; h++) {
      for (int i = 0; i < 2; i++) {
        acc[h][i] = kKind == Kind::kInt
                        ? _mm256_setzero_ps()
                        : _mm256_mul_ps(_mm256_load_ps(o + h * head_dim + d + 8 * i),
                                        _mm256_set1_ps(rescale[h]));
      }
    }
    if constexpr (kKind == Kind::kInt) {
      for (int32_t t = 0; t < n_rows; t += 2) {
        if (t % 4 == 0) prefetch.step();
        const __m128i x = load_bytes(rows.values + t * rows.row_bytes, d);
        const __m128i y = load_bytes(rows.values + (t + 1) * rows.row_bytes, d);
        const __m256i v[2] = {_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, y)),
                              _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x, y))};
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
          int32_t pair;
          __builtin_memcpy(&pair, weights + h * kTileTokens * 2 + t * 2, 4);
          const __m256i w = _mm256_set1_epi32(pair);
#pragma GCC unroll 2
          for (int i = 0; i < 2; i++) {
            add_dwords(acc[h][i], _mm256_madd_epi16(v[i], w));
          }
        }
      }
    } else {
      for (int32_t t = 0; t < n_rows; t++) {
        prefetch.step();
        const uint8_t* row = rows.values + t * rows.row_bytes;
        const __m256 v0 = load_floats<kKind>(row, d), v1 = load_floats<kKind>(row, d + 8);
#pragma GCC unroll 4
        for (int h = 0; h < NH; h++) {
          const __m256 w =
              _mm256_broadcast_ss(reinterpret_cast<const float*>(weights) + h * kTileTokens + t);
          acc[h][0] = _mm256_fmadd_ps(v0, w, acc[h][0]);
          acc[h][1] = _mm256_fmadd_ps(v1, w, acc[h][1]);
        }
      }
    }
    for (int h = 0; h < NH; h++) {
      for (int i = 0; i < 2; i++) {
        float* out = o + h * head_dim + d + 8 * i;
        if constexpr (kKind == Kind::kInt) {
          const __m256 sum = _mm256_cvtepi32_ps(_mm256_castps_si256(acc[h][i]));
          acc[h][i] =
              _mm256_fmadd_ps(sum, _mm256_set1_ps(unit[h]),
                              _mm256_mul_ps(_mm256_load_ps(out), _mm256_set1_ps(rescale[h])));
        }
        _mm256_store_ps(out, acc[h][i]);
      }
    }
  }
}

// Steps of Prefetch that the two above take.
template <Kind kKind, int NH>
constexpr int32_t score_steps(int32_t n_rows) {
  return n_rows * NH / 8 * (kKind == Kind::kInt ? 2 : 4);
}
template <Kind kKind>
constexpr int32_t value_steps(int32_t n_rows, int32_t head_dim) {
  return n_rows / (kKind == Kind::kInt ? 4 : 1) * head_dim / 16;
}

// Of a KV head; what tiles are worked on with is shared by all.
struct Work {
  float* scores;       // [4][64]
  uint8_t* weights;    // [4][64] of up to 4 bytes
  uint8_t* tiles[2];   // expanded K and V
  uint8_t* widened;    // int4 as int8
  float* queries;      // [n_queries][head_dim], scaled
  float* int_queries;  // int16 in place of floats
  float* q_unit;       // [n_queries] of int_queries, or of the bytes
  float* q_offset;     // [n_queries] of scores with coded keys
  float* weight_sum;   // [n_queries] of the values' weights times their scales
  float* o;            // [n_queries][head_dim], aligned as run.o is not
  ByteRun bytes;
  // While the output is the store's: in units of the steps, in the order of the values' bytes.
  bool of_store;
  // A coded value is (code + 1/2) * step * scale: the steps of keys go into the queries, and those
  // of values into the output once the store is done with.
  CodeChunk* chunks[2];  // K and V, [head_dim / 32]
  float* steps[2];       // [head_dim]
};

template <Weights kWeights, int NH>
void tile_weights(const DecodeRun& run, const Rows& k, const Rows& v, uint64_t seen, int32_t head,
                  const Work& work, float* rescale, float* unit) {
  for (int h = 0; h < NH; h++) {
    rescale[h] = tile_softmax<kWeights>(
        k, v, seen, work.q_unit[head + h], work.scores + h * kTileTokens,
        work.weights + h * kTileTokens * weight_bytes(kWeights), run.max[head + h],
        run.sum[head + h], unit[h], work.q_offset[head + h], work.weight_sum[head + h]);
  }
}

template <Kind kKind, int NH>
void tile_heads(const DecodeRun& run, const Rows& k, const Rows& v, int32_t n, uint64_t seen,
                int32_t head, const Work& work, Prefetch& next) {
  constexpr bool kInts = kKind == Kind::kInt;
  const int32_t n_rows = (n + 7) / 8 * 8;
  const float* q = (kInts ? work.int_queries : work.queries) + head * run.head_dim;
  next.spread(score_steps<kKind, NH>(n_rows) + value_steps<kKind>(n_rows, run.head_dim));
  tile_scores<kKind, NH>(k, n_rows, run.head_dim, q, work.scores, next);
  float rescale[NH], unit[NH];
  tile_weights<kInts ? Weights::kWords : Weights::kFloats, NH>(run, k, v, seen, head, work, rescale,
                                                               unit);
  tile_values<kKind, NH>(v, n_rows, run.head_dim, work.weights, rescale, unit,
                         work.o + head * run.head_dim, next);
}

template <Kind kKind>
void tile_queries(const DecodeRun& run, const Rows& k, const Rows& v, int32_t n, uint64_t seen,
                  const Work& work, Prefetch next) {
  for_query_groups(run.n_queries, [&]<int NH>(int32_t head) {
    tile_heads<kKind, NH>(run, k, v, n, seen, head, work, next);
    next = {};
  });
}

// One of the store's tiles by products of bytes.
template <ByteSource kSource>
void tile_bytes(const DecodeRun& run, const Rows& k, const Rows& v, uint64_t seen, const Work& work,
                Prefetch next) {
  const ByteRun& bytes = work.bytes;
  next.spread(byte_steps(run.n_queries, run.head_dim));
  arrange_values<kSource>(v, run.head_dim, work.tiles[1], next);
  for_query_groups(run.n_queries, [&]<int NH>(int32_t head) {
    const int8_t* q = bytes.q + head * run.head_dim;
    if (bytes.wide) {
      byte_scores<kSource, NH, true>(k, run.head_dim, q, bytes.bias + head, work.scores, next);
    } else {
      byte_scores<kSource, NH, false>(k, run.head_dim, q, bytes.bias + head, work.scores, next);
    }
    float rescale[NH], unit[NH];
    tile_weights<Weights::kBytes, NH>(run, k, v, seen, head, work, rescale, unit);
    byte_values<NH>(work.tiles[1], run.head_dim, work.weights, bytes.per_widen, rescale, unit,
                    work.o + head * run.head_dim, next);
    next = {};
  });
}

void prepare_queries(const DecodeRun& run, Work& work) {
  const float top_code = work.bytes.used ? kTopByte : kTopCode;
  for (int32_t h = 0; h < run.n_queries; h++) {
    const float* q = run.q + int64_t{h} * run.head_dim;
    float* out = work.queries + int64_t{h} * run.head_dim;
    float* in_ints = work.int_queries + int64_t{h} * run.head_dim;
    int16_t* codes = reinterpret_cast<int16_t*>(in_ints);
    work.q_offset[h] = work.weight_sum[h] = 0.0f;
    __m256 absmax = _mm256_setzero_ps(), probe = absmax;  // a NaN or Inf makes probe NaN
    for (int32_t d = 0; d < run.head_dim; d += 8) {
      const __m256 x = _mm256_loadu_ps(q + d);
      absmax = _mm256_max_ps(absmax, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x));
      probe = _mm256_fmadd_ps(x, _mm256_setzero_ps(), probe);
      _mm256_store_ps(out + d, _mm256_mul_ps(x, _mm256_set1_ps(run.q_scale)));
    }
    if (is_coded(run)) {
      absmax = probe = _mm256_setzero_ps();
      __m256 sum = absmax;
      for (int32_t d = 0; d < run.head_dim; d += 8) {
        const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(q + d), _mm256_load_ps(work.steps[0] + d));
        _mm256_store_ps(in_ints + d, x);
        absmax = _mm256_max_ps(absmax, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x));
        probe = _mm256_fmadd_ps(x, _mm256_setzero_ps(), probe);
        sum = _mm256_add_ps(sum, x);
      }
      work.q_offset[h] = 0.5f * run.q_scale * sum_of(sum);
      q = in_ints;  // its codes, which are narrower, go over what has been read of it
    }
    const float top = max_of(absmax);
    work.q_unit[h] = top * run.q_scale / top_code + sum_of(probe);
    const float inverse = top > 0 ? top_code / top : 0.0f;
    if (work.bytes.used) {
      byte_query(q, inverse, run.head_dim, h, work.bytes);
      continue;
    }
    for (int32_t d = 0; d < run.head_dim; d += 16) {
      const __m256i packed =
          _mm256_packs_epi32(scaled_ints(q + d, inverse), scaled_ints(q + d + 8, inverse));
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes + d),
                         _mm256_permute4x64_epi64(packed, 0xd8));
    }
  }
}

// A head's part of the scratch, before its first tile. shared: what all heads have.
Work make_work(const DecodeRun& run, const Work& shared, uint8_t*& at) {
  const int64_t query_floats = int64_t{run.n_queries} * run.head_dim;
  Work work = shared;
  work.queries = take<float>(at, query_floats);
  work.int_queries = take<float>(at, query_floats);
  work.o = take<float>(at, query_floats);
  work.q_unit = take<float>(at, run.n_queries);
  work.q_offset = take<float>(at, run.n_queries);
  work.weight_sum = take<float>(at, run.n_queries);
  for (int i = 0; i < 2 && is_coded(run); i++) {
    const CodeTable& table = i == 0 ? run.k_codes : run.v_codes;
    work.chunks[i] = take<CodeChunk>(at, run.head_dim / 32);
    work.steps[i] = take<float>(at, run.head_dim);
    make_chunks(table.widths, run.head_dim, work.chunks[i]);
    code_steps(table, run.head_dim, work.steps[i]);
  }
  work.bytes = byte_run(run, at);
  work.of_store = run.sequence->n_blocks > 0;
  prepare_queries(run, work);
  clear_softmax(run.n_queries, run.max, run.sum);
  __builtin_memset(work.o, 0, query_floats * 4);
  return work;
}

// The output as it is once all of the store's tiles are in it.
void leave_store(const DecodeRun& run, Work& work) {
  if (!work.of_store) return;
  work.of_store = false;
  for (int32_t h = 0; h < run.n_queries; h++) {
    float* o = work.o + int64_t{h} * run.head_dim;
    if (work.bytes.used && work.bytes.source == ByteSource::kNibbles) {
      for (int32_t d = 0; d < run.head_dim; d += 64) merge_even_odd(o + d);
    }
    if (!is_coded(run)) continue;
    const float half = 0.5f * work.weight_sum[h];
    for (int32_t d = 0; d < run.head_dim; d++) o[d] = (o[d] + half) * work.steps[1][d];
  }
}

void store_tile(const DecodeRun& run, int32_t tile, const Work& work, Prefetch next) {
  const uint8_t* page = run.sequence->pages[tile];
  const uint8_t *k_slot = page + run.k_offset, *v_slot = page + run.v_offset;
  const uint64_t seen = seen_rows(run, tile, kTileTokens);
  const auto expanded = [&](const SlotLayout& layout, const uint8_t* slot, uint8_t* out) {
    return slot_rows(layout, slot, run.head_dim, work.widened, out);
  };
  if (!work.bytes.used) {
    Rows k, v;
    if (is_coded(run)) {
      k = coded_rows<true>(*run.k_slot, work.chunks[0], k_slot, work.tiles[0]);
      v = coded_rows<true>(*run.v_slot, work.chunks[1], v_slot, work.tiles[1]);
    } else {
      k = expanded(*run.k_slot, k_slot, work.tiles[0]);
      v = expanded(*run.v_slot, v_slot, work.tiles[1]);
    }
    return with_kind(k.kind, [&]<Kind kKind>() {
      tile_queries<kKind>(run, k, v, kTileTokens, seen, work, next);
    });
  }
  // The second half of the keys' room has the values until they are arranged.
  uint8_t* const v_tile = work.tiles[0] + int64_t{kTileTokens} * run.head_dim;
  const auto multiply = [&]<ByteSource kSource>(const Rows& k, const Rows& v) {
    tile_bytes<kSource>(run, k, v, seen, work, next);
  };
  switch (work.bytes.source) {
    case ByteSource::kNibbles:
      return multiply.template operator()<ByteSource::kNibbles>(stored_rows(*run.k_slot, k_slot),
                                                                stored_rows(*run.v_slot, v_slot));
    case ByteSource::kCodes:
      return multiply.template operator()<ByteSource::kCodes>(
          coded_rows<false>(*run.k_slot, work.chunks[0], k_slot, work.tiles[0]),
          coded_rows<true>(*run.v_slot, work.chunks[1], v_slot, v_tile));
    case ByteSource::kSigned: {
      const Rows k = expanded(*run.k_slot, k_slot, work.tiles[0]);
      const Rows v = expanded(*run.v_slot, v_slot, v_tile);
      return multiply.template operator()<ByteSource::kSigned>(k, v);
    }
  }
}

void dense_tile_of(const DecodeRun& run, int32_t tile, const Work& work, Prefetch next) {
  const DenseTile dense = dense_tile(run, tile);
  const Rows k = dense_rows(run, dense.k, dense.n, work.tiles[0]);
  const Rows v = dense_rows(run, dense.v, dense.n, work.tiles[1]);
  const uint64_t seen = seen_rows(run, tile, dense.n);
  with_kind(k.kind,
            [&]<Kind kKind>() { tile_queries<kKind>(run, k, v, dense.n, seen, work, next); });
}

}  // namespace

void decode_runs_avx2(DecodeRuns runs) {
  const DecodeRun& first = runs[0];
  Work shared = {};
  uint8_t* at = first.scratch;
  shared.scores = take<float>(at, 4 * kTileTokens);
  shared.weights = take<uint8_t>(at, 4 * kTileTokens * 4);
  for (uint8_t*& tile : shared.tiles)
    tile = take<uint8_t>(at, int64_t{kTileTokens} * first.head_dim * 4);
  shared.widened = take<uint8_t>(at, int64_t{kTileTokens} * first.head_dim + 64);
  Work works[kMaxSpanHeads];
  for (size_t i = 0; i < runs.size(); i++) works[i] = make_work(runs[i], shared, at);

  for (int32_t tile = first.first_tile; tile < first.first_tile + first.n_tiles; tile++) {
    for (size_t i = 0; i < runs.size(); i++) {
      const bool last = i + 1 == runs.size();
      const Prefetch next = lines_of(runs[last ? 0 : i + 1], last ? tile + 1 : tile);
      if (tile < first.sequence->n_blocks) {
        store_tile(runs[i], tile, works[i], next);
      } else {
        leave_store(runs[i], works[i]);
        dense_tile_of(runs[i], tile, works[i], next);
      }
    }
  }
  for (size_t i = 0; i < runs.size(); i++) {
    leave_store(runs[i], works[i]);
    __builtin_memcpy(runs[i].o, works[i].o, int64_t{first.n_queries} * first.head_dim * 4);
  }
}

}  // namespace mustafar
