// The next batch for a connection: taken from the queue, laid out as frames. Never-touched pages go as zeros
// without being read.
//
// Threads: one a ChunkGatherer; each sending thread has its own. Between gather() and frames().send() the caller
// stays inside the gate of the regions' memory.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "page/contents.h"
#include "transfer/send_pages.h"
#include "transfer/send_queue.h"
#include "wire/pacer.h"

namespace memferry {

class ChunkGatherer {
 public:
  ChunkGatherer(SendQueue& queue, Towards towards, const wire::Pacer& pacer, std::uint64_t page_size,
                std::unique_ptr<PageEncoder> encoder, std::unique_ptr<PageReferrer> referrer = nullptr);

  [[nodiscard]] PageFrames& frames() { return frames_; }
  // A batch of what is pending, of at most `most_bytes`; several runs when they are short. False when nothing more is
  // pending. `sinks` has one (perhaps empty) a region: it sees every page and its hash.
  bool gather(const std::vector<PageFrames::OnHash>& sinks, std::uint64_t most_bytes);
  // Whether the last gather() has made pages pending again that it took.
  [[nodiscard]] bool gave_back() const { return gave_back_; }

 private:
  void gather_untouched(const SendQueue::Chunk& chunk, const PageFrames::OnHash& on_hash);

  SendQueue& queue_;
  const Towards towards_;
  const wire::Pacer& pacer_;
  const std::uint64_t page_size_;
  PageFrames frames_;
  bool gave_back_ = false;
  Contents contents_;
};

}  // namespace memferry
