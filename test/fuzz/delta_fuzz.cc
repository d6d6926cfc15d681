// Deltas: a payload from anywhere, and what becomes of pages that were really encoded. Input: how many pages, a seed of
// the base, then a payload.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "wire/delta.h"

namespace {

constexpr std::size_t kPage = 4096;

void require(bool holds) {
  if (!holds) std::abort();
}

void fill(std::span<std::byte> bytes, std::uint32_t seed) {
  for (std::byte& each : bytes) {
    seed = seed * 1664525 + 1013904223;
    each = static_cast<std::byte>(seed >> 24);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace memferry::wire;
  if (size < 2) return 0;
  const std::size_t count = 1 + data[0] % 4;
  const std::size_t length = count * kPage;
  const auto payload = std::as_bytes(std::span(data + 2, size - 2));

  const std::unique_ptr<std::byte[]> pages(new std::byte[length]);
  const std::span<std::byte> run(pages.get(), length);
  fill(run, data[1]);
  const std::vector<std::byte> base(run.begin(), run.end());
  const bool applied = apply_delta(payload, run);
  if (!applied) require(std::equal(base.begin(), base.end(), run.begin()));

  // Whatever is there now, as a delta against the base.
  std::vector<std::byte> now(run.begin(), run.end());
  for (std::size_t i = 0; i + 2 < payload.size(); i += 3) {
    const std::size_t at =
        (std::to_integer<std::size_t>(payload[i]) << 8 | std::to_integer<std::size_t>(payload[i + 1]));
    now[at % length] = payload[i + 2];
  }
  std::vector<std::byte> encoded(3 * length + 64);
  DeltaEncoder encoder(encoded);
  for (std::size_t at = 0; at < length; at += kPage) {
    require(encoder.add(std::span(base).subspan(at, kPage), std::span(now).subspan(at, kPage), 3 * kPage));
  }
  encoded.resize(encoder.finish());
  std::copy(base.begin(), base.end(), run.begin());
  require(apply_delta(encoded, run));
  require(std::equal(now.begin(), now.end(), run.begin()));
  return 0;
}
