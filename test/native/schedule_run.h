// Carries out a schedule over real sockets and judges what came of it. What may be lost is computed from what really
// struck; everything else has to be right, byte for byte and in time.
//
// Threads: one a guest, which makes its migration's calls in order, and one that watches progress and does what goes
// wrong; beside them a guest's writer and touchers.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "schedule_verdict.h"

namespace memferry::test {

class ScheduleRun : public ScheduleVerdict {
 public:
  using ScheduleVerdict::ScheduleVerdict;

  void run() {
    std::vector<std::uint16_t> ports;
    std::vector<std::uint64_t> identities;
    const auto domain = schedule_.dedup ? std::optional(DomainKey{1, 2, 3}) : std::nullopt;
    for (unsigned i = 0; i < schedule_.servers; ++i) {
      const bool network =
          std::any_of(schedule_.faults.begin(), schedule_.faults.end(), [i](const Schedule::Fault& each) {
            return each.server == i && about_server(each.kind) && needs_network(each.kind);
          });
      servers_.push_back(std::make_unique<Server>(i, network));
      ports.push_back(servers_.back()->vmd.port());
      identities.push_back(servers_.back()->vmd.stage()->identity());
    }
    for (unsigned i = 0; i < schedule_.guests.size(); ++i) {
      migrations_.push_back(std::make_unique<Migration>(schedule_, i, ports, identities));
      for (auto& server : servers_) {
        if (!give_image(*server->vmd.stage(), migrations_[i]->image, schedule_.guests[i].region_pages,
                        static_cast<std::uint8_t>(server->ordinal), ports, FaultyServer::kAttempts, domain)) {
          fail("an image finds no room");
        }
      }
    }
    for (const Schedule::Fault& fault : schedule_.faults) faults_.emplace_back(&fault);
    strike(When::kStart, 0);
    std::thread watcher([this] { watch(); });
    std::vector<std::thread> flows;
    for (const auto& each : migrations_) {
      flows.emplace_back([this, &migration = *each] {
        try {
          flow(migration);
        } catch (const std::exception& error) {
          fail(migration, std::string("an exception: ") + error.what());
        }
        finish(migration);
      });
    }
    for (auto& each : flows) each.join();
    over_ = true;
    watcher.join();
    for (const auto& server : servers_) server->vmd.end();
  }

 private:
  void flow(Migration& of) {
    const bool park = schedule_.way == Way::kPark;
    if (!park) make_receiver(of, false);
    make_sender(of);
    hurry(of);
    of.step = "connecting";
    of.sender->connect();
    if (!await(of, of.departures, EngineEventKind::kConnected)) return stayed(of);
    strike(When::kConnected, of.index);
    bool going_on = false;
    switch (schedule_.way) {
      case Way::kScatter:
        of.sender->queue_populated();
        going_on = switch_over(of);
        break;
      case Way::kScatterHybrid:
        going_on = rounds(of, of.plan.rounds) && discards(of) && switch_over(of);
        break;
      case Way::kScatterPreCopy:
        going_on = rounds(of, of.plan.rounds) && gather_first(of);
        break;
      case Way::kPark:
        going_on = park_and_gather(of);
        break;
    }
    if (!going_on && !of.committed) return stayed(of);
  }

  void make_receiver(Migration& of, bool sourceless) {
    ReceiverConfig config;
    config.regions = of.guest.targets;
    config.migration = of.image;
    config.channels = of.plan.channels;
    config.tokens = direct_tokens(of.plan.channels, 16);
    config.may_page = true;
    config.paging_from_start = of.plan.paging_from_start;
    config.keep_page_hashes = true;
    // A source's dial may take a second to find out that nobody hears it.
    config.recover_timeout = schedule_.has(FaultKind::kDirectPauses) ? kRecoverFromPause : kRecover;
    config.loss_grace = ms(50);
    config.servers = of.destination_servers;
    config.gather_limit = of.plan.gather_limit;
    config.bandwidth = of.plan.intake_limit;
    config.sourceless = sourceless;
    config.encodings = of.plan.encodings();
    config.on_event = [&of, keep = of.arrivals.callback()](const EngineEvent& event) {
      // Before whoever waits for the lost pages is woken.
      if (event.kind == EngineEventKind::kLost || event.kind == EngineEventKind::kFailed)
        of.guest.expect_faults();
      keep(event);
    };
    of.receiver = Receiver::create(std::move(config));
    of.has_receiver = true;
    if (sourceless) return;
    of.listener = std::make_unique<Listener>(Listener::Config{"127.0.0.1", 0, {}});
    of.listener->add(of.receiver);
    const bool network =
        std::any_of(schedule_.faults.begin(), schedule_.faults.end(), [&](const Schedule::Fault& each) {
          return each.guest == of.index && each.kind >= FaultKind::kDirectCut &&
                 each.kind <= FaultKind::kDirectFlips;
        });
    if (network) of.network = std::make_unique<Forwarder>(of.listener->port());
  }

