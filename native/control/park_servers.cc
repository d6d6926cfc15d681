#include "control/park_servers.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "control/schema.h"
#include "control/staged_image.h"
#include "os/worker_thread.h"

namespace memferry::control {

namespace {

constexpr std::size_t kAtATime = 16;

struct Outcome {
  std::unique_ptr<StageClient> client;
  std::uint64_t free_bytes = 0;
  std::string identity;
  std::optional<Cause> cause;
};

Outcome dial(const VmdAddress& server, const VmdOptions& options) {
  Outcome outcome;
  try {
    outcome.client = std::make_unique<StageClient>(server.host, server.port, options);
    Fields said(outcome.client->announcement(), "announce");
    outcome.free_bytes = said.count("freeBytes");
    outcome.identity = said.hex("identity", 8);
  } catch (...) {
    outcome.client.reset();
    outcome.cause = cause_of_current("CONNECT_FAILED");
  }
  return outcome;
}

std::vector<Outcome> dial_all(const std::vector<VmdAddress>& servers, const VmdOptions& options) {
  std::vector<Outcome> outcomes(servers.size());
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t at = next++; at < servers.size(); at = next++) outcomes[at] = dial(servers[at], options);
  };
  {
    std::vector<std::unique_ptr<WorkerThread>> helpers;
    try {
      for (std::size_t i = 1; i < std::min(servers.size(), kAtATime); ++i)
        helpers.push_back(std::make_unique<WorkerThread>("mf-image", [&work](WorkerThread&) { work(); }));
    } catch (const std::exception&) {
      // With fewer it takes longer.
    }
    work();
  }
  return outcomes;
}

void check_list(const std::vector<VmdAddress>& servers) {
  if (servers.empty() || servers.size() > StagedImage::kMostServers)
    throw std::invalid_argument("servers: 1 to " + std::to_string(StagedImage::kMostServers));
  std::vector<std::pair<std::string, std::uint16_t>> all;
  all.reserve(servers.size());
  for (const VmdAddress& server : servers) all.emplace_back(server.host, server.port);
  std::ranges::sort(all);
  if (std::ranges::adjacent_find(all) != all.end())
    throw std::invalid_argument("servers: one is named twice");
}

}  // namespace

std::vector<std::unique_ptr<StageClient>> dial_servers(const std::vector<VmdAddress>& servers,
                                                       const VmdOptions& options, const PlacementNeed& need) {
  check_list(servers);
  std::vector<std::unique_ptr<StageClient>> clients;
  std::vector<std::uint64_t> free_bytes;
  std::vector<std::string> identities;
  std::string unanswered;
  std::optional<Cause> first;
  for (Outcome& outcome : dial_all(servers, options)) {
    if (outcome.cause) {
      unanswered += "; " + outcome.cause->message;
      if (!first) first = outcome.cause;
      continue;
    }
    clients.push_back(std::move(outcome.client));
    free_bytes.push_back(outcome.free_bytes);
    identities.push_back(std::move(outcome.identity));
  }
  if (clients.empty()) throw Failure(*first);
  // By whatever addresses.
  std::ranges::sort(identities);
  if (std::ranges::adjacent_find(identities) != identities.end())
    throw std::invalid_argument("servers: one is named twice");
  try {
    must_hold(need, free_bytes);
  } catch (const Failure& small) {
    throw Failure(small.code(), small.what() + unanswered);
  }
  return clients;
}

}  // namespace memferry::control
