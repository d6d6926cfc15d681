// The two loops of a data channel: one sends what the task says, the other reads the destination's answers.
#include <algorithm>
#include <cstring>
#include <utility>

#include "os/sys_error.h"
#include "transfer/sender_impl.h"

namespace memferry {
namespace {

// Answer timeouts that a destination is waited for in all, once everything has been sent and while it says that it gets
// on: what sockets hold at a few hundred kilobytes a second.
constexpr int kMostTimeouts = 20;

}  // namespace

// What one sending thread needs to send chunks. Lives as long as its thread.
class Sender::Impl::Push {
 public:
  Push(Impl& impl, Epoch& of, DataChannel& channel)
      : impl_(impl),
        epoch_(of),
        channel_(channel),
        chunks_(impl.queue, Towards::kDestination, impl.pacer, impl.page_size,
                PageEncoder::create(impl.encoding, Towards::kDestination, impl.page_size),
                impl.references ? std::make_unique<PageReferrer>(*impl.references, impl.page_size) : nullptr),
        courtesy_(wire::shared_key(impl.config.migration)),
        tracker_sinks_(impl.tracker_sinks()),
        no_sinks_(impl.queue.regions()) {}

  // Sends until nothing is pending: true. False when the thread is to do something else.
  bool run(bool guest_runs_here, bool with_references) {
    chunks_.frames().rest();
    chunks_.frames().allow_references(with_references);
    while (!epoch_.cut && !epoch_.leaving) {
      const auto asked = Clock::now();
      if (!impl_.pacer.wait_turn()) return false;
      chunks_.frames().waited(Clock::now() - asked);
      courtesy_.follow(!guest_runs_here && impl_.pacer.should_stand_back());
      // Inside the gate from taking on: what is taken is sent, or the region is gone.
      const TouchGate::Pass pass(impl_.gate);
      if (!pass) return false;
      const bool more =
          chunks_.gather(guest_runs_here ? tracker_sinks_ : no_sinks_, wire::max_payload(impl_.page_size));
      if (!chunks_.frames().empty() && !send()) return false;
      if (!more) return true;
    }
    return false;
  }

 private:
  bool send() {
    const PageFrames::Sent sent = chunks_.frames().send(*channel_.stream);
    impl_.pacer.debit(sent.bytes);
    impl_.count_sent(sent);
    if (sent.result.done()) return true;
    impl_.report_cut(epoch_, "channel " + std::to_string(channel_.index) + ": " + sent.result.describe());
    return false;
  }

