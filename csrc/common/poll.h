// A long kernel lets Python in now and then: for its progress bar, and to be ended by Ctrl-C.
#pragma once

#include <cstdint>

namespace fastif {

// Set by csrc/ops.cpp; null where no Python is (the emulator). Takes the GIL, runs the signal handlers and the progress
// callback, and throws what they raise.
inline void (*poll_python)(int64_t done, int64_t total) = nullptr;

// To be called from the thread that runs the op, at least every 0.1 s of work. When it throws, the op ends.
inline void poll(int64_t done, int64_t total) {
  if (poll_python) poll_python(done, total);
}

}  // namespace fastif
