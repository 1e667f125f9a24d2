// linear_jvp: y = act(x W^T + b) and k tangents dy_i = act'(.) (dx_i W^T + x dW_i^T + db_i + v_i).
//
// Incoming tangents fold k into the batch: the weight is read and packed once for the primal and all tangents, and sums
// start from bias, activity tangents and what tangents of low rank add (product.h). Few rows without tangents, and
// machines without vector kernels, take the library's GEMM. y and dy are allocated next to each other for the next
// layer's sake.
//
// bfloat16 tangents of a float32 layer are multiplied as such where the machine has fast instructions for it, by a tile
// of their own or by the library (simd/choice.h): both sum in float32 and round, the tile once, the library before and
// after what is added. Elsewhere they are widened, multiplied and narrowed some rows at a time, in cache.
//
// Sampled weight tangents never exist as a whole. Floor per tangent and weight element: one draw and B fused
// multiply-adds. A thread takes rows of W, draws k tangents of six rows into second-level cache, and multiplies them
// with x, which is packed once into panels [in, rows of x] so that every vector instruction works on 16 (AVX-512) rows
// of x.
#include "../arguments/linear.h"
#include "blocks.h"
#include "linear_addends.h"
#include "pointwise.h"
#include "product.h"
#include "simd/choice.h"

namespace frog {
namespace {

constexpr const char* kOp = "linear_jvp";
constexpr int64_t kDrawnBytes = 512 * 1024;      // tangents drawn at a time, in second-level cache
constexpr int64_t kSumsBytes = 4 * 1024 * 1024;  // running sums over all of x; more rows of x are done in batches
constexpr int64_t kColumns = 128;   // columns of x between two loads of the sums; x panel stays in first-level cache
constexpr int64_t kGramRun = 2048;  // elements that are summed in T before they enter the double sums
constexpr int64_t kStretchElements = int64_t{1} << 20;  // of tangents that are widened at a time
// bytes of bfloat16 products that wait for what is added to them; at least so many rows, as each product packs the
// weight
constexpr int64_t kStretchBytes = 4 << 20, kFewestRows = 1024;
constexpr int64_t kDeepest = 4096;            // rows of a bfloat16 panel, half of a second-level cache
constexpr int64_t kExactGramElements = 4096;  // below this, tangents can be nearly dependent: products in double

// x [rows, in] as panels [in, width]: the last panel is as wide as whole vectors need and padded with zeros.
template <class T>
struct Panels {
  int64_t rows, in, panel, vector;
  Scratch<T> data;

  Panels(const T* x, int64_t rows_, int64_t in_)
      : rows(rows_),
        in(in_),
        panel(panel_width<T>()),
        vector(vector_width<T>()),
        data(ceil_div(rows, vector) * vector * in) {
    torch::stable::parallel_for(0, count(), 1, [&](int64_t a, int64_t b) {
      for (int64_t p = a; p < b; ++p) {
        pack(x + p * panel * in, in, std::min(panel, rows - p * panel), in, width(p), data.data() + p * panel * in);
      }
    });
  }
  int64_t count() const { return ceil_div(rows, panel); }
  int64_t width(int64_t p) const { return std::min(panel, ceil_div(rows - p * panel, vector) * vector); }
  const T* at(int64_t p) const { return data.data() + p * panel * in; }
};

// drawn [k, n] with row stride ld, added to gram [k, k] in runs
template <class T>
void add_gram(const T* drawn, int64_t k, int64_t n, int64_t ld, double* partial) {
  for (int64_t at = 0; at < n; at += kGramRun) gram(drawn + at, k, std::min(kGramRun, n - at), ld, partial);
}

// The rows of W cut into tasks, the same ones whatever the number of threads, so that the Gram's partial sums are, too.
struct Tasks {
  int64_t out, count;

