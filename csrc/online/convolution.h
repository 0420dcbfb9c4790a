// Convolution of stride 1, without im2col.
//
// Bound by multiplications: forward, input gradient and weight gradient are each a matrix product
// of C KH KW x OH OW x O, and are computed as one, but where the elements lie: a register tile of
// kTileRows rows by one line of channels (16 of float32, 8 of float64) takes a broadcast number
// times a line in each step.
//
//   forward          rows: pixels of an output row   lines: output channels   sum: taps (c, kh, kw)
//   input gradient   rows: pixels of an output row   lines: input channels    sum: kh, o
//   weight gradient  rows: taps                      lines: output channels   sum: pixels
//
// Weights are kept as [block of o][k][lane of o] while the engine runs, k in the order (block of c,
// kh, kw, lane of c), so the weight gradient's tiles are added straight into them. The input
// gradient wants [block of c][kw][kh][o][lane of c]: a copy, made block by block just before the
// update changes the weights. Parts of the weights that one pass goes through again and again are
// kept to what the first-level cache holds.
#pragma once

#include "layer.h"

namespace mnist_ops::online {

// Taps whose inputs lie next to each other: [offset, offset + length) from an output's first input.
struct Run {
  int64_t offset;
  int64_t length;
};

template <typename T, int kRows>
using Tile = Vector<T>[kRows][kVectorsPerLine];

// sum[m][lane] += sum over j < length of from[m * kStep + j] * lines[j][lane]
template <typename T, int kStep, int kRows>
MNIST_OPS_HD void multiply(Tile<T, kRows>& sum, const T* from, const T* lines, int64_t length) {
  constexpr int kV = kVectorsPerLine;
  for (int64_t j = 0; j < length; ++j, lines += kLanes<T>) {
    Vector<T> line[kV];
    for (int v = 0; v < kV; ++v) line[v] = load(lines + v * kWidth<T>);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vector<T> a = splat(from[m * kStep + j]);
      for (int v = 0; v < kV; ++v) sum[m][v] = fmadd(a, line[v], sum[m][v]);
    }
  }
}

// y[m][lane] = start[m * start_step + lane] + sum over k of x[m * kPixel + offset of k] *
// w[k][lane] for kRows pixels; start is y itself, or the bias with a start_step of 0.
template <typename T, int kPixel, int kRows>
void forward_tile(const T* x, const Run* runs, int64_t count, const T* w, const T* start,
                  int64_t start_step, T* y) {
  constexpr int kV = kVectorsPerLine;
  Tile<T, kRows> sum;
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kV; ++v) sum[m][v] = load(start + m * start_step + v * kWidth<T>);
  }
  for (int64_t r = 0; r < count; ++r) {
    multiply<T, kPixel, kRows>(sum, x + runs[r].offset, w, runs[r].length);
    w += runs[r].length * kLanes<T>;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kV; ++v) store(y + m * kLanes<T> + v * kWidth<T>, sum[m][v]);
  }
}

// dx[m][lane] += sum over rows i < count (kh), blocks of o and o of
// dy[m of row -i][o] * w[i][o][lane], for kRows pixels.
template <typename T, int kRows>
void input_gradient_tile(const T* dy, int64_t row, int64_t block, const T* w, int64_t outputs,
                         int64_t count, T* dx) {
  constexpr int kV = kVectorsPerLine;
  Tile<T, kRows> sum = {};
  for (int64_t i = 0; i < count; ++i, dy -= row) {
    const T* from = dy;
    int64_t o = outputs;
    for (; o >= kLanes<T>; o -= kLanes<T>, from += block, w += kLanes<T> * kLanes<T>) {
      multiply<T, kLanes<T>, kRows>(sum, from, w, kLanes<T>);
    }
    multiply<T, kLanes<T>, kRows>(sum, from, w, o);
    w += o * kLanes<T>;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kV; ++v) {
      T* to = dx + m * kLanes<T> + v * kWidth<T>;
      store(to, load(to) + sum[m][v]);
    }
  }
}

