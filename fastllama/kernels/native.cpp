// fastllama::linear_rows: y = x W^T + b for few rows of x, at the speed at which memory gives W.
//
// Legend: M rows of x, N rows of W, K columns of both. W is read once, as it lies; x is small and stays in the cache.
// Sums are kept in fp32. The specification is torch.nn.functional.linear in fp32.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));

constexpr int64_t kLine = 64;             // bytes that memory moves at once
constexpr int64_t kAhead = 2048;          // bytes that a single stream is asked for in advance
constexpr int64_t kNear = 32768;          // bytes of x that a block of columns may take: they stay in the first cache
constexpr int64_t kGrain = 16384;         // multiplications that are worth a thread
constexpr int kTile = 4;                  // rows of W in a tile
constexpr int kWide = 6;                  // rows of x in a tile: 24 sums and 4 weights fit the 32 registers
constexpr int64_t kChunk = 32;            // rows of W whose sums are kept while the blocks of columns pass

inline float sum(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < 16; ++i) total += v[i];
  return total;
#endif
}

// How a type is loaded and multiplied: Operand is what one register step of kStep numbers holds.
template <typename T>
struct Lane {  // widened to fp32 as it is read
  using Stored = float;
  using Operand = f32x16;
  static constexpr int kStep = 16;
  static Operand stored(const float* p) {
    Operand v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static Operand weight(const T* p) {
    if constexpr (std::is_same_v<T, float>) {
      return stored(p);
    } else if constexpr (std::is_same_v<T, at::BFloat16>) {
      u16x16 half;
      __builtin_memcpy(&half, p, sizeof half);
      u32x16 wide = __builtin_convertvector(half, u32x16) << 16;
      Operand v;
      __builtin_memcpy(&v, &wide, sizeof v);
      return v;
    } else {
#if defined(__AVX512F__)
      return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
      Operand v;
      for (int i = 0; i < 16; ++i) v[i] = float(p[i]);
      return v;
#endif
    }
  }
  static void add(f32x16& total, Operand w, Operand x) { total += w * x; }
};

#if defined(__AVX512BF16__)
template <>
struct Lane<at::BFloat16> {  // pairs of products, summed in fp32 by the processor
  using Stored = at::BFloat16;
  using Operand = __m512bh;
  static constexpr int kStep = 32;
  static Operand stored(const at::BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Operand weight(const at::BFloat16* p) { return stored(p); }
  static void add(f32x16& total, Operand w, Operand x) {
    total = (f32x16)_mm512_dpbf16_ps((__m512)total, w, x);
  }
};
#endif

// One row of W and one of x, read as a single stream.
template <typename T>
inline float dot(const T* w, const typename Lane<T>::Stored* x, int64_t K) {
  using L = Lane<T>;
  f32x16 totals[4] = {};
  int64_t k = 0;
  for (; k + 4 * L::kStep <= K; k += 4 * L::kStep) {
    for (int64_t byte = 0; byte < 4 * L::kStep * (int64_t)sizeof(T); byte += kLine)
      __builtin_prefetch((const char*)(w + k) + byte + kAhead);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u)
      L::add(totals[u], L::weight(w + k + u * L::kStep), L::stored(x + k + u * L::kStep));
  }
  for (; k + L::kStep <= K; k += L::kStep) L::add(totals[0], L::weight(w + k), L::stored(x + k));
  float total = sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
  for (; k < K; ++k) total += float(w[k]) * float(x[k]);
  return total;
}

// Adds the products of kTile rows of W and M rows of x, over one block of columns, to sums[m * kChunk + row].
// Between `from` and `to` it asks for the same columns of the next tile of W.
template <typename T, int M>
inline void tile(const T* w, int64_t K, const typename Lane<T>::Stored* x, int64_t stride, int64_t width, int64_t from,
                 int64_t to, float* sums) {
  using L = Lane<T>;
  f32x16 totals[kTile][M] = {};
  auto pass = [&](int64_t k, int64_t end, auto ask) __attribute__((always_inline)) {
    for (; k < end; k += L::kStep) {
      typename L::Operand weights[kTile];
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) {
        if constexpr (decltype(ask)::value) __builtin_prefetch(w + (kTile + r) * K + k);
        weights[r] = L::weight(w + r * K + k);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        auto row = L::stored(x + m * stride + k);
#if defined(__AVX512F__)
        asm("" : "+v"(row));  // one load for the tile: the compiler would fold a load into each product
#endif
#pragma GCC unroll 8
        for (int r = 0; r < kTile; ++r) L::add(totals[r][m], weights[r], row);
      }
    }
  };
  const int64_t whole = width / L::kStep * L::kStep;
  pass(0, from, std::false_type{});
  pass(from, to, std::true_type{});
  pass(to, whole, std::false_type{});
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < kTile; ++r) {
      float total = sum(totals[r][m]);
      for (int64_t k = whole; k < width; ++k) total += float(w[r * K + k]) * float(x[m * stride + k]);
      sums[m * kChunk + r] += total;
    }
}

// x, cut into blocks of columns that fit the first cache; rows are a line apart, or they would share cache sets.
template <typename T>
struct Blocked {
  using Stored = typename Lane<T>::Stored;
  int64_t M, K, width, stride;
  std::vector<Stored> memory;
  Stored* first;

