// One planted mistake per value of the argument: the emulator must catch each, and must find nothing to say about 0.
#include "emulate.h"
#include "tensor_core_emu.h"

namespace {

enum Fault {
  none,
  no_barrier,
  split_barrier,
  unwritten,
  past_the_end,
  shared_update,
  missing_warp,
  wrong_mask,
  too_many_digits
};

constexpr int kThreads = 64, kBlocks = 4;

// Every block reverses its part of the input through shared memory, and the first one sets `total`.
void reverse_kernel(Fault fault, const int* in, int* out, int* total) {
  FASTIF_DYNAMIC_SHARED(int, staged);
  const int thread = threadIdx.x, base = blockIdx.x * kThreads;
  if (fault != unwritten || thread != 5) staged[thread] = in[base + thread];
  if (fault == split_barrier && thread < 32) {
    __syncthreads();
  } else if (fault == missing_warp && thread >= 32) {
    ;  // does not come
  } else if (fault != no_barrier) {
    __syncthreads();
  }
  out[base + thread] = staged[kThreads - (fault == past_the_end ? 0 : 1) - thread];
  if (fault == shared_update) {
    if (thread == 0) *total += 1;
  } else if (thread == 0 && blockIdx.x == 0) {
    *total = kBlocks;
  }
  if (fault == wrong_mask && thread % 32 >= 16) __shfl_xor_sync(0xffffu, thread, 1);
  const float x = fault == too_many_digits ? 1 / 3.0f : 0.25f, a[4] = {x, x, x, x}, b[2] = {1, 1}, c[4] = {};
  float d[4];
  mma_m16n8k8_tf32(d, a, b, c);
}

}  // namespace

int main(int, char** arguments) {
  const Fault fault = static_cast<Fault>(std::atoi(arguments[1]));
  for_schedules([fault] {
    std::vector<int> in(kBlocks * kThreads), out(in.size());
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i) + 1;
    int total = 0;
    emu::launch(kBlocks, kThreads, kThreads * sizeof(int),
                [&] { reverse_kernel(fault, in.data(), out.data(), &total); });
    bool right = true;
    for (int i = 0; i < kBlocks * kThreads; ++i)
      right = right && out[i] == in[i / kThreads * kThreads + kThreads - 1 - i % kThreads];
    expect(right, "not reversed");
  });
  return report("faults");
}
