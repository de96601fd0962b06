// One layer of a Kolmogorov-Arnold network: y_q = sum_i base_qi silu(x_i) + scale_qi sum_m spline_qim B_m(x_i), cubic
// splines on a uniform grid.
//
// E experts, T points, I inputs, Q outputs, M spline bases.
#include <ATen/ops/empty.h>

#include <cmath>

#include "ops.h"

namespace lesa {
namespace {

// `layer` fills a table first, which pays off only if several points share it.
constexpr int64_t FEW_POINTS = 4;
constexpr int64_t GRAIN = 1 << 15;  // edges a thread should have

struct Grid {
  double low, high;
  int64_t M;
};

template <class A>
KanPoint<A> point_at(A x, const Grid& grid) {
  KanPoint<A> point = {};
  const A sigmoid = 1 / (1 + std::exp(-x));
  point.silu = x * sigmoid;
  point.silu_derivative = sigmoid * (1 + x * (1 - sigmoid));
  // The place in the cell is a small difference: in float it would keep few digits.
  const double per_unit = double(grid.M - 3) / (grid.high - grid.low);
  const double u = (double(x) - grid.low) * per_unit + 3;
  // Beyond the extended grid, and for NaN, all bases are zero.
  if (!(u >= 0 && u < double(grid.M + 3))) return point;
  const int64_t cell = int64_t(u);
  const A f = A(u - double(cell)), g = A(1 - (u - double(cell)));
  const A basis[4] = {g * g * g / 6, (3 * f * f * f - 6 * f * f + 4) / 6, (3 * g * g * g - 6 * g * g + 4) / 6,
                      f * f * f / 6};
  const A derivative[4] = {-g * g / 2, (3 * f - 4) * f / 2, (4 - 3 * g) * g / 2, f * f / 2};
  // Near the ends of the grid some of the four bases do not exist.
  point.start = std::min(std::max<int64_t>(cell - 3, 0), grid.M - 4);
  for (int64_t j = 0; j < 4; ++j) {
    const int64_t to = cell - 3 + j - point.start;
    if (to < 0 || to > 3) continue;
    point.basis[to] = basis[j];
    point.derivative[to] = derivative[j] * A(per_unit);
  }
  return point;
}

template <class A>
std::vector<KanPoint<A>> points_at(const Tensor& x, const Grid& grid) {
  std::vector<KanPoint<A>> points(x.numel());
  const A* from = data_of<A>(x);
  at::parallel_for(0, x.numel(), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) points[i] = point_at(from[i], grid);
  });
  return points;
}

template <class F>
auto by_width(const Tensor& wide, F run) {
  return wide.scalar_type() == at::kDouble ? run(double{}, kernels().kan_double) : run(float{}, kernels().kan_float);
}

Tensor widened(const Tensor& tensor) { return tensor.to(wide_dtype(tensor)).contiguous(); }

template <class A>
KanParams<A> params_of(const Tensor& base, const Tensor& spline, const Tensor& scale, int64_t e) {
  const int64_t Q = base.size(-2), I = base.size(-1), M = spline.size(-1);
  return {data_of<A>(base) + e * Q * I, data_of<A>(spline) + e * Q * I * M, data_of<A>(scale) + e * Q * I, I, Q, M};
}

// Of one layer without E, or of E layers; x is not checked.
void check_layer(const Tensor& base, const Tensor& spline, const Tensor& scale, int64_t dim, double low, double high) {
  check_floating(base, "base");
  check_floating(spline, "spline");
  check_floating(scale, "scale");
  TORCH_CHECK_VALUE(base.dim() == dim, "base has shape ", base.sizes(), ": expected ", dim,
                    " axes, the last two [Q, I]");
  TORCH_CHECK_VALUE(scale.sizes() == base.sizes(), "scale has shape ", scale.sizes(), ": expected that of base, ",
                    base.sizes());
  TORCH_CHECK_VALUE(spline.dim() == dim + 1 && spline.sizes().slice(0, dim) == base.sizes(), "spline has shape ",
                    spline.sizes(), ": expected that of base and the axis M, ", base.sizes(), " + [M]");
  TORCH_CHECK_VALUE(spline.size(-1) >= 4, "spline has ", spline.size(-1),
                    " coefficients an edge: expected 4 or more, the intervals of the grid and 3");
  TORCH_CHECK_VALUE(low < high && std::isfinite(high - low), "low=", low, ", high=", high,
                    ": expected a finite grid range from low to high");
}

void check_widths(const Tensor& x, const Tensor& base, const Tensor& spline, const Tensor& scale, const char* name) {
  check_floating(x, name);
  for (const Tensor* part : {&base, &spline, &scale})
    TORCH_CHECK_VALUE(wide_dtype(*part) == wide_dtype(x), name, " has dtype ", x.scalar_type(),
                      " and a parameter of the layer ", part->scalar_type(), ": expected Double for all or for none");
}

void check_kan(const Tensor& x, const Tensor& base, const Tensor& spline, const Tensor& scale, double low,
               double high) {
  check_layer(base, spline, scale, 3, low, high);
  check_widths(x, base, spline, scale, "x");
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(0) == base.size(0) && x.size(2) == base.size(2), "x has shape ", x.sizes(),
                    ": expected [E, T, I] with E = ", base.size(0), " and I = ", base.size(2), ", as base has");
}

