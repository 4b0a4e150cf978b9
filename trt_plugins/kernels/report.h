// One failure and its text, handed from where it is found to the caller's buffer.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdio>

#include "svdit/status.h"

namespace svdit {

class Report {
 public:
  Report(char *message, size_t size) : message_(message), size_(message == nullptr ? 0 : size) {
    if (size_ > 0) message_[0] = '\0';
  }

  // "subject: got X; expected Y; next step", printf style.
  __attribute__((format(printf, 3, 4))) svdit_status fail(svdit_status status, const char *format, ...) {
    status_ = status;
    if (size_ > 0) {
      va_list arguments;
      va_start(arguments, format);
      std::vsnprintf(message_, size_, format, arguments);
      va_end(arguments);
    }
    return status;
  }

#ifdef __CUDA_RUNTIME_API_H__
  svdit_status cuda(const char *call, cudaError_t error) {
    return fail(SVDIT_CUDA_ERROR, "%s: got %s (%s); expected success", call, cudaGetErrorName(error),
                cudaGetErrorString(error));
  }
#endif

  svdit_status status() const { return status_; }

 private:
  char *message_;
  size_t size_;
  svdit_status status_ = SVDIT_OK;
};

}  // namespace svdit