  explicit Tasks(int64_t out_) : out(out_) {
    // a multiple of 8, at least 16: threads get equal shares; of at most 48 rows, so that sums stay in cache
    const int64_t wanted = std::max<int64_t>(16, 8 * ceil_div(out, 8 * 48));
    count = std::min(wanted, ceil_div(out, kTileRows));
  }
  int64_t begin(int64_t task) const {
    const bool strips = count == ceil_div(out, kTileRows);
    return std::min(out, strips ? task * kTileRows : out * task / count / 2 * 2 + (task == count ? out % 2 : 0));
  }
};

// dy [k, rows, out] += x dW_i^T (or =, where `fresh`) for sampled dW_i [out, in] starting at `offset`. gram: double [k,
// k] or null. Sums of several strips of rows of W are collected before they are written, because dy lies the other way:
// six elements at a time would fetch every line of it several times.
template <class T>
void add_sampled_weight(const DrawSpec& spec, int64_t k, int64_t offset, const T* x, int64_t rows, int64_t in,
                        int64_t out, T* dy, bool fresh, double* gram_out) {
  constexpr int64_t kBytes = sizeof(T);
  const Panels<T> panels(x, rows, in);
  const Tasks tasks(out);
  const int64_t fitting = kDrawnBytes / (k * kTileRows * kBytes);
  const int64_t cols = in <= fitting ? in : std::max<int64_t>(256, fitting / kNormalGroup * kNormalGroup);
  const int64_t strips = kSumsBytes / (k * kTileRows * panels.panel * kBytes);  // that fit, one panel each
  const int64_t batch = std::clamp<int64_t>(strips, 1, std::max<int64_t>(1, panels.count()));  // panels at a time
  const int64_t stage = kTileRows * std::clamp<int64_t>(strips / batch, 1, 8);                 // rows of W at a time
  const int64_t turned_width = ceil_div(stage, panels.vector) * panels.vector;
  std::vector<double> partials(gram_out ? tasks.count * k * k : 0, 0.0);
  const bool signs = spec.distribution == kRademacher;  // whose Gram matrix takes their bits only
  const bool exact_gram = sizeof(T) == sizeof(float) && in * out <= kExactGramElements && !signs;

  torch::stable::parallel_for(0, tasks.count, 1, [&](int64_t first_task, int64_t last_task) {
    Scratch<T> drawn(k * kTileRows * cols);
    Scratch<T> sums(k * batch * stage * panels.panel);  // [k, batch, stage, panel]
    Scratch<T> turned(panels.panel * turned_width);
    std::vector<double> drawn_exact(gram_out && exact_gram ? k * kTileRows * in : 0);
    const auto sums_of = [&](int64_t i, int64_t p) { return sums.data() + (i * batch + p) * stage * panels.panel; };

    // Rows o .. o + nr of W, drawn, times panels p0 .. p1; into row r0 of the sums.
    const auto strip = [&](int64_t o, int64_t nr, int64_t p0, int64_t p1, int64_t r0, double* partial) {
      const int64_t start = offset + o * in;
      if (partial && exact_gram) {
        draw(spec, k, start, nr * in, drawn_exact.data(), nr * in);
        gram(drawn_exact.data(), k, nr * in, nr * in, partial);
      }
      for (int64_t c0 = 0; c0 < in; c0 += cols) {
        const int64_t n = std::min(cols, in - c0);
        const int64_t ld = nr * n;  // drawn [k, nr, n]
        if (n == in) {
          draw(spec, k, start, nr * in, drawn.data(), ld);
        } else {
          for (int64_t r = 0; r < nr; ++r) draw(spec, k, start + r * in + c0, n, drawn.data() + r * n, ld);
        }
        if (partial && !exact_gram) add_gram(drawn.data(), k, ld, ld, partial);
        for (int64_t p = p0; p < p1; ++p) {
          const int64_t w = panels.width(p);
          for (int64_t c = 0; c < n; c += kColumns) {
            for (int64_t i = 0; i < k; ++i) {
              tile(panels.at(p) + (c0 + c) * w, w, drawn.data() + i * ld + c, n, nr, std::min(kColumns, n - c),
                   sums_of(i, p - p0) + r0 * w, w, c0 + c == 0);
            }
          }
        }
      }
    };

    const auto write = [&](int64_t o, int64_t nr, int64_t p0, int64_t p1) {
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t p = p0; p < p1; ++p) {
          const int64_t w = panels.width(p), live = std::min(panels.panel, rows - p * panels.panel);
          pack(sums_of(i, p - p0), w, nr, live, turned_width, turned.data());  // [live, nr, padded]
          for (int64_t j = 0; j < live; ++j) {
            T* target = dy + (i * rows + p * panels.panel + j) * out + o;
            const T* sum = turned.data() + j * turned_width;
            if (fresh) {
              std::copy(sum, sum + nr, target);
            } else {
              for (int64_t r = 0; r < nr; ++r) target[r] += sum[r];
            }
          }
        }
      }
    };

    for (int64_t task = first_task; task < last_task; ++task) {
      double* partial = gram_out ? partials.data() + task * k * k : nullptr;
      const int64_t begin = tasks.begin(task), end = tasks.begin(task + 1);
      if (partial && signs) {
        gram_of_signs(spec, k, offset + begin * in, (end - begin) * in, partial);
        partial = nullptr;
      }
      for (int64_t o0 = begin; o0 < end; o0 += stage) {
        const int64_t staged = std::min(stage, end - o0);
        // once even for an empty batch: the Gram does not depend on x
        for (int64_t p0 = 0; p0 == 0 || p0 < panels.count(); p0 += batch) {
          const int64_t p1 = std::min(panels.count(), p0 + batch);
          if (in == 0) std::fill(sums.data(), sums.data() + k * batch * stage * panels.panel, T(0));
          for (int64_t r = 0; r < staged; r += kTileRows) {
            strip(o0 + r, std::min(kTileRows, staged - r), p0, p1, r, p0 == 0 ? partial : nullptr);
          }
          write(o0, staged, p0, p1);
        }
      }
    }
  });
  if (gram_out) {
    std::vector<double> total(k * k);
    finish_gram(partials, tasks.count, k, total.data());
    for (int64_t j = 0; j < k * k; ++j) gram_out[j] += total[j];
  }
}

