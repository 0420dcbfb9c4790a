// The pybind11 module mnist_ops._C. Importing it registers the operators' schemas (library.cpp);
// the kernels come in the libraries that mnist_ops/_libraries.py then loads for this machine.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;

namespace {

// The libraries of CPU kernels that this processor runs, the fastest first, as setup.py names them.
std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names{"baseline"};
#if defined(__x86_64__)
  // F16C has no name of its own in older compilers' __builtin_cpu_supports; every processor with
  // AVX2 has it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx2) names.insert(names.begin(), "avx2");
  if (avx2 && avx512) names.insert(names.begin(), "avx512");
#endif
  return names;
}

py::dict build_info() {
  py::dict info;
  info["version"] = MNIST_OPS_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["target_torch"] = MNIST_OPS_TARGET_TORCH;
  info["built_with_torch"] = MNIST_OPS_BUILT_WITH_TORCH;
  info["cuda_archs"] = MNIST_OPS_CUDA_ARCHS;
  info["cuda_reason"] = MNIST_OPS_CUDA_REASON;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Schemas of the mnist_ops operators, and how the extension was built.";
  m.def("build_info", &build_info, "What was decided when the extension was compiled.");
  m.def("cpu_capabilities", &cpu_capabilities, "The CPU kernels that run here, the fastest first.");
}
