// How a convolution's work is shared out among blocks, and what of a block's own memory it takes.
#pragma once

#include "program.h"

#include <algorithm>
#include <array>

namespace mnist_ops::online {

inline int32_t narrow(int64_t n) {
  return static_cast<int32_t>(n);
}
inline int32_t ceil_div(int64_t a, int64_t b) {
  return narrow((a + b - 1) / b);
}

class Tiling {
 public:
  // threads: of a block; memory: the numbers that a block can have in its own memory.
  Tiling(int32_t threads, int64_t memory) : threads_(threads), memory_(memory) {}

  // The most numbers that a phase was given.
  int64_t taken() const { return taken_; }

  // Whether a phase has so many numbers of a block's memory, which it then gets.
  bool take_memory(int64_t numbers) {
    if (numbers > memory_) return false;
    taken_ = std::max(taken_, numbers);
    return true;
  }

  // Tiles a convolution, or its input's gradient, if its sizes allow it.
  bool tile_convolution(Phase& p) {
    if (!has_tiles(p) || p.padding_h < 0 || p.padding_w < 0) return false;
    const int64_t taps = kTile * kTile, planes = mean_numbers(p.blur) + mean_numbers(p.local.blur);
    const int32_t pairs = ceil_div(p.OH, 2), chunks = p.C / kTileLanes;
    TilePlan best;
    int64_t best_work = 0;
    // Which of the two the kernel has.
    for (const auto& [segment, group] : {std::array{5, 3}, std::array{7, 4}}) {
      TilePlan t;
      t.group = group;
      const int32_t segments = ceil_div(p.OW, segment);
      t.width = segments * segment + kTile - 1;
      // Two output channels of four, or all of three, are a warp's.
      t.parts = chunks * 2 * segments * (group == 4 ? 2 : 1) < warps() ? 2 : 1;
      const int64_t weights =
          p.flip ? int64_t{p.C} * odd(narrow(group * taps)) : group * p.C * taps;
      const int64_t sums = int64_t{t.parts} * chunks * 2 * segments * segment * group;
      const int64_t numbers =
          (kTile + 1) * int64_t{t.width} * p.C + (weights + 3) / 4 * 4 + sums + group;
      if (numbers + planes > memory_) continue;
      t.memory = narrow(numbers);
      // What the busiest block of a device with enough of them has to do.
      const int64_t rounds = ceil_div(int64_t{pairs} * ceil_div(p.O, group), kWantedTasks);
      const int64_t work = rounds * group * segments * segment;
      if (best.group == 0 || work < best_work) best = t, best_work = work;
    }
    if (best.group == 0 || !take_memory(best.memory + planes)) return false;
    p.split = 1;
    p.tile = best;
    p.tasks = pairs * ceil_div(p.O, best.group);
    return true;
  }

  // Tiles a convolution's update: with all input channels a task, unless that leaves the device
  // with few of them.
  bool tile_update(Phase& p) {
    if (!has_tiles(p)) return false;
    const int64_t planes = mean_numbers(p.local.blur);
    const int32_t chunks = p.C / kTileLanes, columns = (p.OW + 3) / 4 * 4;
    for (int32_t n = chunks; n > 0; --n) {  // of a task
      if (chunks % n != 0 || (n > 1 && int64_t{p.O} * chunks / n < kWantedTasks / 2)) continue;
      TilePlan t;
      t.group = n * kTileLanes;
      t.width = columns + kTile - 1;
      t.parts = std::max(1, std::min(p.OH, 2 * warps() / (kTile * n)));
      const int64_t numbers = int64_t{p.H} * t.width * t.group + int64_t{p.OH} * columns +
                              int64_t{t.parts} * n * kTile * kTile * (kTileLanes + 1);
      if (!take_memory(numbers + planes)) continue;
      t.memory = narrow(numbers);
      p.tile = t;
      p.tasks = p.O * (chunks / n);
      return true;
    }
    return false;
  }

  // The same for few input channels, which a block holds at once, all tasks an output channel each.
  bool tile_first_update(Phase& p) {
    if (p.kernel_h != kTile || p.kernel_w != kTile || p.C > 8) return false;
    TilePlan t;
    t.group = p.C;
    t.width = p.W + 2 * p.padding_w;
    t.parts = warps();
    const int64_t numbers = (int64_t{p.H} + 2 * p.padding_h) * t.width * p.C +
                            int64_t{p.OH} * p.OW + int64_t{t.parts} * kTileLanes;
    if (p.OW > 4096 || !take_memory(numbers + mean_numbers(p.local.blur))) return false;
    t.memory = narrow(numbers);
    p.tile = t;
    return true;
  }

  // Sets how a convolution's work is shared out.
  void share_convolution(Phase& p) {
    if (tile_first_convolution(p) || tile_convolution(p)) return;
    const Tiles tiles = tiles_of(p.OH, p.OW);
    p.split = 1;
    p.staged = int64_t{p.C} * odd(p.kernel_h * p.kernel_w) + mean_numbers(p.blur) <= kScratch - 64;
    // Enough tasks for a large device and no more: each copies its weights first.
    const int32_t chunks = std::min(tiles.count, ceil_div(kWantedTasks, p.O));
    p.per_task = ceil_div(tiles.count, chunks);
    p.tasks = p.O * ceil_div(tiles.count, p.per_task);
  }

 private:
  int32_t warps() const { return threads_ / 32; }

  static bool has_tiles(const Phase& p) {
    return p.kernel_h == kTile && p.kernel_w == kTile && p.C % kTileLanes == 0 && p.C <= 4096 &&
           p.OW <= 4096;
  }

  // A convolution of few input channels: a task is some tiles of 2 x 2 outputs and all channels.
  bool tile_first_convolution(Phase& p) {
    if (p.C > 8 || p.flip) return false;
    const Tiles tiles = tiles_of(p.OH, p.OW);
    TilePlan t;
    const int32_t lanes = (p.O + kTileLanes - 1) / kTileLanes * kTileLanes;
    t.group = ceil_div(tiles.count, kWantedTasks);
    t.width = p.W + 2 * p.padding_w;
    const int64_t numbers = int64_t{p.O} * odd(p.C * p.kernel_h * p.kernel_w) +
                            (int64_t{p.H} + 2 * p.padding_h) * t.width * p.C + p.O +
                            int64_t{t.group} * (4 * p.O + lanes / kTileLanes);
    if (p.O > 4096 || !take_memory(numbers + mean_numbers(p.blur))) return false;
    t.memory = narrow(numbers);
    p.split = 0;
    p.tile = t;
    p.tasks = ceil_div(tiles.count, t.group);
    return true;
  }

  int32_t threads_;
  int64_t memory_;
  int64_t taken_ = kScratch;
};

}  // namespace mnist_ops::online
