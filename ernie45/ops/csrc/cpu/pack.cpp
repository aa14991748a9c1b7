// compiled once
// From the published layouts to panels and back, for callers in Python (ctypes).
//
// A weight [in, out] comes in pieces: rows of inputs, or rows of outputs if it is stored transposed, as the embedding
// that doubles as the head is. Codes of int4 come two to a byte, the even input in the low nibble. In all kinds, 32 bits
// of a panel hold what belongs to one column and 2, 4 or 8 inputs: a word. The plain words differ from the packed ones
// in the order of nibbles and by an offset only.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "packed.h"
#include "parallel.h"

namespace ernie {
namespace {

constexpr int64_t kInputsOfWord[] = {2, 4, 8};  // by Kind
constexpr int64_t kItemBytes[] = {2, 1, 1};     // of the plain tensor: int4 has two inputs in an item

// Codes are stored with 128 or 8 added, which in two's complement flips the highest bit of each. The eight nibbles of
// int4 go from order 0 1 2 3 4 5 6 7 to 0 4 1 5 2 6 3 7, lowest first.
template <Kind kind>
uint32_t encode(uint32_t plain) {
  if (kind == Kind::kInt8) return plain ^ 0x80808080u;
  if (kind == Kind::kBfloat16) return plain;
  const uint32_t low = plain & 0xFFFF, high = plain >> 16;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i)
    word |= (low >> 4 * i & 15) << 8 * i | (high >> 4 * i & 15) << (8 * i + 4);
  return word ^ 0x88888888u;
}

template <Kind kind>
uint32_t decode(uint32_t word) {
  if (kind == Kind::kInt8) return word ^ 0x80808080u;
  if (kind == Kind::kBfloat16) return word;
  word ^= 0x88888888u;
  uint32_t low = 0, high = 0;
  for (int i = 0; i < 4; ++i) {
    low |= (word >> 8 * i & 15) << 4 * i;
    high |= (word >> (8 * i + 4) & 15) << 4 * i;
  }
  return low | high << 16;
}

// A piece of a plain weight: `count` items (rows of the tensor) from `first` on.
struct Piece {
  Kind kind;
  int64_t in, out, first, count;
  bool transposed;
  uint8_t* data;

  int64_t item() const { return kItemBytes[static_cast<int>(kind)]; }
  int64_t items_of_word() const { return 4 / item(); }
  int64_t input_items() const { return kind == Kind::kInt4 ? (in + 1) / 2 : in; }
  int64_t words() const { return (input_items() + items_of_word() - 1) / items_of_word(); }

  // The words of all columns of a panel for one word of inputs.
  uint32_t* line(int64_t panel, int64_t word) const {
    uint8_t* start = data + panel * panel_bytes(kind, in);
    if (kind == Kind::kInt4) start += word / 8 * (kGroupBytes - kGroupCodes);  // scales lie between the groups
    return reinterpret_cast<uint32_t*>(start) + word * kPanel;
  }
};

// Rows of outputs: a word is four bytes of a row, fewer at its end.
template <class Move>
void walk_outputs(const Piece& piece, uint8_t* plain, const Move& move) {
  const int64_t width = piece.input_items() * piece.item();
  parallel_for(piece.count, 64, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t column = piece.first + row;
      for (int64_t word = 0; word < piece.words(); ++word) {
        const int64_t bytes = std::min<int64_t>(4, width - 4 * word);
        move(plain + row * width + 4 * word, bytes, piece.line(column / kPanel, word)[column % kPanel]);
      }
    }
  });
}

template <Kind kind>
void pack_outputs(const Piece& piece, uint8_t* plain) {
  walk_outputs(piece, plain, [](const uint8_t* source, int64_t bytes, uint32_t& word) {
    uint32_t value = 0;
    std::memcpy(&value, source, bytes);
    word = encode<kind>(value);
  });
}

template <Kind kind>
void unpack_outputs(const Piece& piece, uint8_t* plain) {
  walk_outputs(piece, plain, [](uint8_t* target, int64_t bytes, uint32_t word) {
    const uint32_t value = decode<kind>(word);
    std::memcpy(target, &value, bytes);
  });
}

