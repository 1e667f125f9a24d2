// What every CUDA operator shares on the host: device and stream, argument checks, pointers, dispatch on the element
// type.
//
// No operator waits for the device or reads its memory, so that all of them can be captured in a CUDA graph.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"
#include "kernels/types.cuh"

namespace frog {

/// While it lives, the device of `tensor` is current; converts to that device's current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  operator cudaStream_t() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

/// `t` is on the GPU that `like` is on.
inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda(), op, ": ", name,
                  " is not on the GPU, but another argument is; all must be on one device");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), op, ": ", name, " is on cuda:", t.get_device_index(),
                  ", but another argument is on cuda:", like.get_device_index(), "; all must be on one device");
}

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* in(const std::optional<Tensor>& t) {
  return t.has_value() ? in<T>(*t) : nullptr;
}
template <class T>
T* out(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

/// An uninitialised tensor on the device of `like`.
inline Tensor new_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

/// Calls body(T{}) with the kernels' name for the element type of `type`, one of the four floating types.
template <class Body>
void dispatch_floating(const char* op, ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(bf16{});
    case ScalarType::Half:
      return body(fp16{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype ", dtype_string(type),
                      " is not supported; accepted are float32, float64, bfloat16 and float16");
  }
}

}  // namespace frog
