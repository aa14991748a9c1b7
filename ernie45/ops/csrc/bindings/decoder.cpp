// The decoder as one operator, for inference.
#include "../cpu/decoder.h"

#include "packed.h"
#include "tensors.h"

namespace ernie::decoder_op {
namespace {

using paddle::DataType;
using paddle::Tensor;

constexpr const char* kName = "decoder";

FeedForward read_feed_forward(WeightReader& reader) {
  FeedForward network;
  int64_t count;
  network.up_gate = reader.matrix(&network.experts);
  network.down = reader.matrix(&count);
  PD_CHECK(count == network.experts, kName, ": ", network.experts, " first but ", count, " second projections");
  return network;
}

uint16_t* cache_of(const Tensor& tensor, int64_t batch, int64_t capacity, const DecoderConfig& config) {
  const Shape shape = {batch, capacity, config.kv_heads, config.head_dim};
  PD_CHECK(tensor.is_contiguous(), kName, ": the cache is not contiguous");
  checked(kName, "caches", tensor, DataType::BFLOAT16, shape);
  return static_cast<uint16_t*>(const_cast<void*>(tensor.data()));  // written in place
}

DecoderConfig read_config(const std::vector<int64_t>& sizes, const std::vector<float>& numbers) {
  PD_CHECK(sizes.size() == 9 && numbers.size() == 3, kName, ": expected 9 sizes and 3 numbers");
  DecoderConfig config{};
  config.hidden = sizes[0];
  config.heads = sizes[1];
  config.kv_heads = sizes[2];
  config.head_dim = sizes[3];
  config.moe_k = sizes[4];
  config.moe_softmax = sizes[5] != 0;
  config.moe_normalise = sizes[6] != 0;
  config.time_pairs = sizes[7];
  config.epsilon = numbers[0];
  config.attention_scale = numbers[1];
  config.moe_minimum = numbers[2];
  PD_CHECK(config.kv_heads > 0 && config.heads % config.kv_heads == 0 && config.head_dim % 2 == 0 &&
               config.head_dim <= 512,
           kName, ": ", config.heads, " heads, ", config.kv_heads, " kv heads of ", config.head_dim,
           " are not supported");
  PD_CHECK(0 <= config.time_pairs && config.time_pairs <= config.head_dim / 2, kName, ": ", config.time_pairs, " of ",
           config.head_dim / 2, " rotary pairs cannot take the time");
  return config;
}

// A layer has all the banks or none of them.
std::vector<ExpertBank> read_banks(WeightReader& reader, const DecoderConfig& config, int64_t count) {
  std::vector<ExpertBank> banks;
  int64_t present = 0;
  for (int64_t i = 0; i < count; ++i) {
    ExpertBank bank{read_feed_forward(reader), nullptr, nullptr};
    const int64_t experts = bank.network.experts;
    if (experts) {
      PD_CHECK(0 < config.moe_k && config.moe_k <= experts, kName, ": moe_k is ", config.moe_k, ", expected 1 to the ",
               experts, " experts");
      bank.router = reader.vector("router", {config.hidden, experts});
      bank.router_bias = reader.vector("correction bias", {experts});
      ++present;
    }
    banks.push_back(bank);
  }
  PD_CHECK(!present || present == count, kName, ": a layer has ", present, " of ", count, " banks of experts");
  if (!present) banks.clear();
  return banks;
}

DecoderLayer read_layer(WeightReader& reader, const DecoderConfig& config, int64_t banks) {
  DecoderLayer layer{};
  int64_t count;
  layer.input_norm = reader.vector("input norm", {config.hidden});
  layer.post_norm = reader.vector("post norm", {config.hidden});
  layer.qkv = reader.matrix(&count);
  layer.out = reader.matrix(&count);
  layer.dense = read_feed_forward(reader);
  layer.banks = read_banks(reader, config, banks);
  PD_CHECK(layer.dense.experts || !layer.banks.empty(), kName, ": a layer has no feed-forward network");
  return layer;
}

// Every id is a token of the vocabulary, or -1 - row for a row of the features.
void check_ids(const Tensor& ids, int64_t vocabulary, int64_t features) {
  const int64_t* id = ids.data<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    PD_CHECK(id[i] < vocabulary, kName, ": id ", id[i], " is outside the vocabulary of ", vocabulary);
    PD_CHECK(id[i] >= -features, kName, ": id ", id[i], " stands for row ", -1 - id[i], " of ", features, " features");
  }
}

void check_banks(const Tensor& banks, int64_t count) {
  const int64_t* bank = banks.data<int64_t>();
  for (int64_t i = 0; i < banks.numel(); ++i)
    PD_CHECK(0 <= bank[i] && bank[i] < count, kName, ": a token belongs to bank ", bank[i], " of ", count);
}

std::vector<Tensor> decoder(const Tensor& ids, const Tensor& positions, const Tensor& first,
                            const paddle::optional<Tensor>& banks, const paddle::optional<Tensor>& features,
                            const std::vector<Tensor>& weights, const std::vector<Tensor>& caches, int64_t cached,
                            const std::vector<int64_t>& sizes, const std::vector<float>& numbers,
                            const std::vector<int64_t>& shapes) {
  const DecoderConfig config = read_config(sizes, numbers);
  const Tensor tokens = checked(kName, "ids", ids, DataType::INT64, {kAny, kAny});
  const int64_t batch = tokens.shape()[0], count = tokens.shape()[1];
  const int64_t axes = positions.shape().size() == 3 ? 3 : 1;
  const Tensor places =
      checked(kName, "positions", positions, DataType::INT64, axes == 3 ? Shape{batch, count, 3} : Shape{batch, count});
  const Tensor from = checked(kName, "first", first, DataType::INT64, {batch});
  PD_CHECK(caches.size() % 2 == 0 && !caches.empty(), kName, ": expected keys and values of every layer");
  Tensor groups, given;
  if (banks) groups = checked(kName, "banks", *banks, DataType::INT64, {batch, count});
  if (features) given = checked_float32(kName, "features", *features, {kAny, config.hidden});

  WeightReader reader(kName, weights, shapes);
  DecoderWeights read;
  int64_t matrices;
  read.embedding = reader.matrix(&matrices);
  read.frequencies = reader.vector("frequencies", {config.head_dim / 2});
  read.final_norm = reader.vector("final norm", {config.hidden});
  const int64_t capacity = caches[0].shape()[1];
  PD_CHECK(cached >= 0 && cached + count <= capacity, kName, ": ", cached, " + ", count,
           " tokens do not fit into a cache of ", capacity);
  for (size_t i = 0; i < caches.size(); i += 2) {
    read.layers.push_back(read_layer(reader, config, sizes[8]));
    read.layers.back().keys = cache_of(caches[i], batch, capacity, config);
    read.layers.back().values = cache_of(caches[i + 1], batch, capacity, config);
  }
  PD_CHECK(reader.done(), kName, ": more weights than ", read.layers.size(), " layers need");
  check_ids(tokens, read.embedding.out, features ? given.shape()[0] : 0);
  if (banks) check_banks(groups, sizes[8]);

  Tensor out = empty_float32({batch, count, config.hidden});
  run_decoder(config, read,
              {tokens.data<int64_t>(), features ? given.data<float>() : nullptr, places.data<int64_t>(), axes,
               banks ? groups.data<int64_t>() : nullptr, from.data<int64_t>(), batch, count, cached, capacity,
               out.data<float>()});
  return {out};
}

std::vector<std::vector<int64_t>> decoder_shape(const Shape& ids, const Shape&, const Shape&,
                                                const paddle::optional<Shape>&, const paddle::optional<Shape>&,
                                                const std::vector<Shape>&, const std::vector<Shape>&, int64_t,
                                                const std::vector<int64_t>& sizes, const std::vector<float>&,
                                                const std::vector<int64_t>&) {
  return {{ids[0], ids[1], sizes[0]}};
}

std::vector<DataType> decoder_dtype(DataType, DataType, DataType, const paddle::optional<DataType>&,
                                    const paddle::optional<DataType>&, const std::vector<DataType>&,
                                    const std::vector<DataType>&) {
  return {DataType::FLOAT32};
}

}  // namespace
}  // namespace ernie::decoder_op

PD_BUILD_OP(ernie45_decoder)
    .Inputs({"ids", "positions", "first", paddle::Optional("banks"), paddle::Optional("features"),
             paddle::Vec("weights"), paddle::Vec("caches")})
    .Outputs({"out"})
    .Attrs({"cached: int64_t", "sizes: std::vector<int64_t>", "numbers: std::vector<float>",
            "shapes: std::vector<int64_t>"})
    .SetKernelFn(PD_KERNEL(ernie::decoder_op::decoder))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::decoder_op::decoder_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::decoder_op::decoder_dtype));