// Calls body(panel, word, items of that word in the piece, its rows in the piece, columns). `piece.first` begins a word.
template <class Body>
void for_each_line(const Piece& piece, const Body& body) {
  const int64_t per_word = piece.items_of_word(), first_word = piece.first / per_word;
  const int64_t words = (piece.count + per_word - 1) / per_word;
  parallel_for(panels(piece.out), 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel)
      for (int64_t word = 0; word < words; ++word)
        body(piece.line(panel, first_word + word), std::min(per_word, piece.count - word * per_word), word * per_word,
             panel * kPanel, std::min(kPanel, piece.out - panel * kPanel));
  });
}

template <Kind kind, class Item>
void pack_inputs(const Piece& piece, const Item* plain) {
  constexpr int kShift = 8 * sizeof(Item);
  for_each_line(piece, [&](uint32_t* line, int64_t items, int64_t row, int64_t column, int64_t columns) {
    uint32_t words[kPanel] = {};
    for (int64_t item = 0; item < items; ++item) {
      const Item* source = plain + (row + item) * piece.out + column;
      for (int64_t c = 0; c < columns; ++c) words[c] |= static_cast<uint32_t>(source[c]) << kShift * item;
    }
    for (int64_t c = 0; c < kPanel; ++c) line[c] = encode<kind>(words[c]);
  });
}

template <Kind kind, class Item>
void unpack_inputs(const Piece& piece, Item* plain) {
  constexpr int kShift = 8 * sizeof(Item);
  for_each_line(piece, [&](const uint32_t* line, int64_t items, int64_t row, int64_t column, int64_t columns) {
    uint32_t words[kPanel];
    for (int64_t c = 0; c < kPanel; ++c) words[c] = decode<kind>(line[c]);
    for (int64_t item = 0; item < items; ++item) {
      Item* target = plain + (row + item) * piece.out + column;
      for (int64_t c = 0; c < columns; ++c) target[c] = static_cast<Item>(words[c] >> kShift * item);
    }
  });
}

}  // namespace

void unpack_column(const PackedMatrix& matrix, int64_t column, float* out) {
  const Piece piece{matrix.kind, matrix.in, matrix.out, 0, 0, false, const_cast<uint8_t*>(matrix.data)};
  const int64_t panel = column / kPanel, inside = column % kPanel;
  const int64_t per_word = kInputsOfWord[static_cast<int>(matrix.kind)];
  for (int64_t first = 0, word = 0; first < matrix.in; first += per_word, ++word) {
    const uint32_t bits = piece.line(panel, word)[inside];
    const int64_t count = std::min(per_word, matrix.in - first);
    float scale = 1;
    if (matrix.kind == Kind::kInt8) scale = matrix.scales[column];
    if (matrix.kind == Kind::kInt4) {
      uint16_t rounded;
      std::memcpy(&rounded, matrix.panel(panel) + first / kGroup * kGroupBytes + kGroupCodes + 2 * inside, 2);
      scale = bfloat16_to_float(rounded);
    }
    for (int64_t i = 0; i < count; ++i) {
      if (matrix.kind == Kind::kBfloat16)
        out[first + i] = bfloat16_to_float(static_cast<uint16_t>(bits >> 16 * i));
      else if (matrix.kind == Kind::kInt8)
        out[first + i] = (static_cast<int>(bits >> 8 * i & 255) - 128) * scale;
      else
        out[first + i] = (static_cast<int>(bits >> (i < 4 ? 8 * i : 8 * i - 28) & 15) - 8) * scale;
    }
  }
}

}  // namespace ernie

#define ERNIE_EXPORT extern "C" __attribute__((visibility("default")))

ERNIE_EXPORT int64_t ernie45_packed_bytes(int kind, int64_t in, int64_t out) {
  return ernie::panels(out) * ernie::panel_bytes(static_cast<ernie::Kind>(kind), in);
}

