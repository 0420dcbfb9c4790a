// Local normalization of images in shared memory, float16 and bfloat16.

#include "local_norm_plan.cuh"

namespace mnist_ops::cuda {

template bool run_images<Half>(const NormCall<Half>&);
template bool run_images<BFloat16>(const NormCall<BFloat16>&);

}  // namespace mnist_ops::cuda
