// The kernel of online SGD in float64.

#include "online_phases.cuh"

namespace mnist_ops::cuda {

template RunPhases<double>* run_phases_kernel<double>();

}  // namespace mnist_ops::cuda
