// Means of neighbourhoods on CUDA: a launch for the tables of weights, then for a separable kernel
// one along the rows and one along the columns, for a 2-D kernel one for both.
//
// A thread computes a pixel. Its neighbours were read by neighbouring threads and come from L1, and
// so do the weights.

#include "../local_mean.h"

#include "blur.cuh"

namespace mnist_ops::cuda {
namespace {

// The tables of the columns' and of the rows' weights, one behind the other. Every block adds up
// the kernel for itself, so that one launch does.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    weights_kernel(const __grid_constant__ MeanBands bands, int64_t values_count,
                   const double* __restrict__ values, A* __restrict__ weights) {
  __shared__ double shared[kThreads / kWarp];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < values_count; i += kThreads) sum += values[i];
  sum = block_sum<kThreads>(sum, shared);
  const int64_t of_columns = bands.column_weights(), count = of_columns + bands.row_weights();
  for (int64_t i = first_item<int64_t>(); i < count; i += item_stride<int64_t>()) {
    const Band& band = i < of_columns ? bands.columns : bands.rows;
    const int64_t index = i < of_columns ? i : i - of_columns;
    const int64_t line = quotient(index, band.size), a = quotient(line, band.taps);
    const int64_t at = index - line * band.size, d = line - a * band.taps;
    weights[i] = static_cast<A>(i < of_columns ? bands.column_weight(values, sum, a, d, at)
                                               : bands.row_weight(values, sum, a, d, at));
  }
}

// A dimension: its pixels' distance in memory, and its weights, [pair][tap][pixel]. With one tap of
// weight 1 it is left as it is.
template <typename A>
struct Along {
  int64_t size, step, taps = 1;
  const A* weights = nullptr;

  __device__ __forceinline__ A weight(int64_t a, int64_t d, int64_t i) const {
    return weights == nullptr ? A(1) : weights[(a * taps + d) * size + i];
  }
};

template <typename From, typename To, typename A>
__global__ void __launch_bounds__(kThreads)
    means_kernel(int64_t count, int64_t pairs, const __grid_constant__ Along<A> height,
                 const __grid_constant__ Along<A> width, const From* __restrict__ in,
                 To* __restrict__ out) {
  for (int64_t i = first_item<int64_t>(); i < count; i += item_stride<int64_t>()) {
    const int64_t column = quotient(i, width.step), row = quotient(column, width.size);
    const int64_t w = column - row * width.size;
    const int64_t h = row - quotient(row, height.size) * height.size;
    const Taps rows = taps_inside(h, height.size, height.taps);
    const Taps columns = taps_inside(w, width.size, width.taps);
    A sum = A(0);
    for (int64_t a = 0; a < pairs; ++a) {
#pragma unroll 1
      for (int64_t d = rows.first; d < rows.last; ++d) {
        const A of_row = height.weight(a, d, h);
        if (of_row == A(0)) continue;  // not looked at: infinity times 0 were NaN
        const From* const from = in + i + (d - height.taps / 2) * height.step;
        A row_sum = A(0);
#pragma unroll 4
        for (int64_t e = columns.first; e < columns.last; ++e) {
          row_sum +=
              width.weight(a, e, w) * static_cast<A>(from[(e - width.taps / 2) * width.step]);
        }
        sum += of_row * row_sum;
      }
    }
    out[i] = static_cast<To>(sum);
  }
}

Tensor means(const char* op, const Images& x, const Tensor& kernel, const MeanBands& bands) {
  const Launcher launcher(x.data);
  Tensor output = empty_images(x, x.H, x.W);
  const int64_t count = output.numel();
  if (count == 0) return output;
  const ScalarType dtype = type_to_compute_in(x.data);
  const Tensor values = kernel_in_double(kernel);
  const int64_t weights_count = bands.column_weights() + bands.row_weights();
  Tensor weights = new_tensor(x.data, {weights_count}, dtype);
  Tensor between = new_tensor(x.data, {bands.separable ? count : 0}, dtype);
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    A* const columns = weights.mutable_data_ptr<A>();
    launcher.run_over(weights_kernel<A>, weights_count, bands, values.numel(),
                      values.const_data_ptr<double>(), columns);
    const int64_t inner = x.channels_last ? x.C : 1;
    const Along<A> high{x.H, x.W * inner}, wide{x.W, inner};
    const Along<A> height{high.size, high.step, bands.columns.taps, columns};
    const Along<A> width{wide.size, wide.step, bands.rows.taps, columns + bands.column_weights()};
    const T* const in = x.data.const_data_ptr<T>();
    T* const out = output.mutable_data_ptr<T>();
    if (!bands.separable) {
      launcher.run_over(means_kernel<T, T, A>, count, count, bands.pairs, height, width, in, out);
      return;
    }
    A* const blurred = between.mutable_data_ptr<A>();
    launcher.run_over(means_kernel<T, A, A>, count, count, bands.pairs, high, width, in, blurred);
    launcher.run_over(means_kernel<A, T, A>, count, count, bands.pairs, height, wide,
                      static_cast<const A*>(blurred), out);
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  LocalMeanOperators<&means>::register_all(m);
}

}  // namespace mnist_ops::cuda
