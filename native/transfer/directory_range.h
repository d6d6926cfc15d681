// Which of a migration's servers is the directory for a content: the same server for every source of a domain that
// has it in its list, whatever the others are and whatever order they come in (rendezvous hashing by what servers are,
// not by where they stand in a list). A server less moves only the names that were its own.
//
// Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "wire/frame.h"

namespace memferry {

// Splitmix64's last steps: names are hashes, identities are random; this only has to mix the two.
[[nodiscard]] constexpr std::uint64_t directory_weight(std::uint64_t identity,
                                                       const wire::ContentName& name) {
  std::uint64_t word = (identity ^ name[0]) + 0x9e3779b97f4a7c15ULL * (name[1] | 1);
  word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9ULL;
  word = (word ^ word >> 27) * 0x94d049bb133111ebULL;
  return word ^ word >> 31;
}

// Index into `identities`; one of 0 has no part in it. nullopt: there is nobody to ask.
[[nodiscard]] constexpr std::optional<std::size_t> directory_of(const wire::ContentName& name,
                                                                std::span<const std::uint64_t> identities) {
  std::optional<std::size_t> best;
  std::uint64_t best_weight = 0;
  for (std::size_t i = 0; i < identities.size(); ++i) {
    if (identities[i] == 0) continue;
    const std::uint64_t weight = directory_weight(identities[i], name);
    // Equal weights: by identity, which everybody sees alike.
    const bool better =
        !best || weight > best_weight || (weight == best_weight && identities[i] > identities[*best]);
    if (!better) continue;
    best = i;
    best_weight = weight;
  }
  return best;
}

}  // namespace memferry
