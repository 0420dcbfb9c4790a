// Local normalization of images in shared memory, float32 and float64.

#include "local_norm_plan.cuh"

namespace mnist_ops::cuda {

template bool run_images<float>(const NormCall<float>&);
template bool run_images<double>(const NormCall<double>&);

}  // namespace mnist_ops::cuda
