// What a block, or a cluster of blocks, does with an image.
#pragma once

#include "local_norm.cuh"

namespace mnist_ops::cuda {

// ------------------------------------------------------------------------ images in shared memory
//
// A block, or a cluster of them, takes an image at a time: each block copies its share of the data
// (channels of NCHW, pixels of NHWC; one range of memory in both) to shared memory, and has every
// plane, whole. Sums over channels are added up from all blocks' shares; the blur, of one plane, is
// every block's own.

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Where a block has what, in elements of A from the end of its share of the image(s): multiples of
// four. A flat plane has a value for each pixel.
//   in       the plane that is blurred, its rows with zeros before and behind them, so that the
//            window of a pixel begins at the pixel's own index
//   scratch  that plane blurred along rows, with rows of zeros above and below; before it is
//            blurred, the partial sums of groups of threads and of blocks
//   d        begins where scratch ends; where the gradient has three partial sums, among them,
//            which are done with when it is written
struct PlaneLayout {
  int W4, pitch;            // of scratch and of in
  int scratch_rows, above;  // rows of zeros above
  int flat, taps_pitch;     // the size of a flat plane, and of a row of taps
  int weight, flipped, units, coef, mean, q, grads, centred, scratch, d;  // in begins at 0
  int64_t size;

  PlaneLayout(const BlurGeometry& g, bool backward, int groups) {
    const auto H4 = round_up(g.H, 4), around_w = round_up(g.taps_w - 1, 4);
    const auto around_h = g.separable ? round_up(g.taps_h - 1, 4) : 0;
    const auto row = round_up(g.taps_w, 4), taps = row * (g.separable ? 1 : g.taps_h);
    W4 = static_cast<int>(round_up(g.W, 4));
    pitch = static_cast<int>(W4 + around_w);
    scratch_rows = static_cast<int>(H4 + around_h);
    above = g.separable ? static_cast<int>(g.taps_h / 2) : 0;
    flat = static_cast<int>(round_up(g.H * g.W, 4));
    taps_pitch = static_cast<int>(row);
    int64_t end = g.H * pitch;
    const auto take = [&](int64_t count) {
      const int64_t begin = end;
      end += count;
      return static_cast<int>(begin);
    };
    weight = take(taps), flipped = take(taps), units = take(8);
    coef = take(flat), mean = take(flat);
    q = take(backward ? flat : 0), grads = take(backward ? flat : 0);
    centred = take(backward ? flat : 0);
    const int64_t blurred = int64_t{scratch_rows} * W4;
    const int64_t partial = int64_t{backward ? 3 : 1} * groups * flat;
    scratch =
        take(backward ? std::max(blurred + flat, partial) : std::max(blurred, partial) + flat);
    d = static_cast<int>(backward ? scratch + blurred : end - flat);
    size = end;
  }
};

constexpr int kMaxTaps = 512;  // of a kernel that shared memory holds

template <typename T>
struct ImageArguments {
  LocalNorm kind;
  bool adjoint;  // the gradient of subtractive, which is its forward but for the order of steps
  bool channels_last, separable;
  bool direct;  // few channels, no shares: a thread adds up those of a pixel
  int64_t N;
  int C, H, W, HW, taps_h, taps_w;
  int cluster, share, groups;     // blocks of an image; channels or pixels of a block
  int image_bytes;                // that a share takes in shared memory
  int size;                       // elements of an image
  Divider by_W, by_row, by_line;  // a row's packs; what an element is divided by for its pixel
  PlaneLayout at;
  opmath_t<T> threshold, value, root_of_least, by_channels;
  const double* kernel;
  const T* grad;   // backward
  const T* input;  // of the subtractive backward: the gradient
  T* out;
};

// A block's work on its image. kPacked: accesses of 16 bytes; then four neighbours belong to one
// channel (NCHW) or one pixel (NHWC), and shares begin at multiples of 16 bytes.
template <bool kPacked, typename T>
struct ImageBlock {
  using A = opmath_t<T>;
  static constexpr int m = kPacked ? kImagePack<T> : 1;
  static constexpr bool kExact = sizeof(A) == 8;  // coef and d; or they are reciprocals

