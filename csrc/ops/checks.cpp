#include "ops/checks.h"

namespace teco::ops {

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return "another dtype";
  }
}

DType to_dtype(ScalarType type, const char* argument) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8E4M3;
    default:
      fail("TypeError", argument, ": dtype ", dtype_name(type), " has no kernel");
  }
}

const Argument& Argument::on_cpu() const {
  require(tensor_.is_cpu(), name_, ": expected a tensor on the cpu, as the other arguments are");
  return *this;
}

const Argument& Argument::on_device_of(const Tensor& other, const char* other_name) const {
  require(tensor_.is_cpu() == other.is_cpu() && tensor_.get_device_index() == other.get_device_index(), name_,
          ": expected a tensor on the device of ", other_name);
  return *this;
}

const Argument& Argument::floating() const {
  return one_of({ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
}

const Argument& Argument::dtype(ScalarType expected) const {
  return one_of({expected});
}

const Argument& Argument::same_dtype(const Tensor& other, const char* other_name) const {
  if (tensor_.scalar_type() != other.scalar_type())
    fail("TypeError", name_, ": expected the dtype of ", other_name, " (", dtype_name(other.scalar_type()), "), got ",
         dtype_name(tensor_.scalar_type()));
  return *this;
}

const Argument& Argument::one_of(std::initializer_list<ScalarType> expected) const {
  std::string names;
  for (const ScalarType type : expected) {
    if (tensor_.scalar_type() == type) return *this;
    names += (names.empty() ? "" : ", ") + std::string(dtype_name(type));
  }
  fail("TypeError", name_, ": expected dtype ", names, ", got ", dtype_name(tensor_.scalar_type()));
}

std::string Argument::shape_string() const {
  std::string text = "[";
  for (int64_t i = 0; i < tensor_.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor_.size(i));
  return text + "]";
}

const Argument& Argument::shape(std::initializer_list<Size*> sizes) const {
  const auto expected = [&] {  // only made when it is needed: a check is on the path of every call
    std::string text = "[";
    for (const Size* size : sizes) text += (text.size() > 1 ? ", " : "") + std::string(size->name);
    return text + "]";
  };
  if (tensor_.dim() != static_cast<int64_t>(sizes.size()))
    fail("ValueError", name_, ": expected shape ", expected(), ", got ", shape_string());
  int64_t i = 0;
  for (Size* size : sizes) {
    const int64_t actual = tensor_.size(i++);
    if (size->value < 0) {
      size->value = actual;
      size->bound_by = name_;
    }
    if (size->value != actual)
      fail("ValueError", name_, ": expected shape ", expected(), " with ", size->name, " = ", size->value,
           size->bound_by ? " (from " : "", size->bound_by ? size->bound_by : "", size->bound_by ? ")" : "", ", got ",
           shape_string());
  }
  return *this;
}

const Argument& Argument::unit_last_stride() const {
  const int64_t last = tensor_.dim() - 1;
  require(last >= 0, name_, ": expected at least one dimension, got a scalar");
  require(tensor_.stride(last) == 1 || tensor_.size(last) <= 1, name_,
          ": expected stride 1 in the last dimension, got stride ", tensor_.stride(last), "; call .contiguous()");
  return *this;
}

const Argument& Argument::contiguous() const {
  if (!tensor_.is_contiguous())
    fail("ValueError", name_, ": expected a contiguous tensor, got shape ", shape_string(),
         " with other strides; call .contiguous()");
  return *this;
}

const Argument& Argument::written() const {
  for (int64_t i = 0; i < tensor_.dim(); ++i)
    require(tensor_.stride(i) != 0 || tensor_.size(i) <= 1 || tensor_.numel() == 0, name_,
            ": expected memory of its own for every element, as they are written, got stride 0 in dimension ", i);
  return *this;
}

Rows rows_of(const Tensor& tensor, const char* name) {
  Argument(tensor, name).unit_last_stride();
  const int64_t last = tensor.dim() - 1;
  Rows rows{1, tensor.size(last), tensor.size(last)};
  bool inner = true;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (tensor.size(i) == 1) continue;
    if (inner) {
      rows.stride = tensor.stride(i);
      inner = false;
    } else {
      require(tensor.stride(i) == rows.stride * rows.count || tensor.numel() == 0, name,
              ": its leading dimensions do not collapse into rows of one stride; call .contiguous()");
    }
    rows.count *= tensor.size(i);
  }
  return rows;
}

void check_apart(const Tensor& out, const char* out_name, const Rows& out_rows, const Tensor& input,
                 const char* input_name, const Rows& input_rows, InPlace in_place) {
  if (out.numel() == 0 || input.numel() == 0) return;
  const auto bytes = static_cast<int64_t>(input.element_size()), out_bytes = static_cast<int64_t>(out.element_size());
  const int64_t out_size = out_rows.size * out_bytes, out_stride = out_rows.stride * out_bytes;
  const int64_t input_size = input_rows.size * bytes, input_stride = input_rows.stride * bytes;
  // Where `out` begins, as seen from the beginning of `input`.
  const int64_t begin =
      static_cast<const char*>(out.const_data_ptr()) - static_cast<const char*>(input.const_data_ptr());
  if (begin >= (input_rows.count - 1) * input_stride + input_size) return;
  if (begin + (out_rows.count - 1) * out_stride + out_size <= 0) return;
  if (out_stride == input_stride || out_rows.count == 1) {
    if (begin == 0 && in_place == InPlace::kYes) return;
    // Columns of one and the same wider matrix.
    const int64_t column = input_stride > 0 ? (begin % input_stride + input_stride) % input_stride : 0;
    if (out_rows.count > 1 && column >= input_size && column + out_size <= out_stride) return;
  }
  fail("ValueError", out_name, ": expected memory apart from that of ", input_name);
}

int num_threads() {
  uint32_t count = 1;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return static_cast<int>(count);
}

}  // namespace teco::ops
