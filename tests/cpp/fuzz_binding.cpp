// The binding on hostile calls, by libFuzzer: CPython embedded, no torch. A valid call is made from the bytes, then up
// to three of its arguments are spoilt. Tensors lie in heap buffers of their exact extent, with exact arrays of sizes
// and strides; what claims more than memory holds must be refused. A call gives a result or one of five exceptions. A
// result must not depend on what outputs held; gaps and inputs stay as they were. Left out: true tensors of 2^20 to
// 2^62 elements in little memory, as stride 0 makes them, since they only take long.
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

constexpr int64_t kMost = (int64_t)1 << 62, kHeld = 1 << 20;
long calls = 0, results = 0;
enum class Spoil { nothing, foreign, unlendable, dims, size, stride, type, device, null, offset, no_strides, kinds };

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
                             kMost,
                             -kMost,
                             kMost - 1,
                             kMost + 1,
                             INT64_MAX,
                             INT64_MIN,
                             (int64_t)1 << 31,
                             (int64_t)1 << 32};
  return in.flip() ? numbers[in.below(18)] : (int64_t)(in.word() >> in.below(64));
}

// What Python sees as a tensor.
struct Lent {
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

  // False: more elements than the fuzzer has time for, or further apart than it has memory.
  bool settle(uint64_t state) {
    __int128 n = 1, least = 0, most = 0;
    for (size_t i = 0; i < shape.size(); ++i) {
      nonsense |= shape[i] < 0;
      if (n <= kMost) n *= std::max<int64_t>(shape[i], 1);
      if (shape[i] > 1) (stride[i] < 0 ? least : most) += (__int128)(shape[i] - 1) * stride[i];
    }
    const bool empty = std::count(shape.begin(), shape.end(), 0);
    nonsense |= n > kMost || most - least >= kMost || shape.size() > 64 || t.ndim < 0 || fails || t.device_type != 1;
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

  // Its elements in row-major order, taken out of `bytes` and replaced by 0 there.
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
struct LentParameter : Lent {};

int borrow(void* object, dlpack::Tensor* out) {
  const Lent& lent = *py::handle((PyObject*)object).cast<Lent*>();
  if (lent.fails) return PyErr_SetString(PyExc_BufferError, "no"), -1;
  *out = lent.t;
  return 0;
}

dlpack::ExchangeApi api{1, 3, nullptr, nullptr, nullptr, nullptr, borrow, nullptr};
py::object binding, foreign_type;

enum class Layout { whole, gaps, wild };

struct Argument {
  py::object object = py::none();
  Lent* lent = nullptr;
  bool output = false;
};

bool is_allowed(py::error_already_set& e) {
  for (PyObject* type : {PyExc_ValueError, PyExc_TypeError, PyExc_RuntimeError, PyExc_MemoryError, PyExc_OverflowError})
    if (e.matches(type)) return true;
  return false;
}

// A call with its arguments in order, `first` of them before the tensors.
struct Call {
  Bytes& in;
  std::vector<Argument> arguments;
  py::object options = py::none();
  uint64_t state = in.word();
  bool feasible = true;
  int spoils = in.below(4);

  void none() { arguments.emplace_back(); }

  void tensor(const Shape& shape, int code, int bits, Layout layout, bool output = false) {
    const bool parameter = in.below(8) == 7;
    Lent* lent = parameter ? new LentParameter : new Lent;
    py::object object = parameter ? py::cast((LentParameter*)lent, py::return_value_policy::take_ownership)
                                  : py::cast(lent, py::return_value_policy::take_ownership);
    lent->shape = shape;
    lent->stride.resize(shape.size());
    std::vector<size_t> order(shape.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (size_t i = order.size(); i > 1 && layout == Layout::wild; --i)
      std::swap(order[i - 1], order[(size_t)in.below((int)i)]);
    int64_t step = layout == Layout::whole ? 1 : 1 + in.below(3);
    for (size_t i = order.size(); i-- > 0;) {
      const int kind = layout == Layout::wild ? in.below(8) : 7;
      lent->stride[order[i]] = kind == 0 ? 0 : kind == 1 ? -step : step;
      step *= std::max<int64_t>(shape[order[i]], 1);
      if (layout != Layout::whole) step += in.below(4);
    }
    lent->t.device_type = dlpack::kCpu;
    lent->t.code = (uint8_t)code, lent->t.bits = (uint8_t)bits, lent->t.lanes = 1;
    lent->t.data = lent, lent->t.strides = lent->stride.data();  // settle() takes care of both
    arguments.push_back({object, lent, output});
  }

  void spoil(Argument& a) {
    const Spoil kind = (Spoil)in.below((int)Spoil::kinds);
    if (kind == Spoil::foreign) {
      const py::object others[] = {py::none(),     py::int_(3),  py::str("mu\xc3\xa9"),
                                   foreign_type(), foreign_type, py::list()};
      a = {others[in.below(6)], nullptr, false};
    }
    if (!a.lent) return;
    Lent& l = *a.lent;
    const size_t dim = l.shape.empty() ? 0 : (size_t)in.byte() % l.shape.size();
    const int types[] = {0, 1, 2, 2, 2, 2, 2, 3, 4, 4, 5, 6, 10, 255}, widths[] = {0, 1, 8, 16, 32, 64, 64, 128, 255};
    switch (kind) {
      case Spoil::unlendable: l.fails = true; break;
      case Spoil::dims: {
        const int counts[] = {0, 1, 2, 3, 63, 64, 65, 1000, -1};
        const int n = counts[in.below(9)];
        if (n < 0) l.t.ndim = in.flip() ? -1 : INT32_MIN;
        l.shape.resize((size_t)std::max(n, 0), in.below(8) ? 1 : 2);
        l.stride.resize(l.shape.size(), in.below(3));
        break;
      }
      case Spoil::size:
        if (!l.shape.empty()) l.shape[dim] = hostile(in);
        break;
      case Spoil::stride:
        if (!l.shape.empty()) l.stride[dim] = hostile(in);
        break;
      case Spoil::type:
        l.t.code = (uint8_t)types[in.below(14)], l.t.bits = (uint8_t)widths[in.below(9)];
        l.t.lanes = (uint16_t)(in.below(4) ? 1 : in.below(3) ? 2 : in.flip() ? 0 : 65535);
        break;
      case Spoil::device: l.t.device_type = in.flip() ? in.below(20) : (int32_t)in.word(); break;
      case Spoil::null: l.t.data = nullptr; break;
      case Spoil::offset: l.t.byte_offset = (uint64_t)in.byte(); break;
      case Spoil::no_strides: l.t.strides = nullptr; break;
      default: break;
    }
  }

  bool settle() {
    for (; spoils > 0 && !arguments.empty(); --spoils) spoil(arguments[(size_t)in.byte() % arguments.size()]);
    for (Argument& a : arguments)
      if (a.lent && !a.lent->settle(mix(state))) return false;
    return true;
  }

  py::object threads() {
    const int64_t counts[] = {1, 1, 1, 2, 3, 0, -1, -5, 1000, INT32_MAX, INT32_MIN, (int64_t)1 << 31, INT64_MIN};
    const py::object others[] = {py::none(), py::float_(1.5), py::str("1")};
    const int kind = in.below(16);
    return kind < 13 ? py::int_(counts[kind]) : others[kind - 13];
  }

  // The outputs' elements, or false; the outputs held `filling`.
  bool run(const char* name, const py::tuple& args, uint8_t filling, std::vector<uint8_t>& elements) {
    bool nonsense = false;
    for (Argument& a : arguments) {
      if (!a.lent) continue;
      nonsense |= a.lent->nonsense;
      a.lent->restore();
      if (a.output) std::memset(a.lent->memory.get(), filling, a.lent->bytes());
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
      if (!a.lent) continue;
      if (!a.output || !done) {
        if (!a.output) MUST(a.lent->same());
        continue;
      }
      std::vector<uint8_t> now(a.lent->memory.get(), a.lent->memory.get() + a.lent->bytes()), gaps(now.size(), filling);
      for (uint8_t byte : a.lent->take_elements(gaps)) MUST(byte == filling);  // no two elements share memory
      const std::vector<uint8_t> written = a.lent->take_elements(now);
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

py::object options_of(Bytes& in) {
  const int odd = in.below(32);
  if (odd == 31) return py::none();
  if (odd == 30) return py::str("options");
  try {
    const py::object number =
        odd == 29 ? (py::object)py::float_(.5) : py::int_(odd == 28 ? (int)in.word() : in.below(4));
    const py::object param = binding.attr("Param")(number);
    return binding.attr("Options")(param, in.real(), in.flip(), in.real(), in.real());
  } catch (py::error_already_set& e) {
    MUST(is_allowed(e));
    return binding.attr("Options")(binding.attr("Param").attr("std"), 0., false, 0., 0.);
  }
}

void call(Bytes& in) {
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
  const bool from_z = in.flip(), kl = !from_z || in.flip(), given = from_z && in.flip(), prior = in.flip();
  const int prior_dtype = in.flip() ? sums : dtype;
  const Shape row(shape.begin(), shape.begin() + in.below((int)shape.size() + 1));
  add(true, shape, dtype, layout()), add(true, shape, dtype, layout());
  add(prior, shape, prior_dtype, layout()), add(prior, shape, prior_dtype, layout());
  if (from_z && !given)
    c.tensor(seeds, dlpack::kInt, 64, Layout::whole);
  else
    c.none();
  add(given, z_shape, dtype, layout());
  if (op == 0) {
    add(from_z, z_shape, dtype, Layout::whole, true), add(kl, row, sums, Layout::whole, true);
    return c.finish("latent_forward", options_of(in));
  }
  add(from_z, z_shape, dtype, layout()), add(kl, row, sums, layout());
  add(in.flip(), shape, dtype, Layout::gaps, true), add(in.flip(), shape, dtype, Layout::gaps, true);
  const int prior_grad_dtype = in.flip() ? sums : dtype;
  add(prior && kl && in.flip(), shape, prior_grad_dtype, Layout::gaps, true);
  add(prior && kl && in.flip(), shape, prior_grad_dtype, Layout::gaps, true);
  c.finish("latent_backward", options_of(in));
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

// The functions that take numbers, names and bytes; what binds a tensor type is given another now and then.
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
  py::class_<Lent> tensor(main, "Tensor");
  py::class_<LentParameter, Lent> parameter(main, "Parameter");
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
