// From a network to its program.
//
// What is fused, and so costs neither a level nor a pass over memory:
//   - forward: an activation, and an LP pooling (p = 2, disjoint windows of 2 x 2) behind it, into
//     the convolution before them; an activation into the fully connected layer before it;
//   - a subtractive normalization into the convolution or the flattened fully connected layer
//     behind it: each block blurs the one small plane for itself, and subtracts on reading;
//   - backward: normalization, pooling and activation into the tiled gradients of the convolution
//     before them, which go back through them as they take their operand, and into the weight
//     gradient of a first convolution; elsewhere into one phase. Fully connected layers make their
//     input's gradient and their update in one pass;
//   - the last fully connected layer, log-softmax, loss and their gradients into the backward of
//     the fully connected layer before: every block computes these few numbers for itself.
// A layer's update waits for the level after the one that reads the old weights.
#pragma once

#include "call.h"
#include "tiling.h"

namespace mnist_ops::online {

struct Program {
  std::vector<Phase> phases;        // of all levels, one after the other
  std::vector<int64_t> parameters;  // where each parameter lies; its velocity is behind all of them
  int64_t parameter_elements = 0;   // of all parameters, aligned
  int64_t workspace = 0;            // elements for one model, velocities not counted
  int64_t memory = 0;               // that a block needs, in numbers
  std::vector<BlurPlan> blurs;      // of the normalizations: their taps and coef come before a run
};

class Planner {
 public:
  // threads: of a block; memory: the numbers that a block can have in its own memory.
  Planner(const Call& call, int32_t threads, int64_t memory)
      : call_(call), spec_(call.spec), threads_(threads), tiling_(threads, memory) {
    for (std::size_t i = 0; i < call.parameters.size() / call.models; ++i) {
      program_.parameters.push_back(allocate(call.parameters[i].numel()));
    }
    program_.parameter_elements = program_.workspace;
  }

  Program plan() {
    value_ = {kImage, kNowhere, {}};
    const auto& layers = spec_.layers;
    for (std::size_t i = 0; i < layers.size(); i = next_) {
      next_ = i + 1;
      forward(i);
    }
    // Backward in the reverse order; what was recorded for each layer knows its buffers.
    for (std::size_t s = steps_.size(); s-- > 0;) backward(s);
    while (!ready_.empty()) end_level();
    program_.memory = tiling_.taken();
    return program_;
  }

 private:
  // A map's value and gradient, and the normalization that is still to be subtracted from it.
  struct Value {
    int64_t value, grad;
    BlurPlan blur;
  };

  // A layer, or several in one, with what its backward needs.
  struct Step {
    const LayerSpec* layer;
    Value in, out;
    ActivationKind activation = ActivationKind::kIdentity;
    const LayerSpec *pool = nullptr, *norm = nullptr, *flatten = nullptr;
    int64_t y = kNowhere, pooled = kNowhere, flat = kNowhere;
    BlurPlan backward_blur{};
  };

  int64_t allocate(int64_t size) {
    const int64_t offset = program_.workspace;
    program_.workspace += (size + 31) / 32 * 32;
    MNIST_OPS_CHECK(size < (int64_t{1} << 30), call_.op, ": the network is too large, ", size,
                    " numbers in one map or parameter");
    return offset;
  }

  int32_t warps() const { return threads_ / 32; }

  // Where a parameter lies, if there is one.
  int64_t offset_of(int64_t parameter) const {
    return parameter < 0 ? kNowhere : program_.parameters[parameter];
  }

  const LayerSpec* peek(std::size_t i) const {
    return i < spec_.layers.size() ? &spec_.layers[i] : nullptr;
  }

