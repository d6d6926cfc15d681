// Who walks forward waits for what is read ahead of it: that does not stand back for such faults, and what is on its way
// is not asked for again at once. Who touches here and there is asked for by itself.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "fault/pager.h"
#include "os/mapping.h"

namespace memferry {
namespace {

const std::uint64_t kPage = system_page_size();

class PagerWalk : public testing::Test {
 protected:
  struct Asked {
    PageRun run;
    bool walk = false;
    bool tried = false;
    bool late = false;
    Pager::Clock::time_point at;
  };

  void SetUp() override {
    const Userfaultfd::Offer offer = Userfaultfd::probe();
    if (!offer.kernel_faults) GTEST_SKIP() << "no userfaultfd for faults of system calls here";
    region_ = Region::allocate(kPages * kPage);
    // As a receiver does: whoever touches what is mapped beside it would populate parts of it, a huge page at once.
    const auto memory = region_->contiguous({PageNumber{0}, kPages});
    ::madvise(memory.data(), memory.size(), MADV_NOHUGEPAGE);
    map_ = std::make_unique<ArrivalMap>(region_, true, false);
    pager_ = std::make_unique<Pager>(std::vector<ArrivalMap*>{map_.get()},
                                     [](const std::string&, const std::string&) {});
    pager_->set_router([this](const Pager::Asked& asked) {
      const std::lock_guard lock(mutex_);
      asked_.push_back({asked.run, asked.walk, asked.tried, asked.late, Pager::Clock::now()});
      changed_.notify_all();
      if (asked.source_online) return asked.tried ? Pager::Route::kSource : Pager::Route::kTried;
      return asked.walk && coming_ ? Pager::Route::kComing : Pager::Route::kSent;
    });
    pager_->serve();
  }
  void TearDown() override {
    if (!pager_) return;
    pager_->poison_missing();
    pager_->stop();
  }
  // A thread that reads the page, and what is asked for then.
  Asked touch(std::uint64_t number) {
    std::size_t before = 0;
    {
      const std::lock_guard lock(mutex_);
      before = asked_.size();
    }
    reader_ = std::jthread([this, number] {
      volatile const std::byte* at = region_->address(PageNumber{number}).pointer();
      read_ = static_cast<int>(*at);
    });
    return asked(before);
  }
  Asked asked(std::size_t number) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(20), [&] { return asked_.size() > number; }));
    return asked_.size() > number ? asked_[number] : Asked{};
  }
  std::size_t times_asked() {
    const std::lock_guard lock(mutex_);
    return asked_.size();
  }
  void bring(PageRun run) {
    const std::vector<std::byte> content(run.count * kPage, std::byte{7});
    ASSERT_TRUE(pager_->install(0, run, content.data()).intact);
    if (reader_.joinable()) reader_.join();
    EXPECT_EQ(read_, 7);
  }
  // Up to where the walk is sure of itself, at the page that is given then.
  std::uint64_t walk() {
    std::uint64_t at = 0;
    for (int fault = 0; fault < 3; ++fault) {
      const Asked request = touch(at);
      EXPECT_EQ(request.run.first.value, at);
      EXPECT_EQ(request.walk, fault == 2);
      bring(request.run);
      at = request.run.end().value;
    }
    return at;
  }

  static constexpr std::uint64_t kPages = 4096;
  std::shared_ptr<Region> region_;
  std::unique_ptr<ArrivalMap> map_;
  std::mutex mutex_;  // guards the next two
  std::vector<Asked> asked_;
  bool coming_ = false;
  std::condition_variable changed_;
  int read_ = 0;
  std::unique_ptr<Pager> pager_;
  std::jthread reader_;
};

