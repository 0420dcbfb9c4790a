// Softmax, log-softmax and softmax + NLL on CUDA: the operators, and which of the ways they take.

#include "softmax.cuh"

#include <array>

namespace mnist_ops::cuda {
namespace {

// ------------------------------------------------------------------------- gradient of the loss

// In the order of memory: the forward left the largest and the log of the sum. n elements a thread,
// n > 1 for rows (inner == 1), of which a pack may meet several; what remains after the packs is
// left to the first threads.
template <int n, typename T>
__global__ void __launch_bounds__(kThreads) nll_gradient_kernel(int64_t count, NllBackward<T> b) {
  using A = opmath_t<T>;
  // What the elements of a line share, and the place of its target from some element on, -1 where
  // that is not one of n.
  struct Line {
    A factor, largest, log_sum;
    int place;
  };
  const auto line_at = [&](int64_t line, int64_t start) {
    const int64_t target = b.target[line];
    const uint64_t place = static_cast<uint64_t>(start) + static_cast<uint64_t>(target);
    return Line{nll_factor(b, line, target), b.largest[line], b.log_sum[line],
                place < n ? static_cast<int>(place) : -1};
  };
  const auto gradient = [&](const Line& line, int j, T x) {
    A value = line.factor * nll_share(b, x, line.largest, line.log_sum);
    if (j == line.place) value -= line.factor;
    return static_cast<T>(value);
  };
  // Of the row that begins before or at that element: the first element that is beyond it.
  const auto end_of = [&](int64_t start) {
    const int64_t end = start + b.g.size;
    return end < n ? static_cast<int>(end) : n;
  };
  const int64_t packs = n == 1 ? 0 : count / n;
#pragma unroll 1
  for (int64_t pack = first_item<int64_t>(); pack < packs; pack += item_stride<int64_t>()) {
    const Pack<T, n> from = load_pack<n>(b.in + pack * n);
    Pack<T, n> to;
    int64_t row = quotient(pack * n, b.g.size);
    int64_t start = row * b.g.size - pack * n;  // of the row, seen from the pack's first element
    Line line = line_at(row, start);
    int end = end_of(start);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (j == end) {
        line = line_at(++row, j);
        end = end_of(j);
      }
      to.values[j] = gradient(line, j, from.values[j]);
    }
    store_pack(b.result + pack * n, to);
  }
  // One by one: element `index` of a line lies at (outer * size + index) * inner + column.
#pragma unroll 1
  for (int64_t i = packs * n + first_item<int64_t>(); i < count; i += item_stride<int64_t>()) {
    const int64_t above = b.g.inner == 1 ? i : quotient(i, b.g.inner);
    const int64_t outer = quotient(above, b.g.size);
    const int64_t line = outer * b.g.inner + i - above * b.g.inner;
    b.result[i] = gradient(line_at(line, outer * b.g.size - above), 0, b.in[i]);
  }
}

template <typename T>
void launch_nll_backward(const Launcher& launcher, const NllBackward<T>& b) {
  if (b.g.inner == 1 && nll_gradient_of_short_rows(launcher, b)) return;
  const int64_t count = b.g.outer * b.g.size * b.g.inner;
  constexpr int n = kPackSize<T>;
  const T* const result = b.result;
  if (b.g.inner == 1 && are_aligned(b.in, result)) {
    launcher.run_over(nll_gradient_kernel<n, T>, ceil_div(count, n), count, b);
  } else {
    launcher.run_over(nll_gradient_kernel<1, T>, count, count, b);
  }
}

// ------------------------------------------------------------------------------------- operators

struct Kernels {
  template <Kind kind, typename T>
  static void forward(const Tensor& tensor, const Forward<T>& f) {
    const Launcher launcher(tensor);
    if (f.g.inner != 1) return forward_lines(launcher, kind, f);
    if (!forward_short_rows(launcher, kind, f)) forward_rows(launcher, kind, f);
  }

  template <Kind kind, typename T>
  static void backward(const Tensor& tensor, const Backward<T>& b) {
    const Launcher launcher(tensor);
    if (b.g.inner != 1) return backward_lines(launcher, kind, b);
    if (!backward_short_rows(launcher, kind, b)) backward_rows(launcher, kind, b);
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
