#include "cpu_sparse_attention.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace svdit {
namespace {

using AttendFunction = void (*)(const CpuAttend &, float *);

AttendFunction attend_function() {
#ifdef SVDIT_CPU_AVX2
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return cpu_attend_avx2;
#endif
  return cpu_attend_baseline;
}

struct Free {
  void operator()(void *memory) const { std::free(memory); }
};

// Grows, never shrinks: a few hundred KiB.
float *thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return static_cast<float *>(memory.get());
}

}  // namespace

CpuSparseAttention::CpuSparseAttention(const svdit_problem &problem, CpuType type, const svdit_tensors &tensors,
                                       const svdit_tables &tables)
    : problem_(problem),
      type_(type),
      tensors_(tensors),
      tables_(tables),
      head_pattern_(tables.head_pattern + int64_t(tables.stage[0]) * problem.heads),
      items_(tables.work_order + int64_t(tables.stage[0]) * problem.num_items) {
  const int limit = cpu_query_rows(problem.head_dim);
  std::vector<CpuTask> once;
  int held = 0;
  for (int item = 0; item < problem.num_items && items_[item] >= 0; ++item) {
    const CpuRange range = rows(item);
    const int count = range.end - range.begin;
    if (!once.empty() && held + count <= limit && same_keys(once.back().first_item, item)) {
      ++once.back().num_items;
      held += count;
    } else {
      once.push_back({0, items_[item] >> 16, item, 1});
      held = count;
    }
  }
  for (int batch = 0; batch < problem.batch; ++batch) {
    for (CpuTask task : once) {
      task.batch = batch;
      tasks_.push_back(task);
    }
  }
}

void CpuSparseAttention::run(const CpuTask &task) const {
  static const AttendFunction attend = attend_function();
  if (pattern(task.head) == SVDIT_PATTERN_SKIP) return zero(task);
  thread_local std::vector<int32_t> tokens;
  thread_local std::vector<CpuRange> ranges;
  keys(task, &ranges);
  if (ranges.empty()) return zero(task);
  const size_t element = type_ == CpuType::kFloat32 ? 4 : 2;
  const int64_t row_stride = int64_t(problem_.heads) * problem_.head_dim;
  const size_t first =
      element * (int64_t(task.batch) * problem_.tokens * row_stride + int64_t(task.head) * problem_.head_dim);
  const auto at = [first](const void *base) { return static_cast<const char *>(base) + first; };
  float *scratch = thread_scratch(cpu_scratch_size(problem_.head_dim));
  queries(task, &tokens);
  const int limit = cpu_query_rows(problem_.head_dim), count = int(tokens.size());
  for (int start = 0; start < count; start += limit) {
    const CpuAttend call{type_,
                         at(tensors_.q),
                         at(tensors_.k),
                         at(tensors_.v),
                         static_cast<char *>(tensors_.o) + first,
                         row_stride,
                         problem_.head_dim,
                         problem_.scale,
                         tokens.data() + start,
                         std::min(limit, count - start),
                         ranges.data(),
                         int32_t(ranges.size())};
    attend(call, scratch);
  }
}

const int32_t *CpuSparseAttention::list(int item, int *count) const {
  const int head = items_[item] >> 16, query = items_[item] & 0xffff;
  const int32_t *row = tables_.row_offsets + int64_t(pattern(head)) * (problem_.num_tiles + 1) + query;
  *count = row[1] - row[0];
  return tables_.tile_index + row[0];
}

bool CpuSparseAttention::same_keys(int item, int other) const {
  const int head = items_[item] >> 16;
  if (items_[other] >> 16 != head) return false;
  if (pattern(head) == SVDIT_PATTERN_FULL || pattern(head) == SVDIT_PATTERN_SKIP) return true;
  int count = 0, other_count = 0;
  const int32_t *tiles = list(item, &count), *other_tiles = list(other, &other_count);
  return count == other_count && std::equal(tiles, tiles + count, other_tiles);
}

CpuRange CpuSparseAttention::rows(int item) const {
  const int head = items_[item] >> 16, query = items_[item] & 0xffff;
  if (pattern(head) == SVDIT_PATTERN_FULL) {
    return {query * SVDIT_MAX_TILE, std::min((query + 1) * SVDIT_MAX_TILE, problem_.tokens)};
  }
  return {tables_.tile_offsets[query], tables_.tile_offsets[query + 1]};
}

void CpuSparseAttention::queries(const CpuTask &task, std::vector<int32_t> *tokens) const {
  tokens->clear();
  for (int item = task.first_item; item < task.first_item + task.num_items; ++item) {
    const CpuRange range = rows(item);
    for (int token = range.begin; token < range.end; ++token) tokens->push_back(token);
  }
}

// Kept tokens, the text beyond text_len left out; neighbouring tiles become one range.
void CpuSparseAttention::keys(const CpuTask &task, std::vector<CpuRange> *ranges) const {
  const int text_start = problem_.text_first ? 0 : problem_.tokens - problem_.text_tokens;
  const CpuRange hidden{text_start + tables_.text_len[task.batch], text_start + problem_.text_tokens};
  ranges->clear();
  const auto add = [ranges](int begin, int end) {
    if (begin >= end) return;
    if (!ranges->empty() && ranges->back().end == begin) {
      ranges->back().end = end;
    } else {
      ranges->push_back({begin, end});
    }
  };
  const auto visible = [&](int begin, int end) {
    add(begin, std::min(end, hidden.begin));
    add(std::max(begin, hidden.end), end);
  };
  if (pattern(task.head) == SVDIT_PATTERN_FULL) return visible(0, problem_.tokens);
  int count = 0;
  const int32_t *tiles = list(task.first_item, &count);
  for (int i = 0; i < count; ++i) visible(tables_.tile_offsets[tiles[i]], tables_.tile_offsets[tiles[i] + 1]);
}

void CpuSparseAttention::zero(const CpuTask &task) const {
  const size_t row = size_t(problem_.head_dim) * (type_ == CpuType::kFloat32 ? 4 : 2);
  for (int item = task.first_item; item < task.first_item + task.num_items; ++item) {
    const CpuRange range = rows(item);
    for (int64_t token = range.begin; token < range.end; ++token) {
      const int64_t at = (int64_t(task.batch) * problem_.tokens + token) * problem_.heads + task.head;
      std::memset(static_cast<char *>(tensors_.o) + at * row, 0, row);
    }
  }
}

}  // namespace svdit
