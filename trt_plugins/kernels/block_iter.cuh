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

// Collects row ranges and hands out blocks, always one behind, so that the last block is known as such.
// Emit is called as emit(first_row, rows, is_last).
class BlockStream {
 public:
  SVDIT_HOST_DEVICE BlockStream() : begin_(0), end_(0) {}

  template <typename Emit>
  SVDIT_HOST_DEVICE void push(Rows rows, Emit &&emit) {
    if (rows.end <= rows.begin) return;
    if (rows.begin != end_) {
      if (end_ > begin_) emit(begin_, end_ - begin_, false);
      begin_ = rows.begin;
    }
    end_ = rows.end;
    while (end_ - begin_ > kBlockRows) {
      emit(begin_, kBlockRows, false);
      begin_ += kBlockRows;
    }
  }

  // Returns false when no row was pushed, so that nothing was emitted.
  template <typename Emit>
  SVDIT_HOST_DEVICE bool finish(Emit &&emit) {
    if (end_ <= begin_) return false;
    emit(begin_, end_ - begin_, true);
    return true;
  }

  SVDIT_HOST_DEVICE int pending_rows() const { return end_ - begin_; }

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