struct Arguments {
  Tensor x, weight;  // [rows, in], [out, in]
  std::optional<Tensor> dx, bias, dweight, dbias,
      activity;                       // [k, rows, in], [out], [k, out, in], [k, out], [k, S, out]
  std::optional<Tensor> left, inner;  // [k, r, out], [rows, k r]: dW_i = left_i^T right_i, x right_i^T
  std::optional<DrawSpec> spec;
  std::optional<int64_t> weight_offset, bias_offset;
  int64_t k, rows, in, out;
};

// Sampled tangents of the bias, [k, out]; empty where there are none. Their Gram matrix is added to gram_out, if given.
template <class T>
std::vector<T> drawn_bias(const Arguments& a, double* gram_out) {
  if (!a.bias_offset) return {};
  const int64_t k = a.k;
  std::vector<T> drawn(k * a.out);
  draw(*a.spec, k, *a.bias_offset, a.out, drawn.data(), a.out);
  if (gram_out) {
    const std::vector<double> wide(drawn.begin(), drawn.end());
    std::vector<double> lower(k * k, 0.0), total(k * k);
    gram(wide.data(), k, a.out, a.out, lower.data());
    finish_gram(lower, 1, k, total.data());
    for (int64_t j = 0; j < k * k; ++j) gram_out[j] += total[j];
  }
  return drawn;
}

template <class T>
Addends<T> addends_of(const Arguments& a, const std::vector<T>& drawn) {
  const auto data = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
  };
  const int64_t period = a.activity ? a.activity->size(1) : 1, r = a.left ? a.left->size(1) : 0;
  return {a.rows,           a.out,        period,        data(a.bias), drawn.empty() ? data(a.dbias) : drawn.data(),
          data(a.activity), data(a.left), data(a.inner), a.k,          r};
}

