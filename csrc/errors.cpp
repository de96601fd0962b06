// The squared error of a forecast, without writing the forecast.
#include <ATen/ops/empty.h>

#include "ops.h"

namespace lesa {

Tensor forecast_errors(const Tensor& history, const Tensor& slots, const Tensor& weights, const Tensor& bias,
                       const Tensor& truth) {
  const Row row{slots, &weights, &bias};
  check_row(history, row);
  check_dtype(truth, "truth", history.scalar_type());
  TORCH_CHECK_VALUE(truth.sizes() == history.sizes().slice(1), "truth has shape ", truth.sizes(),
                    ": expected that of one feature, ", history.sizes().slice(1));
  const Tensor dense = dense_features(history), flat = truth.contiguous();
  return by_dtype(history, [&](auto example, const auto& kernels) {
    using T = decltype(example);
    const Reads<T> reads = reads_of<T>(dense, row);
    const std::vector<double> sums =
        chunked_sums(flat.numel(), ERROR_SUMS, [&](double* part, int64_t begin, int64_t end) {
          kernels.errors(part, data_of<T>(flat), reads, begin, end);
        });
    Tensor out = at::empty({ERROR_SUMS}, history.options().dtype(wide_dtype(history)));
    for (int s = 0; s < ERROR_SUMS; ++s) data_of<accumulator<T>>(out)[s] = accumulator<T>(sums[s]);
    return out;
  });
}

}  // namespace lesa
