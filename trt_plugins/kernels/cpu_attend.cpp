// Attention of a few hundred query rows on one core: online softmax over blocks of kept keys.
//
// Queries lie along vector lanes, in panels of 16. Scores S^T [keys, 16] and results O^T [D, 16] are then made by the
// same kind of register tile (6 rows by 16 lanes, one broadcast of K or V for two multiply-adds), S^T is the packed
// operand of the second product as it stands, and maxima and sums over keys need no operation across lanes.
//
//   qt   [panels][D][16]   queries, times scale * log2(e)
//   ot   [panels][D][16]   results so far, not divided by the sums yet
//   kb   [keys][D]         a block of kept keys, gathered
//   vb   [D / 16][keys][16]  their values
//   st   [keys][16]        scores of one panel, then their exponentials
//
// A panel's qt, ot and st stay in the first-level cache, kb and vb in the second.
#include "cpu_attend.h"

#include <string.h>

#ifndef SVDIT_CPU_ENTRY
#define SVDIT_CPU_ENTRY cpu_attend_baseline
#endif
#define SVDIT_INLINE inline __attribute__((always_inline))

namespace svdit {
namespace {

typedef float Vec __attribute__((vector_size(32)));
typedef int32_t IntVec __attribute__((vector_size(32)));
typedef float VecAnywhere __attribute__((vector_size(32), aligned(4)));

constexpr int kLanes = 8;
constexpr int kPanel = 2 * kLanes;
constexpr int kTile = 6;  // rows of a register tile: 12 accumulators of 16 registers
constexpr float kLog2e = 1.44269504088896341f;

constexpr int padded(int head_dim) { return (head_dim + 15) / 16 * 16; }
constexpr int at_least(int value, int low) { return value < low ? low : value; }
constexpr int key_rows(int width) { return at_least(12288 / width / kTile * kTile, 2 * kTile); }
constexpr int query_rows(int width) { return at_least(16384 / width / kPanel * kPanel, kPanel); }

SVDIT_INLINE Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x}; }
SVDIT_INLINE Vec load(const float *p) { return *reinterpret_cast<const Vec *>(p); }
SVDIT_INLINE void store(float *p, Vec x) { *reinterpret_cast<Vec *>(p) = x; }
SVDIT_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// 2**x for x <= 0, relative error below 2e-7; x below -126 counts as -126, NaN stays NaN.
SVDIT_INLINE Vec exp2_of(Vec x) {
  const Vec low = splat(-126.0f);
  x = x < low ? low : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer in the low bits
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = splat(1.3333558146428443e-3f);
  p = p * f + splat(9.6181291076284772e-3f);
  p = p * f + splat(5.5504108664821580e-2f);
  p = p * f + splat(2.4022650695910071e-1f);
  p = p * f + splat(6.9314718055994531e-1f);
  p = p * f + splat(1.0f);
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + (reinterpret_cast<IntVec>(shifted) << 23));
}

float float_of(uint16_t bits, CpuType type) {
  float value;
  if (type == CpuType::kBfloat16) {
    const uint32_t wide = uint32_t(bits) << 16;
    memcpy(&value, &wide, 4);
    return value;
  }
  // Half: move exponent and fraction into place, then scale by 2**112; infinities and NaN by hand.
  uint32_t wide = uint32_t(bits & 0x7fff) << 13;
  if ((bits & 0x7c00) == 0x7c00) {
    wide |= 0x7f800000u;
    memcpy(&value, &wide, 4);
  } else {
    memcpy(&value, &wide, 4);
    value *= 5.192296858534828e33f;
  }
  return bits & 0x8000 ? -value : value;
}

// To nearest, ties to even.
uint16_t bits_of(float value, CpuType type) {
  uint32_t wide;
  memcpy(&wide, &value, 4);
  const uint32_t sign = wide >> 16 & 0x8000;
  if (value != value) return uint16_t(sign | (type == CpuType::kBfloat16 ? 0x7fc0 : 0x7e00));
  if (type == CpuType::kBfloat16) return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  wide &= 0x7fffffff;
  if (wide >= 0x47800000) return uint16_t(sign | 0x7c00);  // 65536 and more
  if (wide < 0x38800000) {                                 // subnormal: let an addition round
    float small;
    memcpy(&small, &wide, 4);
    small += 0.5f;
    memcpy(&wide, &small, 4);
    return uint16_t(sign | (wide - 0x3f000000));
  }
  wide += 0xc8000000u + 0xfff + (wide >> 13 & 1);
  return uint16_t(sign | wide >> 13);
}

