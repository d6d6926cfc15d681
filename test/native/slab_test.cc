// The memory of a VMD server: who has which slot, and what memory lies behind those that nobody has.
#include "stage/slab.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>

#include "os/unique_fd.h"

namespace memferry::test {
namespace {

constexpr std::uint64_t kSlotBytes = 4096;

std::uint64_t resident_slots(const Slab& slab) {
  const UniqueFd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  std::uint64_t resident = 0;
  for (Slab::Slot slot = 0; slot < slab.slots(); ++slot) {
    std::uint64_t entry = 0;
    const auto at = static_cast<off_t>(reinterpret_cast<std::uintptr_t>(slab.data(slot)) / kSlotBytes * 8);
    EXPECT_EQ(::pread(pagemap.get(), &entry, sizeof entry, at), static_cast<ssize_t>(sizeof entry));
    resident += entry >> 63U;
  }
  return resident;
}

bool reads_zero(const Slab& slab, Slab::Slot slot) {
  const std::byte* data = slab.data(slot);
  return std::all_of(data, data + kSlotBytes, [](std::byte byte) { return byte == std::byte{0}; });
}

class SlabTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (system_page_size() != kSlotBytes) GTEST_SKIP() << "written for pages of 4 KiB";
    // Huge pages would make neighbours resident.
    ::madvise(const_cast<std::byte*>(slab.start()), slab.slots() * kSlotBytes, MADV_NOHUGEPAGE);
  }
  void write(std::span<const Slab::Slot> slots, int value) {
    for (const Slab::Slot slot : slots) std::memset(slab.data(slot), value, kSlotBytes);
  }
  Slab slab{256 * kSlotBytes, kSlotBytes};
};

TEST_F(SlabTest, GivesEachSlotOnceAndThenNone) {
  std::vector<Slab::Slot> slots;
  EXPECT_EQ(slab.take(200, slots), 200U);
  EXPECT_TRUE(std::is_sorted(slots.begin(), slots.end()));
  EXPECT_EQ(slab.take(100, slots), 56U);
  EXPECT_EQ(slab.take(1, slots), 0U);
  EXPECT_EQ(slab.free_slots(), 0U);
  std::sort(slots.begin(), slots.end());
  std::vector<Slab::Slot> all(256);
  std::iota(all.begin(), all.end(), Slab::Slot{0});
  EXPECT_EQ(slots, all);
  slab.release(std::span(slots).first(10));
  EXPECT_EQ(slab.free_slots(), 10U);
}

TEST_F(SlabTest, AllOrNone) {
  std::vector<Slab::Slot> slots;
  EXPECT_TRUE(slab.take_all(250, slots));
  EXPECT_FALSE(slab.take_all(7, slots));
  EXPECT_FALSE(slab.take_all_zeroed(7, slots));
  EXPECT_FALSE(slab.take_all(1ULL << 40U, slots));
  EXPECT_EQ(slots.size(), 250U);
  EXPECT_EQ(slab.free_slots(), 6U);
  EXPECT_TRUE(slab.take_all(6, slots));
}

TEST_F(SlabTest, APinnedSlotIsNobodyElses) {
  std::vector<Slab::Slot> slots;
  ASSERT_TRUE(slab.take_all(256, slots));
  slab.pin(slots[3]);
  slab.release(slots);
  EXPECT_EQ(slab.free_slots(), 255U);
  std::vector<Slab::Slot> again;
  EXPECT_EQ(slab.take(256, again), 255U);
  EXPECT_EQ(std::count(again.begin(), again.end(), slots[3]), 0);
  slab.release(std::span(slots).subspan(3, 1));
  EXPECT_EQ(slab.free_slots(), 1U);
}

TEST_F(SlabTest, DroppedSlotsHaveNoMemoryBehindThem) {
  std::vector<Slab::Slot> slots;
  ASSERT_TRUE(slab.take_all(256, slots));
  EXPECT_EQ(resident_slots(slab), 0U);
  write(slots, 7);
  EXPECT_EQ(resident_slots(slab), 256U);
  slab.pin(slots[100]);
  slab.drop(slots);
  EXPECT_EQ(resident_slots(slab), 1U) << "the pinned one alone";
  EXPECT_EQ(slab.data(slots[100])[17], std::byte{7});
  slab.release(std::span(slots).subspan(100, 1));
  EXPECT_EQ(resident_slots(slab), 1U);
  slab.give_back_free();
  EXPECT_EQ(resident_slots(slab), 0U);
  EXPECT_EQ(slab.free_slots(), 256U);
}