  // A phase of a layer: what follows from the layer alone, and a thread for each of its inputs.
  Phase phase_of(Op op, const LayerSpec& layer) const {
    const Window& w = layer.window;
    Phase p;
    p.op = op;
    p.C = narrow(layer.in.C), p.H = narrow(layer.in.H), p.W = narrow(layer.in.W);
    p.O = narrow(layer.out.C), p.OH = narrow(layer.out.H), p.OW = narrow(layer.out.W);
    p.kernel_h = narrow(w.kernel_h), p.kernel_w = narrow(w.kernel_w);
    p.stride_h = narrow(w.stride_h), p.stride_w = narrow(w.stride_w);
    p.padding_h = narrow(w.padding_h), p.padding_w = narrow(w.padding_w);
    p.count_padding = layer.count_padding, p.divisor = narrow(layer.divisor);
    p.activation = layer.activation, p.pool = layer.pool, p.log_softmax = layer.log_softmax;
    p.number = layer.number, p.first_uniform = layer.first_uniform;
    p.weight = offset_of(layer.weight), p.bias = offset_of(layer.bias);
    p.tasks = ceil_div(layer.in.numel(), threads_);
    return p;
  }

  // ------------------------------------------------------------------------------ emitting phases

  void emit(Phase phase) {
    phase.first_task = level_tasks_;
    level_tasks_ += phase.tasks;
    program_.phases.push_back(phase);
  }

  // Ends the level, with the updates that the levels before it made possible.
  void end_level() {
    for (const Phase& update : ready_) emit(update);
    if (level_tasks_ > 0) program_.phases.back().ends_level = ++levels_;
    level_tasks_ = 0;
    ready_ = pending_;
    pending_.clear();
  }

  void emit_level(const Phase& phase) {
    emit(phase);
    end_level();
  }

  // --------------------------------------------------------------------------------- normalization

  BlurPlan new_blur(const LayerSpec& layer) {
    BlurPlan b;
    b.C = narrow(layer.in.C), b.H = narrow(layer.in.H), b.W = narrow(layer.in.W);
    const Tensor& kernel = call_.kernels[layer.kernel];
    b.separable = kernel.dim() == 1;
    b.taps_h = narrow(kernel.size(0)), b.taps_w = narrow(kernel.size(kernel.dim() - 1));
    b.taps = allocate(kernel.numel());
    b.coef = allocate(layer.in.pixels());
    b.sum = allocate(layer.in.pixels());
    b.mean = allocate(layer.in.pixels());
    b.source = small_plane(layer) ? MeanSource::kMap : MeanSource::kReady;
    program_.blurs.push_back(b);
    return b;
  }

  static bool small_plane(const LayerSpec& layer) { return 2 * layer.in.pixels() <= 2048; }

  // The steps of a normalization whose plane no block can hold.
  void emit_mean(const BlurPlan& b, int64_t map) {
    if (b.source != MeanSource::kReady) return;
    Phase p;
    p.op = Op::kChannelSum;
    p.blur = b;
    p.x = map;
    p.tasks = ceil_div(int64_t{b.H} * b.W, warps());
    emit_level(p);
    p.op = Op::kMean;
    p.tasks = ceil_div(int64_t{b.H} * b.W, threads_);
    emit_level(p);
  }

  // Writes the map minus its blurred mean.
  void emit_subtract(const BlurPlan& b, const LayerSpec& layer, int64_t from, int64_t to) {
    emit_mean(b, from);
    Phase p = phase_of(Op::kSubtract, layer);
    p.x = from, p.y = to, p.blur = b;
    emit_level(p);
  }

  // The input of a layer that cannot subtract on reading.
  void materialise(const LayerSpec& layer) {
    if (value_.blur.source == MeanSource::kNone) return;
    const int64_t to = allocate(layer.in.numel());
    emit_subtract(value_.blur, layer, value_.value, to);
    value_.value = to;
    value_.blur = {};
  }

  // ---------------------------------------------------------------------------------- convolution

  void forward_convolution(std::size_t i) {
    const LayerSpec& layer = spec_.layers[i];
    Step s{&layer, value_, {}};
    Phase p = phase_of(Op::kConvolution, layer);
    p.x = value_.value;
    emit_mean(value_.blur, value_.value);
    p.blur = value_.blur;
    if (value_.blur.source != MeanSource::kNone) {
      // The update reads the normalized input many times.
      p.flat = allocate(layer.in.numel());
      s.in.value = p.flat;
    }
    s.activation = take_activation();
    s.pool = take_pool(layer.out);
    s.norm = take_norm();
    p.activation = s.activation;
    p.y = s.y = allocate(layer.out.numel());
    tiling_.share_convolution(p);
    s.out = {s.y, allocate(layer.out.numel()), {}};
    if (s.pool != nullptr) {
      p.fused_pool = 1;
      p.pooled = s.pooled = allocate(s.pool->out.numel());
      s.out = {s.pooled, allocate(s.pool->out.numel()), {}};
    }
    if (s.norm != nullptr) {
      s.out.blur = new_blur(*s.norm);
      s.backward_blur = adjoint_of(s.out.blur);
      // All channels of a pixel are in one block: their sum costs nothing more.
      if (!p.split && s.pool != nullptr && s.out.blur.source == MeanSource::kMap) {
        p.channel_sum = s.out.blur.sum;
        s.out.blur.source = MeanSource::kSum;
      }
    }
    emit_level(p);
    value_ = s.out;
    steps_.push_back(s);
  }

