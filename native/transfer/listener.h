// One listening socket for everything: control connections are handed to the owner as bare descriptors,
// data and demand connections go to the receiver that expects them, connections about images to the stage. One
// native thread, so that a redial is accepted while the JavaScript thread is blocked on a missing page.
//
// Bounds: at most kMaxPending connections that have not said who they are, each for at most kHelloTimeout and
// with a fixed buffer of sizeof(Hello) bytes; when the table is full the oldest one is dropped, so a thousand
// silent peers cannot keep the one that speaks from getting through.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "os/unique_fd.h"
#include "wire/frame.h"

namespace memferry {

class Receiver;
class Stage;

class Listener {
 public:
  static constexpr std::size_t kMaxPending = 256;
  static constexpr std::chrono::milliseconds kHelloTimeout{5000};

  struct Config {
    std::string host;        // numeric address
    std::uint16_t port = 0;  // 0: any
    // A control connection, its preface read. The callee owns the descriptor. From the listener's thread.
    std::function<void(UniqueFd fd, std::string peer_address)> on_control;
  };

  explicit Listener(
      Config config);  // throws SystemError (socket, bind, listen), std::invalid_argument (address)
  ~Listener();         // close()
  [[nodiscard]] std::uint16_t port() const;

  // From now on hellos for the receiver's migration go to it; until remove(). Throws std::invalid_argument
  // when the id is taken.
  void add(std::shared_ptr<Receiver> receiver);
  void remove(const wire::MigrationId& migration);
  // From now on hellos about images go to this stage, in place of a former one; nullptr: to nobody.
  void serve_stage(std::shared_ptr<Stage> stage);
  void close();  // may be called twice

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace memferry
