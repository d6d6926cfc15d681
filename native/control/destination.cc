#include "control/destination.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "control/text.h"
#include "os/mapping.h"

namespace memferry::control {

namespace {

using Clock = std::chrono::steady_clock;
using Type = SourceSays::Type;

// An authenticated peer that is alive and offers nothing: VMD servers, which may be slow, take its guest's images first.
constexpr std::chrono::milliseconds kFirstMessage{60'000};
// After an arrival's end, for its goodbye.
constexpr std::chrono::milliseconds kFarewell{2500};
// Between two looks at what has ended, should no word of it come.
constexpr int kLookMs = 200;

}  // namespace

struct Destination::Connection {
  // Whom its channel wakes: the listener's thread, until an arrival takes it.
  struct Ear {
    std::mutex mutex;  // guards wake, and is held while it is called: it only wakes a thread
    std::function<void()> wake;
    std::atomic<bool> taken{false};  // by an arrival: only then is an execution state waited for
  };
  std::shared_ptr<Ear> ear = std::make_shared<Ear>();
  std::shared_ptr<Channel> channel;
  Clock::time_point since = Clock::now();
  bool taken = false;    // an arrival's
  bool doomed = false;   // it had to make room; guarded by the destination's mutex
  std::string of_ended;  // a question about this migration, which is over or unknown, may come
};

struct Destination::Entry {
  std::shared_ptr<Arrival> arrival;
  std::uint64_t bytes = 0;
  bool ended = false;  // guarded by mutex_
};

Destination::Destination(const std::string& host, std::uint16_t port, DestinationOptions options,
                         Accept accept)
    : options_(std::move(options)), accept_(std::move(accept)) {
  thread_.start("mf-destination", [this](WorkerThread& self) { run(self); });
  Listener::Config config;
  config.host = host;
  config.port = port;
  config.on_control = [this](UniqueFd fd, const std::string&) { on_control(std::move(fd)); };
  // Whoever connects is heard of only inside of it: with a listener to give to its arrival.
  const std::lock_guard lock(mutex_);
  listener_ = std::make_unique<Listener>(std::move(config));
}

Destination::~Destination() { close(); }

void Destination::close() {
  const std::lock_guard only(closing_mutex_);
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    for (const auto& [id, entry] : arrivals_) entry->arrival->close();
  }
  thread_.stop();
  // Nobody adds to either any more.
  for (const auto& [id, entry] : arrivals_) entry->arrival->join();
  arrivals_.clear();
  // The last words of an arrival may still be on their way.
  for (const auto& connection : connections_) connection->channel->close();
  const Clock::time_point until = Clock::now() + kFarewell;
  for (const auto& connection : connections_) {
    const Channel& channel = *connection->channel;
    while (channel.session() && !channel.over() && Clock::now() < until)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  connections_.clear();
  if (listener_) listener_->close();
}

void Destination::on_control(UniqueFd fd) {
  auto connection = std::make_shared<Connection>();
  connection->ear->wake = [this] { thread_.wake(); };
  Channel::Options options;
  options.role = Role::kAcceptor;
  options.secret = options_.secret;
  options.max_binary_bytes = options_.max_state_bytes;
  options.peer_timeout = options_.peer_timeout;
  options.check = [ear = connection->ear](const Json& message, std::optional<std::uint64_t> binary_bytes) {
    check_source_message(message, binary_bytes);
    if (!ear->taken && source_message(message).type == Type::kState)
      throw Failure("PROTOCOL_ERROR", "an execution state on a connection that belongs to no migration");
  };
  options.changed = [ear = connection->ear] {
    const std::lock_guard lock(ear->mutex);
    if (ear->wake) ear->wake();
  };
  const std::lock_guard lock(mutex_);
  if (closing_) return;
  // With those that are about to go: each still has a thread.
  if (connections_.size() >= kMaxConnections + kMaxHandshakes)
    throw Failure("LIMIT_EXCEEDED", "too many control connections");
  make_room_locked();
  connection->channel = std::make_shared<Channel>(std::move(fd), std::move(options));
  connections_.push_back(std::move(connection));
}

// The oldest that has not proved itself goes, so a thousand silent peers cannot keep out the one that speaks.
void Destination::make_room_locked() {
  std::size_t pending = 0;
  std::size_t staying = 0;
  std::shared_ptr<Connection> oldest;
  for (const auto& connection : connections_) {
    if (connection->doomed || connection->channel->over()) continue;
    ++staying;
    if (connection->channel->session()) continue;
    if (!oldest) oldest = connection;
    ++pending;
  }
  if (oldest && (pending >= kMaxHandshakes || staying >= kMaxConnections)) {
    oldest->doomed = true;
    oldest->channel->destroy();
  } else if (staying >= kMaxConnections) {
    throw Failure("LIMIT_EXCEEDED", "too many control connections");
  }
}

void Destination::run(WorkerThread& self) {
  while (!self.stopping()) {
    (void)self.wait(kLookMs);
    std::vector<std::shared_ptr<Connection>> now;
    {
      const std::lock_guard lock(mutex_);
      now.assign(connections_.begin(), connections_.end());
    }
    for (const auto& connection : now) {
      if (self.stopping()) return;
      if (!connection->taken) look_at(connection);
    }
    reap();
  }
}

void Destination::look_at(const std::shared_ptr<Connection>& connection) {
  Channel& channel = *connection->channel;
  if (!channel.session()) return;
  if (!connection->of_ended.empty()) return answer_for_the_dead(*connection);
  auto received = channel.take();
  if (!received) {
    if (Clock::now() - connection->since > kHandshakeTimeout + kFirstMessage) channel.destroy();
    return;
  }
  try {
    SourceSays says = source_message(received->message);
    if (says.type == Type::kOffer) return on_offer(connection, std::move(says.offer));
    if (says.type == Type::kResumeSession) return on_resume(connection, says);
  } catch (const std::exception&) {
    // A peer that broke the rules, and there is nobody else to tell.
  }
  channel.destroy();
}

void Destination::on_offer(const std::shared_ptr<Connection>& connection, Offer offer) {
  const std::shared_ptr<Channel> channel = connection->channel;
  const std::string id = offer.id;
  auto entry = std::make_shared<Entry>();
  std::shared_ptr<Arrival> arrival;
  try {
    const std::lock_guard lock(mutex_);
    admit_locked(offer);
    for (const OfferedRegion& region : offer.guest.regions) entry->bytes += region.length_bytes;
    Arrival::Config config;
    config.session = *channel->session();
    config.link = channel;
    config.listener = listener_.get();
    config.options = options_;
    config.offer = std::move(offer);
    // The entry stays until it was told that its arrival has ended.
    Entry* const own = entry.get();
    config.accept = [this, own](const Offer& offered) {
      {
        // Until here nobody has told the entry of its arrival.
        const std::lock_guard ready(mutex_);
      }
      return accept_(*own->arrival, offered);
    };
    config.grows = [this, own](std::uint64_t more) {
      const std::lock_guard inner(mutex_);
      must_fit_locked(more, "the guest grows by ");
      own->bytes += more;
    };
    config.decided = [this, id](const DestinationState& state) { tombstones_.record(id, state); };
    config.ended = [this, own] {
      {
        const std::lock_guard inner(mutex_);
        own->ended = true;
      }
      thread_.wake();
    };
    const auto place = arrivals_.emplace(id, entry).first;
    // Before the source can be told that it may go on.
    connection->ear->taken = true;
    try {
      entry->arrival = std::make_shared<Arrival>(std::move(config));
    } catch (...) {
      arrivals_.erase(place);
      throw;
    }
    arrival = entry->arrival;
    connection->taken = true;
  } catch (...) {
    const Cause cause = told(cause_of_current("SYSTEM"));
    channel->send(
        {{"type", "declined"}, {"code", cause.code}, {"message", cause.message}, {"names", Json::array()}});
    channel->close();
    connection->taken = true;
    return;
  }
  hand_over(*connection, arrival);
  arrival->wake();
}

// From now on it is the arrival that the channel wakes.
void Destination::hand_over(Connection& connection, const std::shared_ptr<Arrival>& arrival) {
  const std::lock_guard lock(connection.ear->mutex);
  connection.ear->wake = [weak = std::weak_ptr(arrival)] {
    if (const auto alive = weak.lock()) alive->wake();
  };
}

// Nothing is allocated for a guest before this.
void Destination::admit_locked(const Offer& offer) const {
  if (closing_) throw Failure("CANCELLED", "the listener was closed");
  if (arrivals_.contains(offer.id) || tombstones_.has(offer.id))
    throw Failure("PROTOCOL_ERROR", "a migration with this id is known already");
  if (arrivals_.size() >= options_.max_migrations)
    throw Failure("LIMIT_EXCEEDED",
                  "no more than " + std::to_string(options_.max_migrations) + " migrations at a time");
  std::uint64_t bytes = 0;
  for (const OfferedRegion& region : offer.guest.regions) {
    if (region.length_bytes % region.page_size != 0 || region.length_bytes == 0 ||
        region.capacity_bytes < region.length_bytes)
      throw Failure("PROTOCOL_ERROR", "region '" + region.name + "' has a length that cannot be");
    bytes += region.length_bytes;  // 64 of at most 2^53
  }
  must_fit_locked(bytes, "the guest has ");
}

void Destination::must_fit_locked(std::uint64_t bytes, const char* what) const {
  std::uint64_t free = options_.max_bytes;
  for (const auto& [id, entry] : arrivals_) free -= std::min(free, entry->bytes);
  if (bytes <= free) return;
  throw Failure("NO_MEMORY", what + std::to_string(bytes) + " bytes; " + std::to_string(free) + " of " +
                                 std::to_string(options_.max_bytes) + " are free");
}

// A source whose connection was cut asks again: for a migration that is under way, over, or unknown here.
void Destination::on_resume(const std::shared_ptr<Connection>& connection, const SourceSays& says) {
  const std::shared_ptr<Channel> channel = connection->channel;
  std::shared_ptr<Arrival> arrival;
  {
    const std::lock_guard lock(mutex_);
    const auto found = arrivals_.find(says.migration);
    if (found != arrivals_.end() && !found->second->ended && !found->second->arrival->over())
      arrival = found->second->arrival;
  }
  if (arrival) {
    const Key expected =
        hmac_sha256(arrival->session(), {bytes_of("memferry resume session"), bytes_of(says.migration)});
    if (!equal(expected, says.proof))
      throw Failure("AUTH_FAILED", "the connection does not belong to the migration that it names");
  }
  connection->ear->taken = arrival != nullptr;
  channel->send({{"type", "session-resumed"}, {"known", arrival || tombstones_.has(says.migration)}});
  if (!arrival) {
    connection->of_ended = says.migration;
    return answer_for_the_dead(*connection);
  }
  connection->taken = true;
  hand_over(*connection, arrival);
  arrival->attach(channel);
}

void Destination::answer_for_the_dead(Connection& connection) {
  while (const auto received = connection.channel->take()) {
    const SourceSays says = source_message(received->message);
    if (says.type == Type::kEvicted) connection.channel->send({{"type", "over"}});
    if (says.type != Type::kCommit) continue;
    if (const auto answer = tombstones_.answer(connection.of_ended, says.commit))
      connection.channel->send(to_json(*answer));
  }
}

// Joins the threads of what has ended, with no lock held.
void Destination::reap() {
  std::vector<std::shared_ptr<Entry>> entries;
  std::vector<std::shared_ptr<Connection>> connections;
  {
    const std::lock_guard lock(mutex_);
    for (auto entry = arrivals_.begin(); entry != arrivals_.end();) {
      if (!entry->second->ended) {
        ++entry;
        continue;
      }
      entries.push_back(std::move(entry->second));
      entry = arrivals_.erase(entry);
    }
    for (auto connection = connections_.begin(); connection != connections_.end();) {
      if (!(*connection)->channel->over()) {
        ++connection;
        continue;
      }
      connections.push_back(std::move(*connection));
      connection = connections_.erase(connection);
    }
  }
  for (const auto& entry : entries) entry->arrival->join();
}

}  // namespace memferry::control
