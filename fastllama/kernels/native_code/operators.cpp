// What Python calls: fastllama_native::linear_rows and the class Step.

#include <torch/custom_class.h>
#include <torch/library.h>

#include "checks.h"
#include "prompt.h"
#include "step.h"

namespace {

template <typename T>
const T* data(const at::Tensor& tensor) {
  return tensor.const_data_ptr<T>();
}

at::Tensor linear_rows(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(input.dim() > 0 && weight.dim() == 2 && input.size(-1) == weight.size(1), "linear_rows: x has ",
              input.sizes(), " and the weight ", weight.sizes());
  TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "linear_rows: x and the weight differ in dtype");
  auto sizes = input.sizes().vec();
  sizes.back() = weight.size(0);
  at::Tensor out = at::empty(sizes, input.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  if (weight.size(1) == 0) return at::linear(input, weight, bias);
  const at::Tensor x = input.contiguous();
  typed(weight, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<T> w = matrix<T>(weight, bias);
    const int64_t M = x.numel() / w.K;
    thread_local Operand<T> operand;
    const Operand<T>& shared = operand;
    operand.shape(M, w.K);
    for (int64_t m = 0; m < M; ++m) {
      const T* row = data<T>(x) + m * w.K;
      operand.blocks(m, [&](int64_t k, int64_t count, auto* to) { std::copy(row + k, row + k + count, to); });
    }
    T* y = out.mutable_data_ptr<T>();
    at::parallel_for(0, w.N, std::max<int64_t>(1, 16384 / (w.K * M)), [&](int64_t begin, int64_t end) {
      multiply(shared, w, begin, end, [&](int64_t m, int64_t n, float value) { y[m * w.N + n] = T(value); });
    });
  });
  return out;
}

at::Tensor attend_prompt(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, int64_t past,
                         double scale) {
  const int64_t B = query.size(0), Q = query.size(1), N = query.size(2), D = query.size(3), K = keys.size(1);
  TORCH_CHECK(keys.dim() == 4 && keys.sizes() == values.sizes() && keys.size(0) >= B && keys.size(3) == D && N % K == 0 &&
                  past >= 0 && keys.size(2) >= past + Q,
              "attend_prompt: queries ", query.sizes(), " after ", past, " do not fit keys ", keys.sizes());
  for (const auto& tensor : {query, keys, values})
    TORCH_CHECK(tensor.scalar_type() == query.scalar_type() && tensor.stride(3) == 1, "attend_prompt: a tensor's layout");
  TORCH_CHECK(keys.stride(2) == D && values.stride(2) == D, "attend_prompt: positions must lie one after the other");
  at::Tensor out = at::empty({B, Q, N * D}, query.options().memory_format(at::MemoryFormat::Contiguous));
  typed(query, [&](auto zero) {
    using T = decltype(zero);
    auto cached = [](const at::Tensor& x) { return Strided<const T>{data<T>(x), x.stride(0), x.stride(2), x.stride(1)}; };
    const Strided<const T> asking{data<T>(query), query.stride(0), query.stride(1), query.stride(2)};
    const Strided<T> result{out.mutable_data_ptr<T>(), Q * N * D, N * D, D};
    for_head_dim(D, [&](auto v) {
      attend_chunk<T, decltype(v)::value>(asking, cached(keys), cached(values), result, B, Q, N, K, past, (float)scale);
    });
  });
  return out;
}

