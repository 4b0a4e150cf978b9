// The border to TensorRT: what is wrong becomes one line on stderr and a failure value; nothing is thrown across.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

namespace svdit::tensorrt {

// A mistake of the caller, as "subject: got X; expected Y; next step".
class Refusal : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

__attribute__((format(printf, 1, 2))) inline std::string sentence(const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return text;
}

// NOTE: not TensorRT's ILogger. Its function table moved between TensorRT 10 and 11, so a plugin built against one and
// loaded by the other would call the wrong function.
inline void log_line(const char *where, const char *text) noexcept {
  std::fprintf(stderr, "[svdit] SparseAttention, %s: %s\n", where, text);
}

// Runs body; an exception is logged and gives failure.
template <typename Result, typename Body>
Result guarded(const char *where, Result failure, Body &&body) noexcept {
  try {
    return body();
  } catch (const std::exception &error) {
    log_line(where, error.what());
  } catch (...) {
    log_line(where, "got an unknown exception; please report it");
  }
  return failure;
}

}  // namespace svdit::tensorrt