  BlurPlan adjoint_of(const BlurPlan& forward) {
    BlurPlan b = forward;
    b.adjoint = 1;
    b.source = forward.source == MeanSource::kReady ? MeanSource::kReady : MeanSource::kMap;
    b.sum = allocate(int64_t{b.H} * b.W);
    b.mean = allocate(int64_t{b.H} * b.W);
    return b;
  }

  ActivationKind take_activation() {
    const LayerSpec* layer = peek(next_);
    if (layer == nullptr || layer->kind != Kind::kActivation) return ActivationKind::kIdentity;
    ++next_;
    return layer->activation;
  }

  // An LP pooling with p = 2 whose windows are the tiles of 2 x 2.
  const LayerSpec* take_pool(const Shape& shape) {
    const LayerSpec* layer = peek(next_);
    if (layer == nullptr || layer->kind != Kind::kPool2d || layer->pool != PoolKind::kLp) {
      return nullptr;
    }
    const Window& w = layer->window;
    if (layer->number != 2.0 || shape.H % 2 != 0 || shape.W % 2 != 0 || w.kernel_h != 2 ||
        w.kernel_w != 2 || w.stride_h != 2 || w.stride_w != 2 || w.padding_h != 0 ||
        w.padding_w != 0) {
      return nullptr;
    }
    ++next_;
    return layer;
  }

  const LayerSpec* take_norm() {
    const LayerSpec* layer = peek(next_);
    if (layer == nullptr || layer->kind != Kind::kSubtractiveNorm2d || !small_plane(*layer)) {
      return nullptr;
    }
    ++next_;
    return layer;
  }

  void backward_convolution(std::size_t index) {
    const Step& s = steps_[index];
    const LayerSpec& layer = *s.layer;
    Phase update = phase_of(Op::kConvolutionUpdate, layer);
    update.x = s.in.value;
    update.tasks = update.O;
    update.dy = s.out.grad;
    const bool local =
        s.activation != ActivationKind::kIdentity || s.pool != nullptr || s.norm != nullptr;
    if (local) update.local = {1, s.pool != nullptr, s.activation, s.y, s.pooled, s.backward_blur};
    Phase gradient = update;
    gradient.op = Op::kConvolution;
    gradient.flip = 1;
    std::swap(gradient.C, gradient.O);
    std::swap(gradient.H, gradient.OH), std::swap(gradient.W, gradient.OW);
    gradient.padding_h = gradient.kernel_h - 1 - gradient.padding_h;
    gradient.padding_w = gradient.kernel_w - 1 - gradient.padding_w;
    gradient.bias = kNowhere;
    gradient.x = update.dy, gradient.y = s.in.grad;
    bool alone;  // without a phase that goes back through what is local
    if (layer.gradient) {
      alone = tiling_.tile_update(update) && tiling_.tile_convolution(gradient);
    } else {
      alone = tiling_.tile_update(update) || tiling_.tile_first_update(update);
    }
    if (local && !alone) {
      Phase back = phase_of(Op::kLocalBackward, layer);
      back.dy = s.out.grad;
      back.local = update.local;
      back.tasks = ceil_div(layer.out.numel(), threads_);
      back.dx = allocate(layer.out.numel());
      emit_level(back);
      update.dy = gradient.x = back.dx;
      update.local = gradient.local = {};
    }
    if (!layer.gradient) return emit_level(update);
    if (gradient.tile.group == 0) tiling_.share_convolution(gradient);
    if (gradient.tile.group != 0 && index > 0) leave_group_sums(steps_[index - 1], gradient);
    emit(gradient);
    pending_.push_back(update);
    end_level();
  }