  void make_sender(Migration& of) {
    SenderConfig config;
    config.regions = of.guest.sources;
    if (schedule_.way == Way::kScatterHybrid || schedule_.way == Way::kScatterPreCopy) {
      static const bool there_is = probe_trackers().front().available;
      const bool kernel = of.plan.write_tracker && there_is;
      for (const auto& region : of.guest.sources) {
        trackers_of(config, kernel ? TrackerKind::kUffdWpAsync : TrackerKind::kHashDiff, region,
                    of.index % 2 == 1);
      }
    }
    config.host = "127.0.0.1";
    config.direct = schedule_.way != Way::kPark;
    config.port = !config.direct ? std::uint16_t{0} : of.network ? of.network->port() : of.listener->port();
    config.migration = of.image;
    config.channels = of.plan.channels;
    config.tokens = direct_tokens(of.plan.channels, 16);
    config.bandwidth = of.plan.send_limit;
    config.servers = of.source_servers;
    config.replicas = schedule_.replicas;
    config.connect_timeout = ms(4000 * kSlow);
    config.recover_timeout = kSourceRecover;
    config.answer_timeout = ms(5000 * kSlow);
    config.goodbye_timeout = ms(200 * kSlow);
    // A server takes up to two seconds to say that it is its replica's that is silent.
    config.stall_timeout =
        schedule_.replicas > 1 && schedule_.has(FaultKind::kServerSilent) ? kChainStall : kStall;
    config.release_as_evicted = of.plan.release_as_evicted;
    config.compress = of.plan.compress;
    config.destination_encodings = of.plan.encodings();
    config.server_encodings = of.plan.encodings();
    config.delta_cache_bytes = of.plan.delta_cache;
    if (schedule_.dedup) config.dedup = DomainKey{1, 2, 3};
    config.on_event = [&of, keep = of.departures.callback()](const EngineEvent& event) {
      // At once: what is on its way to the destination now has not been acknowledged, and a server that ends now has not
      // been noticed. An event is given with no lock held, so the sender may be asked.
      const bool done = event.kind == EngineEventKind::kEvicted || event.kind == EngineEventKind::kRoundDone;
      if (done) note_done(of);
      keep(event);
    };
    of.sender = std::make_unique<Sender>(std::move(config));
    of.has_sender = true;
  }
  static void trackers_of(SenderConfig& config, TrackerKind kind, const std::shared_ptr<Region>& region,
                          bool split) {
    config.trackers.push_back(make_tracker(kind, region, {.split_huge_pages = split}));
    config.trackers.back()->arm();
  }

  // From now on it is only a matter of time until the limits are lifted.
  static void hurry(Migration& of) {
    of.hurry_at = (Clock::now() + ms(of.plan.hurry_ms)).time_since_epoch().count();
  }

  // False: it has failed, or was ended by a fault.
  bool await(Migration& of, EventBox& box, EngineEventKind kind, std::optional<EngineEvent>* got = nullptr,
             std::optional<Clock::time_point> until = std::nullopt) {
    auto event = box.take({kind, EngineEventKind::kFailed}, until.value_or(deadline_));
    if (!event && !until) fail(of, "hangs\n" + state());
    const bool came = event && event->kind == kind;
    if (!came && event) of_failure(of, *event);
    if (got != nullptr) *got = std::move(event);
    return came;
  }
  void of_failure(Migration& of, const EngineEvent& event) {
    const std::lock_guard lock(mutex_);
    why_[of.index] = event.code + " " + event.message;
  }

