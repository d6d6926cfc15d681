#include "transfer/lane.h"

namespace memferry {

void Lane::sent(std::span<const RegionRun> runs, std::uint64_t bytes, wire::Holders holders, bool references,
                std::uint64_t raw_bytes) {
  open_.bytes += bytes;
  open_.raw_bytes += raw_bytes;
  open_.frames += runs.size();
  if (!runs.empty()) {
    open_.holders = holders;
    open_.references = references;
  }
  for (const RegionRun& each : runs) {
    open_.pages += each.run.count;
    // Not with one that was taken back: what is added to that would never be.
    const bool joins = open_.runs.size() > open_.returned_runs && open_.runs.back().region == each.region &&
                       open_.runs.back().run.end() == each.run.first;
    if (joins) {
      open_.runs.back().run.count += each.run.count;
    } else {
      open_.runs.push_back(each);
    }
  }
}

std::uint64_t Lane::close(Clock::time_point now) {
  open_.tag = next_tag_++;
  open_.sent = now;
  if (batches_.empty()) {
    // It had nothing to acknowledge: that time says nothing.
    last_acknowledged_ = now;
    lately_.assign(1, {now, 0});
  }
  outstanding_ += open_.bytes;
  batches_.push_back(std::move(open_));
  open_ = {};
  return batches_.back().tag;
}

std::optional<Lane::Batch> Lane::acknowledged(std::uint64_t tag, Clock::time_point now) {
  if (batches_.empty() || batches_.front().tag != tag) return std::nullopt;
  Batch batch = std::move(batches_.front());
  batches_.pop_front();
  outstanding_ -= batch.bytes;
  last_acknowledged_ = now;
  lately_.push_back({now, batch.bytes});
  shortest_answer_ = std::min(shortest_answer_, now - batch.sent);
  // The newest of those that are old enough begins the count, however long ago: a lane so slow has few.
  while (lately_.size() > 2 && now - lately_[1].at >= kRateTime) lately_.pop_front();
  const std::chrono::duration<double> over = now - lately_.front().at;
  if (over < kLeastRateTime) return batch;
  std::uint64_t bytes = 0;
  for (std::size_t i = 1; i < lately_.size(); ++i) bytes += lately_[i].bytes;
  const std::chrono::duration<double> held = kWindowTime + shortest_answer_;
  const double wanted = static_cast<double>(bytes) / over.count() * held.count();
  window_ = std::clamp(static_cast<std::uint64_t>(wanted), kLeastWindow, kLargestWindow);
  return batch;
}

bool Lane::refused(std::uint32_t region, PageRun run, bool no_room) {
  const auto has = [&](const Batch& batch) {
    return std::any_of(batch.runs.begin(), batch.runs.end(), [&](const RegionRun& each) {
      return each.region == region && each.run.first <= run.first && run.end() <= each.run.end();
    });
  };
  // Sent twice on this lane it may be either copy: neither counts.
  bool found = false;
  bool too_many = false;
  const auto note = [&](Batch& batch) {
    if (!has(batch)) return;
    // Its run is one of the batch's, so this does not overflow.
    batch.pages_refused += run.count;
    if (batch.torn.size() + batch.no_room.size() >= kMostRefusals ||
        batch.pages_refused > kMostRefusalsAPage * batch.pages) {
      too_many = true;
      return;
    }
    (no_room ? batch.no_room : batch.torn).push_back({region, run});
    found = true;
  };
  for (Batch& batch : batches_) note(batch);
  note(open_);  // its barrier has not been sent yet
  return found && !too_many;
}

bool Lane::worked(std::uint64_t so_far, Clock::time_point now) {
  if (so_far < worked_) return false;
  if (so_far > worked_) grew_at_ = now;
  worked_ = so_far;
  said_at_ = now;
  return true;
}

Lane::Clock::time_point Lane::silent_since(Clock::time_point waited_since, Clock::duration longest_turn,
                                           Clock::duration longest_answer) const {
  const bool stuck = said_at_ - std::max(waited_since, grew_at_) > longest_turn;
  const bool for_ever = said_at_ - waited_since > longest_answer;
  return stuck || for_ever ? waited_since : std::max(waited_since, said_at_);
}

std::vector<RegionRun> Lane::take_back(bool for_good) {
  std::vector<RegionRun> runs;
  const auto take = [&](Batch& batch) {
    runs.insert(runs.end(), batch.runs.begin() + static_cast<std::ptrdiff_t>(batch.returned_runs),
                batch.runs.end());
    batch.returned_runs = batch.runs.size();
  };
  for (Batch& batch : batches_) take(batch);
  take(open_);
  if (for_good) {
    batches_.clear();
    open_ = {};
    outstanding_ = 0;
  }
  return runs;
}

std::optional<Lane::Clock::time_point> Lane::waiting_since() const {
  if (batches_.empty()) return std::nullopt;
  return std::max(batches_.front().sent, last_acknowledged_);
}

std::optional<Lane::Clock::time_point> Lane::oldest_sent() const {
  if (batches_.empty()) return std::nullopt;
  return batches_.front().sent;
}

bool Lane::anything_to_take_back() const {
  const auto some = [](const Batch& batch) { return batch.returned_runs < batch.runs.size(); };
  return some(open_) || std::any_of(batches_.begin(), batches_.end(), some);
}

}  // namespace memferry
