// What a block, or a cluster of blocks, does with an image.
#pragma once

#include "local_norm.cuh"

namespace mnist_ops::cuda {

// --------------------------------------------------------------------------- images in registers
//
// A block, or a cluster of them, takes an image at a time. Its threads keep the data in registers,
// in packs of 16 bytes, from the one load to the one store; the planes are in shared memory. Of a
// cluster each block has a share of the data (channels of NCHW, pixels of NHWC) and every plane,
// whole: sums over channels are added up from all blocks' shares; the blur, of one plane, is every
// block's own.
//
// An image is a table of packs. Those of a column have the same pixels: in NHWC a column is a pixel
// and its entries are the packs of its channels; in NCHW an entry is a channel, or as many channels
// as it takes for the next one to begin with a pack, and a column is a pack of it. `groups` threads
// share a column; a thread takes `per` entries of it, and then those of its next column.

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Where a block has what in shared memory, in elements of A: multiples of four. A flat plane has a
// value for each pixel.
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

  // With `sums` elements of partial sums, each of which backward has three times.
  PlaneLayout(const BlurGeometry& g, bool backward, int64_t sums) {
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
    const int64_t partial = round_up((backward ? 3 : 1) * sums, 4);
    scratch =
        take(backward ? std::max(blurred + flat, partial) : std::max(blurred, partial) + flat);
    d = static_cast<int>(backward ? scratch + blurred : end - flat);
    size = end;
  }
};

constexpr int kMaxTaps = 512;  // of a kernel that shared memory holds

// How a launch divides the images.
struct ImagePlan {
  int cluster = 0;                      // blocks of an image; none where it can not be done
  int log_cluster = 0;                  // to the base of two
  int share = 0;                        // entries or (NHWC) columns of a block
  int columns = 0, entries = 0;         // of the table
  int column_step = 0, entry_step = 0;  // in elements
  int groups = 0, across = 0,
      per = 0;    // threads of a column, columns of a turn, entries of a thread
  int packs = 0;  // that a thread has
  int sums = 0;   // partial sums of a pixel in a block
  int threads = 0;
  int64_t bytes = 0;      // of shared memory
  bool prefetch = false;  // the next image comes to shared memory while this one is worked on
};

template <typename T>
struct ImageArguments {
  ImagePlan plan;
  LocalNorm kind;
  bool adjoint;  // the gradient of subtractive, which is its forward but for the order of steps
  bool channels_last, separable;
  bool aligned;  // packs are whole and their addresses multiples of 16
  int N, C, H, W, HW, taps_h, taps_w;
  int size;                     // elements of an image
  Divider by_W, by_row, by_HW;  // a row's packs
  PlaneLayout at;
  opmath_t<T> threshold, value, root_of_least, by_channels;
  const double* kernel;
  const T* grad;   // backward
  const T* input;  // of the subtractive backward: the gradient
  T* out;
};

// 16 bytes of elements in registers of 32 bits: left to itself nvcc gives every number of a half
// type one of its own.
template <typename T>
struct Words {
  Pack<uint32_t, 4> of;

  __device__ __forceinline__ T operator[](int j) const {
    T value;
    if constexpr (sizeof(T) == 2) {
      const auto bits = static_cast<uint16_t>(of.values[j / 2] >> j % 2 * 16);
      std::memcpy(&value, &bits, sizeof(T));
    } else {
      std::memcpy(&value, of.values + j * sizeof(T) / 4, sizeof(T));
    }
    return value;
  }
  __device__ __forceinline__ void set(int j, T value) {
    if constexpr (sizeof(T) == 2) {
      uint16_t bits;
      std::memcpy(&bits, &value, sizeof(T));
      uint32_t& word = of.values[j / 2];
      word = (word & 0xffff0000u >> j % 2 * 16) | uint32_t{bits} << j % 2 * 16;
    } else {
      std::memcpy(of.values + j * sizeof(T) / 4, &value, sizeof(T));
    }
  }
};

template <typename V>
__device__ __forceinline__ auto* as_words(V* elements) {
  using Word = std::conditional_t<std::is_const_v<V>, const uint32_t, uint32_t>;
  return reinterpret_cast<Word*>(elements);
}

// A thread's packs of an image at most: 128 bytes, the gradient's among them.
template <bool gradient>
constexpr int kMostPacks = gradient ? 4 : 8;

template <bool gradient, typename T>
struct Held {
  Words<T> packs[kMostPacks<gradient>];
};

