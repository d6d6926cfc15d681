// The owner's calls, and what a round, a discard and a switchover consist of.
#include "transfer/sender.h"

#include <sys/eventfd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "os/sys_error.h"
#include "page/hash.h"
#include "transfer/sender_impl.h"
#include "wire/later_tokens.h"

namespace memferry {
namespace {

// Memory is read for a digest in pieces that stay in the cache, each under a pass of its own.
constexpr std::uint64_t kDigestPieceBytes = 256 * 1024;

EncodingStats stats_of(const wire::EncodingCounters& counters) {
  return {counters.raw_bytes, counters.encoded_bytes, counters.pages, counters.cpu_ns};
}

void append(std::vector<std::byte>& out, const void* data, std::size_t bytes) {
  const auto* first = static_cast<const std::byte*>(data);
  out.insert(out.end(), first, first + bytes);
}

}  // namespace

// Everything that was pending is held by somebody, and told.
void Sender::Impl::scatter_drained() {
  const std::lock_guard lock(mutex);
  if (phase == Phase::kEnded || closing) return;
  EngineEvent event;
  if (task.kind == TaskKind::kRound) {
    event.kind = EngineEventKind::kRoundDone;
    event.tag = task.tag;
    event.suspects = scatter->take_suspects();
  } else if (task.kind == TaskKind::kPush) {
    event.kind = EngineEventKind::kEvicted;
    evicted = true;
  } else {
    return;
  }
  task.kind = TaskKind::kNone;
  post_locked(std::move(event));
}

void Sender::Impl::note_memory(std::uint64_t bytes) {
  std::uint64_t former = peak_memory.load(std::memory_order_relaxed);
  while (former < bytes && !peak_memory.compare_exchange_weak(former, bytes, std::memory_order_relaxed)) {
  }
}

std::optional<wire::Token> Sender::Impl::token(std::uint32_t of_epoch, unsigned channel) const {
  return wire::data_token(config.tokens, config.channels + 1, channel, of_epoch);
}

void Sender::Impl::require_between_rounds(const char* operation) const {
  const std::lock_guard lock(mutex);
  // A page goes out again only after its last copy was acknowledged.
  if (task.kind != TaskKind::kNone)
    throw std::logic_error(std::string(operation) + " in the middle of a round");
  if (phase == Phase::kSwitching || phase == Phase::kPostcopy) {
    throw std::logic_error(std::string(operation) + " after the switchover");
  }
}

std::uint64_t Sender::Impl::collect_dirty() {
  const TouchGate::Pass pass(gate);
  if (!pass) throw RegionGone("collect");
  std::uint64_t before = queue.pending_pages();
  bool first_round_is_due = false;
  {
    const std::lock_guard lock(mutex);
    first_round_is_due = comparison && !rounds_begun;
  }
  for (std::uint32_t i = 0; i < queue.regions(); ++i) {
    if (const auto& tracker = config.trackers[i]; tracker && first_round_is_due) {
      // Pages that were compared in a mode without rounds: what is untouched and was not written still is zeros, and
      // nothing of it has gone yet. Forgotten, it would be read, a whole reservation perhaps.
      AtomicBitmap written(config.regions[i]->capacity_pages());
      tracker->collect(written);
      queue.mark_written(i, written);
    } else if (tracker) {
      queue.forget_untouched(i);
      tracker->collect(queue.pending(i));
    }
    queue.mark_growth(i);
  }
  return queue.pending_pages() - before;
}

Sender::Impl::Frames Sender::Impl::discard_frames(bool then_switch) {
  auto frames = std::make_shared<std::vector<std::byte>>();
  std::vector<wire::WireRun> runs;
  const std::size_t runs_a_frame =
      static_cast<std::size_t>(wire::max_payload(page_size) / sizeof(wire::WireRun));
  for (std::uint32_t region = 0; region < queue.regions(); ++region) {
    runs.clear();
    queue.take_discards(region, runs);
    for (const wire::WireRun& run : runs) {
      if (delta_cache) delta_cache->forget(region, {PageNumber{run.first_page}, run.page_count});
    }
    for (std::size_t at = 0; at < runs.size(); at += runs_a_frame) {
      const auto piece = std::as_bytes(std::span(runs).subspan(at, std::min(runs_a_frame, runs.size() - at)));
      wire::FrameHeader header = wire::make_header(wire::FrameType::kDiscard, region);
      wire::seal(header, piece);
      append(*frames, &header, sizeof header);
      append(*frames, piece.data(), piece.size());
    }
  }
  note_memory(queue.memory_bytes() + runs.capacity() * sizeof(wire::WireRun) + frames->capacity());
  if (then_switch) {
    const Frames last = switch_frame();
    append(*frames, last->data(), last->size());
  }
  return frames;
}

Sender::Impl::Frames Sender::Impl::switch_frame() {
  auto frame = std::make_shared<std::vector<std::byte>>();
  wire::FrameHeader header = wire::make_header(wire::FrameType::kSwitch);
  wire::seal(header);
  append(*frame, &header, sizeof header);
  return frame;
}

void Sender::Impl::start_task_locked(TaskKind kind, std::uint64_t tag, Frames frames, bool with_references) {
  task.kind = kind;
  task.references = with_references;
  unresolved = false;
  task.tag = tag;
  task.frames = std::move(frames);
  ++task.generation;
  if (epoch) {
    for (const auto& channel : epoch->data) {
      channel->barrier_sent = channel->acknowledged = false;
      channel->suspects_named = 0;
    }
    epoch->demand_barrier_sent = epoch->demand_acknowledged = false;
  }
  demand_barrier_due = false;
  if (delta_cache && kind == TaskKind::kRound) delta_cache->next_round();
  if (scatter && kind == TaskKind::kRound)
    scatter->begin(Scatter::Kind::kRound, tracker_sinks(), with_references);
  if (scatter && kind == TaskKind::kPush) scatter->begin(Scatter::Kind::kPush, {}, true);
  work_changed.notify_all();
}

void Sender::Impl::say_goodbye() {
  std::unique_lock lock(mutex);
  const std::shared_ptr<Epoch> current = epoch;
  if (!current || current->cut) return;
  current->leaving = true;
  if (scatter) scatter->wake();
  pacer.cancel();
  work_changed.notify_all();
  const auto deadline = Clock::now() + config.goodbye_timeout;
  work_changed.wait_until(lock, deadline, [&] { return current->still_sending == 0; });
  lock.unlock();
  // Not a timed lock: whoever holds it is either done in microseconds or stuck in a dead socket.
  while (!current->demand_write.try_lock()) {
    if (Clock::now() >= deadline) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const std::lock_guard writing(current->demand_write, std::adopt_lock);
  wire::FrameHeader header = wire::make_header(wire::FrameType::kGoodbye);
  wire::seal(header);
  (void)current->demand->send_all(std::as_bytes(std::span(&header, 1)));
}

Sender::Sender(SenderConfig config) : impl_(std::make_unique<Impl>(std::move(config))) {}

Sender::~Sender() { close(false); }

void Sender::connect() {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->phase == Impl::Phase::kEnded || impl_->closing) return;
  if (impl_->phase != Impl::Phase::kIdle) throw std::logic_error("connect() a second time");
  impl_->phase = Impl::Phase::kConnecting;
  impl_->connect_wanted = true;
  impl_->supervisor_changed.notify_all();
}

void Sender::queue_populated() {
  const std::lock_guard collecting(impl_->collect_mutex);
  {
    const std::lock_guard lock(impl_->mutex);
    if (impl_->phase == Impl::Phase::kEnded) return;  // kFailed has said so, or close() came first
  }
  impl_->require_between_rounds("queue_populated()");
  const TouchGate::Pass pass(impl_->gate);
  if (!pass) throw RegionGone("queue_populated");
  if (!impl_->contents) impl_->contents.emplace();
  for (std::uint32_t i = 0; i < impl_->queue.regions(); ++i) {
    const auto& tracker = impl_->config.trackers[i];
    const AtomicBitmap* populated = tracker ? tracker->populated_when_armed() : nullptr;
    impl_->queue.mark_all(i);
    if (populated != nullptr) {
      impl_->queue.mark_untouched_outside(i, *populated);
    } else {
      impl_->queue.mark_untouched(i, *impl_->contents);
    }
  }
}

std::uint64_t Sender::queue_dirty() {
  const std::lock_guard collecting(impl_->collect_mutex);
  impl_->require_between_rounds("queue_dirty()");
  impl_->collect_dirty();
  return impl_->queue.pending_pages();
}

void Sender::start_round(std::uint64_t tag, bool references) {
  impl_->require_between_rounds("start_round()");
  const std::lock_guard lock(impl_->mutex);
  if (impl_->phase == Impl::Phase::kEnded) return;  // kFailed has said so
  if (impl_->phase != Impl::Phase::kRounds) throw std::logic_error("start_round() before kConnected");
  impl_->rounds_begun = true;
  impl_->start_task_locked(Impl::TaskKind::kRound, tag, nullptr, references);
}

std::uint64_t Sender::discard_dirty(std::uint64_t tag) {
  const std::lock_guard collecting(impl_->collect_mutex);
  impl_->require_between_rounds("discard_dirty()");
  const std::uint64_t newly = impl_->collect_dirty();
  auto frames = impl_->discard_frames(false);
  const std::lock_guard lock(impl_->mutex);
  if (impl_->phase == Impl::Phase::kEnded) return newly;
  if (impl_->phase != Impl::Phase::kRounds) throw std::logic_error("discard_dirty() before kConnected");
  impl_->start_task_locked(Impl::TaskKind::kDiscard, tag, std::move(frames));
  return newly;
}

std::uint64_t Sender::switch_over() {
  const std::lock_guard collecting(impl_->collect_mutex);
  impl_->require_between_rounds("switch_over()");
  const std::uint64_t newly = impl_->collect_dirty();
  if (impl_->scatter) impl_->scatter->forget_pending();
  if (impl_->delta_cache) impl_->delta_cache->close();
  auto frames = impl_->discard_frames(true);
  const std::lock_guard lock(impl_->mutex);
  if (impl_->phase == Impl::Phase::kEnded) return newly;
  if (impl_->phase != Impl::Phase::kRounds) throw std::logic_error("switch_over() before kConnected");
  impl_->phase = Impl::Phase::kSwitching;
  impl_->start_task_locked(Impl::TaskKind::kSwitch, 0, std::move(frames));
  return newly;
}

void Sender::start_push() {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->phase == Impl::Phase::kEnded || impl_->push_wanted) return;
  if (impl_->phase != Impl::Phase::kSwitching && impl_->phase != Impl::Phase::kPostcopy) {
    throw std::logic_error("start_push() before switch_over()");
  }
  impl_->push_wanted = true;
  // Not before the answer to kSwitch: a page pushed on another channel could arrive before the discard that
  // is meant for its former copy. While the connections are cut, recovery starts the push.
  // A scatter needs no connection to begin.
  const bool up = impl_->epoch && impl_->cut_reason.empty();
  if (impl_->switch_acknowledged && (up || impl_->scatter)) {
    impl_->start_task_locked(Impl::TaskKind::kPush, Impl::kPushTag, nullptr);
  }
}

