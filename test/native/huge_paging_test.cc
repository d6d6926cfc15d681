// Paging into reserved huge pages: what is touched comes as a whole, nothing is seen half, nothing reads as zeros that
// was not, and what cannot be had fails.
#include <gtest/gtest.h>
#include <linux/capability.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "fake_source.h"
#include "fault/huge_memory.h"
#include "huge_pool.h"
#include "os/userfaultfd.h"
#include "track/dirty_tracker.h"

namespace memferry::test {
namespace {

constexpr std::uint64_t kHuge = Region::kHugePageBytes;
constexpr std::uint64_t kUnit = 512;  // pages

// Over memory that is mapped shared, and privately.
class HugePaging : public testing::TestWithParam<bool> {
 protected:
  static constexpr std::uint64_t kUnits = 4;

  void SetUp() override {
    pool_.emplace(2 * kUnits);
    if (const std::string why = pool_->obstacle(); !why.empty()) GTEST_SKIP() << why;
  }
  void TearDown() override {
    bench_.reset();
    for (const auto& [at, bytes] : mapped_) ::munmap(at, bytes);
    pool_.reset();
  }
  std::shared_ptr<Region> region_of(std::uint64_t bytes) {
    if (GetParam()) return Region::allocate_huge(bytes);
    void* const at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kPrivately, -1, 0);
    if (at == MAP_FAILED) throw_errno("mmap");
    mapped_.emplace_back(at, bytes);
    return Region::adopt({{OwnerAddress{Address::of(at).value}, bytes}}, bytes);
  }
  static std::uint64_t page_size() { return Bench::page_size_of(); }

  Bench& bench(std::uint64_t units = kUnits) {
    bench_ = std::make_unique<Bench>(1);
    bench_->regions = {region_of(units * kHuge)};
    bench_->config.regions = bench_->regions;
    bench_->config.may_page = true;
    return *bench_;
  }
  // Answers requests from `content` until the demand connection ends, and keeps what was asked for.
  std::thread serve(const std::vector<std::byte>& content) {
    return std::thread([this, &content] {
      const std::uint64_t size = page_size();
      for (;;) {
        wire::FrameHeader header{};
        if (!bench_->demand().read(&header, sizeof header)) return;
        if (header.type != static_cast<std::uint16_t>(wire::FrameType::kFaultRequest)) continue;
        {
          const std::lock_guard lock(asked_mutex_);
          asked_.push_back({PageNumber{header.first_page}, header.page_count});
        }
        const auto bytes = std::span(content).subspan(header.first_page * size, header.page_count * size);
        if (!bench_->demand().pages(0, header.first_page, bytes, size)) return;
      }
    });
  }
  void end_serving(std::thread& server) {
    ::shutdown(bench_->demand().fd(), SHUT_RDWR);
    server.join();
  }
  bool equal(const std::vector<std::byte>& content) const {
    return std::memcmp(bench_->memory().data(), content.data(), content.size()) == 0;
  }

