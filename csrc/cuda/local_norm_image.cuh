// What a block, or a cluster of blocks, does with an image in shared memory.
#pragma once

#include "local_norm.cuh"

namespace mnist_ops::cuda {

// --------------------------------------------------------------------- images in shared memory
//
// A block, or a cluster of them, takes an image at a time: it copies the data to shared memory,
// reads them there twice, for the sums over channels and for the result, and stores the result
// from registers. The planes are in shared memory, too. Of a cluster each block has a share of the
// data (channels of NCHW, pixels of NHWC), which lies in one piece, and every plane, whole: sums
// over channels are added up from all blocks' shares; the blur, of one plane, is every block's own.
//
// An image is a table of packs. Those of a column have the same pixels: in NHWC a column is a pixel
// and its entries are the packs of its channels; in NCHW an entry is a channel, and a column is a
// pack of it. kLaneGroups threads of a warp share the entries of a column: in NCHW a warp has 8
// columns next to each other, in NHWC 8 threads share a pixel, so that a quarter of a warp reads
// 128 bytes in a row. `slots` warps share the entries of the same columns (NCHW).
template <bool kLast>
constexpr int kLaneGroups = kLast ? 8 : 4;
template <bool kLast>
constexpr int kLaneColumns = kWarp / kLaneGroups<kLast>;

// Where a block has what in shared memory, in elements of A: multiples of four. A flat plane has a
// value for each pixel.
//   in       the plane that is blurred, its rows with zeros before and behind them, so that the
//            window of a pixel begins at the pixel's own index
//   scratch  that plane blurred along rows, with rows of zeros above and below; before it is
//            blurred, the partial sums of warps and of blocks
//   units    and the barrier of what is on its way
//   d        begins where scratch ends; for the gradient among the partial sums, which are done
//            with when it is written
struct PlaneLayout {
  int pitch;                                                              // of the rows of in
  int scratch_rows, above;                                                // rows of zeros above
  int taps_pitch;                                                         // of a row of taps
  int weight, flipped, units, coef, mean, q, grads, centred, scratch, d;  // in begins at 0
  int64_t size;

  // With so many partial sums of all kinds.
  PlaneLayout(const BlurGeometry& g, bool backward, int64_t partial_sums) {
    const int64_t flat = round_up(g.H * g.W, 4), row = round_up(g.taps_w, 4);
    const int64_t taps = row * (g.separable ? 1 : g.taps_h);
    pitch = static_cast<int>(g.W + g.taps_w - 1);
    scratch_rows = static_cast<int>(g.H + (g.separable ? g.taps_h - 1 : 0));
    above = g.separable ? static_cast<int>(g.taps_h / 2) : 0;
    taps_pitch = static_cast<int>(row);
    int64_t end = round_up(g.H * pitch, 4);
    const auto take = [&](int64_t count) {
      const int64_t begin = end;
      end += count;
      return static_cast<int>(begin);
    };
    weight = take(taps), flipped = take(taps), units = take(12);
    coef = take(flat), mean = take(flat);
    q = take(backward ? flat : 0), grads = take(backward ? flat : 0);
    centred = take(backward ? flat : 0);
    const int64_t blurred = round_up(scratch_rows * g.W, 4), partial = round_up(partial_sums, 4);
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
  int share = 0;                        // entries or (NHWC) columns of a block,
  int64_t piece = 0;                    // and their elements
  int columns = 0, entries = 0;         // of the table
  int column_step = 0, entry_step = 0;  // in elements
  int column_warps = 0, slots = 0;      // slots: partial sums of a pixel in a block, too
  int64_t bytes = 0;                    // of shared memory

  int threads() const { return kWarp * column_warps * slots; }
};

template <typename T>
struct ImageArguments {
  ImagePlan plan;
  LocalNorm kind;
  bool adjoint;  // the gradient of subtractive, which is its forward but for the order of steps
  bool separable;
  bool aligned;  // images and their shares begin at multiples of 16 bytes
  int N, C, H, W, HW, taps_h, taps_w;
  int size;   // elements of an image
  int piece;  // elements of a block's share, of the last one at most
  int room;   // elements of shared memory that it takes
  Divider by_W;
  PlaneLayout at;
  opmath_t<T> threshold, value, root_of_least, by_channels;
  const double* kernel;
  const T* grad;   // backward
  const T* input;  // of the subtractive backward: the gradient
  T* out;
};

// Elements of a pack where rows of them make up a channel's pixels or, in NHWC, a pixel's channels.
// Elsewhere, and in float64, a pack is one element.
template <bool kLast, typename T>
constexpr int kTablePack = sizeof(T) == 8 ? 1
                           : kLast        ? kPackSize<T>
                                          : kShortPack<T>;

// A block's work on its image. kLast: NHWC; n: elements of a pack.
template <bool gradient, bool kLast, int n, typename T>
struct ImageBlock {
  using Element = T;
  using Data = T*;  // which the result takes the place of
  using A = opmath_t<T>;
  using Sums = ChannelSums<gradient, A>;
  static constexpr int m = kLast ? 1 : n;                   // pixels of a pack
  static constexpr int w = kLast && n > 1 ? 2 : m;          // sums that a thread adds to in turn
  static constexpr int kUnrolled = kLast && n > 1 ? 1 : 4;  // packs
  static constexpr bool kExact = sizeof(A) == 8;            // coef and d; or they are reciprocals
  static constexpr int kGroups = kLaneGroups<kLast>, kColumns = kLaneColumns<kLast>;

