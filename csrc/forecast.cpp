// sum_k weights[k] * history[slots[k]] + bias, and the sums its gradients are made of.
#include <ATen/ops/empty.h>

#include "ops.h"

namespace lesa {
namespace {

int64_t row_of(const Tensor& slots, const Tensor& step) {
  check_dtype(step, "step", at::kLong);
  TORCH_CHECK_VALUE(step.numel() == 1, "step has shape ", step.sizes(), ": expected one value");
  TORCH_CHECK_VALUE(slots.dim() == 2, "slots has shape ", slots.sizes(), ": expected [T, K] with step");
  const int64_t index = *data_of<int64_t>(step);
  TORCH_CHECK_VALUE(0 <= index && index < slots.size(0), "step is ", index, ": expected 0 to ", slots.size(0) - 1,
                    ", a row of slots");
  return index;
}

void forecast_row(const Tensor& out, const Tensor& history, const Row& row) {
  by_dtype(history, [&](auto example, const auto& kernels) {
    using T = decltype(example);
    const Reads<T> reads = reads_of<T>(history, row);
    T* to = data_of<T>(out);
    for_elements(out.numel(), reads.count,
                 [&](int64_t begin, int64_t end) { kernels.forecast(to, reads, begin, end); });
  });
}

Tensor new_forecast(const Tensor& history, const Row& row) {
  check_row(history, row);
  Tensor out = new_feature(history);
  forecast_row(out, dense_features(history), row);
  return out;
}

}  // namespace

Tensor forecast(const Tensor& history, const Tensor& slots, const Tensor& weights, const Tensor& bias) {
  return new_forecast(history, {slots, &weights, &bias});
}

Tensor forecast_at(const Tensor& history, const Tensor& slots, const Tensor& weights, const Tensor& bias,
                   const Tensor& step) {
  return new_forecast(history, {slots, &weights, &bias, row_of(slots, step), true});
}

void forecast_into_(const Tensor& history, const Tensor& slots, const Tensor& weights, const Tensor& bias,
                    const Tensor& keep, const Tensor& step) {
  const Row row{slots, &weights, &bias, row_of(slots, step), true};
  check_row(history, row);
  check_dtype(keep, "keep", at::kInt);
  TORCH_CHECK_VALUE(keep.dim() == 1 && keep.numel() == slots.size(0) && keep.is_contiguous(), "keep has shape ",
                    keep.sizes(), ": expected one slot for each row of slots, ", slots.size(0), ", contiguous");
  TORCH_CHECK_VALUE(history.numel() == 0 || has_dense_features(history), "history has strides ", history.strides(),
                    ": expected contiguous features, which can be written in place; call .contiguous() on the ring");
  const int slot = data_of<int>(keep)[row.index];
  TORCH_CHECK_VALUE(slot < history.size(0), "keep[", row.index, "] is ", slot, ", but history holds ", history.size(0),
                    " features: expected less, or -1 to keep nothing");
  if (slot >= 0) forecast_row(history.select(0, slot), history, row);
}

Tensor feature_sums(const Tensor& grad, const Tensor& history, const Tensor& slots) {
  const Row row{slots};
  check_row(history, row);
  check_dtype(grad, "grad", history.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == history.sizes().slice(1), "grad has shape ", grad.sizes(),
                    ": expected that of one feature, ", history.sizes().slice(1));
  const Tensor dense = dense_features(history), flat = grad.contiguous();
  return by_dtype(history, [&](auto example, const auto& kernels) {
    using T = decltype(example);
    const Reads<T> reads = reads_of<T>(dense, row);
    const std::vector<double> sums =
        chunked_sums(flat.numel(), reads.count + 1, [&](double* part, int64_t begin, int64_t end) {
          kernels.feature_sums(part, data_of<T>(flat), reads, begin, end);
        });
    const int64_t K = window_of(row);
    Tensor out = at::empty({K + 1}, history.options().dtype(wide_dtype(history)));
    auto* to = data_of<accumulator<T>>(out);
    for (int64_t k = 0; k < K; ++k) to[k] = 0;
    for (int r = 0; r < reads.count; ++r) to[reads.position[r]] = accumulator<T>(sums[r]);
    to[K] = accumulator<T>(sums[reads.count + SUM_GRAD]);
    return out;
  });
}

}  // namespace lesa
