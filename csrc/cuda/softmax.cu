// Softmax, log-softmax and softmax + NLL on CUDA: the operators, and which of the ways they take.

#include "softmax.cuh"

namespace mnist_ops::cuda {
namespace {

// ------------------------------------------------------------------------------ sum of the losses

constexpr int kSumBlock = 1024;  // threads

// Adds up losses and divisors, or what `count` blocks have left in parts. Several blocks leave
// their sums for another launch; one block writes the result. In float64 and in an order that
// depends on the shape alone.
template <typename T>
__global__ void __launch_bounds__(kSumBlock)
    sum_losses_kernel(int64_t count, Forward<T> f, const LossSum* parts, T* loss,
                      opmath_t<T>* total) {
  using A = opmath_t<T>;
  __shared__ double shared[kSumBlock / kWarp];
  LossSum sum{0, 0};
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSumBlock + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kSumBlock) {
    if (parts != nullptr) {
      sum.losses += parts[i].losses;
      sum.divisor += parts[i].divisor;
    } else {
      sum.losses += static_cast<double>(static_cast<A>(f.out[i]));
      if (total != nullptr) sum.divisor += static_cast<double>(f.target_of(i, 0).divisor());
    }
  }
  sum.losses = block_sum<kSumBlock>(sum.losses, shared);
  sum.divisor = block_sum<kSumBlock>(sum.divisor, shared);
  if (threadIdx.x > 0) return;
  if (parts == nullptr && f.blocks > 1) return write_sum(f, sum);
  if (total != nullptr) {
    sum.losses = sum.mean();
    *total = static_cast<A>(sum.divisor);
  }
  *loss = static_cast<T>(static_cast<A>(sum.losses));
}

// ------------------------------------------------------------------------------------- operators

struct Kernels {
  template <typename Arguments>
  static bool are_short_rows(Kind kind, const Arguments& a) {
    return a.g.inner == 1 && a.g.size <= kMostShortRow && !has_packs(kind, a);
  }

  template <Kind kind, typename Arguments>
  static void run(const Tensor& tensor, const Arguments& a) {
    const Launcher launcher(tensor);
    if (are_short_rows(kind, a)) return launch_tiles(launcher, kind, a);
    return a.g.inner == 1 ? launch_rows(launcher, kind, a) : launch_lines(launcher, kind, a);
  }

  // They make NaN.
  static void check_targets(const NllArguments&) {}

  template <typename T>
  static void nll(const Tensor& losses, Forward<T> f, Tensor* loss, Tensor* total) {
    if (loss == nullptr) return run<Kind::kNll>(losses, f);
    // Blocks that add up losses: of the kernel that computes them, else of the one above, which has
    // several only where there are more losses than a few for each thread.
    const int64_t count = losses.numel();
    const bool adds = are_short_rows(Kind::kNll, f);
    f.blocks = adds ? blocks_of_tiles(f)
                    : std::clamp<int64_t>(ceil_div(count, 4 * kSumBlock), 1, kSumBlock);
    const Tensor sums = new_tensor(losses, {2 * f.blocks}, ScalarType::Double);
    auto* const parts = reinterpret_cast<LossSum*>(sums.mutable_data_ptr<double>());
    if (adds) f.sums = parts;
    run<Kind::kNll>(losses, f);
    f.sums = parts;
    const Launcher launcher(losses);
    const auto add_up = [&](int64_t blocks, int64_t items, const LossSum* from) {
      opmath_t<T>* const divisor = total ? total->mutable_data_ptr<opmath_t<T>>() : nullptr;
      launcher.run_blocks(sum_losses_kernel<T>, blocks, kSumBlock, items, f, from,
                          loss->mutable_data_ptr<T>(), divisor);
    };
    if (!adds) add_up(f.blocks, count, nullptr);
    if (adds || f.blocks > 1) add_up(1, f.blocks, parts);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  SoftmaxOperators<Kernels>::register_all(m);
}

}  // namespace mnist_ops::cuda