// A block's work on its image. kPacked: accesses of 16 bytes, and m neighbours of a pack belong to
// one channel, their planes' values at a multiple of 16 bytes (NCHW), or all to one pixel (NHWC).
template <bool gradient, bool kPacked, typename T>
struct ImageBlock {
  using Element = T;
  using A = opmath_t<T>;
  using Image = Held<gradient, T>;
  static constexpr int n = kPackSize<T>, m = kImagePack<T>;
  static constexpr int width = gradient ? m : n;  // elements of a pack for which sums are held
  static constexpr bool kExact = sizeof(A) == 8;  // coef and d; or they are reciprocals

  const ImageArguments<T>& a;
  A* const planes;
  const int threads, thread;
  int first_column, start;  // of this thread's first pack, which is the start-th of its block
  unsigned inside = 0;      // a bit for each pack that there is

  __device__ __forceinline__ ImageBlock(const ImageArguments<T>& arguments, A* memory)
      : a(arguments),
        planes(memory),
        threads(static_cast<int>(blockDim.x)),
        thread(static_cast<int>(threadIdx.x)) {
    const int begin = rank() * a.plan.share;
    int entry, columns = a.plan.columns, entries = a.plan.entries;
    if (a.channels_last) {
      first_column = begin + thread / a.plan.groups, entry = thread % a.plan.groups;
      columns = min_of(begin + a.plan.share, columns);
    } else {
      first_column = thread % a.plan.across, entry = thread / a.plan.across;
      entries = min_of(entries - begin, a.plan.share);
    }
    start = first_column * a.plan.column_step + entry * a.plan.entry_step;
    if (thread >= a.plan.across * a.plan.groups) first_column = a.plan.columns;  // idle
    int column = first_column;
    for (int k = 0, turn = 0; k < a.plan.packs; ++k) {
      const bool is_inside = column < columns && entry + turn * a.plan.groups < entries;
      inside |= (is_inside ? 1u : 0u) << k;
      if (++turn == a.plan.per) turn = 0, column += a.plan.across;
    }
  }

  __device__ __forceinline__ int rank() const {
    return static_cast<int>(blockIdx.x) & (a.plan.cluster - 1);
  }
  // Where this block's entries begin (NCHW); columns are those of the image.
  __device__ __forceinline__ int64_t begin(int image) const {
    return int64_t{image} * a.size +
           (a.channels_last ? 0 : rank() * a.plan.share * a.plan.entry_step);
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
    for (int p = thread; p < a.HW; p += threads) planes[place_of(p)] = A(1);
    __syncthreads();
    blur(false, [&](A of_ones, int p, int) {
      coef[p] = kExact ? of_ones : A(1) / of_ones;
      return false;
    });
  }

  // Of a pixel, in the plane `in`.
  __device__ __forceinline__ int place_of(int p) const {
    const int h = static_cast<int>(a.by_W.quotient(static_cast<uint32_t>(p)));
    return p + h * (a.at.pitch - a.W) + a.taps_w / 2;
  }

  // ---------------------------------------------------------------------------------- the data

  // A pack of this thread: its number, a constant once this is compiled; its column; where it
  // begins among the block's elements, and where the thread's first one of the column does; how
  // many of its elements there are; whether it is the first or the last one of its column.
  struct Place {
    int number, column, at, column_at, count;
    bool first, last;
  };

  // step(place) for all packs of the thread. The same number of steps for all threads.
  template <typename Step>
  __device__ __forceinline__ void each_pack(const Step& step) const {
    int column = first_column, column_at = start, turn = 0;
    unsigned mask = inside;
    // Nothing to compute once for all images and to keep: the registers are for the data.
    asm volatile("" : "+r"(column), "+r"(column_at), "+r"(mask));
    int at = column_at;
#pragma unroll
    for (int k = 0; k < kMostPacks<gradient>; ++k) {
      if (k < a.plan.packs) {
        // Of several blocks none has a part of an entry.
        const int end = a.channels_last ? (column + 1) * a.C : a.size;
        const int count = kPacked ? n : min_of(n, end - at);
        step(Place{k, column, at, column_at, mask >> k & 1 ? count : 0, turn == 0,
                   turn == a.plan.per - 1});
        at += a.plan.groups * a.plan.entry_step;
        if (++turn == a.plan.per) {
          turn = 0, column += a.plan.across, column_at += a.plan.across * a.plan.column_step;
          at = column_at;
        }
      }
    }
  }

