#include "control/vmd.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>
#include <thread>

#include "control/schema.h"

namespace memferry::control {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kAskAgain{250};
// Until the servers have told where pages are.
constexpr std::chrono::milliseconds kAskReach{20};

// Of an image that home has told of. Home is where it was found, whatever its maker called it.
std::vector<OfferedServer> servers_of(const Json& info, const VmdAddress& home) {
  Fields fields(info, "info");
  if (fields.count("ordinal", 0, StagedImage::kMostServers - 1) != 0)
    throw Failure("VMD_REFUSED", "the ticket names a server that is not the image's home");
  std::vector<OfferedServer> servers;
  for (const Json& entry : fields.array("servers", 1, StagedImage::kMostServers)) {
    Fields server(entry, "info.servers");
    const std::string host = server.text("host", 1, 255);
    const auto port = static_cast<std::uint16_t>(server.count("port", 1, 65535));
    servers.push_back({host + ":" + std::to_string(port), host, port});
  }
  servers.front().host = home.host;
  servers.front().port = home.port;
  return servers;
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
  VmdAddress home;
  std::string image;
  Key secret{};
  try {
    const Json json = parse_json(ticket);
    Fields fields(json, "ticket");
    image = fields.hex("image", id_.size());
    const Bytes id = from_hex(image);
    std::ranges::copy(id, id_.begin());
    const Bytes bytes = from_hex(fields.hex("secret", secret.size()));
    std::ranges::copy(bytes, secret.begin());
    home = parse_address(fields.text("home", 1, 300));
  } catch (const Failure&) {
    throw std::invalid_argument("this is no ticket of a parked guest");
  }
  image_ = std::make_unique<StagedImage>(image, secret, options_);
  // The home server knows the others.
  const Json info = image_->look(home.host, home.port);
  digests_ = digests_of(info);
  image_->open(servers_of(info, home), StagedImage::Required::kHome);
  if (!options_.with_losses)
    image_->open_missing(Fields(info, "info").count("replicas", 1, 2), options_.connect_timeout);

  Bytes claimant(16);
  fill_random(claimant);
  claimant_ = to_hex(claimant);
  Channel::Received claimed =
      image_->ask_home({{"type", "claim"}, {"claimant", claimant_}, {"rollback", nullptr}}, "claimed");
  Fields fields(claimed.message, "");
  epoch_ = static_cast<std::uint32_t>(fields.count("epoch", 0, kMaxEpoch));
  claimed_ = true;
  guest_ = offered_guest(fields.any("guest"));
  if (!claimed.binary) throw Failure("PROTOCOL_ERROR", "a claim without an execution state");
  state_ = std::move(*claimed.binary);
}

Json ParkedImage::claim_json() const { return {{"claimant", claimant_}, {"epoch", epoch_}}; }

ParkedImage::~ParkedImage() {
  if (receiver_) receiver_->close();
  if (!claimed_ || granted_ || !image_->has_home()) return;
  try {
    Json release = claim_json();
    release["type"] = "release-claim";
    (void)image_->ask_home(release, "released");
  } catch (const std::exception&) {
    // It goes back by itself once the connection has ended.
  }
}

void ParkedImage::serve(const std::vector<std::shared_ptr<Region>>& regions, EngineCallback on_event) {
  if (receiver_) throw std::invalid_argument("the image is served already");
  if (regions.size() != guest_.regions.size())
    throw std::invalid_argument("regions: not as many as the guest has");
  for (std::size_t i = 0; i < regions.size(); ++i) {
    if (regions[i]->bytes() != guest_.regions[i].length_bytes)
      throw std::invalid_argument("regions: one is not as long as the guest's");
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
  config.servers = image_->servers();
  config.sourceless = true;
  config.encodings = wire::kCompressions;
  config.on_event = std::move(on_event);
  receiver_ = Receiver::create(std::move(config));
}

Receiver& ParkedImage::receiver() const {
  if (!receiver_) throw std::invalid_argument("the image is not served");
  return *receiver_;
}

// Once it is granted there is no way back, and a page that only a server has that is away would be missed. One that had
// nothing any more, since it was away as the guest was parked, is not.
void ParkedImage::require_within_reach() const {
  const std::vector<bool> away = image_->missing();
  if (options_.with_losses || !receiver_ || std::ranges::count(away, true) == 0) return;
  const Clock::time_point until = Clock::now() + options_.recover_timeout;
  for (;;) {
    const Gather::Reach reach = receiver_->reach(away);
    if (reach.away == 0 && reach.unknown == 0) return;
    if (reach.away > 0 || Clock::now() > until) {
      const Failure why = image_->why_missing();
      throw Failure(why.code(), std::string(why.what()) + "; " + std::to_string(reach.away) +
                                    " pages are there and nowhere else");
    }
    std::this_thread::sleep_for(kAskReach);
  }
}

// Asks until the home server has said yes or no: a claim that was granted once stays granted for its claimant.
void ParkedImage::grant() {
  if (granted_) return;
  require_within_reach();
  const Clock::time_point until = Clock::now() + options_.in_doubt_timeout;
  for (;;) {
    try {
      // A claim of before the connection was cut is still there for a moment.
      if (!image_->has_home()) image_->reopen_home(claim_json());
      Json grant = claim_json();
      grant["type"] = "grant-claim";
      (void)image_->ask_home(grant, "granted");
      break;
    } catch (const Failure& failure) {
      if (failure.code() == "VMD_REFUSED" || failure.code() == "VMD_LOST") throw;
      image_->forget_home();
      if (Clock::now() > until)
        throw Failure(
            "MIGRATION_IN_DOUBT",
            "the home server did not say whether the claim was granted; the guest does not run here");
      std::this_thread::sleep_for(kAskAgain);
    }
  }
  granted_ = true;
  // No time to live at the others either, now that somebody has resumed from them. The guest does not wait for it.
  try {
    telling_ = std::make_unique<WorkerThread>("mf-resumed", [this](WorkerThread&) { image_->commit(1); });
  } catch (const std::exception&) {
    image_->commit(1);
  }
}

void ParkedImage::verify_and_dissolve() {
  for (std::uint32_t i = 0; digests_ && i < digests_->size() && i < guest_.regions.size(); ++i) {
    if (to_hex(receiver().digest(i)) != (*digests_)[i])
      throw Failure("VERIFICATION_FAILED", "the digest of '" + guest_.regions[i].name + "' differs");
  }
  telling_.reset();
  (void)image_->dissolve(epoch_);
}

}  // namespace memferry::control