  const ImageArguments<T>& a;
  A* const planes;
  const int rank, threads, thread;

  __device__ __forceinline__ ImageBlock(const ImageArguments<T>& arguments, A* memory)
      : a(arguments),
        planes(memory),
        rank(static_cast<int>(blockIdx.x) % arguments.cluster),
        threads(static_cast<int>(blockDim.x)),
        thread(static_cast<int>(threadIdx.x)) {}

  // Of the share, in elements: where it begins in the image, and how many there are.
  __device__ __forceinline__ int first() const {
    return min_of(rank * a.share, a.channels_last ? a.HW : a.C) * (a.channels_last ? a.C : a.HW);
  }
  __device__ __forceinline__ int count() const {
    return min_of((rank + 1) * a.share, a.channels_last ? a.HW : a.C) *
               (a.channels_last ? a.C : a.HW) -
           first();
  }

  __device__ __forceinline__ static int min_of(int x, int y) { return x < y ? x : y; }

  // Planes, and what a plane's values are divided by.
  __device__ __forceinline__ A* in() const { return planes; }
  __device__ __forceinline__ A* mean() const { return planes + a.at.mean; }
  __device__ __forceinline__ A* d() const { return planes + a.at.d; }
  __device__ __forceinline__ A* q() const { return planes + a.at.q; }
  __device__ __forceinline__ A* grads() const { return planes + a.at.grads; }
  __device__ __forceinline__ A* centred() const { return planes + a.at.centred; }
  __device__ __forceinline__ Units<A>& units() const {
    return *reinterpret_cast<Units<A>*>(planes + a.at.units);
  }
  __device__ __forceinline__ A over_channels(A value) const {
    return divided<kExact>(value, kExact ? static_cast<A>(a.C) : a.by_channels);
  }
  __device__ __forceinline__ A over_coef(A value, int p) const {
    return divided<kExact>(value, planes[a.at.coef + p]);
  }

  // ------------------------------------------------------------------------------- preparation

  // The weights and coef, and zeros where nothing is written.
  __device__ __forceinline__ void prepare() const {
    const PlaneLayout& at = a.at;
    for (int i = thread; i < at.size; i += threads) planes[i] = A(0);
    __syncthreads();
    A *weight = planes + at.weight, *flipped = planes + at.flipped, *coef = planes + at.coef;
    const int lines = a.separable ? 1 : a.taps_h, taps = lines * a.taps_w;
    // The same sum for everyone, in the order of one.
    double sum = 0;
    for (int i = thread % kWarp; i < taps; i += kWarp) sum += a.kernel[i];
    sum = lane_sum(sum, kWarp);
    for (int i = thread; i < taps; i += threads) {
      const int row = i / a.taps_w, column = i % a.taps_w;
      const A normalised = static_cast<A>(a.kernel[i] / sum);
      weight[row * at.taps_pitch + column] = normalised;
      flipped[(lines - 1 - row) * at.taps_pitch + a.taps_w - 1 - column] = normalised;
    }
    __syncthreads();
    // The blur of ones along either dimension; the mean and d are not in use yet.
    A *along_h = planes + at.mean, *along_w = planes + at.d;
    const auto inside = [&](int i, int size) {
      const Taps in = taps_inside(i, size, a.taps_w);
      A total = A(0);
      for (int64_t k = in.first; k < in.last; ++k) total += weight[k];
      return total;
    };
    if (a.separable) {
      for (int i = thread; i < a.H + a.W; i += threads) {
        if (i < a.H) {
          along_h[i] = inside(i, a.H);
        } else {
          along_w[i - a.H] = inside(i - a.H, a.W);
        }
      }
      __syncthreads();
    }
    for (int p = thread; p < a.HW; p += threads) {
      const int h = static_cast<int>(a.by_W.quotient(static_cast<uint32_t>(p))), w = p - h * a.W;
      A total = A(0);
      if (a.separable) {
        total = along_w[w] * along_h[h];
      } else {
        const Taps rows = taps_inside(h, a.H, a.taps_h), columns = taps_inside(w, a.W, a.taps_w);
        for (int64_t i = rows.first; i < rows.last; ++i) {
          for (int64_t k = columns.first; k < columns.last; ++k) {
            total += weight[i * at.taps_pitch + k];
          }
        }
      }
      coef[p] = sizeof(A) == 8 ? total : A(1) / total;
    }
    __syncthreads();
    if (a.separable) {
      for (int i = thread; i < a.H; i += threads) along_h[i] = A(0);
      __syncthreads();
    }
  }

