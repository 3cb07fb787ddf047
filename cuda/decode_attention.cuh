// The tensor-core decode kernel: one query row per sequence over compressed blocks and dense tail.
//
// Grid: x splits_per_block consecutive splits, y (chunk of query heads, KV head), z sequence; 4
// warps. A chunk is one or two sets of 4 query heads: a KV head's rows are expanded once for up to
// 8 query heads, and a larger group's next chunk finds them in the L2. Every warp takes 16 of each
// tile's 64 tokens and keeps its own online softmax; nothing is shared between warps before a
// split's end, so the loop over its tiles has no block barrier. There its partial is written and
// the softmax starts anew, while the copies of the next split's tiles go on: a partial does not
// depend on how many splits a block has. With g = lane / 4, c = lane % 4:
//   S^T = K Q^T   K rows are the A operand. A dot product ignores the order of dims, so lane (g, c)
//                 owns dims [c D/4, (c+1) D/4) of two tokens: one contiguous run of kept values
//                 each, expanded in registers. B holds a set of 4 queries in columns 0-3 and,
//                 because a query is split into two terms (2-byte or 1-byte), the second terms in
//                 columns 4-7.
//   O^T = V^T P^T lane (g, c) owns dims [g D/8, (g+1) D/8) of four tokens; S^T becomes P^T by one
//                 8 x 8 transpose, columns 4-7 holding what rounding took from columns 0-3.
// Rows are dealt to lanes so that K's fragment rows are V's: fragment row g is token row_token(g) =
// g/2 + 4 (g % 2) of the 16, row g + 8 eight later; V's four tokens are c, c + 4, c + 8, c + 12,
// free of bank conflicts in shared memory. Integer values: K codes meet int8 queries in an integer
// product; V codes become f16, exact, and their scale enters P as an exponent, so that P stays in
// [0, 1]. Compressed tiles arrive by cp.async, kStages deep per warp; the dense buffer (sinks,
// tail, the new token: a few tiles in all) is read directly. Where a layer has a window, tiles
// begin with the block and the dense row that it sees first; of that block the rows before it are
// hidden. Coded rows divide the work between warps otherwise (decode_coded.cuh).
//
// Shared: expansion table 2 KiB; the block's plan; its queries; where small stages have no room for
// them, the warps' results of a split; per warp kStages stages of 16 K rows and 16 V rows as
// stored.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/attention.h"
#include "cuda/decode_coded.cuh"
#include "cuda/decode_dense.cuh"
#include "cuda/decode_results.cuh"
#include "cuda/decode_scores.cuh"
#include "cuda/decode_softmax.cuh"
#include "cuda/decode_stages.cuh"
#include "cuda/device_ops.cuh"
#include "cuda/expand.cuh"
#include "cuda/launch.cuh"

