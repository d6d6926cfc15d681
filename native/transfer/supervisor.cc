// The one thread that decides: it hands out events in order, deals with cuts and deadlines, and is the only
// one that starts and joins the threads of an epoch.
#include <sys/eventfd.h>

#include <algorithm>
#include <utility>

#include "transfer/sender_impl.h"
#include "wire/later_tokens.h"

namespace memferry {
namespace {

constexpr unsigned kMostViolations = 3;  // after the switchover, where each but the last is only a cut
constexpr std::chrono::milliseconds kFirstBackoff{10};
constexpr std::chrono::milliseconds kLongestBackoff{1000};
constexpr std::chrono::milliseconds kDialWhileScattering{1000};
// Until a fault's answer has left the demand channel to the barrier.
constexpr std::chrono::milliseconds kDemandBarrierRetry{1};

}  // namespace

void Sender::Impl::Epoch::shutdown() {
  for (const auto& channel : data) {
    if (channel->stream) channel->stream->shutdown();
  }
  if (demand) demand->shutdown();
}

void Sender::Impl::Epoch::join() {
  for (const auto& channel : data) {
    channel->sender.stop();
    channel->reader.stop();
  }
  demand_server.stop();
}

void Sender::Impl::post_locked(EngineEvent event) {
  events.push_back(std::move(event));
  supervisor_changed.notify_all();
}

void Sender::Impl::fail_locked(std::string code, std::string message) {
  phase = Phase::kEnded;
  task.kind = TaskKind::kNone;
  EngineEvent event;
  event.kind = EngineEventKind::kFailed;
  event.code = std::move(code);
  event.message = std::move(message);
  post_locked(std::move(event));
}

void Sender::Impl::deliver_events(std::unique_lock<std::mutex>& lock) {
  while (!events.empty() && !closing) {
    const EngineEvent event = std::move(events.front());
    events.pop_front();
    lock.unlock();
    config.on_event(event);
    lock.lock();
  }
}

void Sender::Impl::cut_locked(Epoch& of, std::string why) {
  if (&of != epoch.get() || of.cut || of.leaving) return;
  of.cut = true;
  of.shutdown();
  pacer.cancel();
  if (scatter) scatter->wake();
  if (comparison) comparison->wake();
  cut_reason = why.empty() ? "connection lost" : std::move(why);
  work_changed.notify_all();
  supervisor_changed.notify_all();
}

void Sender::Impl::report_cut(Epoch& of, std::string why) {
  const std::lock_guard lock(mutex);
  cut_locked(of, std::move(why));
}

void Sender::Impl::report_violation(Epoch& of, std::string why) {
  const std::lock_guard lock(mutex);
  violation_locked(of, std::move(why));
}

void Sender::Impl::violation_locked(Epoch& of, std::string why) {
  if (&of != epoch.get() || of.cut || of.leaving) return;
  why = "the destination broke the protocol: " + why;
  const bool recoverable = phase == Phase::kSwitching || phase == Phase::kPostcopy;
  if (++violations > kMostViolations || !recoverable) fatal = Failure{"PROTOCOL", why};
  cut_locked(of, std::move(why));
}

void Sender::Impl::report_broken(Epoch& of, std::string why) {
  const std::string owner = gone_owner(config.regions);
  const std::lock_guard lock(mutex);
  if (!fatal) fatal = owner.empty() ? Failure{"SYSTEM", why} : Failure{"OWNER_GONE", owner};
  cut_locked(of, std::move(why));
}

void Sender::Impl::region_gone() {
  {
    // An owner that ends after the switch leaves its shared memory behind, which is mapped here: the destination still
    // needs it.
    const std::lock_guard lock(mutex);
    const bool kept = std::all_of(config.regions.begin(), config.regions.end(),
                                  [](const auto& region) { return region->owner() && !region->remote(); });
    if (kept && (phase == Phase::kSwitching || phase == Phase::kPostcopy) &&
        !gone_owner(config.regions).empty())
      return;
  }
  gate.close();
  {
    const std::lock_guard lock(mutex);
    gone = true;
    if (epoch) {
      epoch->cut = true;
      epoch->shutdown();
    }
    pacer.cancel();
    if (scatter) scatter->shut_down();
    ::eventfd_write(cancel.get(), 1);
    work_changed.notify_all();
    supervisor_changed.notify_all();
  }
  gate.wait_left();
}

void Sender::Impl::finish_if_acknowledged_locked(Epoch& of) {
  const bool only_first = task.kind == TaskKind::kDiscard || task.kind == TaskKind::kCompare;
  for (const auto& channel : of.data) {
    if (!channel->acknowledged && (channel->index == 0 || !only_first)) return;
  }
  if (task.kind == TaskKind::kPush && !of.demand_acknowledged) return;
  // References that came to nothing when no channel took pages any more: they go now, as they are. In a push a fault may
  // have taken one behind the demand channel's barrier, so that is asked for again in any case.
  if (std::exchange(unresolved, false) && (task.kind == TaskKind::kPush || queue.pending_pages() > 0)) {
    answer_deadline.reset();
    return start_task_locked(task.kind, task.tag, nullptr, false);
  }

  EngineEvent event;
  event.kind = EngineEventKind::kRoundDone;
  event.tag = task.tag;
  if (task.kind == TaskKind::kRound) {
    std::uint64_t listed = 0;
    for (const auto& bitmap : suspects) listed += bitmap->count();
    for (std::uint32_t region = 0; region < suspects.size(); ++region) {
      for (std::uint64_t i = 0; listed > 0 && i < suspects[region]->words(); ++i) {
        queue.pending(region).or_word(i, suspects[region]->word(i));
      }
      suspects[region]->clear_run(PageRun{PageNumber{0}, suspects[region]->capacity()});
    }
    event.suspects = listed;
  } else if (task.kind == TaskKind::kPush) {
    evicted = true;
    event.kind = EngineEventKind::kEvicted;
    event.tag = 0;
  }
  task.kind = TaskKind::kNone;
  answer_deadline.reset();
  post_locked(std::move(event));
}

// False when the demand server is answering right now.
bool Sender::Impl::try_barrier_on_demand(std::unique_lock<std::mutex>& lock) {
  const std::shared_ptr<Epoch> current = epoch;
  if (!current->demand_write.try_lock()) return false;
  const std::lock_guard writing(current->demand_write, std::adopt_lock);
  demand_barrier_due = false;
  current->demand_barrier_sent = true;
  await_answer_locked();
  wire::FrameHeader header = wire::make_header(wire::FrameType::kBarrier, 0, {}, task.tag);
  wire::seal(header);
  lock.unlock();
  const wire::IoResult result = current->demand->send_all(std::as_bytes(std::span(&header, 1)));
  bytes_on_wire += sizeof header;
  if (!result.done()) report_cut(*current, "demand channel: " + result.describe());
  lock.lock();
  return true;
}

void Sender::Impl::end_epoch(std::unique_lock<std::mutex>& lock) {
  if (const std::shared_ptr<Epoch> ending = epoch) {
    ending->cut = true;
    work_changed.notify_all();
    pacer.cancel();
    if (scatter) scatter->wake();
    lock.unlock();
    ending->shutdown();
    ending->join();
    pacer.detach();
    for (const auto& channel : ending->data) {
      if (channel->way) scatter->close_direct(*channel->way);
    }
    if (ending->demand_way) scatter->close_direct(*ending->demand_way);
    lock.lock();
    epoch.reset();
  }
  cut_reason.clear();
  demand_barrier_due = false;
  answer_deadline.reset();
}

void Sender::Impl::connect_first(std::unique_lock<std::mutex>& lock) {
  auto first = std::make_shared<Epoch>();
  lock.unlock();
  const std::string no_server = scatter ? scatter->open() : std::string();
  DialOutcome outcome{DialOutcome::Kind::kUp, false, {}};
  if (config.direct && no_server.empty()) outcome = dial_all(*first, Clock::now() + config.connect_timeout);
  lock.lock();
  if (closing || gone) return;
  next_epoch = 1;
  if (!no_server.empty()) return fail_locked("CONNECT_FAILED", no_server);
  if (!config.direct) {
    phase = Phase::kRounds;
    post_locked({.kind = EngineEventKind::kConnected, .code = {}, .message = {}, .lost = {}});
    return;
  }
  switch (outcome.kind) {
    case DialOutcome::Kind::kUp:
      phase = Phase::kRounds;
      start_threads(first);
      post_locked({.kind = EngineEventKind::kConnected, .code = {}, .message = {}, .lost = {}});
      break;
    case DialOutcome::Kind::kRefused:
      fail_locked("REFUSED", outcome.why);
      break;
    default:
      fail_locked("CONNECT_FAILED", outcome.why);
      break;
  }
}

void Sender::Impl::recover(std::unique_lock<std::mutex>& lock) {
  post_locked({.kind = EngineEventKind::kPaused, .code = {}, .message = {}, .lost = {}});
  const auto deadline = Clock::now() + config.recover_timeout;
  const auto over = [this] { return closing || gone || evicted || fatal; };
  std::string why = "no attempt was made";
  // Where nothing gets through, not as fast as it fails.
  if (barren_epochs > 0) {
    deliver_events(lock);
    const auto pause = std::min(kFirstBackoff * (1U << std::min(barren_epochs, 7U)), kLongestBackoff);
    supervisor_changed.wait_for(lock, pause, over);
  }
  for (auto backoff = kFirstBackoff;; backoff = std::min(2 * backoff, kLongestBackoff)) {
    deliver_events(lock);
    // Evicted: the servers have what the destination lacks.
    if (over()) return;
    const bool goes_on = scatter && push_wanted && switch_acknowledged && scatter->goes_on_alone();
    if (Clock::now() >= deadline && !goes_on)
      return fail_locked("RECOVERY_TIMEOUT", "the destination did not come back: " + why);
    const bool none_left = !wire::has_data_token(config.tokens.size(), config.channels + 1, next_epoch);
    if (none_left && goes_on) {
      supervisor_changed.wait_for(lock, kLongestBackoff, over);
      continue;
    }
    if (none_left) {
      return fail_locked("RECOVERY_TIMEOUT", "no tokens left for another set of connections: " + why);
    }
    auto next = std::make_shared<Epoch>();
    next->number = next_epoch;
    ++redials;
    lock.unlock();
    // A scatter goes on without the destination, and says so when it is done: not in the middle of a long dial.
    const auto patience =
        scatter ? std::min(config.connect_timeout, kDialWhileScattering) : config.connect_timeout;
    const auto attempt_deadline = Clock::now() + patience;
    DialOutcome outcome = dial_all(*next, attempt_deadline);
    std::string wrong;
    if (outcome.kind == DialOutcome::Kind::kUp)
      wrong = exchange_bitmap(*next, std::max(deadline, attempt_deadline), outcome.why);
    lock.lock();
    if (outcome.token_used) ++next_epoch;
    if (over()) return;
    if (!wrong.empty() && ++violations > kMostViolations) return fail_locked("PROTOCOL", wrong);
    why = wrong.empty() ? outcome.why : wrong;
    if (why.empty()) {
      const std::uint64_t lacking = queue.pending_pages();
      barren_epochs = lacking > 0 && lacking == lacked_before ? barren_epochs + 1 : 0;
      lacked_before = lacking;
      if (barren_epochs > wire::kMostBarrenEpochs && !goes_on) {
        return fail_locked("RECOVERY_TIMEOUT",
                           "the connections are cut again and again, and no page gets through");
      }
      start_threads(next);
      post_locked({.kind = EngineEventKind::kRecovered, .code = {}, .message = {}, .lost = {}});
      if (!switch_acknowledged) {
        // Its answer was lost or never sent; the discards are settled by the bitmap.
        start_task_locked(TaskKind::kSwitch, 0, switch_frame());
      } else if (push_wanted) {
        start_task_locked(TaskKind::kPush, kPushTag, nullptr);
      }
      return;
    }
    const auto now = Clock::now();
    // The last attempt comes at the deadline; a scatter that goes on without the destination tries on beyond it.
    const auto next_try =
        now < deadline ? std::max(std::min(deadline, now + backoff), now + kFirstBackoff) : now + backoff;
    supervisor_changed.wait_until(lock, next_try, over);
  }
}

void Sender::Impl::supervise() {
  std::unique_lock lock(mutex);
  while (!closing) {
    try {
      supervise_until_closing(lock);
    } catch (const std::exception& error) {
      // No thread, no descriptor, no memory: this migration ends, the process does not.
      if (!lock.owns_lock()) lock.lock();
      end_epoch(lock);
      if (phase != Phase::kEnded) fail_locked("SYSTEM", error.what());
    }
  }
  end_epoch(lock);
}

void Sender::Impl::supervise_until_closing(std::unique_lock<std::mutex>& lock) {
  while (!closing) {
    deliver_events(lock);
    if (closing) break;
    if (switch_acknowledged && delta_cache && delta_cache->memory_bytes() > 0) {
      lock.unlock();
      delta_cache->end();
      lock.lock();
      continue;
    }
    if (gone && !users.empty()) {
      end_epoch(lock);
      if (phase != Phase::kEnded) {
        const std::string owner = gone_owner(config.regions);
        fail_locked(owner.empty() ? "REGION_GONE" : "OWNER_GONE",
                    owner.empty() ? "a region was closed while it moved" : owner);
      }
      auto dropped = std::move(users);
      users.clear();
      lock.unlock();
      dropped.clear();  // waits for region_gone() to return, which needs the lock
      lock.lock();
      continue;
    }
    if (phase != Phase::kEnded) {
      if (fatal) {
        end_epoch(lock);
        fail_locked(fatal->code, fatal->message);
        continue;
      }
      if (!cut_reason.empty()) {
        const std::string why = cut_reason;
        end_epoch(lock);
        if (evicted) continue;  // nobody needs this side any more
        if (phase == Phase::kRounds) {
          fail_locked("CHANNEL_LOST", why);
        } else {
          recover(lock);
        }
        continue;
      }
      if (connect_wanted) {
        connect_wanted = false;
        connect_first(lock);
        continue;
      }
      if (answer_deadline && Clock::now() >= *answer_deadline && epoch) {
        answer_deadline.reset();
        const std::shared_ptr<Epoch> current = epoch;
        lock.unlock();
        report_cut(*current, "the destination does not answer");
        lock.lock();
        continue;
      }
      if (demand_barrier_due && epoch) {
        if (!try_barrier_on_demand(lock)) supervisor_changed.wait_for(lock, kDemandBarrierRetry);
        continue;
      }
    }
    if (!events.empty()) continue;
    if (answer_deadline) {
      supervisor_changed.wait_until(lock, *answer_deadline);
    } else {
      supervisor_changed.wait(lock);
    }
  }
}

}  // namespace memferry
