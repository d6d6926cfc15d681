// Images and sessions of a server, and who may connect to them.
#include "stage/stage.h"

#include <sys/random.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "os/mapping.h"
#include "os/steady_ms.h"
#include "os/sys_error.h"
#include "stage/stage_impl.h"
#include "wire/hello.h"
#include "wire/later_tokens.h"

namespace memferry {
namespace {

// Of memory_bytes: stacks of threads, what connections read into, members' desks and the first seat at the codecs.
constexpr std::uint64_t kMostReserve = 8ULL << 20;
// Of a slot: the slab's own tables, and its number in the list of those that an image's index lies in.
constexpr std::uint64_t kSlotTables = Slab::kTableBytes + sizeof(Slab::Slot);
// Compared with where there is nothing to compare with, so that the time does not say which tables there are.
constexpr wire::Token kNoToken{};

std::uint64_t reserve_of(std::uint64_t memory_bytes) { return std::min(kMostReserve, memory_bytes / 4); }

std::uint64_t slab_bytes(std::uint64_t memory_bytes) {
  const std::uint64_t page = system_page_size();
  const std::uint64_t codecs = (CodecSeats::seats_for(memory_bytes) - 1) * CodecSeats::kSeatBytes;
  const std::uint64_t usable = memory_bytes - reserve_of(memory_bytes) - codecs;
  return std::min(usable / (page + kSlotTables), Slab::kMostSlots) * page;
}

PopularityConfig popularity_of(const StageConfig& config, const Slab& slab) {
  return {.most_tables = std::min(slab.slots() / PopularPages::kShareOfSlab, PopularPages::kMostTables),
          .most_contents = config.popular_share == 0 ? 0 : slab.slots() / config.popular_share,
          .period_ms = config.popular_period_ms};
}

std::uint64_t fresh_identity() {
  std::uint64_t identity = 0;
  do {
    if (::getrandom(&identity, sizeof identity, 0) != sizeof identity) throw_errno("getrandom");
  } while (identity == wire::KnownHolders::kNobody || identity == wire::KnownHolders::kOnItsWay);
  return identity;
}

using Connections = std::vector<std::shared_ptr<StageConnection>>;

// All at once, and then each: they end side by side.
void end_all(const Connections& connections) {
  for (const auto& connection : connections) connection->interrupt();
  for (const auto& connection : connections) connection->join();
}

}  // namespace

StageCommon::StageCommon(const StageConfig& config)
    : slab(std::make_shared<Slab>(slab_bytes(config.memory_bytes), system_page_size())),
      hints(std::make_shared<ContentHints>(slab)),
      popular(std::make_shared<PopularPages>(slab, popularity_of(config, *slab))),
      in(config.bandwidth),
      out(config.bandwidth),
      most_member_connections(
          static_cast<std::size_t>(MemberDesks::connections_for(reserve_of(config.memory_bytes)))),
      desks(MemberDesks::desks_for(reserve_of(config.memory_bytes))),
      member_timeout_ms(config.member_timeout_ms),
      chain_timeouts{std::chrono::milliseconds(config.chain_dial_timeout_ms),
                     std::chrono::milliseconds(config.chain_timeout_ms)},
      codecs(CodecSeats::seats_for(config.memory_bytes)) {
  slab->set_relief([table = &popular->table()](std::uint64_t slots) { table->relieve(slots); });
}

struct Stage::Impl {
  struct Role {
    std::vector<wire::Token> tokens;  // by attempt; empty: may not connect
    std::uint32_t next_attempt = 0;   // those before it are used up
    std::weak_ptr<StageConnection> connection;

    // nullopt: it has none.
    [[nodiscard]] std::optional<wire::Token> token(std::uint32_t attempt, std::uint32_t role,
                                                   const std::optional<wire::TreeKey>& later) const {
      if (attempt < tokens.size()) return tokens[attempt];
      if (tokens.empty() || !later || attempt < next_attempt) return std::nullopt;
      return wire::later_token(*later, role, attempt);
    }
  };
  struct Session {
    std::array<Role, wire::kStageRoles> roles;
    std::optional<wire::TreeKey> hash_key;
    std::optional<wire::TreeKey> later;  // of tokens behind the end of a role's
  };
  // An image or a membership: of a member the first two are nullptr.
  struct Held {
    std::shared_ptr<Image> image;
    std::shared_ptr<ChainTargets> chains;
    std::shared_ptr<const Member> member;
    std::map<std::uint16_t, Session> sessions;
    Connections connections;
  };

