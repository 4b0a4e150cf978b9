// The operator on a CPU: float32, float16 or bfloat16, any head size, float32 arithmetic. No CUDA, no framework.
//
// A call is cut into tasks; the caller runs them in any order on any threads. The numbers and tables are
// those of svdit/problem.h, in host memory, and must have passed svdit_check_tables; dtype is not looked at.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu_attend.h"
#include "svdit/launch.h"

namespace svdit {

// Neighbouring items of a row of work_order that belong to one head and keep the same keys.
struct CpuTask {
  int32_t batch, head;
  int32_t first_item, num_items;
};

class CpuSparseAttention {
 public:
  // Reads stage[0] and all of text_len, which must be in range; keeps the pointers of tensors and tables.
  CpuSparseAttention(const svdit_problem &problem, CpuType type, const svdit_tensors &tensors,
                     const svdit_tables &tables);

  const std::vector<CpuTask> &tasks() const { return tasks_; }

  // Writes the results of one task. Memory comes from a buffer of the calling thread that lives as long as the thread.
  // Throws std::bad_alloc.
  void run(const CpuTask &task) const;

 private:
  const int32_t *list(int item, int *count) const;
  bool same_keys(int item, int other) const;
  CpuRange rows(int item) const;
  void queries(const CpuTask &task, std::vector<int32_t> *tokens) const;
  void keys(const CpuTask &task, std::vector<CpuRange> *ranges) const;
  void zero(const CpuTask &task) const;
  int pattern(int head) const { return head_pattern_[head]; }

  const svdit_problem problem_;
  const CpuType type_;
  const svdit_tensors tensors_;
  const svdit_tables tables_;
  const int32_t *head_pattern_, *items_;  // of the stage
  std::vector<CpuTask> tasks_;
};

}  // namespace svdit
