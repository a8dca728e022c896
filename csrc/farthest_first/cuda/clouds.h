// What the GPU kernels of farthest_first are told: plain pointers of device memory, passed by value.
#pragma once

#include <cstdint>

namespace fastif {

// How far a cloud is. It stays on the device, so that a traversal can be cut into several launches.
struct CloudProgress {
  int64_t made, next;  // picks made, and the pick that follows (of no meaning while given picks are left)
  bool done;
};

struct Clouds {
  int64_t n, d, k, given;   // every cloud: [n, d] points, at most k picks, of which the first ones are given
  const int64_t* starts;    // [b, given]
  const int64_t* picks;     // [b] picks of each cloud, or null: k
  const bool* mask;         // [b, n], true = a point, or null: all are
  double stop;              // a squared covering radius at most this ends a cloud; negative: none does
  int64_t* indices;         // [b, k]
  double* sq_radii;         // [b, k]
  double* sq_dists;         // [b, n]
  int64_t* nearest;         // [b, n]
  CloudProgress* progress;  // [b]

  // Cloud j by itself, with so many picks.
  Clouds one(int64_t j, int64_t its_picks) const {
    Clouds made = *this;
    made.k = its_picks;
    made.picks = nullptr;
    made.starts += j * given;
    if (mask != nullptr) made.mask += j * n;
    made.indices += j * k;
    made.sq_radii += j * k;
    made.sq_dists += j * n;
    made.nearest += j * n;
    made.progress += j;
    return made;
  }
};

}  // namespace fastif
