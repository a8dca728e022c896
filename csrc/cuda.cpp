// The module of the library that holds the CUDA kernels (csrc/<op>/cuda): fastif._C loads it not,
// fastif/ops/_library.py does where torch has CUDA of this major version.
#include "common/python.h"

#define FASTIF_TEXT_OF(number) #number
#define FASTIF_TEXT(number) FASTIF_TEXT_OF(number)

// Read from the library's bytes before it is loaded.
extern "C" __attribute__((used, visibility("default"))) const char fastif_built_for[] =
    "fastif was built for CUDA " FASTIF_TEXT(FASTIF_CUDA_MAJOR);

PyMODINIT_FUNC PyInit__C_cuda() { return fastif::python::create(); }