void Sender::hold_eviction(bool held) {
  if (impl_->scatter) impl_->scatter->hold(held);
}

void Sender::give_up_server(std::size_t ordinal, std::string why) {
  if (ordinal >= impl_->config.servers.size()) throw std::invalid_argument("no such server");
  impl_->scatter->give_up(ordinal, std::move(why));
}

void Sender::set_bandwidth(std::uint64_t bytes_per_second) { impl_->pacer.set_bandwidth(bytes_per_second); }

SenderStats Sender::stats() const {
  SenderStats stats;
  stats.bytes_on_wire = impl_->bytes_on_wire;
  stats.pages_sent = impl_->pages_sent;
  stats.pages_zero = impl_->pages_zero;
  stats.pages_resent = impl_->pages_resent;
  stats.pages_pending = impl_->queue.pending_pages();
  stats.faults_served = impl_->faults_served;
  stats.redials = impl_->redials;
  stats.extra_memory_bytes = impl_->peak_memory;
  stats.compression = stats_of(impl_->compression);
  stats.delta = stats_of(impl_->deltas);
  if (impl_->references) {
    stats.dedup = impl_->references->stats();
    stats.extra_memory_bytes += impl_->references->names_bytes();
  }
  if (impl_->comparison) {
    stats.base = impl_->comparison->stats();
    stats.pages_with_content = impl_->queue.content_pages();
    stats.extra_memory_bytes += stats.base.memory_bytes;
  }
  if (impl_->scatter) {
    stats.pages_direct = impl_->scatter->pages_direct();
    stats.pages_single = impl_->scatter->pages_single();
    stats.dedup = impl_->scatter->dedup_stats();
    for (Scatter::ServerStats& each : impl_->scatter->server_stats()) {
      stats.servers.push_back({each.pages, each.bytes, std::move(each.failed)});
    }
  }
  return stats;
}