  // -------------------------------------------------------------------------------- the image

  // Begins to copy this block's share; wait_for_copies() and a barrier, and it is there.
  __device__ __forceinline__ void load(T* to, const T* image) const {
    const T* from = image + first();
    constexpr int n = kPacked ? kPackSize<T> : 1;
    const int packs = count() / n;
#pragma unroll 8
    for (int i = thread; i < packs; i += threads) copy_pack<n>(to + i * n, from + i * n);
  }

  // ------------------------------------------------------------------------------------ sums

  // use(p, where, sums) for every pixel, with the sums over all channels that Terms names of the
  // input in units of 1 / scale, where the mean is in units of scale_of_mean / scale; `where` is
  // the pixel's place in the plane `in`. Ends with a barrier.
  template <typename Terms, typename Use>
  __device__ __forceinline__ void reduce(const T* grad, const T* x, A scale, A scale_of_mean,
                                         const Use& use) const {
    A *partial = planes + a.at.scratch, *mean = planes + a.at.mean;
    const auto add = [&](A(&to)[Terms::kSums], int i, A centre) {
      Terms{}(to, Terms::kReadsGradient ? static_cast<A>(grad[i]) : A(0), static_cast<A>(x[i]),
              scale, centre);
    };
    const auto add_pack = [&](A(&to)[Terms::kSums], const Pack<T, m>& gs, const Pack<T, m>& xs,
                              int j, A centre) {
      Terms{}(to, Terms::kReadsGradient ? static_cast<A>(gs.values[j]) : A(0),
              static_cast<A>(xs.values[j]), scale, centre);
    };
    const int flat = a.at.flat;
    if (a.direct) {
      // below
    } else if (a.channels_last) {
      const int packs = a.C / m, pixels = min_of(a.HW - rank * a.share, a.share);
      // So many neighbouring threads that they read from all banks.
      constexpr int most = kPacked ? static_cast<int>(128 / (4 * sizeof(T))) : kWarp;
      int lanes = 1;
      while (lanes < most && lanes < packs) lanes *= 2;
      const int lane = thread % lanes, per_turn = threads / lanes;
      for (int base = 0; base < pixels; base += per_turn) {
        const int pixel = base + thread / lanes;
        A total[Terms::kSums] = {};
        if (pixel < pixels) {
          const A centre = mean[rank * a.share + pixel] * scale_of_mean;
#pragma unroll 2
          for (int c = lane; c < packs; c += lanes) {
            const int i = (pixel * packs + c) * m;
            const Pack<T, m> xs = load_pack<m>(x + i);
            const Pack<T, m> gs = Terms::kReadsGradient ? load_pack<m>(grad + i) : xs;
#pragma unroll
            for (int j = 0; j < m; ++j) add_pack(total, gs, xs, j, centre);
          }
        }
#pragma unroll
        for (int k = 0; k < Terms::kSums; ++k) {
          total[k] = lane_sum(total[k], lanes);
          if (lane == 0 && pixel < pixels) partial[k * flat + rank * a.share + pixel] = total[k];
        }
      }
      __syncthreads();
    } else {
      const int packs = a.HW / m, channels = min_of(a.C - rank * a.share, a.share);
      const int group = a.groups > 1 ? thread / packs : 0;
      for (int q = thread - group * packs; q < packs && group < a.groups; q += threads) {
        A total[m][Terms::kSums] = {};
        Pack<A, m> centre = load_pack<m>(mean + q * m);
#pragma unroll
        for (int j = 0; j < m; ++j) centre.values[j] *= scale_of_mean;
#pragma unroll 4
        for (int c = group; c < channels; c += a.groups) {
          const int i = c * a.HW + q * m;
          const Pack<T, m> xs = load_pack<m>(x + i);
          const Pack<T, m> gs = Terms::kReadsGradient ? load_pack<m>(grad + i) : xs;
#pragma unroll
          for (int j = 0; j < m; ++j) add_pack(total[j], gs, xs, j, centre.values[j]);
        }
#pragma unroll
        for (int k = 0; k < Terms::kSums; ++k) {
          Pack<A, m> sums;
#pragma unroll
          for (int j = 0; j < m; ++j) sums.values[j] = total[j][k];
          store_pack(partial + (k * a.groups + group) * flat + q * m, sums);
        }
      }
      __syncthreads();
    }
    if (a.cluster > 1) {
      if (a.groups > 1) {  // this block's own first, for others to read one number a pixel
        for (int p = thread; p < a.HW; p += threads) {
#pragma unroll
          for (int k = 0; k < Terms::kSums; ++k) {
            A* const sums = partial + k * a.groups * flat + p;
            A total = sums[0];
            for (int g = 1; g < a.groups; ++g) total += sums[g * flat];
            sums[0] = total;
          }
        }
      }
      sync_cluster();
    }
    for (int p = thread; p < a.HW; p += threads) {
      A sums[Terms::kSums] = {};
      if (a.direct) {
        const A centre = mean[p] * scale_of_mean;
        for (int c = 0; c < a.C; ++c) add(sums, c * a.HW + p, centre);
      } else {
        // Of all blocks, of the one that has the pixel, or of this block's groups.
        const bool gathered = a.cluster > 1 && !a.channels_last;
        const int terms = gathered ? a.cluster : a.groups;
        const A* mine = partial + p;
        if (a.cluster > 1 && a.channels_last) mine = cluster_peer(mine, p / a.share);
#pragma unroll 4
        for (int i = 0; i < terms; ++i) {
          const A* from = gathered ? cluster_peer(mine, i) : mine + i * flat;
#pragma unroll
          for (int k = 0; k < Terms::kSums; ++k) sums[k] += from[k * a.groups * flat];
        }
      }
      const int h = static_cast<int>(a.by_W.quotient(static_cast<uint32_t>(p)));
      use(p, p + h * (a.at.pitch - a.W) + a.taps_w / 2, sums);
    }
    if (a.cluster > 1) {
      sync_cluster();  // before anyone writes over what others have yet to read
    } else {
      __syncthreads();
    }
  }