// dx W^T and what is added to it, [k * rows, out], for dx in bfloat16
Tensor tiled_product(const Arguments& a, const Tensor& dx_, const Addends<float>& addends) {
  const int64_t rows = a.k * a.rows;
  const Tensor dx = as_contiguous(dx_);
  Tensor dy = new_tensor(dx, {rows, a.out}, ScalarType::BFloat16);
  product<uint16_t>({{static_cast<const uint16_t*>(dx.const_data_ptr()), 0, rows}}, a.in,
                    static_cast<const float*>(a.weight.const_data_ptr()), a.out,
                    static_cast<uint16_t*>(dy.mutable_data_ptr()),
                    [&](int64_t row, int64_t count, int64_t o, int64_t n, float* to, int64_t ld) {
                      addends.start(a.rows + row, count, o, n, to, ld);
                    });
  return dy;
}

// The same by the library, some rows at a time, so that what is added meets products that are still in cache, of up to
// 2048 columns
Tensor library_product(const Arguments& a, const Tensor& dx_, const Addends<float>& addends) {
  const int64_t rows = a.k * a.rows, out = a.out;
  Tensor dy = new_tensor(dx_, {rows, out}, ScalarType::BFloat16);
  Tensor dx = torch::stable::view(as_contiguous(dx_), {rows, a.in});
  const Tensor wt = torch::stable::transpose(to_dtype(a.weight, ScalarType::BFloat16), 0, 1);
  uint16_t* data = static_cast<uint16_t*>(dy.mutable_data_ptr());
  const int64_t fitting = kStretchBytes / (2 * std::max<int64_t>(1, out));
  const int64_t stretch = addends.moves() ? std::max(fitting, kFewestRows) : std::max<int64_t>(1, rows);  // else all
  for (int64_t begin = 0; begin < rows; begin += stretch) {
    const int64_t n = std::min(stretch, rows - begin);
    Tensor products = torch::stable::narrow(dy, 0, begin, n);
    mm_out(products, torch::stable::narrow(dx, 0, begin, n), wt);
    if (!addends.moves()) continue;
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, kWork / std::max<int64_t>(1, out)),
                                [&](int64_t from, int64_t to) {
                                  Scratch<float> sums(out);
                                  for (int64_t r = begin + from; r < begin + to; ++r) {
                                    simd().widen_bf16(data + r * out, out, sums.data());
                                    addends.add(a.rows + r, 0, out, sums.data());
                                    simd().narrow_bf16(sums.data(), out, data + r * out);
                                  }
                                });
  }
  return dy;
}

// The same in float32. W is packed anew for each of the stretches, which are therefore not short.
Tensor widened_product(const Arguments& a, const Tensor& dx_, const Addends<float>& addends) {
  const int64_t rows = a.k * a.rows, in = a.in, out = a.out;
  const Tensor dx = as_contiguous(dx_);
  Tensor dy = new_tensor(dx, {rows, out}, ScalarType::BFloat16);
  const uint16_t* from = static_cast<const uint16_t*>(dx.const_data_ptr());
  uint16_t* to = static_cast<uint16_t*>(dy.mutable_data_ptr());
  const float* w = static_cast<const float*>(a.weight.const_data_ptr());
  const int64_t stretch =
      std::min(rows, std::max<int64_t>(kStretchElements / std::max<int64_t>(1, in + out), kFewestRows));
  Scratch<float> wide(stretch * in), sums(stretch * out);
  const auto grain = [](int64_t width) { return std::max<int64_t>(1, kWork / std::max<int64_t>(1, width)); };
  for (int64_t r = 0; r < rows; r += stretch) {
    const int64_t n = std::min(stretch, rows - r);
    torch::stable::parallel_for(0, n, grain(in), [&](int64_t first, int64_t last) {
      simd().widen_bf16(from + (r + first) * in, (last - first) * in, wide.data() + first * in);
    });
    product<float>({{wide.data(), 0, n}}, in, w, out, sums.data(),
                   [&](int64_t row, int64_t count, int64_t o, int64_t width, float* c, int64_t ld) {
                     addends.start(a.rows + r + row, count, o, width, c, ld);
                   });
    torch::stable::parallel_for(0, n, grain(out), [&](int64_t first, int64_t last) {
      simd().narrow_bf16(sums.data() + first * out, (last - first) * out, to + (r + first) * out);
    });
  }
  return dy;
}

