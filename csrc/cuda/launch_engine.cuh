// Queues the persistent kernel of one engine; instantiated in one source for each data type, so
// that they compile side by side.
#pragma once

#include "recurrence.cuh"

namespace rnn_cuda {
namespace cuda {

template <class Engine>
int launch_engine(const device::LaunchConfig& config, Residency residency, device::Stream stream,
                  const WalkParameters& parameters) {
  switch (residency) {
    case Residency::OneSM:
      return device::launch(config, stream, walk_kernel<Engine, InBlock>, parameters);
    case Residency::Cluster:
      return device::launch(config, stream, walk_kernel<Engine, InCluster>, parameters);
    case Residency::Grid:
      return device::launch(config, stream, walk_kernel<Engine, InGrid>, parameters);
    case Residency::Streamed: break;
  }
  return kNoSuchKernel;
}

// Of an engine's two widths, the one with so many columns.
template <class Narrow, class Wide>
int launch_width(const device::LaunchConfig& config, Residency residency, device::Stream stream,
                 const WalkParameters& parameters, int columns) {
  if (columns == Narrow::kColumns)
    return launch_engine<Narrow>(config, residency, stream, parameters);
  if (columns == Wide::kColumns) return launch_engine<Wide>(config, residency, stream, parameters);
  return kNoSuchKernel;
}

}  // namespace cuda
}  // namespace rnn_cuda
