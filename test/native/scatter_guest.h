// A guest of a schedule: its memory at both ends, who writes it while it runs at its source, who touches it where it
// has arrived, and an oracle of every byte. The oracle is written by whoever writes the guest, so that it is right
// whatever the engines do.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "os/unique_fd.h"
#include "page/hash.h"
#include "page/region.h"
#include "scatter_rig.h"
#include "schedule.h"

namespace memferry::test {

using PageId = std::pair<std::uint32_t, std::uint64_t>;  // region, page

// Reads a page through the kernel, which says EFAULT where a load would be a signal.
class PageReader {
 public:
  PageReader() : file_(::memfd_create("page", MFD_CLOEXEC)), bytes_(system_page_size()) {}
  // False: reading it fails.
  bool read(const std::byte* page) {
    if (::pwrite(file_.get(), page, bytes_.size(), 0) != static_cast<ssize_t>(bytes_.size())) return false;
    return ::pread(file_.get(), bytes_.data(), bytes_.size(), 0) == static_cast<ssize_t>(bytes_.size());
  }
  [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }

 private:
  UniqueFd file_;
  std::vector<std::byte> bytes_;
};

class ScatterGuest {
 public:
  ScatterGuest(const Schedule::Guest& plan, std::uint64_t seed, bool keep_first)
      : plan_(plan), seed_(seed), page_size_(system_page_size()) {
    std::mt19937_64 random(seed);
    for (const std::uint64_t pages : plan.region_pages) {
      sources.push_back(Region::allocate(pages * page_size_));
      targets.push_back(Region::allocate(pages * page_size_));
      oracle_.emplace_back(static_cast<std::size_t>(pages * page_size_));
      const auto region = static_cast<std::uint32_t>(sources.size() - 1);
      for (std::uint64_t page = 0; page < pages; ++page) {
        const std::uint64_t kind = random() % 8;
        // Zeros that were written, and pages that nobody has ever touched.
        if (kind == 0) std::memset(source(region, page), 0, page_size_);
        const std::uint64_t own = random();
        // A content of its own, or one of those that guests have in common, some of them several times.
        const bool alike = own % 1000 < plan.alike;
        if (kind > 1) fill(region, page, alike ? 1 + page % 200 : own);
      }
    }
    if (keep_first) first_ = oracle_;
  }
  ~ScatterGuest() {
    stop_writing();
    stop_touching();
  }
  ScatterGuest(const ScatterGuest&) = delete;
  ScatterGuest& operator=(const ScatterGuest&) = delete;

  [[nodiscard]] const Schedule::Guest& plan() const { return plan_; }
  [[nodiscard]] std::span<const std::byte> right(std::uint32_t region, std::uint64_t page) const {
    return std::span(oracle_[region]).subspan(static_cast<std::size_t>(page * page_size_), page_size_);
  }
  // As it was before the first round.
  [[nodiscard]] std::vector<std::byte> first_version(std::uint32_t region, std::uint64_t page) const {
    if (first_.empty()) return {};
    const auto* at = &first_[region][static_cast<std::size_t>(page * page_size_)];
    return {at, at + page_size_};
  }
  template <typename See>
  void each_page(const See& see) const {
    for (std::uint32_t region = 0; region < plan_.region_pages.size(); ++region) {
      for (std::uint64_t page = 0; page < plan_.region_pages[region]; ++page) see(region, page);
    }
  }

  void start_writing() {
    writing_ = true;
    writer_ = std::thread([this] {
      std::mt19937_64 random(seed_ + 1);
      while (writing_) {
        const auto region = static_cast<std::uint32_t>(random() % sources.size());
        const std::uint64_t page = random() % (plan_.region_pages[region] / 2);
        switch (random() % 8) {
          case 0:
            std::memset(source(region, page), 0, page_size_);
            std::memset(oracle(region, page), 0, page_size_);
            break;
          case 1:
            fill(region, page, random() % 1000 < plan_.alike ? 1 + random() % 200 : random());
            break;
          default: {
            const std::uint64_t word = random();
            const std::size_t at = 8 * (random() % (page_size_ / 8));
            std::memcpy(source(region, page) + at, &word, sizeof word);
            std::memcpy(oracle(region, page) + at, &word, sizeof word);
          }
        }
        std::this_thread::sleep_for(std::chrono::microseconds(80));
      }
    });
  }
  void stop_writing() {
    writing_ = false;
    if (writer_.joinable()) writer_.join();
  }
  // The guest's memory at its source is what the guest made it.
  [[nodiscard]] bool source_unchanged() const {
    for (std::uint32_t region = 0; region < sources.size(); ++region) {
      if (std::memcmp(source(region, 0), oracle_[region].data(), oracle_[region].size()) != 0) return false;
    }
    return true;
  }
  // It is its owner's again, who does something else with it.
  void spoil_source() const {
    for (std::uint32_t region = 0; region < sources.size(); ++region)
      std::memset(source(region, 0), 0xa5, oracle_[region].size());
  }

