// Weights laid out for few-row products: panels of 64 output columns, each read once from front to back.
//
//   bfloat16  [panel][in / 2][64 columns][2 inputs]                       2 bytes a weight
//   int8      [panel][in / 4][64 columns][4 inputs], code + 128           1 byte, scale float32 per column apart
//   int4      [panel][in / 64] of { [8][64 columns][4 bytes], code + 8, low nibbles for inputs 8 i .. 8 i + 3 and high
//             nibbles for the next four; then bfloat16 scales [64 columns] }   0.53 bytes
//
// Columns are padded with zero weights to whole panels, inputs to whole pairs, fours or groups. The published layouts
// that go in and come out are described in ernie45/ops/packed.py.
#pragma once

#include <cstdint>

namespace ernie {

constexpr int64_t kPanel = 64;
constexpr int64_t kGroup = 64;
constexpr int64_t kGroupCodes = 8 * kPanel * 4;
constexpr int64_t kGroupBytes = kGroupCodes + 2 * kPanel;

enum class Kind : int { kBfloat16 = 0, kInt8 = 1, kInt4 = 2 };

inline int64_t panels(int64_t out) { return (out + kPanel - 1) / kPanel; }

inline int64_t panel_bytes(Kind kind, int64_t in) {
  if (kind == Kind::kBfloat16) return (in + 1) / 2 * 2 * kPanel * 2;
  if (kind == Kind::kInt8) return (in + 3) / 4 * 4 * kPanel;
  return (in + kGroup - 1) / kGroup * kGroupBytes;
}

struct PackedMatrix {
  Kind kind;
  int64_t in, out;
  const uint8_t* data;
  const float* scales;  // int8 only: [panels * 64]

  const uint8_t* panel(int64_t index) const { return data + index * panel_bytes(kind, in); }
  int64_t bytes() const { return panels(out) * panel_bytes(kind, in); }
};

// out [in] = one column of the weight.
void unpack_column(const PackedMatrix& matrix, int64_t column, float* out);

inline float bfloat16_to_float(uint16_t bits) {
  union { uint32_t bits; float value; } word{static_cast<uint32_t>(bits) << 16};
  return word.value;
}

inline uint16_t float_to_bfloat16(float value) {
  union { float value; uint32_t bits; } word{value};
  if (value != value) return static_cast<uint16_t>((word.bits >> 16) | 0x40);
  return static_cast<uint16_t>((word.bits + 0x7FFF + ((word.bits >> 16) & 1)) >> 16);
}

}  // namespace ernie
