// References: pages of an image that come as the hash of a content which is held here already.
#include <array>

#include "stage/stage_connection.h"

namespace memferry {

// What it takes over is stored as if it had come; the rest is told to the writer, who sends it plainly, and what was
// held of it before is out of date like that of a page that came torn. But for what the page is here already (the
// writer may have sent it, count on it, and have been told elsewhere that it is known by a name that leads nowhere), and
// for what the map says for good.
bool WritingConnection::on_reference(const wire::FrameHeader& header) {
  const wire::Holders holders = wire::Holders::of(header.tag);
  Image& image = *place_.image;
  ContentDomain* const domain = image.domain();
  if (domain == nullptr || !inside(header) || !meant_for_us(holders, header.tag)) return false;
  std::vector<wire::ContentHash> contents(static_cast<std::size_t>(header.page_count));
  const std::span<std::byte> payload = std::as_writable_bytes(std::span(contents));
  if (!await_turn(place_.common->in, payload.size()) || !read_payload(payload)) return false;
  if (wire::payload_checksum(header, payload) != header.checksum) return false;

  std::vector<bool> held(contents.size());
  Image::Reading before(image.slab());
  for (std::size_t at = 0; at < contents.size(); ++at) {
    Slab::Slot slot = 0;
    std::uint64_t xxh3 = 0;
    const PageRun page{PageNumber{header.first_page + at}, 1};
    const bool shared = domain->share(contents[at], slot, xxh3);
    if (!shared) {
      image.read(header.region, page, before);
      if (before.slots().empty() || !domain->is(contents[at], before.slots()[0])) continue;
      slot = before.slots()[0];
      xxh3 = before.hashes()[0];
      image.slab()->pin(slot);
    }
    held[at] = true;
    if (!image.store(header.region, page, std::span(&slot, 1), std::span(&xxh3, 1), holders, shared, by_))
      return false;
  }
  for (std::size_t from = 0, at = 0; from < contents.size(); from = at) {
    while (at < contents.size() && held[at] == held[from]) ++at;
    const PageRun run{PageNumber{header.first_page + from}, at - from};
    if (!held[from]) {
      if (!image.forget(header.region, run, by_) ||
          !answers_.refused(header.region, run, image.ordinal(), wire::kFlagReference)) {
        return false;
      }
      continue;
    }
    if (!source_ || holders.second == wire::Holders::kNobody) continue;
    const auto passed = std::as_bytes(std::span(contents).subspan(from, at - from));
    wire::FrameHeader onward = wire::make_header(wire::FrameType::kReference, header.region, run, header.tag);
    wire::seal(onward, passed);
    std::array<iovec, 2> buffers{iovec{&onward, sizeof onward},
                                 iovec{const_cast<std::byte*>(passed.data()), passed.size()}};
    if (!forward(holders.second, buffers)) return false;
  }
  return true;
}

}  // namespace memferry
