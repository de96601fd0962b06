// The live predictor, F_last + alpha z with z = sum_k w_k F_k + b and alpha = KAN(dt), and its loss with all gradients.
#include <ATen/ops/empty.h>

#include "ops.h"

namespace lesa {
namespace {

template <class T>
const T* last_feature(const Tensor& history, const Row& row) {
  const int slot = slot_of(row, window_of(row) - 1, history.size(0));
  TORCH_CHECK_VALUE(slot >= 0, "slots ends with ", slot,
                    ": expected the slot of the newest feature, which is added to");
  return data_of<T>(history) + slot * history.stride(0);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> predict(const Tensor& history, const Tensor& slots, const Tensor& weights,
                                                   const Tensor& bias, const Tensor& dt,
                                                   const std::vector<Tensor>& params, double low, double high) {
  const Row row{slots, &weights, &bias};
  check_row(history, row);
  TORCH_CHECK_VALUE(params.size() == 9, "params has ", params.size(),
                    " tensors: expected 9, base, spline and scale of three layers");
  TORCH_CHECK_VALUE(params[6].dim() == 2 && params[6].size(0) == 1, "params[6], the last layer's base, has shape ",
                    params[6].sizes(), ": expected [1, I], one output");
  const Tensor hidden1 = kan_at(dt, params[0], params[1], params[2], low, high);
  const Tensor hidden2 = kan_at(hidden1, params[3], params[4], params[5], low, high);
  const Tensor alpha = kan_at(hidden2, params[6], params[7], params[8], low, high);
  const Tensor dense = dense_features(history);
  Tensor out = new_feature(history);
  by_dtype(dense, [&](auto example, const auto& kernels) {
    using T = decltype(example);
    Reads<T> reads = reads_of<T>(dense, row);
    last_feature<T>(dense, row);
    // F_last + alpha (sum_k w_k F_k + b) is itself a row of weights and a bias.
    const double a = value_of(alpha, 0);
    for (int r = 0; r < reads.count; ++r) reads.weight[r] = accumulator<T>(a * reads.weight[r]);
    reads.weight[reads.count - 1] = accumulator<T>(1 + a * value_of(weights, window_of(row) - 1));
    reads.bias = accumulator<T>(a * reads.bias);
    T* to = data_of<T>(out);
    for_elements(out.numel(), reads.count,
                 [&](int64_t begin, int64_t end) { kernels.forecast(to, reads, begin, end); });
  });
  return {out, alpha.squeeze(0), hidden1, hidden2};
}

std::tuple<Tensor, Tensor, Tensor> predict_loss(const Tensor& history, const Tensor& slots, const Tensor& weights,
                                                const Tensor& bias, const Tensor& alpha, const Tensor& target, bool l2,
                                                bool want_forecast) {
  const Row row{slots, &weights, &bias};
  check_row(history, row);
  check_dtype(alpha, "alpha", wide_dtype(history));
  TORCH_CHECK_VALUE(alpha.numel() == 1, "alpha has shape ", alpha.sizes(), ": expected one value");
  check_dtype(target, "target", history.scalar_type());
  TORCH_CHECK_VALUE(target.sizes() == history.sizes().slice(1), "target has shape ", target.sizes(),
                    ": expected that of one feature, ", history.sizes().slice(1));
  const Tensor dense = dense_features(history), truth = target.contiguous();
  const auto wide = history.options().dtype(wide_dtype(history));
  Tensor out = want_forecast ? new_feature(history) : at::empty({0}, history.options());
  Tensor value = at::empty({}, wide), grads = at::empty({window_of(row) + 2}, wide);
  by_dtype(dense, [&](auto example, const auto& kernels) {
    using T = decltype(example);
    using A = accumulator<T>;
    const Reads<T> reads = reads_of<T>(dense, row);
    const double a = value_of(alpha, 0);
    const LossTask<T> task = {last_feature<T>(dense, row), data_of<T>(truth), want_forecast ? data_of<T>(out) : nullptr,
                              A(a), l2};
    const std::vector<double> sums =
        chunked_sums(truth.numel(), reads.count + EXTRA_SUMS, [&](double* part, int64_t begin, int64_t end) {
          kernels.loss(part, task, reads, begin, end);
        });
    const double mean = 1.0 / double(std::max<int64_t>(1, truth.numel()));
    const double* extra = sums.data() + reads.count;
    *data_of<A>(value) = A(extra[SUM_LOSS] * mean);
    A* to = data_of<A>(grads);
    const int64_t K = window_of(row);
    for (int64_t k = 0; k < K; ++k) to[k] = 0;
    for (int r = 0; r < reads.count; ++r) to[reads.position[r]] = A(a * sums[r] * mean);
    to[K] = A(a * extra[SUM_GRAD] * mean);
    to[K + 1] = A(extra[SUM_GRAD_Z] * mean);
  });
  return {value, out, grads};
}

}  // namespace lesa
