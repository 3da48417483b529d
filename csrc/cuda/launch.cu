// Host code that turns a plan into launches, and the two small kernels beside the persistent ones.
#include <algorithm>

#include "engine_table.h"
#include "epilogues.cuh"
#include "launch.h"
#include "launch_engine.cuh"

namespace rnn_cuda {
namespace cuda {
namespace {

constexpr int kThreads = 256;  // of the small kernels

// ---- norms --------------------------------------------------------------------------------------

struct NormParameters {
  const double* parts;  // [count][rows], sums of squares
  double* norms;        // [rows]
  int64_t rows;
  int count;
};

// Adds up in a fixed order, whatever order the blocks ran in.
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormParameters p) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  double sum = 0;
  for (int part = 0; part < p.count; ++part) sum += p.parts[part * p.rows + row];
  p.norms[row] = sqrt(sum);
}

// ---- one step of Residency::Streamed ------------------------------------------------------------

struct StepParameters {
  Recurrence recurrence;
  Step step;
  const void* z;
  double* norms;
};

// How a data type is computed with.
template <class T>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};

template <class T>
__device__ __forceinline__ const T* row_at(const Rows& rows, bool packed, const Step& step,
                                           int64_t sample) {
  const T* data = static_cast<const T*>(rows.data);
  return packed ? data + (step.row + sample) * rows.batch_stride
                : data + step.t * rows.time_stride + sample * rows.batch_stride;
}

// Squares of a float64 z may over- or underflow where z does not: it is scaled by the largest.
__device__ __forceinline__ double largest_in_warp(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const double other = device::shuffle_xor(x, distance);
    x = other > x || other != other ? other : x;
  }
  return x;
}
__device__ __forceinline__ double sum_in_warp(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += device::shuffle_xor(x, distance);
  return x;
}

// A warp for each sample.
template <class T>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ StepParameters p) {
  using C = typename ComputeOf<T>::Type;
  const Recurrence& r = p.recurrence;
  const int lane = threadIdx.x % 32;
  const int64_t sample = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (sample >= p.step.rows) return;
  const bool packed = r.batch_sizes != nullptr;
  const int64_t H = r.hidden_size;
  const C* z_row = p.z == nullptr ? nullptr : static_cast<const C*>(p.z) + sample * H;

  const auto z_of = [&](int64_t unit) {
    C z = z_row == nullptr ? C(0) : z_row[unit];
    if (r.addend.data != nullptr)
      z += r.wide_addend ? row_at<C>(r.addend, packed, p.step, sample)[unit]
                         : device::to_float(row_at<T>(r.addend, packed, p.step, sample)[unit]);
    if (r.bias != nullptr) z += static_cast<const C*>(r.bias)[unit];
    if (r.first_addend != nullptr && sample >= p.step.begun)
      z += device::to_float(static_cast<const T*>(r.first_addend)[sample * H + unit]);
    return z;
  };

  double largest = 0;
  for (int64_t unit = lane; unit < H; unit += 32) {
    const C z = z_of(unit);
    if (p.norms != nullptr) {
      const double size = fabs(double(z));
      largest = size > largest || size != size ? size : largest;
    }
    C e = 0;
    if (r.operand.data != nullptr)
      e = device::to_float(row_at<T>(r.operand, packed, p.step, sample)[unit]);
    const T s = device::from_float<T>(apply_epilogue<C>(r.epilogue, z, e));
    static_cast<T*>(r.output)[(p.step.row + sample) * H + unit] = s;
    if (r.last != nullptr && sample >= p.step.continued)
      static_cast<T*>(r.last)[sample * H + unit] = s;
  }
  if (p.norms == nullptr) return;  // all threads alike

  largest = largest_in_warp(largest);
  // Zero, infinite and NaN are their own norm.
  const bool scalable = largest > 0 && largest < 1.0 / 0.0;
  double sum = 0;
  for (int64_t unit = lane; unit < H; unit += 32) {
    const double z = scalable ? double(z_of(unit)) / largest : 0;
    sum += z * z;
  }
  sum = sum_in_warp(sum);
  if (lane == 0) p.norms[p.step.row + sample] = scalable ? largest * sqrt(sum) : largest;
}

