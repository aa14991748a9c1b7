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

// Hands out tensors in the order in which ernie45/ops/vision.py lists them.
class Reader {
 public:
  Reader(const std::vector<Tensor>& tensors, const std::vector<int64_t>& shapes) : tensors_(tensors), shapes_(shapes) {}

  PackedMatrix matrix(const char* argument, int64_t in, int64_t out) {
    PD_CHECK(shape_ + 3 <= shapes_.size(), kName, ": the list of shapes is too short");
    const PackedShape shape{shapes_[shape_], shapes_[shape_ + 1], shapes_[shape_ + 2], 1};
    shape_ += 3;
    PD_CHECK((in == kAny || shape.in == in) && shape.out == out, kName, ": ", argument, " is [", shape.in, ", ",
             shape.out, "], expected ", text({in, out}));
    const Tensor& data = next();
    const Tensor* scales = shape.kind == static_cast<int64_t>(Kind::kInt8) ? &next() : nullptr;
    return packed_matrix(kName, data, scales, shape);
  }

  BiasedMatrix biased(const char* argument, int64_t in, int64_t out) {
    const PackedMatrix weight = matrix(argument, in, out);
    return {weight, vector("bias", out)};
  }

  NormWeights norm(int64_t width) {
    const float* weight = vector("weight of a norm", width);
    return {weight, vector("bias of a norm", width)};
  }

  bool done() const { return position_ == tensors_.size() && shape_ == shapes_.size(); }

 private:
  const float* vector(const char* argument, int64_t size) {
    return checked_float32(kName, argument, next(), {size}).data<float>();
  }

  const Tensor& next() {
    PD_CHECK(position_ < tensors_.size(), kName, ": the list of weights is too short");
    return tensors_[position_++];
  }

  const std::vector<Tensor>& tensors_;
  const std::vector<int64_t>& shapes_;
  size_t position_ = 0, shape_ = 0;
};

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
  Reader reader(tensors, shapes);
  weights.patch_embed = reader.matrix("patch embedding", kAny, width);
  for (int64_t i = 0; i < depth; ++i) {
    VisionBlock block{};
    block.norm1 = reader.norm(width);
    block.qkv = reader.biased("qkv", width, 3 * width);
    block.proj = reader.biased("proj", width, width);
    block.norm2 = reader.norm(width);
    block.fc1 = reader.biased("fc1", width, wide);
    block.fc2 = reader.biased("fc2", wide, width);
    weights.blocks.push_back(block);
  }
  weights.norm = reader.norm(width);
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
