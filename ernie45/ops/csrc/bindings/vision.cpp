// The vision tower as one operator, for inference.
#include "../cpu/vision.h"

#include "../cpu/frame_attention.h"
#include "packed.h"
#include "tensors.h"

namespace ernie::vision_op {
namespace {

using paddle::DataType;
using paddle::Tensor;

constexpr const char* kName = "vision";

PackedMatrix read_matrix(WeightReader& reader, const char* argument, int64_t in, int64_t out) {
  int64_t count;
  const PackedMatrix matrix = reader.matrix(&count);
  PD_CHECK(count == 1 && (in == kAny || matrix.in == in) && matrix.out == out, kName, ": ", argument, " is ",
           text({matrix.in, matrix.out}), ", expected ", text({in, out}));
  return matrix;
}

BiasedMatrix read_biased(WeightReader& reader, const char* argument, int64_t in, int64_t out) {
  const PackedMatrix weight = read_matrix(reader, argument, in, out);
  return {weight, reader.vector("bias", {out})};
}

NormWeights read_norm(WeightReader& reader, int64_t width) {
  const float* weight = reader.vector("weight of a norm", {width});
  return {weight, reader.vector("bias of a norm", {width})};
}

VisionWeights read_weights(const std::vector<Tensor>& tensors, const std::vector<int64_t>& sizes, float epsilon,
                           const std::vector<int64_t>& shapes) {
  PD_CHECK(sizes.size() == 4, kName, ": expected 4 sizes, found ", sizes.size());
  VisionWeights weights{};
  weights.heads = sizes[0];
  weights.head_dim = sizes[1];
  weights.epsilon = epsilon;
  const int64_t width = sizes[0] * sizes[1], wide = sizes[2], depth = sizes[3];
  PD_CHECK(sizes[0] > 0 && sizes[1] > 0 && sizes[1] % 2 == 0 && sizes[1] <= kLargestFrameHead, kName, ": ", sizes[0],
           " heads of ", sizes[1], " are not supported: the size must be even and at most ", kLargestFrameHead);
  WeightReader reader(kName, tensors, shapes);
  weights.patch_embed = read_matrix(reader, "patch embedding", kAny, width);
  for (int64_t i = 0; i < depth; ++i) {
    VisionBlock block{};
    block.norm1 = read_norm(reader, width);
    block.qkv = read_biased(reader, "qkv", width, 3 * width);
    block.proj = read_biased(reader, "proj", width, width);
    block.norm2 = read_norm(reader, width);
    block.fc1 = read_biased(reader, "fc1", width, wide);
    block.fc2 = read_biased(reader, "fc2", wide, width);
    weights.blocks.push_back(block);
  }
  weights.norm = read_norm(reader, width);
  PD_CHECK(reader.done(), kName, ": more weights than ", depth, " blocks need");
  return weights;
}

std::vector<Tensor> vision(const Tensor& pixels, const Tensor& cos, const Tensor& sin,
                           const std::vector<Tensor>& tensors, const std::vector<int64_t>& lengths,
                           const std::vector<int64_t>& sizes, float epsilon, const std::vector<int64_t>& shapes) {
  const VisionWeights weights = read_weights(tensors, sizes, epsilon, shapes);
  const Tensor rows = checked_float32(kName, "pixels", pixels, {kAny, weights.patch_embed.in});
  const int64_t patches = rows.shape()[0];
  const Tensor cosines = checked_float32(kName, "cos", cos, {patches, weights.head_dim / 2});
  const Tensor sines = checked_float32(kName, "sin", sin, {patches, weights.head_dim / 2});
  int64_t sum = 0;
  for (int64_t length : lengths) {
    PD_CHECK(length >= 0, kName, ": a frame has ", length, " patches");
    sum += length;
  }
  PD_CHECK(sum == patches, kName, ": lengths add up to ", sum, ", but there are ", patches, " patches");

  Tensor out = empty_float32({patches, weights.width()});
  run_vision(weights, {rows.data<float>(), cosines.data<float>(), sines.data<float>(), lengths, patches,
                       out.data<float>()});
  return {out};
}

std::vector<std::vector<int64_t>> vision_shape(const Shape& pixels, const Shape&, const Shape&,
                                               const std::vector<Shape>&, const std::vector<int64_t>&,
                                               const std::vector<int64_t>& sizes, float, const std::vector<int64_t>&) {
  return {{pixels[0], sizes[0] * sizes[1]}};
}

std::vector<DataType> vision_dtype(DataType, DataType, DataType, const std::vector<DataType>&) {
  return {DataType::FLOAT32};
}

}  // namespace
}  // namespace ernie::vision_op

PD_BUILD_OP(ernie45_vision)
    .Inputs({"pixels", "cos", "sin", paddle::Vec("weights")})
    .Outputs({"out"})
    .Attrs({"lengths: std::vector<int64_t>", "sizes: std::vector<int64_t>", "epsilon: float",
            "shapes: std::vector<int64_t>"})
    .SetKernelFn(PD_KERNEL(ernie::vision_op::vision))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::vision_op::vision_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::vision_op::vision_dtype));
