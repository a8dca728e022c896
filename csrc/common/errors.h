// How an error reaches Python. The stable ABI carries its text alone (torch 2.15 and later make a RuntimeError of
// whatever a kernel throws): the exception that it is to become stands before it, and fastif/ops/_library.py raises
// that one.
#pragma once

#include <ostream>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace fastif {

template <typename T>
std::ostream& operator<<(std::ostream& out, const std::vector<T>& values) {
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  return out << ']';
}

template <typename... Parts>
[[noreturn]] void fail(const char* exception, const Parts&... parts) {
  std::ostringstream text;
  text << exception << ": ";
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
