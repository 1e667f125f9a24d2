// embedding_jvp: rows of a table and of k tangents of it.
//
// Floor: y and dy are written once. Of sampled tangents only the rows looked up are drawn, each of them once however
// often it occurs, straight into the result; the rest are copies. So nothing has the size of k tables.
#include "../arguments/embedding.h"

#include <cstring>
#include <numeric>

#include "blocks.h"

namespace frog {
namespace {

constexpr const char* kOp = "embedding_jvp";

int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, kWork / std::max<int64_t>(1, elements)); }

/// int64 [places], each checked.
Tensor checked_indices(const Tensor& indices, int64_t rows) {
  const Tensor dense = as_contiguous(to_dtype(indices, ScalarType::Long));
  const int64_t* values = static_cast<const int64_t*>(dense.const_data_ptr());
  for (int64_t p = 0; p < dense.numel(); ++p) {
    STD_TORCH_CHECK(values[p] >= 0 && values[p] < rows, kOp, ": indices holds ", values[p], " at place ", p,
                    "; weight has ", rows, " rows, so accepted are 0 to ", rows - 1);
  }
  return dense;
}

// tables [count, rows, dim], whatever their strides but the last -> out [count, places, dim]
void look_up(const Tensor& tables, int64_t count, const int64_t* indices, int64_t places, int64_t dim, Tensor& out) {
  const int64_t size = static_cast<int64_t>(tables.element_size()), bytes = dim * size;
  const int64_t row = tables.stride(tables.dim() - 2) * size, table = tables.dim() > 2 ? tables.stride(0) * size : 0;
  const char* from = static_cast<const char*>(tables.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, count * places, grain_of(dim), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      std::memcpy(to + j * bytes, from + j / places * table + indices[j % places] * row, static_cast<size_t>(bytes));
    }
  });
}

// Rows of tangents that `spec` describes, the first element of row 0 being `offset` -> dy [k, places, dim]
template <class C>
void draw_rows(const DrawSpec& spec, int64_t k, int64_t offset, const int64_t* indices, int64_t places, int64_t dim,
               Tensor& dy) {
  std::vector<int64_t> order(places), starts;  // places by the row they ask for; where the next row begins
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return indices[a] != indices[b] ? indices[a] < indices[b] : a < b; });
  for (int64_t j = 0; j < places; ++j) {
    if (j == 0 || indices[order[j]] != indices[order[j - 1]]) starts.push_back(j);
  }
  const int64_t distinct = static_cast<int64_t>(starts.size());
  starts.push_back(places);
  const Sink<C> sink(dy);
  const int64_t size = static_cast<int64_t>(dy.element_size()), bytes = dim * size;
  char* data = static_cast<char*>(dy.mutable_data_ptr());
  torch::stable::parallel_for(0, distinct, grain_of(k * dim), [&](int64_t begin, int64_t end) {
    std::vector<C> scratch(sink.direct() ? 0 : k * dim);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t place = order[starts[r]], first = offset + indices[place] * dim;
      if (sink.direct()) {
        draw(spec, k, first, dim, reinterpret_cast<C*>(data) + place * dim, places * dim);
      } else {
        draw(spec, k, first, dim, scratch.data(), dim);
        for (int64_t i = 0; i < k; ++i) sink.finish((i * places + place) * dim, dim, scratch.data() + i * dim);
      }
    }
  });
  // By place, not by row: all places may have the same one.
  torch::stable::parallel_for(0, places, grain_of(k * dim), [&](int64_t begin, int64_t end) {
    int64_t r = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (int64_t j = begin; j < end; ++j) {
      if (j == starts[r + 1]) ++r;
      for (int64_t i = 0; j > starts[r] && i < k; ++i) {
        const char* drawn = data + (i * places + order[starts[r]]) * bytes;
        std::memcpy(data + (i * places + order[j]) * bytes, drawn, static_cast<size_t>(bytes));
      }
    }
  });
}

std::tuple<Tensor, Tensor> embedding_jvp(const Tensor& indices_, const Tensor& weight,
                                         const std::optional<Tensor>& dweight, const std::optional<Tensor>& state,
                                         int64_t k, int64_t first, int64_t distribution,
                                         std::optional<int64_t> weight_offset, std::optional<ScalarType> dtype) {
  const EmbeddingArguments given{indices_, weight, dweight, state, k, first, distribution, weight_offset, dtype};
  given.for_each([](const char* name, const Tensor& t) { check_cpu(kOp, name, t); });
  const EmbeddingSizes s = check_embedding(kOp, given);
  std::optional<DrawSpec> spec;
  if (weight_offset) spec = draw_spec(kOp, *state, k, first, distribution);
  const Tensor dense = checked_indices(indices_, s.rows);
  const int64_t* indices = static_cast<const int64_t*>(dense.const_data_ptr());
  auto [y, dy] = new_dual(weight, s.y_shape, k, weight.scalar_type(), s.tangents);
  if (s.places * s.dim == 0) return {y, dy};
  look_up(with_dense_rows(weight), 1, indices, s.places, s.dim, y);
  if (dweight) {
    look_up(with_dense_rows(*dweight), k, indices, s.places, s.dim, dy);
  } else if (s.tangents == ScalarType::Double) {
    draw_rows<double>(*spec, k, *weight_offset, indices, s.places, s.dim, dy);
  } else {
    draw_rows<float>(*spec, k, *weight_offset, indices, s.places, s.dim, dy);
  }
  return {y, dy};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) { m.impl("embedding_jvp", TORCH_BOX(&embedding_jvp)); }

}  // namespace
}  // namespace frog
