// online_sgd_models: training with batch size 1 on CUDA, of one network or of several of one shape
// at once.
//
// A step is a program (../online/program.h) of a few levels, whose phases (online_phases.cuh) all
// threads of the device share: one cooperative kernel goes through samples and levels, and the
// blocks of a model wait for each other between levels. Blocks are shared out evenly among the
// models, and the models of a call run side by side. (A CUDA graph of a kernel for each level took
// 78 us a step of the original network on an H100, this kernel 65.)
//
// Bound by latency: a step of the original network has 70 MFLOP, a microsecond or two of the
// device's time, in six levels that depend on each other. What counts is their number, the wait
// between them (a barrier of about a microsecond), and the way from
// the second-level cache at the start of each.
//
// The host looks at order, labels and kernels, for which it waits once a call.

#include "../online/call.h"
#include "../online/planner.h"

#include "online_step.cuh"

namespace mnist_ops::cuda {
namespace {

constexpr const char* kOp = "online_sgd_models";
constexpr int64_t kPieceElements = int64_t{1} << 26;  // of images gathered at a time

// ------------------------------------------------------------------------------------ before a run

// Images in the order of use, cast, the channels innermost.
template <typename T, typename I>
__global__ void gather_samples(int64_t models, int64_t count, int64_t first, int64_t piece,
                               const int64_t* order, const I* images, int64_t C, int64_t pixels,
                               T* samples) {
  const int64_t size = C * pixels, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = begin; i < models * piece * size; i += step) {
    const int64_t sample = i / size, element = i % size;
    const int64_t model = sample / piece, at = sample % piece + first;
    const int64_t c = element % C, pixel = element / C;
    samples[i] = static_cast<T>(images[order[model * count + at] * size + c * pixels + pixel]);
  }
}

// Numbers that a tensor and the workspace have in common.
template <typename T>
struct Place {
  T* tensor;
  T* workspace;
  int64_t size;
};

// Copies them to the workspace, or back, a block the numbers of one place at a time.
template <typename T>
__global__ void move_numbers(int64_t places, const Place<T>* table, bool back) {
  for (int64_t i = blockIdx.x; i < places; i += gridDim.x) {
    const Place<T> place = table[i];
    T* to = back ? place.tensor : place.workspace;
    const T* from = back ? place.workspace : place.tensor;
    for (int64_t j = threadIdx.x; j < place.size; j += blockDim.x) to[j] = from[j];
  }
}

// The blur of a plane of ones, for each model: a block for a model, one after the other.
template <typename T>
__global__ void fill_coefficients(int64_t models, BlurPlan blur, T* workspace,
                                  int64_t model_stride) {
  for (int64_t model = blockIdx.x; model < models; model += gridDim.x) {
    T* base = workspace + model * model_stride;
    T* ones = base + blur.sum;  // its own use comes later
    for (int32_t i = thread_index(); i < blur.H * blur.W; i += thread_count()) ones[i] = T(1);
    __syncthreads();
    for (int32_t i = thread_index(); i < blur.H * blur.W; i += thread_count()) {
      base[blur.coef + i] = blur_at(blur, ones, base + blur.taps, i / blur.W, i % blur.W);
    }
  }
}

// ------------------------------------------------------------------------------------ the operator

// A tensor of the device with a copy of the host's values.
template <typename V>
Tensor to_device(const std::vector<V>& values, const Tensor& like) {
  const auto bytes = static_cast<int64_t>(values.size() * sizeof(V));
  const int64_t stride = 1;
  const Tensor here = torch::stable::from_blob(
      const_cast<void*>(static_cast<const void*>(values.data())), {&bytes, 1}, {&stride, 1},
      torch::stable::Device(torch::headeronly::DeviceType::CPU, 0), ScalarType::Byte);
  Tensor there = new_tensor(like, {bytes}, ScalarType::Byte);
  torch::stable::copy_(there, here);
  return there;
}
template <typename V>
V* data_of(const Tensor& tensor) {
  return static_cast<V*>(tensor.data_ptr());
}

int64_t blocks_for(int64_t items) {
  return std::max<int64_t>(1, std::min<int64_t>(ceil_div(items, block_threads()), 4096));
}

template <typename T>
class Engine {
 public:
  Engine(const Call& call, const Program& program, const double* settings, bool nesterov,
         Tensor& losses, Tensor& predictions)
      : call_(call), program_(program), stream_(losses), losses_(losses) {
    const bool momentum = !call.velocities.empty();
    run_.velocity_shift = momentum ? program.workspace : 0;
    run_.model_stride = program.workspace + (momentum ? program.parameter_elements : 0);
    workspace_ = new_tensor(losses, {call.models * run_.model_stride});
    run_.workspace = data_of<T>(workspace_);
    run_.image_size = call.spec.input.numel();
    targets_ = to_device(call.targets, losses);
    run_.targets = data_of<int64_t>(targets_);
    run_.uniform = data_of<double>(call.uniform);
    run_.count = call.count;
    run_.uniforms = call.spec.uniforms;
    settings_ = to_device(std::vector(settings, settings + call.models * kSettings), losses);
    run_.settings = data_of<double>(settings_);
    run_.losses = data_of<T>(losses);
    run_.predictions = data_of<int64_t>(predictions);
    run_.models = static_cast<int32_t>(call.models);
    run_.loss = static_cast<Loss>(call.loss);
    run_.nesterov = nesterov;
  }

