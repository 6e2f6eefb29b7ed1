// Options as compile-time constants.
#pragma once
#include "math/gaussian.h"

namespace reparam {
namespace {

template <Param kValue>
struct ParamTag {
  static constexpr Param value = kValue;
};
template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

template <class Body>
inline void dispatch_param(Param param, Body body) {
  switch (param) {
    case Param::logvar: return body(ParamTag<Param::logvar>());
    case Param::logstd: return body(ParamTag<Param::logstd>());
    case Param::std: return body(ParamTag<Param::std>());
    case Param::softplus: return body(ParamTag<Param::softplus>());
  }
}
template <class Body>
inline void with_bool(bool value, Body body) {
  value ? body(Bool<true>()) : body(Bool<false>());
}

}  // namespace
}  // namespace reparam
