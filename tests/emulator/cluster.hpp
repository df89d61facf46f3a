// What the blocks of a cluster do to each other. They run at the same time, each in a thread of the CPU,
// which alone touches what is the block's own: others send it errands. They may read its shared memory.
#pragma once
#include <cstring>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

namespace emulator {

using Errand = std::function<void()>;

struct Block {
  const unsigned char* memory = nullptr;  // from when it runs
  bool idle = false, ended = false;
  unsigned arrived = 0;  // threads at the barrier of the cluster whose first block this is
  std::vector<Errand> errands;

  bool runs() const { return memory != nullptr && !ended; }
};

// Of the grid.
inline unsigned cluster_size;
inline std::mutex between_blocks;
inline std::vector<Block> blocks;

inline thread_local unsigned own_block;

inline Block& peer(unsigned rank) {
  return blocks[own_block / cluster_size * cluster_size + rank];
}

inline void begin_block(unsigned index, const unsigned char* memory) {
  const std::lock_guard lock(between_blocks);
  own_block = index;
  blocks[index].memory = memory;
}

// Whether that was in order: nobody still wants something of it.
inline bool end_block() {
  const std::lock_guard lock(between_blocks);
  blocks[own_block].ended = true;
  return blocks[own_block].errands.empty();
}

// Whether it runs, as it must.
inline bool send(unsigned rank, Errand errand) {
  const std::lock_guard lock(between_blocks);
  Block& block = peer(rank);
  block.errands.push_back(std::move(errand));
  block.idle = false;
  return block.runs();
}

inline void run_errands() {
  if (cluster_size == 1) return;
  std::vector<Errand> errands;
  {
    const std::lock_guard lock(between_blocks);
    errands.swap(blocks[own_block].errands);
  }
  for (const Errand& errand : errands) errand();
}

// Called by a block that has nothing to do: whether there is an errand, or a peer that may send one.
inline bool may_get_errands() {
  const std::lock_guard lock(between_blocks);
  blocks[own_block].idle = blocks[own_block].errands.empty();
  for (unsigned rank = 0; rank < cluster_size; rank++)
    if (!peer(rank).idle && !peer(rank).ended) return true;
  return false;
}

// Whether this thread, one of so many in the cluster, is the last to arrive.
inline bool last_to_arrive(unsigned threads) {
  const std::lock_guard lock(between_blocks);
  unsigned& arrived = peer(0).arrived;
  arrived = (arrived + 1) % threads;
  return arrived == 0;
}

// Copies from another block's shared memory. Whether it runs, as it must.
inline bool read_peer(unsigned rank, unsigned offset, void* destination, size_t bytes) {
  const std::lock_guard lock(between_blocks);
  const Block& block = peer(rank);
  if (!block.runs()) return false;
  std::memcpy(destination, block.memory + offset, bytes);
  return true;
}

}  // namespace emulator