  const ImageArguments<T>& a;
  A* const planes;
  const int threads, thread;
  int slot, first_column;  // of this thread
  int group, packs;        // its first entry of a column, and how many it has

  __device__ __forceinline__ ImageBlock(const ImageArguments<T>& arguments, A* memory)
      : a(arguments),
        planes(memory),
        threads(static_cast<int>(blockDim.x)),
        thread(static_cast<int>(threadIdx.x)) {
    const int lane = thread % kWarp, warp = thread / kWarp;
    slot = warp / a.plan.column_warps;
    const int lane_group = kLast ? lane % kGroups : lane / kColumns;
    first_column =
        (warp - slot * a.plan.column_warps) * kColumns + (kLast ? lane / kGroups : lane % kColumns);
    group = slot * kGroups + lane_group;
    const int groups = kGroups * a.plan.slots;
    packs = (entries() - group + groups - 1) / groups;
  }

  __device__ __forceinline__ int rank() const {
    return static_cast<int>(blockIdx.x) & (a.plan.cluster - 1);
  }
  __device__ __forceinline__ int share_begin() const { return rank() * a.plan.share; }
  // Of this block's share: its first element in memory, and how many there are: none where the
  // blocks before it have all.
  __device__ __forceinline__ int64_t begin(int image) const {
    return int64_t{image} * a.size + int64_t{rank()} * a.piece;
  }
  __device__ __forceinline__ int count() const {
    return std::max(0, std::min(a.piece, a.size - rank() * a.piece));
  }

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
    normalize_kernel(a.kernel, a.separable ? 1 : a.taps_h, a.taps_w, at.taps_pitch,
                     planes + at.weight, planes + at.flipped);
    __syncthreads();
    const BlurGeometry g{a.H, a.W, a.taps_h, a.taps_w, a.separable};
    for (int p = thread; p < a.HW; p += threads) {
      const A coef = coefficient_at(g, planes + at.weight, at.taps_pitch, p);
      planes[at.coef + p] = kExact ? coef : A(1) / coef;
    }
  }

  __device__ __forceinline__ int row_of(int p) const {
    return static_cast<int>(a.by_W.quotient(static_cast<uint32_t>(p)));
  }
  // Of a pixel, in the plane `in`.
  __device__ __forceinline__ int place_of(int p) const {
    return p + row_of(p) * (a.taps_w - 1) + a.taps_w / 2;
  }

  // ---------------------------------------------------------------------------------- the data

  __device__ __forceinline__ uint64_t* arrival() const {
    return reinterpret_cast<uint64_t*>(planes + a.at.units + 8);
  }