TEST_F(SlabTest, ZeroedSlotsReadAsZerosWhateverWasInThem) {
  std::vector<Slab::Slot> slots;
  ASSERT_TRUE(slab.take_all(256, slots));
  write(slots, 9);
  slab.drop(std::span(slots).first(20));
  slab.release(std::span(slots).subspan(20));
  std::vector<Slab::Slot> index;
  ASSERT_TRUE(slab.take_all_zeroed(200, index));
  EXPECT_EQ(index.size(), 200U);
  EXPECT_EQ(resident_slots(slab), 56U) << "untouched until somebody does";
  for (const Slab::Slot slot : index) ASSERT_TRUE(reads_zero(slab, slot)) << slot;
}

TEST_F(SlabTest, PreallocatedMemoryStays) {
  slab.preallocate();
  EXPECT_EQ(resident_slots(slab), 256U);
  std::vector<Slab::Slot> slots;
  ASSERT_TRUE(slab.take_all(256, slots));
  write(slots, 9);
  slab.pin(slots[100]);
  slab.drop(slots);
  slab.give_back_free();
  EXPECT_EQ(resident_slots(slab), 256U);
  EXPECT_EQ(slab.free_slots(), 255U);
  EXPECT_EQ(slab.data(slots[100])[17], std::byte{9});
  std::vector<Slab::Slot> index;
  ASSERT_TRUE(slab.take_all_zeroed(255, index));
  for (const Slab::Slot slot : index) ASSERT_TRUE(reads_zero(slab, slot)) << slot;
}

TEST_F(SlabTest, NoMoreColdSlotsThanTheSystemCanSpare) {
  slab.limit_cold(10);
  EXPECT_EQ(slab.free_slots(), 10U);
  std::vector<Slab::Slot> slots;
  EXPECT_EQ(slab.take(100, slots), 10U);
  std::vector<Slab::Slot> more;
  EXPECT_FALSE(slab.take_all(1, more));
  EXPECT_FALSE(slab.take_all_zeroed(1, more));
  EXPECT_EQ(slab.take(1, more), 0U);
  write(slots, 5);
  // Warm ones have memory behind them already.
  slab.release(std::span(slots).first(4));
  EXPECT_EQ(slab.free_slots(), 4U);
  EXPECT_TRUE(slab.take_all_zeroed(2, more));
  EXPECT_TRUE(slab.take_all(2, more));
  for (const Slab::Slot slot : std::span(more).first(2)) EXPECT_TRUE(reads_zero(slab, slot)) << slot;
  // What is given back may be taken again.
  slab.drop(more);
  EXPECT_EQ(slab.free_slots(), 4U);
  slab.limit_cold(0);
  EXPECT_EQ(slab.free_slots(), 0U);
  slab.release(std::span(slots).subspan(4));
  EXPECT_EQ(slab.free_slots(), 6U);
  slab.give_back_free();
  EXPECT_EQ(slab.free_slots(), 6U);
  slab.limit_cold(~std::uint64_t{0});
  EXPECT_EQ(slab.free_slots(), 256U);
  std::vector<Slab::Slot> all;
  EXPECT_TRUE(slab.take_all(256, all));
}

TEST_F(SlabTest, TwoThreadsNeverHaveOneSlot) {
  std::vector<std::thread> threads;
  std::atomic<int> clashes{0};
  for (int number = 1; number <= 4; ++number) {
    threads.emplace_back([this, number, &clashes] {
      std::mt19937 random(static_cast<unsigned>(number));
      for (int turn = 0; turn < 400; ++turn) {
        std::vector<Slab::Slot> mine;
        const std::uint64_t taken = random() % 8 == 0
                                        ? (slab.take_all_zeroed(random() % 40, mine), mine.size())
                                        : slab.take(random() % 90, mine);
        ASSERT_EQ(taken, mine.size());
        for (const Slab::Slot slot : mine) std::memset(slab.data(slot), number, 64);
        if (random() % 4 == 0) std::this_thread::yield();
        for (const Slab::Slot slot : mine) {
          if (slab.data(slot)[63] != static_cast<std::byte>(number)) ++clashes;
        }
        if (random() % 8 == 0) {
          slab.drop(mine);
        } else {
          slab.release(mine);
        }
        if (random() % 64 == 0) slab.give_back_free();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(clashes, 0);
  EXPECT_EQ(slab.free_slots(), 256U);
}

TEST(Slab, SizesThatCannotBe) {
  EXPECT_THROW(Slab(100, kSlotBytes), std::invalid_argument);
  EXPECT_THROW(Slab(0, kSlotBytes), std::invalid_argument);
}

}  // namespace
}  // namespace memferry::test
