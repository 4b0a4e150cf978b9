// Host checks of a problem and of its tables. No CUDA here: it is compiled and tested anywhere.
#include <cstdint>
#include <vector>

#include "block_iter.cuh"
#include "report.h"
#include "svdit/launch.h"

namespace svdit {
namespace {

svdit_status check_range(Report &report, const char *name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return SVDIT_OK;
  return report.fail(SVDIT_BAD_PROBLEM, "%s: got %lld; expected %lld..%lld; see svdit/problem.h", name,
                     static_cast<long long>(value), static_cast<long long>(low), static_cast<long long>(high));
}

svdit_status check_problem(const svdit_problem &problem, Report &report) {
  if (problem.dtype != SVDIT_FLOAT16 && problem.dtype != SVDIT_BFLOAT16) {
    return report.fail(SVDIT_BAD_PROBLEM, "dtype: got %d; expected %d (float16) or %d (bfloat16); convert q, k and v",
                       problem.dtype, SVDIT_FLOAT16, SVDIT_BFLOAT16);
  }
  if (problem.head_dim != 64 && problem.head_dim != 128) {
    return report.fail(SVDIT_BAD_PROBLEM, "head_dim: got %d; expected 64 or 128; pad the heads", problem.head_dim);
  }
  if (!(problem.scale > 0.0f) || problem.scale > 3.4e38f) {
    return report.fail(SVDIT_BAD_PROBLEM, "scale: got %g; expected a positive finite number; usually 1/sqrt(head_dim)",
                       static_cast<double>(problem.scale));
  }
  const struct {
    const char *name;
    int64_t value, low, high;
  } ranges[] = {
      {"batch", problem.batch, 1, 65535},
      {"tokens", problem.tokens, 1, (1 << 30) - 1},
      {"heads", problem.heads, 1, 32767},
      {"text_tokens", problem.text_tokens, 0, problem.tokens},
      {"text_first", problem.text_first, 0, 1},
      {"num_tiles", problem.num_tiles, 1, 65536},
      {"num_patterns", problem.num_patterns, 2, INT32_MAX},
      {"num_stages", problem.num_stages, 1, 65536},
      {"num_items", problem.num_items, 1, INT32_MAX / 2},
      {"num_entries", problem.num_entries, 1, INT32_MAX},
      {"num_stages * num_items", int64_t(problem.num_stages) * problem.num_items, 1, INT32_MAX},
      {"batch * num_items", int64_t(problem.batch) * problem.num_items, 1, INT32_MAX / 2},
  };
  for (const auto &range : ranges) {
    const svdit_status status = check_range(report, range.name, range.value, range.low, range.high);
    if (status != SVDIT_OK) return status;
  }
  return SVDIT_OK;
}

class TableCheck {
 public:
  TableCheck(const svdit_problem &problem, const svdit_tables &tables, Report &report)
      : problem_(problem), tables_(tables), report_(report) {}

  svdit_status run() {
    if (!tables_.head_pattern || !tables_.tile_offsets || !tables_.row_offsets || !tables_.tile_index ||
        !tables_.work_order) {
      return report_.fail(SVDIT_BAD_POINTER, "tables: got a null pointer; expected all tables but stage and text_len");
    }
    svdit_status status = tiles();
    if (status == SVDIT_OK) status = rows();
    for (int stage = 0; status == SVDIT_OK && stage < problem_.num_stages; ++stage) {
      status = heads(stage);
      if (status == SVDIT_OK) status = order(stage);
    }
    if (status == SVDIT_OK) status = dynamic();
    return status;
  }

 private:
  svdit_status tiles() {
    const int count = problem_.num_tiles;
    if (tables_.tile_offsets[0] != 0 || tables_.tile_offsets[count] != problem_.tokens) {
      return bad("tile_offsets: got %d..%d; expected 0..%d (the tokens)", tables_.tile_offsets[0],
                 tables_.tile_offsets[count], problem_.tokens);
    }
    for (int i = 0; i < count; ++i) {
      const int64_t size = int64_t(tables_.tile_offsets[i + 1]) - tables_.tile_offsets[i];
      if (size < 1 || size > SVDIT_MAX_TILE) {
        return bad("tile_offsets[%d]: got a tile of %d tokens; expected 1..%d", i, int(size), SVDIT_MAX_TILE);
      }
      const int border = problem_.text_first ? problem_.text_tokens : problem_.tokens - problem_.text_tokens;
      if (tables_.tile_offsets[i] < border && tables_.tile_offsets[i + 1] > border) {
        return bad("tile_offsets[%d]: got a tile across token %d; expected tiles of text or of video, not of both", i,
                   border, 0);
      }
    }
    return SVDIT_OK;
  }