  // This block's share of an image to shared memory and back, by all threads; there after a
  // barrier, which load() ends with. What store() reads must not change before the next load().
  __device__ __forceinline__ void load(T* x, T* grad, int image, bool parity) const {
    const int64_t first = begin(image);
    if (has_bulk_copies() && a.aligned) {
      if (thread == 0) {
        const int bytes = count() * static_cast<int>(sizeof(T));
        wait_for_bulk_stores();
        expect_bytes(arrival(), gradient ? 2 * bytes : bytes);
        if (bytes > 0) bulk_load(x, a.input + first, bytes, arrival());
        if (gradient && bytes > 0) bulk_load(grad, a.grad + first, bytes, arrival());
      }
      return wait_for_bytes(arrival(), parity);
    }
    copy<true>(x, a.input + first);
    if constexpr (gradient) copy<true>(grad, a.grad + first);
    wait_for_copies();
    __syncthreads();
  }
  __device__ __forceinline__ void store(int image, const T* x) const {
    T* const to = a.out + begin(image);
    if (has_bulk_copies() && a.aligned) {
      order_bulk_store();
      __syncthreads();
      if (thread == 0 && count() > 0) {
        bulk_store(to, x, count() * static_cast<int>(sizeof(T)));
      }
      return;
    }
    __syncthreads();
    copy<false>(to, x);
  }

  // All of the share.
  template <bool kToShared>
  __device__ __forceinline__ void copy(T* to, const T* from) const {
    constexpr int kWhole = kPackSize<T>;
    const int size = count();
    if (a.aligned) {
      for (int i = thread * kWhole; i < size; i += threads * kWhole) {
        if constexpr (kToShared) {
          copy_pack<kWhole>(to + i, from + i);
        } else {
          store_pack(to + i, load_pack<kWhole>(from + i));
        }
      }
    } else {
      for (int i = thread; i < size; i += threads) to[i] = from[i];
    }
  }

  // Of this block. Columns are counted from its first one.
  __device__ __forceinline__ int columns() const {
    return kLast ? std::min(a.plan.columns - share_begin(), a.plan.share) : a.plan.columns;
  }
  __device__ __forceinline__ int entries() const {
    return kLast ? a.plan.entries : std::min(a.plan.entries - share_begin(), a.plan.share);
  }

  // body(column) for the columns of this thread, and for numbers of columns that there are none of
  // where others of its warp have one: as many calls for all threads of a warp.
  template <typename Body>
  __device__ __forceinline__ void each_column(const Body& body) const {
    const int in_warp = kLast ? thread % kWarp / kGroups : thread % kColumns;
    for (int column = first_column; column - in_warp < columns();
         column += a.plan.column_warps * kColumns) {
      body(column);
    }
  }

  // body(at) for this thread's packs of a column: where one begins.
  template <typename Body>
  __device__ __forceinline__ void each_pack(int column, const Body& body) const {
    const int step = kGroups * a.plan.slots * a.plan.entry_step;
    int at = first_pack(column);
#pragma unroll(kUnrolled)
    for (int left = packs; left > 0; --left, at += step) body(at);
  }
  __device__ __forceinline__ int first_pack(int column) const {
    return column * a.plan.column_step + group * a.plan.entry_step;
  }

  // The values of a plane for the pixels of a column.
  __device__ __forceinline__ void of_column(const A* plane, int column, A (&values)[m]) const {
    const Pack<A, m> pack = load_pack<m>(plane + (kLast ? share_begin() + column : column * n));
#pragma unroll
    for (int j = 0; j < m; ++j) values[j] = pack.values[j];
  }

  // ------------------------------------------------------------------------------------ sums

  // use(p, where, sums) for every pixel, with the sums over all channels. `where` is the pixel's
  // place in the plane `in`. Ends with a barrier.
  template <bool /* gradient, as of the block */, typename Use>
  __device__ __forceinline__ void reduce(const T* grad, const T* x, const Use& use) const {
    if (!gradient && a.kind == LocalNorm::kSubtractive) {  // its gradient is a forward
      sum_pixels<LocalNorm::kSubtractive>(grad, x, use);
    } else if (a.kind == LocalNorm::kDivisive) {
      sum_pixels<LocalNorm::kDivisive>(grad, x, use);
    } else {
      sum_pixels<LocalNorm::kContrastive>(grad, x, use);
    }
  }

