// A stage (activation, LP pooling, subtractive normalization) on CUDA: the operators, and which of
// the ways they take.

#include "stage.cuh"

namespace mnist_ops::cuda {
namespace {

// ------------------------------------------------------------------------------------- operators

PoolGeometryOf<int32_t> narrow(const PoolGeometry& g) {
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  PoolGeometryOf<int32_t> s{};
  s.N = narrow(g.N), s.C = narrow(g.C), s.H = narrow(g.H), s.W = narrow(g.W);
  s.OH = narrow(g.OH), s.OW = narrow(g.OW);
  s.kernel_h = narrow(g.kernel_h), s.kernel_w = narrow(g.kernel_w);
  s.stride_h = narrow(g.stride_h), s.stride_w = narrow(g.stride_w);
  s.padding_h = narrow(g.padding_h), s.padding_w = narrow(g.padding_w);
  s.in_n = narrow(g.in_n), s.in_c = narrow(g.in_c);
  s.in_h = narrow(g.in_h), s.in_w = narrow(g.in_w);
  s.out_n = narrow(g.out_n), s.out_c = narrow(g.out_c);
  s.out_h = narrow(g.out_h), s.out_w = narrow(g.out_w);
  return s;
}

// Whether every index into `images` images, and every bound of a window, fits into 32 bits.
bool fits_narrow(const PoolGeometry& g, int64_t images) {
  const int64_t rows = g.H + 2 * g.padding_h + g.kernel_h + g.stride_h;
  const int64_t columns = g.W + 2 * g.padding_w + g.kernel_w + g.stride_w;
  return fits_32_bits(images * g.in_n) && fits_32_bits(images * g.out_n) && fits_32_bits(rows) &&
         fits_32_bits(columns);
}

// How many elements, neighbours of a row or channels, a thread takes at once where 2 x 2 windows
// with p = 2 tile the image; 0 where windows are taken one by one.
template <typename T, typename... Pointers>
int tile_pack(const StageArguments& arguments, bool channels_last, const Pointers*... images) {
  const PoolGeometry& g = arguments.geometry;
  const bool tiles = g.kernel_h == 2 && g.kernel_w == 2 && g.stride_h == 2 && g.stride_w == 2 &&
                     g.padding_h == 0 && g.padding_w == 0;
  // With ceil_mode a last row of windows may hang over the image.
  const bool inside = 2 * g.OH <= g.H && 2 * g.OW <= g.W;
  if (arguments.p != 2.0 || !tiles || !inside) return 0;
  for (int n = kNeighbours<T>; n >= (channels_last ? kNeighbours<T> : 2); n /= 2) {
    const auto aligned = [n](const void* pointer) {
      return reinterpret_cast<uintptr_t>(pointer) % (static_cast<size_t>(n) * sizeof(T)) == 0;
    };
    if ((channels_last ? g.C : g.W) % n == 0 && (aligned(images) && ...)) return n;
  }
  return 0;
}

// The stage for one kernel, a block for each image. map: a tensor of the output's shape; pack: what
// tile_pack said. The geometry must fit into 32 bits.
template <typename T>
Fused<T> fused(const StageArguments& arguments, bool channels_last, const Tensor& kernel,
               const T* map, int pack) {
  constexpr int n = kNeighbours<T>;
  const PoolGeometry& g = arguments.geometry;
  Fused<T> s{};
  s.N = g.N;
  s.g = narrow(g);
  s.activation = arguments.activation;
  s.channels_last = channels_last;
  s.p = static_cast<opmath_t<T>>(arguments.p);
  s.kernel = kernel.const_data_ptr();
  s.kernel_type = kernel.scalar_type();
  s.taps_h = static_cast<int32_t>(kernel.size(0));
  s.taps_w = static_cast<int32_t>(kernel.size(kernel.dim() - 1));
  s.separable = kernel.dim() == 1;
  s.sum_pack = (channels_last ? s.g.C : s.pixels()) % n == 0;
  s.map_pack = (channels_last ? s.g.C : s.map_size()) % n == 0 &&
               reinterpret_cast<uintptr_t>(map) % (n * sizeof(T)) == 0;
  s.groups = std::min(s.sum_parts(), std::max(4, 128 / s.sum_units()));
  if (pack > 0) {
    s.unit_row = static_cast<uint32_t>((channels_last ? s.g.C : s.g.W) / pack);
    s.units = s.unit_row * static_cast<uint32_t>(channels_last ? s.pixels() : s.g.C * s.g.OH);
    s.by_unit_row = Divider(s.unit_row);
  }
  s.by_rows = Divider(channels_last ? g.OW : g.OH);
  s.by_width = Divider(g.OW);
  s.by_inner = Divider(channels_last ? g.C : g.OH * g.OW);
  s.by_sums = Divider(s.sum_units());
  return s;
}

// Whether a block can hold an image; every size that Fused has is then far below 2^31, and the
// divisions are exact.
template <typename T>
bool fits_block(const StageArguments& arguments, bool channels_last, const Tensor& kernel,
                int maps) {
  const PoolGeometry& g = arguments.geometry;
  constexpr int64_t kMost = 65535;
  const auto product = [](int64_t a, int64_t b) {
    return a > kMost || b > kMost ? kMost + 1 : a * b;
  };
  const int64_t pixels = product(g.OH, g.OW);
  if (!fits_narrow(g, 1) || kernel.numel() > kMost || product(g.C + 1, pixels) > kMost ||
      product(g.OH + kernel.size(0), g.OW + kernel.size(kernel.dim() - 1)) > kMost) {
    return false;
  }
  const Fused<T> s = fused<T>(arguments, channels_last, kernel, static_cast<const T*>(nullptr), 0);
  return s.shared_bytes(maps) <= shared_memory_limit();
}

// The kernel as it came, or in a type and order that the device reads.
Tensor readable(const Tensor& kernel) {
  switch (kernel.scalar_type()) {
    case ScalarType::Double:
    case ScalarType::Float:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return contiguous_of(kernel);
    default:
      return kernel_in_double(kernel);  // says what is wrong
  }
}

Tensor forward(const char* op, const Images& x, const Tensor& kernel,
               const StageArguments& arguments) {
  const Launcher launcher(x.data);
  Tensor output;
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (x.data.numel() == 0 || fits_block<T>(arguments, x.channels_last, kernel, 1)) {
      output = new_pooled(x, arguments.geometry);
      if (x.data.numel() == 0) return;
      const Tensor weights = readable(kernel);
      const T* in = x.data.const_data_ptr<T>();
      T* out = output.mutable_data_ptr<T>();
      const int pack = tile_pack<T>(arguments, x.channels_last, in);
      const Fused<T> s = fused<T>(arguments, x.channels_last, weights, out, pack);
      if (pack > 0) {
        return dispatch_tiles<T>(x.channels_last, pack, [&](auto tag) {
          launcher.run_blocks_with_shared(tile_forward_kernel<tag.channels_last, tag.pack, T>, s.N,
                                          tile_threads(s), s.shared_bytes(1), s, in, out);
        });
      }
      dispatch_norm(arguments.p, [&](auto tag) {
        launcher.run_blocks_with_shared(fused_forward_kernel<decltype(tag)::value, T>, s.N,
                                        kStageThreads, s.shared_bytes(1), s, in, out);
      });
      return;
    }
    output = subtractive_norm2d(pooled_map<T>(launcher, x, arguments), kernel);
    if (output.scalar_type() != x.data.scalar_type()) {
      output = torch::stable::to(output, x.data.scalar_type());
    }
  });
  return output;
}

