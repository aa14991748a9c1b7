// Quantises tiles of 128 x 128: in either or both orientations, in blocks of 1 x 128 or of the whole tile.
//
// A block of threads holds a tile in registers: 16 groups of lanes, each with 8 rows; a lane has a vector of each row,
// so 8 x kLanes elements. Codes of the transpose are made of 8 elements of one column, which are 8 bytes of one of its
// rows, and go through shared memory to be stored in whole lines.
#pragma once

#include "fp8.cuh"

namespace ernie::cuda {
namespace {

constexpr int kTile = kFp8Block;
constexpr int kHeldRows = 8;
constexpr int kGroups = kTile / kHeldRows;
template <typename T>
constexpr int kTileThreads = kGroups * kGroup<T>;  // 256, for float32 512

// Matrices of one launch: pointers are parameters of the kernel, so none have to be copied to the device.
constexpr int kMatrices = 64;
struct Matrices {
  const void* at[kMatrices];
};

// Outputs of matrices [rows, columns], one behind the other. Either pair may be null.
struct Quantized {
  int64_t rows, columns;
  bool power_of_two;
  uint8_t* codes;
  float* scales;
  uint8_t* transposed_codes;
  float* transposed_scales;

  __device__ __forceinline__ int64_t row_blocks() const { return (rows + kTile - 1) / kTile; }
  __device__ __forceinline__ int64_t column_blocks() const { return (columns + kTile - 1) / kTile; }
};

// The part of a tile that a thread holds: its first element in the matrix, and how far the matrix goes from there.
template <typename T>
struct Place {
  int64_t row, column, rows_left, columns_left;

  __device__ __forceinline__ Place(const Quantized& out, uint32_t row_block, uint32_t column_block)
      : row(int64_t{row_block} * kTile + threadIdx.x / kGroup<T> * kHeldRows),
        column(int64_t{column_block} * kTile + threadIdx.x % kGroup<T> * kLanes<T>),
        rows_left(out.rows - row),
        columns_left(out.columns - column) {}
};

// The transpose of a tile's codes in shared memory: row c holds 16 chunks of 8 bytes, of which chunk g comes from group
// g and lies at place g ^ (lane that holds column c). So a half-warp, whose lanes write into rows kLanes apart, writes
// into 16 different places; and a pair of chunks stays a pair, if swapped where the lane is odd, and is read as one.
template <typename T>
struct TransposedCodes {
  alignas(16) uint32_t words[kTile * kTile / 4];

  static __device__ __forceinline__ int lane_of(int column) { return column / kLanes<T> % 16; }
  static __device__ __forceinline__ int chunk(int column, int group) {
    return column * kGroups + (group ^ lane_of(column));
  }

  // Codes of the 8 rows of this thread in the j-th of its columns.
  __device__ __forceinline__ void put(int j, const Codes<kHeldRows>& rows) {
    store(rows, words + 2 * chunk(threadIdx.x % kGroup<T> * kLanes<T> + j, threadIdx.x / kGroup<T>));
  }

  // 16 rows of a column.
  __device__ __forceinline__ Codes<16> get(int column, int row) const {
    const auto pair = load<4>(words + 2 * (chunk(column, row / kHeldRows) & ~1));
    if (lane_of(column) % 2 == 0) return pair;
    return {{pair.values[2], pair.values[3], pair.values[0], pair.values[1]}};
  }

