#pragma once
// libc++'s <compare> pulls <cmath> in, which wants the classes; the kernel computes nothing in floating point.
#define FP_NAN 0
#define FP_INFINITE 1
#define FP_ZERO 2
#define FP_SUBNORMAL 3
#define FP_NORMAL 4
typedef float float_t;
typedef double double_t;
