// Connections that ask: a source wants to know what its domain's servers hold already, and says what they hold by now.
// All that is said here is a hint (content_domain.h), so nothing is answered but questions.
#include <array>

#include "os/steady_ms.h"
#include "stage/stage_connection.h"

namespace memferry {
ProbingConnection::ProbingConnection(Place place, UniqueFd fd)
    : StageConnection(std::move(place), std::move(fd)),
      asker_(place_.image->domain() != nullptr ? place_.image->domain()->new_asker() : 0) {}

ProbingConnection::~ProbingConnection() { join(); }

void ProbingConnection::serve() {
  if (place_.image->domain() == nullptr) return;
  wire::FrameHeader header;
  while (read_header(header) && serve_frame(header)) {
  }
}

bool ProbingConnection::serve_frame(const wire::FrameHeader& header) {
  switch (static_cast<wire::FrameType>(header.type)) {
    case wire::FrameType::kProbe:
      return on_probe(header);
    case wire::FrameType::kHeld:
      return on_held(header);
    case wire::FrameType::kNames:
      return on_names(header);
    default:  // kGoodbye among them
      return false;
  }
}

bool ProbingConnection::read_payload(const wire::FrameHeader& header) {
  names_.resize(header.payload_bytes / sizeof(wire::ContentName));
  const std::span<std::byte> payload = std::as_writable_bytes(std::span(names_));
  if (!read_counted(payload)) return false;
  return wire::payload_checksum(header, payload) == header.checksum;
}

bool ProbingConnection::on_probe(const wire::FrameHeader& header) {
  if (!read_payload(header)) return false;
  ContentDomain& domain = *place_.image->domain();
  const std::uint64_t now = steady_ms();
  answers_.clear();
  for (const wire::ContentName& name : names_) answers_.push_back(domain.probe(name, asker_, now));
  wire::FrameHeader answer =
      wire::make_header(wire::FrameType::kProbed, 0, {PageNumber{0}, answers_.size()}, header.tag);
  wire::seal(answer, std::as_bytes(std::span(answers_)));
  std::array<iovec, 2> buffers{iovec{&answer, sizeof answer},
                               iovec{answers_.data(), answers_.size() * sizeof(wire::KnownHolders)}};
  return send(buffers);
}

bool ProbingConnection::on_held(const wire::FrameHeader& header) {
  if (!read_payload(header)) return false;
  const wire::KnownHolders holders{names_.front()[0], names_.front()[1]};
  for (const wire::ContentName& name : std::span(names_).subspan(1)) {
    place_.image->domain()->held(name, holders, asker_);
  }
  return true;
}

bool ProbingConnection::on_names(const wire::FrameHeader& header) {
  if (!inside(header) || !read_payload(header)) return false;
  place_.image->places(header.region, {PageNumber{header.first_page}, header.page_count}, places_);
  for (const Image::Place& place : places_) {
    place_.image->domain()->name(names_[static_cast<std::size_t>(place.at)], place.slot);
  }
  wire::FrameHeader answer = wire::make_header(wire::FrameType::kNamed, 0, {}, header.tag);
  wire::seal(answer);
  iovec buffer{&answer, sizeof answer};
  return send(std::span(&buffer, 1));
}

}  // namespace memferry
