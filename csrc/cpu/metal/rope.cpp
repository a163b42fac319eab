#include "rope.h"

#include "vec.h"

namespace pyfast {
namespace {

constexpr int64_t kGrainElements = 16384;   // below this a thread costs more to wake than it saves
constexpr int kAngleSlot = 0;

// Pairs (i, i + D/2): (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin). cos and sin [D/2].
template <class T, class A = acc_t<T>>
void rotate_halves(const T* x, const A* cos, const A* sin, T* out, int64_t half) {
  sweep<A>(half, [&](auto lanes, int64_t i) {
    const Vec<A> c = lanes.load(cos + i), s = lanes.load(sin + i);
    const Vec<A> first = lanes.load(x + i), second = lanes.load(x + half + i);
    lanes.store(out + i, first * c - second * s);
    lanes.store(out + half + i, second * c + first * s);
  });
}

// Pairs (2i, 2i + 1): x times cos plus x with its neighbours exchanged times sin. cos and sin [D], one entry
// per element, sin negative at the even ones.
template <class T, class A = acc_t<T>>
void rotate_neighbours(const T* x, const A* cos, const A* sin, T* out, int64_t size) {
  using Index = __typeof__(Vec<A>{} < Vec<A>{});
  Index neighbour;
  for (int64_t i = 0; i < kLanes<A>; ++i) neighbour[i] = i ^ 1;
  sweep<A>(size, [&](auto lanes, int64_t i) {
    const Vec<A> v = lanes.load(x + i);
    lanes.store(out + i, v * lanes.load(cos + i) + __builtin_shuffle(v, neighbour) * lanes.load(sin + i));
  });
}

// The angles of one position in the form the rotation reads, shared by all heads.
template <class A>
void prepare_angles(const RopeArgs& a, int64_t t, A* cos, A* sin) {
  const float *c = a.cos + t * a.cos_stride, *s = a.sin + t * a.sin_stride;
  const A sign = a.inverse ? -1 : 1;
  for (int64_t i = 0; i < a.size / 2; ++i) {
    if (a.interleaved) {
      cos[2 * i] = cos[2 * i + 1] = c[i];
      sin[2 * i] = -sign * s[i];
      sin[2 * i + 1] = sign * s[i];
    } else {
      cos[i] = c[i];
      sin[i] = sign * s[i];
    }
  }
}

template <class T, class A = acc_t<T>>
void rotate(const RopeArgs& a) {
  const int64_t rows = a.heads * a.size;
  parallel_for(a.length * a.batch, ceil_div(kGrainElements, rows), [&](int64_t begin, int64_t end) {
    A *cos = scratch<A>(kAngleSlot, 2 * a.size), *sin = cos + a.size;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / a.batch, b = i % a.batch;
      if (i == begin || b == 0) prepare_angles(a, t, cos, sin);
      const T* x = static_cast<const T*>(a.x) + b * a.batch_stride + t * a.time_stride;
      T* out = static_cast<T*>(a.out) + (b * a.length + t) * rows;
      for (int64_t h = 0; h < a.heads; ++h, x += a.head_stride, out += a.size) {
        if (a.interleaved) rotate_neighbours(x, cos, sin, out, a.size);
        else rotate_halves(x, cos, sin, out, a.size / 2);
      }
    }
  });
}

}  // namespace

template <>
void rope<kIsa>(const RopeArgs& a) {
  dispatch_stored(a.dtype, [&](auto tag) { rotate<typename decltype(tag)::type>(a); });
}

}  // namespace pyfast
