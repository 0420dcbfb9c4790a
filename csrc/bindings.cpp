// The pybind11 module mnist_ops._C. Importing it registers the operators' schemas (library.cpp);
// the kernels come in the libraries that mnist_ops/_libraries.py then loads for this machine.

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

bool cpu_has_avx2() {
#if defined(__x86_64__)
  // F16C has no name of its own in older compilers' __builtin_cpu_supports; every processor with
  // AVX2 has it.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
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
  m.def("cpu_has_avx2", &cpu_has_avx2, "Whether this processor runs the AVX2 + FMA kernels.");
}
