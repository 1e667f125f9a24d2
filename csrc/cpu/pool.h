// Result memory that is used again. A pass makes and drops the same tensors step after step; the C library hands memory
// of this size back to the system and gets it anew, page by page, which was measured to cost 30 % of an
// activity-perturbed gradient of a 784-256-256-10 net. So what is freed waits here for the next result.
//
// All of it lies in one range of addresses, as large as the machine's memory, or smaller where a process may have few:
// addresses cost no memory until they are written to. Where the system sets memory aside for every address there is no
// range, and results come from the C library. In one range all neighbours that are free grow together, so what
// a wide layer has left serves narrow ones and the other way round, and pages go back to the system wherever they lie.
#pragma once

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>

#include "../stable_compat.h"

namespace frog {

class Pool {
 public:
  static constexpr size_t kSmallest = size_t{64} << 10;  // bytes; what is smaller the C library keeps by itself
  static constexpr size_t kSlack = size_t{1} << 19;      // bytes kept beyond what was needed at its most and a 32nd

  static constexpr size_t kSmallestRange = size_t{1} << 30;

  enum class State {
    kUsed,     // a result
    kFree,     // waits for one, with the memory behind its addresses
    kEmpty,    // addresses alone
    kOutside,  // taken from the C library
  };

  // A part of the range, in another state than the parts beside it unless both are used; or outside.
  struct Piece {
    char* data;
    size_t size;
    State state;
    Piece *before = nullptr, *after = nullptr;
    // Of a free piece:
    size_t age = 0;                                               // when the youngest part of it was given back
    std::multimap<size_t, Piece*>::iterator by_size{}, by_age{};  // its places among those
  };

  // Never destroyed: tensors may outlive everything static.
  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }

  Piece* take(size_t bytes) {
    const size_t size = round_up(std::max(bytes, kSmallest), 64);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = free_.lower_bound(size);
    if (found == free_.end()) return new_place(size);
    Piece* piece = found->second;
    cut(piece, size);
    become(piece, State::kUsed);
    return piece;
  }

