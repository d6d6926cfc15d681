#include "control/staged_image.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <thread>
#include <utility>

#include "control/schema.h"
#include "control/staged_image_impl.h"
#include "os/worker_thread.h"

namespace memferry::control {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kMostDigests = 64;
constexpr std::size_t kAtATime = 16;
// Nobody waits for long for pages that nobody needs: a server that is away keeps them for its operator.
constexpr std::chrono::milliseconds kLittlePatience{1000};
constexpr std::chrono::milliseconds kAskAgain{100};

}  // namespace

std::vector<wire::Token> stage_tokens(const Key& session, const wire::MigrationId& image,
                                      std::uint16_t number) {
  Bytes context(image.begin(), image.end());
  context.push_back(static_cast<std::uint8_t>(number));
  context.push_back(static_cast<std::uint8_t>(number >> 8U));
  return token_stream(session, "memferry stage", context, kStageAttempts * wire::kStageRoles);
}

std::optional<std::vector<std::string>> digests_of(const Json& info) {
  Fields fields(info, "info");
  if (fields.any("digests").is_null()) return {};
  std::vector<std::string> digests;
  for (const Json& digest : fields.array("digests", 0, kMostDigests)) {
    if (!digest.is_string() || !is_hex(digest.get_ref<const std::string&>(), 16)) fields.wrong("digests");
    digests.push_back(digest.get<std::string>());
  }
  return digests;
}

StagedImage::StagedImage(std::string id, const Key& secret, VmdOptions options)
    : id_(std::move(id)), secret_(secret), options_(std::move(options)) {
  const Bytes bytes = from_hex(id_);
  if (bytes.size() != bytes_.size()) throw std::invalid_argument("image: not an id");
  std::ranges::copy(bytes, bytes_.begin());
}

StagedImage::~StagedImage() = default;

Json StagedImage::about(const char* type) const { return {{"type", type}, {"image", id_}}; }

Json StagedImage::opening(const StageClient& client, const char* access, Json claim) const {
  Json open = about("open");
  open["proof"] = to_hex(hmac_sha256(secret_, {bytes_of("memferry open"), client.session()}));
  open["access"] = access;
  open["claim"] = std::move(claim);
  return open;
}

Json StagedImage::look(const std::string& host, std::uint16_t port) const {
  StageClient client(host, port, options_);
  const Channel::Received opened = client.ask(opening(client, "control"), "opened");
  return Fields(opened.message, "").any("info");
}

void StagedImage::open(const std::vector<OfferedServer>& servers, Required required) {
  if (servers.empty() || servers.size() > kMostServers) throw std::invalid_argument("servers: how many?");
  members_.clear();
  for (const OfferedServer& server : servers) {
    Member& member = members_.emplace_back();
    member.server.name = server.name;
    member.server.host = server.host;
    member.server.port = server.port;
    member.server.tokens.resize(kStageAttempts * wire::kStageRoles);
  }
  at_all(0, [this](Member& member, std::size_t ordinal) { try_to_open(member, ordinal); });
  const std::size_t needed = required == Required::kAll ? members_.size() : 1;
  for (std::size_t ordinal = 0; ordinal < members_.size(); ++ordinal) {
    const Member& member = members_[ordinal];
    if (member.cause && (ordinal < needed || member.misplaced)) throw Failure(*member.cause);
  }
}

void StagedImage::open_missing(std::size_t copies, std::chrono::milliseconds patience) {
  const Clock::time_point until = Clock::now() + patience;
  const auto may_come = [](const Member& member) {
    return !member.opened && !(member.cause && member.cause->code == "VMD_LOST");
  };
  for (;;) {
    const std::vector<bool> away = missing();
    if (static_cast<std::size_t>(std::ranges::count(away, true)) < copies) return;
    if (!std::ranges::any_of(members_, may_come) || Clock::now() > until) return;
    if (options_.cancelled && options_.cancelled()) return;
    std::this_thread::sleep_for(kAskAgain);
    at_all(0, [&](Member& member, std::size_t ordinal) {
      if (may_come(member)) try_to_open(member, ordinal);
    });
  }
}

std::vector<bool> StagedImage::missing() const {
  std::vector<bool> missing;
  missing.reserve(members_.size());
  for (const Member& member : members_) missing.push_back(!member.opened);
  return missing;
}

Failure StagedImage::why_missing() const {
  for (const Member& member : members_) {
    if (!member.opened && member.cause) return Failure(*member.cause);
  }
  return {"CONNECT_FAILED", "a VMD server is away"};
}

void StagedImage::try_to_open(Member& member, std::size_t ordinal) const {
  try {
    open_one(member, ordinal);
    member.cause.reset();
  } catch (...) {
    member.client.reset();
    member.cause = cause_of_current("CONNECT_FAILED");
  }
}

