// Trackers over memory that is swapped out while it is watched: nothing is lost, and nothing counts that nobody wrote.
#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/swap.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <optional>
#include <random>
#include <string>

#include "every_tracker.h"
#include "os/pagemap.h"
#include "os/unique_fd.h"

namespace memferry {
namespace {

// A compressed swap of our own, gone with this object.
class Swap {
 public:
  Swap() {
    std::ifstream("/sys/class/zram-control/hot_add") >> number_;
    if (number_ < 0) {
      why_ = "no zram device can be added (needs root and the zram module)";
      return;
    }
    device_ = "/dev/zram" + std::to_string(number_);
    std::ofstream("/sys/block/zram" + std::to_string(number_) + "/disksize") << "256M";
    const std::string make = "mkswap " + device_ + " >/dev/null 2>&1";
    if (std::system(make.c_str()) != 0) {  // NOLINT(concurrency-mt-unsafe): one thread here
      why_ = "mkswap failed";
      return;
    }
    if (::swapon(device_.c_str(), 0) != 0) {
      why_ = "swapon is not permitted";
      return;
    }
    on_ = true;
  }
  ~Swap() {
    if (on_) ::swapoff(device_.c_str());
    if (number_ < 0) return;
    std::ofstream("/sys/block/zram" + std::to_string(number_) + "/reset") << 1;
    std::ofstream("/sys/class/zram-control/hot_remove") << number_;
  }
  Swap(const Swap&) = delete;
  Swap& operator=(const Swap&) = delete;
  [[nodiscard]] const std::string& why_not() const { return why_; }

 private:
  int number_ = -1;
  bool on_ = false;
  std::string device_;
  std::string why_;
};

class SwappedMemory : public EveryTracker {
 protected:
  static constexpr std::uint64_t kPages = 4000;
  void SetUp() override {
    EveryTracker::SetUp();
    if (IsSkipped()) return;
    swap_.emplace();
    if (!swap_->why_not().empty()) GTEST_SKIP() << swap_->why_not();
  }
  // Gives how many pages are swapped out now.
  static std::uint64_t push_out(const Region& region) {
    const auto bytes = region.contiguous({PageNumber{0}, region.pages()});
    constexpr int kPageOut = 21;  // MADV_PAGEOUT, 5.4
    ::madvise(bytes.data(), bytes.size(), kPageOut);
    std::uint64_t swapped = 0;
    Pagemap().entries(OwnerAddress{Address::of(bytes.data()).value}, bytes.size(),
                      [&](OwnerAddress, std::span<const std::uint64_t> entries) {
                        for (const std::uint64_t entry : entries)
                          swapped += (entry & abi::kPagemapSwapped) != 0;
                      });
    return swapped;
  }
  std::optional<Swap> swap_;
};

TEST_P(SwappedMemory, IsTrackedAsIfItWereThere) {
  const auto region = small_pages(kPages);
  std::mt19937_64 random(3);
  for (std::uint64_t page = 0; page < kPages; ++page) {
    for (std::size_t at = 0; at < page_; at += 512)
      *reinterpret_cast<std::uint64_t*>(region->address(PageNumber{page}).pointer() + at) = random();
  }
  // A part of it is out before it is watched.
  if (push_out(*region) < kPages / 2) GTEST_SKIP() << "this kernel does not swap on demand (MADV_PAGEOUT)";
  const auto tracker = make(region);
  tracker->arm();
  for (int round = 0; round < 6; ++round) {
    PageSet model;
    for (int i = 0; i < 200; ++i) {
      const std::uint64_t page = random() % kPages;
      write(region, page);
      model.insert(page);
    }
    // Written, then out; or out, then read.
    if (round % 2 == 0) {
      EXPECT_GT(push_out(*region), kPages / 2);
    }
    std::uint64_t sum = 0;
    for (int i = 0; i < 200; ++i)
      sum += std::to_integer<unsigned>(region->address(PageNumber{random() % kPages}).pointer()[7]);
    EXPECT_GT(sum, 0U);
    ASSERT_EQ(collect(*tracker, kPages), model) << "round " << round;
  }
  // Out, and gone: that is a change.
  push_out(*region);
  ASSERT_EQ(::madvise(region->address(PageNumber{70}).pointer(), 3 * page_, MADV_DONTNEED), 0);
  EXPECT_EQ(collect(*tracker, kPages), (PageSet{70, 71, 72}));
}

INSTANTIATE_TEST_SUITE_P(Every, SwappedMemory, testing::ValuesIn(every_tracker()),
                         [](const auto& tracker) { return tracker.param.name(); });

}  // namespace
}  // namespace memferry
