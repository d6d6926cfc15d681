// A look at what the servers hold at the moment when a source says that nobody needs it.
#pragma once

#include <algorithm>
#include <cstring>
#include <set>
#include <string>

#include "schedule_faults.h"

namespace memferry::test {

class ScheduleAudit : public ScheduleFaults {
 protected:
  using ScheduleFaults::ScheduleFaults;

  // The source says that it is not needed: then what the destination lacks is on servers that live, and each of them
  // knows where.
  void audit(Migration& of) {
    const std::uint64_t strikes = strikes_;
    if (may_lose_anything(of)) return;
    std::set<PageId> missing;
    if (schedule_.way == Way::kPark) {
      of.guest.each_page([&](std::uint32_t region, std::uint64_t page) { missing.insert({region, page}); });
    } else {
      for (const RegionRun& each : of.missing) {
        for (std::uint64_t i = 0; i < each.run.count; ++i)
          missing.insert({each.region, each.run.first.value + i});
      }
    }
    std::set<PageId> held;
    std::string wrong;
    for (const auto& server : servers_) {
      if (!server->vmd.live()) continue;
      const std::lock_guard looking(server->looking);
      const auto client = server->vmd.observe(of.image, wire::StageRole::kGather);
      if (!client) continue;
      read_all(of, *client, missing, held);
      if (!of.given_up[server->ordinal].empty() || server->ordinal >= Schedule::kIndexServers) continue;
      const StageClient::Map map = client->read_map();
      const std::set<PageId> known = known_in(map);
      std::uint64_t unknown = 0;
      std::string first;
      for (const PageId& each : missing) {
        if (known.count(each) > 0) continue;
        if (unknown++ == 0) first = ScatterGuest::name(each.first, each.second);
      }
      if (unknown > 0) {
        wrong += " s" + std::to_string(server->ordinal) + " knows nothing of " + std::to_string(unknown) +
                 " pages, the first" + first + (map.ended ? ";" : ", and has not told everything;");
      }
      if (schedule_.way == Way::kPark &&
          server->vmd.stage()->whole(of.image, of.plan.region_pages) != std::optional(true)) {
        wrong += " s" + std::to_string(server->ordinal) + " is not whole;";
      }
    }
    std::string nowhere;
    for (const PageId& each : missing) {
      if (held.count(each) == 0 && nowhere.size() < 100)
        nowhere += " " + ScatterGuest::name(each.first, each.second);
    }
    // Something struck meanwhile: who knows what was seen.
    if (strikes != strikes_ || may_lose_anything(of)) return;
    ++audits_;
    if (!nowhere.empty()) fail(of, "evicted, and nobody has" + nowhere + "\n" + state());
    if (!wrong.empty()) fail(of, "evicted, and" + wrong + "\n" + state());
  }
  void read_all(const Migration& of, StageClient& client, const std::set<PageId>& missing,
                std::set<PageId>& held) const {
    const std::uint64_t most = wire::max_run_pages(system_page_size());
    const std::size_t size = system_page_size();
    for (std::uint32_t region = 0; region < of.plan.region_pages.size(); ++region) {
      for (std::uint64_t first = 0; first < of.plan.region_pages[region]; first += most) {
        const std::uint64_t count = std::min(most, of.plan.region_pages[region] - first);
        if (!client.ask(region, first, count, 1)) return;
        for (std::uint64_t at = first; at < first + count;) {
          const auto frame = client.receive();
          if (!frame) return;
          for (std::uint64_t i = 0; i < frame->header.page_count; ++i, ++at) {
            const auto right = of.guest.right(region, at);
            const bool same = frame->is(wire::FrameType::kPages)
                                  ? std::memcmp(&frame->payload[i * size], right.data(), size) == 0
                                  : frame->is(wire::FrameType::kZero) &&
                                        std::all_of(right.begin(), right.end(),
                                                    [](std::byte b) { return b == std::byte{0}; });
            if (same && missing.count({region, at}) > 0) held.insert({region, at});
          }
        }
      }
    }
  }
  static std::set<PageId> known_in(const StageClient::Map& map) {
    std::set<PageId> known;
    for (const StageClient::Frame& each : map.runs) {
      if (wire::Holders::of(each.header.tag).first == wire::Holders::kDestination) continue;
      for (std::uint64_t i = 0; i < each.header.page_count; ++i)
        known.insert({each.header.region, each.header.first_page + i});
    }
    return known;
  }
};

}  // namespace memferry::test
