#include "transfer/chunk_gatherer.h"

#include <algorithm>
#include <utility>

#include "wire/frame.h"

namespace memferry {

ChunkGatherer::ChunkGatherer(SendQueue& queue, Towards towards, const wire::Pacer& pacer,
                             std::uint64_t page_size, std::unique_ptr<PageEncoder> encoder,
                             std::unique_ptr<PageReferrer> referrer)
    : queue_(queue),
      towards_(towards),
      pacer_(pacer),
      page_size_(page_size),
      frames_(page_size, std::move(encoder), std::move(referrer)) {}

bool ChunkGatherer::gather(const std::vector<PageFrames::OnHash>& sinks, std::uint64_t most_bytes) {
  gave_back_ = false;
  const std::uint64_t largest = pacer_.chunk_bytes(wire::max_payload(page_size_));
  const std::uint64_t limit = std::max<std::uint64_t>(1, std::min(largest, most_bytes) / page_size_);
  for (std::uint64_t pages = 0; pages < limit && frames_.room() > 0;) {
    const auto chunk = queue_.take(std::min(limit - pages, frames_.room()), towards_);
    if (!chunk) return false;
    const PageFrames::OnHash& on_hash = sinks[chunk->region];
    if (chunk->untouched) {
      gather_untouched(*chunk, on_hash);
      continue;
    }
    for (PageRun left = chunk->run; left.count > 0;) {
      const PageRun piece = frames_.add(chunk->region, *queue_.region(chunk->region), left, 0, on_hash);
      left = PageRun{piece.end(), left.count - piece.count};
    }
    pages += chunk->run.count;
  }
  return true;
}

// The pages were never touched when they were queued. Those that still are not, or whose tracker will tell of it,
// go as zeros unread; reading them would populate them. The others, and what does not fit into the batch, are
// pending again.
void ChunkGatherer::gather_untouched(const SendQueue::Chunk& chunk, const PageFrames::OnHash& on_hash) {
  const auto add_zeros = [&](PageRun run) {
    if (run.count == 0) return;
    if (frames_.room() > 0) {
      frames_.add_zeros(chunk.region, run, on_hash);
    } else {
      gave_back_ = true;
      queue_.put_back({chunk.region, run, true, chunk.tracked});
    }
  };
  if (chunk.tracked) return add_zeros(chunk.run);
  PageNumber at = chunk.run.first;
  contents_.visit(
      *queue_.region(chunk.region), chunk.run,
      [&](PageRun touched) {
        gave_back_ = true;
        queue_.put_back({chunk.region, touched, false, false});
        add_zeros({at, touched.first.value - at.value});
        at = touched.end();
      },
      true);
  add_zeros({at, chunk.run.end().value - at.value});
}

}  // namespace memferry
