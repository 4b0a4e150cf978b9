// From the key tiles of a list to the 128-row blocks that the kernel multiplies.
//
// Tiles that follow each other in a list are usually neighbours in the sequence too. Their rows form one
// run, and a run is cut into blocks of 128 rows whatever the tile borders inside it, so that short border
// tiles cost their rows and not a whole block each. Only the last block of a run may be short. The same code
// runs on the device (producer warp) and on the host (svdit_item_blocks).
#pragma once

#include "svdit/problem.h"

#ifdef __CUDACC__
#define SVDIT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SVDIT_HOST_DEVICE inline
#endif

namespace svdit {

constexpr int kBlockRows = 128;

struct Rows {
  int begin;
  int end;
};

// Cuts the rows of one tile (or of any range that does not straddle text and video) to the valid text length.
SVDIT_HOST_DEVICE Rows clip_text(Rows rows, int tokens, int text_tokens, bool text_first, int text_len) {
  if (text_first) {
    if (rows.end <= text_tokens && rows.end > text_len) rows.end = text_len;
  } else {
    const int end = tokens - text_tokens + text_len;
    if (rows.end > end) rows.end = end;
  }
  return rows;
}

// Collects row ranges and hands out blocks. For each range in turn: pop() while it returns true, then push(); at the end
// pop() with no range.
class BlockStream {
 public:
  SVDIT_HOST_DEVICE BlockStream() : begin_(0), end_(0) {}

  // Whether a block comes before the rows of following, or, at_end, before nothing.
  SVDIT_HOST_DEVICE bool pop(Rows following, bool at_end, Rows &block) {
    const int rows = end_ - begin_;
    if (rows == 0 || (!at_end && following.end <= following.begin)) return false;
    if (rows <= kBlockRows && !at_end && following.begin == end_) return false;
    block.begin = begin_;
    begin_ = rows > kBlockRows ? begin_ + kBlockRows : end_;
    block.end = begin_;
    return true;
  }

  SVDIT_HOST_DEVICE void push(Rows rows) {
    if (rows.end <= rows.begin) return;
    if (begin_ == end_) begin_ = rows.begin;
    end_ = rows.end;
  }

  // Whether the block that was popped at the end is the last one.
  SVDIT_HOST_DEVICE bool is_empty() const { return begin_ == end_; }

 private:
  int begin_;
  int end_;
};

// A full head attends to all valid rows. They are handed out as this many ranges: the text in front, the
// bulk, and a tail of kTailRows that tells the producer that the end is near.
constexpr int kFullRanges = 3;
constexpr int kTailRows = 5 * kBlockRows;

SVDIT_HOST_DEVICE Rows full_range(int range, int tokens, int text_tokens, bool text_first, int text_len) {
  if (range == 0) return Rows{0, text_first ? text_len : 0};
  const int begin = text_first ? text_tokens : 0;
  const int end = text_first ? tokens : tokens - text_tokens + text_len;
  const int tail = end - begin > kTailRows ? end - kTailRows : begin;
  return range == 1 ? Rows{begin, tail} : Rows{tail, end};
}

}  // namespace svdit
