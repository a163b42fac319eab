// attention of few queries on many keys: when its keys are split, and what the launcher takes.
#pragma once

#include "attention_operands.h"

namespace pyfast {

// The parts that the keys are cut into, and the keys of each; no parts where the kernel for many queries is the better
// one.
struct KeyParts {
  int count, keys;
};

constexpr int kDecodeQueries = 16;      // of a tile
constexpr int kDecodeBlocks = 264;      // two on each multiprocessor of a large GPU
constexpr int kLeastKeysOfPart = 256;   // below, reading the parts again costs more than it saves

// By the sizes alone, so that the same call always gives the same bits. With a causal mask few queries see few keys.
constexpr KeyParts attention_key_parts(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys,
                                       bool causal) {
  if (causal || keys < 2 * kLeastKeysOfPart || queries > kDecodeQueries) return {0, 0};
  const int64_t rows = queries == 1 ? heads / kv_heads : queries, planes = batch * (queries == 1 ? kv_heads : heads);
  const int64_t tiles = planes * ((rows + kDecodeQueries - 1) / kDecodeQueries);
  const int64_t most = keys / kLeastKeysOfPart, wanted = (kDecodeBlocks + tiles - 1) / tiles;
  const int64_t parts = wanted < most ? wanted : most;
  const int64_t each = ((keys + parts - 1) / parts + 63) / 64 * 64;
  return {int((keys + each - 1) / each), int(each)};
}

struct AttentionDecodeArgs {
  AttentionCudaArgs forward;   // without a causal mask
  int parts_count, part_keys, stride;   // as attention_key_parts says; value_size rounded up to 4
  float* parts;   // [parts, B, H, Tq, stride]: workspace
  float* sums;    // [parts, B, H, Tq, 2]: workspace; the peak of the scores, as OnlineSoftmax has it, and the sum
};

// One query: the heads that share keys become queries of one head, which lie `head` apart.
inline AttentionDecodeArgs heads_as_queries(AttentionDecodeArgs d) {
  AttentionCudaArgs& a = d.forward;
  const int group = a.heads / a.kv_heads;
  if (a.queries != 1 || group == 1) return d;
  a.q.time = a.q.head, a.q.head *= group;
  a.out.time = a.out.head, a.out.head *= group;
  a.mask.query = a.mask.head, a.mask.head *= group;
  a.queries = group, a.heads = a.kv_heads;
  return d;
}

cudaError_t launch_attention_decode(const AttentionDecodeArgs&, cudaStream_t);

}  // namespace pyfast