void Sender::told_growth(std::uint32_t region, std::uint64_t pages) { impl_->queue.set_room(region, pages); }

Hash128 Sender::digest(std::uint32_t region_index) const {
  const auto& region = impl_->config.regions.at(region_index);
  const std::uint64_t pages = region->pages();
  // Scattered pages may have been let go of; their hashes are those of the paused guest's content as it left.
  if (impl_->scatter && impl_->config.release_as_evicted) {
    return xxh3_128(std::as_bytes(
        impl_->scatter->whereabouts().hashes(region_index).first(static_cast<std::size_t>(pages))));
  }
  std::vector<std::uint64_t> hashes(static_cast<std::size_t>(pages));
  RegionReader reader;
  const std::uint64_t piece_pages = std::max<std::uint64_t>(1, kDigestPieceBytes / impl_->page_size);
  for (PageNumber at{0}; at.value < pages;) {
    const TouchGate::Pass pass(impl_->gate);
    if (!pass) throw RegionGone("digest");
    reader.reset();
    const auto piece = reader.read(*region, PageRun{at, std::min(piece_pages, pages - at.value)});
    hash_pages(piece, impl_->page_size, &hashes[static_cast<std::size_t>(at.value)]);
    at.value += piece.size() / impl_->page_size;
  }
  return xxh3_128(std::as_bytes(std::span(hashes)));
}

void Sender::close(bool goodbye) {
  const std::lock_guard closing(impl_->close_mutex);
  if (!impl_->supervisor.started()) return;
  if (goodbye) impl_->say_goodbye();
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->closing = true;
    impl_->phase = Impl::Phase::kEnded;
    if (impl_->epoch) {
      impl_->epoch->cut = true;
      impl_->epoch->shutdown();
    }
    impl_->pacer.cancel();
    if (impl_->scatter) impl_->scatter->shut_down();
    if (impl_->comparison) impl_->comparison->wake();
    ::eventfd_write(impl_->cancel.get(), 1);
    impl_->work_changed.notify_all();
    impl_->supervisor_changed.notify_all();
  }
  impl_->supervisor.stop();
  if (impl_->delta_cache) impl_->delta_cache->end();
  if (impl_->scatter) impl_->scatter->close();
  if (impl_->comparison) impl_->comparison->release();
  impl_->users.clear();  // waits for a region_gone() on its way
  // A closed sender may be kept for its last figures; its trackers' userfaultfds and the pagemap must not be.
  const std::lock_guard collecting(impl_->collect_mutex);
  for (auto& tracker : impl_->config.trackers) tracker.reset();
  impl_->contents.reset();
}

}  // namespace memferry