Tensor low_tangents(const Arguments& a, const Tensor& dx, double* gram_out) {
  const std::vector<float> drawn = drawn_bias<float>(a, gram_out);
  const Addends<float> addends = addends_of(a, drawn);
  const bool deep = a.in > kDeepest;
  switch (bf16_products()) {
    case Bf16Products::kTile:
      return deep ? library_product(a, dx, addends) : tiled_product(a, dx, addends);
    case Bf16Products::kLibrary:
      return library_product(a, dx, addends);
    default:
      return widened_product(a, dx, addends);
  }
}

// buffer [1 + k, rows, out] receives x W^T + b and its tangents, before the activation.
template <class T>
void linear(const Arguments& a, Tensor& buffer, double* gram_out) {
  const int64_t k = a.k, rows = a.rows, in = a.in, out = a.out;
  const std::vector<T> drawn = drawn_bias<T>(a, gram_out);
  const Addends<T> addends = addends_of(a, drawn);
  T* y = static_cast<T*>(buffer.mutable_data_ptr());
  T* dy = y + rows * out;
  const T* x = static_cast<const T*>(a.x.const_data_ptr());
  const bool incoming = a.dx.has_value();  // without input features, their data is null although they are given
  const T* dx = incoming ? static_cast<const T*>(a.dx->const_data_ptr()) : nullptr;
  const int64_t multiplied = incoming ? (1 + k) * rows : rows;  // rows of the buffer that a product fills
  // With dx, the number of rows tells how many tangents there are, and no bit may depend on that
  if (incoming ? has_tile<T>() : tile_pays<T>(multiplied)) {
    const T* w = static_cast<const T*>(a.weight.const_data_ptr());
    std::vector<Rows<T>> pieces{{x, 0, rows}};
    if (incoming && dx == x + rows * in) {
      pieces[0].count = multiplied;
    } else if (incoming) {
      pieces.push_back({dx, rows, k * rows});
    }
    product(pieces, in, w, out, y, [&](int64_t row, int64_t count, int64_t o, int64_t n, T* to, int64_t ld) {
      addends.start(row, count, o, n, to, ld);
    });
  } else {
    const Tensor wt = torch::stable::transpose(a.weight, 0, 1);  // [in, out]
    Tensor y_rows = part_of(buffer, 0, {rows, out});
    mm_out(y_rows, a.x, wt);
    if (incoming) {
      Tensor dy_rows = part_of(buffer, rows * out, {k * rows, out});
      mm_out(dy_rows, torch::stable::view(*a.dx, {k * rows, in}), wt);
    }
    if (addends.any()) add_rows(addends, 0, multiplied, false, y);
  }
  bool fresh = multiplied == rows;  // dy holds nothing yet
  if (fresh && addends.any()) {
    add_rows(addends, rows, (1 + k) * rows, true, y);
    fresh = !addends.moves();
  }
  if (a.dweight) {
    const Tensor x_k = as_strided(a.x, {k, rows, in}, {0, in, 1}, a.x.storage_offset());
    const Tensor product = torch::stable::matmul(x_k, torch::stable::transpose(*a.dweight, 1, 2));  // [k, rows, out]
    const Tensor dense = as_contiguous(product);
    const T* add = static_cast<const T*>(dense.const_data_ptr());
    torch::stable::parallel_for(0, k * rows * out, 32768, [&](int64_t from, int64_t to) {
      for (int64_t j = from; j < to; ++j) dy[j] = (fresh ? T(0) : dy[j]) + add[j];
    });
    fresh = false;
  }
  if (a.weight_offset) add_sampled_weight<T>(*a.spec, k, *a.weight_offset, x, rows, in, out, dy, fresh, gram_out);
}

