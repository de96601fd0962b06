#include "ops.h"

#include <ATen/Version.h>
#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lesa {
namespace {

constexpr int64_t HUGE_PAGE = int64_t(1) << 21;
constexpr int64_t LARGE = 4 * HUGE_PAGE;

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  static const bool is_plain = capability == "DEFAULT" || capability == "NO AVX";
  static const bool has_all =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has_all && !is_plain) return kernels_avx2;
#endif
  return kernels_default;
}

void check_cpu(const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.layout() == at::kStrided, name, " is a ", tensor.layout(),
                    " tensor on ", tensor.device(), ", but history or x is on the CPU: expected dense tensors on one "
                    "device; move it with .to('cpu')");
}

void check_dtype(const Tensor& tensor, const char* name, at::ScalarType expected) {
  check_cpu(tensor, name);
  TORCH_CHECK_VALUE(tensor.scalar_type() == expected, name, " has dtype ", tensor.scalar_type(), ": expected ",
                    expected, "; convert it with ", name, ".to(torch.", c10::getDtypeNames(expected).first, ")");
}

void check_floating(const Tensor& tensor, const char* name) {
  check_cpu(tensor, name);
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, name,
                    " has dtype ", dtype, ": expected Float, Double, Half or BFloat16; convert it with .to()");
}

Tensor new_feature(const Tensor& history) {
  Tensor out = at::empty(history.sizes().slice(1), history.options());
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto begin = (reinterpret_cast<intptr_t>(out.data_ptr()) + HUGE_PAGE - 1) & -HUGE_PAGE;
  const auto end = (reinterpret_cast<intptr_t>(out.data_ptr()) + int64_t(out.nbytes())) & -HUGE_PAGE;
  // This is advice only: if it is refused, pages are small.
  if (end - begin >= LARGE) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

bool has_dense_features(const Tensor& history) {
  int64_t expected = 1;
  for (int64_t d = history.dim() - 1; d > 0; --d) {
    if (history.size(d) != 1 && history.stride(d) != expected) return false;
    expected *= history.size(d);
  }
  return true;
}

Tensor dense_features(const Tensor& history) {
  return history.numel() == 0 || has_dense_features(history) ? history : history.contiguous();
}

int64_t window_of(const Row& row) { return row.slots.size(-1); }

int slot_of(const Row& row, int64_t k, int64_t H) {
  const int slot = data_of<int>(row.slots)[row.index * window_of(row) + k];
  TORCH_CHECK_VALUE(slot < H, "slots[", k, "] is ", slot, ", but history holds ", H, " features: expected less than ",
                    H, ", or -1 for an entry that is not used");
  return slot;
}

double value_of(const Tensor& tensor, int64_t i) {
  return tensor.scalar_type() == at::kDouble ? data_of<double>(tensor)[i] : data_of<float>(tensor)[i];
}

void check_row(const Tensor& history, const Row& row) {
  check_floating(history, "history");
  TORCH_CHECK_VALUE(history.dim() >= 1, "history has no axis of slots: expected [H, ...]");
  check_dtype(row.slots, "slots", at::kInt);
  TORCH_CHECK_VALUE(row.slots.dim() == (row.is_table ? 2 : 1) && row.slots.is_contiguous(), "slots has shape ",
                    row.slots.sizes(), " and strides ", row.slots.strides(), ": expected contiguous ",
                    row.is_table ? "[T, K]" : "[K]");
  const int64_t K = window_of(row), rows = row.is_table ? row.slots.size(0) : 1;
  TORCH_CHECK_VALUE(1 <= K && K <= MAX_WINDOW, "slots has a window of ", K, ": expected 1 to ", MAX_WINDOW);
  if (row.weights) {
    check_dtype(*row.weights, "weights", wide_dtype(history));
    TORCH_CHECK_VALUE(row.weights->sizes() == row.slots.sizes() && row.weights->is_contiguous(), "weights has shape ",
                      row.weights->sizes(), " and strides ", row.weights->strides(), ": expected the shape of slots, ",
                      row.slots.sizes(), ", contiguous");
  }
  if (row.bias) {
    check_dtype(*row.bias, "bias", wide_dtype(history));
    TORCH_CHECK_VALUE(row.bias->numel() == rows && row.bias->dim() <= 1 && row.bias->is_contiguous(),
                      "bias has shape ", row.bias->sizes(), ": expected one value for each row of slots, ", rows,
                      ", contiguous");
  }
}

}  // namespace lesa
