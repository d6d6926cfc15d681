// The decoders of compressed runs, and what they decode of what was really compressed. Input: which codec, how many
// pages, then a payload.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "wire/codec.h"
#include "wire/frame.h"

namespace {

constexpr std::size_t kPage = 4096;

void require(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using memferry::wire::Compressor;
  using memferry::wire::Decompressor;
  if (size < 2) return 0;
  static Compressor compressor;
  static Decompressor decompressor;
  const std::uint16_t encoding = data[0] % 2 == 0 ? memferry::wire::kFlagLz4 : memferry::wire::kFlagZstd;
  const std::size_t length = kPage * (1 + data[1] % 8);
  const auto payload = std::as_bytes(std::span(data + 2, size - 2));

  // Exactly as long as the run: the sanitizer sees a byte beyond it.
  const std::unique_ptr<std::byte[]> pages(new std::byte[length]());
  const std::span<std::byte> run(pages.get(), length);
  if (decompressor.decompress(encoding, payload, run)) {
    // What it took for a run can be packed and taken again.
    std::vector<std::byte> packed(length);
    const std::size_t written = compressor.compress(encoding, run, packed);
    if (written > 0) {
      const std::vector<std::byte> before(run.begin(), run.end());
      require(decompressor.decompress(encoding, std::span(packed).first(written), run));
      require(std::equal(before.begin(), before.end(), run.begin()));
    }
  }

  // The input as content.
  std::vector<std::byte> content(length);
  for (std::size_t i = 0; i < length && !payload.empty(); ++i) content[i] = payload[i % payload.size()];
  std::vector<std::byte> packed(length);
  const std::size_t written = compressor.compress(encoding, content, packed);
  require(written < length);
  if (written > 0) {
    require(decompressor.decompress(encoding, std::span(packed).first(written), run));
    require(std::equal(content.begin(), content.end(), run.begin()));
  }
  return 0;
}
