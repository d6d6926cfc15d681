// Tells directory servers what a guest keeps, each the names that are its own, and gives them the pages that they ask
// for. One that is lost has no names any more: they are another's, as they are to everybody who knows the same servers.
//
// Threads: as SampleReporter; set_directories() and what is asked for from any.
#pragma once

#include <atomic>
#include <map>

#include "os/unique_fd.h"
#include "share/page_sampler.h"
#include "spread/directory_link.h"

namespace memferry {

class DirectoryReporter final : public SampleReporter {
 public:
  DirectoryReporter();
  void set_directories(std::vector<Directory> directories) { links_.set(std::move(directories)); }
  [[nodiscard]] std::vector<bool> lost() const { return links_.lost(); }
  [[nodiscard]] std::uint64_t bytes() const { return links_.bytes(); }
  // Ends its connections; its sampler is closed.
  void close() { links_.clear(); }

  void report(std::span<const SampledPage> pages, std::vector<bool>& wanted) override;
  void give(const SampledPage& page, std::span<const std::byte> bytes) override;
  void flush() override;
  void interrupt() override;

 private:
  void send_pages(std::size_t link);

  const UniqueFd cancel_;
  DirectoryLinks links_;
  std::uint64_t tag_ = 0;
  std::vector<std::uint64_t> identities_;         // by link, as at the last report
  std::vector<std::vector<std::byte>> outgoing_;  // pages, by link
};

}  // namespace memferry
