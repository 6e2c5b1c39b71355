// Argument checks of the operators. A failed check throws a runtime_error whose text begins with the Python exception
// it stands for ("ValueError: ..."): only RuntimeError crosses the stable ABI, and ops/_library.py turns it back.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "params.h"

namespace teco::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const char* exception, const Parts&... parts) {
  std::ostringstream message;
  message << exception << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail("ValueError", parts...);
}

// A size that several arguments share: the first tensor that carries it binds it, the others must agree.
struct Size {
  const char* name;
  int64_t value = -1;
  const char* bound_by = nullptr;
};

const char* dtype_name(ScalarType type);
DType to_dtype(ScalarType type, const char* argument);

// Checks one tensor argument; every method returns the object, so checks read as a sentence:
//   Argument(query, "query").on_cpu().floating().shape({&T, &Hq, &D}).unit_last_stride();
class Argument {
 public:
  Argument(const Tensor& tensor, const char* name) : tensor_(tensor), name_(name) {}

  const Argument& on_cpu() const;
  const Argument& on_device_of(const Tensor& other, const char* other_name) const;
  const Argument& floating() const;  // fp32, fp16 or bf16
  const Argument& dtype(ScalarType expected) const;
  const Argument& same_dtype(const Tensor& other, const char* other_name) const;
  const Argument& one_of(std::initializer_list<ScalarType> expected) const;
  const Argument& shape(std::initializer_list<Size*> sizes) const;
  const Argument& unit_last_stride() const;
  const Argument& contiguous() const;
  const Argument& written() const;  // not expanded: every element has memory of its own

 private:
  std::string shape_string() const;
  const Tensor& tensor_;
  const char* name_;
};

// The leading dimensions of a tensor as rows of its last one.
struct Rows {
  int64_t count, size, stride;
};
// Fails unless the leading dimensions collapse into one stride and the last one has stride 1.
Rows rows_of(const Tensor& tensor, const char* name);

// Fails when the rows of `out`, which is written, share memory with those of `input`. Where an operator reads a row
// before it writes it, `out` may be `input` itself.
enum class InPlace : bool { kNo, kYes };
void check_apart(const Tensor& out, const char* out_name, const Rows& out_rows, const Tensor& input,
                 const char* input_name, const Rows& input_rows, InPlace in_place);

// torch.get_num_threads() of the calling thread.
int num_threads();

}  // namespace teco::ops
