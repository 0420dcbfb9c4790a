// Local normalization of images in registers.
//
// Counted for images of 64 x 14 x 14 and a kernel of 9 taps, in the code for 9.0, and not yet timed
// on a GPU. The yardstick is a multiprocessor's part of the memory's bandwidth, 13 bytes a cycle; a
// multiprocessor begins four instructions of a warp and moves 128 bytes of shared memory a cycle.
//
//                                            forward            backward
//                                       float32  bfloat16   float32  bfloat16
//   bytes of memory an image                100 K      50 K     150 K      75 K
//   cycles that they take                  7,700     3,900    11,600     5,800
//   threads of a block, blocks at a time  416, 2    224, 3    800, 1    416, 2
//   bytes of shared memory moved             20 K      20 K     280 K      80 K
//   instructions an element                   32        29        61        52
//   cycles in which they begin             3,200     2,900     6,000     5,100
//   the same for contrastive               4,400     4,200     7,600     6,900
//
// Nothing waits for a load but its own block: with one block a multiprocessor (backward, large
// images) the next image is on its way to shared memory while this one is in registers. That is
// the double buffer of a producer with bulk copies, but each thread fetches what it will hold
// itself: no barrier is needed, results are stored from registers, and there is one kernel for all
// architectures (before 8.0, whose copies are not asynchronous, it gains nothing).

#include "local_norm_image.cuh"

#include <bit>
#include <numeric>

