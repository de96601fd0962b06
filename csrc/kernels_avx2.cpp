#if defined(__x86_64__)
// The whole file is compiled for it, so it must not define anything that other files may define too.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define LESA_TABLE kernels_avx2
#define LESA_BYTES 32
#define LESA_F16C 1
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
