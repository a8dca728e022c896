#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "../../common/cuda.h"
#include "../../common/poll.h"
#include "../farthest_first.h"
#include "launch.h"
#include "lazy_launch.h"

namespace fastif {
namespace {

// Work is queued for about so many seconds, by the estimates below, before the host waits for it and polls: a run
// shorter than this never waits.
constexpr double kPollSeconds = 0.1;
// What the estimates go by, for GPUs of the size of an H100 (none of them is measured): bytes per second; seconds of a
// pick besides reading, for the whole device and for a block.
constexpr double kBandwidth = 1.5e12, kGridPick = 6e-6, kBlockPick = 2e-6;

// FASTIF_KCENTER, read once in every call, forces plain or lazy; the filters that lazy:FILTER names are the CPU's.
std::optional<bool> forced_lazy() {
  const char* set = std::getenv("FASTIF_KCENTER");
  const std::string forced = set ? set : "";
  if (forced.empty()) return std::nullopt;
  const bool lazy = forced == "lazy" || forced.starts_with("lazy:");
  CHECK_VALUE(forced == "plain" || lazy, "farthest_first: FASTIF_KCENTER must be plain or lazy on CUDA, got ", forced);
  return lazy;
}

// The lazy kernel pays for its codes as for a few picks, and needs many to be lazy about; a plain pick costs little
// more than its synchronisation where the points are read in a few microseconds.
bool lazy_pays(int64_t n, int64_t d, int64_t k) { return k >= 64 && d >= 16 && n * d >= int64_t{1} << 21; }

template <typename T>
class Run {
 public:
  Run(const FarthestFirstArguments& arguments, Tensor& indices, Tensor& sq_radii, Tensor& sq_dists, Tensor& nearest)
      : a_(arguments),
        points_(a_.points.const_data_ptr<T>()),
        starts_(a_.start.to(a_.points.device())),
        progress_(bytes(a_.clouds() * static_cast<int64_t>(sizeof(CloudProgress)))),
        total_(std::accumulate(a_.picks.begin(), a_.picks.end(), int64_t{0})),
        stream_(stream_of(a_.points)) {
    clouds_ = {.n = a_.n(),
               .d = a_.d(),
               .k = a_.k,
               .given = a_.starts(),
               .starts = starts_.const_data_ptr<int64_t>(),
               .picks = nullptr,
               .mask = a_.mask ? a_.mask->const_data_ptr<bool>() : nullptr,
               .stop = a_.until_sq_radius,
               .indices = indices.mutable_data_ptr<int64_t>(),
               .sq_radii = sq_radii.mutable_data_ptr<double>(),
               .sq_dists = sq_dists.mutable_data_ptr<double>(),
               .nearest = nearest.mutable_data_ptr<int64_t>(),
               .progress = reinterpret_cast<CloudProgress*>(progress_.mutable_data_ptr<uint8_t>())};
  }

