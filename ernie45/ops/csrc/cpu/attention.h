// Grouped-query attention over a bfloat16 key/value cache, in blocks, never holding a full score matrix.
//
// Online softmax over blocks of 64 keys (Dao et al., arXiv 2205.14135). Queries and probabilities are rounded to
// bfloat16, sums are float32.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ernie {

// New tokens and the cache that they look at, their own keys included.
struct AttentionTask {
  const float* query;      // [batch, tokens, ...]: token t of row b starts at query + (b * tokens + t) * query_stride
  int64_t query_stride;
  const uint16_t* keys;    // bfloat16 [batch, capacity, kv_heads, head_dim]
  const uint16_t* values;  // the same
  const int64_t* first;    // [batch] first visible key
  const int64_t* length;   // [batch] keys that the last of the tokens sees, from 0 on; earlier tokens see fewer
  int64_t batch, tokens, capacity, heads, kv_heads, head_dim;
  float scale;
  float* out;              // [batch * tokens, heads * head_dim]
};

// How the work is cut into independent pieces: rows, kv heads, blocks of tokens, and ranges of keys when there would
// otherwise be fewer pieces than threads.
struct AttentionPlan {
  int64_t block;   // tokens per piece
  int64_t blocks;  // pieces along the tokens
  int64_t splits;  // pieces along the keys
  int64_t pieces(const AttentionTask& task) const { return task.batch * task.kv_heads * blocks * splits; }
};

AttentionPlan plan_attention(const AttentionTask& task, int64_t threads);

// Bytes of the buffer that holds unfinished sums of all pieces (0 without splits), and of one thread's own buffer.
int64_t partial_bytes(const AttentionTask& task, const AttentionPlan& plan);
int64_t attention_scratch_bytes(const AttentionTask& task, const AttentionPlan& plan);

}  // namespace ernie

ERNIE_FOR_EACH_ISA(
  // Computes one piece; writes `out`, or with splits its unfinished sums.
  void attend(const AttentionTask& task, const AttentionPlan& plan, int64_t piece, void* scratch, float* partial);

  // Joins the splits of rows first .. last - 1 of [batch * tokens].
  void join_splits(const AttentionTask& task, const AttentionPlan& plan, const float* partial, int64_t first,
                   int64_t last);
)

namespace ernie {

// The whole of it, on all threads.
void attention(const AttentionTask& task);

}  // namespace ernie