  void run() {
    std::vector<Place<T>> places;
    place_parameters(call_.parameters, 0, places);
    place_parameters(call_.velocities, run_.velocity_shift, places);
    const auto trained = static_cast<int64_t>(places.size());
    const Tensor taps = to_device(normalized_kernels(), losses_);
    place_kernels(data_of<T>(taps), places);
    const Tensor table = to_device(places, losses_);
    move(table, static_cast<int64_t>(places.size()), false);
    for (const BlurPlan& blur : program_.blurs) {
      launch(fill_coefficients<T>, call_.models, call_.models, blur, run_.workspace,
             run_.model_stride);
    }
    int64_t piece = kPieceElements / std::max<int64_t>(1, call_.models * run_.image_size);
    piece = std::max<int64_t>(1, std::min(piece, run_.count));
    const Tensor samples = new_tensor(losses_, {call_.models * piece * run_.image_size});
    run_.samples = data_of<T>(samples);
    const Tensor phases = to_device(program_.phases, losses_);
    for (run_.first = 0; run_.first < run_.count; run_.first += piece) {
      run_.piece = std::min(piece, run_.count - run_.first);
      dispatch_computed(call_.images,
                        [&](auto pixel) { gather<decltype(pixel)>(data_of<T>(samples)); });
      run_piece(data_of<const Phase>(phases));
    }
    move(table, trained, true);
  }

 private:
  template <typename Kernel, typename... Arguments>
  void launch(Kernel* kernel, int64_t blocks, const Arguments&... arguments) const {
    stream_.launch(kernel, blocks, dim3(static_cast<unsigned>(block_threads())), 0, arguments...);
  }

  int64_t shared_bytes() const { return program_.memory * static_cast<int64_t>(sizeof(T)); }

  T* workspace_of(std::size_t model) const {
    return run_.workspace + static_cast<int64_t>(model) * run_.model_stride;
  }

  void place_parameters(const std::vector<Tensor>& tensors, int64_t shift,
                        std::vector<Place<T>>& places) const {
    const std::size_t own = program_.parameters.size();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      places.push_back({data_of<T>(tensors[i]),
                        workspace_of(i / own) + program_.parameters[i % own] + shift,
                        tensors[i].numel()});
    }
  }

  // All models' kernels, each divided by its sum.
  std::vector<T> normalized_kernels() const {
    std::vector<T> taps;
    for (const Tensor& kernel : call_.kernels) {
      const double* values = kernel.const_data_ptr<double>();
      const double sum = kernel_sum(kOp, kernel);
      for (int64_t i = 0; i < kernel.numel(); ++i) taps.push_back(static_cast<T>(values[i] / sum));
    }
    return taps;
  }

  void place_kernels(T* taps, std::vector<Place<T>>& places) const {
    const std::size_t own = program_.blurs.size();
    for (std::size_t i = 0; i < call_.kernels.size(); ++i) {
      const int64_t size = call_.kernels[i].numel();
      places.push_back({taps, workspace_of(i / own) + program_.blurs[i % own].taps, size});
      taps += size;
    }
  }

