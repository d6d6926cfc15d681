// Listens for guests: src/destination/listen.ts in C++. One port; control connections are authenticated here, data
// connections in the native listener.
//
// Threads: one of its own (mf-destination) looks after connections that belong to no arrival yet and after what has
// ended; each connection and each arrival has its own. What is public may be called from any, close() from none of the
// guests' callbacks.
#pragma once

#include <condition_variable>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "control/arrival.h"
#include "control/tombstones.h"

namespace memferry::control {

class Destination {
 public:
  // The arrival is valid until the guest's ended().
  using Accept = std::function<std::unique_ptr<ArrivingGuest>(Arrival&, const Offer&)>;

  // Enough for a burst of honest peers (each needs two round trips).
  static constexpr std::size_t kMaxHandshakes = 64;
  static constexpr std::size_t kMaxConnections = 256;

  // `host`: numeric. Throws SystemError (the port is taken), std::invalid_argument.
  Destination(const std::string& host, std::uint16_t port, DestinationOptions options, Accept accept);
  ~Destination();  // close()
  Destination(const Destination&) = delete;
  Destination& operator=(const Destination&) = delete;

  [[nodiscard]] std::uint16_t port() const { return listener_->port(); }
  // Arrivals that have not resumed fail; missing pages of those that have are lost. Returns when nothing is left.
  void close();

 private:
  struct Connection;
  struct Entry;

  void on_control(UniqueFd fd);
  void run(WorkerThread& self);
  void look_at(const std::shared_ptr<Connection>& connection);
  void on_offer(const std::shared_ptr<Connection>& connection, Offer offer);
  void on_resume(const std::shared_ptr<Connection>& connection, const SourceSays& says);
  void answer_for_the_dead(Connection& connection);
  static void hand_over(Connection& connection, const std::shared_ptr<Arrival>& arrival);
  void admit_locked(const Offer& offer) const;  // throws Failure: why the offer is declined
  void must_fit_locked(std::uint64_t bytes, const char* what) const;  // throws Failure: NO_MEMORY
  void reap();
  void make_room_locked();

  const DestinationOptions options_;
  const Accept accept_;
  Tombstones tombstones_;

  std::mutex closing_mutex_;  // one close() at a time
  mutable std::mutex mutex_;  // guards the three below
  std::list<std::shared_ptr<Connection>> connections_;
  std::map<std::string, std::shared_ptr<Entry>> arrivals_;
  bool closing_ = false;

  std::unique_ptr<Listener> listener_;  // there before the first connection is
  WorkerThread thread_;
};

}  // namespace memferry::control