Tensor backward(const char* op, const Tensor& grad_output, const Images& x, const Tensor& kernel,
                const StageArguments& arguments) {
  const Launcher launcher(x.data);
  Tensor grad_input = empty_images(x, x.H, x.W);
  if (x.data.numel() == 0) return grad_input;
  dispatch_floating(op, x.data.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = opmath_t<T>;
    const T* in = x.data.const_data_ptr<T>();
    T* gi = grad_input.mutable_data_ptr<T>();
    const int pack = tile_pack<T>(arguments, x.channels_last, in, gi);
    const int maps = pack > 0 ? 1 : 2;
    if (fits_block<T>(arguments, x.channels_last, kernel, maps)) {
      const Tensor weights = readable(kernel);
      const T* go = grad_output.const_data_ptr<T>();
      const Fused<T> s = fused<T>(arguments, x.channels_last, weights, go, pack);
      if (pack > 0) {
        return dispatch_tiles<T>(x.channels_last, pack, [&](auto tag) {
          launcher.run_blocks_with_shared(tile_backward_kernel<tag.channels_last, tag.pack, T>, s.N,
                                          tile_threads(s), s.shared_bytes(1), s, go, in, gi);
        });
      }
      dispatch_norm(arguments.p, [&](auto tag) {
        launcher.run_blocks_with_shared(fused_backward_kernel<decltype(tag)::value, T>, s.N,
                                        kStageThreads, s.shared_bytes(2), s, go, in, gi);
      });
      return;
    }
    const Tensor grad = subtractive_norm2d_backward(grad_output, kernel);
    const Tensor pooled = pooled_map<T>(launcher, x, arguments);
    dispatch_large(arguments, [&](auto tag, const auto& g) {
      using I = decltype(g.N + 0);
      launcher.run_over(unpool_kernel<decltype(tag)::value, T, I>, grad_input.numel(),
                        static_cast<I>(grad_input.numel()), g, x.channels_last,
                        arguments.activation, static_cast<A>(arguments.p), grad.const_data_ptr<T>(),
                        in, pooled.const_data_ptr<A>(), gi);
    });
  });
  return grad_input;
}

using Operators = StageOperators<&forward, &backward>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  Operators::register_all(m);
}

}  // namespace mnist_ops::cuda
