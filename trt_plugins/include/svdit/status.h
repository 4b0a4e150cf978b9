// Status codes of the C interface. Nothing in this library throws or aborts.
#ifndef SVDIT_STATUS_H_
#define SVDIT_STATUS_H_

#ifdef __cplusplus
extern "C" {
#endif

typedef enum svdit_status {
  SVDIT_OK = 0,
  SVDIT_BAD_PROBLEM = 1,    // a shape, type or attribute that no kernel accepts
  SVDIT_BAD_TABLES = 2,     // a table whose contents contradict the problem
  SVDIT_BAD_POINTER = 3,    // a null or misaligned pointer
  SVDIT_BAD_WORKSPACE = 4,  // the workspace is missing or too small
  SVDIT_UNSUPPORTED_GPU = 5,
  SVDIT_CUDA_ERROR = 6,  // a CUDA call failed; the message quotes it
} svdit_status;

// One line of text for a status; never null.
const char *svdit_status_text(svdit_status status);

#ifdef __cplusplus
}
#endif

#endif  // SVDIT_STATUS_H_