  explicit Impl(StageConfig config_in)
      : config(config_in), common(std::make_shared<StageCommon>(config_in)), identity(fresh_identity()) {}

  [[nodiscard]] std::shared_ptr<Image> find(const ImageId& id) const {
    const std::lock_guard lock(mutex);
    const auto found = images.find(id);
    return found == images.end() ? nullptr : found->second.image;
  }
  // With the mutex held; nullptr: there is none.
  [[nodiscard]] Held* held(const ImageId& id) {
    auto found = images.find(id);
    if (found != images.end()) return &found->second;
    found = members.find(id);
    return found == members.end() ? nullptr : &found->second;
  }
  void check_new(const ImageId& id) const {
    if (closed) throw std::logic_error("the stage is closed");
    if (images.contains(id) || members.contains(id))
      throw std::invalid_argument("an image with this id is there already");
  }
  wire::HelloStatus attach(const wire::Hello& hello, UniqueFd& fd);
  // Connections whose threads have ended; with the mutex held. Joining them does not wait.
  static void take_ended(Held& of, Connections& into);
  void close();

  const StageConfig config;
  const std::shared_ptr<StageCommon> common;
  const std::uint64_t identity;
  mutable std::mutex mutex;  // guards those below; not held while a thread is waited for
  std::map<ImageId, Held> images;
  std::map<ImageId, Held> members;
  bool closed = false;
};

void Stage::Impl::take_ended(Held& of, Connections& into) {
  const auto ended = std::stable_partition(of.connections.begin(), of.connections.end(),
                                           [](const auto& connection) { return !connection->ended(); });
  into.insert(into.end(), std::make_move_iterator(ended), std::make_move_iterator(of.connections.end()));
  of.connections.erase(ended, of.connections.end());
}

wire::HelloStatus Stage::Impl::attach(const wire::Hello& hello, UniqueFd& fd) {
  if (hello.preface != wire::kStagePreface || hello.version != wire::kVersion) {
    return wire::HelloStatus::kRefused;
  }
  const auto session_number = static_cast<std::uint16_t>(hello.epoch >> 16U);
  const std::uint32_t attempt = hello.epoch & 0xffffU;

  Connections ended;  // destroyed after the lock is let go
  const std::lock_guard lock(mutex);
  if (closed) return wire::HelloStatus::kRefused;
  Held* const found = held(hello.migration);
  if (found == nullptr) return wire::HelloStatus::kLost;
  take_ended(*found, ended);

  const auto session = found->sessions.find(session_number);
  Role* role = session != found->sessions.end() && hello.channel < wire::kStageRoles
                   ? &session->second.roles[hello.channel]
                   : nullptr;
  const std::optional<wire::Token> token =
      role != nullptr ? role->token(attempt, hello.channel, session->second.later) : std::nullopt;
  const bool right = wire::equal_tokens(hello.token, token.value_or(kNoToken));
  if (!token || !right || attempt < role->next_attempt) return wire::HelloStatus::kRefused;

  std::shared_ptr<StageConnection> former = role->connection.lock();
  const std::size_t replaced = former && !former->ended() ? 1 : 0;
  if (found->connections.size() >= kMostConnectionsAnImage + replaced ||
      // Members are many, and nobody waits for them: migrations find a place beside them.
      common->connections >= (found->member ? kMostConnections / 2 : kMostConnections) + replaced ||
      (found->member && common->member_connections >= common->most_member_connections + replaced)) {
    return wire::HelloStatus::kRefused;
  }
  role->next_attempt = attempt + 1;
  if (!wire::accept_connection(fd.get())) return wire::HelloStatus::kRefused;
  if (former) former->interrupt();
  try {
    StageConnection::Place place{common,         found->image,
                                 found->chains,  found->member,
                                 session_number, static_cast<wire::StageRole>(hello.channel),
                                 hello.epoch,    session->second.hash_key};
    auto connection = StageConnection::start(std::move(place), std::move(fd), std::move(former));
    role->connection = connection;
    found->connections.push_back(std::move(connection));
  } catch (const std::exception&) {
    fd.reset();  // no thread for it: it has been answered, so it is cut
  }
  return wire::HelloStatus::kAccepted;
}

void Stage::Impl::close() {
  std::map<ImageId, Held> gone;
  {
    const std::lock_guard lock(mutex);
    closed = true;
    gone.swap(images);
    gone.merge(members);
  }
  Connections connections;
  for (const auto& [id, each] : gone) {
    connections.insert(connections.end(), each.connections.begin(), each.connections.end());
  }
  for (const auto& [id, each] : gone) {
    if (each.image) each.image->give_up();
  }
  end_all(connections);
  for (const auto& [id, each] : gone) {
    if (each.image) each.image->drop();
  }
}

Stage::Stage() = default;

Stage::~Stage() { close(); }

std::shared_ptr<Stage> Stage::create(StageConfig config) {
  if (config.memory_bytes < kLeastMemory) {
    throw std::invalid_argument("a stage of " + std::to_string(config.memory_bytes) +
                                " bytes, the least is " + std::to_string(kLeastMemory));
  }
  auto stage = std::shared_ptr<Stage>(new Stage());
  stage->impl_ = std::make_unique<Impl>(config);
  return stage;
}

void Stage::preallocate() { impl_->common->slab->preallocate(); }

void Stage::limit_fresh(std::uint64_t bytes) {
  Slab& slab = *impl_->common->slab;
  slab.limit_cold(bytes / slab.slot_bytes());
}

bool Stage::create_image(const ImageConfig& config) {
  const std::lock_guard lock(impl_->mutex);
  impl_->check_new(config.id);
  if (impl_->images.size() >= kMostImages) throw std::invalid_argument("too many images");
  auto domain = config.domain ? impl_->common->hints->domain(*config.domain) : nullptr;
  auto image = Image::create(impl_->common->slab, config, std::move(domain));
  if (!image) return false;
  impl_->images.emplace(config.id,
                        Impl::Held{std::move(image), std::make_shared<ChainTargets>(), {}, {}, {}});
  return true;
}

bool Stage::join(const MemberConfig& config) {
  const std::uint64_t now = steady_ms();
  const std::lock_guard lock(impl_->mutex);
  impl_->check_new(config.id);
  if (impl_->members.size() >= kMostMembers) throw std::invalid_argument("too many members");
  auto member = std::make_shared<Member>();
  member->domain = impl_->common->popular->domain(config.domain, now);
  if (!member->domain) return false;
  if (config.guest) member->seat = member->domain->enter(*config.guest, now);
  impl_->members.emplace(config.id, Impl::Held{{}, {}, std::move(member), {}, {}});
  return true;
}

bool Stage::add_session(const ImageId& image, std::uint16_t session, unsigned roles,
                        std::vector<wire::Token> tokens) {
  if (roles == 0 || roles >= (1U << wire::kStageRoles)) throw std::invalid_argument("roles of a session");
  const std::size_t attempts = tokens.size() / wire::kStageRoles;
  if (attempts == 0 || attempts > kMostAttempts || tokens.size() % wire::kStageRoles != 0) {
    throw std::invalid_argument("tokens of a session: " + std::to_string(tokens.size()));
  }
  Impl::Session made;
  // A member's are shown.
  if (roles != 1U << static_cast<unsigned>(wire::StageRole::kPopular)) {
    made.hash_key = wire::stage_hash_key(tokens);
    made.later = wire::later_token_key(tokens);
  }
  for (std::size_t role = 0; role < wire::kStageRoles; ++role) {
    if ((roles >> role & 1U) == 0) continue;
    made.roles[role].tokens.reserve(attempts);
    for (std::size_t attempt = 0; attempt < attempts; ++attempt) {
      made.roles[role].tokens.push_back(tokens[attempt * wire::kStageRoles + role]);
    }
  }
  const std::lock_guard lock(impl_->mutex);
  Impl::Held* const found = impl_->held(image);
  if (found == nullptr) return false;
  // A member's connection is about no image, an image's about no membership.
  const unsigned of_members = 1U << static_cast<unsigned>(wire::StageRole::kPopular);
  if (found->member ? roles != of_members : (roles & of_members) != 0)
    throw std::invalid_argument("roles of a session");
  auto& sessions = found->sessions;
  if (sessions.contains(session)) {
    throw std::invalid_argument("session " + std::to_string(session) + " is there already");
  }
  if (sessions.size() >= kMostSessions) throw std::invalid_argument("too many sessions of one image");
  sessions.emplace(session, std::move(made));
  return true;
}

bool Stage::remove_session(const ImageId& image, std::uint16_t session) {
  Connections gone;
  {
    const std::lock_guard lock(impl_->mutex);
    Impl::Held* const found = impl_->held(image);
    if (found == nullptr) return false;
    found->sessions.erase(session);
    for (const auto& connection : found->connections) {
      if (connection->place().session == session) gone.push_back(connection);
    }
  }
  end_all(gone);
  return true;
}

bool Stage::set_chain(const ImageId& image, std::uint8_t ordinal, const std::string& host, std::uint16_t port,
                      std::vector<wire::Token> tokens) {
  if (ordinal >= wire::Holders::kMostServers) throw std::invalid_argument("a server's ordinal");
  if (tokens.empty() || tokens.size() > kMostAttempts) throw std::invalid_argument("tokens of a chain");
  std::shared_ptr<ChainTargets> chains;
  {
    const std::lock_guard lock(impl_->mutex);
    const auto found = impl_->images.find(image);
    if (found == impl_->images.end()) return false;
    chains = found->second.chains;
  }
  chains->set(ordinal, host, port, std::move(tokens));
  return true;
}

std::shared_ptr<HeldState> Stage::make_state(std::uint64_t bytes) {
  return HeldState::make(impl_->common->slab, bytes);
}

bool Stage::put_state(const ImageId& image, std::shared_ptr<const HeldState> state) {
  const auto found = impl_->find(image);
  return found && found->put_state(std::move(state));
}

std::shared_ptr<const HeldState> Stage::state(const ImageId& image) const {
  const auto found = impl_->find(image);
  return found ? found->state() : nullptr;
}

bool Stage::seal(const ImageId& image) {
  const auto found = impl_->find(image);
  if (found) found->seal();
  return found != nullptr;
}

std::function<void()> Stage::take_out(const ImageId& image) {
  std::map<ImageId, Impl::Held>::node_type gone;
  {
    const std::lock_guard lock(impl_->mutex);
    gone = impl_->images.extract(image);
    if (gone.empty()) gone = impl_->members.extract(image);
  }
  if (gone.empty()) return {};
  if (gone.mapped().image) gone.mapped().image->give_up();
  return [held = std::make_shared<Impl::Held>(std::move(gone.mapped()))] {
    end_all(held->connections);
    if (held->image) held->image->drop();
  };
}

bool Stage::drop(const ImageId& image) {
  const std::function<void()> give_back = take_out(image);
  if (give_back) give_back();
  return give_back != nullptr;
}

std::optional<ImageStats> Stage::image(const ImageId& image) const {
  const auto found = impl_->find(image);
  return found ? std::optional(found->stats()) : std::nullopt;
}

std::optional<bool> Stage::whole(const ImageId& image, std::span<const std::uint64_t> region_pages) const {
  const auto found = impl_->find(image);
  return found ? std::optional(found->whole(region_pages)) : std::nullopt;
}

StageStats Stage::stats() const {
  const Slab& slab = *impl_->common->slab;
  StageStats stats;
  stats.memory_bytes = impl_->config.memory_bytes;
  stats.slab_bytes = slab.slots() * slab.slot_bytes();
  impl_->common->popular->table().tend(steady_ms());
  const PopularityStats popular = impl_->common->popular->stats();
  stats.popular_names = popular.names;
  stats.popular_pages = popular.contents;
  stats.popular_table_bytes = popular.tables * slab.slot_bytes();
  stats.free_bytes = (slab.free_slots() + popular.contents) * slab.slot_bytes();
  stats.connections = impl_->common->connections;
  stats.bytes_in = impl_->common->bytes_in.load(std::memory_order_relaxed);
  stats.bytes_out = impl_->common->bytes_out.load(std::memory_order_relaxed);
  Connections ended;  // whoever asks regularly keeps the stacks of ended threads from lying about
  const std::lock_guard lock(impl_->mutex);
  stats.images = impl_->images.size();
  stats.hint_bytes = impl_->common->hints->bytes();
  stats.members = impl_->members.size();
  for (auto& [id, each] : impl_->images) {
    stats.shared_pages += each.image->stats().pages_shared;
    Impl::take_ended(each, ended);
  }
  for (auto& [id, each] : impl_->members) Impl::take_ended(each, ended);
  return stats;
}

std::uint64_t Stage::identity() const { return impl_->identity; }

wire::HelloStatus Stage::attach(const wire::Hello& hello, UniqueFd& fd) { return impl_->attach(hello, fd); }

void Stage::close() {
  if (impl_) impl_->close();
}

}  // namespace memferry
