// The numeric loops, free of torch: one table of functions for each instruction set, chosen once at run time.
//
// K window, T points, I inputs, Q outputs, M spline bases.
#pragma once

#include <cstdint>

namespace lesa {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using accumulator = typename Accumulator<T>::type;

constexpr int MAX_WINDOW = 16;

// The features that are read; entries of -1 are left out.
template <class T>
struct Reads {
  int count;
  int position[MAX_WINDOW];  // k of each read
  const T* feature[MAX_WINDOW];
  accumulator<T> weight[MAX_WINDOW];
  accumulator<T> bias;
};

template <class T>
struct LossTask {
  const T* last;
  const T* target;
  T* forecast;  // null: not wanted
  accumulator<T> alpha;
  bool l2;
};

// Behind the sums of the reads. The gradient is d|e| or d(e^2) of the error e = forecast - target.
enum Sum { SUM_GRAD, SUM_GRAD_Z, SUM_LOSS, EXTRA_SUMS };

// Of a forecast against the truth: the squared errors, and the squares of the truth.
enum ErrorSum { SUM_ERROR, SUM_TRUTH, ERROR_SUMS };

// All functions work on elements begin..end-1 of dense features.
template <class T>
struct FeatureKernels {
  void (*forecast)(T* out, const Reads<T>& reads, int64_t begin, int64_t end);
  // sums[reads.count + 1]: <grad, feature> for every read, then SUM_GRAD.
  void (*feature_sums)(double* sums, const T* grad, const Reads<T>& reads, int64_t begin, int64_t end);
  // sums[ERROR_SUMS].
  void (*errors)(double* sums, const T* truth, const Reads<T>& reads, int64_t begin, int64_t end);
  // sums[reads.count + EXTRA_SUMS].
  void (*loss)(double* sums, const LossTask<T>& task, const Reads<T>& reads, int64_t begin, int64_t end);
};

// What a KAN layer needs of one input value: the four bases start..start+3; all others are zero.
template <class A>
struct KanPoint {
  A basis[4];
  A derivative[4];  // of the bases
  A silu;
  A silu_derivative;
  int64_t start;
};

// One expert: base[Q, I], spline[Q, I, M], scale[Q, I], dense.
template <class A>
struct KanParams {
  const A* base;
  const A* spline;
  const A* scale;
  int64_t I, Q, M;
};

template <class A>
struct KanGrads {
  A* x;  // [T, I]; null: not wanted
  A* base;
  A* spline;
  A* scale;
};

constexpr int64_t KAN_TILE = 64;  // the most outputs, and the most points, that `layer` computes in one call

template <class A>
struct KanKernels {
  // out[Q] at one point[I], only outputs begin..end-1.
  void (*row)(A* out, const KanPoint<A>* point, const KanParams<A>& params, int64_t begin, int64_t end);
  // out[T, Q] at points[T, I], only outputs begin..end-1; scratch[(M + 1 + T) * KAN_TILE].
  void (*layer)(A* out, const KanPoint<A>* points, int64_t T, const KanParams<A>& params, int64_t begin, int64_t end,
                A* scratch);
  // All gradients that belong to input i, from grad[T, Q]; scratch[3 * (M + 1) * Q].
  void (*backward)(const KanGrads<A>& out, const A* grad, const KanPoint<A>* points, int64_t T,
                   const KanParams<A>& params, int64_t i, A* scratch);
};

struct Kernels {
  FeatureKernels<float> of_float;
  FeatureKernels<double> of_double;
  FeatureKernels<Float16> of_float16;
  FeatureKernels<BFloat16> of_bfloat16;
  KanKernels<float> kan_float;
  KanKernels<double> kan_double;
};

extern const Kernels kernels_default;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
#endif

}  // namespace lesa
