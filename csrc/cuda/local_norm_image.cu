// Local normalization of images in shared memory.

#include "local_norm_image.cuh"

namespace mnist_ops::cuda {
namespace {

constexpr int kMostImageThreads = 512;

// The first image of a block and the distance to its next one.
template <typename T>
__device__ __forceinline__ int64_t first_image(const ImageArguments<T>& a) {
  return blockIdx.x / static_cast<unsigned>(a.cluster);
}
template <typename T>
__device__ __forceinline__ int64_t image_stride(const ImageArguments<T>& a) {
  return gridDim.x / static_cast<unsigned>(a.cluster);
}

template <bool gradient, bool kPacked, typename T>
__global__ void __launch_bounds__(kMostImageThreads, 2)
    image_kernel(const __grid_constant__ ImageArguments<T> a) {
  using A = opmath_t<T>;
  unsigned char* const memory = dynamic_shared_memory();
  T* const x = reinterpret_cast<T*>(memory);
  T* const g = reinterpret_cast<T*>(memory + a.image_bytes);
  const ImageBlock<kPacked, T> block(
      a, reinterpret_cast<A*>(memory + (gradient ? 2 : 1) * a.image_bytes));
  for (int64_t image = first_image(a); image < a.N; image += image_stride(a)) {
    if (gradient) block.load(g, a.grad + image * a.size);
    block.load(x, a.input + image * a.size);
    if (image == first_image(a)) block.prepare();
    if (block.thread == 0) block.units() = {};
    wait_for_copies();
    __syncthreads();
    if constexpr (gradient) {
      backward_image(block, g, x, a.out + image * a.size);
    } else {
      forward_image(block, x, a.out + image * a.size);
    }
  }
}

// How a launch divides the images: a cluster of blocks for each, no blocks if it can not.
struct ImagePlan {
  int cluster = 0, share = 0, groups = 1, threads = 0;
  bool direct = false;
  int64_t image_bytes = 0, bytes = 0;  // of shared memory
};

template <typename T>
ImagePlan plan_images(const Multiprocessors& device, const Images& images, const BlurGeometry& g,
                      bool backward, bool packed) {
  using A = opmath_t<T>;
  const int64_t HW = images.H * images.W, buffers = backward ? 2 : 1;
  const int64_t unit = images.channels_last ? images.C : HW;
  const int64_t units = images.channels_last ? HW : images.C;
  constexpr int64_t kMost = int64_t{1} << 24;  // bytes and elements, long before any overflow
  if (HW > kMost || images.C > kMost || HW * images.C > kMost || g.taps_h * g.taps_w > kMaxTaps) {
    return {};
  }
  const auto plan_for = [&](int cluster, int groups) {
    ImagePlan plan;
    int64_t share = ceil_div(units, cluster);
    if (packed) {
      while (share * unit % kPackSize<T> != 0) ++share;
    }
    plan.cluster = cluster, plan.share = static_cast<int>(share), plan.groups = groups;
    plan.image_bytes = round_up(share * unit * static_cast<int64_t>(sizeof(T)), kVectorBytes);
    plan.bytes = buffers * plan.image_bytes +
                 PlaneLayout(g, backward, groups).size * static_cast<int64_t>(sizeof(A));
    if (plan.bytes > device.shared_per_block ||
        share * unit * std::max(HW, images.C) >= int64_t{1} << 32) {
      plan.cluster = 0;
    }
    return plan;
  };
  // A block takes some of the shared memory for itself.
  const auto blocks_for = [&](const ImagePlan& plan) {
    return plan.cluster ? device.shared_bytes / (plan.bytes + 1024) : 0;
  };
  // Two blocks of a multiprocessor, one copying while the other one adds, and work for all of
  // them; no more blocks than that for an image, as they all blur.
  ImagePlan plan = plan_for(1, 1);
  for (int cluster = 2; cluster <= device.largest_cluster && cluster <= units; cluster *= 2) {
    const ImagePlan next = plan_for(cluster, 1);
    const int64_t data = buffers * plan.image_bytes;
    const bool idle = images.N * plan.cluster < device.count && data > device.shared_per_block / 16;
    const bool planes_only = plan.cluster && 2 * data < plan.bytes;
    if (plan.cluster && (blocks_for(plan) >= 2 || planes_only) && !idle) break;
    if (next.cluster) plan = next;
  }
  if (plan.cluster == 0) return plan;
  const int64_t blocks = blocks_for(plan), elements = HW * images.C;
  // The registers are enough for as many threads in all.
  int threads = blocks <= 2 ? 2 * device.block_threads : device.block_threads;
  if (blocks >= 6) threads = device.block_threads / 2;
  while (threads > kWarp && 2 * elements <= threads) threads /= 2;
  const bool direct = !images.channels_last && plan.cluster == 1 && images.C <= 4;
  if (!images.channels_last && !direct) {  // groups of threads where there are fewer packs
    const int64_t packs = HW / (packed ? kImagePack<T> : 1);
    for (int64_t groups = std::min({threads / packs, int64_t{8}, int64_t{plan.share}}); groups > 1;
         --groups) {
      const ImagePlan grouped = plan_for(plan.cluster, static_cast<int>(groups));
      if (blocks_for(grouped) < blocks) continue;
      plan = grouped;
      break;
    }
  }
  plan.threads = threads, plan.direct = direct;
  return plan;
}

template <bool gradient, typename T>
bool run(const NormCall<T>& call) {
  const Images& images = call.images;
  const LocalNormOptions& options = call.options;
  const BlurGeometry g = call.geometry();
  if constexpr (sizeof(opmath_t<T>) == 4) {
    // as_divisor() has no reciprocal of a value so small; the steps divide.
    constexpr float kLeast = 2.9387358770557188e-39F;  // 2^-128: 1 / kLeast is infinite
    if (options.kind != LocalNorm::kSubtractive && static_cast<float>(options.value) <= kLeast) {
      return false;
    }
  }
  const int64_t HW = images.H * images.W;
  const bool packed = (images.channels_last ? images.C : HW) % kImagePack<T> == 0 &&
                      images.C * HW % kPackSize<T> == 0 &&
                      are_aligned(call.grad, call.input, call.out);
  auto* const kernel_of_images =
      packed ? image_kernel<gradient, true, T> : image_kernel<gradient, false, T>;
  const ImagePlan plan =
      plan_images<T>(multiprocessors(kernel_of_images), images, g, gradient, packed);
  if (plan.cluster == 0) return false;
  const Tensor values = kernel_in_double(call.kernel);
  const ImageArguments<T> a{.kind = options.kind,
                            .adjoint = call.adjoint,
                            .channels_last = images.channels_last,
                            .separable = g.separable,
                            .direct = plan.direct,
                            .N = images.N,
                            .C = static_cast<int>(images.C),
                            .H = static_cast<int>(g.H),
                            .W = static_cast<int>(g.W),
                            .HW = static_cast<int>(HW),
                            .taps_h = static_cast<int>(g.taps_h),
                            .taps_w = static_cast<int>(g.taps_w),
                            .cluster = plan.cluster,
                            .share = plan.share,
                            .groups = plan.groups,
                            .image_bytes = static_cast<int>(plan.image_bytes),
                            .size = static_cast<int>(images.C * HW),
                            .by_W = Divider(g.W),
                            .by_row = Divider(ceil_div(g.W, 4)),
                            .by_line = Divider(images.channels_last ? images.C : HW),
                            .at = PlaneLayout(g, gradient, plan.groups),
                            .threshold = static_cast<opmath_t<T>>(options.threshold),
                            .value = static_cast<opmath_t<T>>(options.value),
                            .root_of_least = root_of_least<opmath_t<T>>(images.C),
                            .by_channels = 1 / static_cast<opmath_t<T>>(images.C),
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
