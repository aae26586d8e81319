// Operations of a compiled decoding step: products by packed weights, attention over the cache's slots, and calls of observers.
//
// The graph passes indices (of a layer, of a module). `bind` sets the objects that they refer to, for the calling thread. So one
// graph serves every batch, and several engines of one process do not interfere. operations.py declares the shapes.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

namespace {

using Vector = at::vec::Vectorized<float>;

struct Bindings {
  std::vector<at::Tensor> weights;                 // packed, per linear layer
  std::vector<std::optional<at::Tensor>> biases;   // per linear layer
  std::vector<at::Tensor> keys, values;            // per layer: [slots, kv_heads, columns, d]
  int64_t low, high;                               // columns [low, high) are filled; this step fills `high`
  std::vector<bool> observed;                       // per exposed module, whether it is observed
};

thread_local std::optional<Bindings> bound;

const Bindings& here() {
  TORCH_CHECK(bound.has_value(), "an operation of a compiled step was called outside of a step");
  return *bound;
}

void bind(
    std::vector<at::Tensor> weights,
    c10::List<std::optional<at::Tensor>> biases,
    std::vector<at::Tensor> keys,
    std::vector<at::Tensor> values,
    int64_t low,
    int64_t high,
    std::vector<int64_t> observed,
    int64_t modules) {
  std::vector<bool> flags(modules, false);
  for (int64_t index : observed) flags.at(index) = true;
  bound = Bindings{std::move(weights), biases.vec(), std::move(keys), std::move(values), low, high, std::move(flags)};
}

void release() { bound.reset(); }

at::Tensor linear(const at::Tensor& rows, int64_t number, int64_t outputs) {
  using Multiply = at::Tensor(
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, c10::string_view,
      c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
  static const auto multiply =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Multiply>();
  const Bindings& step = here();
  return multiply.call(rows, step.weights.at(number), step.biases.at(number), "none", c10::List<std::optional<at::Scalar>>(), "");
}

// The size, rounded up to a multiple of a vector's size.
int64_t padded(int64_t size) { return (size + Vector::size() - 1) / Vector::size() * Vector::size(); }

Vector load(const float* source) { return Vector::loadu(source); }

Vector load(const at::BFloat16* source) {
  Vector values;
  at::vec::load_fp32_from_bf16(source, values);
  return values;
}

// scores[column] += query · keys[column], over a block of N vectors of the head's width d.
template <int N, typename T>
void add_products(const float* query, const T* keys, int64_t d, int64_t columns, float* scores) {
  Vector own[N];
  for (int n = 0; n < N; ++n) own[n] = load(query + n * Vector::size());
  for (int64_t column = 0; column < columns; ++column) {
    Vector sum = own[0] * load(keys + column * d);
    for (int n = 1; n < N; ++n) sum = at::vec::fmadd(own[n], load(keys + column * d + n * Vector::size()), sum);
    scores[column] += at::vec::vec_reduce_all<float>([](const Vector& x, const Vector& y) { return x + y; }, sum);
  }
}

// output = the sum of weights[column] * values[column], over a block of N vectors of the head's width d.
template <int N, typename T>
void weighted_sum(const float* weights, const T* values, int64_t d, int64_t columns, float* output) {
  Vector sums[N];
  for (int n = 0; n < N; ++n) sums[n] = Vector(0.f);
  for (int64_t column = 0; column < columns; ++column) {
    const Vector weight(weights[column]);
    for (int n = 0; n < N; ++n) sums[n] = at::vec::fmadd(weight, load(values + column * d + n * Vector::size()), sums[n]);
  }
  for (int n = 0; n < N; ++n) sums[n].store(output + n * Vector::size());
}

// scores = softmax(scores), over the first `size` numbers of a padded buffer.
void softmax(float* scores, int64_t size) {
  std::fill(scores + size, scores + padded(size), -std::numeric_limits<float>::infinity());
  Vector largest = load(scores);
  for (int64_t i = 0; i < size; i += Vector::size()) largest = at::vec::maximum(largest, load(scores + i));
  const Vector top(at::vec::vec_reduce_all<float>(
      [](const Vector& x, const Vector& y) { return at::vec::maximum(x, y); }, largest));
  Vector total(0.f);
  for (int64_t i = 0; i < size; i += Vector::size()) {
    const Vector weights = (load(scores + i) - top).exp();
    weights.store(scores + i);
    total = total + weights;
  }
  const Vector sum(at::vec::vec_reduce_all<float>([](const Vector& x, const Vector& y) { return x + y; }, total));
  for (int64_t i = 0; i < size; i += Vector::size()) (load(scores + i) / sum).store(scores + i);
}

// Attention of one query head over its visible columns.
template <typename T>
void attend_head(
    const T* query, const T* keys, const T* values, const T* mask, T* output,
    int64_t columns, int64_t d, int64_t d_value, float scaling) {
  constexpr int64_t one = Vector::size(), four = 4 * one;
  std::vector<float> own(d), scores(padded(columns)), sums(d_value);
  for (int64_t i = 0; i < d; ++i) own[i] = static_cast<float>(query[i]) * scaling;
  for (int64_t column = 0; column < columns; ++column) scores[column] = static_cast<float>(mask[column]);
  int64_t i = 0;
  for (; i + four <= d; i += four) add_products<4>(own.data() + i, keys + i, d, columns, scores.data());
  for (; i + one <= d; i += one) add_products<1>(own.data() + i, keys + i, d, columns, scores.data());
  for (; i < d; ++i)
    for (int64_t column = 0; column < columns; ++column)
      scores[column] += own[i] * static_cast<float>(keys[column * d + i]);
  softmax(scores.data(), columns);
  i = 0;
  for (; i + four <= d_value; i += four) weighted_sum<4>(scores.data(), values + i, d_value, columns, sums.data() + i);
  for (; i + one <= d_value; i += one) weighted_sum<1>(scores.data(), values + i, d_value, columns, sums.data() + i);
  for (; i < d_value; ++i)
    for (int64_t column = 0; column < columns; ++column)
      sums[i] += scores[column] * static_cast<float>(values[column * d_value + i]);
  for (i = 0; i < d_value; ++i) output[i] = static_cast<T>(sums[i]);
}

template <typename T>
void attend_typed(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& mask,
    const at::Tensor& keys, const at::Tensor& values, int64_t low, int64_t high, float scaling, at::Tensor& output) {
  const int64_t rows = query.size(0), heads = query.size(1), kv_heads = key.size(1), group = heads / kv_heads;
  const int64_t d = key.size(3), d_value = value.size(3), columns = high + 1 - low, slab = keys.size(2);
  const T* masks = mask.const_data_ptr<T>();
  const float open = static_cast<float>(std::numeric_limits<T>::lowest()) / 2;
  std::vector<int64_t> first(rows);  // columns before a row's first visible one are not read
  for (int64_t row = 0; row < rows; ++row)
    while (first[row] < columns - 1 && static_cast<float>(masks[row * columns + first[row]]) <= open) ++first[row];
  const int64_t work = group * columns * (d + d_value), grain = std::max<int64_t>(1, 16384 / work);
  at::parallel_for(0, rows * kv_heads, grain, [&](int64_t start, int64_t stop) {
    for (int64_t item = start; item < stop; ++item) {
      const int64_t row = item / kv_heads;
      T* own_keys = keys.mutable_data_ptr<T>() + item * slab * d;
      T* own_values = values.mutable_data_ptr<T>() + item * slab * d_value;
      std::copy_n(key.const_data_ptr<T>() + item * d, d, own_keys + high * d);
      std::copy_n(value.const_data_ptr<T>() + item * d_value, d_value, own_values + high * d_value);
      const int64_t skipped = low + first[row];
      for (int64_t head = item * group; head < (item + 1) * group; ++head)
        attend_head<T>(
            query.const_data_ptr<T>() + head * d, own_keys + skipped * d, own_values + skipped * d_value,
            masks + row * columns + first[row], output.mutable_data_ptr<T>() + head * d_value,
            columns - first[row], d, d_value, scaling);
    }
  });
}

at::Tensor attend(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& mask, int64_t layer,
    double scaling) {
  const Bindings& step = here();
  const at::Tensor &keys = step.keys.at(layer), &values = step.values.at(layer);
  const auto type = query.scalar_type();
  TORCH_CHECK(
      key.scalar_type() == type && value.scalar_type() == type && mask.scalar_type() == type &&
          keys.scalar_type() == type && values.scalar_type() == type,
      "attention of layer ", layer, " has values of several dtypes");
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous(), "the slots of layer ", layer, " are not contiguous");
  TORCH_CHECK(
      keys.size(1) == key.size(1) && keys.size(3) == key.size(3) && values.size(3) == value.size(3) &&
          keys.size(0) >= query.size(0) && keys.size(2) > step.high && mask.size(3) == step.high + 1 - step.low,
      "the slots of layer ", layer, " have another shape");
  at::Tensor output = at::empty({query.size(0), 1, query.size(1), value.size(3)}, query.options());
  AT_DISPATCH_SWITCH(type, "attend",
      AT_DISPATCH_CASE(at::kFloat, [&] {
        attend_typed<scalar_t>(query.contiguous(), key.contiguous(), value.contiguous(), mask.contiguous(), keys, values,
                               step.low, step.high, static_cast<float>(scaling), output);
      })
      AT_DISPATCH_CASE(at::kBFloat16, [&] {
        attend_typed<scalar_t>(query.contiguous(), key.contiguous(), value.contiguous(), mask.contiguous(), keys, values,
                               step.low, step.high, static_cast<float>(scaling), output);
      }));
  return output;
}

void observe(at::Tensor& value, int64_t index) {
  static const auto notify =
      c10::Dispatcher::singleton().findSchemaOrThrow("roentgen::notify", "").typed<void(at::Tensor&, int64_t)>();
  if (here().observed.at(index)) notify.call(value, index);
}

}  // namespace

TORCH_LIBRARY(roentgen, library) {
  library.def(
      "bind(Tensor[] weights, Tensor?[] biases, Tensor[] keys, Tensor[] values, int low, int high, int[] observed, "
      "int modules) -> ()");
  library.def("release() -> ()");
  library.def("linear(Tensor rows, SymInt number, SymInt outputs) -> Tensor");
  library.def("attend(Tensor query, Tensor key, Tensor value, Tensor mask, SymInt layer, float scaling) -> Tensor");
  library.def("observe(Tensor(a!) value, SymInt index) -> ()");
  library.def("notify(Tensor(a!) value, int index) -> ()");  // implemented in operations.py
  library.impl("bind", torch::CppFunction::makeFromUnboxedFunction(&bind));
  library.impl("release", torch::CppFunction::makeFromUnboxedFunction(&release));
}

TORCH_LIBRARY_IMPL(roentgen, CPU, library) {
  library.impl("linear", &linear);
  library.impl("attend", &attend);
  library.impl("observe", &observe);
}
