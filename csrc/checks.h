// Memory-safety guards of the C++ ops. The doors in pyfast/ops have the words for users; these keep a
// direct call of torch.ops.pyfast.* with hostile arguments from touching memory it must not.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "cpu/huge_pages.h"
#include "dispatch.h"

// STD_TORCH_CHECK would say function, file and line before the sentence.
#define PYFAST_EXPECT(condition, ...) \
  if (!(condition)) throw std::runtime_error(torch::headeronly::detail::stdTorchCheckMsgImpl("", __VA_ARGS__))

namespace pyfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// The word in a string argument. Ops take the handle, once, and pass it here: a parameter of type std::string leaks 48
// bytes a call in torch 2.13 (ToImpl<std::string> never deletes its copy), and each pins the heap around it.
inline std::string taken(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string word(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return word;
}

inline std::string text(const Sizes& sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

inline Sizes sizes_of(const Tensor& t) {
  Sizes sizes(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) sizes[d] = t.size(d);
  return sizes;
}

// torch.ops takes None for any tensor.
inline void expect_defined(const char* op, const char* name, const Tensor& t) {
  PYFAST_EXPECT(t.defined(), op, ": ", name, " must be a tensor; got None");
}

inline void expect_cpu(const char* op, const char* name, const Tensor& t) {
  expect_defined(op, name, t);
  PYFAST_EXPECT(t.is_cpu(), op, ": ", name, " must be on the cpu");
}

inline void expect_rank(const char* op, const char* name, const Tensor& t, int64_t rank) {
  expect_cpu(op, name, t);
  PYFAST_EXPECT(t.dim() == rank, op, ": ", name, " must have ", rank, " dimensions; got ", text(sizes_of(t)));
}

inline void expect_shape(const char* op, const char* name, const Tensor& t, const Sizes& sizes) {
  PYFAST_EXPECT(sizes_of(t) == sizes, op, ": ", name, " must be ", text(sizes), "; got ", text(sizes_of(t)));
}

inline void expect_sizes(const char* op, const char* name, const Tensor& t, const Sizes& sizes) {
  expect_cpu(op, name, t);
  expect_shape(op, name, t, sizes);
}

inline void expect_scalar_type(const char* op, const char* name, const Tensor& t, ScalarType type) {
  PYFAST_EXPECT(t.scalar_type() == type, op, ": ", name, " must be ",
                torch::headeronly::toString(type), "; got ", torch::headeronly::toString(t.scalar_type()));
}

// The same dtype as `like`, whose dtype has been checked by dtype_of.
inline void expect_same_dtype(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  expect_scalar_type(op, name, t, like.scalar_type());
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Double: return DType::float64;
    default: break;
  }
  PYFAST_EXPECT(false, op, ": ", name, " must be float32, bfloat16, float16 or float64; got ",
                torch::headeronly::toString(t.scalar_type()));
}

// The dtype sums and statistics of `t` are kept in: float64 for float64, float32 for the others.
inline ScalarType accumulator_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline int32_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    default: return aoti_torch_dtype_float32();
  }
}

// An uninitialised contiguous CPU tensor (floating or bytes), by the C interface: torch::stable::empty looks its
// operator up by name. A large one asks for huge pages.
inline Tensor empty(const Sizes& sizes, ScalarType type) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 1 ? sizes[d] : 1) strides[d] = stride;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         dtype_code(type), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor made(handle);
  const size_t bytes = size_t(made.numel()) * made.element_size();
  if (bytes >= kManyBytes) advise_huge_pages(made.mutable_data_ptr(), bytes);
  return made;
}

inline Tensor none_like(const Tensor& t) { return empty({0}, t.scalar_type()); }   // "not computed"

inline const void* pointer(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

}  // namespace pyfast