// The gradient of kRows taps' weights: sum over pixels of x[pixel][m] * dy[pixel][lane], for
// OH x OW pixels; then the update of w[m][lane]. Neighbouring pixels are `pixel` apart in x.
template <typename T, int kRows>
void weight_gradient_tile(const T* x, int64_t pixel, int64_t x_row, const T* dy, int64_t OH,
                          int64_t OW, const Update<T>& update, T* w, T* velocity) {
  constexpr int kV = kVectorsPerLine;
  Tile<T, kRows> sum = {};
  for (int64_t h = 0; h < OH; ++h, x += x_row) {
    const T* from = x;
    for (int64_t p = 0; p < OW; ++p, from += pixel, dy += kLanes<T>) {
      Vector<T> line[kV];
      for (int v = 0; v < kV; ++v) line[v] = load(dy + v * kWidth<T>);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const Vector<T> a = splat(from[m]);
        for (int v = 0; v < kV; ++v) sum[m][v] = fmadd(a, line[v], sum[m][v]);
      }
    }
  }
  if (update.plain()) {
    const Vector<T> rate = splat(-update.rate);
    for (int m = 0; m < kRows; ++m) {
      for (int v = 0; v < kV; ++v) {
        T* to = w + m * kLanes<T> + v * kWidth<T>;
        store(to, fmadd(rate, sum[m][v], load(to)));
      }
    }
  } else {
    T gradient[kRows * kLanes<T>];
    std::memcpy(gradient, sum, sizeof gradient);
    update_row(update, w, velocity, gradient, kRows * kLanes<T>);
  }
}

// Calls body(rows as a constant, first) for tiles that cover [0, count), their sizes equal or one
// apart.
template <int kRows = kTileRows, typename F>
inline void with_rows(int64_t rows, const F& body) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return with_rows<kRows - 1>(rows, body);
  }
  body(std::integral_constant<int, kRows>{});
}

template <typename F>
inline void for_each_tile(int64_t count, const F& body) {
  const int64_t tiles = divide_up(count, kTileRows);
  const int64_t rows = count / tiles, longer = count % tiles;
  int64_t first = 0;
  if (longer > 0) {
    with_rows(rows + 1, [&](auto constant) {
      for (int64_t i = 0; i < longer; ++i, first += rows + 1) body(constant, first);
    });
  }
  with_rows(rows, [&](auto constant) {
    for (; first < count; first += rows) body(constant, first);
  });
}

template <typename T>
class Convolution final : public Layer<T> {
 public:
  Convolution(const Map<T>& input, const Map<T>& output, const Window& window, Parameter<T> weight,
              Parameter<T> bias)
      : Layer<T>(input, output),
        o_(window),
        outputs_(output.shape.C),
        weight_(weight),
        bias_(bias) {
    padded_ = {input.shape.C, input.shape.H + 2 * o_.padding_h, input.shape.W + 2 * o_.padding_w,
               false};
    lanes_ = input.lanes;
    const int64_t input_blocks = input.blocks();
    const int64_t block = padded_.pixels() * lanes_;
    x_ = input.value;
    dx_ = input.grad;
    if (o_.padding_h > 0 || o_.padding_w > 0) {
      padded_value_ = Buffer<T>(input_blocks * block);
      x_ = padded_value_.data();
      if (dx_ != nullptr) {
        padded_grad_ = Buffer<T>(input_blocks * block);
        dx_ = padded_grad_.data();
      }
    }
    for (int64_t b = 0; b < input_blocks; ++b) {
      const int64_t length = std::min(lanes_, padded_.C - b * lanes_);
      for (int64_t kh = 0; kh < o_.kernel_h; ++kh) {
        for (int64_t kw = 0; kw < o_.kernel_w; ++kw) {
          const int64_t offset = b * block + (kh * padded_.W + kw) * lanes_;
          // All lanes of neighbouring pixels are one run.
          if (!runs_.empty() && runs_.back().offset + runs_.back().length == offset) {
            runs_.back().length += length;
          } else {
            runs_.push_back({offset, length});
          }
        }
      }
    }
    taps_ = padded_.C * o_.kernel_h * o_.kernel_w;
    // Parts of the sum whose weights stay in the first-level cache.
    int64_t inside = 0;
    for (std::size_t r = 0; r < runs_.size(); ++r) {
      if (inside > 0 && (inside + runs_[r].length) * kLineBytes > kPartBytes) {
        parts_.push_back(r);
        inside = 0;
      }
      inside += runs_[r].length;
    }
    parts_.push_back(runs_.size());
    const auto buffer = [](const T* wanted, int64_t size) { return Buffer<T>(wanted ? size : 0); };
    packed_ = Buffer<T>(output.blocks() * taps_ * kLanes<T>);
    packed_velocity_ = buffer(weight.velocity, packed_.size());
    packed_bias_ = Buffer<T>(output.blocks() * kLanes<T>);
    packed_bias_velocity_ = buffer(bias.velocity, packed_bias_.size());
    transposed_ = buffer(dx_, input_blocks * o_.kernel_h * o_.kernel_w * outputs_ * kLanes<T>);
  }