template <class T>
int launch_step(const StepParameters& parameters, device::Stream stream) {
  constexpr int64_t kSamplesPerBlock = kThreads / 32;
  device::LaunchConfig config;
  config.block = kThreads;
  config.grid_x =
      static_cast<int>((parameters.step.rows + kSamplesPerBlock - 1) / kSamplesPerBlock);
  return device::launch(config, stream, step_kernel<T>, parameters);
}

// ---- the persistent kernels ---------------------------------------------------------------------

LaunchEngine* engine_launcher(ScalarType dtype, Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::FMA: return dtype == ScalarType::Float32 ? launch_float32 : nullptr;
    case Arithmetic::TensorCoreTF32: return dtype == ScalarType::Float32 ? launch_tf32 : nullptr;
    case Arithmetic::TensorCore:
      return dtype == ScalarType::BFloat16  ? launch_bfloat16
             : dtype == ScalarType::Float16 ? launch_float16
                                            : nullptr;
  }
  return nullptr;
}

template <class T>
T* at(void* workspace, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

WalkParameters parameters_of(const Walk& walk, const Problem& problem, const Plan& plan,
                             const Geometry& g, const Engine& engine, const Workspace& workspace) {
  WalkParameters p = {};
  p.walk = walk;
  p.layout = Layout::of(engine, g, BlockShape::of(plan));
  p.state_words = static_cast<int>(g.state_words);
  p.time_steps = static_cast<int>(problem.time_steps);
  p.batch = static_cast<int>(problem.batch);
  p.input_size = plan.fuse_input ? static_cast<int>(problem.input_size) : 0;
  p.hidden_size = static_cast<int>(problem.hidden_size);
  p.columns = plan.columns;
  p.column_groups = plan.columns / plan.engine_columns;
  p.row_warps = plan.row_warps;
  p.depth_split = plan.depth_split;
  p.blocks = static_cast<int>(g.blocks);
  p.batch_tiles = static_cast<int>(g.batch_tiles);
  p.row_tiles = static_cast<int>(g.row_tiles);
  p.block_row_tiles = static_cast<int>(g.block_row_tiles);
  p.row_rounds = static_cast<int>(g.row_rounds);
  p.state_depth = static_cast<int>(g.state_depth);
  p.input_depth = static_cast<int>(g.input_depth);
  p.state_slice = static_cast<int>(g.state_slice);
  p.input_slice = static_cast<int>(g.input_slice);
  p.shared_weight_tiles = static_cast<int>(g.shared_weight_tiles);
  p.counters = at<uint32_t>(walk.workspace, workspace.counters);
  p.states = at<uint32_t>(walk.workspace, workspace.states);
  return p;
}

// Row r of a contiguous tensor: how many there are.
int64_t total_rows_of(const Walk& walk, const Problem& problem) {
  return walk.batch_sizes != nullptr ? walk.total_rows : problem.time_steps * problem.batch;
}

}  // namespace

