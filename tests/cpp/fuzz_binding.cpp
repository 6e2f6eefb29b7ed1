// Fuzzes the binding with hostile calls, by libFuzzer with an embedded CPython and without torch. The bytes describe a
// valid call; then up to three of its arguments are made invalid. Tensors are heap buffers of their exact extent, with
// exact arrays of sizes and strides. A tensor that claims more than its memory must be refused. A call gives a result
// or one of five exceptions. A result must not depend on the previous contents of outputs, and gaps and inputs must not
// change. Valid tensors of 2^20 to 2^62 elements with strides of 0 are left out, since they only take long.
#include <pybind11/embed.h>

#include <algorithm>
#include <memory>
#include <string>

#include "bytes.h"
#include "core/dlpack.h"

namespace py = pybind11;
using namespace reparam;

extern "C" PyObject* PyInit__C();

namespace {

constexpr int64_t kMaxSpan = (int64_t)1 << 62, kHeld = 1 << 20;
long calls = 0, results = 0;
enum class Fault { nothing, foreign, no_borrow, dims, size, stride, type, device, null, offset, no_strides, kinds };

int64_t hostile(Bytes& in) {
  const int64_t numbers[] = {0,
                             1,
                             2,
                             3,
                             5,
                             17,
                             1031,
                             -1,
                             -2,
                             -1024,
                             kMaxSpan,
                             -kMaxSpan,
                             kMaxSpan - 1,
                             kMaxSpan + 1,
                             INT64_MAX,
                             INT64_MIN,
                             (int64_t)1 << 31,
                             (int64_t)1 << 32};
  return in.flip() ? numbers[in.below(18)] : (int64_t)(in.word() >> in.below(64));
}

// The tensor that Python sees.
struct FakeTensor {
  dlpack::Tensor t{};
  bool fails = false;
  Shape shape, stride;
  std::unique_ptr<int64_t[]> sizes, strides;  // of exact size
  std::unique_ptr<uint8_t[]> memory;
  int64_t low = 0, high = 0;
  bool nonsense = false;  // no call may take it
  std::vector<uint8_t> before;

  int64_t width() const { return std::max(1, (t.bits * t.lanes + 7) / 8); }
  size_t bytes() const { return before.size(); }

  // Returns false if the fuzzer has no time for the elements or no memory for their span.
  bool settle(uint64_t state) {
    __int128 n = 1, least = 0, most = 0;
    for (size_t i = 0; i < shape.size(); ++i) {
      nonsense |= shape[i] < 0;
      if (n <= kMaxSpan) n *= std::max<int64_t>(shape[i], 1);
      if (shape[i] > 1) (stride[i] < 0 ? least : most) += (__int128)(shape[i] - 1) * stride[i];
    }
    const bool empty = std::count(shape.begin(), shape.end(), 0);
    nonsense |=
        n > kMaxSpan || most - least >= kMaxSpan || shape.size() > 64 || t.ndim < 0 || fails || t.device_type != 1;
    nonsense |= (t.data == nullptr && !empty) || (t.strides == nullptr && !shape.empty());
    if (!nonsense && (n > kHeld || (!empty && (most - least + 1) * width() > 8 * kHeld))) return false;
    if (!nonsense && !empty) low = (int64_t)least, high = (int64_t)most;
    before.resize(nonsense ? 8 : empty ? 0 : (size_t)((high - low + 1) * width() + (int64_t)t.byte_offset));
    memory.reset(new uint8_t[bytes()]);
    for (uint8_t& byte : before) byte = (uint8_t)mix(state);
    sizes.reset(new int64_t[shape.size()]), strides.reset(new int64_t[shape.size()]);
    std::copy(shape.begin(), shape.end(), sizes.get()), std::copy(stride.begin(), stride.end(), strides.get());
    if (t.ndim >= 0) t.ndim = (int)shape.size();
    t.shape = sizes.get();
    if (t.strides) t.strides = strides.get();
    if (t.data) t.data = memory.get() - low * width();
    return true;
  }
  void restore() { std::copy(before.begin(), before.end(), memory.get()); }
  bool same() const { return std::equal(before.begin(), before.end(), memory.get()); }