  void start_touching() {
    touching_ = true;
    for (unsigned i = 0; i < plan_.touchers; ++i) {
      touchers_.emplace_back([this, i] { touch(seed_ + 10 + i); });
    }
  }
  // Whoever is blocked on a page must have been woken before.
  void stop_touching() {
    touching_ = false;
    for (auto& each : touchers_) each.join();
    touchers_.clear();
  }
  // From now on a touch may fail.
  void expect_faults() { faults_expected_ = true; }
  std::set<PageId> touches_that_failed() {
    const std::lock_guard lock(mutex_);
    return failed_;
  }
  // What touchers have seen that may not be.
  std::string wrong() {
    const std::lock_guard lock(mutex_);
    return wrong_;
  }
  [[nodiscard]] std::uint64_t touches() const { return touches_; }

  [[nodiscard]] const std::byte* target(std::uint32_t region, std::uint64_t page) const {
    return targets[region]->address(PageNumber{page}).pointer();
  }
  [[nodiscard]] bool arrived(std::uint32_t region, std::uint64_t page) const {
    return std::memcmp(target(region, page), right(region, page).data(), page_size_) == 0;
  }
  [[nodiscard]] Hash128 digest(std::uint32_t region) const {
    std::vector<std::uint64_t> hashes(static_cast<std::size_t>(plan_.region_pages[region]));
    hash_pages(oracle_[region], page_size_, hashes.data());
    return xxh3_128(std::as_bytes(std::span(hashes)));
  }

  std::vector<std::shared_ptr<Region>> sources;
  std::vector<std::shared_ptr<Region>> targets;

 private:
  std::byte* source(std::uint32_t region, std::uint64_t page) const {
    return sources[region]->address(PageNumber{page}).pointer();
  }
  std::byte* oracle(std::uint32_t region, std::uint64_t page) {
    return &oracle_[region][static_cast<std::size_t>(page * page_size_)];
  }
  void fill(std::uint32_t region, std::uint64_t page, std::uint64_t seed) {
    std::byte* to = oracle(region, page);
    // Every other page packs well.
    const std::uint64_t mask = seed % 2 == 0 ? ~std::uint64_t{0} : 0xf000000000000000ULL;
    for (std::size_t at = 0; at < page_size_; at += sizeof seed) {
      seed = seed * 0x9e3779b97f4a7c15ULL + 1;
      const std::uint64_t word = (seed & mask) + 1;
      std::memcpy(to + at, &word, sizeof word);
    }
    std::memcpy(source(region, page), to, page_size_);
  }
  void touch(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    PageReader reader;
    while (touching_) {
      const auto region = static_cast<std::uint32_t>(random() % targets.size());
      const std::uint64_t page = random() % plan_.region_pages[region];
      const bool read = reader.read(target(region, page));
      ++touches_;
      if (!read) {
        const std::lock_guard lock(mutex_);
        failed_.insert({region, page});
        if (!faults_expected_ && wrong_.empty())
          wrong_ = "touching page " + name(region, page) + " failed before anything was said to be lost";
      } else if (std::memcmp(reader.bytes().data(), right(region, page).data(), page_size_) != 0) {
        const std::lock_guard lock(mutex_);
        if (wrong_.empty()) wrong_ = "a toucher has seen other bytes in page " + name(region, page);
      }
      std::this_thread::sleep_for(std::chrono::microseconds(plan_.touch_every_us));
    }
  }

 public:
  static std::string name(std::uint32_t region, std::uint64_t page) {
    return std::to_string(region) + ":" + std::to_string(page);
  }

 private:
  const Schedule::Guest& plan_;
  const std::uint64_t seed_;
  const std::size_t page_size_;
  std::vector<std::vector<std::byte>> oracle_;
  std::vector<std::vector<std::byte>> first_;
  std::thread writer_;
  std::atomic<bool> writing_{false};
  std::vector<std::thread> touchers_;
  std::atomic<bool> touching_{false};
  std::atomic<bool> faults_expected_{false};
  std::atomic<std::uint64_t> touches_{0};
  std::mutex mutex_;  // guards the rest
  std::set<PageId> failed_;
  std::string wrong_;
};

}  // namespace memferry::test