namespace mustafar::cuda {

// kTail: kF16 or kBF16. kBits: of stored values; 16: of the tail's type. kKeepK, kKeepV: kept
// values of a 32-dim K group and a 16-dim V group at head_dim 128 when compiled in, 0: any layout;
// 32 and 16: dense slots. kQuerySets: sets of 4 query heads that a block serves.
template <DType kTailType, int kValueBits, int kHeadDim, int kKeepK, int kKeepV, int kQuerySets>
struct DecodeShape {
  static constexpr bool kCoded = false;
  static constexpr DType kTail = kTailType;
  static constexpr int kBits = kValueBits;
  static constexpr int kDim = kHeadDim;
  static constexpr int kSets = kQuerySets;
  static constexpr int kQueries = kSets * kSetQueries;
  static constexpr int kKDims = kDim / 4;  // a lane's dims of a K row
  static constexpr int kVDims = kDim / 8;  // and of a V row
  static constexpr int kKRunWords = kKeepK * kBits / 32;
  static constexpr int kVRunWords = kKeepV * kBits / 32;
  static constexpr bool kDense = kKeepK == 32;
  static constexpr bool kFixed = kKeepK != 0 && !kDense;
  // Shared memory: the table, the block's plan, the queries, the stages.
  static constexpr int kTable = kDense ? 0 : kTableBytes;
  // Stages of 2-byte dense rows leave no room for the queries: these lie in warp 0's last stage,
  // which is not filled before they have been read.
  static constexpr bool kQueriesInStage = kDense && kBits == 16;
  static constexpr int kQueriesAt = kTable + kPlanBytes;
  static constexpr int kStagesAt =
      kQueriesAt + (kQueriesInStage ? 0 : cuda::kQueryBytes<kDim, kSets>);
  // As many as registers (without spilling) and shared memory allow.
  static constexpr int kBlocksPerMultiprocessor = kDense && kBits == 16   ? (kDim == 64 ? 4 : 2)
                                                  : kSets == 1            ? (kDim == 64 ? 5 : 4)
                                                  : kDim == 64            ? 4
                                                  : kFixed || kBits != 16 ? 3
                                                                          : 2;
  // Measured on an H200: dense rows wait for memory whatever a block takes, and more than two
  // splits leave the blocks' ends too uneven.
  static constexpr int kMostBlockSplits = kDense && kBits != 4 ? 1 : 2;
  // Of a warp's 16 rows of K and V when compiled in: masks, values, scales.
  static constexpr int kStageBytes =
      16 * ((kDense ? 2 * kDim * kBits / 8 : 2 * kDim / 8 + (4 * kKRunWords + 8 * kVRunWords) * 4) +
            (kBits == 16 ? 0 : 4));
  static constexpr int kTiles = kDim / 16;  // 16-dim output tiles
};

// Attends to the store's tiles and finishes the splits that end among them. plan: lists the tiles'
// slots once the block has passed a barrier.
template <typename Shape>
__device__ void attend_store(const AttentionArgs& args, const TileRun& run, const FirstSlots& first,
                             const BlockPlan& plan, const BlockQueries<Shape>& queries,
                             uint8_t* table, uint8_t* stages, int32_t stage_bytes,
                             Softmax<Shape::kTiles> (&softmax)[Shape::kSets]) {
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane >> 2, c = lane & 3;
  const SlotLayout& k_slot = args.layout.k;
  const SlotLayout& v_slot = args.layout.v;
  const Piece k_piece =
      Shape::kFixed ? fixed_piece<Shape>(Shape::kKRunWords * 16) : piece_of(k_slot);
  const Piece v_piece =
      Shape::kFixed ? fixed_piece<Shape>(Shape::kVRunWords * 32) : piece_of(v_slot);
  if constexpr (Shape::kFixed) stage_bytes = Shape::kStageBytes;
  const StageCopier<Shape> copier({k_piece, v_piece, k_slot.values_offset, k_slot.scales_offset,
                                   k_slot.slot_bytes, v_slot.values_offset, v_slot.scales_offset,
                                   warp});
  const auto copy = [&](const uint8_t* slot, uint8_t* stage) { copier.start(slot, stage); };
  TileStream stream(run, first, plan, stages, stage_bytes, copy);

  constexpr bool kCodes = Shape::kBits != 16;
  fill_expand_table(table);  // while the first copies are under way
  queries.template split<kCodes ? 8 : 16>();
  sync_block();
  const uint8_t* const lane_table = table + lane * 4;
  constexpr float kCodeUnit = Shape::kBits == 4 ? 0.0625f : 1.0f;
  constexpr int kSteps = kCodes ? Shape::kKDims / 8 : Shape::kKDims / 4;
  uint32_t q[Shape::kSets][kSteps][2];
  float q_scale[Shape::kSets][2];  // of queries 2c % 4 and the next
#pragma unroll
  for (int set = 0; set < Shape::kSets; set++) {
    load_query<kCodes ? 8 : 16, Shape::kDim>(queries.shared, set, q[set]);
    if constexpr (kCodes) {
      load_query_scales<Shape::kDim, Shape::kSets>(queries.shared, set, kCodeUnit, q_scale[set]);
    }
  }

  // With one set of queries there are registers to keep these in; working them out again in every
  // tile costs 8 instructions.
  const int k_token = Shape::kSets == 1 ? kept(row_token(g)) : row_token(g);
  const int v_token = Shape::kSets == 1 ? kept(c) : c;
  const auto attend = [&](int32_t i) {
    const uint8_t* const k_stage = stream.next(i);
    const uint8_t* const v_stage = k_stage + k_piece.bytes();

    float scores[Shape::kSets][4];
    {
      uint32_t rows[2][kExpandedWords<Shape::kBits, Shape::kKDims>];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        expand_row<Shape::kBits, Shape::kKDims, Shape::kKRunWords>(
            k_slot, k_piece, k_stage, k_token + 8 * r, c, lane_table, 0u, rows[r]);
      }
#pragma unroll
      for (int set = 0; set < Shape::kSets; set++) {
        if constexpr (kCodes) {
          scores_int8<Shape::kKDims>(rows, q[set], scores[set]);
        } else {
          scores_2byte<Shape::kTail, Shape::kKDims>(rows, q[set], scores[set]);
        }
      }
    }
    float log_scale[2] = {0.0f, 0.0f};
    if constexpr (kCodes) {
      float k_scale[2], v_scale[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        k_scale[r] = row_scale(k_piece, k_stage, k_token + 8 * r);
        v_scale[r] = row_scale(v_piece, v_stage, k_token + 8 * r) * kCodeUnit;
      }
      scale_scores(k_scale, v_scale, q_scale, scores, log_scale);
    }

    constexpr DType kProduct = kCodes ? DType::kF16 : Shape::kTail;
    uint32_t p[Shape::kSets][2];
#pragma unroll
    for (int set = 0; set < Shape::kSets; set++) {
      update_softmax<kProduct, kCodes>(scores[set], log_scale, softmax[set], p[set],
                                       HiddenTokens{run.hidden_rows, i, row_token(g)});
    }
    uint32_t words[4][Shape::kTiles];
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const int token = v_token + 4 * t;
      if constexpr (kCodes) {
        uint32_t bytes[Shape::kVDims / 4];
        expand_row<Shape::kBits, Shape::kVDims, Shape::kVRunWords>(
            v_slot, v_piece, v_stage, token, g, lane_table, 0x80808080u, bytes);
        codes_to_f16(bytes, words[t]);
      } else {
        expand_row<Shape::kBits, Shape::kVDims, Shape::kVRunWords>(v_slot, v_piece, v_stage, token,
                                                                   g, lane_table, 0u, words[t]);
      }
    }
    add_values<kProduct, Shape::kSets>(words, p, softmax);
  };
  for_splits(plan, run.n, attend, [&](int32_t split, bool whole) {
    if (!whole) return;
    finish_split<Shape>(args, plan, split, table, stage_bytes, stream.used(), softmax);
  });
  cp_async_wait<0>();
}

