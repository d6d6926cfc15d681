#include "spread/page_spreader.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "os/sys_error.h"

namespace memferry {
namespace {

// Of one server in one round: three times what the longest list of one takes.
constexpr unsigned kMostAsks = 1024;

bool better(std::uint32_t a_score, const wire::ContentName& a, std::uint32_t b_score,
            const wire::ContentName& b) {
  return a_score != b_score ? a_score > b_score : a < b;
}

}  // namespace

PageSpreader::PageSpreader(SpreaderConfig config)
    : config_(std::move(config)), cancel_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)), cap_(config_.bandwidth) {
  if (!cancel_) throw_errno("eventfd");
  if (!config_.share) throw std::invalid_argument("a share is missing");
  thread_.start("mf-spread", [this](WorkerThread&) { run(); });
}

PageSpreader::~PageSpreader() { close(); }

void PageSpreader::set_directories(std::vector<Directory> directories) {
  links_.set(std::move(directories));
  thread_.wake();
}

void PageSpreader::close() {
  const std::lock_guard lock(close_mutex_);
  thread_.request_stop();
  const std::uint64_t one = 1;
  (void)!::write(cancel_.get(), &one, sizeof one);
  thread_.stop();
  links_.clear();
}

SpreaderStats PageSpreader::stats() const {
  const std::lock_guard lock(mutex_);
  SpreaderStats stats = stats_;
  stats.bytes = links_.bytes();
  return stats;
}

void PageSpreader::run() {
  (void)set_this_thread_nice(10);
  while (!thread_.stopping()) {
    try {
      round();
    } catch (const std::exception&) {
      // No memory, or the share's file is gone: the next round may find it otherwise.
    }
    links_.note_lost();
    if (!thread_.stopping()) (void)thread_.wait(static_cast<int>(config_.interval.count()));
  }
}

// As many as the share takes: one page in so many is its index.
std::size_t PageSpreader::room() const {
  const std::uint64_t pages = config_.share->stats().budget_bytes / config_.share->page_size();
  const std::uint64_t group = config_.share->page_size() / sizeof(share::ShareEntry);
  return pages < 3 ? 0 : static_cast<std::size_t>((pages - 2) * group / (group + 1));
}

void PageSpreader::round() {
  auto& links = links_.take(cancel_.get());
  if (links.empty()) return;
  here_ = config_.share->digests();
  std::ranges::sort(here_, {}, content_name);
  const bool heard = ask(links, room());
  // What a server that was not heard has counted stays as it is.
  if (heard) score_what_is_here();
  fetch(links);
  std::uint64_t held = 0;
  here_ = config_.share->digests();
  std::ranges::sort(here_, {}, content_name);
  for (const Popular& each : popular_)
    held += std::ranges::binary_search(here_, each.name, {}, content_name) ? 1 : 0;
  here_ = {};
  const std::lock_guard lock(mutex_);
  ++stats_.rounds;
  stats_.popular = popular_.size();
  stats_.held = held;
}

// A server gives its names in no order, so the best so far are kept, and the worst of them is what it is asked to beat.
bool PageSpreader::ask(DirectoryLinks::Links& links, std::size_t most) {
  const auto worse_last = [](const Popular& a, const Popular& b) {
    return better(a.score, a.name, b.score, b.name);
  };
  popular_.clear();
  bool all = true;
  wire::FrameHeader header;
  std::vector<std::byte> payload;
  std::vector<wire::PopularName> names;
  for (std::uint32_t i = 0; i < links.size() && most > 0; ++i) {
    DirectoryLink& link = *links[i];
    std::uint64_t cursor = 0;
    unsigned asks = 0;
    do {
      const std::uint32_t least = popular_.size() < most ? 1 : popular_.front().score;
      const std::uint64_t tag = ++tag_;
      if (thread_.stopping() ||
          !link.send(wire::make_header(wire::FrameType::kPopularAsk, least,
                                       {PageNumber{cursor}, wire::kMostNames}, tag),
                     {}) ||
          !link.receive(wire::FrameType::kPopularNames, tag, header, payload)) {
        all = false;
        break;
      }
      // A server that goes back, or never ends, would be asked for ever.
      const bool backward = header.first_page != 0 && header.first_page <= cursor;
      if (backward || ++asks > kMostAsks) {
        (void)link.lose("a wrong answer");
        all = false;
        break;
      }
      cursor = header.first_page;
      names.resize(static_cast<std::size_t>(header.page_count));
      if (!payload.empty()) std::memcpy(names.data(), payload.data(), payload.size());
      for (const wire::PopularName& each : names) {
        popular_.push_back({each.name, each.score, i});
        std::ranges::push_heap(popular_, worse_last);
        if (popular_.size() <= most) continue;
        std::ranges::pop_heap(popular_, worse_last);
        popular_.pop_back();
      }
    } while (cursor != 0);
  }
  // Where a name is another server's by now, both may have it for a while.
  std::ranges::sort(popular_, [](const Popular& a, const Popular& b) {
    return a.name != b.name ? a.name < b.name : a.score > b.score;
  });
  const auto twice = std::unique(popular_.begin(), popular_.end(),
                                 [](const Popular& a, const Popular& b) { return a.name == b.name; });
  popular_.erase(twice, popular_.end());
  std::ranges::sort(popular_, worse_last);
  return all;
}

