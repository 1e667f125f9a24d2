// Host-only helpers that are not tensor operators: build facts and Philox as numpy arrays, for tests and for the
// curious.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/simd/choice.h"
#include "philox.h"

namespace py = pybind11;

namespace {

// Raised together with ABI in frog_cuda/_load.py whenever a schema changes.
constexpr int kAbi = 1;

// Read once, as the operators do.
const char* simd() {
  static const char* const name = frog::simd_name(frog::choose_simd());
  return name;
}

const char* cuda_sources() {
#if defined(FROG_CUDA_SOURCES)
  return FROG_CUDA_SOURCES;
#else
  return nullptr;
#endif
}

py::dict build_info() {
  py::dict info;
  info["abi"] = kAbi;
  info["sources"] = FROG_SOURCES;
  info["built_with_torch"] = FROG_BUILT_WITH_TORCH;
  info["simd"] = simd();
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#else
  info["compiler"] = std::string("g++ ") + __VERSION__;
#endif
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["cuda"] = cuda_sources() != nullptr;
  return info;
}

// counters: uint32 [n, 4], key: (k0, k1) -> uint32 [n, 4]
py::array_t<uint32_t> philox(py::array_t<uint32_t, py::array::c_style | py::array::forcecast> counters, uint32_t k0,
                             uint32_t k1) {
  if (counters.ndim() != 2 || counters.shape(1) != 4) {
    throw py::value_error("counters: expected a uint32 array of shape (n, 4)");
  }
  py::array_t<uint32_t> words({counters.shape(0), static_cast<py::ssize_t>(4)});
  auto in = counters.unchecked<2>();
  auto out = words.mutable_unchecked<2>();
  for (py::ssize_t row = 0; row < in.shape(0); ++row) {
    const frog::PhiloxWords drawn =
        frog::philox4x32_10({{in(row, 0), in(row, 1), in(row, 2), in(row, 3)}}, frog::PhiloxKey{k0, k1});
    for (int j = 0; j < 4; ++j) out(row, j) = drawn.w[j];
  }
  return words;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-only parts of frog_cuda.";
  m.def("abi", [] { return kAbi; }, "The schema version this library was built for.");
  m.def("sources", [] { return FROG_SOURCES; }, "The fingerprint of csrc/ this library was built from.");
  m.def("cuda_sources", &cuda_sources, "That of the CUDA kernels; None where they were not built.");
  m.def("simd", &simd, "The vector kernels that run here; raises ValueError where FROG_CUDA_SIMD names none.");
  m.def("build_info", &build_info, "What this build contains, as a dict.");
  m.def("philox", &philox, py::arg("counters"), py::arg("k0"), py::arg("k1"),
        "Philox4x32-10 of each row of counters (n, 4) under the key (k0, k1).");
}
