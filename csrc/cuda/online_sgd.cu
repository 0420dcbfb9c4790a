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
// Nothing is read or changed before order, labels and kernels were looked at on the device, for
// which the host waits once a call.

#include "../online/planner.h"

#include "online_step.cuh"

namespace mnist_ops::cuda {
namespace {

constexpr const char* kOp = "online_sgd_models";
constexpr int64_t kPieceElements = int64_t{1} << 26;  // of images gathered at a time

// ------------------------------------------------------------------------------------ before a run

// What is wrong with a call: where, and the value found there.
enum Finding { kOrderAt, kOrderValue, kLabelAt, kLabelValue, kKernelAt, kKernelSum, kFindings };

// The first sample of the order that does not exist, and the first label that is no class. One
// block; threads look at every thread_count()-th entry, then the earliest of all is kept.
__global__ void __launch_bounds__(1024)
    check_samples(int64_t entries, const int64_t* order, int64_t images, const int64_t* labels,
                  int64_t classes, double* findings) {
  __shared__ int64_t first[1024];
  for (const bool look_at_labels : {false, true}) {
    int64_t found = entries;
    for (int64_t i = threadIdx.x; i < entries && found == entries; i += blockDim.x) {
      const int64_t image = order[i];
      const bool exists = image >= 0 && image < images;
      if (!look_at_labels) {
        if (!exists) found = i;
      } else if (exists && (labels[image] < 0 || labels[image] >= classes)) {
        found = i;
      }
    }
    first[threadIdx.x] = found;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (unsigned t = 0; t < blockDim.x; ++t) found = first[t] < found ? first[t] : found;
      const bool none = found == entries;
      if (look_at_labels) {
        findings[kLabelAt] = none ? -1.0 : static_cast<double>(order[found]);
        findings[kLabelValue] = none ? 0.0 : static_cast<double>(labels[order[found]]);
      } else {
        findings[kOrderAt] = none ? -1.0 : static_cast<double>(found);
        findings[kOrderValue] = none ? 0.0 : static_cast<double>(order[found]);
      }
    }
    __syncthreads();
  }
}

// Images in the order of use, cast, the channels innermost; targets of all models the same way.
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

__global__ void gather_targets(int64_t entries, const int64_t* order, const int64_t* labels,
                               int64_t* targets) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = begin; i < entries; i += step) targets[i] = labels[order[i]];
}

// Parameters and velocities of all models to the workspace, or back: tables holds for each model
// and parameter where the values are, where the velocities are (or 0), the offset in the workspace
// and the size. A block takes one parameter of one model at a time.
template <typename T>
__global__ void move_parameters(int64_t models, int64_t parameters, const int64_t* tables,
                                T* workspace, int64_t model_stride, int64_t velocity_shift,
                                bool back) {
  for (int64_t i = blockIdx.x; i < models * parameters; i += gridDim.x) {
    const int64_t* table = tables + 4 * i;
    T* at = workspace + i / parameters * model_stride + table[2];
    for (int velocity = 0; velocity < (velocity_shift == 0 ? 1 : 2); ++velocity) {
      T* tensor = reinterpret_cast<T*>(table[velocity]);
      T* inside = at + velocity * velocity_shift;
      for (int64_t j = threadIdx.x; j < table[3]; j += blockDim.x) {
        if (back) {
          tensor[j] = inside[j];
        } else {
          inside[j] = tensor[j];
        }
      }
    }
  }
}

