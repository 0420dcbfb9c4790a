// Local normalization of images in shared memory.
//
// Bound by memory where enough images are on their way while others are computed: a block waits for
// its image, for barriers and for the few threads that blur. So a multiprocessor holds 2 to 4 of
// them (of 64 x 14 x 14: float32 4 forward and 2 backward, bfloat16 4 and 2), one copy engine's
// request moves a whole image, and the sums over channels take one pass: squares are added up as
// deviations from one of the pixel's own numbers, then moved to the local mean, which is known
// later (ChannelSums). On 9.0 thread 0 starts the copies; elsewhere all threads copy.
//
// Measured on an H200 (copy 4,246 GB/s), 21,399 images of 64 x 14 x 14, 7 taps, microseconds and
// percent of the copy's bandwidth; before, with images in registers, in brackets:
//
//                        float32                           bfloat16
//                 forward         backward          forward         backward
//   subtractive   579  87 (81)    608  83 (75)      307  83 (61)    329  77 (56)
//   divisive      642  79 (72)    851  89 (50)      356  71 (55)    639  59 (37)
//   contrastive   658  77 (57)    965  79 (35)      418  60 (39)    925  41 (25)
//   in NHWC
//   subtractive   579  87 (69)    614  82 (66)      325  78 (46)    345  73 (43)
//   divisive      650  78 (63)    916  83 (46)      366  69 (42)    684  55 (30)
//   contrastive   662  76 (47)   1129  67 (30)      511  50 (28)   1003  38 (19)
//
// What is left in half types are latencies between barriers: an image has half the bytes and as
// many steps.

#include "local_norm_image.cuh"

#include <bit>

