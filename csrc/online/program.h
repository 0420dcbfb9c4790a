// The network as a program for many threads: a list of phases, planned on the host, of integers
// only, so that one copy serves every model of the same shape.
//
// Every model has a workspace of the same layout: its parameters, velocities, maps, gradients and
// planes, at the offsets that the phases name. A phase falls into tasks, which blocks of threads
// take independently of each other. Phases of one level may run at the same time; between levels
// all blocks of a model wait for each other. Nothing is added up across tasks, so the results do
// not depend on how many blocks there are.
//
// Maps are stored with the channels innermost, (H, W, C): neighbouring threads take neighbouring
// channels. The order of a flattened vector is (C, H, W).
//
// Convolutions of many channels are tiled: a task takes its operands into the block's own memory,
// all loads at once, and computes from there. How much of it there is decides what is tiled; what
// is not reads its operands where they are.
#pragma once

#include "formulas.h"

namespace mnist_ops::online {

enum class Op : int32_t {
  kConvolution,         // forward, or the gradient with respect to a convolution's input
  kConvolutionUpdate,   // gradient of the weights, and their update
  kLinear,              // forward
  kLinearBackward,      // gradient with respect to the input, and update
  kLinearUpdate,        // update alone
  kLoss,                // [log-softmax,] prediction, loss, and the gradient of the scores
  kActivation,          //
  kActivationBackward,  //
  kDropout,             // forward and backward
  kPool,                //
  kPoolBackward,        //
  kChannelSum,          // a normalization in steps, for maps too large for a block's own memory:
  kMean,                //   sums, the blurred plane,
  kSubtract,            //   and from every channel
  kLocalBackward,       // through a normalization, a pooling, an activation
  kPermute,             // between a map and a flattened vector
  kLogSoftmax,          //
  kLogSoftmaxBackward,  //
};

constexpr int64_t kNowhere = -1;  // instead of an offset in the workspace
constexpr int64_t kImage = -2;    // the sample's image

// Where the plane of a normalization comes from.
enum class MeanSource : int32_t {
  kNone,   // there is no normalization
  kMap,    // each block adds up the map's channels and blurs the sums
  kSum,    // sums over some channels each are there, each block adds up and blurs them
  kReady,  // the blurred plane is there
};

struct BlurPlan {
  MeanSource source = MeanSource::kNone;
  int32_t C = 0, H = 0, W = 0, taps_h = 0, taps_w = 0;
  int32_t separable = 0, adjoint = 0;
  int32_t parts = 1;  // kSum: planes of sums that add up to the sum over all channels
  int64_t taps = kNowhere, coef = kNowhere, sum = kNowhere, mean = kNowhere;
};

// Of a separable kernel with few taps each block keeps them.
constexpr int32_t kShortTaps = 8;
MNIST_OPS_HD bool blurs_by_short_taps(const BlurPlan& b) {
  return b.separable && b.taps_w <= kShortTaps && b.taps_h <= kShortTaps;
}

// The numbers of its own memory in which a block computes the plane of a normalization.
MNIST_OPS_HD int32_t mean_numbers(const BlurPlan& b) {
  const bool computed = b.source == MeanSource::kMap || b.source == MeanSource::kSum;
  return computed ? 2 * b.H * b.W + kShortTaps : 0;
}

// The last fully connected layer and the loss, where they are fused into what comes before.
struct HeadPlan {
  int32_t classes = 0;
  int32_t staged = 0;  // the weights go into a block's own memory
  ActivationKind activation = ActivationKind::kIdentity;
  LogSoftmaxKind log_softmax = LogSoftmaxKind::kNone;
  int64_t weight = kNowhere, bias = kNowhere, grad = kNowhere;  // grad: of the scores
  double beta = 1;
};

// What lies between a convolution's output and the gradient that comes from behind: an activation,
// a pooling, a normalization, each as far as it is there.
struct LocalPlan {
  int32_t present = 0, pooling = 0;
  ActivationKind activation = ActivationKind::kIdentity;
  int64_t y = kNowhere, pooled = kNowhere;
  BlurPlan blur{};
};

// How a tiled convolution is shared out. Forward and for the input's gradient, a task is two rows
// of the output and `group` output channels; for the update it is an output channel and `group`
// input channels. Where the input has few channels, forward `group` tiles of 2 x 2 outputs.
struct TilePlan {
  int32_t group = 0;             // 0: not tiled
  int32_t parts = 0;             // forward: of the kernel's rows; update: of the output's
  int32_t width = 0;             // of the operand's rows in the block's memory, with padding
  int32_t memory = 0;            // of the block's memory, in numbers, without planes of a mean
  int64_t group_sum = kNowhere;  // sums over each group's channels, for the normalization before
};

// One phase. Which fields count depends on op; offsets are in elements of the workspace.
struct Phase {
  Op op{};
  int32_t tasks = 0, first_task = 0;  // first_task: tasks of the phases before it in its level
  int32_t per_task = 0;               // tiles, rows or groups that a task has
  int32_t ends_level = 0;             // which, from 1 on, where it is the last one of it
  ActivationKind activation = ActivationKind::kIdentity;
  PoolKind pool = PoolKind::kLp;
  LogSoftmaxKind log_softmax = LogSoftmaxKind::kNone;
  int32_t split = 0;    // convolution: the lanes of a warp share the sum over input channels; else
                        // it is that of few channels, by tiles
  int32_t flip = 0;     // convolution: the gradient with respect to the input
  int32_t staged = 0;   // the operand that a task uses again and again fits into a block's memory
  int32_t permute = 0;  // the map is read, or its gradient written, in the order of a vector
  int32_t fused_pool = 0, count_padding = 0, divisor = 0;
  int32_t C = 0, H = 0, W = 0, O = 0, OH = 0, OW = 0;
  int32_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, padding_h = 0, padding_w = 0;
  int64_t x = kNowhere, y = kNowhere, pooled = kNowhere, dx = kNowhere, dy = kNowhere;
  int64_t flat = kNowhere;  // the normalized input, of a linear layer flattened, for the update
  int64_t weight = kNowhere, bias = kNowhere;
  int64_t channel_sum = kNowhere;  // of the pooled map, for the normalization behind it
  int64_t first_uniform = 0;
  double number = 1;  // norm_type, dropout's 1 - p, beta
  BlurPlan blur{};
  LocalPlan local{};  // kLocalBackward; the gradients of a convolution that do without it
  TilePlan tile{};
  HeadPlan head{};
};

// A block's own memory, in numbers: so much of it there always is.
constexpr int32_t kScratch = 4480;
constexpr int32_t kTile = 5;        // kernels of this size are tiled
constexpr int32_t kTileLanes = 32;  // channels that a warp takes, and steps of their number
constexpr int32_t kColumns = 16;    // of a task of kLinearBackward
constexpr int32_t kWantedTasks = 128;

// ----------------------------------------------------------------------- indices, on both backends

// The 2 x 2 tiles of a plane, row by row.
struct Tiles {
  int32_t across, count;
};
MNIST_OPS_HD Tiles tiles_of(int32_t H, int32_t W) {
  const int32_t across = (W + 1) / 2;
  return {across, (H + 1) / 2 * across};
}

// Where a convolution's weight for input channel c, output channel o and tap k lies; flip: of the
// transposed convolution, whose input is the output's gradient.
MNIST_OPS_HD int32_t weight_index(const Phase& p, int32_t o, int32_t c, int32_t k) {
  const int32_t taps = p.kernel_h * p.kernel_w;
  return p.flip ? (c * p.O + o) * taps + taps - 1 - k : (o * p.C + c) * taps + k;
}

// Distance of the weights of two input channels in a block's own memory: odd, so that neighbouring
// lanes meet different banks.
MNIST_OPS_HD int32_t odd(int32_t n) {
  return n | 1;
}

// The place in an (H, W, C) map of element i of its flattened vector.
MNIST_OPS_HD int32_t map_index(int32_t i, int32_t C, int32_t pixels) {
  return i % pixels * C + i / pixels;
}

// Number i of the correlation of a line of n numbers, `step` apart, with taps; flip: with the
// flipped ones.
template <typename T>
MNIST_OPS_HD T blur_line_at(const T* line, int32_t step, int32_t n, const T* taps, int32_t count,
                            bool flip, int32_t i) {
  T sum = T(0);
  for (int32_t k = 0; k < count; ++k) {
    const int32_t j = i + k - count / 2;
    if (j >= 0 && j < n) sum += line[j * step] * taps[flip ? count - 1 - k : k];
  }
  return sum;
}

// A pixel of the blur of a plane. Of a separable kernel blur_line_at() makes it in two steps, too,
// along the rows, then along the columns of that.
template <typename T>
MNIST_OPS_HD T blur_at(const BlurPlan& b, const T* plane, const T* taps, int32_t h, int32_t w) {
  T total = T(0);
  for (int32_t k = 0; k < b.taps_h; ++k) {
    const int32_t row = h + k - b.taps_h / 2, tap = b.adjoint ? b.taps_h - 1 - k : k;
    if (row < 0 || row >= b.H) continue;
    const T* taps_of_row = b.separable ? taps : taps + tap * b.taps_w;
    const T sum = blur_line_at(plane + row * b.W, 1, b.W, taps_of_row, b.taps_w, b.adjoint, w);
    total += b.separable ? sum * taps[tap] : sum;
  }
  return total;
}

// The geometry of a pooling of one channel in an (H, W, C) map.
MNIST_OPS_HD PoolGeometryOf<int32_t> pool_geometry_of(const Phase& p) {
  PoolGeometryOf<int32_t> g{};
  g.N = 1, g.C = 1, g.H = p.H, g.W = p.W, g.OH = p.OH, g.OW = p.OW;
  g.kernel_h = p.kernel_h, g.kernel_w = p.kernel_w;
  g.stride_h = p.stride_h, g.stride_w = p.stride_w;
  g.padding_h = p.padding_h, g.padding_w = p.padding_w;
  g.in_h = p.W * p.C, g.in_w = p.C, g.out_h = p.OW * p.C, g.out_w = p.C;
  return g;
}

}  // namespace mnist_ops::online
