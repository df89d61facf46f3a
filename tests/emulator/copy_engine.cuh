// The bulk copies of sm_90: loads land late, stores read late.
#pragma once

// Of a row-major matrix, in boxes whose rows are 128 bytes, swizzled.
struct TensorMap {
  unsigned char* start;
  uint64 element_bytes, rows, columns, box_rows, unused[11];
};

inline thread_local std::deque<std::vector<uint8>> boxes;  // read by loads that have yet to land
inline thread_local std::array<std::deque<std::function<void()>>, 1024> stores;  // by thread

DEVICE uint32 swizzled(uint32 address) { return address ^ (address >> 3 & 0x70); }

// `body(bytes of an element, where it is in the box)` for every element inside the matrix.
template <class Body>
void each_element(const TensorMap& map, uint64 column, uint64 row, Body body) {
  for (uint64 r = 0; r < map.box_rows && row + r < map.rows; r++)
    for (uint64 c = 0; c < 128 / map.element_bytes && column + c < map.columns; c++)
      body(map.start + ((row + r) * map.columns + column + c) * map.element_bytes,
           r * 128 + c * map.element_bytes);
}

// Until it has landed, a copy's destination holds nothing of use.
DEVICE void bulk_load(uint32 destination, const void* source, uint32 bytes, uint32 barrier) {
  if (destination % 16 || bytes % 16) emulator::fail("misaligned copy");
  std::memset(shared_memory + destination, 0xFF, bytes);
  const long due = emulator::now + emulator::random() % emulator::longest_copy;
  emulator::copies.push_back(
      {destination, static_cast<const uint8*>(source), bytes, barrier, due});
}

DEVICE void tensor_load(uint32 destination, const TensorMap* map, int column, int row,
                        uint32 barrier) {
  std::vector<uint8>& box = boxes.emplace_back(map->box_rows * 128);
  each_element(*map, column, row, [&](const uint8* element, uint32 offset) {
    std::memcpy(&box[swizzled(destination + offset) - destination], element, map->element_bytes);
  });
  bulk_load(destination, box.data(), box.size(), barrier);
}

DEVICE void tensor_store(const TensorMap* map, uint32 source, int column, int row) {
  stores[threadIdx.x].push_back([=] {
    each_element(*map, column, row, [&](uint8* element, uint32 offset) {
      std::memcpy(element, shared_memory + swizzled(source + offset), map->element_bytes);
    });
  });
}

template <int PENDING>
void tensor_store_wait_read() {
  auto& own = stores[threadIdx.x];
  for (; own.size() > PENDING; own.pop_front()) own.front()();
}

DEVICE void prefetch(const void*, uint32) {}
DEVICE void tensor_store_wait() { tensor_store_wait_read<0>(); }
DEVICE void fence_for_copy_engine() {}
