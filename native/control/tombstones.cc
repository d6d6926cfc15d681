#include "control/tombstones.h"

#include <stdexcept>

namespace memferry::control {

bool Tombstones::has(const std::string& migration) const {
  const std::lock_guard lock(mutex_);
  return ended_.contains(migration);
}

void Tombstones::record(const std::string& migration, const DestinationState& state) {
  if (!state.final()) throw std::logic_error("a migration that goes on is not over");
  const std::lock_guard lock(mutex_);
  const auto [entry, fresh] = ended_.try_emplace(migration, state);
  if (!fresh) {
    if (entry->second.phase != state.phase)
      throw std::logic_error("a migration cannot end twice in two ways");
    return;
  }
  oldest_.push_back(migration);
  if (oldest_.size() > limit_) {
    ended_.erase(oldest_.front());
    oldest_.pop_front();
  }
}

std::optional<CommitAnswer> Tombstones::answer(const std::string& migration, const CommitQuestion& question) {
  const std::lock_guard lock(mutex_);
  const auto entry = ended_.find(migration);
  if (entry == ended_.end()) return answer_unknown(question);
  // By nobody's epoch but the question's: whoever asks need not be the source, and silences it with no later one.
  DestinationState ended = entry->second;
  ended.epoch = 0;
  const DestinationStep step = step_destination(ended, DestinationEvent::asked(question));
  for (const DestinationAction& action : step.actions) {
    if (action.type == DestinationAction::Type::kSend) return action.answer;
  }
  return {};
}

}  // namespace memferry::control
