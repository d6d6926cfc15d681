#include "transfer/page_referrer.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "os/thread_clock.h"
#include "page/racy_read.h"
#include "wire/frame.h"

namespace memferry {
namespace {

wire::KnownName name_of(const ContentDigest& digest) {
  wire::KnownName name = 0;
  std::memcpy(&name, digest.data(), sizeof name);
  return name;
}

}  // namespace

References::References(const ContentKey& key, const SendQueue& queue) : hasher_(key) {
  for (std::uint32_t region = 0; region < queue.regions(); ++region) {
    regions_.push_back(std::make_unique<Pages>(queue.region(region)->capacity_pages()));
  }
}

// Frames' payloads lie in vectors of their own, which are aligned for anything.
std::span<const wire::KnownName> References::names_in(std::span<const std::byte> payload) {
  return {reinterpret_cast<const wire::KnownName*>(payload.data()), payload.size() / sizeof(wire::KnownName)};
}

std::string References::unresolved(std::uint32_t region, PageRun run, std::span<const std::byte> names) {
  Pages& pages = *regions_[region];
  if (pages.referred.clear_run(run) != run.count) return "a reference refused that was not sent";
  pages.plain.set_run(run);
  for (const wire::KnownName name : names_in(names)) names_.erase(name);
  refused_.fetch_add(run.count, std::memory_order_relaxed);
  refused_lately_.fetch_add(run.count, std::memory_order_relaxed);
  return {};
}

DedupStats References::stats() const {
  DedupStats stats;
  stats.refused = refused_;
  const std::uint64_t referred = pages_;
  stats.pages = referred - std::min(referred, stats.refused);
  stats.examined = examined_;
  stats.overhead_bytes = overhead_bytes_;
  stats.hash_ns = hash_ns_;
  // Sums of differences are not exact.
  if (const double rate = link_rate_; rate >= 1) stats.link_bytes_per_second = rate;
  return stats;
}

std::uint64_t References::memory_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& pages : regions_) {
    bytes += (pages->referred.words() + pages->plain.words()) * sizeof(std::uint64_t);
  }
  return bytes;
}

PageReferrer::PageReferrer(References& shared, std::uint64_t page_size)
    : shared_(shared), page_size_(static_cast<std::size_t>(page_size)) {}

PageReferrer::~PageReferrer() { link_takes(0); }

void PageReferrer::link_takes(double rate) {
  shared_.link_rate_.fetch_add(rate - link_rate_, std::memory_order_relaxed);
  link_rate_ = rate;
}

void PageReferrer::begin(bool allowed) {
  held_used_ = 0;
  const bool possible = allowed && !shared_.names_.empty();
  looks_ = possible && pace_.looks();
  sample_ = possible ? pace_.sample() : 0;
}

std::span<const std::byte> PageReferrer::hold(std::span<const std::byte> guest_bytes) {
  if (held_.empty()) held_.resize(static_cast<std::size_t>(wire::max_payload(page_size_)));
  if (guest_bytes.size() > held_.size() - held_used_)
    throw std::logic_error("a batch of pages that is too long");
  std::byte* to = held_.data() + held_used_;
  racy_copy(to, guest_bytes.data(), guest_bytes.size());
  held_used_ += guest_bytes.size();
  return {to, guest_bytes.size()};
}

void PageReferrer::hash(std::span<const std::byte> bytes, std::size_t page) {
  digests_[page] = shared_.hasher_(bytes.subspan(page * page_size_, page_size_));
  names_[page] = name_of(digests_[page]);
}

void PageReferrer::look(std::uint32_t region, PageNumber first, std::span<const std::byte> bytes) {
  const std::size_t pages = bytes.size() / page_size_;
  digests_.resize(std::max(digests_.size(), pages));
  names_.assign(pages, 0);
  const auto began = Clock::now();
  std::uint64_t hashed = 0;
  {
    const ThreadCpuTimer timer(shared_.hash_ns_);
    const AtomicBitmap& plain = shared_.regions_[region]->plain;
    for (std::size_t page = 0; page < pages; ++page) {
      if (plain.test(PageNumber{first.value + page})) continue;
      hash(bytes, page);
      ++hashed;
    }
    shared_.names_.look_up(names_, known_);
    for (std::size_t page = 0; page < pages; ++page) {
      if (known_[page] && plain.test(PageNumber{first.value + page})) known_[page] = false;
    }
  }
  shared_.examined_.fetch_add(hashed, std::memory_order_relaxed);
  pace_.looked(hashed, static_cast<std::uint64_t>(std::count(known_.begin(), known_.end(), true)),
               static_cast<double>(hashed * page_size_),
               std::chrono::duration<double>(Clock::now() - began).count());
}

void PageReferrer::sample(std::span<const std::byte> bytes) {
  const std::size_t pages = std::min(bytes.size() / page_size_, static_cast<std::size_t>(sample_));
  if (pages == 0) return;
  sample_ -= pages;
  digests_.resize(std::max(digests_.size(), pages));
  names_.assign(pages, 0);
  const auto began = Clock::now();
  {
    const ThreadCpuTimer timer(shared_.hash_ns_);
    for (std::size_t page = 0; page < pages; ++page) hash(bytes, page);
    shared_.names_.look_up(names_, known_);
  }
  shared_.examined_.fetch_add(pages, std::memory_order_relaxed);
  pace_.looked(pages, static_cast<std::uint64_t>(std::count(known_.begin(), known_.end(), true)),
               static_cast<double>(pages * page_size_),
               std::chrono::duration<double>(Clock::now() - began).count());
}

void PageReferrer::refer(std::uint32_t region, PageRun run, std::uint64_t frame_bytes) {
  shared_.regions_[region]->referred.set_run(run);
  shared_.pages_.fetch_add(run.count, std::memory_order_relaxed);
  shared_.overhead_bytes_.fetch_add(frame_bytes, std::memory_order_relaxed);
}

void PageReferrer::sent(int fd, std::uint64_t referred_bytes, std::uint64_t plain_bytes,
                        std::uint64_t plain_on_wire) {
  pace_.sent(referred_bytes + plain_bytes);
  window_plain_ += plain_bytes;
  window_on_wire_ += plain_on_wire;
  if (const auto window = meter_.sent(fd, referred_bytes + plain_bytes, Clock::now())) {
    if (window_plain_ > 0) {
      plain_ratio_ =
          std::clamp(static_cast<double>(window_on_wire_) / static_cast<double>(window_plain_), 0.01, 1.0);
    }
    window_plain_ = window_on_wire_ = 0;
    if (window->full && window->link_rate > 0) {
      constexpr double kNewestWindow = 0.25;  // windows are short
      const double change = window->link_rate - link_rate_;
      link_takes(link_rate_ > 0 ? link_rate_ + kNewestWindow * change : window->link_rate);
    }
    pace_.refused(shared_.refused_lately_.exchange(0, std::memory_order_relaxed));
    if (shared_.names_.empty()) return;  // there was nothing to decide
    pace_.measured(window->link_rate, window->raw_rate, window->full, plain_ratio_);
  }
}

}  // namespace memferry