void PageSpreader::score_what_is_here() {
  std::vector<const Popular*> by_name;
  by_name.reserve(popular_.size());
  for (const Popular& each : popular_) by_name.push_back(&each);
  const auto name = [](const Popular* each) { return each->name; };
  std::ranges::sort(by_name, {}, name);
  for (const ContentDigest& digest : here_) {
    const auto found = std::ranges::lower_bound(by_name, content_name(digest), {}, name);
    const bool popular = found != by_name.end() && (*found)->name == content_name(digest);
    config_.share->set_score(digest, popular ? (*found)->score : 0);
  }
}

void PageSpreader::fetch(DirectoryLinks::Links& links) {
  const std::uint64_t at_once =
      std::min(wire::kMostPopularReads, wire::max_run_pages(config_.share->page_size()));
  std::vector<std::vector<Popular>> missing(links.size());
  const auto fetch_from = [&](std::uint32_t link) {
    const bool kept = links[link]->lost() || fetch_some(*links[link], missing[link]);
    missing[link].clear();
    return kept;
  };
  // Best first, from all servers in turn.
  for (const Popular& each : popular_) {
    if (thread_.stopping()) return;
    if (std::ranges::binary_search(here_, each.name, {}, content_name)) continue;
    missing[each.link].push_back(each);
    if (missing[each.link].size() == at_once) (void)fetch_from(each.link);
  }
  for (std::uint32_t link = 0; link < links.size() && !thread_.stopping(); ++link) {
    if (!missing[link].empty()) (void)fetch_from(link);
  }
}

bool PageSpreader::fetch_some(DirectoryLink& link, std::span<const Popular> some) {
  PageShare& share = *config_.share;
  if (!cap_.wait_and_debit(some.size() * share.page_size(), thread_)) return true;
  std::vector<wire::ContentName> names;
  for (const Popular& each : some) names.push_back(each.name);
  const std::uint64_t tag = ++tag_;
  wire::FrameHeader header;
  std::vector<std::byte> payload;
  if (!link.send(wire::make_header(wire::FrameType::kPopularRead, 0, {PageNumber{0}, names.size()}, tag),
                 std::as_bytes(std::span(names))) ||
      !link.receive(wire::FrameType::kPopularPages, tag, header, payload)) {
    return false;
  }
  if (some.size() < 64 && header.first_page >> some.size() != 0) return link.lose("a wrong answer");
  std::uint64_t fetched = 0;
  std::uint64_t refused = 0;
  std::size_t at = 0;
  for (std::size_t i = 0; i < some.size(); ++i) {
    if ((header.first_page >> i & 1U) == 0) continue;
    const auto page = std::span(payload).subspan(at, static_cast<std::size_t>(share.page_size()));
    at += page.size();
    const ContentDigest digest = share.digest(page);
    // Who answers with another page than was asked for answers nothing more.
    if (content_name(digest) != some[i].name) return link.lose("a page that was not asked for");
    const bool in = share.insert(digest, page, some[i].score) != PageShare::Inserted::kNoRoom;
    ++(in ? fetched : refused);
  }
  const std::lock_guard lock(mutex_);
  stats_.fetched += fetched;
  stats_.refused += refused;
  return true;
}

}  // namespace memferry