// A normalization's kernel divided by its sum, and the blur of a plane of ones, for each model: a
// block for a model, one after the other. A kernel whose sum is 0 or not finite is reported.
template <typename T>
__global__ void prepare_kernel(int64_t models, const int64_t* kernels, int64_t which, BlurPlan blur,
                               T* workspace, int64_t model_stride, double* findings) {
  const int32_t count = blur.separable ? blur.taps_w : blur.taps_h * blur.taps_w;
  for (int64_t model = blockIdx.x; model < models; model += gridDim.x) {
    const double* values = reinterpret_cast<const double*>(kernels[model]);
    T* base = workspace + model * model_stride;
    double sum = 0;
    for (int32_t i = 0; i < count; ++i) sum += values[i];  // every thread, in the CPU's order
    if (threadIdx.x == 0) {
      const bool fine = sum != 0 && sum - sum == 0;
      if (!fine) findings[kKernelAt] = static_cast<double>(which), findings[kKernelSum] = sum;
    }
    T* taps = base + blur.taps;
    T* coef = base + blur.coef;
    T* ones = base + blur.sum;  // its own use comes later
    for (int32_t i = thread_index(); i < count; i += thread_count()) {
      taps[i] = static_cast<T>(values[i] / sum);
    }
    for (int32_t i = thread_index(); i < blur.H * blur.W; i += thread_count()) ones[i] = T(1);
    __syncthreads();
    for (int32_t i = thread_index(); i < blur.H * blur.W; i += thread_count()) {
      coef[i] = blur_at(blur, ones, taps, i / blur.W, i % blur.W);
    }
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------ the operator

// A tensor on the device with a copy of numbers of the host.
template <typename V>
Tensor to_device(const std::vector<V>& values, ScalarType dtype, const Tensor& like) {
  const int64_t size = static_cast<int64_t>(values.size()), stride = 1;
  const Tensor here = torch::stable::from_blob(
      const_cast<void*>(static_cast<const void*>(values.data())), {&size, 1}, {&stride, 1},
      torch::stable::Device(torch::headeronly::DeviceType::CPU, 0), dtype);
  Tensor there = new_tensor(like, {size}, dtype);
  torch::stable::copy_(there, here);
  return there;
}

struct Call {
  const std::vector<Tensor>& parameters;
  const std::vector<Tensor>& velocities;
  const std::vector<Tensor>& kernels;  // float64
  const NetworkSpec& spec;
  const Tensor &images, &labels, &order, &uniform, &settings;
  Loss loss;
  bool nesterov;
  int64_t models;
};

template <typename T>
class Engine {
 public:
  Engine(const Call& call, const Program& program, Tensor& losses, Tensor& predictions)
      : call_(call), program_(program), stream_(losses), losses_(losses) {
    const int64_t models = call.models;
    const bool momentum = !call.velocities.empty();
    run_.velocity_shift = momentum ? program.workspace : 0;
    run_.model_stride = program.workspace + (momentum ? program.parameter_elements : 0);
    workspace_ = new_tensor(losses, {models * run_.model_stride});
    run_.workspace = workspace_.template mutable_data_ptr<T>();
    run_.image_size = call.spec.input.numel();
    run_.uniform = call.uniform.template const_data_ptr<double>();
    run_.count = call.order.size(1);
    run_.uniforms = call.spec.uniforms;
    settings_ = new_tensor(losses, {models, int64_t{kSettings}}, ScalarType::Double);
    torch::stable::copy_(settings_, call.settings);
    run_.settings = settings_.template const_data_ptr<double>();
    run_.losses = losses.mutable_data_ptr<T>();
    run_.predictions = predictions.mutable_data_ptr<int64_t>();
    run_.models = static_cast<int32_t>(models);
    run_.loss = call.loss;
    run_.nesterov = call.nesterov;
  }

  void run() {
    prepare_kernels_and_check();
    move(false);
    targets_ = new_tensor(call_.order, {call_.models, run_.count});
    const int64_t entries = call_.order.numel();
    launch(gather_targets, blocks_for(entries), entries,
           call_.order.template const_data_ptr<int64_t>(),
           call_.labels.template const_data_ptr<int64_t>(),
           targets_.template mutable_data_ptr<int64_t>());
    run_.targets = targets_.template const_data_ptr<int64_t>();
    int64_t piece = kPieceElements / std::max<int64_t>(1, call_.models * run_.image_size);
    piece = std::max<int64_t>(1, std::min(piece, run_.count));
    Tensor samples = new_tensor(losses_, {call_.models * piece * run_.image_size});
    run_.samples = samples.template const_data_ptr<T>();
    upload_program();
    for (run_.first = 0; run_.first < run_.count; run_.first += piece) {
      run_.piece = std::min(piece, run_.count - run_.first);
      gather(samples);
      run_piece();
    }
    move(true);
  }

 private:
  int64_t blocks_for(int64_t items) const {
    return std::max<int64_t>(1, std::min<int64_t>(ceil_div(items, block_threads()), 4096));
  }

  template <typename Kernel, typename... Arguments>
  void launch(Kernel* kernel, int64_t blocks, const Arguments&... arguments) const {
    stream_.launch(kernel, blocks, dim3(static_cast<unsigned>(block_threads())), 0, arguments...);
  }

  int64_t shared_bytes() const { return program_.memory * static_cast<int64_t>(sizeof(T)); }

  void prepare_kernels_and_check() {
    const int64_t models = call_.models;
    Tensor findings = torch::stable::new_zeros(losses_, {int64_t{kFindings}}, ScalarType::Double);
    double* found = findings.template mutable_data_ptr<double>();
    std::vector<double> nothing(kFindings, -1.0);
    torch::stable::copy_(findings, to_device(nothing, ScalarType::Double, losses_));
    const int64_t per_model = static_cast<int64_t>(call_.kernels.size()) / models;
    std::vector<Tensor> tables;
    for (const auto& kernel : program_.kernels) {
      std::vector<int64_t> pointers;
      for (int64_t m = 0; m < models; ++m) {
        pointers.push_back(reinterpret_cast<int64_t>(
            call_.kernels[m * per_model + kernel.index].template const_data_ptr<double>()));
      }
      tables.push_back(to_device(pointers, ScalarType::Long, losses_));
      launch(prepare_kernel<T>, models, models, tables.back().template const_data_ptr<int64_t>(),
             kernel.index, kernel.blur, run_.workspace, run_.model_stride, found);
    }
    launch(check_samples, 1, call_.order.numel(), call_.order.template const_data_ptr<int64_t>(),
           call_.images.size(0), call_.labels.template const_data_ptr<int64_t>(),
           call_.spec.output.C, found);
    const Tensor here =
        torch::stable::to(findings, torch::stable::Device(torch::headeronly::DeviceType::CPU, 0));
    const double* f = here.template const_data_ptr<double>();
    const auto integer = [&](Finding i) { return static_cast<int64_t>(f[i]); };
    MNIST_OPS_CHECK(integer(kOrderAt) < 0, kOp, ": order must be in [0, ", call_.images.size(0),
                    "), got ", integer(kOrderValue), " at position ",
                    integer(kOrderAt) % std::max<int64_t>(1, run_.count));
    MNIST_OPS_CHECK(integer(kLabelAt) < 0, kOp, ": labels must be in [0, ", call_.spec.output.C,
                    "), got ", integer(kLabelValue), " at position ", integer(kLabelAt));
    MNIST_OPS_CHECK(integer(kKernelAt) < 0, kOp,
                    ": the kernel's sum must be finite and not 0, got ", f[kKernelSum]);
  }

  void move(bool back) {
    if (!back) {
      const int64_t count = static_cast<int64_t>(program_.parameters.size());
      std::vector<int64_t> table;
      for (std::size_t i = 0; i < call_.parameters.size(); ++i) {
        const auto pointer = [&](const std::vector<Tensor>& tensors) {
          return tensors.empty() ? int64_t{0} : reinterpret_cast<int64_t>(tensors[i].data_ptr());
        };
        table.insert(table.end(), {pointer(call_.parameters), pointer(call_.velocities),
                                   program_.parameters[i % count], call_.parameters[i].numel()});
      }
      table_ = to_device(table, ScalarType::Long, losses_);
    }
    const int64_t all = static_cast<int64_t>(call_.parameters.size());
    launch(move_parameters<T>, std::min<int64_t>(all, 4096), call_.models, all / call_.models,
           table_.template const_data_ptr<int64_t>(), run_.workspace, run_.model_stride,
           run_.velocity_shift, back);
  }

  void gather(Tensor& samples) {
    const Shape& shape = call_.spec.input;
    const int64_t items = call_.models * run_.piece * run_.image_size;
    const auto run = [&](auto kernel, const auto* images) {
      launch(kernel, blocks_for(items), call_.models, run_.count, run_.first, run_.piece,
             call_.order.template const_data_ptr<int64_t>(), images, shape.C, shape.pixels(),
             samples.template mutable_data_ptr<T>());
    };
    if (call_.images.scalar_type() == ScalarType::Double) {
      run(&gather_samples<T, double>, call_.images.template const_data_ptr<double>());
    } else {
      run(&gather_samples<T, float>, call_.images.template const_data_ptr<float>());
    }
  }

  void upload_program() {
    const std::vector<Phase>& phases = program_.phases;
    std::vector<double> words(phases.size() * sizeof(Phase) / sizeof(double));
    std::memcpy(words.data(), phases.data(), phases.size() * sizeof(Phase));
    phases_ = to_device(words, ScalarType::Double, losses_);
  }
  const Phase* program_on_device() const { return static_cast<const Phase*>(phases_.data_ptr()); }

  void run_piece() {
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
                              shared_bytes(), program_on_device(),
                              static_cast<int32_t>(program_.phases.size()), run_, first, run_.piece,
                              static_cast<unsigned*>(barriers.data_ptr()));
    }
  }

  const Call& call_;
  const Program& program_;
  CurrentStream stream_;
  Tensor losses_, workspace_, settings_, targets_, table_, phases_;
  Run<T> run_{};
};

