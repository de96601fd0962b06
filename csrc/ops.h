// What the operators share: checks, the choice of instructions, the row of a plan.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "kernels.h"

namespace lesa {

using at::Tensor;

Tensor forecast(const Tensor& history, const Tensor& slots, const Tensor& weights, const Tensor& bias);
Tensor forecast_at(const Tensor& history, const Tensor& slots, const Tensor& weights, const Tensor& bias,
                   const Tensor& step);
void forecast_into_(const Tensor& history, const Tensor& slots, const Tensor& weights, const Tensor& bias,
                    const Tensor& keep, const Tensor& step);
Tensor feature_sums(const Tensor& grad, const Tensor& history, const Tensor& slots);
Tensor forecast_errors(const Tensor& history, const Tensor& slots, const Tensor& weights, const Tensor& bias,
                       const Tensor& truth);
Tensor kan(const Tensor& x, const Tensor& base, const Tensor& spline, const Tensor& scale, double low, double high);
std::tuple<Tensor, Tensor, Tensor, Tensor> kan_backward(const Tensor& grad, const Tensor& x, const Tensor& base,
                                                        const Tensor& spline, const Tensor& scale, double low,
                                                        double high, bool needs_x);
std::tuple<Tensor, Tensor, Tensor, Tensor> predict(const Tensor& history, const Tensor& slots, const Tensor& weights,
                                                   const Tensor& bias, const Tensor& dt,
                                                   const std::vector<Tensor>& params, double low, double high);
std::tuple<Tensor, Tensor, Tensor> predict_loss(const Tensor& history, const Tensor& slots, const Tensor& weights,
                                                const Tensor& bias, const Tensor& alpha, const Tensor& target, bool l2,
                                                bool want_forecast);

// The table for this processor; ATEN_CPU_CAPABILITY=default in the environment asks for the plain one.
const Kernels& kernels();

// Calls run(T{}, feature kernels of T) for the dtype of the features.
template <class F>
auto by_dtype(const Tensor& features, F run) {
  switch (features.scalar_type()) {
    case at::kFloat:
      return run(float{}, kernels().of_float);
    case at::kDouble:
      return run(double{}, kernels().of_double);
    case at::kHalf:
      return run(Float16{}, kernels().of_float16);
    default:
      return run(BFloat16{}, kernels().of_bfloat16);
  }
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline at::ScalarType wide_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_cpu(const Tensor& tensor, const char* name);
void check_dtype(const Tensor& tensor, const char* name, at::ScalarType expected);
void check_floating(const Tensor& tensor, const char* name);

// A new feature. A large one is put on huge pages: else its page faults would cost as much as the forecast.
Tensor new_feature(const Tensor& history);

// The ring with every feature dense, copied only if it is not.
Tensor dense_features(const Tensor& history);
bool has_dense_features(const Tensor& history);

// One row of a plan, read and checked; tensors of tables are given with the row.
struct Row {
  const Tensor& slots;
  const Tensor* weights = nullptr;  // null: ones
  const Tensor* bias = nullptr;     // null: zero
  int64_t index = 0;
  bool is_table = false;
};
int64_t window_of(const Row& row);
int slot_of(const Row& row, int64_t k, int64_t H);
double value_of(const Tensor& tensor, int64_t i);
void check_row(const Tensor& history, const Row& row);

template <class T>
Reads<T> reads_of(const Tensor& history, const Row& row) {
  Reads<T> reads;
  reads.count = 0;
  reads.bias = row.bias ? accumulator<T>(value_of(*row.bias, row.index)) : 0;
  const int64_t K = window_of(row);
  for (int64_t k = 0; k < K; ++k) {
    const int slot = slot_of(row, k, history.size(0));
    if (slot < 0) continue;
    reads.position[reads.count] = int(k);
    reads.feature[reads.count] = data_of<T>(history) + slot * history.stride(0);
    reads.weight[reads.count] = row.weights ? accumulator<T>(value_of(*row.weights, row.index * K + k)) : 1;
    ++reads.count;
  }
  return reads;
}

// Runs run(begin, end) over the elements of a feature, with enough elements for each thread.
constexpr int64_t STEP = 1024;
template <class F>
void for_elements(int64_t numel, int reads, const F& run) {
  const int64_t grain = std::max<int64_t>(4, (int64_t(1) << 17) / (reads + 1) / STEP);
  at::parallel_for(0, (numel + STEP - 1) / STEP, grain,
                   [&](int64_t begin, int64_t end) { run(begin * STEP, std::min(end * STEP, numel)); });
}

// Adds up `count` sums of chunks of a fixed size in a fixed order: the result does not depend on the threads.
constexpr int64_t CHUNK = 32768;
template <class F>
std::vector<double> chunked_sums(int64_t numel, int count, const F& run) {
  const int64_t chunks = (numel + CHUNK - 1) / CHUNK;
  std::vector<double> parts(chunks * count), sums(count, 0.0);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) run(&parts[c * count], c * CHUNK, std::min((c + 1) * CHUNK, numel));
  });
  for (int64_t c = 0; c < chunks; ++c)
    for (int s = 0; s < count; ++s) sums[s] += parts[c * count + s];
  return sums;
}

// One KAN layer at a single point, out[Q] from x[I]; both of the wide dtype.
Tensor kan_at(const Tensor& x, const Tensor& base, const Tensor& spline, const Tensor& scale, double low, double high);

}  // namespace lesa