SVDIT_INLINE void read_row(const CpuAttend &call, const void *base, int token, int width, float *row) {
  const int64_t first = int64_t(token) * call.row_stride;
  if (call.type == CpuType::kFloat32) {
    memcpy(row, static_cast<const float *>(base) + first, size_t(call.head_dim) * 4);
  } else {
    const uint16_t *from = static_cast<const uint16_t *>(base) + first;
    for (int d = 0; d < call.head_dim; ++d) row[d] = float_of(from[d], call.type);
  }
  for (int d = call.head_dim; d < width; ++d) row[d] = 0.0f;
}

SVDIT_INLINE void write_row(const CpuAttend &call, int token, const float *row) {
  const int64_t first = int64_t(token) * call.row_stride;
  if (call.type == CpuType::kFloat32) {
    memcpy(static_cast<float *>(call.o) + first, row, size_t(call.head_dim) * 4);
  } else {
    uint16_t *to = static_cast<uint16_t *>(call.o) + first;
    for (int d = 0; d < call.head_dim; ++d) to[d] = bits_of(row[d], call.type);
  }
}

// kRows keys against a panel: st[r][lane] = sum over d of kb[r][d] qt[d][lane]; top becomes the maximum.
template <int kRows>
SVDIT_INLINE void scores(const float *kb, const float *qt, int width, float *st, Vec (&top)[2]) {
  Vec acc[kRows][2] = {};
  for (int d = 0; d < width; ++d) {
    const Vec q0 = load(qt + d * kPanel), q1 = load(qt + d * kPanel + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec k = splat(kb[r * width + d]);
      acc[r][0] += k * q0;
      acc[r][1] += k * q1;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    top[0] = larger(acc[r][0], top[0]);
    top[1] = larger(acc[r][1], top[1]);
    store(st + r * kPanel, acc[r][0]);
    store(st + r * kPanel + kLanes, acc[r][1]);
  }
}

// kRows dimensions of a panel: ot[r][lane] = ot[r][lane] keep[lane] + sum over keys of vb[key][r] st[key][lane].
template <int kRows>
SVDIT_INLINE void weigh(const float *vb, const float *st, int keys, const Vec (&keep)[2], float *ot) {
  Vec acc[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    acc[r][0] = load(ot + r * kPanel) * keep[0];
    acc[r][1] = load(ot + r * kPanel + kLanes) * keep[1];
  }
  for (int j = 0; j < keys; ++j) {
    const Vec p0 = load(st + j * kPanel), p1 = load(st + j * kPanel + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec v = splat(vb[j * 16 + r]);
      acc[r][0] += v * p0;
      acc[r][1] += v * p1;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    store(ot + r * kPanel, acc[r][0]);
    store(ot + r * kPanel + kLanes, acc[r][1]);
  }
}

// kWidth: padded head size where it is known, so that addresses are constants; 0 where it is not.
template <int kWidth>
class Attend {
 public:
  Attend(const CpuAttend &call, float *scratch)
      : call_(call), width_(kWidth ? kWidth : padded(call.head_dim)), key_rows_(key_rows(width_)) {
    const int rows = query_rows(width_);
    qt_ = scratch;
    ot_ = qt_ + rows * width_;
    kb_ = ot_ + rows * width_;
    vb_ = kb_ + key_rows_ * width_;
    st_ = vb_ + key_rows_ * width_;
    top_ = st_ + key_rows_ * kPanel;
    sum_ = top_ + rows;
    row_ = sum_ + rows;  // [16][width]
    panels_ = (call.num_queries + kPanel - 1) / kPanel;
  }

  void run() {
    read_queries();
    int held = 0;
    for (int i = 0; i < call_.num_ranges; ++i) {
      for (int token = call_.keys[i].begin; token < call_.keys[i].end; ++token) {
        read_key(token, held++);
        if (held == key_rows_) {
          block(held);
          held = 0;
        }
      }
    }
    if (held > 0) block(held);
    write_results();
  }

 private:
  int width() const { return kWidth ? kWidth : width_; }

  void read_queries() {
    const float factor = call_.scale * kLog2e;
    for (int i = 0; i < panels_ * kPanel; ++i) {
      const int last = call_.num_queries - 1;
      read_row(call_, call_.q, call_.queries[i < last ? i : last], width(), row_);
      float *to = qt_ + i / kPanel * (width() * kPanel) + i % kPanel;
      for (int d = 0; d < width(); ++d) to[d * kPanel] = row_[d] * factor;
      top_[i] = -__builtin_inff();
      sum_[i] = 0.0f;
    }
    memset(ot_, 0, sizeof(float) * panels_ * kPanel * width());
  }

  SVDIT_INLINE void read_key(int token, int at) {
    read_row(call_, call_.k, token, width(), kb_ + at * width());
    if (call_.type == CpuType::kFloat32 && call_.head_dim == width()) {
      const float *from = static_cast<const float *>(call_.v) + int64_t(token) * call_.row_stride;
      for (int d = 0; d < width(); d += 16) memcpy(vb_ + d * key_rows_ + at * 16, from + d, 64);
      return;
    }
    read_row(call_, call_.v, token, width(), row_);
    for (int d = 0; d < width(); d += 16) memcpy(vb_ + d * key_rows_ + at * 16, row_ + d, 64);
  }

  void block(int keys) {
    // The last register tile repeats the last key: its scores change no maximum and are not read again.
    for (int j = keys; j % kTile != 0; ++j) memcpy(kb_ + j * width(), kb_ + (keys - 1) * width(), sizeof(float) * width());
    for (int i = 0; i < panels_; ++i) panel(i, keys);
  }

  void panel(int index, int keys) {
    const float *qt = qt_ + index * (width() * kPanel);
    float *ot = ot_ + index * (width() * kPanel), *top_at = top_ + index * kPanel, *sum_at = sum_ + index * kPanel;
    const Vec before[2] = {load(top_at), load(top_at + kLanes)};
    Vec top[2] = {before[0], before[1]};
    for (int j = 0; j < keys; j += kTile) scores<kTile>(kb_ + j * width(), qt, width(), st_ + j * kPanel, top);
    Vec sum[2] = {};
    for (int j = 0; j < keys; ++j) {
      float *st = st_ + j * kPanel;
      const Vec p0 = exp2_of(load(st) - top[0]), p1 = exp2_of(load(st + kLanes) - top[1]);
      sum[0] += p0;
      sum[1] += p1;
      store(st, p0);
      store(st + kLanes, p1);
    }
    const Vec keep[2] = {exp2_of(before[0] - top[0]), exp2_of(before[1] - top[1])};
    for (int half = 0; half < 2; ++half) {
      store(sum_at + half * kLanes, load(sum_at + half * kLanes) * keep[half] + sum[half]);
      store(top_at + half * kLanes, top[half]);
    }
    for (int d = 0; d < width(); d += 16) {
      const float *vb = vb_ + d * key_rows_;
      weigh<6>(vb, st_, keys, keep, ot + d * kPanel);
      weigh<6>(vb + 6, st_, keys, keep, ot + (d + 6) * kPanel);
      weigh<4>(vb + 12, st_, keys, keep, ot + (d + 12) * kPanel);
    }
  }

  void write_results() {
    for (int i = 0; i < call_.num_queries; ++i) {
      const float *from = ot_ + i / kPanel * (width() * kPanel) + i % kPanel;
      // Without a key the sum is zero and so are the results.
      const float factor = sum_[i] == 0.0f ? 0.0f : 1.0f / sum_[i];
      for (int d = 0; d < width(); ++d) row_[d] = from[d * kPanel] * factor;
      write_row(call_, call_.queries[i], row_);
    }
  }

  const CpuAttend &call_;
  const int width_, key_rows_;
  int panels_;
  float *qt_, *ot_, *kb_, *vb_, *st_, *top_, *sum_, *row_;
};

}  // namespace

#ifdef SVDIT_CPU_SIZES
int32_t cpu_query_rows(int32_t head_dim) { return query_rows(padded(head_dim)); }

size_t cpu_scratch_size(int32_t head_dim) {
  const size_t width = padded(head_dim), keys = key_rows(padded(head_dim)), rows = query_rows(padded(head_dim));
  return sizeof(float) * (2 * rows * width + 2 * keys * width + keys * kPanel + 2 * rows + 16 * width);
}
#endif

void SVDIT_CPU_ENTRY(const CpuAttend &call, float *scratch) {
  switch (call.head_dim) {
    case 64: return Attend<64>(call, scratch).run();
    case 128: return Attend<128>(call, scratch).run();
    default: return Attend<0>(call, scratch).run();
  }
}

}  // namespace svdit
