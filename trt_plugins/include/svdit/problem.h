// What a sparse attention call is: shapes, attributes and tables, and the checks of both.
//
// Q, K, V and O are [batch, tokens, heads, head_dim], contiguous, 16-byte aligned, tokens in tile order.
// A tile is a run of 1..128 tokens. A table is a contiguous int32 array:
//
//   stage         [1]                              which row of head_pattern and work_order is in force
//   text_len      [batch]                          valid text tokens, 0..text_tokens
//   head_pattern  [num_stages, heads]              pattern id; 0 = full, 1 = skip
//   tile_offsets  [num_tiles + 1]                  first token of each tile
//   row_offsets   [num_patterns, num_tiles + 1]    absolute positions in tile_index
//   tile_index    [num_entries]                    key tiles of each (pattern, query tile), ascending
//   work_order    [num_stages, num_items]          (head << 16) | query tile; -1 pads the end. For a full
//                                                  head the low half counts plain blocks of 128 tokens.
#ifndef SVDIT_PROBLEM_H_
#define SVDIT_PROBLEM_H_

#include <stddef.h>
#include <stdint.h>

#include "svdit/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum svdit_dtype { SVDIT_FLOAT16 = 1, SVDIT_BFLOAT16 = 2 } svdit_dtype;

enum { SVDIT_PATTERN_FULL = 0, SVDIT_PATTERN_SKIP = 1 };
enum { SVDIT_MAX_TILE = 128 };  // tokens in a tile, at most

typedef struct svdit_problem {
  int32_t dtype;  // svdit_dtype
  int32_t batch;
  int32_t tokens;
  int32_t heads;
  int32_t head_dim;  // 64 or 128
  int32_t text_tokens;
  int32_t text_first;  // 1: text tokens come before the video tokens
  float scale;         // positive; softmax(scale * Q K^T) V
  int32_t num_tiles;
  int32_t num_patterns;
  int32_t num_stages;
  int32_t num_items;
  int32_t num_entries;
} svdit_problem;

typedef struct svdit_tables {
  const int32_t *stage;
  const int32_t *text_len;
  const int32_t *head_pattern;
  const int32_t *tile_offsets;
  const int32_t *row_offsets;
  const int32_t *tile_index;
  const int32_t *work_order;
} svdit_tables;

// Checks the numbers of a problem. On failure writes "subject: got X; expected Y; next step" to message.
svdit_status svdit_check_problem(const svdit_problem *problem, char *message, size_t message_size);

// Checks the contents of all tables but stage and text_len, which may be null. All pointers are host
// memory here. Costs time linear in the tables; meant for once at load, not for every launch.
svdit_status svdit_check_tables(const svdit_problem *problem, const svdit_tables *host_tables, char *message,
                                size_t message_size);

// The key blocks that the kernel visits for one work item, in order: rows [starts[i], starts[i] +
// lengths[i]). Host memory; exists so that tests can compare the kernel's index arithmetic with a formula.
// Returns the number of blocks, also beyond capacity, or -1 for a null pointer, stage or item out of range.
int32_t svdit_item_blocks(const svdit_problem *problem, const svdit_tables *host_tables, int32_t stage,
                          int32_t text_len, int32_t item, int32_t capacity, int32_t *starts, int32_t *lengths);

#ifdef __cplusplus
}
#endif

#endif  // SVDIT_PROBLEM_H_
