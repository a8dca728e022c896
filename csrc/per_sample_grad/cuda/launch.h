// Launches of per_sample_grad on raw device pointers; instantiated for float and double.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastif {

// Ranges that each group's rows are cut into, from the shapes alone.
int64_t per_sample_grad_accumulate_splits(int64_t n, int64_t t, int64_t d, int64_t o, int64_t groups,
                                          int64_t element_bytes);

template <typename T>
void per_sample_grad_accumulate_launch(const T* inputs, const T* output_grads, const T* weights, const int64_t* order,
                                       const int64_t* offsets, int64_t t, int64_t d, int64_t o, int64_t groups,
                                       int64_t splits, T* out, cudaStream_t stream);

// Ranges that the examples are cut into; each has a sum of its own, for the caller to add.
int64_t per_sample_grad_accumulate_squares_splits(int64_t n, int64_t t, int64_t d, int64_t o, int64_t element_bytes);

template <typename T>
void per_sample_grad_accumulate_squares_launch(const T* inputs, const T* output_grads, const T* weights, int64_t n,
                                               int64_t t, int64_t d, int64_t o, int64_t splits, T* out,
                                               cudaStream_t stream);

// Partial sums per example that the launch leaves, for the caller to add.
int64_t per_sample_grad_sq_norms_parts(int64_t t, int64_t d, int64_t o, bool scaled, int64_t element_bytes);

template <typename T>
void per_sample_grad_sq_norms_launch(const T* inputs, const T* output_grads,
                                     const T* scale,  // null: 1
                                     int64_t n, int64_t t, int64_t d, int64_t o, double* partial, cudaStream_t stream);

template <typename T>
void per_sample_grad_dots_launch(const T* inputs, const T* output_grads, const T* directions, int64_t n, int64_t t,
                                 int64_t d, int64_t o, int64_t q, T* out, cudaStream_t stream);

}  // namespace fastif