// a w^T [rows, out], the sums of a row in the same order however many rows there are
template <class T>
Tensor times_rows(const Tensor& a, const Tensor& w) {
  const int64_t rows = a.size(0), in = a.size(1), out = w.size(0);
  Tensor y = new_tensor(a, {rows, out}, a.scalar_type());
  if (!has_tile<T>()) {
    mm_out(y, a, torch::stable::transpose(w, 0, 1));
  } else {
    product<T>({{static_cast<const T*>(a.const_data_ptr()), 0, rows}}, in, static_cast<const T*>(w.const_data_ptr()),
               out, static_cast<T*>(y.mutable_data_ptr()),
               [](int64_t, int64_t count, int64_t, int64_t n, T* to, int64_t ld) {
                 for (int64_t j = 0; j < count; ++j) std::fill(to + j * ld, to + j * ld + n, T(0));
               });
  }
  return y;
}

std::optional<Tensor> prepare(const std::optional<Tensor>& t, ScalarType compute) {
  if (!t) return std::nullopt;
  return as_contiguous(to_dtype(*t, compute));
}

std::tuple<Tensor, Tensor, Tensor> linear_jvp(const Tensor& x, const std::optional<Tensor>& dx, const Tensor& weight,
                                              const std::optional<Tensor>& bias, const std::optional<Tensor>& dweight,
                                              const std::optional<Tensor>& dbias, const std::optional<Tensor>& activity,
                                              const std::optional<Tensor>& state, int64_t k, int64_t first,
                                              int64_t distribution, std::optional<int64_t> weight_offset,
                                              std::optional<int64_t> bias_offset, int64_t activation, double alpha,
                                              double beta, bool want_gram, const std::optional<Tensor>& left,
                                              const std::optional<Tensor>& right) {
  const LinearArguments given{x,           dx,         weight, bias,  dweight,      dbias,
                              activity,    state,      k,      first, distribution, weight_offset,
                              bias_offset, activation, alpha,  beta,  left,         right};
  given.for_each([](const char* name, const Tensor& t) { check_cpu(kOp, name, t); });
  const auto [rows, in, out, period, y_shape, dy_shape] = check_linear(kOp, given);
  const ScalarType compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;

  Arguments a;
  a.k = k, a.rows = rows, a.in = in, a.out = out;
  a.x = torch::stable::view(*prepare(x, compute), {rows, in});
  a.weight = *prepare(weight, compute);
  const bool low = dx && dx->scalar_type() == ScalarType::BFloat16 && x.scalar_type() == ScalarType::Float &&
                   !dweight && !weight_offset && (bf16_products() != Bf16Products::kNothing || has_tile<float>());
  if (!low) a.dx = prepare(dx, compute);
  a.bias = prepare(bias, compute);
  a.dweight = prepare(dweight, compute);
  a.dbias = prepare(dbias, compute);
  if (activity) a.activity = torch::stable::view(*prepare(activity, compute), {k, period, out});
  if (left) {
    const Tensor factor = torch::stable::view(*prepare(right, compute), {k * left->size(1), in});
    a.left = prepare(left, compute);
    a.inner = compute == ScalarType::Double ? times_rows<double>(a.x, factor) : times_rows<float>(a.x, factor);
  }
  if (given.sampled()) a.spec = draw_spec(kOp, *state, k, first, distribution);
  a.weight_offset = weight_offset, a.bias_offset = bias_offset;

  const int64_t side = want_gram ? k : 0;
  Tensor gram_matrix = torch::stable::new_zeros(x, {side, side}, ScalarType::Double);
  double* gram_out = want_gram ? static_cast<double*>(gram_matrix.mutable_data_ptr()) : nullptr;
  if (low) {
    Arguments value = a;
    value.k = 0, value.dbias.reset(), value.activity.reset(), value.bias_offset.reset(), value.left.reset();
    Tensor y = new_tensor(x, {1, rows, out}, compute);
    linear<float>(value, y, nullptr);
    Tensor dy = low_tangents(a, *dx, gram_out);
    y = torch::stable::view(y, y_shape), dy = torch::stable::view(dy, dy_shape);
    if (activation != 0) apply_pointwise(activation, alpha, beta, y, dy);
    return {y, dy, gram_matrix};
  }
  Tensor buffer = new_tensor(x, {1 + k, rows, out}, compute);
  if (compute == ScalarType::Double) {
    linear<double>(a, buffer, gram_out);
  } else {
    linear<float>(a, buffer, gram_out);
  }
  Tensor y = part_of(buffer, 0, y_shape);
  Tensor dy = part_of(buffer, rows * out, dy_shape);
  if (activation != 0) apply_pointwise(activation, alpha, beta, y, dy);
  return {to_dtype(y, x.scalar_type()), to_dtype(dy, dx ? dx->scalar_type() : x.scalar_type()), gram_matrix};
}