  std::unique_ptr<Bench> bench_;
  std::mutex asked_mutex_;
  std::vector<PageRun> asked_;
  std::optional<HugePool> pool_;
  static constexpr int kPrivately = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (21 << MAP_HUGE_SHIFT);
  std::vector<std::pair<void*, std::size_t>> mapped_;
};
INSTANTIATE_TEST_SUITE_P(Memory, HugePaging, testing::Bool(),
                         [](const auto& of) { return of.param ? "Shared" : "Private"; });

class HugePagingOfOne : public HugePaging {};
INSTANTIATE_TEST_SUITE_P(Memory, HugePagingOfOne, testing::Values(true),
                         [](const auto&) { return "Shared"; });

TEST_P(HugePaging, PostCopyServesFaultsOfManyThreads) {
  Bench& b = bench();
  b.config.paging_from_start = true;
  std::memset(b.page(0), 0x11, kUnits * kHuge);  // none of the guest's
  b.start();
  b.connect();
  EXPECT_TRUE(b.data(0).switch_over());
  const auto content = random_bytes(kUnits * kHuge, 1);
  std::thread server = serve(content);
  std::vector<std::thread> readers;
  for (unsigned seed = 0; seed < 4; ++seed) {
    readers.emplace_back([&, seed] {
      std::mt19937_64 random(seed);
      for (int i = 0; i < 200; ++i) {
        const std::uint64_t page = random() % (kUnits * kUnit);
        ASSERT_EQ(std::memcmp(b.page(page), content.data() + page * page_size(), page_size()), 0) << page;
      }
    });
  }
  // The same pages beside them, in another order.
  for (std::uint64_t page = kUnits * kUnit; page > 0; page -= 64) {
    const auto part = std::span(content).subspan((page - 64) * page_size(), 64 * page_size());
    EXPECT_TRUE(b.data(1).pages(0, page - 64, part, page_size()));
  }
  for (std::thread& reader : readers) reader.join();
  b.log.wait(EngineEventKind::kComplete);
  EXPECT_TRUE(equal(content));
  EXPECT_EQ(b.receiver->stats().pages_missing, 0U);
  // Ordinary memory: it can be written, and tracked to leave again.
  const auto tracker = make_tracker(TrackerKind::kHashDiff, b.regions[0]);
  tracker->arm();
  *b.page(700) = std::byte{1};
  AtomicBitmap dirty(kUnits * kUnit);
  tracker->collect(dirty);
  EXPECT_TRUE(dirty.test(PageNumber{700}));
  end_serving(server);
}

TEST_P(HugePaging, NothingIsSeenBeforeAllOfAHugePageIsThere) {
  Bench& b = bench();
  b.config.paging_from_start = true;
  b.start();
  b.connect();
  EXPECT_TRUE(b.data(0).switch_over());
  const auto content = random_bytes(kUnits * kHuge, 2);
  const std::span all(content);
  // All of the first but one page in the middle; of the second only that page.
  EXPECT_TRUE(b.data(0).pages(0, 0, all.first(300 * page_size()), page_size()));
  EXPECT_TRUE(b.data(0).pages(0, 301, all.subspan(301 * page_size(), 211 * page_size()), page_size()));
  EXPECT_TRUE(b.data(0).barrier(1).answered);
  std::atomic<bool> seen{false};
  std::thread reader([&] {
    const auto value = *const_cast<const volatile std::byte*>(b.page(7));
    seen = true;
    EXPECT_EQ(value, content[7 * page_size()]);
    EXPECT_EQ(std::memcmp(b.page(0), content.data(), kHuge), 0);
  });
  // It asks for what is missing, and for nothing else.
  const auto request = b.demand().request();
  ASSERT_TRUE(request);
  EXPECT_EQ(request->first_page, 300U);
  EXPECT_EQ(request->page_count, 1U);
  std::this_thread::sleep_for(30ms);
  EXPECT_FALSE(seen);
  EXPECT_TRUE(b.demand().pages(0, 300, all.subspan(300 * page_size(), page_size()), page_size()));
  reader.join();
  EXPECT_EQ(b.receiver->missing(8).size(), 1U);
}

TEST_P(HugePaging, IsAskedForInPiecesAndAgain) {
  Bench& b = bench();
  b.config.paging_from_start = true;
  b.start();
  b.connect();
  EXPECT_TRUE(b.data(0).switch_over());
  const auto content = random_bytes(kUnits * kHuge, 3);
  std::thread reader([&] { EXPECT_EQ(*b.page(kUnit + 9), content[(kUnit + 9) * page_size()]); });
  for (std::uint64_t piece = 0; piece < 8; ++piece) {
    const auto request = b.demand().request();
    ASSERT_TRUE(request);
    EXPECT_EQ(request->first_page, kUnit + piece * 64);
    EXPECT_EQ(request->page_count, 64U);
    // A source sends what it has in one piece: here less than was asked for.
    const auto half = std::span(content).subspan((kUnit + piece * 64) * page_size(), 32 * page_size());
    EXPECT_TRUE(b.demand().pages(0, kUnit + piece * 64, half, page_size()));
  }
  // Of what it asks for again some may be on its way, and what it has asked for twice it gets twice.
  std::vector<bool> sent(kUnit);
  for (std::uint64_t page = 0; page < kUnit; ++page) sent[page] = page % 64 < 32;
  while (std::find(sent.begin(), sent.end(), false) != sent.end()) {
    const auto request = b.demand().request();
    ASSERT_TRUE(request);
    ASSERT_GE(request->first_page, kUnit);
    ASSERT_LE(request->first_page + request->page_count, 2 * kUnit);
    const auto bytes =
        std::span(content).subspan(request->first_page * page_size(), request->page_count * page_size());
    EXPECT_TRUE(b.demand().pages(0, request->first_page, bytes, page_size()));
    std::fill_n(sent.begin() + static_cast<std::ptrdiff_t>(request->first_page - kUnit), request->page_count,
                true);
  }
  reader.join();
}

// Nobody touches anything: a source that says nothing is asked for a huge page, and again for what its answers lack.
TEST_P(HugePaging, ASilentSourceIsAskedForAWholeOne) {
  Bench& b = bench();
  b.config.paging_from_start = true;
  b.config.silence_timeout = 200ms;
  b.config.answer_timeout = 20s;
  b.start();
  b.connect();
  EXPECT_TRUE(b.data(0).switch_over());
  const auto content = random_bytes(kUnits * kHuge, 12);
  std::thread server([&] {
    wire::FrameHeader header{};
    while (b.demand().read(&header, sizeof header)) {
      if (header.type != static_cast<std::uint16_t>(wire::FrameType::kFaultRequest)) continue;
      const std::uint64_t count = (header.page_count + 1) / 2;  // less than was asked for
      const auto bytes = std::span(content).subspan(header.first_page * page_size(), count * page_size());
      if (!b.demand().pages(0, header.first_page, bytes, page_size())) return;
    }
  });
  b.log.wait(EngineEventKind::kComplete);
  end_serving(server);
  EXPECT_TRUE(equal(content));
  EXPECT_EQ(b.receiver->stats().faults.count, 0U);
  EXPECT_EQ(b.log.count(EngineEventKind::kPaused), 0U);
}

TEST_P(HugePaging, HybridKeepsWhatIsWholeAndReplacesTheRest) {
  Bench& b = bench();
  b.start();
  b.connect();
  auto content = random_bytes(kUnits * kHuge, 4);
  EXPECT_TRUE(b.data(0).pages(0, 0, content, page_size()));
  EXPECT_TRUE(b.data(0).barrier(1).answered);
  // The first stays whole; of the others single pages, a piece and nearly all go.
  std::vector<wire::WireRun> runs{{kUnit + 5, 1}, {kUnit + 77, 1}, {2 * kUnit + 100, 300}, {3 * kUnit, 511}};
  EXPECT_TRUE(b.data(0).discard(0, runs));
  EXPECT_TRUE(b.data(0).switch_over());
  EXPECT_EQ(b.receiver->stats().pages_missing, 813U);
  for (const wire::WireRun& run : runs) {
    for (std::uint64_t page = run.first_page; page < run.first_page + run.page_count; ++page)
      content[page * page_size() + 11] ^= std::byte{0xff};
  }
  // Zeros now, where there was content.
  std::memset(content.data() + (2 * kUnit + 150) * page_size(), 0, 200 * page_size());
  EXPECT_EQ(std::memcmp(b.page(0), content.data(), kHuge), 0);
  std::thread server = serve(content);
  EXPECT_TRUE(b.data(0).zeros(0, 2 * kUnit + 150, 200));
  EXPECT_EQ(std::memcmp(b.page(kUnit), content.data() + kHuge, 2 * kHuge), 0);
  EXPECT_TRUE(b.data(0).pages(0, 3 * kUnit, std::span(content).subspan(3 * kHuge), page_size()));
  b.log.wait(EngineEventKind::kComplete);
  EXPECT_TRUE(equal(content));
  end_serving(server);
}

TEST_P(HugePaging, ZerosAreZerosBeforeAndAfterTheEnd) {
  Bench& b = bench();
  b.config.paging_from_start = true;
  std::memset(b.page(0), 0x11, kUnits * kHuge);
  b.start();
  b.connect();
  EXPECT_TRUE(b.data(0).switch_over());
  std::thread reader([&] { EXPECT_EQ(*b.page(3), std::byte{0}); });
  ASSERT_TRUE(b.demand().request());
  EXPECT_TRUE(b.data(0).zeros(0, 0, 2 * kUnit));
  reader.join();
  EXPECT_EQ(*b.page(kUnit + 1), std::byte{0});
  const auto content = random_bytes(64 * page_size(), 5);
  EXPECT_TRUE(b.data(0).zeros(0, 3 * kUnit, kUnit));
  EXPECT_TRUE(b.data(0).pages(0, 2 * kUnit, content, page_size()));
  EXPECT_TRUE(b.data(0).zeros(0, 2 * kUnit + 64, kUnit - 64));
  b.log.wait(EngineEventKind::kComplete);
  std::vector<std::byte> expected(kUnits * kHuge);
  std::memcpy(expected.data() + 2 * kHuge, content.data(), content.size());
  EXPECT_TRUE(equal(expected));
}

TEST_P(HugePaging, AGuestMayDiscardWhatHasCome) {
  Bench& b = bench(2);
  b.config.paging_from_start = true;
  b.start();
  b.connect();
  EXPECT_TRUE(b.data(0).switch_over());
  const auto content = random_bytes(2 * kHuge, 6);
  EXPECT_TRUE(b.data(0).pages(0, 0, std::span(content).first(kHuge), page_size()));
  EXPECT_TRUE(b.data(0).barrier(1).answered);
  EXPECT_EQ(*b.page(5), content[5 * page_size()]);
  ASSERT_EQ(::madvise(b.page(0), kHuge, MADV_DONTNEED), 0);  // of a file: nothing is dropped
  EXPECT_EQ(*b.page(5), GetParam() ? content[5 * page_size()] : std::byte{0});
  if (GetParam()) ASSERT_EQ(::madvise(b.page(0), kHuge, MADV_REMOVE), 0);
  EXPECT_EQ(*b.page(5), std::byte{0});
}

TEST_P(HugePaging, WhatIsLostTakesItsHugePageWithItAndIsNamed) {
  Bench& b = bench();
  b.config.paging_from_start = true;
  b.config.recover_timeout = 100ms;
  b.start();
  b.connect();
  EXPECT_TRUE(b.data(0).switch_over());
  const auto content = random_bytes(kUnits * kHuge, 7);
  EXPECT_TRUE(b.data(0).pages(0, 0, std::span(content).first(2 * kHuge - page_size()), page_size()));
  EXPECT_TRUE(b.data(0).zeros(0, 3 * kUnit, kUnit));
  EXPECT_TRUE(b.data(0).barrier(1).answered);
  std::atomic<bool> read{false};
  std::thread waiting([&] {
    EXPECT_EQ(try_read(b.page(kUnit)), std::nullopt);
    read = true;
  });
  std::this_thread::sleep_for(20ms);
  EXPECT_FALSE(read);
  b.wires.clear();
  const EngineEvent lost = b.log.wait(EngineEventKind::kLost);
  ASSERT_EQ(lost.lost.size(), 1U);
  EXPECT_EQ(lost.lost[0].run, (PageRun{PageNumber{kUnit}, 2 * kUnit}));
  waiting.join();
  for (int closed = 0; closed < 2; ++closed) {
    for (std::uint64_t page = kUnit; page < 3 * kUnit; page += 37)
      EXPECT_EQ(try_read(b.page(page)), std::nullopt) << page;
    EXPECT_EQ(std::memcmp(b.page(0), content.data(), kHuge), 0);
    EXPECT_EQ(try_read(b.page(3 * kUnit + 1)), std::byte{0});
    b.receiver->close();
  }
}

TEST_P(HugePaging, ClosedInTheMiddleNothingHalfIsSeen) {
  Bench& b = bench();
  b.config.paging_from_start = true;
  b.start();
  b.connect();
  EXPECT_TRUE(b.data(0).switch_over());
  const auto content = random_bytes(kHuge, 8);
  EXPECT_TRUE(b.data(0).pages(0, 0, std::span(content).first(kHuge / 2), page_size()));
  EXPECT_TRUE(b.data(0).barrier(1).answered);
  std::thread waiting([&] { EXPECT_EQ(try_read(b.page(1)), std::nullopt); });
  ASSERT_TRUE(b.demand().request());
  b.receiver->close();
  waiting.join();
  EXPECT_EQ(try_read(b.page(2)), std::nullopt);
  EXPECT_EQ(try_read(b.page(2 * kUnit)), std::nullopt);
}

// Nobody pages here: parts of huge pages that become zeros, or are to come again.
TEST_P(HugePaging, WithoutPagingPartsBecomeZeros) {
  Bench& b = bench();
  b.config.may_page = false;
  b.start();
  b.connect();
  auto content = random_bytes(kUnits * kHuge, 9);
  EXPECT_TRUE(b.data(0).pages(0, 0, content, page_size()));
  EXPECT_TRUE(b.data(0).barrier(1).answered);
  EXPECT_TRUE(b.data(0).discard(0, {{40, 100}, {600, 1}}));
  EXPECT_TRUE(b.data(0).zeros(0, 40, 100));
  EXPECT_TRUE(b.data(0).zeros(0, 600, 1));
  EXPECT_TRUE(b.data(0).zeros(0, kUnit + 200, kUnit));
  EXPECT_TRUE(b.data(0).barrier(2).answered);
  EXPECT_TRUE(b.receiver->seal());
  std::memset(content.data() + 40 * page_size(), 0, 100 * page_size());
  std::memset(content.data() + 600 * page_size(), 0, page_size());
  std::memset(content.data() + (kUnit + 200) * page_size(), 0, kHuge);
  EXPECT_TRUE(equal(content));
}

TEST_P(HugePagingOfOne, WhatCannotBePagedIsRefusedBeforeAnythingBegins) {
  const auto refusal = [&](const std::shared_ptr<Region>& region) -> std::string {
    Bench b(1);
    b.config.regions = {region};
    b.config.may_page = true;
    try {
      (void)Receiver::create(b.config);
    } catch (const std::exception& error) {
      return error.what();
    }
    return "";
  };
  const auto map = [](int flags) {
    void* const at = ::mmap(nullptr, 2 * kHuge, PROT_READ | PROT_WRITE,
                            flags | MAP_ANONYMOUS | MAP_HUGETLB | (21 << MAP_HUGE_SHIFT), -1, 0);
    EXPECT_NE(at, MAP_FAILED);
    return static_cast<std::byte*>(at);
  };
  std::byte* const own = map(MAP_PRIVATE);
  std::byte* const shared = map(MAP_SHARED);
  own[5] = std::byte{7};
  shared[5] = std::byte{7};
  for (std::byte* const each : {own, shared}) {
    EXPECT_NE(refusal(Region::adopt({{Address::of(each), kHuge + page_size()}}, kHuge + page_size()))
                  .find("begin and end"),
              std::string::npos);
    EXPECT_EQ(each[5], std::byte{7});
    EXPECT_EQ(refusal(Region::adopt({{Address::of(each), 2 * kHuge}}, 2 * kHuge)), "");
    EXPECT_EQ(each[5], std::byte{0});
    ::munmap(each, 2 * kHuge);
  }
  // None are taken: it is not touched.
  constexpr std::uint64_t kMany = HugeMemory::kMostStagedBytes + kHuge;
  void* const many = ::mmap(nullptr, kMany, PROT_READ | PROT_WRITE, kPrivately | MAP_NORESERVE, -1, 0);
  ASSERT_NE(many, MAP_FAILED);
  const std::string why = refusal(Region::adopt({{Address::of(many), kMany}}, kMany));
  EXPECT_NE(why.find("privately mapped, and more than 1024 MiB"), std::string::npos) << why;
  const auto half = Region::adopt({{Address::of(many), kMany - kHuge}}, kMany - kHuge);
  EXPECT_NO_THROW(HugeMemory::check(std::array{half}));
  EXPECT_THROW(HugeMemory::check(std::array{half, half}), SystemError);
  ::munmap(many, kMany);
  // A file's content would come back where it is dropped.
  const UniqueFd file(::memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB));
  ASSERT_EQ(::ftruncate(file.get(), static_cast<off_t>(kHuge)), 0);
  void* const copied = ::mmap(nullptr, kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.get(), 0);
  ASSERT_NE(copied, MAP_FAILED);
  EXPECT_NE(refusal(Region::adopt({{Address::of(copied), kHuge}}, kHuge)).find("private mapping of a file"),
            std::string::npos);
  ::munmap(copied, kHuge);
}

