#include "transfer/base_comparison.h"

#include <time.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace memferry {
namespace {

constexpr std::chrono::milliseconds kLook{200};  // at go_on(), while nothing is heard

std::uint64_t thread_cpu_us() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000 + static_cast<std::uint64_t>(now.tv_nsec) / 1000;
}

void add_run(std::vector<RegionRun>& runs, std::uint32_t region, PageRun run) {
  if (!runs.empty() && runs.back().region == region && runs.back().run.end() == run.first) {
    runs.back().run.count += run.count;
  } else {
    runs.push_back({region, run});
  }
}

}  // namespace

BaseComparison::BaseComparison(std::vector<std::shared_ptr<Region>> regions,
                               std::vector<std::uint64_t> base_pages, const KeyedHashKey& key,
                               std::chrono::milliseconds answer_timeout)
    : regions_(std::move(regions)),
      base_pages_(std::move(base_pages)),
      key_(key),
      answer_timeout_(answer_timeout),
      page_size_(regions_.front()->page_size()) {}

bool BaseComparison::run(std::uint64_t most_nodes, CompareDepth depth,
                         const std::vector<const AtomicBitmap*>& untouched, const Way& way) {
  if (trees_.empty()) {
    for (std::size_t i = 0; i < regions_.size(); ++i) {
      const std::uint64_t pages = base_pages_[i];
      trees_.push_back(pages > 0 ? std::make_unique<HashTree>(regions_[i], pages, key_) : nullptr);
      compared_.emplace_back(wire::tree_nodes(pages));
    }
  }
  const bool through = compare(most_nodes, depth, untouched, way);
  // What is still asked for lived in compare(): a late answer is one that nobody asked for.
  const std::lock_guard lock(mutex_);
  outstanding_.clear();
  return through;
}

bool BaseComparison::compare(std::uint64_t most_nodes, CompareDepth depth,
                             const std::vector<const AtomicBitmap*>& untouched, const Way& way) {
  std::vector<Asked> asked = choose(most_nodes);
  std::vector<RegionRun> same;
  const auto level = depth == CompareDepth::kAll      ? wire::kTreeNodes
                     : depth == CompareDepth::kSample ? wire::kTreePages
                                                      : wire::kTreeEstimate;
  if (!ask(asked, level, way)) return false;
  if (!hash_own(asked, untouched, way) || !wait(way)) return false;
  if (depth == CompareDepth::kEstimate) {
    for (const Asked& each : asked) estimate(each);
    return true;
  }
  std::vector<Asked> differ;
  for (const Asked& each : asked) {
    if (depth == CompareDepth::kSample) {
      compare_pages(each, same);
    } else {
      compare_nodes(each, same, differ);
    }
    for (std::uint64_t node = each.nodes.first; node < each.nodes.end(); ++node)
      compared_[each.region][node] = true;
  }
  if (!differ.empty()) {
    if (!ask(differ, wire::kTreePages, way) || !wait(way)) return false;
    for (const Asked& each : differ) compare_pages(each, same);
  }
  const auto order = [](const RegionRun& a, const RegionRun& b) {
    return std::pair(a.region, a.run.first.value) < std::pair(b.region, b.run.first.value);
  };
  std::sort(same.begin(), same.end(), order);
  return tell(same, way);
}

// Every n-th of the nodes that are left, as runs.
std::vector<BaseComparison::Asked> BaseComparison::choose(std::uint64_t most_nodes) const {
  std::uint64_t left = 0;
  for (const auto& region : compared_) {
    left += static_cast<std::uint64_t>(std::count(region.begin(), region.end(), false));
  }
  std::vector<Asked> chosen;
  if (left == 0 || most_nodes == 0) return chosen;
  const std::uint64_t step = std::max<std::uint64_t>(1, (left + most_nodes - 1) / most_nodes);
  std::uint64_t seen = 0;
  for (std::uint32_t region = 0; region < compared_.size(); ++region) {
    for (std::uint64_t node = 0; node < compared_[region].size(); ++node) {
      if (compared_[region][node] || seen++ % step != step / 2) continue;
      if (!chosen.empty() && chosen.back().region == region && chosen.back().nodes.end() == node) {
        ++chosen.back().nodes.count;
      } else {
        chosen.push_back({region, 0, {node, 1}, 0, {}});
      }
    }
  }
  return chosen;
}

bool BaseComparison::ask(std::vector<Asked>& asked, std::uint64_t level, const Way& way) {
  if (asked.empty()) return true;
  std::vector<wire::FrameHeader> requests;
  {
    const std::lock_guard lock(mutex_);
    for (Asked& each : asked) {
      each.level = level;
      each.answered_pages = 0;
      outstanding_.push_back(&each);
      requests.push_back(wire::make_header(wire::FrameType::kTreeRequest, each.region,
                                           trees_[each.region]->pages_of(each.nodes), level));
      wire::seal(requests.back());
    }
    heard_at_ = Clock::now();
    ++stats_.round_trips;
    stats_.bytes_out += requests.size() * sizeof(wire::FrameHeader);
  }
  return way.say(std::as_bytes(std::span(requests)));
}

bool BaseComparison::hash_own(const std::vector<Asked>& asked,
                              const std::vector<const AtomicBitmap*>& untouched, const Way& way) {
  const std::uint64_t started = thread_cpu_us();
  std::uint64_t pages = 0;
  for (const Asked& each : asked) {
    HashTree& tree = *trees_[each.region];
    for (std::uint64_t node = each.nodes.first; node < each.nodes.end(); ++node) {
      if (!way.go_on() || !way.touching([&] { tree.hash(node, untouched[each.region]); })) return false;
    }
    pages += tree.pages_of(each.nodes).count;
  }
  std::uint64_t memory = 0;
  for (const auto& tree : trees_) memory += tree ? tree->memory_bytes() : 0;
  const std::lock_guard lock(mutex_);
  stats_.source_hash_us += thread_cpu_us() - started;
  const bool estimated = !asked.empty() && asked.front().level == wire::kTreeEstimate;
  (estimated ? stats_.pages_estimated : stats_.pages_compared) += pages;
  stats_.memory_bytes = std::max(stats_.memory_bytes, memory);
  return true;
}

