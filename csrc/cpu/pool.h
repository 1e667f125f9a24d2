// Result memory that is used again. A pass makes and drops the same tensors step after step; the C library hands memory
// of this size back to the system and gets it anew, page by page, which was measured to cost 30 % of an
// activity-perturbed gradient of a 784-256-256-10 net. So blocks that are freed wait here for the next result of about
// their size.
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

  // Never destroyed: tensors may outlive everything static.
  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }

  void* take(size_t bytes, size_t* size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = free_.lower_bound(bytes);
      if (found != free_.end() && found->first <= bytes + bytes / 8) {
        void* block = found->second.block;
        *size = found->first;
        forget(found);
        return block;
      }
    }
    *size = (bytes + 63) / 64 * 64;
    void* block = std::aligned_alloc(64, *size);
    STD_TORCH_CHECK(block != nullptr, "frog_cuda: cannot allocate ", *size, " bytes");
    return block;
  }

  void give(void* block, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (size > most_kept_) return std::free(block);
    while (kept_ + size > most_kept_) {
      const auto oldest = by_age_.begin()->second;
      std::free(oldest->second.block);
      forget(oldest);
    }
    const auto place = free_.emplace(size, Waiting{block, ++age_});
    by_age_.emplace(age_, place);
    kept_ += size;
  }

 private:
  struct Waiting {
    void* block;
    size_t age;
  };
  using Blocks = std::multimap<size_t, Waiting>;

  Pool() {
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    const size_t memory = pages > 0 && page > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(page) : 0;
    most_kept_ = std::clamp(memory / 16, size_t{128} << 20, size_t{512} << 20);
  }

  void forget(Blocks::iterator place) {
    kept_ -= place->first;
    by_age_.erase(place->second.age);
    free_.erase(place);
  }

  std::mutex mutex_;
  Blocks free_;                                // by size
  std::map<size_t, Blocks::iterator> by_age_;  // the one that waits longest makes room first
  size_t kept_ = 0, age_ = 0;
  size_t most_kept_;  // bytes waiting here at most: a sixteenth of the machine's memory, 128 to 512 MiB
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
  size_t size;
  void* block = Pool::get().take(bytes, &size);
  return torch::stable::from_blob(block, sizes, dense_strides(sizes),
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [size](void* p) { Pool::get().give(p, size); });
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
