// Uninitialised memory for a thread's own use.
//
// A thread keeps the pieces that it used last. Shared ones would come from another thread's cache every other time, and
// fetching their lines from there was measured to cost a product of 256 x 256 with 64 rows more than half of its time
// (docs/performance.md).
#pragma once

#include <cstdlib>
#include <vector>

#include "pool.h"

namespace frog {

/// The pieces that a thread keeps. They lie outside of the pool: a small piece that stays would keep the segment around
/// it from being used as a whole.
class ThreadMemory {
 public:
  static constexpr size_t kMost = size_t{2} << 20;  // bytes kept, the size of a second-level cache

  struct Piece {
    void* data;
    size_t size;
  };

  static ThreadMemory& of_this_thread() {
    static thread_local ThreadMemory memory;
    return memory;
  }
  ThreadMemory() = default;
  ThreadMemory(const ThreadMemory&) = delete;
  ThreadMemory& operator=(const ThreadMemory&) = delete;
  ~ThreadMemory() {
    for (const Piece& piece : kept_) std::free(piece.data);
  }

  // The smallest one that is large enough
  Piece take(size_t bytes) {
    auto best = kept_.end();
    for (auto at = kept_.begin(); at != kept_.end(); ++at) {
      if (at->size >= bytes && (best == kept_.end() || at->size < best->size)) best = at;
    }
    if (best == kept_.end()) {
      const size_t size = (bytes + 63) / 64 * 64;
      void* data = std::aligned_alloc(64, size);
      STD_TORCH_CHECK(data != nullptr, "frog_cuda: cannot allocate ", size, " bytes");
      return {data, size};
    }
    const Piece piece = *best;
    bytes_ -= piece.size;
    kept_.erase(best);
    return piece;
  }

  void give(const Piece& piece) {
    kept_.push_back(piece);
    bytes_ += piece.size;
    while (bytes_ > kMost) {  // the one that has waited longest goes
      bytes_ -= kept_.front().size;
      std::free(kept_.front().data);
      kept_.erase(kept_.begin());
    }
  }

 private:
  std::vector<Piece> kept_;  // in the order in which they were given back
  size_t bytes_ = 0;
};

/// `count` elements while it lives, for the thread that makes it. What is too large to stay in a cache is the pool's.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = static_cast<size_t>(std::max<int64_t>(1, count)) * sizeof(T);
    if (bytes > ThreadMemory::kMost / 2) {
      pooled_ = Pool::get().take(bytes);
      data_ = reinterpret_cast<T*>(pooled_->data);
    } else {
      own_ = ThreadMemory::of_this_thread().take(bytes);
      data_ = static_cast<T*>(own_.data);
    }
  }
  ~Scratch() {
    if (pooled_) {
      Pool::get().give(pooled_);
    } else {
      ThreadMemory::of_this_thread().give(own_);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  Pool::Piece* pooled_ = nullptr;
  ThreadMemory::Piece own_{};
  T* data_;
};

}  // namespace frog