  // ------------------------------------------------------------------------------------ blur

  // finish(blurred, p, where) for every pixel of the plane `in`, which finish may write: the next
  // blur's. Whether finish was true for one of them, for all threads of the block. Ends with a
  // barrier.
  template <typename Finish>
  __device__ __forceinline__ bool blur(bool adjoint, const Finish& finish) const {
    const PlaneLayout& at = a.at;
    const A *in = planes, *taps = planes + (adjoint ? at.flipped : at.weight);
    A* const scratch = planes + at.scratch;
    const int per_row = at.W4 / 4, W4 = at.W4;
    if (a.separable && !a.direct) {  // partial sums were there
      for (int i = thread; i < (at.scratch_rows - a.H) * W4; i += threads) {
        scratch[i < at.above * W4 ? i : i + a.H * W4] = A(0);
      }
    }
    for (int i = thread; i < a.H * per_row; i += threads) {
      const int h = static_cast<int>(a.by_row.quotient(static_cast<uint32_t>(i))),
                w = (i - h * per_row) * 4;
      A sums[4] = {};
      const auto along = [&](int row, const A* weight) {
        const A* x = in + row * at.pitch + w;
        correlate_four([&](int k) { return load_four(x + k); }, weight, a.taps_w, sums);
      };
      if (a.separable) {
        along(h, taps);
      } else {
        const int top = h - a.taps_h / 2;
        for (int k = 0; k < a.taps_h; ++k) {
          if (top + k >= 0 && top + k < a.H) along(top + k, taps + k * at.taps_pitch);
        }
      }
      store_four(scratch + (at.above + h) * W4 + w, sums);
    }
    __syncthreads();
    bool any = false;
    for (int i = thread; i < (a.H + 3) / 4 * a.W; i += threads) {
      const int group = static_cast<int>(a.by_W.quotient(static_cast<uint32_t>(i))),
                w = i - group * a.W, h = group * 4;
      const A* x = scratch + h * W4 + w;
      A sums[4] = {};
      const auto load = [&](int k) -> Four<A> {
        const A* from = x + k * W4;
        return {from[0], from[W4], from[2 * W4], from[3 * W4]};
      };
      if (a.separable) {
        correlate_four(load, taps, a.taps_h, sums);
      } else {
        const Four<A> four = load(0);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] = four.values[j];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (h + j < a.H) {
          any |= finish(sums[j], (h + j) * a.W + w, (h + j) * at.pitch + w + a.taps_w / 2);
        }
      }
    }
    return __syncthreads_or(any);
  }

