// The map that a server tells of: where each page of the guest is.
#include "transfer/gather_link.h"

namespace memferry {

// While a map is under way the server is asked for nothing, and no page is given up for lost.
std::string GatherLink::bound_map(const wire::FrameHeader& header) {
  map_due_ += time_for(sizeof header + header.payload_bytes);
  if (Clock::now() >= map_due_) return "no answer in time: the rest of a map";
  if (header.page_count > map_pages_left_) {
    for_good_ = true;
    return "server " + server_.address->name + ": a map of more pages than the image has";
  }
  map_pages_left_ -= header.page_count;
  return {};
}

std::string GatherLink::on_map(wire::Stream& stream, const wire::FrameHeader& header) {
  std::vector<std::uint64_t> hashes(header.payload_bytes / sizeof(std::uint64_t));
  const auto payload = std::as_writable_bytes(std::span(hashes));
  if (std::string cut = read(stream, payload); !cut.empty()) return cut;
  if (wire::payload_checksum(header, payload) != header.checksum) return "a wrong checksum";
  if (header.type == static_cast<std::uint16_t>(wire::FrameType::kMapEnd)) {
    map_under_way_ = false;
    gather_.map_done(server_, map_asked_);
    return {};
  }
  if (header.region >= gather_.maps_.size() ||
      !wire::run_inside(header.first_page, header.page_count, gather_.maps_[header.region]->pages())) {
    return "a map of pages that are not there";
  }
  if (std::string wrong = bound_map(header); !wrong.empty()) return wrong;
  const PageRun run{PageNumber{header.first_page}, header.page_count};
  // A parked guest stood still from its first page on.
  if ((header.flags & wire::kFlagFinal) == 0 && !gather_.config_.sourceless) return {};
  if (!gather_.record(header.region, run, wire::Holders::of(header.tag),
                      (header.flags & wire::kFlagZero) != 0, hashes, false)) {
    return "a map with a holder that is not there";
  }
  return {};
}

}  // namespace memferry