  void operator()(std::optional<bool> forced) {
    const int64_t b = a_.clouds(), most = *std::max_element(a_.picks.begin(), a_.picks.end());
    STD_CUDA_CHECK(farthest_first_plan<T>(a_.n(), a_.d(), a_.points.get_device(), &plan_));
    LazyPlan lazy;
    if (forced.value_or(lazy_pays(a_.n(), a_.d(), most)))
      STD_CUDA_CHECK(farthest_first_lazy_plan<T>(a_.n(), a_.d(), a_.points.get_device(), &lazy));
    farthest_first_begin(clouds_, b, stream_);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (lazy.usable) {
      for (int64_t j = 0; j < b; ++j) run_lazy(j, lazy);
    } else if (block_pick_seconds() < static_cast<double>(b) * grid_pick_seconds()) {
      run_blocks(most);
    } else {
      for (int64_t j = 0; j < b; ++j) run_grid(j);
    }
    farthest_first_end(clouds_, b, stream_);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  Tensor bytes(int64_t count) const { return empty({count}, kByte, a_.points.device()); }

  double cloud_bytes() const { return static_cast<double>(a_.n()) * static_cast<double>(a_.d()) * sizeof(T); }
  double grid_pick_seconds() const { return kGridPick + cloud_bytes() / kBandwidth; }
  double block_pick_seconds() const {  // of a pick in every cloud
    const double at_once = static_cast<double>(plan_.clouds_at_once);
    const double turns = std::ceil(static_cast<double>(a_.clouds()) / at_once);
    return turns * (kBlockPick + cloud_bytes() * at_once / kBandwidth);
  }

  const T* points(int64_t j) const { return points_ + j * a_.n() * a_.d(); }

  // Counts work that was queued. When it is time, waits for all of it, polls, and tells whether all of the clouds
  // [first, last) are done.
  bool queued(double seconds, int64_t first, int64_t last) {
    seconds_ += seconds;
    if (seconds_ < kPollSeconds) return false;
    seconds_ = 0;
    const auto copy = progress_.cpu();  // waits for the stream
    const auto* progress = reinterpret_cast<const CloudProgress*>(copy.const_data_ptr<uint8_t>());
    int64_t made = 0;
    for (int64_t j = 0; j < a_.clouds(); ++j) made += progress[j].made;
    poll(made, total_);
    return std::all_of(progress + first, progress + last, [](const CloudProgress& of) { return of.done; });
  }

  // Picks up to number `most`, in launches that each take about the time between two polls.
  template <typename Launch>
  void in_parts(double pick_seconds, int64_t most, int64_t first, int64_t last, Launch launch) {
    for (int64_t made = 0; made < most;) {
      const double room = (kPollSeconds - seconds_) / pick_seconds;
      const int64_t part = static_cast<int64_t>(std::clamp(std::ceil(room), 1.0, static_cast<double>(most - made)));
      made += part;
      launch(made);
      if (queued(static_cast<double>(part) * pick_seconds, first, last)) return;
    }
  }

  void run_grid(int64_t j) {
    if (!slots_) slots_ = bytes(plan_.slot_bytes);
    in_parts(grid_pick_seconds(), a_.picks[j], j, j + 1, [&](int64_t last) {
      STD_CUDA_CHECK(farthest_first_launch<T>(plan_, points(j), clouds_.one(j, a_.picks[j]), last,
                                              slots_->mutable_data_ptr(), stream_));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }

  void run_blocks(int64_t most) {
    const auto on_host = empty({a_.clouds()}, kLong);
    std::copy(a_.picks.begin(), a_.picks.end(), on_host.mutable_data_ptr<int64_t>());
    const auto picks = on_host.to(a_.points.device());
    Clouds clouds = clouds_;
    clouds.picks = picks.const_data_ptr<int64_t>();
    in_parts(block_pick_seconds(), most, 0, a_.clouds(), [&](int64_t last) {
      farthest_first_launch_blocks<T>(points_, clouds, a_.clouds(), last, stream_);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }

  void run_lazy(int64_t j, const LazyPlan& plan) {
    if (!scratch_) scratch_ = bytes(plan.scratch_bytes);
    void* const scratch = scratch_->mutable_data_ptr();
    const Clouds cloud = clouds_.one(j, a_.picks[j]);
    farthest_first_lazy_begin<T>(plan, points(j), cloud, scratch, stream_);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    // Where the filter settles nothing, the lazy kernel costs somewhat more than the plain one. If even so it is done
    // soon, it is left alone; else it is stopped in time to poll, until it says that it is done.
    const double seconds = 2 * grid_pick_seconds() * static_cast<double>(cloud.k);
    const bool short_run = seconds < kPollSeconds;
    const uint64_t budget =
        short_run ? std::numeric_limits<uint64_t>::max() : static_cast<uint64_t>(kPollSeconds * 1e9);
    do {
      STD_CUDA_CHECK(farthest_first_lazy_launch<T>(plan, points(j), cloud, scratch, budget, stream_));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    } while (!queued(short_run ? seconds : kPollSeconds, j, j + 1) && !short_run);
  }

  const FarthestFirstArguments& a_;
  const T* points_;
  Tensor starts_, progress_;
  std::optional<Tensor> slots_, scratch_;
  int64_t total_;
  cudaStream_t stream_;
  Clouds clouds_;
  FarthestPlan plan_;
  double seconds_ = 0;  // of work queued since the last poll
};

FarthestFirstResults farthest_first_cuda(const Tensor& points, int64_t k, const Tensor& start,
                                         const std::optional<Tensor>& picks, const std::optional<Tensor>& mask,
                                         std::optional<double> until_radius) {
  const auto arguments = check_farthest_first(points, k, start, picks, mask, until_radius);
  const auto forced = forced_lazy();
  const OnDeviceOf guard(points);
  check_farthest_first_points(arguments);
  const auto per_pick = arguments.shape(k), per_point = arguments.shape(arguments.n());
  const auto made = [&](const Sizes& sizes, ScalarType type) { return empty(sizes, type, points.device()); };
  auto indices = made(per_pick, kLong), nearest = made(per_point, kLong);
  auto sq_radii = made(per_pick, kDouble), sq_dists = made(per_point, kDouble);
  if (arguments.points.scalar_type() == kFloat) {
    Run<float>(arguments, indices, sq_radii, sq_dists, nearest)(forced);
  } else {
    Run<double>(arguments, indices, sq_radii, sq_dists, nearest)(forced);
  }
  return {indices, sq_radii, sq_dists, nearest};
}

}  // namespace

static_assert(std::is_same_v<decltype(farthest_first_cuda), FarthestFirstOp>);

STABLE_TORCH_LIBRARY_IMPL(fastif, CUDA, m) { m.impl("farthest_first", TORCH_BOX(&farthest_first_cuda)); }

}  // namespace fastif