  // ----------------------------------------------------------------------------------- apply

  // image = value(u, v, planes) for every element of this share. Ends with a barrier.
  template <typename Value>
  __device__ __forceinline__ void apply(const Value& value, T* image, const T* u, const T* v,
                                        const A* plane0, const A* plane1, const A* plane2) const {
    constexpr int n = kPacked ? kPackSize<T> : 1;
    T* const out = image + first();
    const int size = count();
    // What two turns of three planes take are more registers than there are.
#pragma unroll(Value::kReadsBoth ? 1 : 2)
    for (int i = thread * n; i < size; i += threads * n) {
      const Pack<T, n> us = load_pack<n>(u + i);
      const Pack<T, n> vs = Value::kReadsBoth ? load_pack<n>(v + i) : us;
      Pack<T, n> to;
#pragma unroll
      for (int c = 0; c < n; c += m) {
        Pack<A, m> of[3];
        const A* const from[3] = {plane0, plane1, plane2};
        // A share of NCHW begins with a channel, one of NHWC with a pixel.
        const int p = a.channels_last
                          ? rank * a.share +
                                static_cast<int>(a.by_line.quotient(static_cast<uint32_t>(i + c)))
                          : static_cast<int>(a.by_line.remainder(static_cast<uint32_t>(i + c)));
#pragma unroll
        for (int k = 0; k < Value::kPlanes; ++k) {
          if (a.channels_last) {
            const A of_pixel = from[k][p];
#pragma unroll
            for (int j = 0; j < m; ++j) of[k].values[j] = of_pixel;
          } else {
            of[k] = load_pack<m>(from[k] + p);
          }
        }
#pragma unroll
        for (int k = Value::kPlanes; k < 3; ++k) of[k] = of[0];
#pragma unroll
        for (int j = 0; j < m; ++j) {
          to.values[c + j] = static_cast<T>(value(static_cast<A>(us.values[c + j]),
                                                  static_cast<A>(vs.values[c + j]), of[0].values[j],
                                                  of[1].values[j], of[2].values[j]));
        }
      }
      store_pack(out + i, to);
    }
    __syncthreads();
  }
};

}  // namespace mnist_ops::cuda
