// attend_head for the dtype of the file that includes this: each is a file of its own, so that they are built together.

#pragma once

#include "group.h"

namespace fastllama {

template <typename T>
void attend_head(int64_t D, const float* units, float scale, const Run& keys, const Run& values, int64_t begin, int64_t end,
                 const int64_t* seen, int R, const Partial& out) {
  for_head_dim(D, [&](auto v) {
    constexpr int V = decltype(v)::value;
    with_blocks<T, V>(keys, values, [&](auto number, const auto& key, const auto& value) {
      attend_group<decltype(number), V>(units, scale, key, value, begin, end, seen, R, out);
    });
  });
}

}  // namespace fastllama
