#include "cublaslt.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

namespace pyfast {
namespace {

// What is used of the library's interface, by NVIDIA's documentation of cuBLAS 12 and 13, "Using the cuBLASLt API":
// its types are opaque pointers or plain structs, its enumerations are ints, and a status of 0 is success.
using Handle = void*;
using Descriptor = void*;
using Layout = void*;
using Preference = void*;

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

constexpr int kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14;   // cudaDataType
constexpr int kComputeFloat32 = 68;                         // cublasComputeType_t
enum Attribute { kTransposeA = 3, kTransposeB = 4, kEpilogue = 7, kBiasPointer = 8, kAuxPointer = 11, kAuxStride = 12 };
enum Wish { kMostWorkspace = 1, kReductions = 3, kAlignmentA = 5, kAlignmentB = 6, kAlignmentC = 7, kAlignmentD = 8 };
enum Epilogue {
  kDefault = 1, kRelu = 2, kBias = 4, kGelu = 32, kAux = 128,   // flags that add up; GELU is that of tanh
  kBiasGradientA = 256, kBiasGradientB = 512,                   // the sums of A's rows or B's columns over the depth
};
constexpr uint64_t kAllowed = 32 << 20;     // bytes of workspace; what NVIDIA advises for capability 9.0
constexpr uint32_t kOrderedReduction = 2;   // of split products: in float32 and out of place, always in one order

struct Library {
  int (*create)(Handle*);
  int (*create_descriptor)(Descriptor*, int compute, int scale);
  int (*destroy_descriptor)(Descriptor);
  int (*set_attribute)(Descriptor, int, const void*, size_t);
  int (*create_layout)(Layout*, int type, uint64_t rows, uint64_t cols, int64_t stride);
  int (*destroy_layout)(Layout);
  int (*create_preference)(Preference*);
  int (*destroy_preference)(Preference);
  int (*set_preference)(Preference, int, const void*, size_t);
  int (*heuristic)(Handle, Descriptor, Layout, Layout, Layout, Layout, Preference, int wanted, Heuristic*, int* found);
  int (*matmul)(Handle, Descriptor, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta,
                const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace, size_t, cudaStream_t);
  bool whole;
};

template <class F>
bool find(void* library, const char* name, F*& function) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  return function != nullptr;
}

// By PYFAST_CUBLASLT; or as torch has loaded it, whose libraries are known by these names then; or of the system.
void* open_library() {
  if (const char* const asked = std::getenv("PYFAST_CUBLASLT")) return dlopen(asked, RTLD_NOW | RTLD_LOCAL);
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
    if (void* const found = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return found;
  return nullptr;
}

const Library& library() {
  static const Library found = [] {
    Library l{};
    void* const from = open_library();
    l.whole = from && find(from, "cublasLtCreate", l.create) &&
              find(from, "cublasLtMatmulDescCreate", l.create_descriptor) &&
              find(from, "cublasLtMatmulDescDestroy", l.destroy_descriptor) &&
              find(from, "cublasLtMatmulDescSetAttribute", l.set_attribute) &&
              find(from, "cublasLtMatrixLayoutCreate", l.create_layout) &&
              find(from, "cublasLtMatrixLayoutDestroy", l.destroy_layout) &&
              find(from, "cublasLtMatmulPreferenceCreate", l.create_preference) &&
              find(from, "cublasLtMatmulPreferenceDestroy", l.destroy_preference) &&
              find(from, "cublasLtMatmulPreferenceSetAttribute", l.set_preference) &&
              find(from, "cublasLtMatmulAlgoGetHeuristic", l.heuristic) && find(from, "cublasLtMatmul", l.matmul);
    return l;
  }();
  return found;
}

// One handle for each GPU, for as long as the process lives; null where none can be made. The library's functions may
// be called from several threads with one handle.
Handle handle() {
  static std::mutex lock;
  static std::map<int, Handle> handles;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return nullptr;
  const std::lock_guard<std::mutex> guard(lock);
  Handle& own = handles[device];
  if (!own && library().create(&own)) own = nullptr;
  return own;
}

// A matrix in memory: columns `stride` elements apart; `transposed` before it is multiplied.
struct Factor {
  const void* data;
  int64_t stride;
  bool transposed;
};

// d [rows, cols], columns side by side, = a [rows, depth] b [depth, cols].
struct Product {
  DType dtype;
  Factor a, b;
  void* d;
  int64_t rows, cols, depth;
  int epilogue;
  const void* bias;
  void* aux;   // [rows, cols], as d
};

int type_of(DType dtype) {
  return dtype == DType::float32 ? kFloat32 : dtype == DType::bfloat16 ? kBfloat16 : kFloat16;
}

uint32_t alignment_of(const void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data) | 256;
  return uint32_t(address & (~address + 1));
}

// An object of the library, destroyed with this.
class Owned {
 public:
  explicit Owned(int (*destroy)(void*)) : destroy_(destroy) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (object) destroy_(object);
  }
  void* object = nullptr;

 private:
  int (*destroy_)(void*);
};

// What the library is told of a product, and how it would run it.
class Call {
 public:
  explicit Call(const Product& p)
      : p_(p), descriptor_(library().destroy_descriptor), a_(library().destroy_layout), b_(library().destroy_layout),
        d_(library().destroy_layout), preference_(library().destroy_preference) {
    ready_ = describe() && lay_out(a_, p.a, p.rows, p.depth) && lay_out(b_, p.b, p.depth, p.cols) &&
             lay_out(d_, {p.d, p.rows, false}, p.rows, p.cols) && prefer();
  }

