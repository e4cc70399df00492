// Sums of products in the processor's matrix unit (AMX): 16 rows of W and 16 of x at once, pairs of bf16 summed in fp32.
//
// Legend: M rows of x, N rows of W, K columns of both. A step is 32 columns, a group 16 rows of x, a strip 16 rows of W.
// A tile of W is a step of a strip as it lies; one of x has, for each pair of columns, those of a group side by side.
// The instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS.

#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "vectors.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)  // the last: operands are kept in bf16
#define FASTLLAMA_UNIT

#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t kGroup = 16, kStrip = 16, kStepColumns = 32;
constexpr int kSummedGroups = 4;     // whose sums are kept while a strip passes
constexpr int64_t kTileUnits = 256;  // of 32 bits: what a whole tile holds, pairs or sums
constexpr int64_t kTileRow = 64;     // bytes

// Whether the system lets this process use the unit: Linux keeps its registers for those who have asked.
inline bool has_unit() {
  static const bool granted = [] {
    constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  }();
  return granted;
}

// What was written before is in memory when tiles are loaded, and at `read` as a whole when they are shaped: gcc does not
// know that these instructions read it.
inline void before_tiles(const void* read = nullptr) { asm volatile("" ::"r"(read) : "memory"); }

struct TileShape {
  int64_t rows, bytes;
};

// The unit for as long as this lives, in this thread.
class UnitInUse {
 public:
  explicit UnitInUse(const std::array<TileShape, 8>& tiles) {
    alignas(64) uint8_t shape[64] = {1};
    for (int t = 0; t < 8; ++t) shape[16 + 2 * t] = tiles[t].bytes, shape[48 + t] = tiles[t].rows;
    before_tiles(shape);
    _tile_loadconfig(shape);
  }
  ~UnitInUse() { _tile_release(); }
  UnitInUse(const UnitInUse&) = delete;
};

// Tile 4 is of what is multiplied; 0 to 3 are sums, `width` columns wide, and 5 to 7 the pairs that it is multiplied with.
constexpr std::array<TileShape, 8> summing(int64_t width) {
  const TileShape other{kGroup, 4 * width};
  return {other, other, other, other, TileShape{kGroup, kTileRow}, other, other, other};
}

// Memory in which tiles begin at a line.
class Tiles {
 public:
  float* of(int64_t units) {
    memory_.resize(std::max<size_t>(memory_.size(), units + kTileRow / 4));
    return (float*)(((uintptr_t)memory_.data() + kTileRow - 1) & ~(uintptr_t)(kTileRow - 1));
  }

 private:
  std::vector<float> memory_;
};

// x as the unit takes it: tiles [groups, steps]. Rows and columns that are missing are zero. Tiles of up to 8 rows are half
// as wide: they are read again for every strip.
class Paired {
 public:
  int64_t rows = 0, steps = 0, width = kGroup;

  void shape(int64_t M, int64_t K) {
    rows = M, steps = (K + kStepColumns - 1) / kStepColumns, width = M <= kGroup / 2 ? kGroup / 2 : kGroup;
    first_ = tiles_.of(groups() * steps * units());
  }
  int64_t groups() const { return (rows + kGroup - 1) / kGroup; }
  int64_t units() const { return kStepColumns / 2 * width; }  // of a tile
  const float* at(int64_t group) const { return first_ + group * steps * units(); }

  // One tile: from(m) tells where row m's columns of this step begin, of which there are `count`.
  template <typename From>
  void put(int64_t group, int64_t step, int64_t count, const From& from) {
    f32v pairs[kGroup];
    for (int64_t i = 0; i < kGroup; ++i) {
      pairs[i] = f32v{};
      const int64_t m = group * kGroup + i;
      if (m < rows) std::memcpy(&pairs[i], from(m), std::min(kStepColumns, count) * sizeof(at::BFloat16));
    }
    float* to = first_ + (group * steps + step) * units();
    if (width == kGroup) return transpose(pairs, to, kGroup);
    alignas(64) float whole[kTileUnits];
    transpose(pairs, whole, kGroup);
    for (int64_t u = 0; u < kGroup; ++u) std::copy(whole + u * kGroup, whole + u * kGroup + width, to + u * width);
  }

 private:
  Tiles tiles_;
  float* first_ = nullptr;
};

// A strip of W: where it begins, and bytes to the next row and the next step.
struct Strip {
  const char* at;
  int64_t row, step;
};

// Rows n .. n + 15 of W [N, K] with zeros for what is missing, in `memory`.
inline Strip padded(const at::BFloat16* w, int64_t N, int64_t K, int64_t n, Tiles& memory) {
  const int64_t steps = (K + kStepColumns - 1) / kStepColumns;
  char* to = (char*)memory.of(steps * kTileUnits);
  std::memset(to, 0, steps * kStrip * kTileRow);
  for (int64_t r = 0; r < std::min(kStrip, N - n); ++r)
    for (int64_t k = 0; k < K; k += kStepColumns)
      std::memcpy(to + (k / kStepColumns * kStrip + r) * kTileRow, w + (n + r) * K + k, std::min(kStepColumns, K - k) * 2);
  return {to, kTileRow, kStrip * kTileRow};
}

// sums [G groups, 16 rows of W, width] of a strip and G groups of x, from `first` on. Meanwhile it asks for the next strip,
// row by row: as one stream of that memory, 16 to 18 GB/s were read where this reads 19 to 23.
template <int G>
inline void sum_groups(const Strip& w, const Paired& x, int64_t first, float* sums) {
  static_assert(G <= kSummedGroups);
  const int64_t row = 4 * x.width, next = x.steps * x.units();
  before_tiles();
  _tile_zero(0);
  if constexpr (G > 1) _tile_zero(1);
  if constexpr (G > 2) _tile_zero(2);
  if constexpr (G > 3) _tile_zero(3);
  const float* from = x.at(first);
  const char* at = w.at;
  for (int64_t s = 0; s < x.steps; ++s, at += w.step, from += x.units()) {
#pragma GCC unroll 16
    for (int64_t r = 0; r < kStrip; ++r) __builtin_prefetch(at + (kStrip + r) * w.row, 0, 2);
    _tile_loadd(4, at, w.row);
    _tile_loadd(5, from, row);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (G > 1) {
      _tile_loadd(6, from + next, row);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (G > 2) {
      _tile_loadd(7, from + 2 * next, row);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (G > 3) {
      _tile_loadd(5, from + 3 * next, row);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, sums, row);
  if constexpr (G > 1) _tile_stored(1, sums + kTileUnits, row);
  if constexpr (G > 2) _tile_stored(2, sums + 2 * kTileUnits, row);
  if constexpr (G > 3) _tile_stored(3, sums + 3 * kTileUnits, row);
}

}  // namespace

#endif
