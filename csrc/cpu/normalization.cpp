// normalization_jvp: layer, RMS, group, instance and batch normalisation and their tangents.
//
// All of them normalise groups of elements of x viewed as [outer, groups, inner]: layer and RMS norm have one group for
// each row (outer = 1), group and instance norm one for each sample and group of channels (outer = 1), batch norm one
// for each channel (outer = batch). With x^ = (x - mean) r and r = 1 / sqrt(var + eps),
//   y  = w x^ + b
//   dy = w r (dx - mean(dx) - x^ mean(dx x^)) + dw x^ + db
// where RMS norm has no means of x and dx, and given statistics (batch norm in evaluation) leave w r dx. The statistics
// and x^ of a group are computed once for all k tangents.
//
// Floor: x and dx are read twice where a group does not stay in first-level cache, y and dy are written once.
#include <cmath>
#include <limits>

#include "draw.h"

namespace frog {
namespace {

constexpr const char* kOp = "normalization_jvp";
constexpr int64_t kRun = 4096;    // elements summed in T before they enter the double sums
constexpr int64_t kWork = 32768;  // elements of primal and tangents that are worth a thread

template <class T>
struct Problem {
  int64_t outer, groups, inner, k;
  int64_t weight_groups, weight_inner;  // weight [weight_groups, weight_inner]
  bool centred;
  double eps;
  const T *x, *dx, *weight, *dweight, *bias, *dbias, *given_mean, *given_var;  // dx [k, outer, groups, inner] or null
  T *y, *dy, *mean, *var;                                                      // mean, var [groups]
  int64_t numel() const { return outer * groups * inner; }
};

// sum of f(j) over j < n: independent partial sums for the compiler to vectorise, long runs closed in double
template <class T, class F>
double total(int64_t n, const F& f) {
  constexpr int kLanes = 64 / sizeof(T);
  double sum = 0;
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t end = std::min(n, start + kRun);
    T lanes[kLanes] = {};
    int64_t j = start;
    for (; j + kLanes <= end; j += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += f(j + l);
    }
    for (; j < end; ++j) sum += static_cast<double>(f(j));
    for (int l = 0; l < kLanes; ++l) sum += static_cast<double>(lanes[l]);
  }
  return sum;
}

// Factors of the elements of a group: constant over runs of `inner / weight_inner` elements, or over the whole group.
template <class T>
struct Affine {
  const T* values;  // [weight_inner] of this group, or null
  int64_t run;
  T at(int64_t j, T otherwise) const { return values == nullptr ? otherwise : values[j / run]; }
};

template <class T>
Affine<T> affine(const Problem<T>& p, const T* values, int64_t set, int64_t g) {
  if (values == nullptr) return {nullptr, 1};
  return {values + (set * p.weight_groups + g % p.weight_groups) * p.weight_inner,
          std::max<int64_t>(1, p.inner / std::max<int64_t>(1, p.weight_inner))};
}

// Calls body(from, to) for the runs of [0, inner) over which every factor is constant; one run for each element where
// weight_inner == inner would be slow, so that case gets the whole range and `constant` = false.
template <class T, class Body>
void for_runs(const Problem<T>& p, const Body& body) {
  if (p.weight_inner == p.inner || p.weight_inner == 0) return body(int64_t{0}, p.inner, p.weight_inner <= 1);
  const int64_t run = p.inner / p.weight_inner;
  for (int64_t from = 0; from < p.inner; from += run) body(from, from + run, true);
}

template <class T>
void normalise_group(const Problem<T>& p, int64_t g, std::vector<T>& hat) {
  const int64_t n = p.outer * p.inner, stride = p.groups * p.inner;
  double mean = 0, var = 0;
  if (p.given_mean != nullptr) {
    mean = static_cast<double>(p.given_mean[g]), var = static_cast<double>(p.given_var[g]);
  } else {
    if (p.centred) {
      for (int64_t o = 0; o < p.outer; ++o) {
        const T* x = p.x + o * stride + g * p.inner;
        mean += total<T>(p.inner, [=](int64_t j) { return x[j]; });
      }
      mean /= static_cast<double>(n);
    }
    const T centre = static_cast<T>(mean);
    for (int64_t o = 0; o < p.outer; ++o) {
      const T* x = p.x + o * stride + g * p.inner;
      var += total<T>(p.inner, [=](int64_t j) { return (x[j] - centre) * (x[j] - centre); });
    }
    var /= static_cast<double>(n);
  }
  p.mean[g] = static_cast<T>(mean), p.var[g] = static_cast<T>(var);
  const T centre = static_cast<T>(mean), r = static_cast<T>(1 / std::sqrt(var + p.eps));
  const Affine<T> w = affine(p, p.weight, 0, g), b = affine(p, p.bias, 0, g);
  for (int64_t o = 0; o < p.outer; ++o) {
    const T* x = p.x + o * stride + g * p.inner;
    T* y = p.y + o * stride + g * p.inner;
    T* h = hat.data() + o * p.inner;
    for (int64_t j = 0; j < p.inner; ++j) h[j] = (x[j] - centre) * r;
    for_runs(p, [&](int64_t from, int64_t to, bool constant) {
      if (constant) {
        const T factor = w.at(from, T(1)), add = b.at(from, T(0));
        for (int64_t j = from; j < to; ++j) y[j] = h[j] * factor + add;
      } else {
        for (int64_t j = from; j < to; ++j) {
          y[j] = h[j] * (w.values ? w.values[j] : T(1)) + (b.values ? b.values[j] : T(0));
        }
      }
    });
  }
  for (int64_t i = 0; i < p.k; ++i) {
    T shift = T(0), turn = T(0);  // mean(dx) and mean(dx x^)
    if (p.dx != nullptr && p.given_mean == nullptr) {
      double sum = 0, product = 0;
      for (int64_t o = 0; o < p.outer; ++o) {
        const T* dx = p.dx + i * p.numel() + o * stride + g * p.inner;
        const T* h = hat.data() + o * p.inner;
        if (p.centred) sum += total<T>(p.inner, [=](int64_t j) { return dx[j]; });
        product += total<T>(p.inner, [=](int64_t j) { return dx[j] * h[j]; });
      }
      shift = static_cast<T>(sum / static_cast<double>(n)), turn = static_cast<T>(product / static_cast<double>(n));
    }
    const Affine<T> dw = affine(p, p.dweight, i, g), db = affine(p, p.dbias, i, g);
    for (int64_t o = 0; o < p.outer; ++o) {
      const T* dx = p.dx == nullptr ? nullptr : p.dx + i * p.numel() + o * stride + g * p.inner;
      T* dy = p.dy + i * p.numel() + o * stride + g * p.inner;
      const T* h = hat.data() + o * p.inner;
      for_runs(p, [&](int64_t from, int64_t to, bool constant) {
        if (constant) {
          const T factor = w.at(from, T(1)) * r, tilt = dw.at(from, T(0)), add = db.at(from, T(0));
          if (dx == nullptr) {
            for (int64_t j = from; j < to; ++j) dy[j] = tilt * h[j] + add;
          } else {
            for (int64_t j = from; j < to; ++j) dy[j] = factor * (dx[j] - shift - turn * h[j]) + (tilt * h[j] + add);
          }
          return;
        }
        for (int64_t j = from; j < to; ++j) {
          const T moved = dx == nullptr ? T(0) : r * (dx[j] - shift - turn * h[j]);
          dy[j] = (w.values ? w.values[j] * moved : moved);
        }
        if (dw.values) {
          for (int64_t j = from; j < to; ++j) dy[j] += dw.values[j] * h[j];
        }
        if (db.values) {
          for (int64_t j = from; j < to; ++j) dy[j] += db.values[j];
        }
      });
    }
  }
}

template <class T>
void run(const Problem<T>& p) {
  if (p.numel() == 0) {  // statistics of nothing
    std::fill(p.mean, p.mean + p.groups, std::numeric_limits<T>::quiet_NaN());
    std::fill(p.var, p.var + p.groups, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  const int64_t each = std::max<int64_t>(1, p.outer * p.inner * (1 + p.k));
  torch::stable::parallel_for(0, p.groups, std::max<int64_t>(1, kWork / each), [&](int64_t from, int64_t to) {
    std::vector<T> hat(p.outer * p.inner);
    for (int64_t g = from; g < to; ++g) normalise_group(p, g, hat);
  });
}

std::optional<Tensor> prepare(const char* name, const std::optional<Tensor>& t, const std::vector<int64_t>& expected,
                              ScalarType compute) {
  if (!t) return std::nullopt;
  check_cpu(kOp, name, *t);
  check_floating(kOp, name, *t);
  check_shape(kOp, name, *t, expected);
  return torch::stable::contiguous(to_dtype(*t, compute));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalization_jvp(
    const Tensor& x, const std::optional<Tensor>& dx, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& dweight, const std::optional<Tensor>& bias, const std::optional<Tensor>& dbias,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& var, int64_t outer, int64_t groups,
    int64_t weight_groups, bool centred, double eps) {
  check_cpu(kOp, "x", x);
  check_floating(kOp, "x", x);
  STD_TORCH_CHECK(outer >= 0 && groups >= 0, kOp, ": outer and groups are ", outer, " and ", groups,
                  "; they must not be negative");
  const int64_t rows = outer * groups;
  STD_TORCH_CHECK(rows == 0 ? x.numel() == 0 : x.numel() % rows == 0, kOp, ": x has ", x.numel(),
                  " elements, which outer x groups = ", outer, " x ", groups, " does not divide");
  const int64_t inner = rows == 0 ? 0 : x.numel() / rows;
  STD_TORCH_CHECK(weight_groups >= 1 && groups % weight_groups == 0, kOp, ": weight_groups is ", weight_groups,
                  "; expected a divisor of groups = ", groups);
  STD_TORCH_CHECK(dx || dweight || dbias, kOp, ": nothing is perturbed; give at least one of dx, dweight and dbias");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), kOp, ": mean and var must be given together or not at all");
  STD_TORCH_CHECK(!mean || centred, kOp, ": mean is given, but centred is false");
  STD_TORCH_CHECK(!dweight || weight, kOp, ": dweight is given, but weight is None");
  STD_TORCH_CHECK(!dbias || bias, kOp, ": dbias is given, but bias is None");
  STD_TORCH_CHECK(eps >= 0, kOp, ": eps is ", eps, "; it must not be negative");

  const Tensor& some = weight ? *weight : bias ? *bias : x;
  const int64_t weights = weight || bias ? some.numel() : weight_groups;
  const int64_t weight_inner = weights / weight_groups;
  STD_TORCH_CHECK(weights % weight_groups == 0 && (inner == 0 || (weight_inner >= 1 && inner % weight_inner == 0)), kOp,
                  ": weight has ", weights, " elements, expected weight_groups = ", weight_groups,
                  " times a divisor of the ", inner, " elements of a row");
  const Tensor& moved = dx ? *dx : dweight ? *dweight : *dbias;
  STD_TORCH_CHECK(moved.dim() >= 1, kOp, ": a tangent has shape (), expected (k, *)");
  const int64_t k = moved.size(0);
  check_k(kOp, k);
  const ScalarType compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::vector<int64_t> dx_shape = shape_of(x), w_shape = weight || bias ? shape_of(some) : std::vector<int64_t>{};
  dx_shape.insert(dx_shape.begin(), k);
  std::vector<int64_t> dw_shape = w_shape;
  dw_shape.insert(dw_shape.begin(), k);
  const auto x_ = prepare("x", x, shape_of(x), compute), dx_ = prepare("dx", dx, dx_shape, compute);
  const auto w_ = prepare("weight", weight, w_shape, compute), dw_ = prepare("dweight", dweight, dw_shape, compute);
  const auto b_ = prepare("bias", bias, w_shape, compute), db_ = prepare("dbias", dbias, dw_shape, compute);
  const auto m_ = prepare("mean", mean, {groups}, compute), v_ = prepare("var", var, {groups}, compute);

  Tensor buffer = new_tensor(x, {1 + k, x.numel()}, compute);  // neighbours, for a linear layer that follows
  Tensor y = part_of(buffer, 0, shape_of(x)), dy = part_of(buffer, x.numel(), dx_shape);
  Tensor mean_out = new_tensor(x, {groups}, compute), var_out = new_tensor(x, {groups}, compute);
  const auto go = [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
    };
    run(Problem<T>{outer,
                   groups,
                   inner,
                   k,
                   weight_groups,
                   weight_inner,
                   centred,
                   eps,
                   data(x_),
                   data(dx_),
                   data(w_),
                   data(dw_),
                   data(b_),
                   data(db_),
                   data(m_),
                   data(v_),
                   static_cast<T*>(y.mutable_data_ptr()),
                   static_cast<T*>(dy.mutable_data_ptr()),
                   static_cast<T*>(mean_out.mutable_data_ptr()),
                   static_cast<T*>(var_out.mutable_data_ptr())});
  };
  if (compute == ScalarType::Double) {
    go(double{});
  } else {
    go(float{});
  }
  return {to_dtype(y, x.scalar_type()), to_dtype(dy, moved.scalar_type()), mean_out, var_out};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) { m.impl("normalization_jvp", TORCH_BOX(&normalization_jvp)); }

}  // namespace
}  // namespace frog
