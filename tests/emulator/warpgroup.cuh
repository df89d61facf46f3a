// Warpgroup matrix multiplies. They run at the latest possible moment or, at random, when a group is
// committed, so that operands overwritten too early and results read too early show.
#pragma once

constexpr int WARPGROUP = 128;

DEVICE uint64 wgmma_descriptor(uint32 address) { return (address & 0x3FFFF) >> 4; }

// Of the first operand, `element(row, k)`: four threads' registers hold a row.
using Registers = std::array<std::array<uint32, 4>, WARPGROUP>;

template <class T>
T element_of(const Registers& a, int row, int k) {
  constexpr int per_word = 4 / sizeof(T), half = 4 * per_word;
  T value;
  const uint32& word = a[row / 16 * 32 + row % 8 * 4 + k % half / per_word][row % 16 / 8 + k / half * 2];
  std::memcpy(&value, reinterpret_cast<const T*>(&word) + k % per_word, sizeof(T));
  return value;
}

// Element k of row n of an operand in shared memory, whose rows are 128 bytes, swizzled.
template <class T>
T element_of(uint64 descriptor, int n, int k) {
  const uint32 address = (descriptor << 4) + n / 8 * 1024 + n % 8 * 128 + k * sizeof(T);
  T value;
  std::memcpy(&value, shared_memory + (address ^ address >> 3 & 0x70), sizeof(T));
  return value;
}

// d (+)= a x b, of shape 64 x 2 N x DEPTH.
template <class A, class B, class Sum, int N>
void multiply_now(const std::array<Sum*, WARPGROUP>& d, const Registers& a, uint64 b,
                  bool accumulate) {
  constexpr int DEPTH = 32 / sizeof(A);
  using Wide = std::conditional_t<std::is_integral_v<Sum>, Sum, double>;
  Wide left[64][DEPTH], right[2 * N][DEPTH];
  for (int k = 0; k < DEPTH; k++) {
    for (int row = 0; row < 64; row++) left[row][k] = element_of<A>(a, row, k);
    for (int n = 0; n < 2 * N; n++) right[n][k] = element_of<B>(b, n, k);
  }
  for (int thread = 0; thread < WARPGROUP; thread++)
    for (int i = 0; i < N; i++) {
      const Wide* x = left[thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8];
      const Wide* y = right[i / 4 * 8 + thread % 4 * 2 + i % 2];
      Wide sum = 0;
      for (int k = 0; k < DEPTH; k++) sum += x[k] * y[k];
      d[thread][i] = accumulate ? d[thread][i] + sum : sum;
    }
}

template <class A, class B, class Sum, int N>
void wgmma_of(Sum (&d)[N], const std::array<uint32, 4>& own, uint64 b, bool accumulate) {
  static thread_local std::array<Sum*, WARPGROUP> sums[8];
  static thread_local Registers registers[8];
  const int group = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
  sums[group][thread] = d, registers[group][thread] = own;
  emulator::meet(emulator::warpgroups[group], "wgmma", WARPGROUP, [&] {
    emulator::multiplies[group].open.push_back(
        [d = sums[group], a = registers[group], b, accumulate] {
          multiply_now<A, B, Sum, N>(d, a, b, accumulate);
        });
  });
}

template <int N>
void wgmma(float (&d)[N], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint64 b, bool accumulate) {
  wgmma_of<_Float16, _Float16>(d, {a0, a1, a2, a3}, b, accumulate);
}

template <int N>
void wgmma(int (&d)[N], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint64 b, bool accumulate) {
  using Weight = std::conditional_t<UNSIGNED_WEIGHTS, uint8, int8>;
  wgmma_of<Weight, int8>(d, {a0, a1, a2, a3}, b, accumulate);
}

DEVICE void run_multiplies(int group, size_t pending) {
  auto& groups = emulator::multiplies[group].groups;
  for (; groups.size() > pending; groups.pop_front())
    for (const auto& multiply : groups.front()) multiply();
}

DEVICE void wgmma_commit() {
  const int group = threadIdx.x / WARPGROUP;
  emulator::meet(emulator::warpgroups[group], "wgmma commit", WARPGROUP, [&] {
    auto& [groups, open] = emulator::multiplies[group];
    groups.push_back(std::exchange(open, {}));
    if (emulator::random() % 2) run_multiplies(group, 0);
  });
}

template <int PENDING, int PLACE = 0>
void wgmma_wait() {
  const int group = threadIdx.x / WARPGROUP;
  emulator::meet(emulator::warpgroups[group], "wgmma wait", WARPGROUP,
                 [&] { run_multiplies(group, PENDING); });
}

DEVICE void wgmma_fence() {}
template <class T>
void pin(T&) {}
template <int REGISTERS>
void take_registers() {}
template <int REGISTERS>
void give_registers() {}
