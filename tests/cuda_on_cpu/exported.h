// How tests/cuda_on_cpu/<stem>.cpp hands launches to Python: pointers, then int64_t, then double arguments, in that
// order.
#pragma once

#define EXPORTED(name) extern "C" __attribute__((visibility("default"))) void name