// Takes the right to see the files behind mappings from this thread, and gives it back.
class WithoutMapFiles {
 public:
  WithoutMapFiles() {
    if (::syscall(SYS_capget, &header_, former_.data()) != 0) throw_errno("capget");
    auto less = former_;
    less[0].effective &= ~(1U << CAP_SYS_ADMIN);
    less[1].effective &= ~(1U << (CAP_CHECKPOINT_RESTORE - 32U));
    if (::syscall(SYS_capset, &header_, less.data()) != 0) throw_errno("capset");
  }
  ~WithoutMapFiles() { (void)::syscall(SYS_capset, &header_, former_.data()); }
  WithoutMapFiles(const WithoutMapFiles&) = delete;
  WithoutMapFiles& operator=(const WithoutMapFiles&) = delete;

 private:
  __user_cap_header_struct header_{_LINUX_CAPABILITY_VERSION_3, 0};
  std::array<__user_cap_data_struct, 2> former_{};
};

TEST_P(HugePagingOfOne, AFileOutOfReachIsRefusedUnlessSomeDescriptorIsOfIt) {
  void* const at = ::mmap(nullptr, kHuge, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB | (21 << MAP_HUGE_SHIFT), -1, 0);
  ASSERT_NE(at, MAP_FAILED);
  const auto foreign = Region::adopt({{Address::of(at), kHuge}}, kHuge);
  const auto own = Region::allocate_huge(kHuge);
  const WithoutMapFiles less;
  try {
    HugeMemory::check(std::array{foreign});
    ADD_FAILURE() << "nothing to write it by";
  } catch (const SystemError& error) {
    EXPECT_EQ(error.error(), EOPNOTSUPP);
    EXPECT_NE(std::string(error.what()).find("cannot be reached"), std::string::npos) << error.what();
  }
  EXPECT_NO_THROW(HugeMemory::check(std::array{own}));
  ::munmap(at, kHuge);
}

