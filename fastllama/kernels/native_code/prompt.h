// Attention of a prompt, of a chunk of one, or of a step's tokens, to a cache that already holds them.
//
// Legend: B rows, Q query tokens, N query heads, K kv heads, G = N / K, D head dim, S cached positions.

#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include "rounding.h"
#include "rows.h"
#include "stored.h"

namespace {

constexpr int64_t kTaskRows = 128;  // query rows that share a packed block: its packing is then lost among the products

// How tensors lie: strides in numbers between rows of the batch, tokens (or positions) and heads. D is contiguous.
template <typename T>
struct Strided {
  T* data;
  int64_t row, token, head;
  T* at(int64_t b, int64_t t, int64_t h) const { return data + b * row + t * token + h * head; }
};

// visible(b, q) is how many positions a token sees, at least one.
template <typename T, typename Seen>
void attend_chunk(const Strided<const T>& query, const Side& keys, const Side& values, const Seen& visible,
                  const Strided<T>& out, int64_t B, int64_t Q, int64_t N, int64_t K, int64_t D,
                  float scale) {
  for_head_dim(D, [](auto) {});  // refuses others here: no exception may leave a team of threads
  const bool pairs = in_pairs<T>(D);
  const int64_t units_each = pairs ? D / 2 : D;
  const int64_t G = N / K, tokens = std::max<int64_t>(1, kTaskRows / G), chunks = (Q + tokens - 1) / tokens;
  const int64_t rows = std::min(tokens, Q) * G, tasks = B * K * chunks, threads = at::get_num_threads();
  int64_t longest = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t q = 0; q < Q; ++q) longest = std::max(longest, visible(b, q));
  // Where tasks are too few for the threads, their positions are cut too.
  const bool enough = tasks % threads == 0 || tasks >= 4 * threads;
  const int64_t shares = enough ? 1 : std::clamp<int64_t>(longest / (4 * kBlock), 1, std::min<int64_t>(threads, kShares));
  std::vector<float> maximum(tasks * shares * rows * (shares > 1)), total(maximum.size()), mixed(maximum.size() * D);
  const Partial all{maximum.data(), total.data(), mixed.data()};
  struct Task {
    int64_t first, b, k, count;
  };
  // The last tokens see most, so their tasks come first.
  auto task_of = [&](int64_t task) {
    const int64_t first = (chunks - 1 - task / (B * K)) * tokens;
    return Task{first, task % (B * K) / K, task % K, std::min(tokens, Q - first)};
  };
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> units(rows * units_each), own_maximum(rows), own_total(rows), own_mixed(rows * D);
    std::vector<int64_t> seen(rows);
#pragma omp for schedule(dynamic)
    for (int64_t work = 0; work < tasks * shares; ++work) {
      const auto [first, b, k, count] = task_of(work / shares);
      const int64_t R = count * G, share = work % shares, at = work * rows;
      for (int64_t r = 0; r < R; ++r) {
        const int64_t q = first + r / G;
        const T* from = query.at(b, q, k * G + r % G);
        if (pairs) std::memcpy(&units[r * units_each], from, D * sizeof(T));
        else std::copy(from, from + D, &units[r * units_each]);
        seen[r] = visible(b, q);
      }
      const int64_t used = *std::max_element(seen.begin(), seen.begin() + R), blocks = (used + kBlock - 1) / kBlock;
      const int64_t begin = std::min(used, blocks * share / shares * kBlock);
      const int64_t end = std::min(used, blocks * (share + 1) / shares * kBlock);
      const Partial one{own_maximum.data(), own_total.data(), own_mixed.data()};
      const Partial cut{all.maximum + at, all.total + at, all.mixed + at * D};
      const Partial& partial = shares > 1 ? cut : one;
      attend_head<T>(D, units.data(), scale, keys.at(b, k), values.at(b, k), begin, end, seen.data(), (int)R, partial);
      if (shares > 1) continue;
      for (int64_t r = 0; r < R; ++r) {
        T* to = out.at(b, first + r / G, k * G + r % G);
        for (int64_t d = 0; d < D; ++d) to[d] = T(own_mixed[r * D + d] / own_total[r]);
      }
    }
#pragma omp for
    for (int64_t task = 0; task < (shares > 1 ? tasks : 0); ++task) {
      const auto [first, b, k, count] = task_of(task);
      for (int64_t r = 0; r < count * G; ++r) {
        T* to = out.at(b, first + r / G, k * G + r % G);
        join(all, task * shares * rows + r, rows, shares, D,
             [&](int64_t d, f32v values) { put_rounded_if_number<T>(values, to + d); });
      }
    }
  }
}

}  // namespace