// kWords words from a 16-byte boundary on.
template <int kWords>
__device__ __forceinline__ void load_run(const uint8_t* from, uint32_t (&words)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords / 4; i++) {
    const uint4 four = reinterpret_cast<const uint4*>(from)[i];
    words[4 * i] = four.x;
    words[4 * i + 1] = four.y;
    words[4 * i + 2] = four.z;
    words[4 * i + 3] = four.w;
  }
}

// Rows [first, n_rows) of the dense buffer of which this warp has 16; the rest is masked. queries:
// split in 2-byte terms.
template <typename Shape>
__device__ void attend_tail(const uint8_t* keys, const uint8_t* values, int32_t first,
                            int32_t n_rows, const uint8_t* queries,
                            Softmax<Shape::kTiles> (&softmax)[Shape::kSets]) {
  const int lane = lane_id(), g = lane >> 2, c = lane & 3;
  constexpr int64_t kRowBytes = Shape::kDim * 2;
  const auto row = [&](const uint8_t* base, int token) {
    const int32_t i = first + token < n_rows ? first + token : n_rows - 1;
    return base + i * kRowBytes;
  };
  uint32_t rows[2][Shape::kKDims / 2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    load_run(row(keys, row_token(g) + 8 * r) + c * Shape::kKDims * 2, rows[r]);
  }
  uint32_t p[Shape::kSets][2];
#pragma unroll
  for (int set = 0; set < Shape::kSets; set++) {
    if (set > 0) sync_warp();  // loads of all sets at once would take too many registers
    uint32_t q[Shape::kKDims / 4][2];
    load_query<16, Shape::kDim>(queries, set, q);
    float scores[4];
    scores_2byte<Shape::kTail, Shape::kKDims>(rows, q, scores);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (first + row_token(g) + 8 * r >= n_rows) scores[2 * r] = scores[2 * r + 1] = -INFINITY;
    }
    const float log_scale[2] = {0.0f, 0.0f};
    update_softmax<Shape::kTail, false>(scores, log_scale, softmax[set], p[set]);
  }
  uint32_t words[4][Shape::kTiles];
