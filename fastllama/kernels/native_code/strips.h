// The order in which attention reads a head's positions, and what it asks memory for meanwhile.
//
// Legend: D head dim, S cached positions. A strip is 16 positions that lie together, a block four strips.

#pragma once

#include "attend.h"

namespace {

constexpr int kStripPositions = 16, kStrips = kBlock / kStripPositions;

// Which positions a block has. Where they are read in parts, and as long as every row sees all of them, each strip is in a
// part of its own. The rest are as they lie.
struct Order {
  int64_t begin, end, whole;  // whole: blocks whose strips are in parts

  Order(bool in_parts, int64_t begin, int64_t end, const int64_t* seen, int R) : begin(begin), end(end) {
    const int64_t everyone = std::min(end, *std::min_element(seen, seen + R));
    whole = in_parts ? std::max<int64_t>(0, everyone - begin) / kBlock : 0;
  }
  int64_t blocks() const { return whole + (end - begin - whole * kBlock + kBlock - 1) / kBlock; }
  int64_t first(int64_t block) const { return begin + block * (block < whole ? kStripPositions : kBlock); }
  int64_t apart(int64_t block) const { return (block < whole ? whole : 1) * kStripPositions; }
  int count(int64_t block) const { return (int)std::min<int64_t>(kBlock, end - begin - block * kBlock); }
  // Of a block's positions, those that row r sees.
  int64_t visible(int64_t block, int64_t seen) const {
    return block < whole ? kBlock : std::min<int64_t>(count(block), seen - first(block));
  }
};

// Where the strips of a block of keys or of values begin.
template <typename T>
struct Strips {
  const T* at[kStrips];
};

template <typename T, int D, typename Source>
inline Strips<T> strips_of(const Source& source, const Order& order, int64_t block) {
  const T* from = source.block(order.first(block), order.count(block));
  Strips<T> strips;
  for (int i = 0; i < kStrips; ++i) strips.at[i] = from + i * order.apart(block) * D;
  return strips;
}

// What a block needs of memory: `each` bytes a position, a line of each strip in turn where those are in parts.
struct Next {
  const char* at[kStrips] = {};  // null where there is no such block
  int64_t each = 0;
  bool in_turn = false;

  template <typename Source>
  Next(const Source& source, const Order& order, int64_t block) {
    if (block >= order.blocks()) return;
    const Ahead ahead = source.ahead(order.first(block), order.end);
    each = ahead.each, in_turn = block < order.whole;
    for (int i = 0; i < kStrips; ++i) at[i] = ahead.at + i * order.apart(block) * each;
  }
  // For a block's positions first .. end - 1. Inlined: a call that changes nothing is left out by the compiler.
  __attribute__((always_inline)) void ask(int64_t first, int64_t end) const {
    if (!at[0]) return;
    for (int64_t byte = first * each; byte < end * each; byte += kLine) {
      const int64_t line = byte / kLine;
      __builtin_prefetch(in_turn ? at[line % kStrips] + line / kStrips * kLine : at[0] + byte, 0, kNextCache);
    }
  }
};

}  // namespace
