// Tensors of Python, checked and seen as what the kernels take.

#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "product.h"
#include "small.h"
#include "stored.h"

namespace {

// In the order of Format.
constexpr const char* kFormats[] = {"f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"};

// Calls work with a value of the tensor's C++ type.
template <typename Work>
void typed(const at::Tensor& tensor, const Work& work) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return work(float{});
    case at::kBFloat16: return work(at::BFloat16{});
    case at::kHalf: return work(at::Half{});
    default: TORCH_CHECK(false, "dtype ", tensor.scalar_type(), " is not supported");
  }
}

template <typename T>
Matrix<T> matrix(const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "the weight must be a contiguous matrix");
  TORCH_CHECK(!bias || (bias->scalar_type() == weight.scalar_type() && bias->is_contiguous() &&
                        bias->numel() == weight.size(0)),
              "the bias does not belong to the weight");
  return {weight.const_data_ptr<T>(), bias ? bias->const_data_ptr<T>() : nullptr, weight.size(0), weight.size(1)};
}

inline SmallMatrix small_matrix(const at::Tensor& quants, const at::Tensor& scales, const std::optional<at::Tensor>& bias,
                                int64_t bits, int64_t N, int64_t K) {
  SmallMatrix w;
  w.N = N, w.K = K, w.bits = (int)bits;
  TORCH_CHECK((bits == 8 || bits == 4) && quants.scalar_type() == at::kByte && quants.is_contiguous() &&
                  quants.dim() == 4 && quants.size(0) == w.tiles() && quants.numel() == w.tiles() * w.tile_bytes(),
              "small weight: quants ", quants.sizes(), " are not ", N, " x ", K, " numbers of ", bits, " bits");
  TORCH_CHECK(scales.scalar_type() == (bits == 8 ? at::kFloat : at::kHalf) && scales.is_contiguous() && scales.dim() == 3 &&
                  scales.size(0) == w.tiles() && scales.size(1) > 0 && scales.size(2) == kLanes && K % scales.size(1) == 0 &&
                  (bits == 8 ? scales.size(1) == 1 : K / scales.size(1) % kFixed == 0),
              "small weight: scales ", scales.sizes(), " do not belong to ", N, " x ", K, " numbers of ", bits, " bits");
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->numel() == N),
              "small weight: the bias must be ", N, " numbers in fp32");
  w.quants = quants.const_data_ptr<uint8_t>();
  w.scales = scales.const_data_ptr();
  w.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  w.groups = scales.size(1), w.group = K / w.groups;
  return w;
}

// Refuses parts that do not belong to the format, the head dim or the model's type.
template <typename T>
Side side(const std::vector<at::Tensor>& parts, const std::string& name, int64_t D) {
  const auto* found = std::find(std::begin(kFormats), std::end(kFormats), name);
  TORCH_CHECK(found != std::end(kFormats), "cache format '", name, "' is not known");
  Side side;
  side.format = Format(found - std::begin(kFormats)), side.model = kFormatOf<T>;
  const Format f = side.format;
  const auto half = at::kHalf;
  std::vector<std::pair<int64_t, at::ScalarType>> expected;
  if (is_float(f)) {
    expected = {{D, f == Format::f32 ? at::kFloat : f == Format::f16 ? half : at::kBFloat16}};
  } else if (f == Format::int8) {
    expected = {{D, at::kChar}, {1, c10::CppTypeToScalarType<T>::value}};
  } else {
    TORCH_CHECK(D % 32 == 0, "head dim ", D, " is not a multiple of 32, which the cache format ", name, " needs");
    if (f == Format::q8_0) expected = {{D, at::kChar}};
    else expected = {{D / 2, at::kByte}};
    if (has_fifth(f)) expected.push_back({D / 8, at::kByte});
    for (int i = 0; i <= has_least(f); ++i) expected.push_back({D / 32, half});
  }
  TORCH_CHECK(parts.size() == expected.size(), "the cache format ", name, " has ", expected.size(), " parts, not ", parts.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    const at::Tensor& x = parts[i];
    const auto [n, type] = expected[i];
    TORCH_CHECK(x.dim() == 4 && x.size(3) == n && x.scalar_type() == type && x.sizes().slice(0, 3) == parts[0].sizes().slice(0, 3),
                "part ", i, " of the cache format ", name, " is ", x.sizes(), " in ", x.scalar_type());
    TORCH_CHECK(x.size(2) <= 1 || (x.stride(2) == n && (n == 1 || x.stride(3) == 1)), "part ", i, " of the cache format ", name,
                ": positions must lie one after the other");
    side.data[i] = (char*)x.data_ptr();
    side.row[i] = x.stride(0) * x.element_size(), side.head[i] = x.stride(1) * x.element_size();
    side.each[i] = n * x.element_size();
  }
  return side;
}

}  // namespace
