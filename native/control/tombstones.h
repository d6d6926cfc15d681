// What a destination remembers of migrations that are over: a late GRANT or QUERY must get the answer that was given
// before. Bounded: the oldest is forgotten, and a source that asks for that one gets UNKNOWN-MIGRATION, on which it runs
// nothing; so forgetting can cost an answer, never the law.
//
// Threads: any.
#pragma once

#include <cstddef>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "control/commit_destination.h"

namespace memferry::control {

class Tombstones {
 public:
  explicit Tombstones(std::size_t limit = 1024) : limit_(limit) {}

  [[nodiscard]] bool has(const std::string& migration) const;
  // The first outcome stands; std::logic_error for a state that is not final, or another outcome.
  void record(const std::string& migration, const DestinationState& state);
  // To a message for a migration that is over or unknown; nothing when it needs none.
  [[nodiscard]] std::optional<CommitAnswer> answer(const std::string& migration,
                                                   const CommitQuestion& question);

 private:
  const std::size_t limit_;
  mutable std::mutex mutex_;  // guards both
  std::map<std::string, DestinationState> ended_;
  std::deque<std::string> oldest_;
};

}  // namespace memferry::control
