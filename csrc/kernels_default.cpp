// x86-64 without extensions, and every other processor, whose 16-byte vectors are always there.
#define LESA_TABLE kernels_default
#define LESA_BYTES 16
#define LESA_F16C 0
#include "kernels.inc"