  Impl& impl_;
  Epoch& epoch_;
  DataChannel& channel_;
  ChunkGatherer chunks_;
  CpuCourtesy courtesy_;
  const std::vector<PageFrames::OnHash> tracker_sinks_;
  const std::vector<PageFrames::OnHash> no_sinks_;
};

// For the rounds, while the guest runs: trackers that compare content are told what has left.
std::vector<PageFrames::OnHash> Sender::Impl::tracker_sinks() const {
  std::vector<PageFrames::OnHash> sinks(queue.regions());
  for (std::uint32_t region = 0; region < queue.regions(); ++region) {
    const auto& tracker = config.trackers[region];
    if (!tracker || !tracker->wants_sent()) continue;
    sinks[region] = [&tracker](PageNumber page, std::uint64_t xxh3, bool) { tracker->sent(page, xxh3); };
  }
  return sinks;
}

void Sender::Impl::count_sent(const PageFrames::Sent& sent) {
  bytes_on_wire.fetch_add(sent.bytes, std::memory_order_relaxed);
  pages_sent.fetch_add(sent.content_pages, std::memory_order_relaxed);
  pages_zero.fetch_add(sent.zero_pages, std::memory_order_relaxed);
  for (const RegionRun& sent_run : sent.runs) {
    if (const std::uint64_t again = queue.note_sent(sent_run.region, sent_run.run); again > 0) {
      pages_resent.fetch_add(again, std::memory_order_relaxed);
    }
  }
}

bool Sender::Impl::send_barrier(Epoch& of, DataChannel& channel, const Task& mine) {
  {
    const std::lock_guard lock(mutex);
    if (task.generation != mine.generation) return false;
    // Before it is sent: its answer may be faster than this thread.
    channel.barrier_sent = true;
    // The clock runs once nothing is being sent any more: a slow link or a low limit is no silence.
    const bool all =
        std::all_of(of.data.begin(), of.data.end(), [](const auto& c) { return c->barrier_sent; });
    if (all || mine.kind == TaskKind::kDiscard || mine.kind == TaskKind::kCompare) await_answer_locked();
  }
  wire::FrameHeader header = wire::make_header(wire::FrameType::kBarrier, 0, {}, mine.tag);
  wire::seal(header);
  bytes_on_wire += sizeof header;
  const wire::IoResult result = channel.stream->send_all(std::as_bytes(std::span(&header, 1)));
  if (!result.done()) {
    report_cut(of, "channel " + std::to_string(channel.index) + ": " + result.describe());
    return false;
  }
  if (mine.kind == TaskKind::kPush) {
    const std::lock_guard lock(mutex);
    // Nothing is pending, and no data channel has anything in hand: what the demand channel still carries
    // is before its own barrier.
    const bool all =
        std::all_of(of.data.begin(), of.data.end(), [](const auto& c) { return c->barrier_sent; });
    if (all && task.generation == mine.generation && !of.demand_barrier_sent) {
      demand_barrier_due = true;
      supervisor_changed.notify_all();
    }
  }
  return true;
}

void Sender::Impl::send_loop(Epoch& of, DataChannel& channel) {
  const auto say = [&](std::span<const std::byte> bytes) {
    bytes_on_wire += bytes.size();
    const wire::IoResult result = channel.stream->send_all(bytes);
    if (!result.done()) report_cut(of, "channel " + std::to_string(channel.index) + ": " + result.describe());
    return result.done();
  };
  try {
    Push push(*this, of, channel);
    std::uint64_t seen = 0;
    for (;;) {
      Task mine;
      {
        std::unique_lock lock(mutex);
        work_changed.wait(lock, [&] { return of.cut || of.leaving || task.generation != seen; });
        if (of.cut || of.leaving) break;
        mine = task;
        seen = task.generation;
      }
      switch (mine.kind) {
        case TaskKind::kRound:
        case TaskKind::kPush:
          if (scatter) {
            scatter_on(of, channel);
          } else if (push.run(mine.kind == TaskKind::kRound, mine.references)) {
            send_barrier(of, channel, mine);
          }
          break;
        case TaskKind::kDiscard:
          if (channel.index == 0 && (mine.frames->empty() || say(*mine.frames)))
            send_barrier(of, channel, mine);
          break;
        case TaskKind::kCompare:
          if (channel.index == 0 && compare_on(of, mine, say)) send_barrier(of, channel, mine);
          break;
        case TaskKind::kSwitch:
          if (channel.index == 0) {
            {
              const std::lock_guard lock(mutex);
              await_answer_locked();
            }
            say(*mine.frames);
          }
          break;
        case TaskKind::kNone:
          break;
      }
    }
    if (of.leaving && !of.cut) {
      wire::FrameHeader header = wire::make_header(wire::FrameType::kGoodbye);
      wire::seal(header);
      say(std::as_bytes(std::span(&header, 1)));
    }
  } catch (const std::exception& error) {
    report_broken(of, error.what());
  }
  const std::lock_guard lock(mutex);
  --of.still_sending;
  work_changed.notify_all();
}

// Takes part in a scatter until that is over, or the connection is.
void Sender::Impl::scatter_on(Epoch& of, DataChannel& channel) {
  std::string cut;
  scatter->run_direct(
      *channel.way, [&of] { return of.cut || of.leaving; }, cut);
  if (!cut.empty()) report_cut(of, cut);
}

bool Sender::Impl::receive_frame(Epoch& of, wire::Stream& stream, wire::FrameHeader& header,
                                 std::vector<std::byte>& payload) {
  wire::IoResult result = stream.recv_exact(std::as_writable_bytes(std::span(&header, 1)));
  if (result.done()) {
    if (const char* wrong = wire::malformed(header, page_size)) {
      report_violation(of, wrong);
      return false;
    }
    // Of the frames with a payload only these come this way; kBitmap is read before this loop begins.
    const auto type = static_cast<wire::FrameType>(header.type);
    const bool of_references = type == wire::FrameType::kKnown || type == wire::FrameType::kUnresolved;
    if (header.payload_bytes > 0 && type != wire::FrameType::kSuspects && type != wire::FrameType::kTree &&
        !(of_references && references)) {
      report_violation(of, "a frame that a destination does not send");
      return false;
    }
    payload.resize(header.payload_bytes);
    if (!payload.empty()) result = stream.recv_exact(payload);
  }
  if (!result.done()) {
    report_cut(of, result.describe());
    return false;
  }
  if (wire::payload_checksum(header, payload) != header.checksum) {
    report_violation(of, "wrong checksum");
    return false;
  }
  return true;
}

std::string Sender::Impl::note_suspects_locked(DataChannel& channel, const wire::FrameHeader& header,
                                               std::span<const std::byte> payload) {
  // Only before the answer to this round's barrier, which is when the destination names them.
  if (task.kind != TaskKind::kRound || (!scatter && (!channel.barrier_sent || channel.acknowledged))) {
    return "suspects outside a round";
  }
  if (header.region >= queue.regions()) return "suspects in an unknown region";
  std::uint64_t behind_former = 0;
  for (std::size_t at = 0; at < payload.size(); at += sizeof(wire::WireRun)) {
    wire::WireRun run{};
    std::memcpy(&run, payload.data() + at, sizeof run);
    if (!wire::run_inside(run.first_page, run.page_count, queue.known_pages(header.region))) {
      return "suspects outside their region";
    }
    if (run.first_page < behind_former) return "suspects out of order";
    behind_former = run.first_page + run.page_count;
    const PageRun pages{PageNumber{run.first_page}, run.page_count};
    if (scatter) {
      scatter->suspect(header.region, pages);
    } else {
      suspects[header.region]->set_run(pages);
    }
    if (delta_cache) delta_cache->forget(header.region, pages);
    channel.suspects_named += run.page_count;
  }
  return {};
}

// Such a page is not on its way any more, so it may go again at once, by whoever has room; what is left when all have
// answered goes before the task is over.
std::string Sender::Impl::note_unresolved_locked(DataChannel& channel, const wire::FrameHeader& header,
                                                 std::span<const std::byte> names) {
  const bool sending = task.kind == TaskKind::kRound || task.kind == TaskKind::kPush;
  if (!references || !sending || channel.acknowledged) return "a reference refused outside a round or push";
  if (header.region >= queue.regions()) return "references refused in an unknown region";
  if (!wire::run_inside(header.first_page, header.page_count, queue.known_pages(header.region))) {
    return "references refused outside their region";
  }
  const PageRun run{PageNumber{header.first_page}, header.page_count};
  std::string wrong = references->unresolved(header.region, run, names);
  if (!wrong.empty()) return wrong;
  queue.put_back({header.region, run, false, false});
  unresolved = true;
  return {};
}

void Sender::Impl::await_answer_locked() {
  answer_deadline = Clock::now() + config.answer_timeout;
  answer_limit = Clock::now() + kMostTimeouts * config.answer_timeout;
  supervisor_changed.notify_all();
}

// Everything has been sent, and the answer is behind what the sockets hold. Who works that off is given time for it, but
// not for ever: it may say what it likes.
std::string Sender::Impl::note_taken_locked(DataChannel& channel, std::uint64_t bytes) {
  const std::uint64_t before = std::exchange(channel.taken, bytes);
  if (bytes < before) return "fewer bytes taken than before";
  if (!answer_deadline || channel.acknowledged || bytes == before) return {};
  // Of what is being sent right now some is not counted yet.
  if (bytes > bytes_on_wire) return "more bytes taken than were sent";
  answer_deadline = std::min(Clock::now() + config.answer_timeout, answer_limit);
  return {};
}

std::string Sender::Impl::handle_answer(Epoch& of, DataChannel& channel, const wire::FrameHeader& header,
                                        std::span<const std::byte> payload) {
  const std::lock_guard lock(mutex);
  if (&of != epoch.get() || of.cut) return {};
  switch (static_cast<wire::FrameType>(header.type)) {
    case wire::FrameType::kSuspects:
      return note_suspects_locked(channel, header, payload);
    case wire::FrameType::kBarrierAck:
      if (scattering_locked()) {
        if (header.page_count != std::exchange(channel.suspects_named, 0))
          return "more or fewer suspect pages counted than named";
        return scatter->acknowledged(*channel.way, header.tag);
      }
      if (!channel.barrier_sent || channel.acknowledged || header.tag != task.tag ||
          task.kind == TaskKind::kNone) {
        return "an answer to a barrier that was not sent";
      }
      if (header.page_count != channel.suspects_named)
        return "more or fewer suspect pages counted than named";
      channel.acknowledged = true;
      if (answer_deadline) await_answer_locked();
      finish_if_acknowledged_locked(of);
      return {};
    case wire::FrameType::kTaken:
      return note_taken_locked(channel, header.tag);
    case wire::FrameType::kUnresolved:
      return note_unresolved_locked(channel, header, payload);
    case wire::FrameType::kTree:
      if (channel.index != 0 || task.kind != TaskKind::kCompare) return "hashes that were not asked for";
      return comparison->answered(header, payload);
    case wire::FrameType::kSwitchAck: {
      if (channel.index != 0 || phase != Phase::kSwitching || task.kind != TaskKind::kSwitch) {
        return "an answer to a switch that was not asked for";
      }
      phase = Phase::kPostcopy;
      switch_acknowledged = true;
      serving_faults = true;
      work_changed.notify_all();  // a fault may have been faster than this answer
      task.kind = TaskKind::kNone;
      answer_deadline.reset();
      EngineEvent event;
      event.kind = EngineEventKind::kSwitched;
      post_locked(std::move(event));
      if (push_wanted) start_task_locked(TaskKind::kPush, kPushTag, nullptr);
      return {};
    }
    default:
      return "a frame that a destination does not send here";
  }
}

void Sender::Impl::read_loop(Epoch& of, DataChannel& channel) {
  try {
    wire::FrameHeader header{};
    std::vector<std::byte> payload;
    while (receive_frame(of, *channel.stream, header, payload)) {
      if (header.type == static_cast<std::uint16_t>(wire::FrameType::kKnown) && references) {
        references->told(payload);
        continue;
      }
      const std::string wrong = handle_answer(of, channel, header, payload);
      if (!wrong.empty()) return report_violation(of, wrong);
    }
  } catch (const std::exception& error) {
    report_broken(of, error.what());
  }
}

}  // namespace memferry
