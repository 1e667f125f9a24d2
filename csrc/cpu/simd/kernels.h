// The table of vector kernels. Each instruction set fills one (baseline.cpp, avx2.cpp, avx512.cpp); the machine picks
// at run time, so a library built on an AVX-512 machine runs on one without. Plain pointers only: no torch type reaches
// these files, because a function compiled for AVX-512 must never be the copy of an inline function that the linker
// keeps for everybody.
#pragma once

#include <cstdint>

// Compilers whose target pragma works for whole files.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FROG_X86_KERNELS
#endif

namespace frog {

// What is to be drawn; see csrc/distributions.h.
struct DrawSpec {
  int64_t distribution;
  uint64_t seed;
  uint32_t step;
  int64_t first;               // index of the first tangent
  const int64_t* coordinates;  // [first + k] for the standard basis, else null
};

// Kernels of the pointwise family, softmax and losses, for T = float or double.
template <class T>
struct MathKernels {
  // y[j] = f(x[j]) and slope[j] = f'(x[j]); function as in POINTWISE of frog_cuda/ops/pointwise.py; y may be x
  void (*activate)(int64_t function, T alpha, T beta, const T* x, int64_t n, T* y, T* slope);
  // dy[j] = slope[j] (dx[j] + v[j]), where one of dx and v may be null and dy may be either
  void (*apply_slope)(const T* slope, const T* dx, const T* v, int64_t n, T* dy);
  // the same for slopes 0 and 1, where slope 0 gives 0 whatever the tangent
  void (*apply_mask)(const T* slope, const T* dx, const T* v, int64_t n, T* dy);
  // sums[j] += c a[j]
  void (*add_scaled)(const T* a, T c, int64_t n, T* sums);
  // p[j] = exp(x[j] - shift) / sum with shift = max x; returns the sum
  T (*softmax)(const T* x, int64_t n, T* p, T* shift);
  // out[r] = sum_j g[r * n + j] dx[r * n + j] for r < rows
  void (*dots)(const T* g, const T* dx, int64_t n, int64_t rows, T* out);
  // dy[r][j] = p[r][j] (dx[r][j] - sum_c p[r][c] dx[r][c]) for r < rows, j < n; the logarithm's lacks the first p
  void (*softmax_tangents)(const T* p, const T* dx, int64_t n, int64_t rows, T* dy);
  void (*log_softmax_tangents)(const T* p, const T* dx, int64_t n, int64_t rows, T* dy);
};

// What normalization_jvp computes, see csrc/cpu/normalization.cpp.
template <class T>
struct Normalization {
  int64_t outer, groups, inner, k;
  int64_t weight_groups, weight_inner;  // weight [weight_groups, weight_inner]
  bool centred;
  double eps;
  const T *x, *dx, *weight, *dweight, *bias, *dbias, *given_mean, *given_var;  // dx [k, outer, groups, inner] or null
  T *y, *dy, *mean, *var;                                                      // mean, var [groups]
  const uint16_t* low_dx;                                                      // dx in bfloat16, where dx is null
  uint16_t* low_dy;                                                            // dy in bfloat16, where dy is null
  int64_t numel() const { return outer * groups * inner; }
};

/// Elements of a window that lie inside of a plane: along each of three axes how many, and how far apart.
struct Window {
  int64_t counts[3], steps[3];
  int64_t place;  // of the first one
};
constexpr int64_t kPoolBytes = 64;  // of elements of planes side by side

constexpr int64_t kSignWords = 16;  // of 64 bits, that hold the signs of a group

/// Where a row of one side and a column of the other lie that meet in a product.
struct Listed {
  int64_t x, v;
};

struct SimdKernels {
  const char* name;

  // out[i * ld + j] = element start + j of tangent spec.first + i, for i < k and j < count
  void (*draw_f32)(const DrawSpec& spec, int64_t k, int64_t start, int64_t count, float* out, int64_t ld);
  void (*draw_f64)(const DrawSpec& spec, int64_t k, int64_t start, int64_t count, double* out, int64_t ld);

  // out[j] = sum_i c[i] * tangent i at start + j
  void (*combine_f32)(const DrawSpec& spec, int64_t k, const float* c, int64_t start, int64_t count, float* out);
  void (*combine_f64)(const DrawSpec& spec, int64_t k, const double* c, int64_t start, int64_t count, double* out);

  // lower triangle of gram[k, k] += v v^T for v[k, n] with row stride ld; products and sums in the type of v
  void (*gram_f32)(const float* v, int64_t k, int64_t n, int64_t ld, double* gram);
  void (*gram_f64)(const double* v, int64_t k, int64_t n, int64_t ld, double* gram);
  // the same of elements start .. start + count of Rademacher tangents; scratch [k, kSignWords]
  void (*gram_of_signs)(const DrawSpec& spec, int64_t k, int64_t start, int64_t count, uint64_t* scratch, double* gram);

