// Unix sockets that carry descriptors: what honest peers send, what hostile ones do, and no descriptor left over.
#include "os/fd_channel.h"

#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory>
#include <thread>
#include <vector>

#include "os/kernel_abi.h"
#include "os/process_start.h"
#include "os/sys_error.h"

namespace memferry {
namespace {

using std::chrono::milliseconds;
constexpr milliseconds kSoon{2000};

std::size_t open_descriptors() {
  std::size_t count = 0;
  DIR* folder = ::opendir("/proc/self/fd");
  while (::readdir(folder) != nullptr) ++count;
  ::closedir(folder);
  return count;
}

std::span<const std::byte> bytes_of(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

std::string text_of(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Both ends of one connection; the other end is a bare descriptor, for what an honest peer never does.
class FdChannelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string folder = ::testing::TempDir() + "fd-channel-XXXXXX";
    ASSERT_NE(::mkdtemp(folder.data()), nullptr);
    folder_ = folder;
    int ends[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    other_.reset(ends[1]);
    ours_ = std::make_unique<FdConnection>(UniqueFd(ends[0]));
    cancel_.reset(::eventfd(0, EFD_CLOEXEC));
    before_ = open_descriptors();
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  [[nodiscard]] std::string path() const { return folder_ + "/socket"; }
  // Raw: any control data at all.
  ssize_t send_raw(const std::string& text, const std::vector<int>& descriptors) const {
    std::vector<char> control(CMSG_SPACE(descriptors.size() * sizeof(int)));
    iovec from{const_cast<char*>(text.data()), text.size()};
    msghdr message{};
    message.msg_iov = &from;
    message.msg_iovlen = 1;
    if (!descriptors.empty()) {
      message.msg_control = control.data();
      message.msg_controllen = control.size();
      cmsghdr* part = CMSG_FIRSTHDR(&message);
      part->cmsg_level = SOL_SOCKET;
      part->cmsg_type = SCM_RIGHTS;
      part->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
      std::memcpy(CMSG_DATA(part), descriptors.data(), descriptors.size() * sizeof(int));
    }
    return ::sendmsg(other_.get(), &message, MSG_NOSIGNAL);
  }

  std::string folder_;
  UniqueFd other_;
  UniqueFd cancel_;
  std::unique_ptr<FdConnection> ours_;
  std::size_t before_ = 0;
};

TEST_F(FdChannelTest, DescriptorsArriveOpenAndCloseOnExec) {
  int pipe_ends[2];
  ASSERT_EQ(::pipe(pipe_ends), 0);
  ASSERT_EQ(send_raw("hello", {pipe_ends[0], pipe_ends[1]}), 5);
  ::close(pipe_ends[0]);
  ::close(pipe_ends[1]);
  {
    FdConnection::Received got = ours_->receive(100, 2, kSoon);
    ASSERT_EQ(got.outcome, FdOutcome::kOk);
    EXPECT_EQ(text_of(got.bytes), "hello");
    ASSERT_EQ(got.descriptors.size(), 2U);
    ASSERT_EQ(::write(got.descriptors[1].get(), "x", 1), 1);
    char byte = 0;
    EXPECT_EQ(::read(got.descriptors[0].get(), &byte, 1), 1);
    EXPECT_EQ(::fcntl(got.descriptors[0].get(), F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  }
  EXPECT_EQ(open_descriptors(), before_);
}

TEST_F(FdChannelTest, TooManyDescriptorsAreAllClosed) {
  for (const std::size_t most : {std::size_t{0}, std::size_t{1}, std::size_t{5}}) {
    ASSERT_EQ(send_raw("x", std::vector<int>(most + 1, cancel_.get())), 1);
    const FdConnection::Received got = ours_->receive(100, most, kSoon);
    EXPECT_EQ(got.outcome, FdOutcome::kTooManyDescriptors);
    EXPECT_TRUE(got.descriptors.empty());
    EXPECT_EQ(open_descriptors(), before_);
  }
  ASSERT_EQ(send_raw("x", std::vector<int>(kMostDescriptors, cancel_.get())), 1);
  EXPECT_EQ(ours_->receive(100, 4, kSoon).outcome, FdOutcome::kTooManyDescriptors);
  EXPECT_EQ(open_descriptors(), before_);
}

// Out of descriptors the kernel installs what fits and cuts off the rest.
TEST_F(FdChannelTest, ControlDataThatWasCutOffIsRefused) {
  rlimit former{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &former), 0);
  ASSERT_EQ(send_raw("x", std::vector<int>(8, cancel_.get())), 1);
  UniqueFd next(::dup(cancel_.get()));
  rlimit tight = former;
  tight.rlim_cur = static_cast<rlim_t>(next.get()) + 3;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &tight), 0);
  next.reset();
  const FdOutcome outcome = ours_->receive(100, 8, kSoon).outcome;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &former), 0);
  EXPECT_EQ(outcome, FdOutcome::kTruncated);
  EXPECT_EQ(open_descriptors(), before_);
}

TEST_F(FdChannelTest, AMessageLargerThanTheRoomComesInPieces) {
  ASSERT_EQ(send_raw("abcdef", {cancel_.get()}), 6);
  FdConnection::Received first = ours_->receive(4, 1, kSoon);
  EXPECT_EQ(text_of(first.bytes), "abcd");
  EXPECT_EQ(first.descriptors.size(), 1U);
  FdConnection::Received second = ours_->receive(4, 1, kSoon);
  EXPECT_EQ(text_of(second.bytes), "ef");
  EXPECT_TRUE(second.descriptors.empty());
}

TEST_F(FdChannelTest, AnEarlyCloseIsAnEmptyMessage) {
  other_.reset();
  const FdConnection::Received got = ours_->receive(100, 1, kSoon);
  EXPECT_EQ(got.outcome, FdOutcome::kOk);
  EXPECT_TRUE(got.bytes.empty());
  EXPECT_EQ(ours_->send(bytes_of("x"), {}, kSoon), FdOutcome::kPeerGone);
}

TEST_F(FdChannelTest, ACloseWithUnreadBytesIsAnEndToo) {
  ASSERT_EQ(ours_->send(bytes_of("unread"), {}, kSoon), FdOutcome::kOk);
  other_.reset();
  const FdConnection::Received got = ours_->receive(100, 1, kSoon);
  EXPECT_EQ(got.outcome, FdOutcome::kOk);
  EXPECT_TRUE(got.bytes.empty());
}

TEST_F(FdChannelTest, SilenceHasABoundAndCanBeCutShort) {
  EXPECT_EQ(ours_->receive(100, 1, milliseconds(20)).outcome, FdOutcome::kTimedOut);
  std::thread stopper([&] {
    std::this_thread::sleep_for(milliseconds(30));
    ours_->shut_down();
  });
  EXPECT_EQ(ours_->receive(100, 1, milliseconds(60'000)).outcome, FdOutcome::kCancelled);
  stopper.join();
}

TEST_F(FdChannelTest, SendingToOneWhoDoesNotReadEndsInTime) {
  const std::string much(8U << 20U, 'x');
  const std::array<int, 1> descriptor{cancel_.get()};
  EXPECT_EQ(ours_->send(bytes_of(much), descriptor, milliseconds(50)), FdOutcome::kTimedOut);
  EXPECT_THROW((void)ours_->send({}, descriptor, kSoon), std::invalid_argument);
  EXPECT_THROW((void)ours_->send(bytes_of("x"), std::vector<int>{-1}, kSoon), SystemError);
}

TEST_F(FdChannelTest, AListenerTellsWhoCameAndLetsThePathGo) {
  FdListener listener(path(), 0600);
  struct stat info {};
  ASSERT_EQ(::stat(path().c_str(), &info), 0);
  EXPECT_EQ(
      info.st_mode & 0777U, 0600U & ~[] {
        const mode_t mask = ::umask(0);
        ::umask(mask);
        return mask;
      }());
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const FdConnection connection = FdConnection::connect(path(), kSoon);
    ::pause();
    ::_exit(0);
  }
  {
    FdConnection accepted(listener.accept(cancel_.get()));
    EXPECT_EQ(accepted.peer().pid, child);
    EXPECT_EQ(accepted.peer().uid, ::getuid());
    ASSERT_TRUE(accepted.peer().pidfd.valid());
    pollfd death{accepted.peer().pidfd.get(), POLLIN, 0};
    EXPECT_EQ(::poll(&death, 1, 0), 0);
    ::kill(child, SIGKILL);
    EXPECT_EQ(::poll(&death, 1, 20'000), 1);
    EXPECT_TRUE(accepted.receive(10, 0, kSoon).bytes.empty());
  }
  ::waitpid(child, nullptr, 0);
  listener.close();
  EXPECT_NE(::stat(path().c_str(), &info), 0);
  EXPECT_EQ(open_descriptors(), before_);
}

TEST_F(FdChannelTest, AcceptIsCancelled) {
  FdListener listener(path(), 0600);
  ASSERT_EQ(::eventfd_write(cancel_.get(), 1), 0);
  EXPECT_FALSE(listener.accept(cancel_.get()).valid());
}

TEST_F(FdChannelTest, OnlyADeadListenersFileIsReplaced) {
  {
    FdListener living(path(), 0600);
    EXPECT_THROW(FdListener(path(), 0600), SystemError);
  }
  // One that died: the file stays.
  {
    UniqueFd dead(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, path().c_str());
    ASSERT_EQ(::bind(dead.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    ASSERT_EQ(::listen(dead.get(), 1), 0);
  }
  FdListener after(path(), 0600);
  // Somebody replaced the file: it is not ours to remove.
  std::filesystem::remove(path());
  FdListener other(path(), 0600);
  after.close();
  EXPECT_TRUE(std::filesystem::exists(path()));
  other.close();
  // A file that is no socket is left alone.
  UniqueFd file(::open(path().c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
  EXPECT_THROW(FdListener(path(), 0600), SystemError);
  EXPECT_TRUE(std::filesystem::exists(path()));
  EXPECT_THROW(FdListener(std::string(200, 'x'), 0600), std::invalid_argument);
  EXPECT_THROW(FdListener("", 0600), std::invalid_argument);
  EXPECT_THROW(FdListener(std::string("a\0b", 3), 0600), std::invalid_argument);
}

// Several that find the same dead socket: one of them has the path in the end, and whoever has it can be reached.
TEST_F(FdChannelTest, OfManyAtOnceOneHasThePath) {
  constexpr int kComing = 4;
  const std::string path = folder_ + "/contested";
  for (int turn = 0; turn < 100; ++turn) {
    {
      // What a process that was killed leaves.
      sockaddr_un address{};
      address.sun_family = AF_UNIX;
      std::memcpy(address.sun_path, path.c_str(), path.size());
      const UniqueFd dead(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
      ASSERT_EQ(::bind(dead.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    }
    std::array<std::unique_ptr<FdListener>, kComing> listeners;
    std::atomic<int> waiting{kComing};
    {
      std::vector<std::jthread> threads;
      for (auto& listener : listeners) {
        threads.emplace_back([&] {
          --waiting;
          while (waiting > 0) std::this_thread::yield();
          try {
            listener = std::make_unique<FdListener>(path, 0600);
          } catch (const SystemError& error) {
            EXPECT_EQ(error.error(), EADDRINUSE);
          }
        });
      }
    }
    const auto has = std::count_if(listeners.begin(), listeners.end(),
                                   [](const auto& listener) { return listener != nullptr; });
    ASSERT_EQ(has, 1) << "in turn " << turn;
    EXPECT_NO_THROW((void)FdConnection::connect(path, kSoon));
  }
}

// Whoever may read the directory may lock it: that keeps nobody from a path that is free, or dead.
TEST_F(FdChannelTest, ALockedDirectoryIsNotWaitedForLong) {
  const UniqueFd directory(::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  ASSERT_EQ(::flock(directory.get(), LOCK_EX), 0);
  const std::string path = folder_ + "/locked";
  const auto began = std::chrono::steady_clock::now();
  const FdListener listener(path, 0600);
  EXPECT_NO_THROW((void)FdConnection::connect(path, kSoon));
  EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(30));
}

TEST_F(FdChannelTest, NobodyListens) {
  try {
    (void)FdConnection::connect(path(), kSoon);
    FAIL();
  } catch (const SystemError& error) {
    EXPECT_EQ(error.error(), ENOENT);
  }
  EXPECT_EQ(open_descriptors(), before_);
}

TEST(ProcessStart, TellsOneProcessFromALaterOne) {
  const auto mine = process_start_ticks(::getpid());
  ASSERT_TRUE(mine.has_value());
  EXPECT_LE(*mine, boot_ticks_now());
  EXPECT_GT(*mine, 0U);
  EXPECT_FALSE(process_start_ticks(1 << 30).has_value());
}

}  // namespace
}  // namespace memferry