#pragma unroll
  for (int t = 0; t < 4; t++) {
    const uint8_t* const from = row(values, c + 4 * t);
    if constexpr (Shape::kDense) {
#pragma unroll
      for (int i = 0; i < Shape::kTiles; i++) {
        words[t][i] = *reinterpret_cast<const uint32_t*>(from + output_dim<Shape>(i, g) * 2);
      }
    } else {
      load_run(from + g * Shape::kVDims * 2, words[t]);
    }
  }
  add_values<Shape::kTail, Shape::kSets>(words, p, softmax);
}

// Blocks per multiprocessor are stated: left to choose, ptxas aims for more of them on sm_100 and
// spills registers.
template <typename Shape>
__global__ void __launch_bounds__(kDecodeWarps* kWarpSize, Shape::kBlocksPerMultiprocessor)
    decode_attention_kernel(AttentionArgs args, int32_t stage_bytes) {
  const SequenceView& s = args.sequences[blockIdx.z];
  const int32_t first_split = static_cast<int32_t>(blockIdx.x) * args.splits_per_block;
  const SeenTokens seen = seen_tokens(s, args.window);
  const int32_t n_tiles = seen.n_tiles(), n_splits = seen.n_splits();
  if (first_split >= n_splits) return;
  const int32_t row0 = s.row0;
  const int32_t splits_left = n_splits - first_split;
  const int32_t block_splits =
      splits_left < args.splits_per_block ? splits_left : args.splits_per_block;
  const auto begin_of = [&](int32_t i) { return split_begin(first_split + i, n_splits, n_tiles); };
  const int32_t begin = begin_of(0), until = begin_of(block_splits);
  const int of_block = static_cast<int>(blockIdx.y) % args.n_kv_heads;
  const int first_query = static_cast<int>(blockIdx.y) / args.n_kv_heads * Shape::kQueries;
  const int heads_per_kv = args.n_heads / args.n_kv_heads;
  const int left = heads_per_kv - first_query;
  const int n_queries = left < Shape::kQueries ? left : Shape::kQueries;
  const int first_head = of_block * heads_per_kv + first_query;

  uint8_t* const table = shared_memory();
  BlockPlan& plan = *reinterpret_cast<BlockPlan*>(table + Shape::kTable);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
  if (thread <= block_splits) plan.begins[thread] = begin_of(thread);
  if (thread == 0) {
    plan.row = row0;
    plan.first_split = first_split;
    plan.n_splits = block_splits;
    plan.kv_head = of_block;
    plan.first_head = first_head;
    plan.n_heads = n_queries;
    plan.n_blocks = seen.n_blocks;
    plan.first_row = seen.first_row;
    plan.n_rows = seen.n_rows;
  }
  const auto queries_of = [&](int32_t row, int head, int n) {
    return BlockQueries<Shape>{
        args.q + (int64_t{row} * args.n_heads + head) * Shape::kDim, n,
        table + (Shape::kQueriesInStage ? Shape::kStagesAt + (kStages - 1) * stage_bytes
                                        : Shape::kQueriesAt)};
  };
  Softmax<Shape::kTiles> softmax[Shape::kSets];
  uint8_t* const stages_of_warps = table + Shape::kStagesAt;
  uint8_t* stages = stages_of_warps + warp * (kStages * stage_bytes + kStageSlack);
  const int32_t end = until < seen.n_blocks ? until : seen.n_blocks;
  const TileRun run = {s.pages + seen.first_block + begin,
                       k_slot_offset(args.layout, args.layer, of_block),
                       end > begin ? end - begin : 0, begin == 0 ? seen.hidden_rows : 0};
  if (thread == 0) plan.run = run;
  if (run.n > 0) {
    const FirstSlots first(run);
    if (thread < run.n && thread < BlockPlan::kListed) {
      plan.slots[thread] = load_constant_pointer(run.pages + thread) + run.slot_at;
    }
    const BlockQueries<Shape> queries = queries_of(row0, first_head, n_queries);
    if constexpr (Shape::kCoded) {
      attend_coded_store<Shape>(args, s.codes, of_block, run, first, plan, queries, table);
    } else if constexpr (Shape::kDense) {
      attend_dense_store<Shape>(run, first, plan, args.layout.k.slot_bytes, queries, stages,
                                softmax, [&](int32_t split, int32_t used) {
                                  finish_split<Shape>(args, plan, split, table, Shape::kStageBytes,
                                                      used, softmax);
                                });
    } else {
      attend_store<Shape>(args, run, first, plan, queries, table, stages, stage_bytes, softmax);
    }
  }
  // The splits with tiles of the dense buffer. From here on no warp reads the queries of the store.
  // What was known before the store is read again, so that it takes no registers in the loop there;
  // so is the plan at every tile of this loop.
  sync_block();
  {
    const SequenceView& again = args.sequences[kept(static_cast<int>(blockIdx.z))];
    if (plan.begins[plan.n_splits] <= plan.n_blocks) return;
    if (thread == 0) {
      const auto rows = [&](int kind) {
        constexpr int64_t kRowBytes = Shape::kDim * 2;
        return again.dense +
               dense_offset(again, args.layer, kind, args.n_kv_heads, plan.kv_head, kRowBytes) +
               plan.first_row * kRowBytes;
      };
      plan.keys = rows(kKeys);
      plan.values = rows(kValues);
    }
    queries_of(plan.row, plan.first_head, plan.n_heads).template split<16>();
  }
  if constexpr (Shape::kFixed || Shape::kDense) stage_bytes = Shape::kStageBytes;
  sync_block();
  const BlockPlan* now = &plan;
#pragma unroll 1
  for (int32_t tile = plan.begins[0] > plan.n_blocks ? plan.begins[0] : plan.n_blocks;
       tile < now->begins[now->n_splits]; tile++) {
    now = &plan + kept(0);
    const int32_t row = (tile - now->n_blocks) * kBlockTokens + warp * kDecodeTokens;
    const int32_t n_rows = now->n_rows;
    uint8_t* const split_queries = queries_of(0, 0, 0).shared;
    if (row < n_rows) {
      if constexpr (Shape::kQueriesInStage) {
        attend_dense_tail<Shape>(now->keys, now->values, row, n_rows, split_queries, stages,
                                 softmax);
      } else {
        attend_tail<Shape>(now->keys, now->values, row, n_rows, split_queries, softmax);
      }
    }
    int32_t split = 0;
#pragma unroll 1
    while (now->begins[split + 1] <= tile) split++;
    if (now->begins[split + 1] > tile + 1) continue;
    MergingArea area = merging_area<Shape>(table, stage_bytes, stage_bytes);
    if constexpr (Shape::kCoded) {
      if (now->begins[split] < now->n_blocks) {
        area.before = reinterpret_cast<const float*>(stages_of_warps);
      }
    }
    write_partials<Shape>(args, plan, split, softmax, area);
    reset(softmax);
  }
}