  // Takes the elements in row-major order out of `bytes` and sets them to 0 there.
  std::vector<uint8_t> take_elements(std::vector<uint8_t>& from) const {
    std::vector<uint8_t> out;
    if (nonsense || from.empty()) return out;
    for (int64_t i = 0, n = product(shape); i < n; ++i) {
      int64_t at = -low, rest = i;
      for (size_t k = shape.size(); k-- > 0; rest /= shape[k]) at += rest % shape[k] * stride[k];
      uint8_t* element = &from[(size_t)(at * width()) + t.byte_offset];
      out.insert(out.end(), element, element + width());
      std::fill(element, element + width(), 0);
    }
    return out;
  }
};
struct FakeParameter : FakeTensor {};

int borrow(void* object, dlpack::Tensor* out) {
  const FakeTensor& tensor = *py::handle((PyObject*)object).cast<FakeTensor*>();
  if (tensor.fails) return PyErr_SetString(PyExc_BufferError, "no"), -1;
  *out = tensor.t;
  return 0;
}

dlpack::ExchangeApi api{1, 3, nullptr, nullptr, nullptr, nullptr, borrow, nullptr};
py::object binding, foreign_type;

enum class Layout { whole, gaps, wild };

struct Argument {
  py::object object = py::none();
  FakeTensor* tensor = nullptr;
  bool output = false;
};

bool is_allowed(py::error_already_set& e) {
  for (PyObject* type : {PyExc_ValueError, PyExc_TypeError, PyExc_RuntimeError, PyExc_MemoryError, PyExc_OverflowError})
    if (e.matches(type)) return true;
  return false;
}

// A call with its arguments in order.
struct Call {
  Bytes& in;
  std::vector<Argument> arguments;
  py::object options = py::none();
  uint64_t state = in.word();
  bool feasible = true;
  int faults = in.below(4);

  void none() { arguments.emplace_back(); }

