// Drawing tangents, their Gram matrix and their linear combinations; nothing of size k x n is stored unless it is the
// result.
#include "blocks.h"
#include "scratch.h"

namespace frog {
namespace {

// A Gram matrix is summed over at most this many parts, each by one thread, then in order: the bits never depend on the
// threads.
constexpr int64_t kGramParts = 64;
// Bytes of tangents that are drawn at a time for a Gram matrix; stays in the second-level cache.
constexpr int64_t kGramScratch = 128 * 1024;
constexpr int64_t kGramWork = 65536;  // multiplications, drawing counted as 8 a tangent, that are worth a thread

// out [k, *] with row stride ld: elements start .. start + count of the tangents
template <class T>
void draw_as(const DrawSpec& spec, int64_t k, int64_t start, int64_t count, T* out, int64_t ld) {
  if constexpr (std::is_same_v<T, typename ComputeOf<T>::type>) {
    draw(spec, k, start, count, out, ld);
  } else {
    std::vector<float> drawn(count);
    for (int64_t i = 0; i < k; ++i) {
      DrawSpec one = spec;
      one.first += i;
      draw(one, 1, start, count, drawn.data(), count);
      for (int64_t j = 0; j < count; ++j) out[i * ld + j] = static_cast<T>(drawn[j]);
    }
  }
}

Tensor sample_tangents(const Tensor& state, int64_t k, int64_t numel, int64_t offset, int64_t first,
                       int64_t distribution, ScalarType dtype) {
  const char* op = "sample_tangents";
  const DrawSpec spec = draw_spec(op, state, k, first, distribution);
  check_range(op, numel, offset);
  check_drawn_dtype(op, dtype);
  Tensor out = new_tensor(state, {k, numel}, dtype);  // [k, numel]
  dispatch_floating(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    T* data = static_cast<T*>(out.mutable_data_ptr());
    for_each_chunk(offset, numel, k,
                   [&](int64_t start, int64_t count) { draw_as(spec, k, start, count, data + start - offset, numel); });
  });
  return out;
}

// A part of a block that one thread draws
struct Chunk {
  size_t block;
  int64_t start, count;
};

Tensor sample_blocks(const Tensor& state, int64_t k, std::vector<int64_t> numels, std::vector<int64_t> offsets,
                     int64_t first, int64_t distribution, ScalarType dtype) {
  const char* op = "sample_blocks";
  const DrawSpec spec = draw_spec(op, state, k, first, distribution);
  const int64_t total = check_ranges(op, k, numels, offsets);
  check_drawn_dtype(op, dtype);
  Tensor out = new_tensor(state, {total}, dtype);  // of each block [k, numel]
  std::vector<int64_t> begins;
  std::vector<Chunk> chunks;
  for (int64_t b = 0, begin = 0; b < static_cast<int64_t>(numels.size()); begin += k * numels[b++]) {
    const int64_t end = offsets[b] + numels[b];
    begins.push_back(begin);
    for (int64_t start = offsets[b], next; start < end; start = next) {
      next = std::min(end, (start / kDrawChunk + 1) * kDrawChunk);
      chunks.push_back({static_cast<size_t>(b), start, next - start});
    }
  }
  const int64_t count = static_cast<int64_t>(chunks.size()), each = total / std::max<int64_t>(1, count);
  dispatch_floating(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    T* data = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(
        0, count, std::max<int64_t>(1, kWork / std::max<int64_t>(1, each)), [&](int64_t from, int64_t to) {
          for (int64_t c = from; c < to; ++c) {
            const Chunk& chunk = chunks[c];
            T* block = data + begins[chunk.block];
            draw_as(spec, k, chunk.start, chunk.count, block + chunk.start - offsets[chunk.block], numels[chunk.block]);
          }
        });
  });
  return out;
}