  template <LocalNorm kind, typename Use>
  __device__ __forceinline__ void sum_pixels(const T* grad, const T* x, const Use& use) const {
    const ImagePlan& plan = a.plan;
    A* const partial = planes + a.at.scratch;
    const int size = plan.slots * a.HW;  // of all sums of a kind
    add_columns<kind>(grad, x);
    __syncthreads();
    const auto total_of = [&](int terms, const auto& first_of) {
      return merged<kind>(terms, [&](int i, int k) { return first_of(i)[k * size]; });
    };
    if (plan.cluster > 1) {  // a block's own first, for others to read one number a pixel
      for (int p = thread; p < a.HW && plan.slots > 1; p += threads) {
        const Sums total = total_of(plan.slots, [&](int i) { return partial + i * a.HW + p; });
#pragma unroll
        for (int k = 0; k < Sums::kKinds; ++k) {
          if (Sums::has(kind, k)) partial[k * size + p] = total.of[k];
        }
      }
      sync_cluster();
    }
    for (int p = thread; p < a.HW; p += threads) {
      const A* const mine = partial + p;
      // Of this block's slots; of the block that has the pixel; of all blocks.
      if (plan.cluster == 1) {
        use(p, place_of(p), total_of(plan.slots, [&](int i) { return mine + i * a.HW; }));
      } else if constexpr (kLast) {
        use(p, place_of(p), total_of(1, [&](int) { return cluster_peer(mine, p / plan.share); }));
      } else {
        use(p, place_of(p), total_of(plan.cluster, [&](int i) { return cluster_peer(mine, i); }));
      }
    }
    if (plan.cluster > 1) {
      sync_cluster();  // before anyone writes over what others have yet to read
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ static A inverse(A number) {
    return number > A(0) ? A(1) / number : A(0);
  }

  // The sums of all of `terms`: term(i, kind of sums).
  template <LocalNorm kind, typename Term>
  __device__ __forceinline__ Sums merged(int terms, const Term& term) const {
    const auto sums_of = [&](int i) {
      Sums sums;
#pragma unroll
      for (int k = 0; k < Sums::kKinds; ++k) {
        if (Sums::has(kind, k)) sums.of[k] = term(i, k);
      }
      return sums;
    };
    Sums all = sums_of(0);
    if (terms == 1) return all;
    A mean = A(0);
    if constexpr (kind == LocalNorm::kContrastive) {
      A number = A(0), total = A(0);
      for (int i = 0; i < terms; ++i) number += term(i, kNumber), total += term(i, kTotal);
      mean = total / number;
      all.move_to(mean, inverse(all.of[kNumber]));
    }
#pragma unroll 1
    for (int i = 1; i < terms; ++i) {
      Sums next = sums_of(i);
      if constexpr (kind == LocalNorm::kContrastive) {
        next.move_to(mean, inverse(next.of[kNumber]));
      }
      all.add(next);
    }
    return all;
  }

  // Adds up over the lanes that share a column.
  __device__ __forceinline__ static A over_lanes(A value) {
#pragma unroll
    for (int i = 1; i < kGroups; i *= 2) {
      value += __shfl_xor_sync(kWholeWarp, value, kLast ? i : i * kColumns);
    }
    return value;
  }

  // Adds up this block's columns, into the partial sums.
  template <LocalNorm kind>
  __device__ __forceinline__ void add_columns(const T* grad, const T* x) const {
    constexpr bool kAboutMean = kind == LocalNorm::kContrastive;
    const A scale = units().lift * units().part;
    A* const partial = planes + a.at.scratch + slot * a.HW;
    const int size = a.plan.slots * a.HW;
    each_column([&](int column) {
      const bool inside = column < columns();
      Sums sums[w];
      A centre[w] = {};
      if (inside && packs > 0) {
        if constexpr (kAboutMean) {
          const Pack<T, n> xs = load_pack<n>(x + first_pack(column));
#pragma unroll
          for (int j = 0; j < w; ++j) {
            // In NHWC all sums are of one pixel, and about one number.
            const A value = static_cast<A>(xs.values[kLast ? 0 : j]) * scale;
            centre[j] = std::abs(value) <= Range<A>::kLargest ? value : A(0);
          }
        }
        each_pack(column, [&](int at) {
          const Pack<T, n> xs = load_pack<n>(x + at);
          Pack<T, n> gs{};
          if constexpr (gradient) gs = load_pack<n>(grad + at);
#pragma unroll
          for (int j = 0; j < n; ++j) {
            sums[j % w].template add_one<kind>(
                gradient ? static_cast<A>(gs.values[j]) : A(0),
                static_cast<A>(xs.values[j]) * scale - centre[j % w]);
          }
        });
        if constexpr (kAboutMean) {
#pragma unroll
          for (int j = 0; j < w; ++j) sums[j].of[kNumber] = static_cast<A>(packs * (n / w));
        }
      }
      if constexpr (kLast) {
#pragma unroll
        for (int j = 1; j < w; ++j) sums[0].add(sums[j]);
      }
      A number = A(0), by_own = A(0), by_all = A(0);
#pragma unroll
      for (int j = 0; j < m; ++j) {
        Sums& own = sums[j];
        if constexpr (kAboutMean) {
          if (j == 0) {  // it is the same for all of them
            number = over_lanes(own.of[kNumber]);
            by_own = inverse(own.of[kNumber]), by_all = inverse(number);
          }
          own.settle(centre[j], by_own);
          const A total = over_lanes(own.of[kTotal]);
          own.move_to(total * by_all, by_own);
          own.of[kTotal] = total, own.of[kNumber] = number;
        }
#pragma unroll
        for (int k = 0; k < Sums::kKinds; ++k) {
          if (!Sums::has(kind, k) || (kAboutMean && (k == kTotal || k == kNumber))) continue;
          own.of[k] = over_lanes(own.of[k]);
        }
      }
      if (!inside || group % kGroups != 0) return;
#pragma unroll
      for (int k = 0; k < Sums::kKinds; ++k) {
        if (!Sums::has(kind, k)) continue;
        A* const to = partial + k * size;
        if constexpr (kLast) {
          to[share_begin() + column] = sums[0].of[k];
        } else {
          Pack<A, m> of_kind;
#pragma unroll
          for (int j = 0; j < m; ++j) of_kind.values[j] = sums[j].of[k];
          store_pack(to + column * m, of_kind);
        }
      }
    });
  }

  // ------------------------------------------------------------------------------------ blur

  // finish(blurred, p, where) for every pixel of the plane `in`, which finish may write: the next
  // blur's. Whether finish was true for one of them, for all threads of the block. Ends with a
  // barrier.
  template <typename Finish>
  __device__ __forceinline__ bool blur(bool adjoint, const Finish& finish) const {
    const PlaneLayout& at = a.at;
    const A* taps = planes + (adjoint ? at.flipped : at.weight);
    A* const scratch = planes + at.scratch;
    const int before = at.above * a.W, zeros = (at.scratch_rows - a.H) * a.W;
    for (int i = thread; i < zeros; i += threads) {  // partial sums were there
      scratch[i < before ? i : i + a.HW] = A(0);
    }
    for (int p = thread; p < a.HW; p += threads) {
      const int h = row_of(p);
      const A* x = planes + p + h * (a.taps_w - 1);
      A sum = A(0);
      if (a.separable) {
        sum = correlated(x, 1, taps, a.taps_w);
      } else {
        const int first = h - a.taps_h / 2;
        for (int k = 0; k < a.taps_h; ++k) {
          if (first + k < 0 || first + k >= a.H) continue;
          sum += correlated(x + (first + k - h) * at.pitch, 1, taps + k * at.taps_pitch, a.taps_w);
        }
      }
      scratch[before + p] = sum;
    }
    __syncthreads();
    bool any = false;
    for (int p = thread; p < a.HW; p += threads) {
      const A sum = a.separable ? correlated(scratch + p, a.W, taps, a.taps_h) : scratch[p];
      any |= finish(sum, p, place_of(p));
    }
    return __syncthreads_or(any);
  }

  // ----------------------------------------------------------------------------------- apply

  // The result for every element of this thread's, in the place of x, and then to memory.
  __device__ __forceinline__ void apply(const Result<gradient, kExact, A>& result, const T* grad,
                                        T* x, const A* plane0, const A* plane1,
                                        const A* plane2) const {
    each_column([&](int column) {
      if (column >= columns()) return;
      A of[3][m] = {};
      of_column(plane0, column, of[0]);
      if (result.divides) {
        of_column(plane1, column, of[1]);
      } else {
#pragma unroll
        for (int j = 0; j < m; ++j) of[1][j] = A(1);
      }
      if constexpr (gradient) of_column(plane2, column, of[2]);
      each_pack(column, [&](int at) {
        Pack<T, n> xs = load_pack<n>(x + at), gs{};
        if constexpr (gradient) gs = load_pack<n>(grad + at);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          xs.values[j] = static_cast<T>(result(gradient ? static_cast<A>(gs.values[j]) : A(0),
                                               static_cast<A>(xs.values[j]), of[0][j % m],
                                               of[1][j % m], of[2][j % m]));
        }
        store_pack(x + at, xs);
      });
    });
    store(units().image, x);
  }
};

}  // namespace mnist_ops::cuda
