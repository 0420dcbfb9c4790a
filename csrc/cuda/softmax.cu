// Softmax, log-softmax and softmax + NLL on CUDA: the operators, and which of the ways they take.

#include <array>

#include "softmax.cuh"

namespace mnist_ops::cuda {
namespace {

// ------------------------------------------------------------------------- gradient of the loss

// In the order of memory: the forward left the largest and the log of the sum. n elements a thread,
// n > 1 for rows (inner == 1), of which a pack may meet several; what remains after the packs is
// left to the first threads.
template <int n, typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    nll_gradient_kernel(I count, I size, I inner, Differences<opmath_t<T>> difference,
                        LossGradient<T> grad_loss, const T* __restrict__ input,
                        const int64_t* __restrict__ target, const opmath_t<T>* __restrict__ largest,
                        const opmath_t<T>* __restrict__ log_sum, T* __restrict__ grad_input) {
  using A = opmath_t<T>;
  using U = std::make_unsigned_t<I>;  // unsigned division is the cheaper one
  // The gradient of elements whose line and place along it are given, one line after the other.
  struct Line {
    A factor, largest, log_sum;
    int64_t target;
  };
  const auto line_at = [&](U line) {
    const int64_t t = target[line];
    A factor = difference.beta * grad_loss[line];
    if (t < 0 || t >= static_cast<int64_t>(size)) factor = std::numeric_limits<A>::quiet_NaN();
    return Line{factor, largest[line], log_sum[line], t};
  };
  const auto gradient = [&](const Line& line, U index, T x) {
    A value = line.factor * exp_for<T>(difference(static_cast<A>(x), line.largest) - line.log_sum);
    if (static_cast<int64_t>(index) == line.target) value -= line.factor;
    return static_cast<T>(value);
  };
  const auto one = [&](I i) {
    const U above = inner == 1 ? static_cast<U>(i) : static_cast<U>(i) / static_cast<U>(inner);
    const U outer = above / static_cast<U>(size);
    const U index = above - outer * static_cast<U>(size);  // along the line
    const U line =
        outer * static_cast<U>(inner) + (static_cast<U>(i) - above * static_cast<U>(inner));
    grad_input[i] = gradient(line_at(line), index, input[i]);
  };
  if constexpr (n == 1) {
    for (I i = first_item<I>(); i < count; i += item_stride<I>()) one(i);
  } else {
    const I packs = count / n;
    for (I pack = first_item<I>(); pack < packs; pack += item_stride<I>()) {
      const Pack<T, n> from = load_pack<n>(input + pack * n);
      Pack<T, n> to;
      U row = static_cast<U>(pack * n) / static_cast<U>(size);
      U index = static_cast<U>(pack * n) - row * static_cast<U>(size);
      Line line = line_at(row);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (index == static_cast<U>(size)) {
          index = 0;
          line = line_at(++row);
        }
        to.values[j] = gradient(line, index++, from.values[j]);
      }
      store_pack(grad_input + pack * n, to);
    }
    const I rest = packs * n + first_item<I>();
    if (rest < count) one(rest);
  }
}

template <Kind kind, typename T>
void launch_forward(const Launcher& launcher, const Forward<T>& f) {
  const int64_t rows = f.g.outer, size = f.g.size;
  // A loss is written by itself.
  const T* const out = kind == Kind::kNll ? f.in : f.out;
  if (f.g.inner != 1) {
    const int64_t lines = f.g.outer * f.g.inner;
    if (const int columns = columns_of_block<T>(f.g, f.in, out)) {
      constexpr int n = kLinesOfPack<T>;
      launcher.run(forward_columns_kernel<kind, n, T>, lines / n, columns, columns, f);
      return;
    }
    const int width = lines_of_block(f.g);
    launcher.run(forward_lines_kernel<kind, T>, lines, width, width, f);
    return;
  }
  if (takes_tile<T>(f.g, 1)) {
    // Many tiles for a block where there are many, so that it reads the next one meanwhile.
    constexpr int64_t kBlocks = 8192;
    const int64_t tiles = ceil_div(rows, kThreads);
    const int64_t blocks = ceil_div(tiles, ceil_div(tiles, kBlocks));
    const auto run = [&](auto* kernel) {
      launcher.run_blocks_with_shared(kernel, blocks, kThreads,
                                      2 * kThreads * size * static_cast<int64_t>(sizeof(T)), f,
                                      are_aligned(f.in, out));
    };
    if constexpr (!std::is_same_v<T, double>) {
      if (size == 10) return run(forward_tile_kernel<kind, 10, T>);
    }
    run(forward_tile_kernel<kind, 0, T>);
    return;
  }
  dispatch_pack<T>(
      size,
      [&](auto pack) {
        constexpr int n = decltype(pack)::value;
        dispatch_row<opmath_t<T>, n, 1>(
            size,
            [&](auto loads) {
              constexpr int kLoads = decltype(loads)::value;
              const int lanes = lanes_for(ceil_div(size, n * kLoads));
              launcher.run(forward_warp_kernel<kind, kLoads, n, T>, rows, kThreads / lanes,
                           kThreads, f, lanes);
            },
            [&](auto loads, int threads, int parts) {
              constexpr int kLoads = decltype(loads)::value;
              return launcher.run_clusters(forward_block_kernel<kind, kLoads, n, T>, rows, parts,
                                           threads, f, parts);
            },
            [&] { launcher.run_blocks(forward_stream_kernel<kind, n, T>, rows, kWideBlock, f); });
      },
      f.in, out);
}

template <Kind kind, typename T>
void launch_backward(const Launcher& launcher, const Backward<T>& b) {
  const int64_t rows = b.g.outer, size = b.g.size;
  const T* const result = b.result;
  if (b.g.inner != 1) {
    const int64_t lines = b.g.outer * b.g.inner;
    if (const int columns = columns_of_block<T>(b.g, b.grad, b.out, result)) {
      constexpr int n = kLinesOfPack<T>;
      launcher.run(backward_columns_kernel<kind, n, T>, lines / n, columns, columns, b);
      return;
    }
    const int width = lines_of_block(b.g);
    launcher.run(backward_lines_kernel<kind, T>, lines, width, width, b);
    return;
  }
  if (takes_tile<T>(b.g, 2)) {
    launcher.run(backward_tile_kernel<kind, T>, rows, kThreads, kThreads, b,
                 are_aligned(b.grad, b.out, result));
    return;
  }
  dispatch_pack<T>(
      size,
      [&](auto pack) {
        constexpr int n = decltype(pack)::value;
        dispatch_row<opmath_t<T>, n, 2>(
            size,
            [&](auto loads) {
              constexpr int kLoads = decltype(loads)::value;
              const int lanes = lanes_for(ceil_div(size, n * kLoads));
              launcher.run(backward_warp_kernel<kind, kLoads, n, T>, rows, kThreads / lanes,
                           kThreads, b, lanes);
            },
            [&](auto loads, int threads, int parts) {
              constexpr int kLoads = decltype(loads)::value;
              return launcher.run_clusters(backward_block_kernel<kind, kLoads, n, T>, rows, parts,
                                           threads, b, parts);
            },
            [&] { launcher.run_blocks(backward_stream_kernel<kind, n, T>, rows, kWideBlock, b); });
      },
      b.grad, b.out, result);
}

template <typename T>
void launch_nll_backward(const Launcher& launcher, const NllBackward<T>& b) {
  const int64_t count = b.g.outer * b.g.size * b.g.inner;
  const bool packs = b.g.inner == 1 && are_aligned(b.in, b.result);
  const auto run = [&](auto kernel, int64_t items, auto index) {
    using I = decltype(index);
    launcher.run_over(kernel, items, static_cast<I>(count), static_cast<I>(b.g.size),
                      static_cast<I>(b.g.inner), b.differences, b.grad, b.in, b.target, b.largest,
                      b.log_sum, b.result);
  };
  const auto launch = [&](auto index) {
    using I = decltype(index);
    constexpr int n = kPackSize<T>;
    if (packs) {
      run(nll_gradient_kernel<n, T, I>, ceil_div(count, n), index);
    } else {
      run(nll_gradient_kernel<1, T, I>, count, index);
    }
  };
  if (fits_32_bits(count)) {
    launch(int32_t{});
  } else {
    launch(int64_t{});
  }
}

// ------------------------------------------------------------------------------------- operators

struct Kernels {
  template <Kind kind, typename T>
  static void forward(const Tensor& tensor, const Forward<T>& f) {
    launch_forward<kind>(Launcher(tensor), f);
  }

  template <Kind kind, typename T>
  static void backward(const Tensor& tensor, const Backward<T>& b) {
    launch_backward<kind>(Launcher(tensor), b);
  }

  template <typename T>
  static void nll_backward(const Tensor& tensor, const NllBackward<T>& b) {
    launch_nll_backward(Launcher(tensor), b);
  }

  // To find out the host would have to wait for the device.
  static void check_targets(const char*, const Tensor&, int64_t) {}

  // By PyTorch's own kernel: the same bits every time.
  static Tensor reduced(const Tensor& losses, Reduction reduction) {
    namespace detail = torch::stable::detail;
    std::array<StableIValue, 2> stack{detail::from(losses), detail::from(std::nullopt)};
    const char* const op = reduction == Reduction::kMean ? "aten::mean" : "aten::sum";
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
    return detail::to<Tensor>(stack[0]);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  SoftmaxOperators<Kernels>::register_all(m);
}

}  // namespace mnist_ops::cuda
