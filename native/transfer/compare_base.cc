// What comes between queue_populated() and the first round where the destination has a base: a probe of the link, the
// comparison, and its end. All of it on channel 0, while the guest runs.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "transfer/sender_impl.h"

namespace memferry {

void Sender::Impl::start_before_rounds(TaskKind kind, std::uint64_t tag, Frames frames, const char* operation,
                                       std::uint64_t most_nodes, CompareDepth depth) {
  require_between_rounds(operation);
  const std::lock_guard lock(mutex);
  if (phase == Phase::kEnded) return;  // kFailed has said so
  // A page that was sent is not compared any more: the destination's copy is newer than its base.
  if (phase != Phase::kRounds || rounds_begun || !comparison) {
    throw std::logic_error(std::string(operation) + " after the first round, or without a base");
  }
  task.most_nodes = most_nodes;
  task.depth = depth;
  start_task_locked(kind, tag, std::move(frames));
}

void Sender::probe(std::uint64_t tag, std::uint64_t bytes) {
  const std::uint64_t most = wire::max_payload(impl_->page_size);
  const std::vector<std::byte> nothing(most);
  auto frames = std::make_shared<std::vector<std::byte>>();
  for (std::uint64_t left = std::min(bytes, kMostProbeBytes); left > 0;) {
    const auto payload = std::span(nothing).first(static_cast<std::size_t>(std::min(left, most)));
    wire::FrameHeader header = wire::make_header(wire::FrameType::kLinkProbe);
    wire::seal(header, payload);
    const auto head = std::as_bytes(std::span(&header, 1));
    frames->insert(frames->end(), head.begin(), head.end());
    frames->insert(frames->end(), payload.begin(), payload.end());
    left -= payload.size();
  }
  impl_->note_memory(impl_->queue.memory_bytes() + frames->capacity());
  impl_->start_before_rounds(Impl::TaskKind::kDiscard, tag, std::move(frames), "probe()");
}

void Sender::compare_base(std::uint64_t tag, std::uint64_t most_nodes, CompareDepth depth) {
  impl_->start_before_rounds(Impl::TaskKind::kCompare, tag, nullptr, "compare_base()", most_nodes, depth);
}

void Sender::end_base(std::uint64_t tag, bool drop) {
  auto frame = std::make_shared<std::vector<std::byte>>(sizeof(wire::FrameHeader));
  wire::FrameHeader header = wire::make_header(wire::FrameType::kBaseEnd, 0, {}, drop ? 1 : 0);
  wire::seal(header);
  std::memcpy(frame->data(), &header, sizeof header);
  impl_->start_before_rounds(Impl::TaskKind::kDiscard, tag, std::move(frame), "end_base()");
  if (impl_->comparison) impl_->comparison->release();
}

bool Sender::Impl::compare_on(Epoch& of, const Task& mine,
                              const std::function<bool(std::span<const std::byte>)>& say) {
  std::vector<const AtomicBitmap*> untouched;
  for (std::uint32_t region = 0; region < queue.regions(); ++region) {
    untouched.push_back(&queue.untouched(region));
  }
  const std::vector<PageFrames::OnHash> sinks = tracker_sinks();
  BaseComparison::Way way;
  way.say = say;
  way.go_on = [&of] { return !of.cut && !of.leaving; };
  way.touching = [this](const std::function<void()>& touch) {
    const TouchGate::Pass pass(gate);
    if (pass) touch();
    return static_cast<bool>(pass);
  };
  way.same = [&](std::uint32_t region, PageRun run, std::span<const std::uint64_t> xxh3) {
    for (std::uint64_t i = 0; sinks[region] && i < run.count; ++i) {
      sinks[region](PageNumber{run.first.value + i}, xxh3[i], false);
    }
    queue.note_same(region, run);
    if (scatter) scatter->note_same(region, run, xxh3);
  };
  way.cut = [this, &of](std::string why) { report_cut(of, std::move(why)); };
  return comparison->run(mine.most_nodes, mine.depth, untouched, way);
}

}  // namespace memferry