  bool has_parameters() const override { return true; }

  void move_parameters(bool back) override {
    const auto move = [back](T* packed, T* dense, int64_t i, int64_t j) {
      if (dense != nullptr) (back ? dense[j] : packed[i]) = back ? packed[i] : dense[j];
    };
    const int64_t taps = o_.kernel_h * o_.kernel_w;
    for (int64_t o = 0; o < outputs_; ++o) {
      for (int64_t c = 0; c < padded_.C; ++c) {
        const int64_t block = c / kLanes<T>, lane = c % kLanes<T>;
        const int64_t length = std::min(kLanes<T>, padded_.C - block * kLanes<T>);
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t k = block * kLanes<T> * taps + t * length + lane;
          const int64_t i = (o / kLanes<T> * taps_ + k) * kLanes<T> + o % kLanes<T>;
          const int64_t j = (o * padded_.C + c) * taps + t;
          move(packed_.data(), weight_.value, i, j);
          move(packed_velocity_.data(), weight_.velocity, i, j);
        }
      }
      move(packed_bias_.data(), bias_.value, o, o);
      move(packed_bias_velocity_.data(), bias_.velocity, o, o);
    }
  }

  void prepare_forward(const Step<T>&, const Workers&) override {
    if (x_ == this->in.value) return;
    const Shape& s = this->in.shape;
    for (int64_t b = 0; b < this->in.blocks(); ++b) {
      for (int64_t h = 0; h < s.H; ++h) {
        const int64_t row = (h + o_.padding_h) * padded_.W + o_.padding_w;
        std::copy_n(this->in.value + b * this->in.block() + h * s.W * lanes_, s.W * lanes_,
                    x_ + (b * padded_.pixels() + row) * lanes_);
      }
    }
  }

  void forward(int64_t b) override {
    if (lanes_ == 1) {
      forward_block<1>(b);
    } else {
      forward_block<kLanes<T>>(b);
    }
  }

  void update(int64_t b, const Step<T>& step) override {
    if (dx_ != nullptr) transpose(b);
    update_block(b, step.update);
  }

  void backward(int64_t b) override {
    const int64_t OH = this->out.shape.H, OW = this->out.shape.W, W = padded_.W;
    const int64_t row = OW * kLanes<T>, slice = outputs_ * kLanes<T>;
    T* dx = dx_ + b * padded_.pixels() * kLanes<T>;
    std::fill_n(dx, padded_.pixels() * kLanes<T>, T(0));
    const T* w = transposed_.data() + b * o_.kernel_h * o_.kernel_w * slice;
    for (int64_t kw = 0; kw < o_.kernel_w; ++kw, w += o_.kernel_h * slice) {
      for (int64_t h = 0; h < padded_.H; ++h) {
        // Output rows h - kh that exist.
        const int64_t first = std::max<int64_t>(0, h - OH + 1);
        const int64_t last = std::min(o_.kernel_h, h + 1);
        const T* dy = this->out.grad + (h - first) * row;
        for_each_tile(OW, [&](auto rows, int64_t p) {
          input_gradient_tile<T, rows()>(dy + p * kLanes<T>, row, this->out.block(),
                                         w + first * slice, outputs_, last - first,
                                         dx + (h * W + kw + p) * kLanes<T>);
        });
      }
    }
    if (dx_ != this->in.grad) {
      const int64_t H = this->in.shape.H, width = this->in.shape.W * kLanes<T>;
      for (int64_t h = 0; h < H; ++h) {
        std::copy_n(dx + ((h + o_.padding_h) * W + o_.padding_w) * kLanes<T>, width,
                    this->in.grad + b * this->in.block() + h * width);
      }
    }
  }

 private:
  // Weights of a part: together with a block of the input they fit into 32 KiB.
  static constexpr int64_t kPartBytes = 10 * 1024;

  template <int kPixel>
  void forward_block(int64_t b) {
    const int64_t OH = this->out.shape.H, OW = this->out.shape.W;
    T* y = this->out.value + b * this->out.block();
    const T* bias = packed_bias_.data() + b * kLanes<T>;
    const T* w = packed_.data() + b * taps_ * kLanes<T>;
    int64_t first = 0;
    for (const int64_t last : parts_) {
      for (int64_t h = 0; h < OH; ++h) {
        for_each_tile(OW, [&](auto rows, int64_t p) {
          T* to = y + (h * OW + p) * kLanes<T>;
          forward_tile<T, kPixel, rows()>(x_ + (h * padded_.W + p) * kPixel, runs_.data() + first,
                                          last - first, w, first == 0 ? bias : to,
                                          first == 0 ? 0 : kLanes<T>, to);
        });
      }
      for (; first < last; ++first) w += runs_[first].length * kLanes<T>;
    }
  }

  void update_block(int64_t b, const Update<T>& update) {
    const int64_t OH = this->out.shape.H, OW = this->out.shape.W;
    const T* dy = this->out.grad + b * this->out.block();
    T* w = packed_.data() + b * taps_ * kLanes<T>;
    T* v = weight_.velocity ? packed_velocity_.data() + b * taps_ * kLanes<T> : nullptr;
    for (const Run& run : runs_) {
      for_each_tile(run.length, [&](auto rows, int64_t m) {
        weight_gradient_tile<T, rows()>(x_ + run.offset + m, lanes_, padded_.W * lanes_, dy, OH, OW,
                                        update, w + m * kLanes<T>, v ? v + m * kLanes<T> : nullptr);
      });
      w += run.length * kLanes<T>;
      v = v ? v + run.length * kLanes<T> : nullptr;
    }
    if (bias_.value == nullptr) return;
    T sum[kLanes<T>] = {};
    for (int64_t p = 0; p < OH * OW; ++p) {
      for (int64_t l = 0; l < kLanes<T>; ++l) sum[l] += dy[p * kLanes<T> + l];
    }
    update_row(update, packed_bias_.data() + b * kLanes<T>,
               bias_.velocity ? packed_bias_velocity_.data() + b * kLanes<T> : nullptr, sum,
               kLanes<T>);
  }

  // Block b's weights as the input gradient wants them.
  void transpose(int64_t b) {
    const int64_t taps = o_.kernel_h * o_.kernel_w;
    const int64_t outputs = std::min(kLanes<T>, outputs_ - b * kLanes<T>);
    const T* from = packed_.data() + b * taps_ * kLanes<T>;
    for (int64_t c = 0; c < padded_.C; c += kLanes<T>) {
      const int64_t length = std::min(kLanes<T>, padded_.C - c);
      T* block = transposed_.data() + (c / kLanes<T> * taps * outputs_ + b * kLanes<T>)*kLanes<T>;
      for (int64_t kh = 0; kh < o_.kernel_h; ++kh) {
        for (int64_t kw = 0; kw < o_.kernel_w; ++kw, from += length * kLanes<T>) {
          T* to = block + (kw * o_.kernel_h + kh) * outputs_ * kLanes<T>;
          if (length == kLanes<T> && outputs == kLanes<T>) {
            transpose_square(from, to);
            continue;
          }
          for (int64_t o = 0; o < outputs; ++o) {
            for (int64_t l = 0; l < length; ++l) to[o * kLanes<T> + l] = from[l * kLanes<T> + o];
          }
        }
      }
    }
  }

  Window o_;
  int64_t outputs_;
  Parameter<T> weight_, bias_;
  Shape padded_;
  int64_t lanes_, taps_;
  T *x_, *dx_;
  std::vector<Run> runs_;
  std::vector<int64_t> parts_;  // indices in runs_, one after the last of each part
  Buffer<T> packed_, packed_velocity_, transposed_, packed_bias_, packed_bias_velocity_;
  Buffer<T> padded_value_, padded_grad_;
};

}  // namespace mnist_ops::online
