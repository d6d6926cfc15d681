#include "spread/directory_reporter.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>

#include "os/mapping.h"
#include "os/sys_error.h"
#include "transfer/directory_range.h"

namespace memferry {

DirectoryReporter::DirectoryReporter() : cancel_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!cancel_) throw_errno("eventfd");
}

void DirectoryReporter::interrupt() {
  const std::uint64_t one = 1;
  // Never drained: once is for good.
  (void)!::write(cancel_.get(), &one, sizeof one);
}

// All questions first, then the answers: the servers work side by side.
void DirectoryReporter::report(std::span<const SampledPage> pages, std::vector<bool>& wanted) {
  if (pages.size() > wire::kMostNames) throw std::invalid_argument("a report of too many pages");
  auto& links = links_.take(cancel_.get());
  identities_.clear();
  for (const auto& link : links) identities_.push_back(link->identity());
  outgoing_.assign(links.size(), {});
  std::vector<std::vector<std::size_t>> told(links.size());
  for (std::size_t i = 0; i < pages.size(); ++i) {
    if (const auto link = directory_of(pages[i].name, identities_)) told[*link].push_back(i);
  }
  const std::uint64_t tag = ++tag_;
  std::vector<wire::ContentName> names;
  for (std::size_t link = 0; link < links.size(); ++link) {
    if (told[link].empty()) continue;
    names.clear();
    for (const std::size_t each : told[link]) names.push_back(pages[each].name);
    (void)links[link]->send(
        wire::make_header(wire::FrameType::kReport, 0, {PageNumber{0}, names.size()}, tag),
        std::as_bytes(std::span(names)));
  }
  wire::FrameHeader header;
  std::vector<std::byte> payload;
  for (std::size_t link = 0; link < links.size(); ++link) {
    if (told[link].empty()) continue;
    if (!links[link]->receive(wire::FrameType::kReported, tag, header, payload)) continue;
    if (header.page_count != told[link].size()) {
      links[link]->lose("a wrong answer");
      continue;
    }
    std::vector<std::uint64_t> words(payload.size() / sizeof(std::uint64_t));
    std::memcpy(words.data(), payload.data(), payload.size());
    for (std::size_t i = 0; i < told[link].size(); ++i) {
      if ((words[i / 64] >> (i % 64) & 1U) != 0) wanted[told[link][i]] = true;
    }
  }
  links_.note_lost();
}

void DirectoryReporter::give(const SampledPage& page, std::span<const std::byte> bytes) {
  const auto link = directory_of(page.name, identities_);
  if (!link) return;
  std::vector<std::byte>& to = outgoing_[*link];
  to.insert(to.end(), bytes.begin(), bytes.end());
  if (to.size() + bytes.size() > wire::max_payload(bytes.size())) send_pages(*link);
}

void DirectoryReporter::send_pages(std::size_t link) {
  auto& links = links_.taken();
  std::vector<std::byte>& pages = outgoing_[link];
  const std::uint64_t count = pages.size() / system_page_size();
  if (link < links.size() && count > 0) {
    (void)links[link]->send(wire::make_header(wire::FrameType::kPopularContent, 0, {PageNumber{0}, count}),
                            pages);
  }
  pages.clear();
}

void DirectoryReporter::flush() {
  for (std::size_t link = 0; link < outgoing_.size(); ++link) send_pages(link);
  links_.note_lost();
}

}  // namespace memferry
