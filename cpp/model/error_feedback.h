// Rounding that makes up for itself: what a code loses is added to the inputs of its row that come
// after it, as far as they can stand in for it on the activations of a text (GPTQ: Frantar et al.
// 2022, arXiv:2210.17323). Inputs come by falling energy: those that count most are rounded while
// all others can still make up for them.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "core/thread_pool.h"
#include "format/group_codes.h"

namespace mustafar {

// What activations say of a matrix's inputs, for all matrices that read them.
class InputMoments {
 public:
  // sums: [n][n], of x^T x over the rows x of activations, of which the upper triangle is read.
  // damping: part of the mean of its diagonal that is added to all of that. Throws Error where the
  // sums are not finite.
  InputMoments(int64_t n, const float* sums, double damping, ThreadPool& pool);

  int64_t inputs() const { return n_; }
  // [n] by input: mean squares, up to one factor: how much an input counts.
  const float* energy() const { return energy_.data(); }
  // The input that is rounded as number k.
  int64_t input(int64_t k) const { return order_[k]; }
  // [k]: how far those before make up for number k. What is added to its weight for every unit that
  // the weight of number j has lost.
  const float* shares(int64_t k) const { return shares_.data() + k * n_; }

 private:
  int64_t n_;
  std::vector<int64_t> order_;
  std::vector<float> energy_;
  std::vector<float> shares_;  // [n][n], row k up to k
};

// Rounds a matrix whose inputs are those of moments. out: has the shape of stored. False where a
// weight is not finite, or no scale holds a group.
bool round_with_feedback(const Matrix& stored, const InputMoments& moments, ThreadPool& pool,
                         GroupCodes& out);

}  // namespace mustafar
