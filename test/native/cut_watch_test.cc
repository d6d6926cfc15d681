// What the kernel tells of cuts into a file of tmpfs.
#include <gtest/gtest.h>
#include <linux/falloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <optional>
#include <string>
#include <thread>

#include "os/cut_watch.h"
#include "os/mapping.h"
#include "tmpfs_file.h"

namespace memferry {
namespace {

constexpr std::uint64_t kPages = 64;

class CutWatchOfAFile : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    file_ = GetParam() ? file_in_tmpfs() : UniqueFd(::memfd_create("cut", MFD_CLOEXEC));
    ASSERT_TRUE(file_.valid());
    ASSERT_EQ(::ftruncate(file_.get(), static_cast<off_t>(kPages * page_)), 0);
    mapping_ = Mapping::shared(file_.get(), kPages * page_);
    watch_ = CutWatch::of(file_.get());
    if (!GetParam() && !watch_) GTEST_SKIP() << "this kernel does not tell of memfds";
    ASSERT_TRUE(watch_) << "a file with a name is always told of";
  }
  volatile std::byte& at(std::uint64_t page) { return *(mapping_.start().pointer() + page * page_); }
  void cut(std::uint64_t page) {
    ASSERT_EQ(::fallocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                          static_cast<off_t>(page * page_), static_cast<off_t>(page_)),
              0);
  }
  const std::uint64_t page_ = system_page_size();
  UniqueFd file_;
  Mapping mapping_;
  std::optional<CutWatch> watch_;
};

TEST_P(CutWatchOfAFile, TellsOfCutsAndNotOfStores) {
  EXPECT_FALSE(watch_->changed());
  for (std::uint64_t page = 0; page < kPages; ++page) at(page) = std::byte{7};
  EXPECT_FALSE(watch_->changed());
  cut(3);
  EXPECT_TRUE(watch_->changed());
  EXPECT_FALSE(watch_->changed());
  EXPECT_TRUE(at(3) == std::byte{0});
  EXPECT_FALSE(watch_->changed()) << "a page of zeros that was read";
  ASSERT_EQ(::madvise(mapping_.start().pointer() + 5 * page_, page_, MADV_REMOVE), 0);
  EXPECT_TRUE(watch_->changed());
  ASSERT_EQ(::ftruncate(file_.get(), static_cast<off_t>(8 * page_)), 0);
  EXPECT_TRUE(watch_->changed());
  ASSERT_EQ(::pwrite(file_.get(), "", 1, 0), 1);
  EXPECT_TRUE(watch_->changed());
  EXPECT_FALSE(watch_->changed());
}

// The kernel ends the watch of a file that loses its last name by another entry than the one it was opened by: from then
// on nothing is known.
TEST(CutWatchOfNames, AWatchThatIsTakenAwayTellsOfChanges) {
  const std::string name = "/dev/shm/memferry-test-names-" + std::to_string(::getpid());
  const std::string other = name + "-other";
  const UniqueFd file(::open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  ASSERT_TRUE(file.valid());
  ASSERT_EQ(::ftruncate(file.get(), 4096), 0);
  ASSERT_EQ(::link(name.c_str(), other.c_str()), 0);
  auto watch = CutWatch::of(file.get());
  ASSERT_TRUE(watch);
  EXPECT_FALSE(watch->changed());
  ASSERT_EQ(::unlink(name.c_str()), 0);
  ASSERT_EQ(::unlink(other.c_str()), 0);
  (void)watch->changed();
  ASSERT_EQ(::fallocate(file.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), 0);
  EXPECT_TRUE(watch->changed());
}

// More cuts than its queue has room for are still told.
TEST_P(CutWatchOfAFile, TellsWhateverTheNumber) {
  for (int i = 0; i < 40'000; ++i) {
    cut(static_cast<std::uint64_t>(i) % kPages);
  }
  EXPECT_TRUE(watch_->changed());
  while (watch_->changed()) {
  }
}

// A cut that has returned is told at once, from whichever thread it came.
TEST_P(CutWatchOfAFile, TellsAtOnce) {
  std::atomic<std::uint64_t> asked = 0;
  std::atomic<std::uint64_t> done = 0;
  constexpr std::uint64_t kTurns = 2000;
  std::thread cutter([&] {
    for (std::uint64_t turn = 1; turn <= kTurns; ++turn) {
      while (asked.load() < turn) std::this_thread::yield();
      cut(turn % kPages);
      done = turn;
    }
  });
  for (std::uint64_t turn = 1; turn <= kTurns; ++turn) {
    asked = turn;
    while (done.load() < turn) std::this_thread::yield();
    if (!watch_->changed()) ADD_FAILURE() << "turn " << turn;
  }
  cutter.join();
}

INSTANTIATE_TEST_SUITE_P(Files, CutWatchOfAFile, testing::Bool(),
                         [](const auto& of) { return of.param ? "Named" : "Memfd"; });

}  // namespace
}  // namespace memferry
