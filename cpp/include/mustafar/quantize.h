// Writes a model with weights of 8 or 4 bits as a folder that transformers, vLLM and this library
// read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>

#include "mustafar/model.h"

namespace mustafar {

struct QuantizeOptions {
  int32_t bits = 4;  // of a weight: 4 or 8
  // Inputs that share a scale: 32, 64 or 128. A matrix whose inputs are no multiple of it takes the
  // next smaller one; one whose inputs are no multiple of 32 stays as it is.
  int32_t group = 32;
  bool symmetric = false;      // no zero points: fewer bytes, larger errors
  int64_t max_tokens = 16384;  // of the texts, at most; -1: all
  int32_t threads = 0;         // 0: MUSTAFAR_THREADS, or as many as cores and CPU quota allow
  // Files of weights are of so many bytes at most, unless one matrix alone is larger.
  int64_t shard_bytes = 5'000'000'000;
  // Called now and then with work done and in all; what it throws ends the work.
  std::function<void(int64_t done, int64_t total)> progress = {};
};

struct QuantizeResult {
  int64_t matrices = 0;      // that became codes
  int64_t stored_bytes = 0;  // of all tensors, as they were
  int64_t bytes = 0;         // as they are now
  int64_t tokens = 0;        // that it was calibrated on
};

// Rounds the matrices of all layers and writes a folder in the layout of compressed-tensors
// ("pack-quantized"); embedding, head, norms and biases stay as they are, and so do tokenizer and
// templates. model: a folder, or the id of a repository in the local Hugging Face cache. output: is
// not there, or an empty folder; it appears whole, once all is done.
//
// With texts, layer after layer is calibrated on what their tokens make of the layers before, which
// are rounded already: what a weight loses is made up for by others of its row as far as the texts'
// activations allow (GPTQ, arXiv:2210.17323), and scales are fitted where activations are large.
// On the CPU; the texts' activations, one layer's matrices in f32 and the moments of one matrix's
// inputs (16 bytes for every pair of inputs) are in memory. Without texts every weight goes to the
// nearest code, and a few matrices are in memory at any time.
//
// Throws ModelError for a model that can't be read, is quantised already or has weights that are
// not finite; TokenizerError for texts where it has no tokenizer; Error where output can't be
// written or activations are not finite; std::invalid_argument for an option out of range, a bad
// token id or texts without a token; OutOfMemory.
QuantizeResult quantize(const std::filesystem::path& model, const std::filesystem::path& output,
                        std::span<const Prompt> texts = {}, const QuantizeOptions& options = {});

}  // namespace mustafar
