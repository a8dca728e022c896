// The lazy kernel of farthest_first on the CPU: the result of the plain one to the last bit, at a fraction of its
// distances.
#pragma once

#include <optional>

#include "cloud.h"
#include "filter.h"

namespace fastif {

// Makes the picks after the first and returns how many there are then; nothing, with nothing done, if the filter does
// not take the points (d > 2^20 or entries too large): the plain kernel does.
std::optional<int64_t> farthest_first_lazy(Cloud<float>& cloud, FilterKind filter);
std::optional<int64_t> farthest_first_lazy(Cloud<double>& cloud, FilterKind filter);

}  // namespace fastif