namespace mnist_ops::cuda {
namespace {

// Of a block, so that every thread has the registers that it takes of the 65536 that there are: 128
// in float64, 72 or, where sums of eight elements or an element's place are held as well, 80.
template <bool gradient, bool kPacked, typename T>
constexpr int kMostImageThreads = sizeof(T) == 8                            ? 512
                                  : kPacked && (gradient || sizeof(T) == 4) ? 896
                                                                            : 768;

template <bool gradient, bool kPacked, typename T>
__global__ void __launch_bounds__((kMostImageThreads<gradient, kPacked, T>))
    image_kernel(const __grid_constant__ ImageArguments<T> a) {
  using A = opmath_t<T>;
  const ImageBlock<gradient, kPacked, T> block(a, reinterpret_cast<A*>(dynamic_shared_memory()));
  T* const stage = reinterpret_cast<T*>(block.planes + a.at.size);
  T* const stage_of_grad = stage + a.plan.packs * block.threads * kPackSize<T>;
  Held<gradient, T> x, g;
  const int stride = static_cast<int>(gridDim.x >> a.plan.log_cluster);
  block.prepare();
  for (int image = static_cast<int>(blockIdx.x >> a.plan.log_cluster); image < a.N;
       image = block.units().image + stride) {
    if (a.plan.prefetch && image >= stride) {
      wait_for_copies();
      block.take(x, stage);
      if constexpr (gradient) block.take(g, stage_of_grad);
    } else {
      block.load(x, a.input, image);
      if constexpr (gradient) block.load(g, a.grad, image);
    }
    __syncthreads();  // the planes of the image before are done with
    if (a.plan.prefetch && image + stride < a.N) {
      block.prefetch(stage, a.input, image + stride);
      if constexpr (gradient) block.prefetch(stage_of_grad, a.grad, image + stride);
    }
    if (block.thread == 0) block.units() = {.image = image};
    __syncthreads();
    normalize_image<gradient>(block, g, x);
  }
}

template <bool gradient, typename T>
ImagePlan plan_images(const Multiprocessors& device, const Images& images, const BlurGeometry& g,
                      bool aligned) {
  constexpr int kInputs = gradient ? 2 : 1, n = kPackSize<T>;
  // Long before any overflow, and more than registers or planes would hold.
  if (images.N > int64_t{1} << 30 || images.H * images.W > int64_t{1} << 14 ||
      images.C > int64_t{1} << 24 || g.taps_h * g.taps_w > kMaxTaps) {
    return {};
  }
  const bool last = images.channels_last;
  const int C = static_cast<int>(images.C), HW = static_cast<int>(images.H * images.W);
  const int channels = last ? 1 : n / std::gcd(n, HW);  // of an entry of NCHW
  const int columns = last ? HW : channels * HW / n;
  const int entries = (C + (last ? n : channels) - 1) / (last ? n : channels);
  const auto over = [](int a, int b) { return (a + b - 1) / b; };
  // For blocks that have so much of an image; at most so many packs a thread.
  const auto plan_for = [&](int cluster, int packs) -> ImagePlan {
    const int share = over(last ? columns : entries, cluster);
    const int across = last ? share : columns, down = last ? entries : share;
    int groups = last ? 1 : over(down, std::min(down, packs));
    // NHWC: neighbours in a warp, for 128 bytes of memory if there are so many.
    while (last && groups < kWarp && (groups < std::min(down, 8) || over(down, groups) > packs)) {
      groups *= 2;
    }
    const int per = over(down, groups);
    if (per > packs) return {};
    const int turns = over(across, over(across, packs / per));
    const int64_t threads = int64_t{over(across, turns)} * groups;
    if (threads > device.block_threads) return {};
    ImagePlan plan{.cluster = cluster,
                   .log_cluster = std::countr_zero(static_cast<unsigned>(cluster)),
                   .share = share,
                   .columns = columns,
                   .entries = entries,
                   .column_step = last ? C : n,
                   .entry_step = last ? n : channels * HW,
                   .groups = groups,
                   .across = over(across, turns),
                   .per = per,
                   .packs = turns * per,
                   .sums = last ? 1 : groups * channels,
                   .threads = static_cast<int>(round_up(threads, kWarp))};
    plan.bytes = PlaneLayout(g, gradient, int64_t{plan.sums} * HW).size *
                 static_cast<int64_t>(sizeof(opmath_t<T>));
    return plan.bytes <= device.shared_per_block ? plan : ImagePlan{};
  };
  // Of a multiprocessor; a block takes some of the shared memory for itself.
  const auto blocks_of = [&](const ImagePlan& plan) {
    return device.shared_bytes / (plan.bytes + 1024);
  };
  // No more blocks than it takes, as they all blur, but work for all multiprocessors. Where the
  // last entry is not whole one block takes all.
  ImagePlan plan;
  for (int cluster = 1; cluster <= device.largest_cluster; cluster *= 2) {
    if (cluster > (last ? columns : entries) || (cluster > 1 && C % channels != 0)) break;
    const ImagePlan next = plan_for(cluster, kMostPacks<gradient>);
    if (next.cluster) plan = next;
    const int64_t bytes = int64_t{kInputs} * C * HW * static_cast<int64_t>(sizeof(T)) / cluster;
    if (plan.cluster && (images.N * cluster >= device.count || bytes <= 12 << 10)) break;
  }
  if (plan.cluster == 0) return plan;
  // Threads with fewer packs where there are registers for more of them.
  const int64_t blocks = ceil_div(images.N * plan.cluster, device.count);
  for (int packs = plan.packs - 1; packs > 0; --packs) {
    const ImagePlan next = plan_for(plan.cluster, packs);
    const int64_t resident = next.cluster ? std::min(blocks_of(next), blocks) : 0;
    if (resident == 0 || next.threads * resident > device.block_threads) break;
    plan = next;
  }
  // The other blocks of a multiprocessor load and store while one computes. Where there are none,
  // the next image comes to shared memory meanwhile.
  const int64_t stage = int64_t{kInputs} * plan.packs * plan.threads * int64_t{kVectorBytes};
  const bool alone = blocks_of(plan) < 2 || device.block_threads / plan.threads < 2;
  plan.prefetch = aligned && alone && blocks > 1 && plan.bytes + stage <= device.shared_per_block;
  if (plan.prefetch) plan.bytes += stage;
  return plan;
}

template <bool gradient, typename T>
bool run(const NormCall<T>& call) {
  using A = opmath_t<T>;
  const Images& images = call.images;
  const LocalNormOptions& options = call.options;
  const BlurGeometry g = call.geometry();
  if constexpr (sizeof(A) == 4) {
    // as_divisor() has no reciprocal of a value so small; the steps divide.
    constexpr float kLeast = 2.9387358770557188e-39F;  // 2^-128: 1 / kLeast is infinite
    if (options.kind != LocalNorm::kSubtractive && static_cast<float>(options.value) <= kLeast) {
      return false;
    }
  }
  const int64_t HW = images.H * images.W;
  const bool aligned = (images.channels_last ? images.C : images.C * HW) % kPackSize<T> == 0 &&
                       are_aligned(call.grad, call.input, call.out);
  const bool packed = aligned && (images.channels_last || HW % kImagePack<T> == 0);
  auto* const kernel_of_images =
      packed ? image_kernel<gradient, true, T> : image_kernel<gradient, false, T>;
  const ImagePlan plan =
      plan_images<gradient, T>(multiprocessors(kernel_of_images), images, g, aligned);
  if (plan.cluster == 0) return false;
  const Tensor values = kernel_in_double(call.kernel);
  const ImageArguments<T> a{.plan = plan,
                            .kind = options.kind,
                            .adjoint = call.adjoint,
                            .channels_last = images.channels_last,
                            .separable = g.separable,
                            .aligned = aligned,
                            .N = static_cast<int>(images.N),
                            .C = static_cast<int>(images.C),
                            .H = static_cast<int>(g.H),
                            .W = static_cast<int>(g.W),
                            .HW = static_cast<int>(HW),
                            .taps_h = static_cast<int>(g.taps_h),
                            .taps_w = static_cast<int>(g.taps_w),
                            .size = static_cast<int>(images.C * HW),
                            .by_W = Divider(g.W),
                            .by_row = Divider(ceil_div(g.W, 4)),
                            .by_HW = Divider(HW),
                            .at = PlaneLayout(g, gradient, plan.sums * HW),
                            .threshold = static_cast<A>(options.threshold),
                            .value = static_cast<A>(options.value),
                            .root_of_least = root_of_least<A>(images.C),
                            .by_channels = 1 / static_cast<A>(images.C),
                            .kernel = values.const_data_ptr<double>(),
                            .grad = call.grad,
                            .input = call.input,
                            .out = call.out};
  call.launcher.run_clusters_with_shared(kernel_of_images, images.N, plan.cluster, plan.threads,
                                         plan.bytes, a);
  return true;
}

}  // namespace

template <typename T>
bool run_images(const NormCall<T>& call) {
  return call.grad ? run<true>(call) : run<false>(call);
}

#define MNIST_OPS_IMAGES(T) template bool run_images<T>(const NormCall<T>&);
MNIST_OPS_EACH_FLOATING(MNIST_OPS_IMAGES)

}  // namespace mnist_ops::cuda