  // The gradient's tasks leave what the normalization before the convolution needs of it.
  void leave_group_sums(Step& before, Phase& gradient) {
    BlurPlan& b = before.backward_blur;
    if (before.norm == nullptr || b.source != MeanSource::kMap) return;
    b.parts = ceil_div(gradient.O, gradient.tile.group);
    b.sum = gradient.tile.group_sum = allocate(int64_t{b.parts} * b.H * b.W);
    b.source = MeanSource::kSum;
  }

  // ------------------------------------------------------------------------- linear layers

  // Whether a vector of n numbers and the planes of a normalization fit into a block's own memory.
  static bool fits(int64_t n, int64_t pixels) { return n + 2 * pixels + 64 <= kScratch; }

  // Whether flatten is to be read by the linear layer behind it.
  bool fuses_flatten(const LayerSpec& layer) const {
    const LayerSpec* next = peek(next_);
    return next != nullptr && next->kind == Kind::kLinear &&
           fits(layer.in.numel(), layer.in.pixels());
  }

  Phase linear_phase(Op op, const Step& s) const {
    Phase p = phase_of(op, *s.layer);
    p.activation = s.activation;
    if (s.flatten != nullptr) {
      p.permute = 1;
      p.H = narrow(s.flatten->in.H), p.W = narrow(s.flatten->in.W);
    }
    return p;
  }

  void forward_linear(std::size_t i, const LayerSpec* flatten) {
    const LayerSpec& layer = spec_.layers[i];
    Step s{&layer, value_, {}};
    s.flatten = flatten;
    if (backward_fits(layer)) s.activation = take_activation();
    Phase p = linear_phase(Op::kLinear, s);
    p.x = s.flat = value_.value;
    if (flatten != nullptr) {
      p.blur = value_.blur;
      emit_mean(value_.blur, value_.value);
      p.flat = s.flat = allocate(layer.in.C);
    }
    p.y = s.y = allocate(layer.out.C);
    s.out = {s.y, allocate(layer.out.C), {}};
    // A block for an output where there are few of them and they are long.
    p.per_task = layer.in.C >= 512 && layer.out.C <= 512 ? 1 : warps();
    p.tasks = ceil_div(layer.out.C, p.per_task);
    emit_level(p);
    value_ = s.out;
    steps_.push_back(s);
  }

  // Whether the gradient of the outputs fits into a block's memory beside kLinearBackward's sums.
  static bool backward_fits(const LayerSpec& layer) { return fits(layer.out.C + 64 * kColumns, 0); }

  void backward_linear(const Step& s, bool last) {
    Phase p = linear_phase(Op::kLinearBackward, s);
    p.flat = s.flat, p.y = s.y, p.dy = s.out.grad;
    p.tasks = ceil_div(p.C, kColumns);
    p.staged = backward_fits(*s.layer);
    if (s.layer->gradient) p.dx = s.in.grad;
    if (last && head_ != nullptr) {
      Phase update = phase_of(Op::kLinearUpdate, *head_);
      update.flat = s.y, update.dy = head_plan_.grad;
      update.tasks = ceil_div(head_->in.C * head_->out.C, threads_);
      pending_.push_back(update);
      p.head = head_plan_;
    }
    emit_level(p);
  }

  // ---------------------------------------------------------------------- the other layers

  void forward(std::size_t i) {
    const LayerSpec& layer = spec_.layers[i];
    if (fuse_head(i)) return;
    if (layer.kind == Kind::kConv2d) return forward_convolution(i);
    if (layer.kind == Kind::kLinear) return forward_linear(i, nullptr);
    if (layer.kind == Kind::kFlatten && fuses_flatten(layer)) {
      return forward_linear(next_++, &layer);
    }
    materialise(layer);
    Step s{&layer, value_, {}};
    const int64_t grad = layer.gradient ? allocate(layer.out.numel()) : kNowhere;
    if (layer.kind == Kind::kSubtractiveNorm2d) {
      value_ = {value_.value, grad, new_blur(layer)};
      s.backward_blur = adjoint_of(value_.blur);
      if (value_.value == kImage) materialise(layer);
      s.out = value_;
    } else {
      value_ = s.out = {allocate(layer.out.numel()), grad, {}};
      Phase p = plain_phase(layer, false);
      p.x = s.in.value, p.y = s.out.value;
      emit_level(p);
    }
    steps_.push_back(s);
  }

