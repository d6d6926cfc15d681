// What goes wrong in a schedule, when its progress has come to that point.
//
// Threads: watch() has one of its own; moments strike on a guest's.
#pragma once

#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "schedule_world.h"

namespace memferry::test {

class ScheduleFaults : public ScheduleWorld {
 protected:
  using ScheduleWorld::ScheduleWorld;

  void watch() {
    while (!over_) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      const auto now = Clock::now();
      for (const auto& each : migrations_) {
        Clock::rep at = each->hurry_at;
        if (at == 0 || now.time_since_epoch().count() < at || !each->hurry_at.compare_exchange_strong(at, 0))
          continue;
        if (each->has_sender) each->sender->set_bandwidth(0);
        if (!each->has_receiver) continue;
        each->receiver->set_bandwidth(0);
        each->receiver->set_gather_limit(0);
      }
      for (Strike& each : faults_) {
        const Clock::rep ends = each.ends;
        if (ends != 0 && now.time_since_epoch().count() >= ends) {
          each.ends = 0;
          end_pause(*each.fault);
        }
        if (!each.done && reached(*each.fault)) strike(each);
      }
    }
    // What was to flip may never have come.
    for (Strike& each : faults_) {
      if (each.fault->kind != FaultKind::kServerFlips && each.fault->kind != FaultKind::kDirectFlips)
        continue;
      const Forwarder* network = each.fault->kind == FaultKind::kServerFlips
                                     ? servers_[each.fault->server]->vmd.network()
                                     : migrations_[each.fault->guest]->network.get();
      if (network == nullptr || !network->flipped(each.fault->up ? Forwarder::kUp : Forwarder::kDown))
        each.struck = false;
    }
  }
  void end_pause(const Schedule::Fault& fault) {
    if (fault.kind == FaultKind::kDirectPauses) return migrations_[fault.guest]->network->silence(false);
    const std::lock_guard lock(mutex_);
    // Another fault may have made it silent for good.
    if (!servers_[fault.server]->silent) servers_[fault.server]->vmd.network()->silence(false);
  }
  static Clock::rep after(unsigned milliseconds) {
    return (Clock::now() + ms(milliseconds)).time_since_epoch().count();
  }
  bool reached(const Schedule::Fault& fault) const {
    const Migration& of = *migrations_[fault.guest];
    std::uint64_t progress = 0;
    if (fault.when == When::kGathered) {
      if (!of.has_receiver) return false;
      progress = of.receiver->stats().pages_gathered;
    } else if (fault.when == When::kSent || fault.when == When::kAcknowledged) {
      if (!of.has_sender) return false;
      const SenderStats stats = of.sender->stats();
      progress = stats.pages_direct;
      for (const auto& server : stats.servers) progress += server.pages;
      if (fault.when == When::kSent) progress = stats.pages_sent + stats.pages_zero;
    } else {
      return false;
    }
    return progress * 1000 >= of.plan.pages() * fault.permille;
  }
  void strike(When when, unsigned guest) {
    for (Strike& each : faults_) {
      if (each.fault->when == when && (each.fault->guest == guest || when == When::kStart) && !each.done)
        strike(each);
    }
  }
  // Noted before it happens, so that whatever follows is excused by it.
  void strike(Strike& it) {
    if (it.done.exchange(true)) return;
    const Schedule::Fault& fault = *it.fault;
    Server& server = *servers_[fault.server];
    Migration& of = *migrations_[fault.guest];
    const auto note = [&](auto&& change) {
      const std::lock_guard lock(mutex_);
      server.disturbed = true;
      change();
      ++strikes_;
    };
    bool struck = true;
    switch (fault.kind) {
      case FaultKind::kServerKilled:
      case FaultKind::kServerRestarted:
        note([&] {
          server.gone = true;
          // Until it has happened.
          if (server.gone_at == Clock::time_point{}) server.gone_at = Clock::time_point::max();
        });
        if (fault.kind == FaultKind::kServerKilled) {
          server.vmd.kill();
        } else {
          server.vmd.restart_empty();
        }
        note([&] {
          if (server.gone_at == Clock::time_point::max()) server.gone_at = Clock::now();
        });
        break;
      case FaultKind::kServerSilent:
        note([&] {
          server.gone = server.silent = true;
          if (server.gone_at == Clock::time_point{}) server.gone_at = Clock::now();
          server.vmd.go_silent();
        });
        break;
      case FaultKind::kServerPauses:
        note([] {});
        server.vmd.network()->silence(true);
        it.ends = after(fault.amount);
        break;
      case FaultKind::kServerCut:
        note([] {});
        server.vmd.network()->cut();
        break;
      case FaultKind::kServerSmall:
        note([] {});
        server.vmd.fill_up(fault.amount);
        break;
      case FaultKind::kServerFlips:
        note([] {});
        server.vmd.network()->flip(fault.up ? Forwarder::kUp : Forwarder::kDown);
        break;
      case FaultKind::kServerWrong:
        struck = spoil(fault, server, of);
        break;
      case FaultKind::kDirectCut:
        of.direct_disturbed = true;
        struck = of.network != nullptr;
        if (struck) of.network->cut();
        break;
      case FaultKind::kDirectPauses:
        struck = of.network != nullptr;
        if (!struck) break;
        of.network->silence(true);
        it.ends = after(fault.amount);
        break;
      case FaultKind::kDirectFlips:
        of.direct_disturbed = true;
        struck = of.network != nullptr;
        if (struck) of.network->flip(fault.up ? Forwarder::kUp : Forwarder::kDown);
        break;
      case FaultKind::kSourceKilled:
      case FaultKind::kSourceKilledAfter:
        struck = kill_source(of);
        break;
      case FaultKind::kDestinationClosed:
        struck = of.has_receiver;
        if (!struck) break;
        of.destination_closed = true;
        of.guest.expect_faults();
        of.receiver->close();
        of.arrivals.callback()(
            {.kind = EngineEventKind::kFailed, .code = "CLOSED", .message = {}, .lost = {}});
        break;
    }
    it.struck = struck;
  }
  bool spoil(const Schedule::Fault& fault, Server& server, Migration& of) {
    std::mt19937_64 random(schedule_.seed + fault.permille);
    std::vector<PageId> held = held_by(server, of);
    bool any = false;
    for (unsigned i = 0; i < fault.amount && !held.empty(); ++i) {
      const auto [region, page] = held[random() % held.size()];
      std::vector<std::byte> bytes = of.guest.first_version(region, page);
      if (bytes.empty() || i % 2 == 0) bytes = random_bytes(system_page_size(), random());
      {
        const std::lock_guard lock(mutex_);
        server.spoiled[of.index].insert({region, page});
        ++strikes_;
      }
      if (!server.vmd.live() || !server.vmd.overwrite(of.image, region, page, bytes)) break;
      any = true;
    }
    return any;
  }
  // Pages of which it has the content.
  static std::vector<PageId> held_by(Server& server, const Migration& of) {
    std::vector<PageId> held;
    const std::lock_guard looking(server.looking);
    const auto client = server.vmd.live() ? server.vmd.observe(of.image, wire::StageRole::kGather) : nullptr;
    if (!client) return held;
    for (const StageClient::Frame& each : client->read_map().runs) {
      const bool here = wire::Holders::of(each.header.tag).has(static_cast<std::uint8_t>(server.ordinal));
      if (!here || (each.header.flags & wire::kFlagZero) != 0) continue;
      for (std::uint64_t i = 0; i < each.header.page_count; ++i)
        held.emplace_back(each.header.region, each.header.first_page + i);
    }
    return held;
  }
  bool kill_source(Migration& of) {
    if (!of.has_sender || of.source_killed.exchange(true)) return false;
    {
      const std::lock_guard lock(mutex_);
      if (!of.evicted) of.source_killed_early = true;
    }
    of.sender->close(false);
    of.departures.callback()({.kind = EngineEventKind::kFailed, .code = "KILLED", .message = {}, .lost = {}});
    return true;
  }
};

}  // namespace memferry::test
