// The listening socket: who gets through, and who cannot keep others from it.
#include <gtest/gtest.h>

#include <sys/resource.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "fake_source.h"

namespace memferry::test {
namespace {

TEST(Listener, ControlConnectionsKeepTheirBytes) {
  Bench bench(4);
  bench.start();
  Wire wire(dial_loopback(bench.listener->port()));
  EXPECT_TRUE(wire.raw("MFERRYC1hello", 13));
  std::unique_lock lock(bench.controls_mutex);
  ASSERT_TRUE(bench.controls_changed.wait_for(lock, kPatience, [&] { return !bench.controls.empty(); }));
  pollfd waiting{bench.controls[0].get(), POLLIN, 0};
  ASSERT_EQ(::poll(&waiting, 1, 10000), 1);
  char rest[8] = {};
  ASSERT_EQ(::recv(bench.controls[0].get(), rest, sizeof rest, 0), 5);
  EXPECT_EQ(std::memcmp(rest, "hello", 5), 0);
}

TEST(Listener, AThousandSilentPeersKeepNobodyOut) {
  Bench bench(4);
  bench.start();
  std::vector<UniqueFd> silent;
  std::array<std::unique_ptr<Wire>, 3> heard;
  for (int i = 0; i < 900; ++i) {
    UniqueFd fd = dial_loopback(bench.listener->port());
    if (!fd) break;  // this test's own limit of descriptors
    if (i % 3 == 1) {
      EXPECT_GT(::send(fd.get(), "MFE", 3, MSG_NOSIGNAL), 0);
    }
    silent.push_back(std::move(fd));
    if (i % 300 == 299) {
      const auto column = static_cast<unsigned>(i / 300);
      EXPECT_EQ(bench.say(bench.hello(column, 0), &heard[column]), wire::HelloStatus::kAccepted);
    }
  }
  EXPECT_GT(silent.size(), 400U);
  // The oldest have been dropped.
  Wire first(std::move(silent.front()));
  EXPECT_TRUE(first.ended());
}

TEST(Listener, AHelloInPiecesIsHeard) {
  Bench bench(4);
  bench.start();
  Wire wire(dial_loopback(bench.listener->port()));
  const wire::Hello hello = bench.hello(0, 0);
  for (std::size_t i = 0; i < sizeof hello; ++i) {
    EXPECT_TRUE(wire.raw(reinterpret_cast<const char*>(&hello) + i, 1));
  }
  wire::HelloReply reply{};
  EXPECT_TRUE(wire.read(&reply, sizeof reply));
  EXPECT_EQ(reply.status, static_cast<std::uint32_t>(wire::HelloStatus::kAccepted));
}

TEST(Listener, NoiseIsHungUpOn) {
  Bench bench(4);
  bench.start();
  Wire wire(dial_loopback(bench.listener->port()));
  EXPECT_TRUE(wire.raw("GET / HTTP/1.1\r\n\r\n", 18));
  EXPECT_TRUE(wire.ended());
}

TEST(Listener, SilenceEndsAfterTheHelloTimeout) {
  Bench bench(4);
  bench.start();
  const auto started = std::chrono::steady_clock::now();
  Wire wire(dial_loopback(bench.listener->port()));
  EXPECT_TRUE(wire.ended());
  EXPECT_GE(std::chrono::steady_clock::now() - started, Listener::kHelloTimeout - 500ms);
}

// Out of descriptors it neither spins nor forgets who waits.
// Threads name themselves, and then wait: each but this one has begun. (Until then it has its maker's name, which may be
// one of ours.) A sanitizer that looks at a new thread's object needs descriptors. (A sanitizer's own thread has no name:
// then this is only a pause.)
bool all_threads_run() {
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    if (task.path().filename() == std::to_string(::getpid())) continue;
    std::string name;
    std::getline(std::ifstream(task.path() / "comm"), name);
    std::string stat;
    std::getline(std::ifstream(task.path() / "stat"), stat);
    if (!name.starts_with("mf-") || stat.find(") S ") == std::string::npos) return false;
  }
  return true;
}

TEST(Listener, GoesOnAfterRunningOutOfDescriptors) {
  Bench bench(4);
  bench.start();
  for (int i = 0; i < 100 && !all_threads_run(); ++i) ::poll(nullptr, 0, 10);
  UniqueFd early = dial_loopback(bench.listener->port());
  ASSERT_TRUE(early);
  rlimit former{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &former), 0);
  UniqueFd late(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const rlimit none{static_cast<rlim_t>(3), former.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(bench.listener->port());
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(::connect(late.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  timespec used_before{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used_before);
  ::poll(nullptr, 0, 400);  // how much CPU a while takes is what is measured
  timespec used_after{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used_after);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &former), 0);
  const double used = static_cast<double>(used_after.tv_sec - used_before.tv_sec) +
                      static_cast<double>(used_after.tv_nsec - used_before.tv_nsec) / 1e9;
  EXPECT_LT(used, 0.2);
  Wire wire(std::move(late));
  const wire::Hello hello = bench.hello(0, 0);
  wire::HelloReply reply{};
  EXPECT_TRUE(wire.raw(&hello, sizeof hello) && wire.read(&reply, sizeof reply));
  EXPECT_EQ(reply.status, static_cast<std::uint32_t>(wire::HelloStatus::kAccepted));
}

TEST(Listener, ClosingHangsUpAndMayBeRepeated) {
  Bench bench(4);
  bench.start();
  Wire wire(dial_loopback(bench.listener->port()));
  bench.listener->close();
  EXPECT_TRUE(wire.ended());
  bench.listener->close();
  EXPECT_FALSE(dial_loopback(bench.listener->port()));
}

TEST(Listener, RefusesTwoReceiversOfOneMigration) {
  Bench bench(4);
  bench.start();
  EXPECT_THROW(bench.listener->add(bench.receiver), std::invalid_argument);
  Listener::Config wrong;
  wrong.host = "localhost";
  EXPECT_THROW(Listener{wrong}, std::invalid_argument);
}

}  // namespace
}  // namespace memferry::test