// Asks for pages of 2 MB where they fit into the memory, before it is first touched.
ERNIE_EXPORT void ernie45_use_large_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kLarge = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (start + kLarge - 1) / kLarge * kLarge, end = (start + bytes) / kLarge * kLarge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Codes that stand for zero, everywhere: what padding must hold.
ERNIE_EXPORT void ernie45_clear_packed(int kind, int64_t in, int64_t out, int64_t count, uint8_t* data) {
  using namespace ernie;
  const Kind which = static_cast<Kind>(kind);
  const int64_t bytes = panel_bytes(which, in), total = panels(out) * count;
  parallel_for(total, 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      uint8_t* start = data + panel * bytes;
      if (which == Kind::kInt4) {
        for (int64_t offset = 0; offset < bytes; offset += kGroupBytes) {
          std::memset(start + offset, 0x88, kGroupCodes);
          std::memset(start + offset + kGroupCodes, 0, kGroupBytes - kGroupCodes);
        }
      } else {
        std::memset(start, which == Kind::kInt8 ? 128 : 0, bytes);
      }
    }
  });
}

// Writes `count` rows of the plain tensor, from row `first` on, into the panels at `data`. Rows of inputs begin with a
// whole word: at a multiple of 2 (bfloat16) or 4.
ERNIE_EXPORT void ernie45_pack(int kind, int64_t in, int64_t out, int transposed, int64_t first, int64_t count,
                               void* plain, uint8_t* data) {
  using namespace ernie;
  const Piece piece{static_cast<Kind>(kind), in, out, first, count, transposed != 0, data};
  uint8_t* bytes = static_cast<uint8_t*>(plain);
  switch (piece.kind) {
    case Kind::kBfloat16:
      return transposed ? pack_outputs<Kind::kBfloat16>(piece, bytes)
                        : pack_inputs<Kind::kBfloat16>(piece, static_cast<const uint16_t*>(plain));
    case Kind::kInt8:
      return transposed ? pack_outputs<Kind::kInt8>(piece, bytes) : pack_inputs<Kind::kInt8, uint8_t>(piece, bytes);
    default:
      return transposed ? pack_outputs<Kind::kInt4>(piece, bytes) : pack_inputs<Kind::kInt4, uint8_t>(piece, bytes);
  }
}

// The reverse of ernie45_pack.
ERNIE_EXPORT void ernie45_unpack(int kind, int64_t in, int64_t out, int transposed, int64_t first, int64_t count,
                                 uint8_t* data, void* plain) {
  using namespace ernie;
  const Piece piece{static_cast<Kind>(kind), in, out, first, count, transposed != 0, data};
  uint8_t* bytes = static_cast<uint8_t*>(plain);
  switch (piece.kind) {
    case Kind::kBfloat16:
      return transposed ? unpack_outputs<Kind::kBfloat16>(piece, bytes)
                        : unpack_inputs<Kind::kBfloat16>(piece, static_cast<uint16_t*>(plain));
    case Kind::kInt8:
      return transposed ? unpack_outputs<Kind::kInt8>(piece, bytes) : unpack_inputs<Kind::kInt8>(piece, bytes);
    default:
      return transposed ? unpack_outputs<Kind::kInt4>(piece, bytes) : unpack_inputs<Kind::kInt4>(piece, bytes);
  }
}

// Writes (or, with `back`, reads) the bfloat16 scales [ceil(in / 64), out] of int4 panels.
ERNIE_EXPORT void ernie45_pack_scales(int64_t in, int64_t out, int back, uint16_t* plain, uint8_t* data) {
  using namespace ernie;
  const int64_t bytes = panel_bytes(Kind::kInt4, in);
  for (int64_t group = 0; group * kGroup < in; ++group)
    for (int64_t index = 0; index < panels(out); ++index) {
      uint8_t* scales = data + index * bytes + group * kGroupBytes + kGroupCodes;
      uint16_t* line = plain + group * out + index * kPanel;
      const size_t size = 2 * std::min(kPanel, out - index * kPanel);
      if (back)
        std::memcpy(line, scales, size);
      else
        std::memcpy(scales, line, size);
    }
}

// out [count, in] = the columns `ids` of a packed weight in float32: the rows of an embedding.
ERNIE_EXPORT void ernie45_packed_columns(int kind, int64_t in, int64_t out, const uint8_t* data, const float* scales,
                                         const int64_t* ids, int64_t count, float* result) {
  using namespace ernie;
  const PackedMatrix matrix{static_cast<Kind>(kind), in, out, data, scales};
  parallel_for(count, 8, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) unpack_column(matrix, ids[row], result + row * in);
  });
}