void check_tensors(const std::vector<Tensor>& tensors, const char* name, const Tensor& like) {
  for (const Tensor& tensor : tensors) {
    MNIST_OPS_CHECK(tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device(),
                    kOp, ": ", name,
                    " must all have the dtype and the device of the first parameter");
  }
}

std::tuple<Tensor, Tensor> online_sgd_models(std::vector<Tensor> parameters,
                                             std::vector<Tensor> velocities, std::string network,
                                             std::vector<Tensor> kernels, Tensor images,
                                             Tensor labels, Tensor order, Tensor uniform,
                                             int64_t loss, Tensor settings, bool nesterov) {
  check_online_arguments(kOp, parameters, images, labels, loss);
  MNIST_OPS_CHECK(order.dim() == 2 && order.scalar_type() == ScalarType::Long && order.size(0) > 0,
                  kOp, ": order must be int64 (models, M), got ",
                  torch::headeronly::toString(order.scalar_type()), " ", shape_string(order));
  const int64_t models = order.size(0);
  MNIST_OPS_CHECK(
      settings.dim() == 2 && settings.size(0) == models && settings.size(1) == kSettings &&
          settings.scalar_type() == ScalarType::Double && settings.is_cpu(),
      kOp, ": settings must be float64 (", models, ", ", int{kSettings}, ") on the CPU, got ",
      torch::headeronly::toString(settings.scalar_type()), " ", shape_string(settings));
  const Tensor numbers_of_models = contiguous_of(settings);
  const double* setting = numbers_of_models.const_data_ptr<double>();
  bool momentum = false;
  for (int64_t i = 0; i < settings.numel(); ++i) {
    MNIST_OPS_CHECK(std::isfinite(setting[i]), kOp, ": settings must be finite, got ", setting[i]);
    momentum = momentum || (i % kSettings == kMomentum && setting[i] != 0);
  }
  MNIST_OPS_CHECK(momentum == !velocities.empty(), kOp,
                  ": velocities go with a momentum, and only with one");
  const auto divides = [&](const std::vector<Tensor>& tensors) {
    return static_cast<int64_t>(tensors.size()) % models == 0;
  };
  MNIST_OPS_CHECK(divides(parameters) && divides(kernels) &&
                      (velocities.empty() || velocities.size() == parameters.size()),
                  kOp, ": expected the parameters, velocities and kernels of ", models,
                  " models, got ", parameters.size(), ", ", velocities.size(), " and ",
                  kernels.size());
  check_tensors(parameters, "parameters", parameters[0]);
  check_tensors(velocities, "velocities", parameters[0]);
  for (const Tensor* tensor : {&images, &labels, &order, &uniform}) {
    MNIST_OPS_CHECK(tensor->device() == parameters[0].device(), kOp,
                    ": images, labels, order and uniform must be on the parameters' device");
  }

  const auto part = [&](const std::vector<Tensor>& tensors) {
    return std::vector<Tensor>(tensors.begin(), tensors.begin() + tensors.size() / models);
  };
  const std::vector<Tensor> own = part(parameters), own_kernels = part(kernels);
  const NetworkSpec spec = NetworkReader(kOp, own, own_kernels).read(network, sample_shape(images));
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const Tensor& first = own[i % own.size()];
    MNIST_OPS_CHECK(same_shape(parameters[i], first) &&
                        (velocities.empty() || same_shape(velocities[i], first)),
                    kOp, ": all models must have parameters of the same shapes, and velocities ",
                    "those of their parameters; got ", shape_string(parameters[i]), " and ",
                    shape_string(first));
  }
  MNIST_OPS_CHECK(uniform.scalar_type() == ScalarType::Double &&
                      uniform.numel() == order.numel() * spec.uniforms,
                  kOp, ": dropout needs ", order.numel() * spec.uniforms, " float64 numbers, got ",
                  uniform.numel());

  // Dense copies of what is not dense; the parameters' go back at the end.
  const std::vector<Tensor> values = dense_to_write(parameters);
  const std::vector<Tensor> speeds = dense_to_write(velocities);
  std::vector<Tensor> wide_kernels;
  std::vector<std::array<int64_t, 3>> taps;
  for (std::size_t i = 0; i < kernels.size(); ++i) {
    const Tensor& first = own_kernels[i % own_kernels.size()];
    MNIST_OPS_CHECK(same_shape(kernels[i], first), kOp,
                    ": all models must have kernels of the same shapes, got ",
                    shape_string(kernels[i]), " and ", shape_string(first));
    check_norm_kernel(kOp, kernels[i], parameters[0]);
    wide_kernels.push_back(kernel_in_double(kernels[i]));
    taps.push_back({first.size(0), first.size(first.dim() - 1), first.dim() == 1});
  }
  std::vector<int64_t> sizes;
  for (const Tensor& tensor : own) sizes.push_back(tensor.numel());
  const CurrentStream stream(parameters[0]);  // and device
  Tensor losses = new_tensor(parameters[0], {models, order.size(1)});
  Tensor predictions = new_tensor(order, {models, order.size(1)});
  const Tensor pictures = contiguous_of(images), classes = contiguous_of(labels);
  const Tensor sequence = contiguous_of(order), numbers = contiguous_of(uniform);
  const Call call{values,
                  speeds,
                  wide_kernels,
                  spec,
                  pictures,
                  classes,
                  sequence,
                  numbers,
                  numbers_of_models,
                  static_cast<Loss>(loss),
                  nesterov,
                  models};
  dispatch_computed(parameters[0], [&](auto element) {
    using T = decltype(element);
    const int64_t memory = free_shared_memory(run_phases_kernel<T>()) / int64_t{sizeof(T)};
    const Program program = Planner(kOp, spec, sizes, taps, block_threads(), memory).plan();
    if (order.size(1) > 0) Engine<T>(call, program, losses, predictions).run();
  });
  copy_back(parameters, values);
  copy_back(velocities, speeds);
  return {losses, predictions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ops, CUDA, m) {
  m.impl("online_sgd_models", TORCH_BOX(&online_sgd_models));
}

}  // namespace mnist_ops::cuda