  svdit_status rows() {
    const int64_t count = problem_.num_tiles;
    for (int64_t p = 0; p < problem_.num_patterns; ++p) {
      const int32_t *offsets = tables_.row_offsets + p * (count + 1);
      for (int64_t q = 0; q < count; ++q) {
        if (offsets[q] < 0 || offsets[q + 1] < offsets[q] || offsets[q + 1] > problem_.num_entries) {
          return bad("row_offsets[%d, %d]: got an entry outside 0..%d or below the one before it", int(p), int(q),
                     problem_.num_entries);
        }
        for (int64_t i = offsets[q]; i < offsets[q + 1]; ++i) {
          const int tile = tables_.tile_index[i];
          if (tile < 0 || tile >= count || (i > offsets[q] && tile <= tables_.tile_index[i - 1])) {
            return bad("tile_index[%d]: got tile %d; expected ascending tiles below %d", int(i), tile, int(count));
          }
        }
      }
    }
    return SVDIT_OK;
  }

  svdit_status heads(int stage) {
    for (int h = 0; h < problem_.heads; ++h) {
      const int pattern = tables_.head_pattern[int64_t(stage) * problem_.heads + h];
      if (pattern < 0 || pattern >= problem_.num_patterns) {
        return bad("head_pattern[%d, %d]: got %d; expected a pattern id of row_offsets", stage, h, pattern);
      }
    }
    return SVDIT_OK;
  }

  int items_of(int stage, int head) const {
    const bool full = tables_.head_pattern[int64_t(stage) * problem_.heads + head] == SVDIT_PATTERN_FULL;
    return full ? (problem_.tokens + kBlockRows - 1) / kBlockRows : problem_.num_tiles;
  }

  svdit_status order(int stage) {
    std::vector<int64_t> first(problem_.heads + 1, 0);
    for (int h = 0; h < problem_.heads; ++h) first[h + 1] = first[h] + items_of(stage, h);
    std::vector<bool> seen(first.back(), false);
    int64_t found = 0;
    bool ended = false;
    for (int i = 0; i < problem_.num_items; ++i) {
      const int code = tables_.work_order[int64_t(stage) * problem_.num_items + i];
      if (code == -1) {
        ended = true;
        continue;
      }
      const int head = code >> 16, query = code & 0xffff;
      if (ended || code < 0 || head >= problem_.heads || query >= items_of(stage, head)) {
        return bad("work_order[%d, %d]: got %d; expected (head << 16) | query tile, or -1 at the end only", stage, i,
                   code);
      }
      if (seen[first[head] + query]) {
        return bad("work_order[%d, %d]: got item %d twice; expected each query tile of each head once", stage, i, code);
      }
      seen[first[head] + query] = true;
      ++found;
    }
    if (found != first.back()) {
      return bad("work_order[%d]: got %d items; expected %d, every query tile of every head", stage, int(found),
                 int(first.back()));
    }
    return SVDIT_OK;
  }

  svdit_status dynamic() {
    if (tables_.stage && (tables_.stage[0] < 0 || tables_.stage[0] >= problem_.num_stages)) {
      return bad("stage: got %d; expected 0..%d", tables_.stage[0], problem_.num_stages - 1, 0);
    }
    for (int b = 0; tables_.text_len && b < problem_.batch; ++b) {
      if (tables_.text_len[b] < 0 || tables_.text_len[b] > problem_.text_tokens) {
        return bad("text_len[%d]: got %d; expected 0..%d", b, tables_.text_len[b], problem_.text_tokens);
      }
    }
    return SVDIT_OK;
  }

