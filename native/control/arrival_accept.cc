// An offer becomes an arrival, or is declined.
#include <new>
#include <utility>

#include "control/arrival.h"
#include "control/text.h"

namespace memferry::control {

namespace {

constexpr std::chrono::milliseconds kLossGrace{250};
constexpr std::chrono::milliseconds kServerAnswers{10000};

}  // namespace

// False: the offer was declined, and the source knows why.
bool Arrival::accepted() {
  Json answer;
  try {
    // Before anything is allocated for the guest.
    images_ = open_images();
    guest_ = config_.accept(config_.offer);
    const auto& offered = config_.offer.guest.regions;
    if (!guest_ || guest_->regions().size() != offered.size())
      throw Failure("PREPARE_FAILED", "the destination has another number of regions for the guest");
    for (std::size_t i = 0; i < offered.size(); ++i) {
      const Region& region = *guest_->regions()[i];
      if (region.bytes() < offered[i].length_bytes)
        throw Failure("NO_MEMORY", "region '" + offered[i].name + "' is too short here");
      // What is beyond is nobody's to send, and would be waited for.
      if (region.bytes() > offered[i].length_bytes)
        throw Failure("PREPARE_FAILED", "region '" + offered[i].name + "' is longer here than it is offered");
      if (region.page_size() != offered[i].page_size)
        throw Failure("LIMIT_EXCEEDED", "pages of " + std::to_string(offered[i].page_size) +
                                            " bytes; here they have " + std::to_string(region.page_size()));
    }
    if (link_->ended()) throw Failure("PEER_LOST", "the source is gone");
    make_receiver();
    answer = {{"type", "accepted"},
              {"encodings", encoding_names(config_.offer.encodings)},
              {"basePages", nullptr},
              {"tellsMissing", true},
              {"references", nullptr}};
    config_.listener->add(receiver_);
  } catch (...) {
    Cause cause;
    try {
      cause = told(cause_of_current("PREPARE_FAILED"));
      link_->send(
          {{"type", "declined"}, {"code", cause.code}, {"message", cause.message}, {"names", Json::array()}});
    } catch (...) {
      // No memory to say why: the end of the connection says enough.
    }
    std::exchange(link_, nullptr)->close();
    if (receiver_) receiver_->close();
    if (guest_) {
      guest_->abandon(cause);
      guest_->ended();
    }
    return false;
  }
  tell(answer);
  return true;
}

// The servers that hold what the source does not send here itself; null where it sends all.
std::unique_ptr<ArrivalImages> Arrival::open_images() {
  if (!config_.offer.scatter) return nullptr;
  const DestinationOptions& ours = config_.options;
  VmdOptions options;
  options.secret = ours.secret;
  options.plaintext = ours.plaintext;
  options.connect_timeout = ours.connect_timeout;
  options.recover_timeout = ours.recover_timeout;
  options.peer_timeout = ours.peer_timeout;
  options.answer_timeout = kServerAnswers;
  // Once the guest runs here its image is ended properly, and that is bounded by itself. Not the channel's owner: whoever
  // lets go of this arrival last may be the channel's thread.
  options.cancelled = [this, link = std::weak_ptr(link_)] {
    if (running_here_.load(std::memory_order_acquire)) return false;
    const auto source = link.lock();
    return closing_.load(std::memory_order_acquire) || !source || source->ended();
  };
  return std::make_unique<ArrivalImages>(
      config_.offer, config_.session, std::move(options), [this](ArrivalImages::Digests digests) {
        try {
          post({.kind = Event::Kind::kDigests, .digests = std::move(digests)});
        } catch (const std::bad_alloc&) {
          // Then it ends unverified, when the source has been away for long enough.
        }
      });
}

void Arrival::make_receiver() {
  const Offer& offer = config_.offer;
  ReceiverConfig config;
  config.regions = guest_->regions();
  config.migration = offer.migration;
  config.channels = offer.channels;
  config.tokens = data_tokens(config_.session, offer.migration, offer.channels);
  config.may_page = offer.may_page;
  config.keep_page_hashes = offer.verify;
  config.recover_timeout = config_.options.recover_timeout;
  config.loss_grace = kLossGrace;
  config.bandwidth = config_.options.bandwidth;
  config.encodings = offer.encodings;
  if (images_) config.servers = images_->servers();
  config.gather_limit = config_.options.gather_limit;
  config.on_event = [this](const EngineEvent& event) {
    post({.kind = Event::Kind::kEngine, .engine = event});
  };
  std::shared_ptr<Receiver> receiver = Receiver::create(std::move(config));
  const std::lock_guard lock(mutex_);
  receiver_ = std::move(receiver);
}

}  // namespace memferry::control