  void give(Piece* piece) {
    if (piece->state == State::kOutside) {
      std::free(piece->data);
      delete piece;
      return;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    piece->age = ++age_;
    become(piece, State::kFree);
    join(piece);
    shrink(most_kept_);
  }

 private:
  Pool() : page_(static_cast<size_t>(std::max(sysconf(_SC_PAGESIZE), 1L))) {
    const size_t memory = static_cast<size_t>(std::max(sysconf(_SC_PHYS_PAGES), 0L)) * page_;
    most_kept_ = std::clamp(memory / 16, size_t{128} << 20, size_t{512} << 20);
    size_t size = memory;
    for (const auto limited : {RLIMIT_AS, RLIMIT_DATA}) {  // of which others need most
      rlimit limit{};
      if (getrlimit(limited, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
        size = std::min(size, static_cast<size_t>(limit.rlim_cur) / 4);
      }
    }
    if (counts_addresses()) size = 0;
    for (; first_ == nullptr && size >= kSmallestRange; size /= 2) {
      size = size / page_ * page_;
      void* data =
          mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, /*fd=*/-1, 0);
      if (data != MAP_FAILED) first_ = new Piece{static_cast<char*>(data), size, State::kEmpty};
    }
  }

  // Whether the system sets memory aside for every address (overcommit_memory 2), so that a range would leave others
  // none.
  static bool counts_addresses() {
    std::ifstream file("/proc/sys/vm/overcommit_memory");
    int mode = 0;
    return file >> mode && mode == 2;
  }

  static size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

  // No free piece is large enough. The result gets the place where most memory lies already, and what else is free
  // makes room, so that the memory of a pass is hardly more than what it needs at its most, in whatever order sizes
  // come.
  Piece* new_place(size_t size) {
    Piece* place = nullptr;
    size_t most_free = 0;
    for (Piece* start = first_; start != nullptr; start = start->after) {
      size_t total = 0, free = 0;
      for (const Piece* p = start; p != nullptr && p->state != State::kUsed && total < size; p = p->after) {
        if (p->state == State::kFree) free += std::min(p->size, size - total);
        total += p->size;
      }
      if (total >= size && (place == nullptr || free > most_free)) place = start, most_free = free;
    }
    if (place == nullptr) return outside(size);
    cut(place, size);
    become(place, State::kUsed);
    while (place->size < size) {
      cut(place->after, size - place->size);
      become(place->after, State::kUsed);
      absorb_next(place);
    }
    const size_t most = most_used_ + most_used_ / 32 + kSlack;
    shrink(most - std::min(most, used_));
    return place;
  }

  // From the C library, as everything is where the system does not hand out so many addresses.
  static Piece* outside(size_t size) {
    char* data = static_cast<char*>(std::aligned_alloc(64, size));
    STD_TORCH_CHECK(data != nullptr, "frog_cuda: cannot allocate ", size, " bytes");
    return new Piece{data, size, State::kOutside};
  }

  // Gives memory back to the system, of what waits longest first, until at most `kept` bytes are free.
  // Where a process has locked its memory the system takes none, and what counts as empty keeps it.
  void shrink(size_t kept) {
    while (kept_ > kept) {
      Piece* piece = oldest_.begin()->second;
      const size_t goes = round_up(kept_ - kept, kSmallest);
      if (piece->size > goes && cut(piece, piece->size - goes)) piece = piece->after;
      const size_t begin = round_up(address(piece->data), page_);
      const size_t end = address(piece->data + piece->size) / page_ * page_;
      if (begin < end) madvise(piece->data + (begin - address(piece->data)), end - begin, MADV_DONTNEED);
      become(piece, State::kEmpty);
      join(piece);
    }
  }

  static size_t address(const char* data) { return reinterpret_cast<size_t>(data); }

  // Cuts a piece behind `size` bytes, and says so. A rest that is too small for a result stays a part of it.
  bool cut(Piece* piece, size_t size) {
    if (piece->size < size + kSmallest) return false;
    Piece* rest = new Piece{piece->data + size, piece->size - size, piece->state, piece, piece->after, piece->age};
    leave(piece);
    if (rest->after) rest->after->before = rest;
    piece->after = rest;
    piece->size = size;
    enter(piece);
    enter(rest);
    return true;
  }

  // Joins a piece that is not used with neighbours in its state.
  void join(Piece* piece) {
    if (piece->after && piece->after->state == piece->state) absorb_next(piece);
    if (piece->before && piece->before->state == piece->state) absorb_next(piece->before);
  }

  void absorb_next(Piece* piece) {
    Piece* next = piece->after;
    leave(piece);
    leave(next);
    piece->size += next->size;
    piece->age = std::max(piece->age, next->age);
    piece->after = next->after;
    if (piece->after) piece->after->before = piece;
    delete next;
    enter(piece);
  }

  void become(Piece* piece, State state) {
    leave(piece);
    piece->state = state;
    enter(piece);
  }

  void enter(Piece* piece) {
    if (piece->state == State::kUsed) {
      used_ += piece->size;
      most_used_ = std::max(most_used_, used_);
    } else if (piece->state == State::kFree) {
      piece->by_size = free_.emplace(piece->size, piece);
      piece->by_age = oldest_.emplace(piece->age, piece);
      kept_ += piece->size;
    }
  }

  void leave(Piece* piece) {
    if (piece->state == State::kUsed) {
      used_ -= piece->size;
    } else if (piece->state == State::kFree) {
      free_.erase(piece->by_size);
      oldest_.erase(piece->by_age);
      kept_ -= piece->size;
    }
  }

  std::mutex mutex_;
  Piece* first_ = nullptr;                // of the range
  std::multimap<size_t, Piece*> free_;    // by size
  std::multimap<size_t, Piece*> oldest_;  // the same, by age
  size_t used_ = 0, most_used_ = 0;       // bytes of results, now and at their most
  size_t kept_ = 0, age_ = 0;             // bytes that wait here
  size_t page_;                           // bytes
  size_t most_kept_;                      // a sixteenth of the machine's memory, 128 to 512 MiB
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
