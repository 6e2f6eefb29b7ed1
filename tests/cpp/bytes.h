// Shared by the fuzzers: a string of bytes that makes their decisions, and the sizes of tensors.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define MUST(x) ((x) ? (void)0 : (std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x), std::abort()))

inline uint64_t mix(uint64_t& state) {  // splitmix64
  uint64_t x = state += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

struct Bytes {
  const uint8_t* data;
  size_t size;

  int byte() { return size ? (--size, *data++) : 0; }
  int below(int n) { return byte() % n; }
  bool flip() { return byte() & 1; }
  uint64_t word() {
    uint64_t x = 0;
    for (int i = 0; i < 8; ++i) x = x << 8 | (uint64_t)byte();
    return x;
  }
  double real() {
    const double usual[] = {0, 1, -1, .5, 1e-4, 2, -30, 20, 1e300, -1e300, 1e-310};
    if (flip()) return usual[below(11)];
    const uint64_t x = word();
    double y;
    std::memcpy(&y, &x, 8);
    return y;
  }
};

using Shape = std::vector<int64_t>;

inline int64_t product(const Shape& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}
