// What the drivers share: the schedules to run under, and counting failures.
#pragma once

#include <cstdarg>

#include "cuda_emu.h"

// Every thread order times greedy and lockstep; under a sanitizer, where runs are slow, one of each.
template <typename Test>
void for_schedules(Test test) {
  unsigned seed = 0;
  for (const auto order : {emu::Order::forward, emu::Order::reverse, emu::Order::shuffle})
    for (const bool greedy : {true, false}) {
      if ((EMU_TSAN || EMU_ASAN) && greedy != (order == emu::Order::reverse)) continue;
      emu::schedule = {order, greedy, ++seed};
      test();
    }
}

inline int failures = 0, checks = 0;

__attribute__((format(printf, 2, 3))) inline void expect(bool holds, const char* format, ...) {
  ++checks;
  if (holds || ++failures > 20) return;
  std::va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("  [order %d, %s]\n", static_cast<int>(emu::schedule.order),
              emu::schedule.greedy ? "greedy" : "lockstep");
}

inline int report(const char* name) {
  std::printf("%s: %d checks, %d failures\n", name, checks, failures);
  return failures == 0 ? 0 : 1;
}

// Uniform in [-1, 1), the same on every machine.
template <typename T>
std::vector<T> uniform(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(static_cast<double>(random()) / 2147483648.0 - 1.0);
  return values;
}

// Largest error relative to the largest magnitude that was wanted.
template <typename T>
double relative_error(const std::vector<T>& got, const std::vector<double>& want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (!std::isfinite(static_cast<double>(got[i]))) return INFINITY;
    error = std::max(error, std::abs(static_cast<double>(got[i]) - want[i]));
    size = std::max(size, std::abs(want[i]));
  }
  return size > 0 ? error / size : error;
}