// [E or 1, T, I]: what is the same for all experts is computed once.
Tensor distinct(const Tensor& x) {
  return widened(x.size(0) > 1 && x.stride(0) == 0 ? x.narrow(0, 0, 1) : x);
}

template <class A>
void layer_row(A* out, const KanPoint<A>* point, const KanParams<A>& params, const KanKernels<A>& kernels) {
  at::parallel_for(0, params.Q, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, params.I)),
                   [&](int64_t begin, int64_t end) { kernels.row(out, point, params, begin, end); });
}

}  // namespace

Tensor kan_at(const Tensor& x, const Tensor& base, const Tensor& spline, const Tensor& scale, double low, double high) {
  check_layer(base, spline, scale, 2, low, high);
  check_widths(x, base, spline, scale, "dt");
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == base.size(1), "dt, or the layer before, has shape ", x.sizes(),
                    ": expected [I] with I = ", base.size(1), ", as base has");
  const Tensor wide = widened(x), b = widened(base), s = widened(spline), c = widened(scale);
  Tensor out = at::empty({base.size(0)}, wide.options());
  by_width(wide, [&](auto example, const auto& kernels) {
    using A = decltype(example);
    const auto points = points_at<A>(wide, {low, high, s.size(-1)});
    layer_row(data_of<A>(out), points.data(), params_of<A>(b, s, c, 0), kernels);
  });
  return out;
}

Tensor kan(const Tensor& x, const Tensor& base, const Tensor& spline, const Tensor& scale, double low, double high) {
  check_kan(x, base, spline, scale, low, high);
  const Tensor wide = distinct(x), b = widened(base), s = widened(spline), c = widened(scale);
  const int64_t E = base.size(0), T = x.size(1), I = x.size(2), Q = base.size(1), M = s.size(-1);
  Tensor out = at::empty({E, T, Q}, wide.options());
  by_width(wide, [&](auto example, const auto& kernels) {
    using A = decltype(example);
    const auto points = points_at<A>(wide, {low, high, M});
    const int64_t pitch = wide.size(0) > 1 ? T * I : 0;
    A* to = data_of<A>(out);
    if (T < FEW_POINTS) {
      for (int64_t e = 0; e < E; ++e)
        for (int64_t t = 0; t < T; ++t)
          layer_row(to + (e * T + t) * Q, points.data() + e * pitch + t * I, params_of<A>(b, s, c, e), kernels);
      return;
    }
    const int64_t tiles = (Q + KAN_TILE - 1) / KAN_TILE, groups = (T + KAN_TILE - 1) / KAN_TILE;
    const int64_t edges = std::max<int64_t>(1, KAN_TILE * I * std::min(T, KAN_TILE));
    at::parallel_for(0, E * tiles * groups, std::max<int64_t>(1, GRAIN / edges), [&](int64_t begin, int64_t end) {
      std::vector<A> scratch((M + 1 + KAN_TILE) * KAN_TILE);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t e = task / (tiles * groups), first = task / groups % tiles * KAN_TILE;
        const int64_t t = task % groups * KAN_TILE;
        kernels.layer(to + (e * T + t) * Q, points.data() + e * pitch + t * I, std::min(KAN_TILE, T - t),
                      params_of<A>(b, s, c, e), first, std::min(first + KAN_TILE, Q), scratch.data());
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kan_backward(const Tensor& grad, const Tensor& x, const Tensor& base,
                                                        const Tensor& spline, const Tensor& scale, double low,
                                                        double high, bool needs_x) {
  check_kan(x, base, spline, scale, low, high);
  check_dtype(grad, "grad", wide_dtype(x));
  const int64_t E = base.size(0), T = x.size(1), I = x.size(2), Q = base.size(1), M = spline.size(-1);
  TORCH_CHECK_VALUE(grad.dim() == 3 && grad.size(0) == E && grad.size(1) == T && grad.size(2) == Q, "grad has shape ",
                    grad.sizes(), ": expected that of the layer's output, ", at::IntArrayRef({E, T, Q}));
  const Tensor wide = distinct(x), g = grad.contiguous(), b = widened(base), s = widened(spline), c = widened(scale);
  const Tensor dx = needs_x ? at::empty({E, T, I}, wide.options()) : at::empty({0}, wide.options());
  const Tensor db = at::empty(b.sizes(), b.options()), ds = at::empty(s.sizes(), s.options());
  const Tensor dc = at::empty(c.sizes(), c.options());
  by_width(wide, [&](auto example, const auto& kernels) {
    using A = decltype(example);
    const auto points = points_at<A>(wide, {low, high, M});
    const int64_t pitch = wide.size(0) > 1 ? T * I : 0;
    const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, T * Q));
    at::parallel_for(0, E * I, grain, [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(3 * (M + 1) * Q);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t e = task / I;
        const KanGrads<A> out = {needs_x ? data_of<A>(dx) + e * T * I : nullptr, data_of<A>(db) + e * Q * I,
                                 data_of<A>(ds) + e * Q * I * M, data_of<A>(dc) + e * Q * I};
        kernels.backward(out, data_of<A>(g) + e * T * Q, points.data() + e * pitch, T, params_of<A>(b, s, c, e),
                         task % I, scratch.data());
      }
    });
  });
  return {dx.to(x.scalar_type()), db.to(base.scalar_type()), ds.to(spline.scalar_type()), dc.to(scale.scalar_type())};
}

}  // namespace lesa
