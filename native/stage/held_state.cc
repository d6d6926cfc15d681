#include "stage/held_state.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace memferry {

std::shared_ptr<HeldState> HeldState::make(std::shared_ptr<Slab> slab, std::uint64_t bytes) {
  const std::uint64_t slot_bytes = slab->slot_bytes();
  std::shared_ptr<HeldState> state(new HeldState(std::move(slab), bytes));
  const std::uint64_t slots = bytes / slot_bytes + (bytes % slot_bytes != 0 ? 1 : 0);
  return state->slab_->take_all(slots, state->slots_) ? state : nullptr;
}

template <typename Each>
void HeldState::pieces(std::uint64_t at, std::uint64_t length, const Each& each) const {
  if (at > bytes_ || length > bytes_ - at) throw std::invalid_argument("a state does not reach so far");
  const std::uint64_t slot_bytes = slab_->slot_bytes();
  for (std::uint64_t done = 0; done < length;) {
    const std::uint64_t inside = (at + done) % slot_bytes;
    const std::uint64_t part = std::min(length - done, slot_bytes - inside);
    const Slab::Slot slot = slots_[static_cast<std::size_t>((at + done) / slot_bytes)];
    each(slab_->data(slot) + inside, static_cast<std::size_t>(done), static_cast<std::size_t>(part));
    done += part;
  }
}

void HeldState::write(std::uint64_t at, std::span<const std::byte> bytes) {
  pieces(at, bytes.size(), [&](std::byte* here, std::size_t from, std::size_t part) {
    std::memcpy(here, bytes.data() + from, part);
  });
}

void HeldState::read(std::uint64_t at, std::span<std::byte> into) const {
  pieces(at, into.size(), [&](const std::byte* here, std::size_t from, std::size_t part) {
    std::memcpy(into.data() + from, here, part);
  });
}

}  // namespace memferry
