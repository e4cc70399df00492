// A whole decode step of a Llama in one call: embedding, blocks, final norm and head, by one team of threads.
//
// Legend: B rows of the cache, Q new tokens a row, M = B Q, E hidden size, D head dim, S positions, T the model's dtype.
// The hidden state, sums and softmax are fp32; what enters a product is rounded to T, as the model's own tensors are.
// The specification is fastllama.model.forward.step.

#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include "barrier.h"
#include "quantise.h"
#include "rounding.h"
#include "small_expand.h"
#include "small_operand.h"

namespace {

struct Sizes {
  int64_t heads, kv_heads, dim, batch, positions;
  float scale;
};

// A matrix as it lies: in T, or in few bits.
template <typename T>
struct Weight {
  Matrix<T> plain{};
  SmallMatrix small{};
  int64_t N = 0, K = 0;
};

template <typename T>
struct Layer {
  Weight<T> qkv, o, gate_up, down;
  const T* input_norm;
  const T* post_norm;
  float input_eps, post_eps;
  Side keys, values;
};

struct Share {
  int64_t begin, end;
};

// Thread t's part of N, in whole tiles.
inline Share share(int64_t N, int t, int threads, int64_t tile = kTile) {
  const int64_t tiles = (N + tile - 1) / tile;
  return {std::min(N, tiles * t / threads * tile), std::min(N, tiles * (t + 1) / threads * tile)};
}

template <typename T>
class Decoder {
 public:
  Sizes sizes;
  std::vector<Layer<T>> layers;
  Weight<T> head, embedding;
  const T* norm;
  float eps;
  const T* cos;  // [S, D]
  const T* sin;  // [S, D], its first half negated
  T* mask;       // [B, S], or null
  int64_t* valid_past_index;
  const int64_t* offset;  // [B], by which a row's positions are below its tokens' places in the cache; or null

  // Appends ids [B, Q]; writes logits [B, Q, V].
  void run(const int64_t* ids, int64_t Q, T* logits) {
    reserve(Q);
    const int64_t M = sizes.batch * Q;
#pragma omp parallel num_threads(at::get_num_threads())
    {
      const int t = omp_get_thread_num(), n = omp_get_num_threads();
#pragma omp for nowait
      for (int64_t m = 0; m < M; ++m) {
        if (embedding.small.quants) {
          expand_row(embedding.small, ids[m], embedded_.data() + m * E_);
          for (int64_t e = 0; e < E_; ++e) hidden_[m * E_ + e] = float(embedded_[m * E_ + e]);
          continue;
        }
        const T* row = embedding.plain.weight + ids[m] * E_;
        for (int64_t e = 0; e < E_; ++e) hidden_[m * E_ + e] = float(row[e]);
      }
      barrier_->wait(n);
      for (const Layer<T>& layer : layers) {
        normalise(M, layer.input_norm, layer.input_eps, n);
        team(x_, layer.qkv, t, n, [&](int64_t m, int64_t i, float y) { qkv_[m * layer.qkv.N + i] = y; });
        barrier_->wait(n);
        rotate_and_store(layer, M, Q, n);
        attention(layer, M, Q, n);
        team(attended_, layer.o, t, n, [&](int64_t m, int64_t i, float y) { hidden_[m * E_ + i] += y; });
        barrier_->wait(n);
        normalise(M, layer.post_norm, layer.post_eps, n);
        team(x_, layer.gate_up, t, n, [&](int64_t m, int64_t i, float y) { gate_up_[m * layer.gate_up.N + i] = y; });
        barrier_->wait(n);
        activate(M, layer.down.K, t, n);
        team(inner_, layer.down, t, n, [&](int64_t m, int64_t i, float y) { hidden_[m * E_ + i] += y; });
        barrier_->wait(n);
      }
      normalise(M, norm, eps, n);
      team(x_, head, t, n, [&](int64_t m, int64_t i, float y) { logits[m * head.N + i] = T(y); });
    }
    for (int64_t b = 0; b < sizes.batch; ++b) {
      for (int64_t q = 0; mask && q < Q; ++q) mask[b * sizes.positions + valid_past_index[b] + q] = T(0.f);
      valid_past_index[b] += Q;
    }
  }