template <typename Shape>
void launch_shape(const AttentionArgs& args, Stream stream) {
  const auto piece_bytes = [](const SlotLayout& slot) {
    return kDecodeTokens * (slot.mask_words * 4 + slot.row_bytes) +
           (has_scales(slot.dtype) ? kDecodeTokens * 2 : 0);
  };
  int32_t stage_bytes = piece_bytes(args.layout.k) + piece_bytes(args.layout.v);
  if constexpr (Shape::kCoded) stage_bytes = Shape::kStageBytes;
  const int64_t heads_per_kv = args.n_heads / args.n_kv_heads;
  const int64_t heads = args.n_kv_heads * ((heads_per_kv + Shape::kQueries - 1) / Shape::kQueries);
  AttentionArgs chosen = args;
  if (chosen.splits_per_block == 0) {
    const DecodeLoad load =
        args.load.n_splits > 0 ? args.load : DecodeLoad{args.n_sequences * args.max_splits, 8};
    chosen.splits_per_block = splits_per_block(
        load, args.n_sequences, heads,
        int64_t{device_properties().n_multiprocessors} * Shape::kBlocksPerMultiprocessor,
        Shape::kMostBlockSplits);
  }
  launch("decode_attention", decode_attention_kernel<Shape>,
         {(args.max_splits + chosen.splits_per_block - 1) / chosen.splits_per_block, heads,
          args.n_sequences},
         kDecodeWarps * kWarpSize,
         stages_end<Shape>(stage_bytes) + own_merging_bytes<Shape>(stage_bytes), stream, chosen,
         stage_bytes);
}