// x [*, in], weight [out, in] -> x weight^T
Tensor linear_rows(const Tensor& x, const Tensor& weight) {
  const char* op = "linear_rows";
  check_cpu(op, "x", x);
  check_cpu(op, "weight", weight);
  check_linear_rows(op, x, weight);
  std::vector<int64_t> shape = shape_of(x);
  const int64_t in = shape.back(), out = weight.size(0);
  int64_t rows = 1;
  for (size_t j = 0; j + 1 < shape.size(); ++j) rows *= shape[j];
  shape.back() = out;
  const ScalarType compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor a = torch::stable::view(*prepare(x, compute), {rows, in}), w = *prepare(weight, compute);
  const Tensor y = compute == ScalarType::Double ? times_rows<double>(a, w) : times_rows<float>(a, w);
  return to_dtype(torch::stable::view(y, shape), x.scalar_type());
}

// gradient [r, out], x [r, in] -> gradient^T x, into memory that is used again: fresh pages for the gradient of a large
// layer cost more than a product of few rows. Many rows take the library's product.
Tensor linear_gradient(const Tensor& gradient, const Tensor& x) {
  const char* op = "linear_gradient";
  check_cpu(op, "gradient", gradient);
  check_cpu(op, "x", x);
  check_linear_gradient(op, gradient, x);
  Tensor out = new_tensor(x, {gradient.size(1), x.size(1)}, gradient.scalar_type());  // [out, in]
  const int64_t rows = x.size(0);
  const auto few = [&](auto zero) {
    using T = decltype(zero);
    if (rows > kFewRows || !has_tile<T>()) return false;
    const Tensor g = as_contiguous(gradient), f = as_contiguous(x);
    outer_product(static_cast<const T*>(g.const_data_ptr()), static_cast<const T*>(f.const_data_ptr()), rows, g.size(1),
                  f.size(1), static_cast<T*>(out.mutable_data_ptr()));
    return true;
  };
  const bool done = x.scalar_type() == ScalarType::Float    ? few(float{})
                    : x.scalar_type() == ScalarType::Double ? few(double{})
                                                            : false;
  if (!done) mm_out(out, torch::stable::transpose(gradient, 0, 1), x);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) {
  m.impl("linear_jvp", TORCH_BOX(&linear_jvp));
  m.impl("linear_rows", TORCH_BOX(&linear_rows));
  m.impl("linear_gradient", TORCH_BOX(&linear_gradient));
}

}  // namespace
}  // namespace frog
