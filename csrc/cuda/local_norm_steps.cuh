// What the steps of local normalization work on: planes in global memory.
#pragma once

#include "local_norm.cuh"

namespace mnist_ops::cuda {

// One number a pixel for all images, N * H * W of them each.
template <typename A>
struct Planes {
  int64_t N, C, HW;
  BlurGeometry geometry;
  LocalNorm kind;
  A threshold, value, root_of_least;
  A *weight, *flipped;  // of the kernel
  A* coef;              // of one image
  A* flags;             // of images: not 0 where they are out of range; null where none is ever
  A* in;                // a sum over channels, to be blurred
  A* scratch;           // blurred along rows
  A *mean, *d;          // what is subtracted, what divides
  A *q, *grads;         // of the gradient: sums over channels of grad * x and of grad
  A *b, *centred, *t;   // of the gradient: see finish()
};

template <typename T>
struct Steps : Planes<opmath_t<T>> {
  static constexpr bool adjoint = false;  // of subtractive: repair has no part in it
  bool channels_last;
  const T* grad;  // null in the forward
  const T* input;
  T* out;

  MNIST_OPS_HD int64_t stride_c() const { return channels_last ? 1 : this->HW; }
  MNIST_OPS_HD int64_t stride_pixel() const { return channels_last ? this->C : 1; }
};

// In local_norm_repair.cu: after the last step, images that the steps found out of range once more.
template <typename T>
void repair(const Launcher& launcher, const Steps<T>& steps);

}  // namespace mnist_ops::cuda