template <DType kTail, int kBits, int kDim, int kKeepK, int kKeepV>
void launch_decode(const AttentionArgs& args, Stream stream) {
  if (args.n_heads / args.n_kv_heads > kSetQueries) {
    launch_shape<DecodeShape<kTail, kBits, kDim, kKeepK, kKeepV, 2>>(args, stream);
  } else {
    launch_shape<DecodeShape<kTail, kBits, kDim, kKeepK, kKeepV, 1>>(args, stream);
  }
}

// Whether the layout is the one of a kernel that has kKeepK of 32 and kKeepV of 16 compiled in.
inline bool keeps(const AttentionArgs& args, int32_t keep_k, int32_t keep_v) {
  const SlotLayout& k = args.layout.k;
  const SlotLayout& v = args.layout.v;
  return args.head_dim == 128 && k.group == 32 && v.group == 16 && k.keep == keep_k &&
         v.keep == keep_v;
}

// kBits-wide values under a tail of kTail: the settings that are compiled in, then any other.
template <DType kTail, int kBits>
void launch_values(const AttentionArgs& args, Stream stream) {
  if (args.layout.k.dense && args.layout.v.dense) {
    if (args.head_dim == 128) return launch_decode<kTail, kBits, 128, 32, 16>(args, stream);
    return launch_decode<kTail, kBits, 64, 32, 16>(args, stream);
  }
  if constexpr (kBits != 4) {  // int4 never keeps 12 or 4: keep_of rounds up to whole words
    if (keeps(args, 12, 4)) return launch_decode<kTail, kBits, 128, 12, 4>(args, stream);
  }
  if (keeps(args, 16, 8)) return launch_decode<kTail, kBits, 128, 16, 8>(args, stream);
  if (args.head_dim == 128) {
    launch_decode<kTail, kBits, 128, 0, 0>(args, stream);
  } else {
    launch_decode<kTail, kBits, 64, 0, 0>(args, stream);
  }
}

// Integer values under either tail.
template <int kBits>
void launch_codes(const AttentionArgs& args, Stream stream) {
  if (args.tail_dtype == DType::kF16) {
    launch_values<DType::kF16, kBits>(args, stream);
  } else {
    launch_values<DType::kBF16, kBits>(args, stream);
  }
}

// The instances of one kind of values, one per source file: head_dim 64 or 128.
void decode_attention_f16(const AttentionArgs& args, Stream stream);
void decode_attention_bf16(const AttentionArgs& args, Stream stream);
void decode_attention_int8(const AttentionArgs& args, Stream stream);
void decode_attention_int4(const AttentionArgs& args, Stream stream);

// The same for coded rows; false where there is no kernel for their bits.
bool decode_attention_coded(const AttentionArgs& args, Stream stream);

}  // namespace mustafar::cuda
