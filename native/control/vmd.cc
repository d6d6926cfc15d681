#include "control/vmd.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>
#include <thread>

#include "control/schema.h"
#include "os/mapping.h"

namespace memferry::control {

namespace {

using Clock = std::chrono::steady_clock;

constexpr unsigned kAttempts = 64;
constexpr std::size_t kMostServers = 250;
constexpr std::chrono::milliseconds kAskAgain{250};

std::vector<wire::Token> stage_tokens(const Key& session, const wire::MigrationId& image,
                                      std::uint16_t number) {
  Bytes context(image.begin(), image.end());
  context.push_back(static_cast<std::uint8_t>(number));
  context.push_back(static_cast<std::uint8_t>(number >> 8U));
  return token_stream(session, "memferry stage", context, std::size_t{kAttempts} * wire::kStageRoles);
}

std::string proof_of(const Key& secret, const Key& session) {
  return to_hex(hmac_sha256(secret, {bytes_of("memferry open"), session}));
}

}  // namespace

VmdAddress parse_address(const std::string& text) {
  const std::size_t colon = text.rfind(':');
  VmdAddress address;
  if (colon != std::string::npos) {
    address.host = text.substr(0, colon);
    if (address.host.size() > 2 && address.host.front() == '[' && address.host.back() == ']')
      address.host = address.host.substr(1, address.host.size() - 2);
    const char* const end = text.data() + text.size();
    const auto number = std::from_chars(text.data() + colon + 1, end, address.port);
    if (number.ec == std::errc() && number.ptr == end && address.port != 0 && !address.host.empty())
      return address;
  }
  throw std::invalid_argument("'" + text + "' is no address and port of a VMD server");
}

ParkedImage::ParkedImage(const std::string& ticket, VmdOptions options) : options_(std::move(options)) {
  VmdAddress home_address;
  try {
    const Json json = parse_json(ticket);
    Fields fields(json, "ticket");
    image_ = fields.hex("image", id_.size());
    const Bytes id = from_hex(image_);
    std::ranges::copy(id, id_.begin());
    const Bytes secret = from_hex(fields.hex("secret", secret_.size()));
    std::ranges::copy(secret, secret_.begin());
    home_address = parse_address(fields.text("home", 1, 300));
  } catch (const Failure&) {
    throw std::invalid_argument("this is no ticket of a parked guest");
  }
  // The home server knows the others.
  Json info;
  {
    StageClient first(home_address.host, home_address.port, options_);
    Json open = about("open");
    open.update({{"proof", proof_of(secret_, first.session())}, {"access", "control"}, {"claim", nullptr}});
    info = first.ask(std::move(open), "opened").message.at("info");
  }
  members_.resize(1);
  members_.front().address = home_address;
  open_all(info);

  Bytes claimant(16);
  fill_random(claimant);
  claimant_ = to_hex(claimant);
  Json claim = about("claim");
  claim.update({{"claimant", claimant_}, {"rollback", nullptr}});
  Channel::Received claimed = home().ask(std::move(claim), "claimed");
  Fields fields(claimed.message, "");
  epoch_ = fields.count("epoch", 0, kMaxEpoch);
  claimed_ = true;
  guest_ = offered_guest(fields.any("guest"));
  if (!claimed.binary) throw Failure("PROTOCOL_ERROR", "a claim without an execution state");
  state_ = std::move(*claimed.binary);
}

void ParkedImage::open_all(const Json& info) {
  Fields fields(info, "info");
  if (fields.count("ordinal", 0, kMostServers - 1) != 0)
    throw Failure("VMD_REFUSED", "the ticket names a server that is not the image's home");
  for (const Json& entry : fields.array("servers", 1, kMostServers)) {
    Fields server(entry, "info.servers");
    const VmdAddress address{server.text("host", 1, 255),
                             static_cast<std::uint16_t>(server.count("port", 1, 65535))};
    // Home is where it was found, whatever its maker called it.
    if (&entry != &fields.array("servers", 1, kMostServers).front())
      members_.push_back({address, nullptr, {}});
  }
  if (const Json& digests = fields.any("digests"); digests.is_array()) {
    for (const Json& digest : digests)
      digests_.push_back(digest.is_string() ? digest.get<std::string>() : "");
  }
  for (Member& member : members_) {
    const bool is_home = &member == &members_.front();
    member.server.host = member.address.host;
    member.server.port = member.address.port;
    member.server.tokens.resize(std::size_t{kAttempts} * wire::kStageRoles);
    try {
      member.client = std::make_unique<StageClient>(member.address.host, member.address.port, options_);
      member.server.name = member.client->name();
      Json open = about("open");
      open.update(
          {{"proof", proof_of(secret_, member.client->session())}, {"access", "read"}, {"claim", nullptr}});
      Channel::Received opened = member.client->ask(std::move(open), "opened");
      Fields answer(opened.message, "");
      member.server.session = static_cast<std::uint16_t>(answer.count("session", 1, 0xfeff));
      member.server.tokens = stage_tokens(member.client->session(), id_, member.server.session);
    } catch (const Failure&) {
      // Pages that only it has are lost; the receiver finds out.
      member.client.reset();
      if (is_home) throw;
    }
  }
}

Json ParkedImage::about(const char* type) const { return {{"type", type}, {"image", image_}}; }

ParkedImage::~ParkedImage() {
  if (receiver_) receiver_->close();
  if (!claimed_ || granted_ || !members_.front().client) return;
  try {
    Json release = about("release-claim");
    release.update({{"claimant", claimant_}, {"epoch", epoch_}});
    (void)home().ask(std::move(release), "released");
  } catch (const std::exception&) {
    // It goes back by itself once the connection has ended.
  }
}

void ParkedImage::serve(const std::vector<std::shared_ptr<Region>>& regions, EngineCallback on_event) {
  if (receiver_) throw std::invalid_argument("the image is served already");
  if (regions.size() != guest_.regions.size())
    throw std::invalid_argument("regions: not as many as the guest has");
  for (std::size_t i = 0; i < regions.size(); ++i) {
    if (regions[i]->bytes() < guest_.regions[i].length_bytes)
      throw std::invalid_argument("regions: one is too short");
  }
  ReceiverConfig config;
  config.regions = regions;
  config.migration = id_;
  config.channels = 1;
  config.tokens.resize(2);
  for (wire::Token& token : config.tokens) fill_random(token);  // nobody dials: there is no source
  config.paging_from_start = true;
  config.may_page = true;
  config.keep_page_hashes = true;
  config.recover_timeout = options_.recover_timeout;
  for (const Member& member : members_) config.servers.push_back(member.server);
  config.sourceless = true;
  config.encodings = wire::kCompressions;
  config.on_event = std::move(on_event);
  receiver_ = Receiver::create(std::move(config));
}

Receiver& ParkedImage::receiver() const {
  if (!receiver_) throw std::invalid_argument("the image is not served");
  return *receiver_;
}

// A claim of before the connection was cut is still there for a moment.
void ParkedImage::reopen_home() {
  Member& member = members_.front();
  member.client.reset();
  member.client = std::make_unique<StageClient>(member.address.host, member.address.port, options_);
  Json open = about("open");
  open.update({{"proof", proof_of(secret_, member.client->session())},
               {"access", "control"},
               {"claim", {{"claimant", claimant_}, {"epoch", epoch_}}}});
  (void)member.client->ask(std::move(open), "opened");
}

// Asks until the home server has said yes or no: a claim that was granted once stays granted for its claimant.
void ParkedImage::grant() {
  if (granted_) return;
  const Clock::time_point until = Clock::now() + options_.in_doubt_timeout;
  for (;;) {
    try {
      if (!members_.front().client) reopen_home();
      Json grant = about("grant-claim");
      grant.update({{"claimant", claimant_}, {"epoch", epoch_}});
      (void)home().ask(std::move(grant), "granted");
      break;
    } catch (const Failure& failure) {
      if (failure.code() == "VMD_REFUSED" || failure.code() == "VMD_LOST") throw;
      members_.front().client.reset();
      if (Clock::now() > until)
        throw Failure(
            "MIGRATION_IN_DOUBT",
            "the home server did not say whether the claim was granted; the guest does not run here");
      std::this_thread::sleep_for(kAskAgain);
    }
  }
  granted_ = true;
  // No time to live at the others either, now that somebody has resumed from them.
  for (std::size_t i = 1; i < members_.size(); ++i) {
    try {
      if (members_[i].client) (void)members_[i].client->ask(about("commit"), "committed");
    } catch (const Failure&) {
      members_[i].client.reset();
    }
  }
}

void ParkedImage::verify_and_dissolve() {
  for (std::uint32_t i = 0; i < digests_.size() && i < guest_.regions.size(); ++i) {
    const Hash128 digest = receiver().digest(i);
    Bytes bytes(16);
    for (unsigned at = 0; at < 8; ++at) {
      bytes[at] = static_cast<std::uint8_t>(digest.high >> (56 - 8 * at));
      bytes[8 + at] = static_cast<std::uint8_t>(digest.low >> (56 - 8 * at));
    }
    if (to_hex(bytes) != digests_[i])
      throw Failure("VERIFICATION_FAILED", "the digest of '" + guest_.regions[i].name + "' differs");
  }
  for (Member& member : members_) {
    // A server that cannot be reached keeps its part until its operator drops it.
    try {
      Json dissolve = about("dissolve");
      dissolve["epoch"] = epoch_;
      if (member.client) (void)member.client->ask(std::move(dissolve), "dissolved");
    } catch (const Failure& failure) {
      // What home does not let go of is no more ours to take away at the others.
      if (&member == &members_.front() && failure.code() == "VMD_REFUSED") return;
      member.client.reset();
    }
  }
}

}  // namespace memferry::control