  // A layer without parameters on its own.
  Phase plain_phase(const LayerSpec& layer, bool backward) const {
    Phase p = phase_of(Op::kPermute, layer);
    switch (layer.kind) {
      case Kind::kActivation:
        p.op = backward ? Op::kActivationBackward : Op::kActivation;
        break;
      case Kind::kDropout:
        p.op = Op::kDropout;
        p.number = 1.0 - layer.number;
        break;
      case Kind::kLogSoftmax:
        p.op = backward ? Op::kLogSoftmaxBackward : Op::kLogSoftmax;
        p.tasks = 1;
        break;
      case Kind::kPool2d:
        p.op = backward ? Op::kPoolBackward : Op::kPool;
        if (!backward) p.tasks = ceil_div(layer.out.numel(), threads_);
        break;
      default:
        p.flip = backward;
        break;
    }
    return p;
  }

  // -------------------------------------------------------------------------------------- the end

  // Linear, then perhaps an activation or a log-softmax, at the end of the network and behind
  // another linear layer: nothing is done forward.
  bool fuse_head(std::size_t i) {
    const LayerSpec& layer = spec_.layers[i];
    if (layer.kind != Kind::kLinear || steps_.empty()) return false;
    const Step& before = steps_.back();
    if (before.layer->kind != Kind::kLinear || layer.out.C > 256) return false;
    const int64_t vectors = layer.in.C * 3 + 4 * layer.out.C + 64 * kColumns;
    if (!fits(vectors, 0)) return false;
    const LayerSpec* last = peek(i + 1);
    if (last != nullptr && peek(i + 2) != nullptr) return false;
    HeadPlan h;
    if (last != nullptr) {
      if (last->kind != Kind::kActivation && last->kind != Kind::kLogSoftmax) return false;
      h.activation = last->activation;
      h.log_softmax = last->log_softmax;
      h.beta = last->number;
      next_ = i + 2;
    }
    h.classes = narrow(layer.out.C);
    h.weight = offset_of(layer.weight), h.bias = offset_of(layer.bias);
    h.grad = allocate(layer.out.C);
    h.staged = tiling_.take_memory(vectors + 64 + layer.in.C * layer.out.C);
    head_plan_ = h;
    head_ = &layer;
    return true;
  }

  void backward(std::size_t index) {
    const Step& s = steps_[index];
    const LayerSpec& layer = *s.layer;
    const bool last = index + 1 == steps_.size();
    if (last && head_ == nullptr) {
      Phase p = phase_of(Op::kLoss, layer);
      p.C = p.O;
      p.tasks = 1;
      p.x = s.out.value, p.dy = s.out.grad;
      emit_level(p);
    }
    if (layer.kind == Kind::kLinear) return backward_linear(s, last);
    if (layer.kind == Kind::kConv2d) return backward_convolution(index);
    if (!layer.gradient) return;
    if (layer.kind == Kind::kSubtractiveNorm2d) {
      return emit_subtract(s.backward_blur, layer, s.out.grad, s.in.grad);
    }
    Phase p = plain_phase(layer, true);
    p.x = s.in.value, p.y = s.out.value, p.dy = s.out.grad, p.dx = s.in.grad;
    if (p.op == Op::kDropout) p.x = s.out.grad, p.y = s.in.grad;
    emit_level(p);
  }

  const Call& call_;
  const NetworkSpec& spec_;
  int32_t threads_;
  Tiling tiling_;
  Program program_;
  Value value_{};
  std::vector<Step> steps_;
  std::size_t next_ = 0;
  int32_t levels_ = 0, level_tasks_ = 0;  // ended; tasks of the one that is being made
  std::vector<Phase> ready_, pending_;
  const LayerSpec* head_ = nullptr;  // that is fused
  HeadPlan head_plan_{};
};

}  // namespace mnist_ops::online