  bool run(const Allocate& allocate, cudaStream_t stream) const {
    const Handle own = ready_ ? handle() : nullptr;
    Heuristic best{};
    int found = 0;
    if (!own || library().heuristic(own, descriptor_.object, a_.object, b_.object, d_.object, d_.object,
                                    preference_.object, 1, &best, &found) ||
        found < 1 || best.status)
      return false;
    const float one = 1.0f, zero = 0.0f;
    void* const workspace = best.workspace ? allocate(int64_t(best.workspace)) : nullptr;
    return !library().matmul(own, descriptor_.object, &one, p_.a.data, a_.object, p_.b.data, b_.object, &zero, p_.d,
                             d_.object, p_.d, d_.object, &best.algorithm, workspace, best.workspace, stream);
  }

 private:
  template <class V>
  bool set(Attribute attribute, V value) {
    return !library().set_attribute(descriptor_.object, attribute, &value, sizeof value);
  }
  template <class V>
  bool wish(Wish wish, V value) {
    return !library().set_preference(preference_.object, wish, &value, sizeof value);
  }

  bool describe() {
    if (library().create_descriptor(&descriptor_.object, kComputeFloat32, kFloat32)) return false;
    bool right = set(kTransposeA, int32_t(p_.a.transposed)) && set(kTransposeB, int32_t(p_.b.transposed)) &&
                 set(kEpilogue, int32_t(p_.epilogue));
    if (p_.bias) right = right && set(kBiasPointer, p_.bias);
    if (p_.aux) right = right && set(kAuxPointer, static_cast<const void*>(p_.aux)) && set(kAuxStride, p_.rows);
    return right;
  }

  // Of a factor [rows, cols] after it has been transposed.
  bool lay_out(Owned& layout, const Factor& f, int64_t rows, int64_t cols) {
    if (f.transposed) std::swap(rows, cols);
    return f.stride >= rows &&
           !library().create_layout(&layout.object, type_of(p_.dtype), uint64_t(rows), uint64_t(cols), f.stride);
  }

  bool prefer() {
    return !library().create_preference(&preference_.object) && wish(kMostWorkspace, kAllowed) &&
           wish(kReductions, kOrderedReduction) && wish(kAlignmentA, alignment_of(p_.a.data)) &&
           wish(kAlignmentB, alignment_of(p_.b.data)) && wish(kAlignmentC, alignment_of(p_.d)) &&
           wish(kAlignmentD, alignment_of(p_.d));
  }

  const Product& p_;
  Owned descriptor_, a_, b_, d_, preference_;
  bool ready_ = false;
};

std::atomic<bool> chosen{false};

}  // namespace

bool choose_cublaslt(bool on) {
  if (on && !library().whole) return false;
  chosen = on;
  return true;
}

bool cublaslt_chosen() { return chosen; }

// Rows here are columns there: out^T [n, m] = weight x^T.
bool cublaslt_linear_act(const LinearActCudaArgs& l, const Allocate& allocate, cudaStream_t stream) {
  const bool known = l.act == Act::none || l.act == Act::relu || l.act == Act::gelu_tanh;
  if (!known || l.k == 0 || (l.preact && l.n % 8)) return false;   // aux columns start at multiples of 8 elements
  int epilogue = l.act == Act::relu ? kRelu : l.act == Act::gelu_tanh ? kGelu : 0;
  epilogue |= (l.preact ? kAux : 0) | (l.bias ? kBias : 0);
  const Product p{l.dtype, {l.weight, l.weight_stride, !l.transposed}, {l.x, l.x_stride, false}, l.out, l.n, l.m, l.k,
                  epilogue ? epilogue : int(kDefault), l.bias, l.preact};
  return Call(p).run(allocate, stream);
}

// grad_x^T [k, m] = weight^T grad_out^T.
bool cublaslt_grad_x(const LinearActBackwardCudaArgs& l, const Allocate& allocate, cudaStream_t stream) {
  if (l.k == 0) return false;
  const Product p{l.dtype, {l.weight, l.weight_stride, l.transposed}, {l.grad_out, l.n, false}, l.grad_x, l.k, l.m,
                  l.n, kDefault, nullptr, nullptr};
  return Call(p).run(allocate, stream);
}

// grad_weight^T [k, n] = x^T grad_out; of a transposed weight, [n, k] = grad_out^T x.
bool cublaslt_grad_weight(const LinearActBackwardCudaArgs& l, const Allocate& allocate, cudaStream_t stream) {
  if (l.k == 0) return false;
  const Factor x{l.x, l.x_stride, l.transposed}, d{l.grad_out, l.n, !l.transposed};
  const int sums = l.transposed ? kBiasGradientA : kBiasGradientB;
  const Product p{l.dtype, l.transposed ? d : x, l.transposed ? x : d, l.grad_weight, l.transposed ? l.n : l.k,
                  l.transposed ? l.k : l.n, l.m, l.grad_bias ? sums : int(kDefault), l.grad_bias, nullptr};
  return Call(p).run(allocate, stream);
}

}  // namespace pyfast

// For csrc/bindings.cpp, where there is a CUDA part.
extern "C" bool pyfast_choose_cublaslt(bool on) { return pyfast::choose_cublaslt(on); }
extern "C" bool pyfast_cublaslt_chosen() { return pyfast::cublaslt_chosen(); }