 private:
  int64_t E_ = 0, rows_ = 0, chunks_ = 1;
  std::vector<float> hidden_, qkv_, gate_up_, query_, maximum_, total_, mixed_;
  std::vector<T> embedded_;
  std::vector<T> query_rounded_;  // the same numbers, for processors that multiply T in pairs
  std::vector<int64_t> seen_;
  Operand<T> x_, attended_, inner_;
  std::unique_ptr<Barrier> barrier_ = std::make_unique<Barrier>();

  void reserve(int64_t Q) {
    const int64_t M = sizes.batch * Q, groups = sizes.batch * sizes.kv_heads;
    E_ = head.K;
    int64_t longest = 0;
    for (int64_t b = 0; b < sizes.batch; ++b) longest = std::max(longest, valid_past_index[b] + Q);
    // A kv head is a task of its own; where that leaves threads idle, its positions are cut too.
    const int64_t threads = at::get_num_threads();
    chunks_ = groups % threads == 0 ? 1 : std::clamp<int64_t>(longest / (4 * kBlock), 1, std::min<int64_t>(threads, kShares));
    const int64_t partials = M * sizes.heads * chunks_;
    maximum_.resize(std::max<size_t>(maximum_.size(), partials));
    total_.resize(std::max<size_t>(total_.size(), partials));
    mixed_.resize(std::max<size_t>(mixed_.size(), partials * sizes.dim));
    if (rows_ == M) return;
    rows_ = M;
    hidden_.resize(M * E_);
    if (embedding.small.quants) embedded_.resize(M * E_);
    query_.resize(M * sizes.heads * sizes.dim);
    query_rounded_.resize(query_.size());
    seen_.resize(M * sizes.heads);
    qkv_.resize(M * layers[0].qkv.N);
    gate_up_.resize(M * layers[0].gate_up.N);
    x_.shape(M, E_);
    attended_.shape(M, layers[0].o.K);
    inner_.shape(M, layers[0].down.K);
  }

  template <typename Emit>
  static void team(const Operand<T>& x, const Weight<T>& weight, int t, int n, const Emit& emit) {
    if (!weight.small.quants) {
      const Share part = share(weight.N, t, n, x.rows > 1 ? kChunk : kTile);
      return multiply(x, weight.plain, part.begin, part.end, emit);
    }
    // Each thread for itself: that takes less than waiting for one another would.
    thread_local SmallOperand operand;
    operand.shape<T>(weight.small, x.rows);
    for (int64_t m = 0; m < x.rows; ++m) operand.put(m, [&](int64_t k) { return x.at(m, k); });
    const Share part = share(weight.small.tiles(), t, n, 1);
    operand.multiply(weight.small, part.begin, part.end, emit);
  }

  // x = weight * T(hidden / rms(hidden)); ends with a barrier.
  void normalise(int64_t M, const T* weight, float epsilon, int n) {
#pragma omp for nowait
    for (int64_t m = 0; m < M; ++m) {
      const float* row = hidden_.data() + m * E_;
      float squares = 0;
      for (int64_t e = 0; e < E_; ++e) squares += row[e] * row[e];
      const float factor = 1.f / std::sqrt(squares / E_ + epsilon);
      x_.blocks(m, [&](int64_t k, int64_t count, auto* to) {
        int64_t e = 0;
        for (; e + kVector <= count; e += kVector)
          put_rounded_if_number<T>(rounded_if_number<T>(load(row + k + e) * factor) * widened(weight + k + e), to + e);
        for (; e < count; ++e) to[e] = T(float(T(row[k + e] * factor)) * float(weight[k + e]));
      });
    }
    barrier_->wait(n);
  }

