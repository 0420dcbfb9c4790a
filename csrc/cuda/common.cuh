// All of what the CUDA kernels share.
#pragma once

#include "fast_math.cuh"
#include "launch.cuh"
#include "memory.cuh"
#include "reduce.cuh"