  __device__ __forceinline__ uint8_t get_one(int column, int row) const {
    const int at = chunk(column, row / kHeldRows) * kHeldRows + row % kHeldRows;
    return static_cast<uint8_t>(words[at / 4] >> (at % 4 * 8));
  }
};

// Stores the transposed codes of a tile, to the place of its first one in [columns, rows].
template <typename T>
__device__ __forceinline__ void store_transposed(const TransposedCodes<T>& tile, uint8_t* to, int64_t rows,
                                                 int64_t rows_left, int64_t columns_left, bool wide) {
  if (wide) {
#pragma unroll
    for (int i = threadIdx.x; i < kTile * kTile / 16; i += kTileThreads<T>) {
      const int column = i / (kTile / 16), row = i % (kTile / 16) * 16;
      const int64_t count = column < columns_left ? rows_left - row : 0;
      store_first<true>(tile.get(column, row), to + column * rows + row, count);
    }
    return;
  }
  for (int i = threadIdx.x; i < kTile * kTile; i += kTileThreads<T>) {
    const int column = i / kTile, row = i % kTile;
    if (column < columns_left && row < rows_left) to[column * rows + row] = tile.get_one(column, row);
  }
}

// Column c of a tile in arrays in shared memory that lanes read and write four columns at a time, without conflicts:
// first the first four columns of every lane, then the next four.
template <typename T>
__device__ __forceinline__ int slot_of(int column) {
  return column / 4 % (kLanes<T> / 4) * (kGroup<T> * 4) + column / kLanes<T> * 4 + column % 4;
}
template <typename T>
__device__ __forceinline__ int column_at(int slot) {
  return slot / 4 % kGroup<T> * kLanes<T> + slot / (kGroup<T> * 4) * 4 + slot % 4;
}

// The largest magnitudes of columns by group, and the reciprocals of the columns' scales; both by slot.
struct Columns {
  alignas(16) float largest[kGroups][kTile];
  alignas(16) float reciprocals[kTile];
};

using Held = Vector[kHeldRows];

// Makes the compiler forget what it has made of the held values: it would keep twice as many registers of float32
// rather than widen bfloat16 once more.
template <typename T>
__device__ __forceinline__ void forget_floats([[maybe_unused]] Held& held) {
#if defined(__CUDACC__)
#pragma unroll
  for (int k = 0; k < kHeldRows && sizeof(T) == 2; ++k) {
    uint32_t(&words)[4] = held[k].values;
    asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
  }
#endif
}

template <typename T>
__device__ __forceinline__ void column_of(const Held& held, int j, float (&values)[kHeldRows]) {
#pragma unroll
  for (int k = 0; k < kHeldRows; ++k) values[k] = element<T>(held[k], j);
}

// Blocks of 1 x 128 along rows.
template <typename T, bool kWide>
__device__ __forceinline__ void quantize_rows(const Held& held, const Place<T>& place, const Quantized& out,
                                              uint32_t column_block) {
  const int64_t column_blocks = out.column_blocks();
#pragma unroll
  for (int k = 0; k < kHeldRows; ++k) {
    float values[kLanes<T>], scale;
    to_floats<T>(held[k], values);
    const auto codes = encode_block<kGroup<T>>(values, out.power_of_two, scale);
    if (k >= place.rows_left) continue;
    store_first<kWide>(codes, out.codes + (place.row + k) * out.columns + place.column, place.columns_left);
    if (threadIdx.x % kGroup<T> == 0) out.scales[(place.row + k) * column_blocks + column_block] = scale;
  }
}

// Blocks of 128 x 1 along columns: leaves codes in shared memory.
template <typename T>
__device__ __forceinline__ void quantize_columns(Held& held, const Quantized& out, uint32_t row_block,
                                                 uint32_t column_block, Columns& columns, TransposedCodes<T>& codes) {
  const int lane = threadIdx.x % kGroup<T>, group = threadIdx.x / kGroup<T>;
  forget_floats<T>(held);
#pragma unroll
  for (int j = 0; j < kLanes<T>; j += 4) {
    Pack<float, 4> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float values[kHeldRows];
      column_of<T>(held, j + i, values);
      four.values[i] = largest_finite(values);
    }
    store(four, columns.largest[group] + slot_of<T>(lane * kLanes<T> + j));
  }
  __syncthreads();
  if (threadIdx.x < kTile) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) largest = fmaxf(largest, columns.largest[i][threadIdx.x]);
    const float scale = scale_for(largest, out.power_of_two);
    columns.reciprocals[threadIdx.x] = 1.0f / scale;
    const int64_t column = int64_t{column_block} * kTile + column_at<T>(threadIdx.x);
    if (column < out.columns) out.transposed_scales[column * out.row_blocks() + row_block] = scale;
  }
  __syncthreads();
  forget_floats<T>(held);
#pragma unroll
  for (int j = 0; j < kLanes<T>; j += 4) {
    const auto reciprocals = load<4>(columns.reciprocals + slot_of<T>(lane * kLanes<T> + j));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float values[kHeldRows];
      column_of<T>(held, j + i, values);
      codes.put(j + i, encode(values, reciprocals.values[i]));
    }
  }
}

// Transposes 4 x 4 bytes.
__device__ __forceinline__ void transpose_bytes(Pack<uint32_t, 4>& rows) {
  uint32_t(&w)[4] = rows.values;
  const uint32_t upper01 = __byte_perm(w[0], w[1], 0x5140), upper23 = __byte_perm(w[0], w[1], 0x7362);
  const uint32_t lower01 = __byte_perm(w[2], w[3], 0x5140), lower23 = __byte_perm(w[2], w[3], 0x7362);
  w[0] = __byte_perm(upper01, lower01, 0x5410), w[1] = __byte_perm(upper01, lower01, 0x7632);
  w[2] = __byte_perm(upper23, lower23, 0x5410), w[3] = __byte_perm(upper23, lower23, 0x7632);
}

