// The steps of backend.h as kernels see them (sequence_view.h).
#pragma once

#include "backend/backend.h"
#include "cuda/sequence_view.h"

namespace mustafar::cuda {

inline SequenceView view_of(const SequenceStep& step) {
  SequenceView view;
  view.row0 = step.row0;
  view.n_rows = step.n_rows;
  view.pos0 = step.pos0;
  view.pages = step.pages;
  view.dense = static_cast<uint8_t*>(step.dense);
  view.fresh = static_cast<uint8_t*>(step.fresh);
  view.n_blocks = step.n_blocks;
  view.dense_capacity = step.dense_capacity;
  view.dense_tokens = step.dense_tokens;
  view.n_sinks = step.n_sinks;
  view.fresh_capacity = step.fresh_capacity;
  view.fresh_pos0 = step.fresh_pos0;
  if (step.transform != nullptr) {
    view.k_forward = step.transform->k_forward;
    view.k_backward = step.transform->k_backward;
    view.v_forward = step.transform->v_forward;
    view.v_backward = step.transform->v_backward;
    view.k_weight = step.transform->k_weight;
    view.v_weight = step.transform->v_weight;
    view.k_groups = step.transform->k_groups;
    view.v_groups = step.transform->v_groups;
  }
  if (step.codes != nullptr) view.codes = *step.codes;
  view.query_magnitude = step.query_magnitude;
  view.query_window = step.query_window;
  return view;
}

inline CommitView view_of(const CommitStep& step) {
  CommitView view;
  view.sequence = view_of(*step.sequence);
  view.new_pages = step.new_pages;
  view.dense_out = static_cast<uint8_t*>(step.dense_out);
  view.dense_out_capacity = step.dense_out_capacity;
  view.dense_tokens = step.dense_tokens;
  view.fresh_tokens = step.fresh_tokens;
  view.n_new_blocks = step.n_new_blocks;
  view.end_pos = step.end_pos;
  view.k_policy = step.k_policy;
  view.v_policy = step.v_policy;
  return view;
}

}  // namespace mustafar::cuda