  // acc[r * acc_ld + b] += sum_c v[r * v_ld + c] * xt[c * xt_ld + b] (or =, where `fresh`) for r < rows, b < width;
  // width a multiple of the vector length and at most panel width
  void (*tile_f32)(const float* xt, int64_t xt_ld, int64_t width, const float* v, int64_t v_ld, int64_t rows,
                   int64_t count, float* acc, int64_t acc_ld, bool fresh);
  void (*tile_f64)(const double* xt, int64_t xt_ld, int64_t width, const double* v, int64_t v_ld, int64_t rows,
                   int64_t count, double* acc, int64_t acc_ld, bool fresh);
  // the same of pairs that are listed: the row that starts at xt[list[c].x] meets column list[c].v of v
  void (*tile_listed_f32)(const float* xt, int64_t width, const float* v, int64_t v_ld, const Listed* list,
                          int64_t rows, int64_t count, float* acc, int64_t acc_ld, bool fresh);
  void (*tile_listed_f64)(const double* xt, int64_t width, const double* v, int64_t v_ld, const Listed* list,
                          int64_t rows, int64_t count, double* acc, int64_t acc_ld, bool fresh);
  // a panel for the tile: xt[c * width + r] = x[r * ld + c] for c < count and r < width, zeros where r >= rows
  void (*pack_f32)(const float* x, int64_t ld, int64_t rows, int64_t count, int64_t width, float* xt);
  void (*pack_f64)(const double* x, int64_t ld, int64_t rows, int64_t count, int64_t width, double* xt);
  // out[r * out_ld + b] = start[r * start_ld + b] + sum_c v[r * v_ld + c] * xt[.. c, b ..] for b < live, where width is
  // live rounded up to vectors; all in bfloat16 but `start` and the sums. Pairs of columns lie together, and a last one
  // has a zero beside it: xt[(c - c % 2) * width + 2 * b + c % 2]. Null where the instruction set has none; not for
  // machines without AVX-512 BF16, though their table be the same (bf16_products of choice.h)
  void (*tile_bf16)(const uint16_t* xt, int64_t width, const uint16_t* v, int64_t v_ld, int64_t rows, int64_t count,
                    const float* start, int64_t start_ld, int64_t live, uint16_t* out, int64_t out_ld);
  void (*pack_bf16)(const float* x, int64_t ld, int64_t rows, int64_t count, int64_t width, uint16_t* xt);
  // one step of online softmax with tangents, and the rescaling it asks for; see attention_impl.h
  void (*attend_f32)(float* scores, int64_t rows, int64_t k, int64_t count, int64_t ld, float* max, float* sum,
                     float* shift, float* correction);
  void (*attend_f64)(double* scores, int64_t rows, int64_t k, int64_t count, int64_t ld, double* max, double* sum,
                     double* shift, double* correction);
  void (*rescale_f32)(float* out, int64_t groups, int64_t rows, int64_t width, const float* correction);
  void (*rescale_f64)(double* out, int64_t groups, int64_t rows, int64_t width, const double* correction);
  // groups [from, to): statistics, values and tangents; the scratch has as many elements as the other function says
  void (*normalise_f32)(const Normalization<float>& p, int64_t from, int64_t to, float* scratch);
  void (*normalise_f64)(const Normalization<double>& p, int64_t from, int64_t to, double* scratch);
  int64_t (*normalisation_scratch_f32)(const Normalization<float>& p);
  int64_t (*normalisation_scratch_f64)(const Normalization<double>& p);
  // best and places [lanes] of a window, for as many planes as kPoolBytes hold; region [positions, lanes] begins at it
  void (*largest_f32)(const float* region, const Window& window, float* best, int32_t* places);
  void (*largest_f64)(const double* region, const Window& window, double* best, int32_t* places);
  int64_t vector_f32, vector_f64;  // elements of a vector register
  int64_t panel_f32, panel_f64;    // widest xt panel the tile kernel takes

  MathKernels<float> math_f32;
  MathKernels<double> math_f64;

  // conversions; those of IEEE half are null where the instruction set has none
  void (*widen_bf16)(const uint16_t* from, int64_t n, float* to);
  void (*narrow_bf16)(const float* from, int64_t n, uint16_t* to);
  void (*widen_f16)(const uint16_t* from, int64_t n, float* to);
  void (*narrow_f16)(const float* from, int64_t n, uint16_t* to);
};

constexpr int64_t kTileRows = 6;  // rows of v that one tile call holds in registers

const SimdKernels& baseline_kernels();
const SimdKernels* avx2_kernels();    // null where the compiler cannot build them
const SimdKernels* avx512_kernels();  // null where the compiler cannot build them

// The best table this machine can run; FROG_CUDA_SIMD=baseline|avx2|avx512 lowers the choice when the library is
// loaded.
const SimdKernels& simd();

}  // namespace frog