  // This thread's packs of an image begin to come to its own part of shared memory.
  __device__ __forceinline__ void prefetch(T* stage, const T* images, int image) const {
    const T* const from = images + begin(image);
    each_pack([&](const Place& place) {
      if (place.count > 0) {
        copy_pack<4>(as_words(stage + (place.number * threads + thread) * n),
                     as_words(from + place.at));
      }
    });
  }
  // And from there to registers, after wait_for_copies().
  __device__ __forceinline__ void take(Image& x, const T* stage) const {
#pragma unroll
    for (int k = 0; k < kMostPacks<gradient>; ++k) {
      if (k < a.plan.packs)
        x.packs[k].of = load_pack<4>(as_words(stage + (k * threads + thread) * n));
    }
  }

  // whole() for a pack that has all of its elements, at a multiple of 16 bytes, or else one(j) for
  // those that there are.
  template <typename Whole, typename One>
  __device__ __forceinline__ void access(const Place& place, const Whole& whole,
                                         const One& one) const {
    if (kPacked || a.aligned) {
      if (place.count > 0) whole();
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (j < place.count) one(j);
      }
    }
  }
  __device__ __forceinline__ void load(Image& x, const T* images, int image) const {
    const T* const memory = images + begin(image);
    each_pack([&](const Place& place) {
      const T* const from = memory + place.at;
      Words<T>& to = x.packs[place.number];
      access(
          place, [&] { to.of = load_pack<4>(as_words(from)); }, [&](int j) { to.set(j, from[j]); });
    });
  }

  // The values of a plane for the elements of a column's packs from h on.
  __device__ __forceinline__ void of_column(const A* plane, int column, int h,
                                            A (&values)[width]) const {
    if (column >= a.plan.columns) return;
    constexpr int step = kPacked ? m : 1;
#pragma unroll
    for (int i = 0; i < width; i += step) {
      if (a.channels_last) {
#pragma unroll
        for (int j = 0; j < step; ++j) values[i + j] = plane[column];
      } else {
        const auto at = static_cast<uint32_t>(column * n + h + i);
        const Pack<A, step> pack = load_pack<step>(plane + a.by_HW.remainder(at));
#pragma unroll
        for (int j = 0; j < step; ++j) values[i + j] = pack.values[j];
      }
    }
  }

  // ------------------------------------------------------------------------------------ sums

  // Adds an element of a pack.
  __device__ __forceinline__ static void add(ChannelSums<gradient, A>& sums, const Image& grad,
                                             const Image& x, int pack, int j, A scale, A centre,
                                             bool squares) {
    sums.add(gradient ? static_cast<A>(grad.packs[pack][j]) : A(0),
             static_cast<A>(x.packs[pack][j]), scale, centre, squares);
  }

  // use(p, where, sums) for every pixel, with the sums over all channels; those of squares are of
  // deviations from the mean. `where` is the pixel's place in the plane `in`. Ends with a barrier.
  template <bool /* gradient, as of the block */, typename Use>
  __device__ __forceinline__ void reduce(const Image& grad, const Image& x, bool squares,
                                         const Use& use) const {
    using Sums = ChannelSums<gradient, A>;
    const A scale = units().lift * units().part, scale_of_mean = units().part;
    A* const partial = planes + a.at.scratch;
    const int kind =
        a.plan.sums * a.HW;  // one kind of sums: a plane for each partial sum of a pixel
    const int kinds = squares ? Sums::kCount : 1;
    if (a.channels_last) {
      A centre = A(0);
      Sums total;
      each_pack([&](const Place& place) {
        if (place.first) {
          total = {};
          centre = place.count > 0 && squares ? mean()[place.column] * scale_of_mean : A(0);
        }
#pragma unroll
        for (int j = 0; j < n; ++j) {
          if (j < place.count) add(total, grad, x, place.number, j, scale, centre, squares);
        }
        if (!place.last) return;
#pragma unroll
        for (int k = 0; k < Sums::kCount; ++k) {
          const A sum = lane_sum(total.of[k], a.plan.groups);
          if (place.count > 0 && thread % a.plan.groups == 0)
            partial[k * kind + place.column] = sum;
        }
      });
    } else {
#pragma unroll
      for (int h = 0; h < n; h += width) {
        A centre[width] = {};
        Sums total[width];
        each_pack([&](const Place& place) {
          if (place.first) {
            if (squares) of_column(mean(), place.column, h, centre);
#pragma unroll
            for (int j = 0; j < width; ++j) total[j] = {}, centre[j] *= scale_of_mean;
          }
#pragma unroll
          for (int j = 0; j < width; ++j) {
            if (h + j < place.count) {
              add(total[j], grad, x, place.number, h + j, scale, centre[j], squares);
            }
          }
          if (!place.last || place.column >= a.plan.columns) return;
#pragma unroll
          for (int k = 0; k < Sums::kCount; ++k) {
#pragma unroll
            for (int i = 0; i < width; i += m) {
              Pack<A, m> sums;
#pragma unroll
              for (int j = 0; j < m; ++j) sums.values[j] = total[i + j].of[k];
              if (k < kinds) store_pack(partial + k * kind + place.column_at + h + i, sums);
            }
          }
        });
      }
    }
    __syncthreads();
    if (a.plan.cluster > 1) {
      if (a.plan.sums > 1) {  // this block's own first, for others to read one number a pixel
        for (int p = thread; p < a.HW; p += threads) {
#pragma unroll
          for (int k = 0; k < Sums::kCount; ++k) {
            A* const sums = partial + k * kind + p;
            A total = sums[0];
            for (int i = 1; i < a.plan.sums; ++i) total += sums[i * a.HW];
            sums[0] = total;
          }
        }
      }
      sync_cluster();
    }
    for (int p = thread; p < a.HW; p += threads) {
      Sums total;
      // Of all blocks, of the one that has the pixel, or of this block's groups.
      const bool gathered = a.plan.cluster > 1 && !a.channels_last;
      const int terms = gathered ? a.plan.cluster : a.plan.sums;
      const A* mine = partial + p;
      if (a.plan.cluster > 1 && a.channels_last) mine = cluster_peer(mine, p / a.plan.share);
#pragma unroll 4
      for (int i = 0; i < terms; ++i) {
        const A* from = gathered ? cluster_peer(mine, i) : mine + i * a.HW;
#pragma unroll
        for (int k = 0; k < Sums::kCount; ++k) {
          if (k < kinds) total.of[k] += from[k * kind];
        }
      }
      use(p, place_of(p), total);
    }
    if (a.plan.cluster > 1) {
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
    if (a.separable) {  // partial sums were there
      for (int i = thread; i < (at.scratch_rows - a.H) * W4; i += threads) {
        scratch[i < at.above * W4 ? i : i + a.H * W4] = A(0);
      }
    }
    for (int i = thread; i < a.H * per_row; i += threads) {
      const int h = static_cast<int>(a.by_row.quotient(static_cast<uint32_t>(i))),
                w = (i - h * per_row) * 4;
      A sums[4] = {};
      const int lines = a.separable ? 1 : a.taps_h;
      for (int k = 0; k < lines; ++k) {
        const int row = h - lines / 2 + k;
        if (row < 0 || row >= a.H) continue;
        const A* x = in + row * at.pitch + w;
        correlate_four([&](int j) { return load_four(x + j); }, taps + k * at.taps_pitch, a.taps_w,
                       sums);
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

  // The result for every element of this thread's, in the place of x; to the image in memory.
  __device__ __forceinline__ void apply(const Result<gradient, kExact, A>& result,
                                        const Image& grad, Image& x, const A* plane0,
                                        const A* plane1, const A* plane2) const {
    T* const memory = a.out + begin(units().image);
#pragma unroll
    for (int h = 0; h < n; h += width) {
      A of[3][width] = {};
      each_pack([&](const Place& place) {
        if (place.first) {
          of_column(plane0, place.column, h, of[0]);
          of_column(plane1, place.column, h, of[1]);
          if constexpr (gradient) of_column(plane2, place.column, h, of[2]);
        }
        Words<T>& xs = x.packs[place.number];
        const Words<T>& gs = grad.packs[place.number];
#pragma unroll
        for (int j = 0; j < width; ++j) {
          const A of_grad = gradient ? static_cast<A>(gs[h + j]) : A(0);
          xs.set(h + j, static_cast<T>(result(of_grad, static_cast<A>(xs[h + j]), of[0][j],
                                              of[1][j], of[2][j])));
        }
        if (h + width < n) return;
        T* const to = memory + place.at;
        access(place, [&] { store_pack(as_words(to), xs.of); }, [&](int j) { to[j] = xs[j]; });
      });
    }
  }
};

}  // namespace mnist_ops::cuda
