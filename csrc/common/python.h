// What Python sees of a library of kernels, by CPython's limited API. fastif._C and fastif._C_cuda are the same module
// beside other kernels.
#pragma once

#include <Python.h>

#include <utility>

#include "errors.h"
#include "poll.h"
#include "simd.h"

// glibc 2.32's word for "this process has one thread", which libstdc++ asks where its headers had it. Our own, which
// says that there are several, lets the library run where glibc is older.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

namespace fastif::python {

// The progress callback of the ops that this thread runs: callable(done, total), or null.
inline thread_local PyObject* progress = nullptr;
// What it, or a signal handler, raised in this thread.
inline thread_local PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;

inline void poll(int64_t done, int64_t total) {
  const PyGILState_STATE state = PyGILState_Ensure();
  bool raised = PyErr_CheckSignals() != 0;
  if (!raised && progress) {
    PyObject* const result =
        PyObject_CallFunction(progress, "LL", static_cast<long long>(done), static_cast<long long>(total));
    raised = result == nullptr;
    Py_XDECREF(result);
  }
  if (raised) PyErr_Fetch(&type, &value, &traceback);
  PyGILState_Release(state);
  if (raised) fail("Raised", "what the progress callback or a signal's handler raised ended the op");
}

inline PyObject* set_progress(PyObject*, PyObject* callback) {
  PyObject* const next = callback == Py_None ? nullptr : callback;
  Py_XINCREF(next);
  PyObject* const former = std::exchange(progress, next);
  Py_XDECREF(former);
  Py_RETURN_NONE;
}

inline PyObject* raise_again(PyObject*, PyObject*) {
  if (!type) Py_RETURN_NONE;
  PyErr_Restore(std::exchange(type, nullptr), std::exchange(value, nullptr), std::exchange(traceback, nullptr));
  return nullptr;
}

inline PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(isa_name()); }

inline PyMethodDef methods[] = {
    {"set_progress", set_progress, METH_O,
     "The long ops of this thread call callback(done, total) now and then; None ends that."},
    {"raise_again", raise_again, METH_NOARGS, "Raises what ended the last op of this thread, if that was raised here."},
    {"isa", isa, METH_NOARGS, "Vector instructions in use on this processor: avx512, avx2 or generic."},
    {nullptr, nullptr, 0, nullptr}};

inline PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "fastif kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

inline PyObject* create() {
  poll_python = poll;
  return PyModule_Create(&module);
}

}  // namespace fastif::python
