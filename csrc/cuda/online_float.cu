// The kernel of online SGD in float32.

#include "online_phases.cuh"

namespace mnist_ops::cuda {

template RunPhases<float>* run_phases_kernel<float>();

}  // namespace mnist_ops::cuda