// out [k, k]: body(start, count, partial [k, k]) summed over [begin, begin + n) cut into kGramParts parts at multiples
// of `align`.
template <class Body>
void gram_in_parts(int64_t k, int64_t begin, int64_t n, int64_t align, double* out, const Body& body) {
  const int64_t end = begin + n;
  const int64_t low = begin / align, high = (end + align - 1) / align;  // in units of align
  const int64_t parts = std::max<int64_t>(1, std::min(kGramParts, high - low));
  std::vector<double> partials(parts * k * k, 0.0);
  const int64_t grain = parts * kGramWork / std::max<int64_t>(1, n * k * (k + 8));
  torch::stable::parallel_for(0, parts, std::max<int64_t>(1, grain), [&](int64_t a, int64_t b) {
    for (int64_t p = a; p < b; ++p) {
      const int64_t from = std::max(begin, (low + (high - low) * p / parts) * align);
      const int64_t to = std::min(end, (low + (high - low) * (p + 1) / parts) * align);
      if (from < to) body(from, to - from, partials.data() + p * k * k);
    }
  });
  finish_gram(partials, parts, k, out);
}

// Of normal tangents; their products need double.
void drawn_gram(const DrawSpec& spec, int64_t k, int64_t start, int64_t count, double* out) {
  constexpr int64_t kBytes = sizeof(double) * kNormalGroup;
  const int64_t fitting = std::max<int64_t>(1, kGramScratch / (k * kBytes)) * kNormalGroup;
  const int64_t block = std::min(fitting, (count / kNormalGroup + 2) * kNormalGroup);  // groups that begin in the range
  Scratch<double> drawn(k * block);
  for (int64_t at = start; at < start + count;) {
    const int64_t n = std::min((at / kNormalGroup) * kNormalGroup + block, start + count) - at;
    draw(spec, k, at, n, drawn.data(), block);
    gram(drawn.data(), k, n, block, out);
    at += n;
  }
}

Tensor tangent_gram(const Tensor& state, int64_t k, int64_t numel, int64_t offset, int64_t first,
                    int64_t distribution) {
  const char* op = "tangent_gram";
  const DrawSpec spec = draw_spec(op, state, k, first, distribution);
  check_range(op, numel, offset);
  if (distribution == kStandardBasis) {
    Tensor out = torch::stable::new_zeros(state, {k, k}, ScalarType::Double);
    double* data = static_cast<double*>(out.mutable_data_ptr());
    const int64_t* hit = spec.coordinates + first;
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) data[i * k + j] = hit[i] == hit[j] && hit[i] >= offset && hit[i] < offset + numel;
    }
    return out;
  }
  Tensor out = new_tensor(state, {k, k}, ScalarType::Double);
  gram_in_parts(k, offset, numel, kRademacherGroup, static_cast<double*>(out.mutable_data_ptr()),
                [&](int64_t start, int64_t count, double* partial) {
                  if (distribution == kRademacher) {
                    gram_of_signs(spec, k, start, count, partial);
                  } else {
                    drawn_gram(spec, k, start, count, partial);
                  }
                });
  return out;
}

// out [k, k] of data [k, n]
template <class T>
void gram_of_rows(const T* data, int64_t k, int64_t n, double* out) {
  gram_in_parts(k, 0, n, kNormalGroup, out, [&](int64_t start, int64_t count, double* partial) {
    if constexpr (std::is_same_v<T, double>) {
      gram(data + start, k, count, n, partial);
    } else {
      const int64_t fitting = std::max<int64_t>(64, kGramScratch / (k * static_cast<int64_t>(sizeof(double))));
      const int64_t block = std::min(fitting, count);
      Scratch<double> wide(k * block);
      for (int64_t at = start; at < start + count; at += block) {
        const int64_t m = std::min(block, start + count - at);
        for (int64_t i = 0; i < k; ++i) {
          for (int64_t j = 0; j < m; ++j) wide.data()[i * block + j] = static_cast<double>(data[i * n + at + j]);
        }
        gram(wide.data(), k, m, block, partial);
      }
    }
  });
}

Tensor gram_of(const Tensor& tangents_) {
  const char* op = "gram";
  check_cpu(op, "tangents", tangents_);
  check_gram(op, tangents_);
  const int64_t k = tangents_.size(0), n = tangents_.size(1);
  simd();                                            // as in draw_spec
  const Tensor tangents = as_contiguous(tangents_);  // [k, n]
  Tensor out = new_tensor(tangents, {k, k}, ScalarType::Double);
  dispatch_floating(op, tangents.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gram_of_rows(static_cast<const T*>(tangents.const_data_ptr()), k, n, static_cast<double*>(out.mutable_data_ptr()));
  });
  return out;
}

