// How an error reaches Python. torch hands on its text alone (2.15 makes a RuntimeError of every exception, whatever it
// was), so that its kind stands before the text, and fastif/ops/_library.py raises it.
#pragma once

#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastif {

template <typename T>
std::ostream& operator<<(std::ostream& out, const std::vector<T>& values) {
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  return out << ']';
}

// Ends the op. `kind` is the name of an exception of Python's.
template <typename... Parts>
[[noreturn]] void fail(const char* kind, const Parts&... parts) {
  std::ostringstream text;
  text << kind << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace fastif

// Every message names the op, the rule and the value.
#define CHECK_VALUE(rule, ...)                              \
  do {                                                      \
    if (!(rule)) ::fastif::fail("ValueError", __VA_ARGS__); \
  } while (false)
#define CHECK_TYPE(rule, ...)                              \
  do {                                                     \
    if (!(rule)) ::fastif::fail("TypeError", __VA_ARGS__); \
  } while (false)
