// How an error reaches Python. An exception of the standard library crosses torch as it is, and becomes what pybind11
// makes of it: ValueError and MemoryError. None becomes TypeError: that one's name stands before its text, and
// fastif/ops/_library.py raises it.
#pragma once

#include <new>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fastif {

template <typename T>
std::ostream& operator<<(std::ostream& out, const std::vector<T>& values) {
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  return out << ']';
}

// The parts' text, as a ValueError (std::invalid_argument) or whatever else Exception becomes.
template <typename Exception, typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Exception(text.str());
}

class NoMemory : public std::bad_alloc {
 public:
  explicit NoMemory(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

}  // namespace fastif

// Every message names the op, the rule and the value.
#define CHECK_VALUE(rule, ...)                                       \
  do {                                                               \
    if (!(rule)) ::fastif::fail<std::invalid_argument>(__VA_ARGS__); \
  } while (false)
#define CHECK_TYPE(rule, ...)                                                    \
  do {                                                                           \
    if (!(rule)) ::fastif::fail<std::runtime_error>("TypeError: ", __VA_ARGS__); \
  } while (false)