Tensor gram_blocks(const Tensor& blocks_, int64_t k, std::vector<int64_t> numels) {
  const char* op = "gram_blocks";
  check_cpu(op, "blocks", blocks_);
  check_gram_blocks(op, blocks_, k, numels);
  simd();
  const Tensor blocks = as_contiguous(blocks_);
  const int64_t count = static_cast<int64_t>(numels.size());
  Tensor out = new_tensor(blocks, {count, k, k}, ScalarType::Double);
  double* grams = static_cast<double*>(out.mutable_data_ptr());
  dispatch_floating(op, blocks.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* block = static_cast<const T*>(blocks.const_data_ptr());
    for (int64_t b = 0; b < count; block += k * numels[b++]) gram_of_rows(block, k, numels[b], grams + b * k * k);
  });
  return out;
}

Tensor tangent_combine(const Tensor& state, const Tensor& coefficients, int64_t numel, int64_t offset, int64_t first,
                       int64_t distribution, ScalarType dtype) {
  const char* op = "tangent_combine";
  check_drawn_dtype(op, dtype);
  check_range(op, numel, offset);
  Tensor out = new_tensor(state, {numel}, dtype);  // [numel]
  dispatch_floating(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    using C = typename ComputeOf<T>::type;
    const std::vector<C> c = read_coefficients<C>(op, coefficients, 1.0);
    const int64_t k = static_cast<int64_t>(c.size());
    const DrawSpec spec = draw_spec(op, state, k, first, distribution);
    T* data = static_cast<T*>(out.mutable_data_ptr());
    for_each_chunk(offset, numel, k, [&](int64_t start, int64_t count) {
      if constexpr (std::is_same_v<T, C>) {
        combine(spec, k, c.data(), start, count, data + start - offset);
      } else {
        std::vector<float> sums(kDrawChunk);
        combine(spec, k, c.data(), start, count, sums.data());
        for (int64_t j = 0; j < count; ++j) data[start - offset + j] = static_cast<T>(sums[j]);
      }
    });
  });
  return out;
}

// out [n] = the sum over i of c[i] v[i], v [k, n] with row stride ld
template <class T, class C>
void combine_drawn(const T* v, int64_t ld, int64_t k, const C* c, int64_t n, C* out) {
  std::fill(out, out + n, C(0));
  for (int64_t i = 0; i < k; ++i) {
    const C factor = c[i];
    for (int64_t j = 0; j < n; ++j) out[j] += factor * static_cast<C>(v[i * ld + j]);
  }
}

std::vector<Tensor> combine_blocks(const Tensor& blocks_, int64_t k, std::vector<int64_t> numels,
                                   const Tensor& coefficients) {
  constexpr int64_t kWork = 65536;  // multiplications that are worth a thread
  const char* op = "combine_blocks";
  check_cpu(op, "blocks", blocks_);
  check_combine_blocks(op, blocks_, k, numels, coefficients);
  const Tensor blocks = as_contiguous(blocks_);
  std::vector<Tensor> results;
  results.reserve(numels.size());
  dispatch_floating(op, blocks.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using C = typename ComputeOf<T>::type;
    const std::vector<C> c = read_coefficients<C>(op, coefficients, 1.0);
    const T* block = static_cast<const T*>(blocks.const_data_ptr());
    for (const int64_t numel : numels) {
      results.push_back(new_tensor(blocks, {numel}, blocks.scalar_type()));
      T* to = static_cast<T*>(results.back().mutable_data_ptr());
      torch::stable::parallel_for(0, numel, std::max<int64_t>(1, kWork / k), [&](int64_t begin, int64_t end) {
        if constexpr (std::is_same_v<T, C>) {
          combine_drawn(block + begin, numel, k, c.data(), end - begin, to + begin);
        } else {
          std::vector<C> sums(end - begin);
          combine_drawn(block + begin, numel, k, c.data(), end - begin, sums.data());
          std::copy(sums.begin(), sums.end(), to + begin);
        }
      });
      block += k * numel;
    }
  });
  return results;
}