int launch(const Walk& walk, const Problem& problem, const Plan& plan, const DeviceFigures& figures,
           void* stream) {
  if (problem.time_steps == 0 || problem.batch == 0 || problem.hidden_size == 0) return 0;
  const Engine engine = engine_of(problem.dtype, plan.arithmetic, plan.engine_columns);
  LaunchEngine* const launch_engine = engine_launcher(problem.dtype, plan.arithmetic);
  if (engine.rows == 0 || launch_engine == nullptr) return kNoSuchKernel;
  const Geometry g = Geometry::of(problem, plan);
  const int64_t total_rows = total_rows_of(walk, problem);
  const bool norms = walk.norms[0] != nullptr || walk.norms[1] != nullptr;
  const Workspace workspace = Workspace::of(problem, plan, total_rows, norms);
  WalkParameters p = parameters_of(walk, problem, plan, g, engine, workspace);
  p.total_rows = total_rows;
  const int64_t norm_parts = g.row_tiles * engine.norm_parts;
  for (int i = 0; i < walk.directions; ++i)
    if (walk.norms[i] != nullptr)
      p.norm_parts[i] =
          at<double>(walk.workspace, workspace.norm_parts) + i * norm_parts * total_rows;

  device::LaunchConfig config;
  config.block = plan.threads();
  config.grid_y = walk.directions;
  config.shared_bytes = p.layout.bytes;
  config.cluster = plan.residency == Residency::Cluster ? p.blocks : 1;
  config.cooperative = plan.residency == Residency::Grid;
  int64_t tiles_at_once = g.batch_tiles;
  if (plan.residency == Residency::Grid) {
    // All blocks of a team wait for each other, so all have to run; a multiprocessor holds one.
    const int64_t teams = figures.multiprocessors / (g.blocks * walk.directions);
    tiles_at_once = std::max<int64_t>(1, teams);
    const size_t bytes =
        static_cast<size_t>(walk.directions * g.batch_tiles) * Workspace::kCounterBytes;
    if (const int error = device::clear_async(p.counters, bytes, stream); error != 0) return error;
  }
  for (int64_t tile = 0; tile < g.batch_tiles; tile += tiles_at_once) {
    p.first_tile = static_cast<int>(tile);
    config.grid_x = static_cast<int>(std::min(tiles_at_once, g.batch_tiles - tile) * g.blocks);
    const int error = launch_engine(config, plan.residency, stream, p, plan.engine_columns);
    if (error != 0) return error;
  }
  for (int i = 0; i < walk.directions; ++i) {
    if (walk.norms[i] == nullptr) continue;
    device::LaunchConfig norm_config;
    norm_config.block = kThreads;
    norm_config.grid_x = static_cast<int>((total_rows + kThreads - 1) / kThreads);
    const NormParameters parameters = {p.norm_parts[i], walk.norms[i], total_rows,
                                       static_cast<int>(norm_parts)};
    const int error = device::launch(norm_config, stream, norm_kernel, parameters);
    if (error != 0) return error;
  }
  return 0;
}

int launch_epilogue(const Recurrence& recurrence, const Step& step, const void* z, double* norms,
                    void* stream) {
  if (step.rows == 0 || recurrence.hidden_size == 0) return 0;
  const StepParameters parameters = {recurrence, step, z, norms};
  switch (recurrence.dtype) {
    case ScalarType::Float32: return launch_step<float>(parameters, stream);
    case ScalarType::Float64: return launch_step<double>(parameters, stream);
    case ScalarType::BFloat16: return launch_step<device::bfloat16>(parameters, stream);
    case ScalarType::Float16: return launch_step<device::float16>(parameters, stream);
  }
  return kNoSuchKernel;
}

const char* error_string(int code) {
  return code == kNoSuchKernel ? "there is no kernel for this plan" : device::error_string(code);
}

int figures_of_current_device(DeviceFigures* figures) {
  DeviceFigures f;
  if (const int error = device::figures_of_current_device(&f); error != 0) return error;
  int kernels = 0;
  if (const int error = capability_of_float32_clusters(&kernels); error != 0) return error;
  f.kernels_major = kernels / 10;
  f.kernels_minor = kernels % 10;
  // Not every card of a kind has room for the largest cluster of that kind. One that fits with the
  // largest blocks fits with all.
  device::LaunchConfig config;
  config.block = kMaxThreads;
  config.shared_bytes = static_cast<size_t>(f.shared_bytes_per_block);
  const bool compiled = f.kernels_major >= kFirstMajorWithClusters;
  for (; compiled && f.max_cluster_size > 1; f.max_cluster_size /= 2) {
    config.grid_x = config.cluster = f.max_cluster_size;
    int count = 0;
    if (const int error = count_float32_clusters(config, &count); error != 0) return error;
    if (count > 0) break;
  }
  *figures = f;
  return 0;
}

}  // namespace cuda
}  // namespace rnn_cuda