TEST_P(HugePagingOfOne, OwnMemoryIsTrackedWithoutAWord) {
  const auto region = Region::allocate_huge(2 * kHuge);
  EXPECT_TRUE(region->sole_mapping());
  for (const TrackerKind kind : {TrackerKind::kUffdWpAsync, TrackerKind::kUffdWp}) {
    if (!probe_tracker(kind).available) continue;
    EXPECT_EQ(tracker_refusal(kind, *region), std::nullopt);
    const auto tracker = make_tracker(kind, region);
    AtomicBitmap dirty(2 * kUnit);
    tracker->arm();
    tracker->collect(dirty);
    AtomicBitmap written(2 * kUnit);
    *region->address(PageNumber{kUnit + 3}).pointer() = std::byte{1};
    tracker->collect(written);
    EXPECT_EQ(written.count({PageNumber{kUnit}, kUnit}), kUnit);
    EXPECT_EQ(written.count({PageNumber{0}, kUnit}), 0U);
  }
  EXPECT_THROW((void)Region::allocate_huge(page_size()), std::invalid_argument);
  try {
    (void)Region::allocate_huge(std::uint64_t{1} << 40U);
    ADD_FAILURE() << "a TiB of huge pages";
  } catch (const SystemError& error) {
    EXPECT_EQ(error.error(), ENOMEM);
    EXPECT_NE(std::string(error.what()).find("nr_hugepages"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace memferry::test
