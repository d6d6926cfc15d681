// What the maker of an image does with it: a guest that is parked.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "control/schema.h"
#include "control/staged_image_impl.h"

namespace memferry::control {

namespace {

using Clock = std::chrono::steady_clock;

// For what is tried again a moment later: a server that is away holds up nobody for longer.
constexpr std::chrono::milliseconds kShort{1000};

Json regions_json(const std::vector<NewImage::Region>& regions) {
  Json json = Json::array();
  for (const NewImage::Region& region : regions) {
    json.push_back(
        {{"name", region.name}, {"pages", region.pages}, {"capacityPages", region.capacity_pages}});
  }
  return json;
}

}  // namespace

void StagedImage::make(std::vector<std::unique_ptr<StageClient>> clients, const NewImage& image) {
  if (clients.empty() || clients.size() > kMostServers) throw std::invalid_argument("servers: how many?");
  Json list = Json::array();
  members_.clear();
  for (auto& client : clients) {
    Member& member = members_.emplace_back();
    member.server.name = client->name();
    member.server.host = client->host();
    member.server.port = client->port();
    member.client = std::move(client);
    list.push_back(
        {{"name", member.server.name}, {"host", member.server.host}, {"port", member.server.port}});
  }
  Json create = about("create");
  create["sealedDomain"] = nullptr;
  create["name"] = image.name;
  create["kind"] = "park";
  create["servers"] = std::move(list);
  create["replicas"] = image.replicas;
  create["pageSize"] = image.page_size;
  create["regions"] = regions_json(image.regions);
  create["leaseMs"] = image.lease.count();
  at_all(0, [&](Member& member, std::size_t ordinal) {
    try {
      Json own = create;
      own["ordinal"] = ordinal;
      make_one(member, std::move(own));
    } catch (...) {
      member.cause = cause_of_current("PEER_LOST");
    }
  });
  for (const Member& member : members_) {
    if (!member.cause) continue;
    const Cause why = *member.cause;
    (void)dissolve(0);
    throw Failure(why);
  }
  encodings_ = wire::kEncodings;
  for (const Member& member : members_)
    encodings_ = static_cast<std::uint16_t>(encodings_ & member.encodings);
}

// Not repeated: a create that was cut leaves what its lease ends.
void StagedImage::make_one(Member& member, Json create) const {
  StageClient& client = *member.client;
  create["sealedSecret"] = to_hex(control::seal(client.session(), bytes_, secret_, "memferry seal"));
  const Channel::Received created = client.ask(std::move(create), "created");
  member.opened = true;
  Fields answer(created.message, "");
  member.encodings = encoding_flags(answer.any("encodings"));
  const auto session = static_cast<std::uint16_t>(answer.count("session", 1, kLastStageSession));
  member.server.session = session;
  member.server.tokens = stage_tokens(client.session(), bytes_, session);
}

void StagedImage::keep_open() {
  const auto ended = [](const Member& member) {
    return !member.cause && (!member.client || !member.client->alive());
  };
  if (std::ranges::none_of(members_, ended)) return;
  at_all(0, [&](Member& member, std::size_t) {
    if (!ended(member)) return;
    try {
      reopen(member, nullptr, kShort);
    } catch (const Failure& failure) {
      if (failure.code() == "VMD_LOST" || failure.code() == "AUTH_FAILED") member.cause = failure.cause();
    } catch (const std::exception&) {
      // As if it could not be reached.
    }
  });
  if (const auto& home = members_.at(0).cause) throw Failure(*home);
}

void StagedImage::give_up(std::size_t ordinal, const std::string& why) {
  Member& member = members_.at(ordinal);
  member.given_up = true;
  if (!member.cause) member.cause = Cause{"PEER_LOST", "VMD server " + member.server.name + ": " + why};
}

void StagedImage::seal(const std::vector<std::string>& digests) {
  Json seal = about("seal");
  seal["digests"] = digests;
  at_all(0, [&](Member& member, std::size_t) {
    if (member.cause) return;
    try {
      (void)ask(member, seal, "sealed", kPatience);
    } catch (...) {
      member.cause = cause_of_current("PEER_LOST");
    }
  });
  if (const auto& home = members_.at(0).cause) throw Failure(*home);
}

void StagedImage::put_state(const OfferedGuest& guest, const std::shared_ptr<const Bytes>& state) {
  Json request = about("state");
  request["guest"] = guest_json(guest);
  (void)ask(members_.at(0), request, "stored", kPatience, state);
}

StagedImage::Held StagedImage::hold() {
  at_all(1, [this](Member& member, std::size_t) {
    if (member.cause) return;
    try {
      (void)ask(member, about("hold"), "held", kPatience);
    } catch (...) {
      member.cause = cause_of_current("PEER_LOST");
    }
  });
  Held result;
  for (const Member& member : members_) {
    if (member.given_up) ++result.given_up;
    if (!member.cause || member.given_up) continue;
    if (result.not_held++ == 0) result.why = *member.cause;
  }
  return result;
}

void StagedImage::redial_home(std::chrono::milliseconds patience) {
  Member& home = members_.at(0);
  home.client.reset();
  auto client = dial_again(home, patience);
  try {
    (void)client->ask(opening(*client, "control"), "opened", nullptr, patience);
  } catch (const Failure& failure) {
    // It answers for images that are gone, too: what became of the park.
    if (failure.code() != "VMD_LOST") throw;
  }
  home.client = std::move(client);
}

bool StagedImage::tell_home(const Json& message) {
  const auto& client = members_.at(0).client;
  return client && client->tell(message);
}

std::optional<CommitAnswer> StagedImage::hear_home(Clock::time_point until) {
  const auto& client = members_.at(0).client;
  if (!client) return {};
  while (const auto message = client->hear(until)) {
    if (auto answer = commit_answer(*message)) return answer;
  }
  return {};
}

}  // namespace memferry::control
