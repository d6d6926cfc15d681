// A kPages payload back into pages: what every receiver of encoded frames does.
//
// Threads: one an object.
#pragma once

#include <cstddef>
#include <span>

#include "wire/codec.h"
#include "wire/delta.h"
#include "wire/frame.h"

namespace memferry::wire {

class RunDecoder {
 public:
  // Fills `pages` from the payload of a frame with that encoding; for kFlagDelta they hold the base. False: it is not
  // exactly one run of that length, and what is in `pages` is anything. Never writes beyond them.
  [[nodiscard]] bool decode(std::uint16_t encoding, std::span<const std::byte> payload,
                            std::span<std::byte> pages) {
    return encoding == kFlagDelta ? apply_delta(payload, pages)
                                  : decompressor_.decompress(encoding, payload, pages);
  }

 private:
  Decompressor decompressor_;
};

}  // namespace memferry::wire
