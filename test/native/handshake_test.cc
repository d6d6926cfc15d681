// The control connection's handshake against a peer that never pauses: what there is to read must not keep this side from
// its deadline, or from being told to stop.
#include "control/handshake.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "control/failure.h"
#include "os/unique_fd.h"

namespace memferry::control {
namespace {

using Clock = std::chrono::steady_clock;

class HandshakeTest : public ::testing::Test {
 protected:
  HandshakeTest() {
    int ends[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends), 0);
    ours_.reset(ends[0]);
    theirs_.reset(ends[1]);
    cancel_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  }

  // A hello of versions that nobody speaks, and as much behind it as the connection takes.
  void flood() {
    std::vector<std::uint8_t> bytes(64 * 1024, 9);
    bytes[1] = bytes[3] = 0;
    while (::send(theirs_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) > 0) {
    }
  }

  std::string code_of_acceptor(Clock::time_point deadline) {
    const std::array<std::uint8_t, 16> secret{};
    try {
      (void)handshake_as_acceptor(ours_.get(), secret, deadline, cancel_.get());
    } catch (const Failure& failure) {
      return failure.code();
    }
    return "";
  }

  UniqueFd ours_;
  UniqueFd theirs_;
  UniqueFd cancel_;
};

TEST_F(HandshakeTest, ARefusalIsReadToItsEndAndNoFurther) {
  flood();
  ASSERT_EQ(::shutdown(theirs_.get(), SHUT_WR), 0);
  EXPECT_EQ(code_of_acceptor(Clock::now() + std::chrono::seconds(20)), "VERSION_MISMATCH");
}

TEST_F(HandshakeTest, TheDeadlineHoldsWhateverIsThereToRead) {
  flood();
  EXPECT_EQ(code_of_acceptor(Clock::now()), "PEER_LOST");
}

TEST_F(HandshakeTest, ItStopsWhateverIsThereToRead) {
  flood();
  ASSERT_EQ(::eventfd_write(cancel_.get(), 1), 0);
  EXPECT_EQ(code_of_acceptor(Clock::now() + std::chrono::seconds(20)), "CANCELLED");
}

}  // namespace
}  // namespace memferry::control