bool BaseComparison::wait(const Way& way) {
  std::unique_lock lock(mutex_);
  while (!outstanding_.empty()) {
    if (!way.go_on()) return false;
    if (Clock::now() >= heard_at_ + answer_timeout_) {
      lock.unlock();
      way.cut("the destination does not answer with its hashes");
      return false;
    }
    changed_.wait_for(lock, kLook);
  }
  return true;
}

std::string BaseComparison::answered(const wire::FrameHeader& header, std::span<const std::byte> payload) {
  const std::lock_guard lock(mutex_);
  if (outstanding_.empty()) return "hashes that were not asked for";
  Asked& asked = *outstanding_.front();
  const PageRun all = trees_[asked.region]->pages_of(asked.nodes);
  const std::uint64_t left = all.count - asked.answered_pages;
  if (header.region != asked.region || (header.tag & 0xff) != asked.level ||
      header.first_page != all.first.value + asked.answered_pages || header.page_count > left) {
    return "other hashes than those that were asked for";
  }
  // A node is answered whole, or its hash would be another one's; and so that an answer is some progress.
  if (header.page_count < left && header.page_count % wire::kTreeNodePages != 0) {
    return "hashes of half a node";
  }
  const std::size_t before = asked.hashes.size();
  asked.hashes.resize(before + payload.size() / sizeof(KeyedHash));
  std::memcpy(asked.hashes.data() + before, payload.data(), payload.size());
  asked.answered_pages += header.page_count;
  heard_at_ = Clock::now();
  stats_.bytes_in += sizeof header + payload.size();
  stats_.destination_hash_us += std::min<std::uint64_t>(header.tag >> 8, 1ULL << 40);
  if (asked.answered_pages == all.count) outstanding_.pop_front();
  changed_.notify_all();
  return {};
}

void BaseComparison::wake() {
  const std::lock_guard lock(mutex_);
  changed_.notify_all();
}

// The guest writes on, and the base becomes another one: nothing of either is kept.
void BaseComparison::estimate(const Asked& asked) {
  std::vector<RegionRun> same;
  compare_pages(asked, same);
  for (std::uint64_t node = asked.nodes.first; node < asked.nodes.end(); ++node)
    trees_[asked.region]->forget(node);
  const std::lock_guard lock(mutex_);
  for (const RegionRun& each : same) stats_.pages_alike += each.run.count;
}

void BaseComparison::compare_pages(const Asked& asked, std::vector<RegionRun>& same) {
  const HashTree& tree = *trees_[asked.region];
  const PageRun all = tree.pages_of(asked.nodes);
  const std::span<const KeyedHash> own = tree.page_hashes(all);
  for (std::uint64_t i = 0; i < all.count; ++i) {
    if (own[i] == asked.hashes[i]) add_run(same, asked.region, {PageNumber{all.first.value + i}, 1});
  }
}

void BaseComparison::compare_nodes(const Asked& asked, std::vector<RegionRun>& same,
                                   std::vector<Asked>& differ) {
  const HashTree& tree = *trees_[asked.region];
  const std::span<const KeyedHash> own = tree.node_hashes(asked.nodes);
  for (std::uint64_t i = 0; i < asked.nodes.count; ++i) {
    const std::uint64_t node = asked.nodes.first + i;
    if (own[i] == asked.hashes[i]) {
      add_run(same, asked.region, tree.pages_of({node, 1}));
    } else if (!differ.empty() && differ.back().region == asked.region && differ.back().nodes.end() == node) {
      ++differ.back().nodes.count;
    } else {
      differ.push_back({asked.region, 0, {node, 1}, 0, {}});
    }
  }
}

bool BaseComparison::tell(const std::vector<RegionRun>& same, const Way& way) {
  const std::size_t most = wire::max_payload(page_size_) / sizeof(wire::WireRun);
  std::vector<wire::WireRun> runs;
  std::vector<std::byte> frame;
  for (std::size_t at = 0; at < same.size();) {
    const std::uint32_t region = same[at].region;
    runs.clear();
    std::uint64_t pages = 0;
    for (; at < same.size() && same[at].region == region && runs.size() < most; ++at) {
      const PageRun run = same[at].run;
      runs.push_back({run.first.value, run.count});
      pages += run.count;
    }
    const auto payload = std::as_bytes(std::span(runs));
    wire::FrameHeader header = wire::make_header(wire::FrameType::kSame, region);
    wire::seal(header, payload);
    frame.assign(sizeof header + payload.size(), std::byte{});
    std::memcpy(frame.data(), &header, sizeof header);
    std::memcpy(frame.data() + sizeof header, payload.data(), payload.size());
    if (!way.say(frame)) return false;
    std::uint64_t content = 0;
    for (const wire::WireRun& run : runs) {
      const PageRun told{PageNumber{run.first_page}, run.page_count};
      way.same(region, told, trees_[region]->xxh3(told));
      for (PageNumber page = told.first; page < told.end(); ++page.value)
        content += trees_[region]->zero(page) ? 0 : 1;
    }
    const std::lock_guard lock(mutex_);
    stats_.pages_same += pages;
    stats_.bytes_same += content * page_size_;
    stats_.bytes_out += frame.size();
  }
  return true;
}

void BaseComparison::release() {
  trees_.clear();
  compared_.clear();
}

BaseStats BaseComparison::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace memferry