  svdit_status bad(const char *format, int a, int b, int c) {
    char text[256];
    std::snprintf(text, sizeof(text), format, a, b, c);
    return report_.fail(SVDIT_BAD_TABLES, "%s; rebuild the tables from the plan", text);
  }

  const svdit_problem &problem_;
  const svdit_tables &tables_;
  Report &report_;
};

}  // namespace
}  // namespace svdit

extern "C" {

__attribute__((visibility("default"))) const char *svdit_status_text(svdit_status status) {
  switch (status) {
    case SVDIT_OK: return "ok";
    case SVDIT_BAD_PROBLEM: return "bad problem";
    case SVDIT_BAD_TABLES: return "bad tables";
    case SVDIT_BAD_POINTER: return "bad pointer";
    case SVDIT_BAD_WORKSPACE: return "bad workspace";
    case SVDIT_UNSUPPORTED_GPU: return "unsupported GPU";
    case SVDIT_CUDA_ERROR: return "CUDA error";
  }
  return "unknown status";
}

__attribute__((visibility("default"))) svdit_status svdit_check_problem(const svdit_problem *problem, char *message,
                                                                        size_t message_size) {
  svdit::Report report(message, message_size);
  if (problem == nullptr) return report.fail(SVDIT_BAD_POINTER, "problem: got a null pointer; expected a struct");
  return svdit::check_problem(*problem, report);
}

__attribute__((visibility("default"))) svdit_status svdit_check_tables(const svdit_problem *problem,
                                                                       const svdit_tables *host_tables, char *message,
                                                                       size_t message_size) {
  svdit::Report report(message, message_size);
  if (problem == nullptr || host_tables == nullptr) {
    return report.fail(SVDIT_BAD_POINTER, "problem or tables: got a null pointer; expected two structs");
  }
  const svdit_status status = svdit::check_problem(*problem, report);
  if (status != SVDIT_OK) return status;
  try {
    return svdit::TableCheck(*problem, *host_tables, report).run();
  } catch (...) {
    return report.fail(SVDIT_BAD_TABLES, "tables: out of host memory while checking");
  }
}

__attribute__((visibility("default"))) int32_t svdit_item_blocks(const svdit_problem *problem,
                                                                 const svdit_tables *host_tables, int32_t stage,
                                                                 int32_t text_len, int32_t item, int32_t capacity,
                                                                 int32_t *starts, int32_t *lengths) {
  if (problem == nullptr || host_tables == nullptr || starts == nullptr || lengths == nullptr) return -1;
  if (stage < 0 || stage >= problem->num_stages || item < 0 || item >= problem->num_items) return -1;
  const int code = host_tables->work_order[int64_t(stage) * problem->num_items + item];
  if (code < 0) return 0;
  const int head = code >> 16, query = code & 0xffff;
  const int pattern = host_tables->head_pattern[int64_t(stage) * problem->heads + head];
  int count = 0;
  svdit::BlockStream stream;
  const auto next = [&](svdit::Rows range, bool at_end) {
    svdit::Rows block{0, 0};
    while (stream.pop(range, at_end, block)) {
      if (count < capacity) {
        starts[count] = block.begin;
        lengths[count] = block.end - block.begin;
      }
      ++count;
    }
    stream.push(range);
  };
  const int tokens = problem->tokens, text_tokens = problem->text_tokens;
  const bool text_first = problem->text_first != 0;
  if (pattern == SVDIT_PATTERN_FULL) {
    for (int i = 0; i < svdit::kFullRanges; ++i) next(svdit::full_range(i, tokens, text_tokens, text_first, text_len), false);
  } else if (pattern != SVDIT_PATTERN_SKIP) {
    const int32_t *row = host_tables->row_offsets + int64_t(pattern) * (problem->num_tiles + 1) + query;
    for (int i = row[0]; i < row[1]; ++i) {
      const int32_t *tile = host_tables->tile_offsets + host_tables->tile_index[i];
      next(svdit::clip_text({tile[0], tile[1]}, tokens, text_tokens, text_first, text_len), false);
    }
  }
  next({0, 0}, true);
  return count;
}

}  // extern "C"