TEST_F(PagerWalk, AWalkIsNoReasonToStandBackAndAStrayIs) {
  EXPECT_FALSE(pager_->strayed_lately());
  const Asked first = touch(0);
  EXPECT_TRUE(pager_->strayed_lately() || Pager::Clock::now() - first.at > Pager::kLately);
  bring(first.run);
  // The rest of the walk: from its third fault on it is one, and its first two were no strays.
  const Asked second = touch(1);
  bring(second.run);
  const Asked third = touch(second.run.end().value);
  EXPECT_TRUE(third.walk);
  EXPECT_FALSE(pager_->strayed_lately());
  bring(third.run);
  // What was read ahead of it is skipped, however far.
  bring({third.run.end(), 900});
  const Asked far = touch(third.run.end().value + 900);
  EXPECT_TRUE(far.walk);
  EXPECT_FALSE(pager_->strayed_lately());
  bring(far.run);
  // Not so where something between is missing.
  const Asked stray = touch(far.run.end().value + 500);
  EXPECT_FALSE(stray.walk);
  EXPECT_EQ(stray.run.count, 1U);
  EXPECT_TRUE(pager_->strayed_lately() || Pager::Clock::now() - stray.at > Pager::kLately);
  bring(stray.run);
}

TEST_F(PagerWalk, WhatIsOnItsWayIsAskedForAloneWhenItDoesNotCome) {
  const std::uint64_t next = walk();
  {
    const std::lock_guard lock(mutex_);
    coming_ = true;
  }
  const std::size_t before = times_asked();
  const Asked patient = touch(next);
  EXPECT_TRUE(patient.walk);
  // It does not come.
  const Asked again = asked(before + 1);
  EXPECT_FALSE(again.walk);
  EXPECT_EQ(again.run.first.value, next);
  EXPECT_EQ(again.run.count, 1U);
  EXPECT_GE(again.at - patient.at, Pager::kExpectedWithin);
  bring({PageNumber{next}, 1});
}

TEST_F(PagerWalk, WhatIsOnItsWayAndWillNotComeIsAskedForAtOnce) {
  const std::uint64_t next = walk();
  {
    const std::lock_guard lock(mutex_);
    coming_ = true;
  }
  const std::size_t before = times_asked();
  (void)touch(next);
  pager_->ask_again(true);  // its server has gone
  EXPECT_FALSE(asked(before + 1).walk);
  bring({PageNumber{next}, 1});
}

// The source has it too, and is asked only when who was asked instead takes long.
TEST_F(PagerWalk, WhatIsTriedElsewhereIsAskedOfTheSourceWhenItDoesNotCome) {
  pager_->set_online(true);
  const Asked first = touch(7);
  EXPECT_FALSE(first.tried);
  const Asked again = asked(1);
  EXPECT_TRUE(again.tried && again.late);
  EXPECT_EQ(again.run.first.value, 7U);
  EXPECT_GE(again.at - first.at, Pager::kTriedWithin);
  // Of the source it is asked once: it answers, or its connection ends.
  std::this_thread::sleep_for(3 * Pager::kTriedWithin);
  EXPECT_EQ(times_asked(), 2U);
  bring({PageNumber{7}, 1});
}

TEST_F(PagerWalk, WhatIsTriedElsewhereAndComesIsNotAskedOfTheSource) {
  pager_->set_online(true);
  const Asked first = touch(7);
  bring(first.run);
  const bool in_time = Pager::Clock::now() - first.at < Pager::kTriedWithin;
  std::this_thread::sleep_for(3 * Pager::kTriedWithin);
  EXPECT_LE(times_asked(), in_time ? 1U : 2U);
}

TEST_F(PagerWalk, WhatIsTriedElsewhereAndWillNotComeIsAskedOfTheSourceAtOnce) {
  pager_->set_online(true);
  // Any of them may be held up on a busy machine, not all.
  bool at_once = false;
  for (std::uint64_t page = 0; page < 2000 && !at_once; page += 100) {
    const std::size_t before = times_asked();
    const Asked first = touch(page);
    pager_->ask_again(true);  // its server has gone, or has not got it
    const Asked again = asked(before + 1);
    EXPECT_TRUE(again.tried);
    EXPECT_FALSE(again.late && again.at - first.at < Pager::kTriedWithin) << "nobody was late";
    at_once = again.at - first.at < Pager::kTriedWithin;
    bring({PageNumber{page}, 1});
  }
  EXPECT_TRUE(at_once);
}

}  // namespace
}  // namespace memferry
