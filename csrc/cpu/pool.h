// Result memory that is used again. A pass makes and drops the same tensors step after step; the C library hands memory
// of this size back to the system and gets it anew, page by page, which was measured to cost 30 % of an
// activity-perturbed gradient of a 784-256-256-10 net. So what is freed waits here for the next result.
//
// Memory comes from the C library in segments, each as large as the result it was made for. A smaller result takes a
// piece of a free one, and neighbours that are free grow together again: what a wide layer has left serves narrow ones.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "../stable_compat.h"

namespace frog {

class Pool {
 public:
  static constexpr size_t kSmallest = size_t{64} << 10;  // bytes; what is smaller the C library keeps by itself
  static constexpr size_t kSlack = size_t{2} << 20;      // bytes kept beyond what was needed at its most and an eighth

  // A part of a segment, in use or free.
  struct Piece {
    char* data;
    size_t size;
    Piece *before = nullptr, *after = nullptr;  // neighbours in the segment
    bool free = false;
    size_t age = 0;                                     // of a free piece
    std::multimap<size_t, Piece*>::iterator waiting{};  // its place among those

    bool whole() const { return before == nullptr && after == nullptr; }
  };

  // Never destroyed: tensors may outlive everything static.
  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }

  Piece* take(size_t bytes) {
    const size_t size = (std::max(bytes, kSmallest) + 63) / 64 * 64;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = free_.lower_bound(size);
    Piece* piece = found == free_.end() ? new_segment(size) : found->second;
    if (piece->free) remove(piece);
    if (piece->size - size >= kSmallest) {
      Piece* rest = new Piece{piece->data + size, piece->size - size, piece, piece->after};
      if (rest->after) rest->after->before = rest;
      piece->after = rest;
      piece->size = size;
      add(rest);
    }
    used_ += piece->size;
    most_used_ = std::max(most_used_, used_);
    return piece;
  }

  void give(Piece* piece) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= piece->size;
    Piece *before = piece->before, *after = piece->after;
    if (after && after->free) {
      remove(after);
      absorb(piece, after);
    }
    if (before && before->free) {
      remove(before);
      absorb(before, piece);
      piece = before;
    }
    add(piece);
    drop_segments(most_kept_);
  }

 private:
  Pool() {
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    const size_t memory = pages > 0 && page > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(page) : 0;
    most_kept_ = std::clamp(memory / 16, size_t{128} << 20, size_t{512} << 20);
  }

  // No free piece is large enough. Free segments make room for the new one, so that the memory of a pass is hardly more
  // than what it needs at its most, in whatever order sizes come. A segment of which a piece is in use stays whole.
  Piece* new_segment(size_t size) {
    const size_t needed = used_ + size;
    const size_t most = std::max(most_used_, needed);
    drop_segments(most + most / 8 + kSlack - needed);
    char* data = static_cast<char*>(std::aligned_alloc(64, size));
    STD_TORCH_CHECK(data != nullptr, "frog_cuda: cannot allocate ", size, " bytes");
    return new Piece{data, size};
  }

  // Returns free segments to the C library, the one that waits longest first, until at most `kept` bytes are free.
  void drop_segments(size_t kept) {
    while (kept_ > kept && !segments_.empty()) {
      Piece* piece = segments_.begin()->second;
      remove(piece);
      std::free(piece->data);
      delete piece;
    }
  }

  void add(Piece* piece) {
    piece->free = true;
    piece->age = ++age_;
    piece->waiting = free_.emplace(piece->size, piece);
    if (piece->whole()) segments_.emplace(piece->age, piece);
    kept_ += piece->size;
  }

  void remove(Piece* piece) {
    piece->free = false;
    free_.erase(piece->waiting);
    segments_.erase(piece->age);
    kept_ -= piece->size;
  }

  // `after` becomes a part of the piece in front of it.
  static void absorb(Piece* piece, Piece* after) {
    piece->size += after->size;
    piece->after = after->after;
    if (piece->after) piece->after->before = piece;
    delete after;
  }

  std::mutex mutex_;
  std::multimap<size_t, Piece*> free_;  // by size
  std::map<size_t, Piece*> segments_;   // those that are free as a whole, by age
  size_t used_ = 0, most_used_ = 0;     // bytes of results, now and at their most
  size_t kept_ = 0, age_ = 0;           // bytes that wait here
  size_t most_kept_;                    // a sixteenth of the machine's memory, 128 to 512 MiB
};

inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t j = sizes.size(); j-- > 0;) {
    strides[j] = stride;
    stride *= std::max<int64_t>(sizes[j], 1);
  }
  return strides;
}

/// Bytes of an element of the dtypes that results have.
inline size_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
      return 4;
    default:
      return 2;  // bfloat16 and float16
  }
}

/// New tensor on the CPU, its values undefined.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  size_t bytes = element_bytes(dtype);
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes < Pool::kSmallest) return torch::stable::new_empty(like, sizes, dtype);
  Pool::Piece* piece = Pool::get().take(bytes);
  return torch::stable::from_blob(piece->data, sizes, dense_strides(sizes),
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [piece](void*) { Pool::get().give(piece); });
}

/// A tensor of its own on part of `owner`'s memory, which it keeps alive. Not a view: y and dy must not look like
/// aliases of each other, but the next layer gains when they are neighbours.
inline Tensor part_of(const Tensor& owner, int64_t offset, const std::vector<int64_t>& sizes) {
  char* data = static_cast<char*>(owner.data_ptr()) + offset * static_cast<int64_t>(owner.element_size());
  return torch::stable::from_blob(data, sizes, dense_strides(sizes),
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), owner.scalar_type(),
                                  [owner](void*) {});
}

}  // namespace frog
