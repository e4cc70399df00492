// Causal attention of a prompt, or of a chunk of one, to a cache that already holds it.
//
// Legend: B rows, Q query tokens, N query heads, K kv heads, G = N / K, D head dim, S cached positions.
// Past tokens come before the chunk; query token q sees past + q + 1 positions.

#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include "rows.h"

namespace {

constexpr int64_t kTaskRows = 128;  // query rows that share a packed block: its packing is then lost among the products

// How tensors lie: strides in numbers between rows of the batch, tokens (or positions) and heads. D is contiguous.
template <typename T>
struct Strided {
  T* data;
  int64_t row, token, head;
  T* at(int64_t b, int64_t t, int64_t h) const { return data + b * row + t * token + h * head; }
};

template <typename T, int V>
void attend_chunk(const Strided<const T>& query, const Strided<const T>& keys, const Strided<const T>& values,
                   const Strided<T>& out, int64_t B, int64_t Q, int64_t N, int64_t K, int64_t past, float scale) {
  constexpr int D = V * 16, kUnits = D / kNumbers<T, V>;
  const int64_t G = N / K, tokens = std::max<int64_t>(1, kTaskRows / G), chunks = (Q + tokens - 1) / tokens;
#pragma omp parallel num_threads(at::get_num_threads())
  {
    std::vector<float> units(tokens * G * kUnits), maximum(tokens * G), total(tokens * G), mixed(tokens * G * D);
    std::vector<int64_t> seen(tokens * G);
    const Partial partial{maximum.data(), total.data(), mixed.data()};
    // The last tokens see most, so their tasks come first.
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < B * K * chunks; ++task) {
      const int64_t first = (chunks - 1 - task / (B * K)) * tokens, b = task % (B * K) / K, k = task % K;
      const int64_t count = std::min(tokens, Q - first), R = count * G;
      for (int64_t r = 0; r < R; ++r) {
        const int64_t q = first + r / G;
        const T* from = query.at(b, q, k * G + r % G);
        if constexpr (kNumbers<T, V> == 2) std::memcpy(&units[r * kUnits], from, D * sizeof(T));
        else std::copy(from, from + D, &units[r * kUnits]);
        seen[r] = past + q + 1;
      }
      attend_rows<T, V>(units.data(), scale, keys.at(b, 0, k), values.at(b, 0, k), 0, past + first + count, seen.data(),
                        (int)R, partial);
      for (int64_t r = 0; r < R; ++r) {
        T* to = out.at(b, first + r / G, k * G + r % G);
        for (int64_t d = 0; d < D; ++d) to[d] = T(mixed[r * D + d] / total[r]);
      }
    }
  }
}

}  // namespace