// One block of 128 x 128, so that codes serve both orientations: leaves those of the transpose in shared memory.
template <typename T, bool kWide>
__device__ __forceinline__ void quantize_square(Held& held, const Place<T>& place, const Quantized& out,
                                                uint32_t row_block, uint32_t column_block, TransposedCodes<T>& shared) {
  float largest = 0.0f;
#pragma unroll
  for (int k = 0; k < kHeldRows; ++k) {
    float values[kLanes<T>];
    to_floats<T>(held[k], values);
    largest = fmaxf(largest, largest_finite(values));
  }
  const float scale = scale_for(block_reduce<Larger>(largest), out.power_of_two);
  forget_floats<T>(held);
  const float reciprocal = 1.0f / scale;
  Codes<kLanes<T>> codes[kHeldRows];
#pragma unroll
  for (int k = 0; k < kHeldRows; ++k) {
    float values[kLanes<T>];
    to_floats<T>(held[k], values);
    codes[k] = encode(values, reciprocal);
  }
  if (out.codes) {
#pragma unroll
    for (int k = 0; k < kHeldRows; ++k) {
      if (k >= place.rows_left) continue;
      store_first<kWide>(codes[k], out.codes + (place.row + k) * out.columns + place.column, place.columns_left);
    }
    if (threadIdx.x == 0) out.scales[row_block * out.column_blocks() + column_block] = scale;
  }
  if (out.transposed_codes) {
#pragma unroll
    for (int j = 0; j < kLanes<T>; j += 4) {
      Pack<uint32_t, 4> upper, lower;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        upper.values[k] = codes[k].values[j / 4];
        lower.values[k] = codes[k + 4].values[j / 4];
      }
      transpose_bytes(upper), transpose_bytes(lower);
#pragma unroll
      for (int i = 0; i < 4; ++i) shared.put(j + i, {{upper.values[i], lower.values[i]}});
    }
    if (threadIdx.x == 0) out.transposed_scales[column_block * out.row_blocks() + row_block] = scale;
  }
}

// The outputs of the matrix with this index in the stack.
template <bool kSquare>
__device__ __forceinline__ Quantized part_of_stack(Quantized out, int64_t index) {
  const int64_t elements = out.rows * out.columns;
  const int64_t blocks = kSquare ? out.row_blocks() * out.column_blocks() : 0;
  if (out.codes) out.codes += index * elements, out.scales += index * blocks;
  if (out.transposed_codes) out.transposed_codes += index * elements, out.transposed_scales += index * blocks;
  return out;
}

// Blocks of a multiprocessor: 80 registers for a thread, for float32 64; where elements are loaded one by one, 128.
template <typename T, bool kWide>
constexpr int kTileBlocks = kWide ? (sizeof(T) == 2 ? 3 : 2) : (sizeof(T) == 2 ? 2 : 1);

// Block x takes a tile, block y a matrix; only square blocks are stacked.
template <typename T, bool kWide, bool kSquare>
__global__ void __launch_bounds__(kTileThreads<T>, kTileBlocks<T, kWide>)
    quantize_tiles_kernel(Matrices matrices, Quantized stack, Divisor column_blocks, bool wide_transposed) {
  __shared__ TransposedCodes<T> transposed;
  const uint32_t row_block = column_blocks.quotient(blockIdx.x);
  const uint32_t column_block = blockIdx.x - row_block * column_blocks.divisor;
  const Quantized out = part_of_stack<kSquare>(stack, blockIdx.y);
  const Place<T> place(out, row_block, column_block);

  const T* from = static_cast<const T*>(matrices.at[blockIdx.y]) + place.row * out.columns + place.column;
  Held held;
#pragma unroll
  for (int k = 0; k < kHeldRows; ++k)
    held[k] = load_first<kWide>(from + k * out.columns, k < place.rows_left ? place.columns_left : 0);

  if constexpr (kSquare) {
    quantize_square<T, kWide>(held, place, out, row_block, column_block, transposed);
  } else {
    __shared__ Columns columns;
    if (out.codes) quantize_rows<T, kWide>(held, place, out, column_block);
    if (out.transposed_codes) quantize_columns<T>(held, out, row_block, column_block, columns, transposed);
  }
  if (!out.transposed_codes) return;
  __syncthreads();
  const int64_t first_row = int64_t{row_block} * kTile, first_column = int64_t{column_block} * kTile;
  store_transposed(transposed, out.transposed_codes + first_column * out.rows + first_row, out.rows,
                   out.rows - first_row, out.columns - first_column, wide_transposed);
}

}  // namespace
}  // namespace ernie::cuda