// The tensors are held for as long as this lives: their addresses are what the step reads.
class Step : public torch::CustomClassHolder {
 public:
  // matrices, scales, biases, rows and columns: qkv, o, gate and up, down of each layer, the head, the embedding. One
  // without scales is in the model's dtype, the others are quants. norms: input and post of each layer, then the last.
  // sizes: heads, kv heads, head dim. numbers: attention scale, then each norm's epsilon.
  Step(std::vector<at::Tensor> matrices, std::vector<std::optional<at::Tensor>> scales,
       std::vector<std::optional<at::Tensor>> biases, std::vector<int64_t> rows, std::vector<int64_t> columns,
       std::vector<at::Tensor> norms, std::vector<at::Tensor> keys, std::vector<at::Tensor> values, at::Tensor mask,
       at::Tensor valid_past_index, at::Tensor cos, at::Tensor sin, std::vector<int64_t> sizes,
       std::vector<double> numbers)
      : matrices_(std::move(matrices)), scales_(std::move(scales)), biases_(std::move(biases)), norms_(std::move(norms)),
        keys_(std::move(keys)), values_(std::move(values)), others_{norms_.at(0), mask, valid_past_index, cos, sin} {
    const size_t L = keys_.size();
    const size_t W = 4 * L + 2;
    TORCH_CHECK(matrices_.size() == W && scales_.size() == W && biases_.size() == W && rows.size() == W &&
                    columns.size() == W && norms_.size() == 2 * L + 1 &&
                    numbers.size() == norms_.size() + 1 && sizes.size() == 3 && values_.size() == L,
                "Step: the lists do not belong together");
    for (const auto& tensor : {mask, cos, sin})
      TORCH_CHECK(tensor.scalar_type() == others_[0].scalar_type() && tensor.is_contiguous(), "Step: a tensor's layout");
    const Sizes shape{sizes[0], sizes[1], sizes[2], keys_[0].size(0), keys_[0].size(2), (float)numbers[0]};
    auto build = [&](auto zero, auto& decoder) {
      using T = decltype(zero);
      auto at = [&](size_t i) {
        Weight<T> weight;
        weight.N = rows[i], weight.K = columns[i];
        if (!scales_[i]) {
          weight.plain = matrix<T>(matrices_[i], biases_[i]);
          TORCH_CHECK(weight.plain.N == weight.N && weight.plain.K == weight.K, "Step: a matrix's shape");
          return weight;
        }
        if (biases_[i]) biases_[i] = biases_[i]->to(at::kFloat).contiguous();
        const int bits = scales_[i]->scalar_type() == at::kFloat ? 8 : 4;
        weight.small = small_matrix(matrices_[i], *scales_[i], biases_[i], bits, weight.N, weight.K);
        return weight;
      };
      decoder.sizes = shape;
      for (size_t l = 0; l < L; ++l)
        decoder.layers.push_back({at(4 * l), at(4 * l + 1), at(4 * l + 2), at(4 * l + 3), data<T>(norms_[2 * l]),
                                  data<T>(norms_[2 * l + 1]), (float)numbers[2 * l + 1], (float)numbers[2 * l + 2],
                                  keys_[l].mutable_data_ptr<T>(), values_[l].mutable_data_ptr<T>()});
      decoder.head = at(4 * L);
      decoder.embedding = at(4 * L + 1);
      decoder.norm = data<T>(norms_[2 * L]);
      decoder.eps = (float)numbers[2 * L + 1];
      decoder.mask = others_[1].mutable_data_ptr<T>();
      decoder.valid_past_index = others_[2].mutable_data_ptr<int64_t>();
      decoder.cos = data<T>(others_[3]);
      decoder.sin = data<T>(others_[4]);
    };
    typed(others_[0], [&](auto zero) { build(zero, std::get<Decoder<decltype(zero)>>(decoders_)); });
  }

  at::Tensor run(const at::Tensor& ids) {
    TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == at::kLong && ids.is_contiguous(), "Step: ids must be int64 [B, Q]");
    at::Tensor logits;
    typed(others_[0], [&](auto zero) {
      using T = decltype(zero);
      auto& decoder = std::get<Decoder<T>>(decoders_);
      TORCH_CHECK(ids.size(0) == decoder.sizes.batch, "Step: ids have ", ids.size(0), " rows and the cache ",
                  decoder.sizes.batch);
      const int64_t V = decoder.embedding.N, S = decoder.sizes.positions;
      for (int64_t b = 0; b < ids.size(0); ++b) {
        TORCH_CHECK(decoder.valid_past_index[b] + ids.size(1) <= S, "Step: row ", b, " of the cache is full");
        for (int64_t q = 0; q < ids.size(1); ++q) {
          const int64_t id = ids.const_data_ptr<int64_t>()[b * ids.size(1) + q];
          TORCH_CHECK_INDEX(id >= 0 && id < V, "Step: token ", id, " is not below the vocabulary's ", V);
        }
      }
      logits = at::empty({ids.size(0), ids.size(1), decoder.head.N}, others_[0].options());
      decoder.run(ids.const_data_ptr<int64_t>(), ids.size(1), logits.template mutable_data_ptr<T>());
    });
    return logits;
  }

 private:
  std::vector<at::Tensor> matrices_;
  std::vector<std::optional<at::Tensor>> scales_, biases_;
  std::vector<at::Tensor> norms_, keys_, values_;
  std::vector<at::Tensor> others_;
  std::tuple<Decoder<float>, Decoder<at::BFloat16>, Decoder<at::Half>> decoders_;
};

}  // namespace

TORCH_LIBRARY(fastllama_native, library) {
  library.def("linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def("attend_prompt(Tensor query, Tensor keys, Tensor values, int past, float scale) -> Tensor");
  library.class_<Step>("Step")
      .def(torch::init<std::vector<at::Tensor>, std::vector<std::optional<at::Tensor>>,
                       std::vector<std::optional<at::Tensor>>, std::vector<int64_t>, std::vector<int64_t>,
                       std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor,
                       at::Tensor, std::vector<int64_t>, std::vector<double>>())
      .def("run", &Step::run);
}
TORCH_LIBRARY_IMPL(fastllama_native, CPU, library) {
  library.impl("linear_rows", &linear_rows);
  library.impl("attend_prompt", &attend_prompt);
}