// Samples of many elements are summed in registers, as tangent_combine does; of samples that are short beside the
// groups that are drawn at a time, tangents of several at once lie in second-level cache for the moment.
Tensor tangent_combine_samples(const Tensor& state, const Tensor& coefficients, int64_t numel, int64_t offset,
                               int64_t first, int64_t distribution, ScalarType dtype) {
  constexpr int64_t kDrawnBytes = 256 * 1024;
  const char* op = "tangent_combine_samples";
  check_drawn_dtype(op, dtype);
  check_cpu(op, "coefficients", coefficients);
  check_samples(op, coefficients, numel, offset);
  const int64_t k = coefficients.size(0), batch = coefficients.size(1);
  const DrawSpec spec = draw_spec(op, state, k, first, distribution);
  const bool in_registers = numel >= 4 * (distribution == kRademacher ? kRademacherGroup : kNormalGroup);
  Tensor out = new_tensor(state, {batch, numel}, dtype);  // [B, numel]
  dispatch_floating(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    using C = typename ComputeOf<T>::type;
    // [B, k], so that those of a sample lie together
    const Tensor turned = as_contiguous(
        torch::stable::transpose(to_dtype(to_dtype(coefficients, ScalarType::Double), scalar_type_of<C>()), 0, 1));
    const C* c = static_cast<const C*>(turned.const_data_ptr());
    T* data = static_cast<T*>(out.mutable_data_ptr());
    const int64_t fitting = kDrawnBytes / (k * static_cast<int64_t>(sizeof(C))) / kRademacherGroup * kRademacherGroup;
    const int64_t block = in_registers ? kDrawChunk : std::clamp(fitting, kRademacherGroup, kDrawChunk);
    for_each_chunk(offset, batch * numel, k, [&](int64_t start, int64_t count) {
      std::vector<C> drawn(in_registers ? 0 : k * block), sums(std::is_same_v<T, C> ? 0 : block);
      for (int64_t at = start; at < start + count;) {
        const int64_t n = std::min((at / block + 1) * block, start + count) - at;
        if (!in_registers) draw(spec, k, at, n, drawn.data(), block);
        for (int64_t from = at; from < at + n;) {  // the part of one sample
          const int64_t sample = (from - offset) / numel;
          const int64_t m = std::min(offset + (sample + 1) * numel, at + n) - from;
          T* to = data + from - offset;
          C* result = nullptr;
          if constexpr (std::is_same_v<T, C>) {
            result = to;
          } else {
            result = sums.data();
          }
          if (in_registers) {
            combine(spec, k, c + sample * k, from, m, result);
          } else {
            combine_drawn(drawn.data() + (from - at), block, k, c + sample * k, m, result);
          }
          if constexpr (!std::is_same_v<T, C>) {
            for (int64_t j = 0; j < m; ++j) to[j] = static_cast<T>(result[j]);
          }
          from += m;
        }
        at += n;
      }
    });
  });
  return out;
}

// Calls body(at, sums, n) with n sums, in the compute type of T, of c_i times tangent i for the elements from `at` on;
// all numel elements in all, at most a group at a time, in parallel.
template <class T, class Body>
void for_each_sum(const char* op, const Tensor& state, const Tensor& coefficients, double alpha, int64_t numel,
                  int64_t offset, int64_t first, int64_t distribution, const Body& body) {
  using C = typename ComputeOf<T>::type;
  const std::vector<C> c = read_coefficients<C>(op, coefficients, alpha);
  const int64_t k = static_cast<int64_t>(c.size());
  const DrawSpec spec = draw_spec(op, state, k, first, distribution);
  for_each_chunk(offset, numel, k, [&](int64_t start, int64_t count) {
    C sums[kRademacherGroup];
    for (int64_t at = start; at < start + count;) {
      const int64_t n = std::min((at / kRademacherGroup + 1) * kRademacherGroup, start + count) - at;
      combine(spec, k, c.data(), at, n, sums);
      body(at - offset, sums, n);
      at += n;
    }
  });
}