  // Rotates queries and keys, writes keys and values to the cache; ends with a barrier.
  void rotate_and_store(const Layer<T>& layer, int64_t M, int64_t Q, int n) {
    const int64_t D = sizes.dim, N = sizes.heads, K = sizes.kv_heads, G = N / K, half = D / 2;
#pragma omp for nowait
    for (int64_t task = 0; task < M * (N + 2 * K); ++task) {
      const int64_t m = task / (N + 2 * K), h = task % (N + 2 * K), b = m / Q, q = m % Q;
      const int64_t position = valid_past_index[b] + q;
      const float* from = qkv_.data() + m * layer.qkv.N + h * D;
      const int64_t turn = (position - (offset ? offset[b] : 0)) * D;
      const T* c = cos + turn;
      const T* s = sin + turn;
      auto rotated = [&](int64_t d) { return from[d] * float(c[d]) + from[d < half ? d + half : d - half] * float(s[d]); };
      auto rotated_vector = [&](int64_t d) {
        return load(from + d) * widened(c + d) + load(from + (d < half ? d + half : d - half)) * widened(s + d);
      };
      const int64_t in_vectors = half % kVector == 0 ? D : 0;  // none of which is cut by the middle
      if (h < N) {  // row (q, head in the group) of the kv head
        const int64_t row = (b * K + h / G) * G * Q + (h % G) * Q + q;
        float* wide = &query_[row * D];
        T* narrow = &query_rounded_[row * D];
        for (int64_t d = 0; d < in_vectors; d += kVector) {
          const f32v y = rounded_if_number<T>(rotated_vector(d));
          store(wide + d, y);
          put_rounded(y, narrow + d);
        }
        for (int64_t d = in_vectors; d < D; ++d) wide[d] = float(narrow[d] = T(rotated(d)));
        seen_[row] = position + 1;
      } else {
        const bool is_key = h < N + K;
        Run run = is_key ? layer.keys.at(b, h - N) : layer.values.at(b, h - N - K);
        auto write = [&](auto* to) {
          for (int64_t d = 0; d < in_vectors; d += kVector)
            put_rounded_if_number<T>(is_key ? rotated_vector(d) : load(from + d), to + d);
          for (int64_t d = in_vectors; d < D; ++d) to[d] = T(is_key ? rotated(d) : from[d]);
        };
        if (run.format == kFormatOf<T>) {
          write(run.at<T>(0, position));
        } else {
          float numbers[kMostDims];
          write(numbers);
          quantise<T>(numbers, (int)D, run, position);
        }
      }
    }
    barrier_->wait(n);
  }

  // Each kv head over its share of positions, then the shares joined into the next product's x; ends with a barrier.
  void attention(const Layer<T>& layer, int64_t M, int64_t Q, int n) {
    const int64_t D = sizes.dim, K = sizes.kv_heads, G = sizes.heads / K, R = G * Q;
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < sizes.batch * K * chunks_; ++task) {
      const int64_t pair = task / chunks_, chunk = task % chunks_, b = pair / K;
      const int64_t used = valid_past_index[b] + Q, blocks = (used + kBlock - 1) / kBlock;
      const int64_t begin = std::min(used, blocks * chunk / chunks_ * kBlock);
      const int64_t end = std::min(used, blocks * (chunk + 1) / chunks_ * kBlock);
      const Partial out{&maximum_[task * R], &total_[task * R], &mixed_[task * R * D]};
      const Run keys = layer.keys.at(b, pair % K), values = layer.values.at(b, pair % K);
      const float* units = in_pairs<T>(D) ? (const float*)(query_rounded_.data() + pair * R * D) : query_.data() + pair * R * D;
      attend_head<T>(D, units, sizes.scale, keys, values, begin, end, seen_.data() + pair * R, (int)R, out);
    }
    barrier_->wait(n);
#pragma omp for nowait
    for (int64_t task = 0; task < M * sizes.heads; ++task) {
      const int64_t m = task / sizes.heads, h = task % sizes.heads, b = m / Q, q = m % Q;
      const int64_t pair = b * K + h / G, row = (h % G) * Q + q;
      join({maximum_.data(), total_.data(), mixed_.data()}, pair * chunks_ * R + row, R, chunks_, D,
           [&](int64_t d, f32v values) { put_rounded_if_number<T>(values, attended_.at(m, h * D + d)); });
    }
    barrier_->wait(n);
  }

  // inner = silu(gate) * up; ends with a barrier.
  void activate(int64_t M, int64_t I, int t, int n) {
    const Share part = share(I, t, n);
    for (int64_t m = 0; m < M; ++m) {
      const float* gate = gate_up_.data() + m * 2 * I;
      inner_.blocks(m, [&](int64_t k, int64_t count, auto* to) {
        const int64_t from = std::max(part.begin, k), end = std::min(part.end, k + count);
        int64_t i = from;
        for (; i + kVector <= end; i += kVector) {
          const f32v g = load(gate + i), up = load(gate + I + i);
          const f32v e = exp_of(g < 0 ? g : -g);
          put_rounded_if_number<T>(g * up * (g < 0 ? e : all(1.f)) / (1.f + e), to + i - k);
        }
        for (; i < end; ++i) to[i - k] = T(gate[i] / (1.f + std::exp(-gate[i])) * gate[I + i]);
      });
    }
    barrier_->wait(n);
  }
};

}  // namespace