  void tensor(const Shape& shape, int code, int bits, Layout layout, bool output = false) {
    const bool parameter = in.below(8) == 7;
    FakeTensor* fake = parameter ? new FakeParameter : new FakeTensor;
    py::object object = parameter ? py::cast((FakeParameter*)fake, py::return_value_policy::take_ownership)
                                  : py::cast(fake, py::return_value_policy::take_ownership);
    fake->shape = shape;
    fake->stride.resize(shape.size());
    std::vector<size_t> order(shape.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (size_t i = order.size(); i > 1 && layout == Layout::wild; --i)
      std::swap(order[i - 1], order[(size_t)in.below((int)i)]);
    int64_t step = layout == Layout::whole ? 1 : 1 + in.below(3);
    for (size_t i = order.size(); i-- > 0;) {
      const int kind = layout == Layout::wild ? in.below(8) : 7;
      fake->stride[order[i]] = kind == 0 ? 0 : kind == 1 ? -step : step;
      step *= std::max<int64_t>(shape[order[i]], 1);
      if (layout != Layout::whole) step += in.below(4);
    }
    fake->t.device_type = dlpack::kCpu;
    fake->t.code = (uint8_t)code, fake->t.bits = (uint8_t)bits, fake->t.lanes = 1;
    fake->t.data = fake, fake->t.strides = fake->stride.data();  // settle() takes care of both
    arguments.push_back({object, fake, output});
  }

  void corrupt(Argument& a) {
    const Fault kind = (Fault)in.below((int)Fault::kinds);
    if (kind == Fault::foreign) {
      const py::object others[] = {py::none(),     py::int_(3),  py::str("mu\xc3\xa9"),
                                   foreign_type(), foreign_type, py::list()};
      a = {others[in.below(6)], nullptr, false};
    }
    if (!a.tensor) return;
    FakeTensor& l = *a.tensor;
    const size_t dim = l.shape.empty() ? 0 : (size_t)in.byte() % l.shape.size();
    const int types[] = {0, 1, 2, 2, 2, 2, 2, 3, 4, 4, 5, 6, 10, 255}, widths[] = {0, 1, 8, 16, 32, 64, 64, 128, 255};
    switch (kind) {
      case Fault::no_borrow: l.fails = true; break;
      case Fault::dims: {
        const int counts[] = {0, 1, 2, 3, 63, 64, 65, 1000, -1};
        const int n = counts[in.below(9)];
        if (n < 0) l.t.ndim = in.flip() ? -1 : INT32_MIN;
        l.shape.resize((size_t)std::max(n, 0), in.below(8) ? 1 : 2);
        l.stride.resize(l.shape.size(), in.below(3));
        break;
      }
      case Fault::size:
        if (!l.shape.empty()) l.shape[dim] = hostile(in);
        break;
      case Fault::stride:
        if (!l.shape.empty()) l.stride[dim] = hostile(in);
        break;
      case Fault::type:
        l.t.code = (uint8_t)types[in.below(14)], l.t.bits = (uint8_t)widths[in.below(9)];
        l.t.lanes = (uint16_t)(in.below(4) ? 1 : in.below(3) ? 2 : in.flip() ? 0 : 65535);
        break;
      case Fault::device: l.t.device_type = in.flip() ? in.below(20) : (int32_t)in.word(); break;
      case Fault::null: l.t.data = nullptr; break;
      case Fault::offset: l.t.byte_offset = (uint64_t)in.byte(); break;
      case Fault::no_strides: l.t.strides = nullptr; break;
      default: break;
    }
  }

  bool settle() {
    for (; faults > 0 && !arguments.empty(); --faults) corrupt(arguments[(size_t)in.byte() % arguments.size()]);
    for (Argument& a : arguments)
      if (a.tensor && !a.tensor->settle(mix(state))) return false;
    return true;
  }

  py::object threads() {
    const int64_t counts[] = {1, 1, 1, 2, 3, 0, -1, -5, 1000, INT32_MAX, INT32_MIN, (int64_t)1 << 31, INT64_MIN};
    const py::object others[] = {py::none(), py::float_(1.5), py::str("1")};
    const int kind = in.below(16);
    return kind < 13 ? py::int_(counts[kind]) : others[kind - 13];
  }

  // Runs the call on outputs that hold `filling` and appends their elements. Returns false after an exception.
  bool run(const char* name, const py::tuple& args, uint8_t filling, std::vector<uint8_t>& elements) {
    bool nonsense = false;
    for (Argument& a : arguments) {
      if (!a.tensor) continue;
      nonsense |= a.tensor->nonsense;
      a.tensor->restore();
      if (a.output) std::memset(a.tensor->memory.get(), filling, a.tensor->bytes());
    }
    bool done = true;
    try {
      binding.attr(name)(*args);
    } catch (py::error_already_set& e) {
      MUST(is_allowed(e));
      done = false;
    }
    MUST(!(done && nonsense));
    for (Argument& a : arguments) {
      if (!a.tensor) continue;
      if (!a.output || !done) {
        if (!a.output) MUST(a.tensor->same());
        continue;
      }
      std::vector<uint8_t> now(a.tensor->memory.get(), a.tensor->memory.get() + a.tensor->bytes()),
          gaps(now.size(), filling);
      for (uint8_t byte : a.tensor->take_elements(gaps)) MUST(byte == filling);  // no two elements share memory
      const std::vector<uint8_t> written = a.tensor->take_elements(now);
      MUST(now == gaps);
      elements.insert(elements.end(), written.begin(), written.end());
    }
    return done;
  }

  void finish(const char* name, const py::object& options) {
    if (!settle()) return;
    py::list args;
    if (options) args.append(options), args.append(threads());
    for (const Argument& a : arguments) args.append(a.object);
    if (!options) args.append(threads());
    if (in.below(32) == 31) args.append(py::none());
    std::vector<uint8_t> one, two;
    const bool done = run(name, py::tuple(args), 0x55, one);
    ++calls, results += done;
    MUST(done == run(name, py::tuple(args), 0xaa, two));
    MUST(one == two);
  }
};

// The options of a call. With both flags, and with a negative event_ndim, there are none.
py::object options_of(Bytes& in, int event_ndim = 0, bool minus_log_p = false, bool tanh = false) {
  const int odd = in.below(32);
  if (odd == 31) return py::none();
  if (odd == 30) return py::str("options");
  try {
    const py::object number =
        odd == 29 ? (py::object)py::float_(.5) : py::int_(odd == 28 ? (int)in.word() : in.below(4));
    const py::object param = binding.attr("Param")(number);
    return binding.attr("Options")(param, in.real(), in.flip(), in.real(), in.real(), event_ndim, minus_log_p, tanh,
                                   in.flip());
  } catch (py::error_already_set& e) {
    MUST(is_allowed(e));
    return binding.attr("Options")(binding.attr("Param").attr("std"), 0., false, 0., 0.);
  }
}

// A call of the mixture op: batch and event dims of z, components of mu and x, and weights that fit either.
void mixture_call(Bytes& in) {
  const int codes[] = {2, 4, 2, 2}, widths[] = {16, 16, 32, 64}, dtype = in.below(4), sums = dtype == 3 ? 3 : 2;
  const int64_t sizes[] = {1, 2, 3, 5, 17, 0, 33, 129};
  Shape batch, event, z, mu{1 + in.below(40)};
  for (int i = in.below(3); i > 0; --i) batch.push_back(sizes[in.below(batch.empty() ? 8 : 4)]);
  for (int i = in.below(3); i > 0; --i) event.push_back(sizes[in.below(event.empty() ? 6 : 3)]);
  z = batch, z.insert(z.end(), event.begin(), event.end()), mu.insert(mu.end(), event.begin(), event.end());
  Shape by_item = batch, joint_sums{2}, dims_sums{2};
  by_item.push_back(mu[0]);
  joint_sums.insert(joint_sums.end(), batch.begin(), batch.end());
  dims_sums.insert(dims_sums.end(), z.begin(), z.end());
  Call c{in};
  const auto add = [&](bool wanted, const Shape& of, int type, Layout layout, bool output = false) {
    if (wanted)
      c.tensor(of, codes[type], widths[type], layout, output);
    else
      c.none();
  };
  const auto layout = [&] { return (Layout)in.below(3); };
  const bool weighted = in.flip(), joint = in.flip(), dims = !joint || in.flip(), forward = in.flip();
  const int weights_dtype = in.flip() ? sums : dtype;
  const Shape weights = in.flip() ? by_item : Shape{mu[0]};
  add(true, z, dtype, layout()), add(true, mu, dtype, layout()), add(true, mu, dtype, layout());
  add(weighted, weights, weights_dtype, layout());
  if (forward) {
    const bool saving = in.flip();
    add(joint, batch, sums, Layout::whole, true), add(dims, z, sums, Layout::whole, true);
    add(joint && saving, joint_sums, sums, Layout::whole, true);
    add(dims && saving, dims_sums, sums, Layout::whole, true);
    return c.finish("mixture_forward", options_of(in));
  }
  add(joint, batch, sums, layout()), add(dims, z, sums, layout());
  add(joint, joint_sums, sums, Layout::whole), add(dims, dims_sums, sums, Layout::whole);
  add(in.flip(), z, dtype, Layout::whole, true);
  for (int i = 0; i < 2; ++i) add(in.flip(), mu, dtype, Layout::whole, true);
  add(weighted && in.flip(), weights, sums, Layout::whole, true);
  c.finish("mixture_backward", options_of(in));
}

void call(Bytes& in) {
  if (in.below(4) == 3) return mixture_call(in);
  const int op = in.below(3);
  const int codes[] = {2, 4, 2, 2}, widths[] = {16, 16, 32, 64}, dtype = in.below(4), sums = dtype == 3 ? 3 : 2;
  const int64_t sizes[] = {1, 2, 3, 5, 8, 0, 17, 64, 255, 1024, 1031, 2065};
  Shape shape, z_shape;
  const int ndim = in.below(16) ? in.below(5) : in.below(65);
  for (int64_t n = 1; (int)shape.size() < ndim;) {
    const int64_t size = sizes[in.below(in.below(4) ? 5 : 12)];
    shape.push_back(n * size > 3000 ? 1 : size);
    n *= std::max<int64_t>(shape.back(), 1);
  }
  Call c{in};
  const auto add = [&](bool wanted, const Shape& of, int type, Layout layout, bool output = false) {
    if (wanted)
      c.tensor(of, codes[type], widths[type], layout, output);
    else
      c.none();
  };
  const auto layout = [&] { return (Layout)in.below(3); };
  const Shape one(in.flip() ? 1 : 0, 1), seeds = !shape.empty() && in.flip() ? Shape{shape[0]} : one;
  if (op == 2) {
    c.tensor(seeds, dlpack::kInt, 64, Layout::whole);
    add(true, shape, dtype, Layout::whole, true);
    return c.finish("randn", {});
  }
  for (int i = in.below(3); i > 0 && (int)shape.size() + i <= 64; --i) z_shape.push_back(in.below(4));
  z_shape.insert(z_shape.end(), shape.begin(), shape.end());
  const bool from_z = in.flip(), density = from_z && in.flip(), kl = !from_z || (!density && in.flip());
  const bool given = from_z && in.flip(), prior = in.flip(), minus_log_p = density && (prior || in.flip());
  const bool tanh = density && !minus_log_p && in.flip();
  const int prior_dtype = in.flip() ? sums : dtype;
  const Shape row(shape.begin(), shape.begin() + in.below((int)shape.size() + 1));
  Shape rows(z_shape.begin(), z_shape.end() - (int64_t)(shape.size() - row.size()));  // of log_q: the sample dims too
  int event_ndim = (int)(shape.size() - row.size());
  if (in.below(16) == 15) event_ndim = (int)hostile(in);
  add(true, shape, dtype, layout()), add(true, shape, dtype, layout());
  add(prior, shape, prior_dtype, layout()), add(prior, shape, prior_dtype, layout());
  if (from_z && !given)
    c.tensor(seeds, dlpack::kInt, 64, Layout::whole);
  else
    c.none();
  add(given, z_shape, dtype, layout());
  const auto options = [&] { return options_of(in, event_ndim, minus_log_p, tanh || (density && in.below(32) == 31)); };
  if (op == 0) {
    add(from_z, z_shape, dtype, Layout::whole, true), add(kl, row, sums, Layout::whole, true);
    add(density, rows, sums, Layout::whole, true);
    return c.finish("latent_forward", options());
  }
  add(from_z && (!density || in.flip()), z_shape, dtype, layout()), add(kl, row, sums, layout());
  add(density, rows, sums, layout());
  add(in.flip(), shape, dtype, Layout::gaps, true), add(in.flip(), shape, dtype, Layout::gaps, true);
  const int prior_grad_dtype = in.flip() ? sums : dtype;
  add(prior && (kl || density) && in.flip(), shape, prior_grad_dtype, Layout::gaps, true);
  add(prior && (kl || density) && in.flip(), shape, prior_grad_dtype, Layout::gaps, true);
  c.finish("latent_backward", options());
}

py::object scalar(Bytes& in) {
  switch (in.below(8)) {
    case 0: return py::none();
    case 1: return py::float_(in.real());
    case 2: return py::str("7");
    case 3: return py::int_(in.word());
    case 4: return py::bytes(std::string((size_t)in.byte(), (char)in.byte()));
    case 5: return py::int_(in.below(5));
    default: return py::int_(hostile(in));
  }
}

// The functions that take numbers, names and bytes. bind_tensor_type is sometimes given another type.
void windows(Bytes& in) {
  try {
    switch (in.below(6)) {
      case 0: binding.attr("test_eps")(scalar(in), scalar(in), scalar(in)); break;
      case 1: binding.attr("test_eps")(in.word() >> 1, in.word() >> 1 >> in.below(63), 1 + in.word() % 1024); break;
      case 2: {
        std::string radius((size_t)(4 * in.byte()), '\0'), angle(radius);
        for (std::string* words : {&radius, &angle})
          for (char& c : *words) c = (char)in.byte();
        if (in.below(4) == 3) angle.resize((size_t)in.byte());
        binding.attr("test_box_muller")(py::bytes(radius), py::bytes(angle));
        break;
      }
      case 3: {
        py::list counter, key;
        for (int i = in.below(8) ? 4 : in.byte(); i > 0; --i)
          counter.append(in.below(8) ? (py::object)py::int_((uint32_t)in.word()) : scalar(in));
        for (int i = in.below(8) ? 2 : in.byte(); i > 0; --i)
          key.append(in.below(8) ? (py::object)py::int_((uint32_t)in.word()) : scalar(in));
        binding.attr("test_philox")(counter, key);
        break;
      }
      case 4: {
        const py::object isa = in.flip() ? binding.attr("isa")() : scalar(in);
        binding.attr("set_isa")(isa);
        MUST(binding.attr("isa")().equal(isa));
        break;
      }
      default: {
        static dlpack::ExchangeApi other{2, 0, nullptr, nullptr, nullptr, nullptr, borrow, nullptr};
        const int kind = in.below(4);
        foreign_type.attr("__dlpack_c_exchange_api__") = kind == 0
                                                             ? (py::object)py::capsule(&other, "dlpack_exchange_api")
                                                         : kind == 1 ? (py::object)py::capsule(&api, "another")
                                                                     : scalar(in);
        binding.attr("bind_tensor_type")(kind == 3 ? scalar(in) : foreign_type, foreign_type);
        MUST(!"a type without an exchange table was bound");
      }
    }
  } catch (py::error_already_set& e) {
    MUST(is_allowed(e));
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  PyImport_AppendInittab("_C", PyInit__C);
  py::initialize_interpreter();
  py::module_ main = py::module_::import("__main__");
  py::class_<FakeTensor> tensor(main, "Tensor");
  py::class_<FakeParameter, FakeTensor> parameter(main, "Parameter");
  tensor.attr("__dlpack_c_exchange_api__") = py::capsule(&api, "dlpack_exchange_api");
  binding = py::module_::import("_C");
  binding.attr("bind_tensor_type")(tensor, parameter);
  foreign_type = py::eval("type('Foreign', (), {})");
  std::atexit([] { std::printf("%ld calls of the kernels' functions, %ld of them with a result\n", calls, results); });
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in{data, size};
  if (in.below(8))
    call(in);
  else
    windows(in);
  return 0;
}
