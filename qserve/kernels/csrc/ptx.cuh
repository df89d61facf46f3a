// One instruction each: what the kernels say to the hardware, under readable names.
// Shared memory is addressed by 32-bit offsets (`shared_address`), as the instructions want it.
#pragma once

using int8 = signed char;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;
using uint64 = unsigned long long;

struct alignas(64) TensorMap {
  uint64 words[16];
};

#define DEVICE static __device__ __forceinline__

constexpr uint32 FULL_WARP = 0xFFFFFFFFu;

DEVICE uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

DEVICE uint32 round_up(uint32 value, uint32 multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// An address to which the compiler adds offsets; else it may work each sum out from its parts.
DEVICE const uint8* base(const uint8* address) {
  asm("" : "+l"(address));
  return address;
}

DEVICE int warp_index() { return __shfl_sync(FULL_WARP, threadIdx.x / 32, 0); }

// ---- shared memory -------------------------------------------------------------------------

DEVICE uint4 load_shared_16(uint32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

DEVICE uint2 load_shared_8(uint32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

DEVICE uint32 load_shared_4(uint32 address) {
  uint32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

DEVICE void store_shared_16(uint32 address, int a, int b, int c, int d) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

DEVICE void store_shared_8(uint32 address, uint32 a, uint32 b) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" :: "r"(address), "r"(a), "r"(b) : "memory");
}

DEVICE void store_shared_4(uint32 address, uint32 a) {
  asm volatile("st.shared.u32 [%0], %1;" :: "r"(address), "r"(a) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, each thread's pair lying along a column.
DEVICE void store_matrices_transposed(uint32 address, const uint32 (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

DEVICE void load_matrices(uint32 (&v)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}

// ---- global memory that blocks of one launch share -------------------------------------------

// Words, each of which others see whole, but in any order.
DEVICE uint4 load_relaxed_16(const void* address) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address) : "memory");
  return v;
}

DEVICE uint2 load_relaxed_8(const void* address) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y) : "l"(address) : "memory");
  return v;
}

DEVICE void store_relaxed_8(void* address, uint32 a, uint32 b) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};"
               :: "l"(address), "r"(a), "r"(b) : "memory");
}

// Who acquires what another has released sees all that it had written before.
DEVICE uint2 load_acquire_8(const void* address) {
  uint2 v;
  asm volatile("ld.acquire.gpu.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y) : "l"(address) : "memory");
  return v;
}

DEVICE void store_release_8(void* address, uint32 a, uint32 b) {
  asm volatile("st.release.gpu.global.v2.u32 [%0], {%1, %2};"
               :: "l"(address), "r"(a), "r"(b) : "memory");
}

// Comes after all that this thread has done, and before all that it does then.
DEVICE int add_ordered_grid(int* counter, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

// ---- asynchronous copies of sm_80 -----------------------------------------------------------

// 16 bytes, or zeros where `valid` is false (then nothing is read).
DEVICE void copy_async_16(uint32 destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(destination), "l"(source), "r"(valid ? 16 : 0) : "memory");
}

DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

// ---- barriers ------------------------------------------------------------------------------

DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

DEVICE void mbarrier_init(uint32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void mbarrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DEVICE void mbarrier_arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

DEVICE void mbarrier_arrive_expecting(uint32 barrier, uint32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(barrier), "r"(bytes) : "memory");
}

DEVICE void mbarrier_wait(uint32 barrier, uint32 phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "retry: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\nbra retry;\nfinished:\n}"
      :: "r"(barrier), "r"(phase) : "memory");
}

// ---- clusters ------------------------------------------------------------------------------

DEVICE uint32 cluster_rank() {
  uint32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

DEVICE uint32 peer_address(uint32 address, uint32 rank) {
  uint32 mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

DEVICE int4 load_peer_16(uint32 mapped) {
  int4 v;
  asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(mapped) : "memory");
  return v;
}

// Arrives at another block's barrier. Deliberately without `.release.cluster`, a full memory fence:
// an arriver that has only read has nothing to publish.
DEVICE void mbarrier_arrive_peer(uint32 barrier, uint32 rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];"
               :: "r"(peer_address(barrier, rank)) : "memory");
}

DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// ---- the bulk copy engine of sm_90 -----------------------------------------------------------

DEVICE void bulk_load(uint32 destination, const void* source, uint32 bytes, uint32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :: "r"(destination), "l"(source), "r"(bytes), "r"(barrier) : "memory");
}

DEVICE void tensor_load(uint32 destination, const TensorMap* map, int column, int row,
                        uint32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];"
      :: "r"(destination), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// The same bytes to the same place in every block whose bit is set in `blocks`.
DEVICE void tensor_load_multicast(uint32 destination, const TensorMap* map, int column, int row,
                                  uint32 barrier, uint16 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
      :: "r"(destination), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks) : "memory");
}

DEVICE void tensor_store(const TensorMap* map, uint32 source, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
               :: "l"(map), "r"(column), "r"(row), "r"(source) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most PENDING stores still read their source.
template <int PENDING>
DEVICE void tensor_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(PENDING) : "memory");
}

DEVICE void tensor_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Makes this thread's ordinary shared-memory writes visible to the copy engine.
DEVICE void fence_for_copy_engine() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- warpgroup matrix multiply of sm_90 (the multiply itself is generated, see wgmma.py) -------

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits at different places are not merged into one.
template <int PENDING, int PLACE = 0>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0; // %1" :: "n"(PENDING), "n"(PLACE) : "memory");
}

// An operand in shared memory whose rows are 128 bytes, swizzled, eight rows to 1024 bytes.
DEVICE uint64 wgmma_descriptor(uint32 address) {
  constexpr uint64 swizzle_128 = 1ull << 62, eight_rows = 1024ull >> 4 << 32, unused = 1ull << 16;
  return swizzle_128 | eight_rows | unused | (address & 0x3FFFF) >> 4;
}

// Keeps what is computed of operands or results on its side of a fence or a wait.
template <int N>
DEVICE void pin(uint32 (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(registers[i])::"memory");
}

template <int N>
DEVICE void pin(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

// What follows from `value` is computed where it is needed, not before a loop, in registers for good.
DEVICE void pin(int& value) { asm volatile("" : "+r"(value)); }

template <int REGISTERS>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}

template <int REGISTERS>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}

// Brings `bytes` of global memory to the L2 cache, if there is such a thing.
DEVICE void prefetch(const void* source, uint32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(source), "r"(bytes) : "memory");
#endif
}

// ---- programmatic dependent launch -----------------------------------------------------------

// Lets the next kernel of the stream start its prologue.
DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Returns once every earlier kernel of the stream has ended and its writes can be seen.
DEVICE void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