void tangent_axpy_(Tensor& self, const Tensor& state, const Tensor& coefficients, double alpha, int64_t offset,
                   int64_t first, int64_t distribution) {
  const char* op = "tangent_axpy_";
  check_cpu(op, "self", self);
  check_floating(op, "self", self);
  check_written(op, "self", self);
  check_range(op, self.numel(), offset);
  dispatch_floating(op, self.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using C = typename ComputeOf<T>::type;
    Tensor target = as_contiguous(self);  // self itself where it is contiguous
    T* data = static_cast<T*>(target.mutable_data_ptr());
    for_each_sum<T>(op, state, coefficients, alpha, target.numel(), offset, first, distribution,
                    [&](int64_t at, const C* sums, int64_t n) {
                      T* out = data + at;
                      for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>(static_cast<C>(out[j]) + sums[j]);
                    });
    if (target.data_ptr() != self.data_ptr()) torch::stable::copy_(self, target);
  });
}

// p and buffer [n] one step on, with sums g [n]; buffer null: without momentum. Operations in the order of
// torch.optim.SGD's, which rounds low precision after each of them; here the results alone are rounded.
template <class T, class C>
void sgd_step(const Sgd& s, const C* g, int64_t n, T* p, T* buffer) {
  const C lr = static_cast<C>(s.lr), momentum = static_cast<C>(s.momentum), decay = static_cast<C>(s.weight_decay);
  const C taken = static_cast<C>(1 - s.dampening);
  const auto each = [&](const auto& moved) {
    for (int64_t j = 0; j < n; ++j) {
      const C value = static_cast<C>(p[j]);
      p[j] = static_cast<T>(value - lr * moved(j, decay != 0 ? g[j] + decay * value : g[j]));
    }
  };
  const auto keep = [&](int64_t j, C next) {
    buffer[j] = static_cast<T>(next);
    return next;
  };
  const auto next_of = [&](int64_t j, C d) { return momentum * static_cast<C>(buffer[j]) + taken * d; };
  if (buffer == nullptr) return each([](int64_t, C d) { return d; });
  if (s.nesterov) {
    if (s.fresh) return each([&](int64_t j, C d) { return d + momentum * keep(j, d); });
    return each([&](int64_t j, C d) { return d + momentum * keep(j, next_of(j, d)); });
  }
  if (s.fresh) return each(keep);
  each([&](int64_t j, C d) { return keep(j, next_of(j, d)); });
}

void tangent_sgd_(Tensor& self, std::optional<Tensor> buffer, const Tensor& state, const Tensor& coefficients,
                  double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool fresh,
                  int64_t offset, int64_t first, int64_t distribution) {
  const char* op = "tangent_sgd_";
  const Sgd step{lr, momentum, dampening, weight_decay, nesterov, fresh};
  check_cpu(op, "self", self);
  if (buffer) check_cpu(op, "buffer", *buffer);
  check_sgd(op, self, buffer, step);
  check_range(op, self.numel(), offset);
  dispatch_floating(op, self.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using C = typename ComputeOf<T>::type;
    Tensor target = as_contiguous(self);
    std::optional<Tensor> moved;
    if (buffer) moved = as_contiguous(*buffer);
    T* data = static_cast<T*>(target.mutable_data_ptr());
    T* kept = moved ? static_cast<T*>(moved->mutable_data_ptr()) : nullptr;
    for_each_sum<T>(
        op, state, coefficients, 1.0, target.numel(), offset, first, distribution,
        [&](int64_t at, const C* sums, int64_t n) { sgd_step(step, sums, n, data + at, kept ? kept + at : nullptr); });
    if (target.data_ptr() != self.data_ptr()) torch::stable::copy_(self, target);
    if (buffer && moved->data_ptr() != buffer->data_ptr()) torch::stable::copy_(*buffer, *moved);
  });
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) {
  m.impl("sample_tangents", TORCH_BOX(&sample_tangents));
  m.impl("tangent_gram", TORCH_BOX(&tangent_gram));
  m.impl("gram", TORCH_BOX(&gram_of));
  m.impl("sample_blocks", TORCH_BOX(&sample_blocks));
  m.impl("gram_blocks", TORCH_BOX(&gram_blocks));
  m.impl("combine_blocks", TORCH_BOX(&combine_blocks));
  m.impl("tangent_combine", TORCH_BOX(&tangent_combine));
  m.impl("tangent_combine_samples", TORCH_BOX(&tangent_combine_samples));
  m.impl("tangent_axpy_", TORCH_BOX(&tangent_axpy_));
  m.impl("tangent_sgd_", TORCH_BOX(&tangent_sgd_));
}

}  // namespace
}  // namespace frog