void StagedImage::open_one(Member& member, std::size_t ordinal) const {
  StageServer& server = member.server;
  member.client = std::make_unique<StageClient>(server.host, server.port, options_);
  server.name = member.client->name();
  Channel::Received opened = member.client->ask(opening(*member.client, "read"), "opened");
  Fields answer(opened.message, "");
  const auto session = static_cast<std::uint16_t>(answer.count("session", 1, kLastStageSession));
  Fields info(answer.any("info"), "info");
  member.misplaced = info.count("ordinal", 0, kMostServers - 1) != ordinal;
  if (member.misplaced)
    throw Failure("PROTOCOL_ERROR",
                  "VMD server " + server.name + " has another place in the list of servers");
  server.session = session;
  server.tokens = stage_tokens(member.client->session(), bytes_, session);
  member.opened = true;
}

std::vector<StageServer> StagedImage::servers() const {
  std::vector<StageServer> servers;
  servers.reserve(members_.size());
  for (const Member& member : members_) servers.push_back(member.server);
  return servers;
}

std::unique_ptr<StageClient> StagedImage::dial_again(
    const Member& member, std::optional<std::chrono::milliseconds> patience) const {
  VmdOptions options = options_;
  if (patience) {
    options.connect_timeout = std::min(options.connect_timeout, *patience);
    options.introduction_timeout = std::min(options.introduction_timeout, *patience);
  }
  return std::make_unique<StageClient>(member.server.host, member.server.port, options);
}

void StagedImage::reopen(Member& member, Json claim,
                         std::optional<std::chrono::milliseconds> patience) const {
  member.client.reset();
  auto client = dial_again(member, patience);
  (void)client->ask(opening(*client, "control", std::move(claim)), "opened", nullptr, patience);
  member.client = std::move(client);
}

Channel::Received StagedImage::ask(Member& member, const Json& request, const char* wanted,
                                   std::chrono::milliseconds patience,
                                   const std::shared_ptr<const Bytes>& binary) const {
  const Clock::time_point until = Clock::now() + patience;
  for (;;) {
    try {
      if (!member.client) reopen(member);
      return member.client->ask(request, wanted, binary);
    } catch (const Failure& failure) {
      // A connection that is still there was answered over, or its server says nothing.
      const bool answered = member.client && member.client->alive();
      if (answered || failure.code() == "VMD_LOST" || failure.code() == "VMD_REFUSED" ||
          failure.code() == "AUTH_FAILED" || failure.code() == "CANCELLED")
        throw;
      member.client.reset();
      if (Clock::now() + kAskAgain > until) throw;
    }
    std::this_thread::sleep_for(kAskAgain);
  }
}

Channel::Received StagedImage::ask_home(const Json& request, const char* wanted) {
  Member& home = members_.at(0);
  if (!home.client) throw Failure("PEER_LOST", "the home server is gone");
  Json full = request;
  full["image"] = id_;
  return home.client->ask(std::move(full), wanted);
}

void StagedImage::reopen_home(const Json& claim) { reopen(members_.at(0), claim); }

void StagedImage::forget_home() { members_.at(0).client.reset(); }

bool StagedImage::has_home() const { return !members_.empty() && members_.front().client != nullptr; }

void StagedImage::at_all(std::size_t first, const std::function<void(Member&, std::size_t)>& act) {
  std::atomic<std::size_t> next{first};
  const auto work = [&] {
    for (std::size_t at = next++; at < members_.size(); at = next++) act(members_[at], at);
  };
  const std::size_t count = members_.size() - std::min(first, members_.size());
  std::vector<std::unique_ptr<WorkerThread>> helpers;
  try {
    for (std::size_t i = 1; i < std::min(count, kAtATime); ++i)
      helpers.push_back(std::make_unique<WorkerThread>("mf-image", [&work](WorkerThread&) { work(); }));
  } catch (const std::exception&) {
    // With fewer it takes longer.
  }
  work();
}

void StagedImage::commit(std::size_t first) {
  at_all(first, [this](Member& member, std::size_t) {
    if (!member.opened) return;
    try {
      (void)ask(member, about("commit"), "committed", kPatience);
    } catch (const std::exception&) {
      member.client.reset();
    }
  });
}

std::optional<std::vector<std::string>> StagedImage::digests() const {
  const Clock::time_point until = Clock::now() + kPatience;
  for (const Member& member : members_) {
    if (!member.opened || Clock::now() > until) continue;
    try {
      // By a connection of its own: an image is open once on each.
      if (auto digests = digests_of(look(member.server.host, member.server.port))) return digests;
    } catch (const std::exception&) {
      // It has lost the image, or is going: the next one may know.
    }
  }
  return {};
}

bool StagedImage::dissolve(std::uint32_t epoch) {
  bool kept = false;
  const auto at = [&](Member& member, std::size_t ordinal) {
    // One that was away may be back.
    if (!member.opened && (!member.cause || member.cause->code == "VMD_LOST")) return;
    try {
      Json dissolve = about("dissolve");
      dissolve["epoch"] = epoch;
      (void)ask(member, dissolve, "dissolved", kLittlePatience);
    } catch (const Failure& failure) {
      if (ordinal == 0 && failure.code() == "VMD_REFUSED") kept = true;
      member.client.reset();
    } catch (const std::exception&) {
      member.client.reset();
    }
  };
  if (members_.empty()) return true;
  // What home does not let go of is no more ours to take away at the others.
  at(members_.front(), 0);
  if (kept) return false;
  at_all(1, at);
  return true;
}

}  // namespace memferry::control
