// Clusters. Another block's shared memory has the block's rank in the top byte of its addresses.
#pragma once

inline thread_local unsigned cluster_phase;  // barriers of the cluster that are complete
inline thread_local std::vector<emulator::Fiber*> cluster_waiting;

DEVICE uint32 cluster_rank() { return blockIdx.x % emulator::cluster_size; }

// Lanes of a warp that do not come together are told of.
DEVICE void cluster_arrive() {
  emulator::warp_wide("cluster arrive", {}, [](const emulator::Lanes&, int) { return emulator::Words{}; });
  emulator::current->arrivals++;
  if (!emulator::last_to_arrive(emulator::cluster_size * emulator::block_threads)) return;
  for (uint32 rank = 0; rank < emulator::cluster_size; rank++)
    emulator::send(rank, [] { cluster_phase++, emulator::wake(cluster_waiting); });
}

DEVICE void cluster_wait() {
  emulator::warp_wide("cluster wait", {}, [](const emulator::Lanes&, int) { return emulator::Words{}; });
  while (cluster_phase < emulator::current->arrivals) {
    cluster_waiting.push_back(emulator::current);
    emulator::leave();
  }
}

DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

DEVICE uint32 peer_address(uint32 address, uint32 rank) {
  if (rank >= emulator::cluster_size) emulator::fail("no such block in the cluster");
  return rank << 24 | address;
}

// What the peer has not done yet, it may do before it is read.
DEVICE int4 load_peer_16(uint32 mapped) {
  emulator::runnable.push_back(emulator::current);
  emulator::leave();
  if (mapped % 16) emulator::fail("misaligned in shared memory");
  int4 v;
  if (!emulator::read_peer(mapped >> 24, mapped & 0xFFFFFF, &v, sizeof(v)))
    emulator::fail("reads shared memory of a block that does not run");
  return v;
}

DEVICE void send(uint32 rank, emulator::Errand errand) {
  if (!emulator::send(rank, std::move(errand))) emulator::fail("writes to a block that does not run");
}

DEVICE void mbarrier_arrive_peer(uint32 barrier, uint32 rank) {
  send(rank, [=] { mbarrier_arrive(barrier); });
}

DEVICE void tensor_load_multicast(uint32 destination, const TensorMap* map, int column, int row,
                                  uint32 barrier, uint16 blocks) {
  for (uint32 rank = 0; rank < emulator::cluster_size; rank++)
    if (blocks >> rank & 1)
      send(rank, [=, map = *map] { tensor_load(destination, &map, column, row, barrier); });
}