namespace mnist_ops::cuda {
namespace {

// Of a block, of which a multiprocessor has registers for two: 72 a thread, 144 in float64.
template <typename T>
constexpr int kMostImageThreads = sizeof(T) == 8 ? 224 : 448;

template <bool gradient, bool kLast, int n, typename T>
__global__ void __launch_bounds__((kMostImageThreads<T>), 2)
    image_kernel(const __grid_constant__ ImageArguments<T> a) {
  using A = opmath_t<T>;
  const ImageBlock<gradient, kLast, n, T> block(a, reinterpret_cast<A*>(dynamic_shared_memory()));
  T* const x = reinterpret_cast<T*>(block.planes + a.at.size);
  T* const g = gradient ? x + a.room : nullptr;
  const int stride = static_cast<int>(gridDim.x >> a.plan.log_cluster);
  block.prepare();
  if (has_bulk_copies() && block.thread == 0) begin_arrivals(block.arrival());
  bool parity = false;
  for (int image = static_cast<int>(blockIdx.x >> a.plan.log_cluster); image < a.N;
       image += stride, parity = !parity) {
    if (block.thread == 0) block.units() = {.image = image};
    __syncthreads();  // the image before is done with
    block.load(x, g, image, parity);
    normalize_image<gradient>(block, g, x);
  }
  if (has_bulk_copies() && block.thread == 0) wait_for_bulk_stores();
}

template <bool gradient, bool kLast, int n, typename T>
ImagePlan plan_images(const Multiprocessors& device, const Images& images, const BlurGeometry& g,
                      int64_t kinds) {
  constexpr int kInputs = gradient ? 2 : 1;
  // Long before any overflow, and more than shared memory would hold.
  if (images.N > int64_t{1} << 30 || images.H * images.W > int64_t{1} << 14 ||
      images.C > int64_t{1} << 24 || g.taps_h * g.taps_w > kMaxTaps) {
    return {};
  }
  const int C = static_cast<int>(images.C), HW = static_cast<int>(images.H * images.W);
  const int columns = kLast ? HW : HW / n, entries = kLast ? C / n : C;
  const auto over = [](int a, int b) { return (a + b - 1) / b; };
  // For blocks that have so much of an image, and no more threads than that, but for one warp.
  const auto plan_for = [&](int cluster, int threads) -> ImagePlan {
    ImagePlan plan{.cluster = cluster,
                   .log_cluster = std::countr_zero(static_cast<unsigned>(cluster)),
                   .share = over(kLast ? columns : entries, cluster),
                   .columns = columns,
                   .entries = entries,
                   .column_step = kLast ? C : n,
                   .entry_step = kLast ? n : HW};
    const int across = over(kLast ? plan.share : columns, kLaneColumns<kLast>);
    const int warps = std::max(threads / kWarp, 1);
    plan.column_warps = over(across, over(across, warps));
    const int most_slots = over(plan.share, 2 * kLaneGroups<kLast>);  // two entries a thread
    plan.slots = kLast ? 1 : std::clamp(warps / plan.column_warps, 1, most_slots);
    plan.piece = int64_t{plan.share} * (kLast ? C : plan.entry_step);
    plan.bytes = kInputs * round_up(plan.piece, kPackSize<T>) * static_cast<int64_t>(sizeof(T)) +
                 PlaneLayout(g, gradient, kinds * plan.slots * HW).size *
                     static_cast<int64_t>(sizeof(opmath_t<T>));
    return plan.bytes <= device.shared_per_block ? plan : ImagePlan{};
  };
  // No more blocks of an image than it takes, as they all blur; but a multiprocessor should have
  // two or more of them, which load and store while another one computes, and all multiprocessors
  // should have work. Of a block's numbers of threads that one which keeps most of them busy on a
  // multiprocessor.
  ImagePlan plan;
  for (int cluster = 1; cluster <= device.largest_cluster; cluster *= 2) {
    if (cluster > (kLast ? columns : entries)) break;
    const int64_t needed = ceil_div(images.N * cluster, device.count);
    int64_t busy = 0, resident = 0;
    for (const int share : {2, 1, 4}) {  // of the most threads
      const ImagePlan next = plan_for(cluster, device.block_threads / share);
      if (next.cluster == 0) continue;
      // A block takes some of the shared memory for itself.
      const int64_t blocks = std::min({device.shared_bytes / (next.bytes + 1024), needed,
                                       int64_t{2} * device.block_threads / next.threads()});
      if (blocks * next.threads() <= busy) continue;
      plan = next, resident = blocks, busy = blocks * next.threads();
    }
    const int64_t bytes = int64_t{kInputs} * C * HW * static_cast<int64_t>(sizeof(T)) / cluster;
    if (resident >= std::min<int64_t>(needed, 2) &&
        (images.N * cluster >= device.count || bytes <= 12 << 10)) {
      break;
    }
  }
  return plan;
}

template <bool gradient, bool kLast, int n, typename T>
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
  const int64_t kinds =
      options.kind == LocalNorm::kSubtractive ? 1 : ChannelSums<gradient, A>::kKinds;
  auto* const kernel_of_images = image_kernel<gradient, kLast, n, T>;
  const ImagePlan plan =
      plan_images<gradient, kLast, n, T>(multiprocessors(kernel_of_images), images, g, kinds);
  if (plan.cluster == 0) return false;
  const bool aligned = images.C * HW % kPackSize<T> == 0 &&
                       (plan.cluster == 1 || plan.piece % kPackSize<T> == 0) &&
                       are_aligned(call.grad, call.input, call.out);
  const Tensor values = kernel_in_double(call.kernel);
  const ImageArguments<T> a{.plan = plan,
                            .kind = options.kind,
                            .adjoint = call.adjoint,
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
                            .piece = static_cast<int>(plan.piece),
                            .room = static_cast<int>(round_up(plan.piece, kPackSize<T>)),
                            .by_W = Divider(g.W),
                            .at = PlaneLayout(g, gradient, kinds * plan.slots * HW),
                            .threshold = static_cast<A>(options.threshold),
                            .value = static_cast<A>(options.value),
                            .root_of_least = root_of_least<A>(images.C),
                            .by_channels = 1 / static_cast<A>(images.C),
                            .kernel = values.const_data_ptr<double>(),
                            .grad = call.grad,
                            .input = call.input,
                            .out = call.out};
  call.launcher.run_clusters_with_shared(kernel_of_images, images.N, plan.cluster, plan.threads(),
                                         plan.bytes, a);
  return true;
}

}  // namespace

template <bool kLast, typename T>
bool run_in_packs(const NormCall<T>& call) {
  constexpr int n = kTablePack<kLast, T>;
  const Images& images = call.images;
  if (n > 1 && (kLast ? images.C : images.H * images.W) % n == 0) {
    return call.grad ? run<true, kLast, n>(call) : run<false, kLast, n>(call);
  }
  return call.grad ? run<true, kLast, 1>(call) : run<false, kLast, 1>(call);
}

template <typename T>
bool run_images(const NormCall<T>& call) {
  return call.images.channels_last ? run_in_packs<true>(call) : run_in_packs<false>(call);
}

#define MNIST_OPS_IMAGES(T) template bool run_images<T>(const NormCall<T>&);
MNIST_OPS_EACH_FLOATING(MNIST_OPS_IMAGES)

}  // namespace mnist_ops::cuda