  Blocked(const T* x, int64_t M, int64_t K) : M(M), K(K) {
    const int64_t step = Lane<T>::kStep, steps = (K + step - 1) / step;
    const int64_t blocks = std::max<int64_t>(1, (M * K * (int64_t)sizeof(Stored) + kNear - 1) / kNear);
    width = (steps + blocks - 1) / blocks * step;
    stride = width + step;
    memory.resize((K + width - 1) / width * M * stride + kLine);
    first = (Stored*)(((uintptr_t)memory.data() + kLine - 1) & ~(uintptr_t)(kLine - 1));
    for (int64_t k = 0; k < K; k += width)
      for (int64_t m = 0; m < M; ++m) {
        Stored* to = first + (k / width * M + m) * stride;
        const T* from = x + m * K + k;
        const int64_t count = std::min(width, K - k);
        if constexpr (std::is_same_v<T, Stored>) __builtin_memcpy(to, from, count * sizeof(T));
        else for (int64_t i = 0; i < count; ++i) to[i] = Stored(from[i]);
      }
  }
  const Stored* at(int64_t k, int64_t m) const { return first + (k / width * M + m) * stride; }
};

template <typename T>
void tiles(const Blocked<T>& x, const T* w, int64_t k, int64_t count, float* sums) {
  const int64_t passes = (x.M + kWide - 1) / kWide, steps = count / Lane<T>::kStep;
  int64_t m = 0;
  for (int64_t p = 0; p < passes; ++p) {
    const int64_t rows = (x.M - m + passes - p - 1) / (passes - p);
    // Each pass over the tile asks for its share of the next one, so that memory never waits.
    const int64_t from = p * steps / passes * Lane<T>::kStep, to = (p + 1) * steps / passes * Lane<T>::kStep;
    auto run = [&](auto n) { tile<T, decltype(n)::value>(w + k, x.K, x.at(k, m), x.stride, count, from, to, sums + m * kChunk); };
    switch (rows) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 3: run(std::integral_constant<int, 3>{}); break;
      case 4: run(std::integral_constant<int, 4>{}); break;
      case 5: run(std::integral_constant<int, 5>{}); break;
      default: run(std::integral_constant<int, 6>{}); break;
    }
    m += rows;
  }
}

template <typename T>
void several(const Blocked<T>& x, const T* w, const T* bias, T* y, int64_t N, int64_t begin, int64_t end) {
  std::vector<float> sums(x.M * kChunk);
  for (int64_t n = begin; n < end; n += kChunk) {
    const int64_t rows = std::min(kChunk, end - n);
    std::fill(sums.begin(), sums.end(), 0.f);
    for (int64_t k = 0; k < x.K; k += x.width) {
      const int64_t count = std::min(x.width, x.K - k);
      int64_t r = 0;
      for (; r + kTile <= rows; r += kTile) tiles(x, w + (n + r) * x.K, k, count, sums.data() + r);
      for (; r < rows; ++r)
        for (int64_t m = 0; m < x.M; ++m) sums[m * kChunk + r] += dot<T>(w + (n + r) * x.K + k, x.at(k, m), count);
    }
    for (int64_t m = 0; m < x.M; ++m)
      for (int64_t r = 0; r < rows; ++r)
        y[m * N + n + r] = T(sums[m * kChunk + r] + (bias ? float(bias[n + r]) : 0.f));
  }
}

template <typename T>
void run(const at::Tensor& x, const at::Tensor& weight, const T* bias, at::Tensor& out) {
  const int64_t N = weight.size(0), K = weight.size(1), M = x.numel() / K;
  const T* w = weight.const_data_ptr<T>();
  T* y = out.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, kGrain / (K * M));
  if (M != 1) {
    const Blocked<T> blocked(x.const_data_ptr<T>(), M, K);
    at::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) { several(blocked, w, bias, y, N, begin, end); });
    return;
  }
  using Stored = typename Lane<T>::Stored;
  std::vector<Stored> widened;
  const Stored* row;
  if constexpr (std::is_same_v<T, Stored>) {
    row = x.const_data_ptr<T>();
  } else {
    const T* from = x.const_data_ptr<T>();
    widened.assign(from, from + K);
    row = widened.data();
  }
  at::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) y[n] = T(dot<T>(w + n * K, row, K) + (bias ? float(bias[n]) : 0.f));
  });
}

at::Tensor linear_rows(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "linear_rows: the weight must be a contiguous matrix");
  TORCH_CHECK(input.dim() > 0 && input.size(-1) == weight.size(1), "linear_rows: x has ", input.size(-1),
              " columns and the weight ", weight.size(1));
  TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "linear_rows: x and the weight differ in dtype");
  TORCH_CHECK(!bias || (bias->scalar_type() == weight.scalar_type() && bias->numel() == weight.size(0) && bias->is_contiguous()),
              "linear_rows: the bias does not belong to the weight");
  auto sizes = input.sizes().vec();
  sizes.back() = weight.size(0);
  at::Tensor out = at::empty(sizes, input.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const at::Tensor x = input.contiguous();
  switch (weight.scalar_type()) {
    case at::kFloat: run<float>(x, weight, bias ? bias->const_data_ptr<float>() : nullptr, out); break;
    case at::kBFloat16: run<at::BFloat16>(x, weight, bias ? bias->const_data_ptr<at::BFloat16>() : nullptr, out); break;
    case at::kHalf: run<at::Half>(x, weight, bias ? bias->const_data_ptr<at::Half>() : nullptr, out); break;
    default: TORCH_CHECK(false, "linear_rows: dtype ", weight.scalar_type(), " is not supported");
  }
  return out;
}

}  // namespace

TORCH_LIBRARY(fastllama_native, library) {
  library.def("linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}
TORCH_LIBRARY_IMPL(fastllama_native, CPU, library) { library.impl("linear_rows", &linear_rows); }
