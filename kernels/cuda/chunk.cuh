// 16 bytes of a row, of elements of any alignment: what elementwise passes load at once.
#pragma once

#include "mma.cuh"

namespace pyfast {

template <class T>
union Chunk {   // 16 bytes
  static constexpr int kSize = 16 / int(sizeof(T));
  uint4 whole;
  T part[kSize];
};

template <class T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* from, int count, bool aligned) {
  Chunk<T> chunk;
  chunk.whole = aligned ? *reinterpret_cast<const uint4*>(from) : gather(from, count * int(sizeof(T)));
  return chunk;
}

}  // namespace pyfast