  bool round(Migration& of, std::uint64_t tag, std::uint64_t* suspects = nullptr) {
    of.sender->start_round(tag);
    std::optional<EngineEvent> done;
    if (!await(of, of.departures, EngineEventKind::kRoundDone, &done)) return false;
    if (suspects != nullptr) *suspects = done->suspects;
    return true;
  }
  bool rounds(Migration& of, unsigned count) {
    of.step = "in its rounds";
    of.guest.start_writing();
    of.sender->queue_populated();
    for (unsigned i = 0; i < count; ++i) {
      if (!round(of, i + 1)) return false;
      of.sender->queue_dirty();
    }
    return true;
  }
  bool discards(Migration& of) {
    of.step = "discarding";
    for (unsigned i = 0; i < of.plan.discards; ++i) {
      of.sender->discard_dirty(100 + i);
      if (!await(of, of.departures, EngineEventKind::kRoundDone)) return false;
    }
    return true;
  }
  void pause(Migration& of) {
    of.guest.stop_writing();
    of.step = "paused";
    strike(When::kBeforeSwitch, of.index);
  }
  // What a server took along that failed meanwhile goes again.
  bool settle(Migration& of) {
    std::uint64_t suspects = 1;
    for (unsigned i = 0; suspects > 0 && i < 2 + schedule_.servers + schedule_.faults.size(); ++i) {
      if (!round(of, 200 + i, &suspects)) return false;
    }
    if (suspects > 0) fail(of, std::to_string(suspects) + " pages of a paused guest stay suspect");
    settled(of);
    return suspects == 0;
  }
  static void note_done(Migration& of) {
    Migration::Done& done = of.done.emplace();
    done.at = Clock::now();
    if (of.has_receiver) of.missing = of.receiver->missing(~std::size_t{0});
    const SenderStats stats = of.sender->stats();
    for (const auto& server : stats.servers) done.given_up.push_back(server.failed);
    done.single = stats.pages_single;
  }
  // Now that the event is here, what was noted with it.
  void settled(Migration& of) {
    {
      const std::lock_guard lock(mutex_);
      of.settled_at = of.done->at;
      of.given_up = of.done->given_up;
      of.single = of.done->single;
      of.evicted = true;
    }
    if (of.single > 0 && !may_be_single(of))
      fail(of, std::to_string(of.single) + " pages have one copy, and nothing that happened excuses it\n" +
                   state());
  }

  bool switch_over(Migration& of) {
    pause(of);
    of.step = "switching";
    of.sender->switch_over();
    if (!await(of, of.departures, EngineEventKind::kSwitched)) return false;
    of.committed = await(of, of.arrivals, EngineEventKind::kSwitched);
    if (!of.committed) return false;
    of.step = "switched";
    of.guest.start_touching();
    strike(When::kSwitched, of.index);
    of.step = "pushing";
    of.sender->start_push();
    const bool evicted = await(of, of.departures, EngineEventKind::kEvicted);
    if (evicted) {
      settled(of);
      if (schedule_.audit) audit(of);
      strike(When::kEvicted, of.index);
      leave(of);
    } else if (!of.source_killed && !of.destination_closed) {
      fail(of, "the source has failed after the commit: " + why(of));
    }
    of.step = evicted ? "evicted" : "without its source";
    arrive(of);
    return true;
  }

  bool gather_first(Migration& of) {
    pause(of);
    of.sender->queue_dirty();
    if (!settle(of)) return false;
    of.step = "sent, not gathered";
    if (schedule_.audit) audit(of);
    strike(When::kSwitched, of.index);
    of.receiver->await_filled();
    if (!await(of, of.arrivals, EngineEventKind::kFilled, nullptr, Clock::now() + kGatherPatience) ||
        !of.receiver->seal()) {
      const std::lock_guard lock(mutex_);
      why_[of.index] += " (not filled, missing " + std::to_string(of.receiver->stats().pages_missing) + ")";
      return false;
    }
    of.committed = true;
    of.step = "taken over";
    strike(When::kEvicted, of.index);
    if (schedule_.way == Way::kScatterPreCopy) of.guest.start_touching();
    leave(of);
    complete(of);
    return true;
  }

  bool park_and_gather(Migration& of) {
    pause(of);
    of.step = "parking";
    of.sender->queue_populated();
    if (!settle(of)) return false;
    of.committed = true;
    of.step = "parked";
    if (schedule_.audit) audit(of);
    for (const auto& server : servers_) server->vmd.stage()->seal(of.image);
    strike(When::kEvicted, of.index);
    leave(of);
    make_receiver(of, true);
    hurry(of);
    if (!await(of, of.arrivals, EngineEventKind::kSwitched)) return true;
    of.guest.start_touching();
    strike(When::kSwitched, of.index);
    of.step = "gathering";
    arrive(of);
    return true;
  }

  // The source's engine ends; its memory is its owner's again.
  void leave(Migration& of) {
    if (!of.source_killed) of.sender->close(true);
    for (std::uint32_t region = 0; region < of.guest.sources.size(); ++region) {
      if (of.sender->digest(region) != of.guest.digest(region))
        fail(of, "the source's digest is not its memory's");
    }
    of.guest.spoil_source();
  }
};

}  // namespace memferry::test