  void move(const Tensor& table, int64_t places, bool back) const {
    launch(move_numbers<T>, std::min<int64_t>(places, 4096), places, data_of<const Place<T>>(table),
           back);
  }

  template <typename I>
  void gather(T* samples) const {
    const Shape& shape = call_.spec.input;
    launch(gather_samples<T, I>, blocks_for(call_.models * run_.piece * run_.image_size),
           call_.models, run_.count, run_.first, run_.piece, data_of<const int64_t>(call_.order),
           data_of<const I>(call_.images), shape.C, shape.pixels(), samples);
  }

  void run_piece(const Phase* program) {
    // Barriers of different models in different lines of the cache.
    const Tensor barriers =
        torch::stable::new_zeros(losses_, {call_.models * kBarrierStride}, ScalarType::Int);
    const int64_t resident =
        stream_.resident_together(run_phases_kernel<T>(), block_threads(), shared_bytes());
    MNIST_OPS_CHECK(resident > 0, kOp, ": needs a device with cooperative launches");
    const int64_t together = std::min(call_.models, resident);
    // No more for one model than there are multiprocessors: they would only wait for each other.
    run_.blocks =
        static_cast<int32_t>(std::min<int64_t>(resident / together, multiprocessor_count()));
    for (int64_t first = 0; first < call_.models; first += together) {
      const int64_t models = std::min(together, call_.models - first);
      stream_.launch_together(run_phases_kernel<T>(), models * run_.blocks, block_threads(),
                              shared_bytes(), program, static_cast<int32_t>(program_.phases.size()),
                              run_, first, run_.piece, data_of<unsigned>(barriers));
    }
  }

  const Call& call_;
  const Program& program_;
  CurrentStream stream_;
  Tensor losses_, workspace_, settings_, targets_;
  Run<T> run_{};
};

std::tuple<Tensor, Tensor> online_sgd_models(std::vector<Tensor> parameters,
                                             std::vector<Tensor> velocities, std::string network,
                                             std::vector<Tensor> kernels, Tensor images,
                                             Tensor labels, Tensor order, Tensor uniform,
                                             int64_t loss, Tensor settings, bool nesterov) {
  MNIST_OPS_CHECK(order.dim() == 2 && order.scalar_type() == ScalarType::Long && order.size(0) > 0,
                  kOp, ": order must be int64 (models, M), got ",
                  torch::headeronly::toString(order.scalar_type()), " ", shape_string(order));
  const int64_t models = order.size(0);
  MNIST_OPS_CHECK(
      settings.dim() == 2 && settings.size(0) == models && settings.size(1) == kSettings &&
          settings.scalar_type() == ScalarType::Double && settings.is_cpu(),
      kOp, ": settings must be float64 (", models, ", ", int{kSettings}, ") on the CPU, got ",
      torch::headeronly::toString(settings.scalar_type()), " ", shape_string(settings));
  const Tensor numbers = contiguous_of(settings);
  const double* setting = numbers.const_data_ptr<double>();
  bool momentum = false;
  for (int64_t i = 0; i < settings.numel(); ++i) {
    MNIST_OPS_CHECK(std::isfinite(setting[i]), kOp, ": settings must be finite, got ", setting[i]);
    momentum = momentum || (i % kSettings == kMomentum && setting[i] != 0);
  }
  Call call{kOp, models, parameters, velocities, kernels, images, labels, order, uniform, loss};
  call.prepare(network, momentum);
  const CurrentStream stream(parameters[0]);  // and device
  Tensor losses = new_tensor(parameters[0], {models, call.count});
  Tensor predictions = new_tensor(order, {models, call.count});
  dispatch_computed(parameters[0], [&](auto element) {
    using T = decltype(element);
    const int64_t memory = free_shared_memory(run_phases_kernel<T>()) / int64_t{sizeof(T)};
    const Program program = Planner(call, block_threads(), memory).plan();
    if (call.count == 0) return;
    Engine<T>(call, program, setting, nesterov, losses, predictions).run();
  });
  call.finish(parameters, velocities);
  return {losses, predictions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  m.impl("online_sgd_models", TORCH_BOX(&online_sgd_models));
}

}  // namespace mnist_ops::cuda
