// The page share: its budget, what leaves first, that memory is given back, and that nothing that happens to the file
// makes a reader believe a page.
#include "share/page_share.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <random>
#include <thread>

#include "os/mapping.h"
#include "share_file_support.h"

namespace memferry {
namespace {

using test::key_of;
using test::open_share;
using test::page_of;
using test::ShareFile;

const std::uint64_t kPage = system_page_size();
const std::uint64_t kGroup = kPage / sizeof(share::ShareEntry);

std::uint64_t blocks_bytes(const std::string& path) {
  struct stat status {};
  EXPECT_EQ(::stat(path.c_str(), &status), 0);
  return static_cast<std::uint64_t>(status.st_blocks) * 512;
}

TEST(PageShareTest, WhatIsPutInIsRead) {
  const ShareFile file;
  const auto share = open_share(file.path(), 100 * kPage);
  const auto page = page_of(1);
  const ContentDigest digest = share->digest(page);
  EXPECT_FALSE(share->holds(digest));
  EXPECT_EQ(share->insert(digest, page, 1), PageShare::Inserted::kInserted);
  EXPECT_EQ(share->insert(digest, page, 2), PageShare::Inserted::kThere);
  EXPECT_TRUE(share->holds(digest));

  const auto reader = PageShareReader::open(file.path(), key_of(1));
  ASSERT_TRUE(reader);
  EXPECT_EQ(reader->names(), std::vector{PageShareReader::name_of(digest)});
  std::vector<std::byte> into(kPage);
  EXPECT_TRUE(reader->read(digest, into));
  EXPECT_EQ(into, page);
  EXPECT_FALSE(reader->read(share->digest(page_of(2)), into));

  EXPECT_TRUE(share->remove(digest));
  EXPECT_FALSE(share->remove(digest));
  EXPECT_FALSE(reader->read(digest, into)) << "a page that has left";
  EXPECT_TRUE(reader->refresh());
  EXPECT_TRUE(reader->names().empty());
}

TEST(PageShareTest, TheFileIsForItsOwnerAlone) {
  const ShareFile file;
  const auto share = open_share(file.path(), 10 * kPage);
  struct stat status {};
  ASSERT_EQ(::stat(file.path().c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777U, 0600U);
}

TEST(PageShareTest, BytesThatDoNotHaveTheirHashAreRefused) {
  const ShareFile file;
  const auto share = open_share(file.path(), 10 * kPage);
  const auto page = page_of(1);
  const ContentDigest digest = share->digest(page);
  EXPECT_EQ(share->insert(digest, page_of(2), 1), PageShare::Inserted::kWrong);
  EXPECT_EQ(share->insert(digest, std::span<const std::byte>(page).first(kPage - 1), 1),
            PageShare::Inserted::kWrong);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(share->insert(digest, page_of(1), nan), PageShare::Inserted::kWrong);
  EXPECT_EQ(share->stats().pages, 0U);
}

TEST(PageShareTest, OneWriterAtATime) {
  const ShareFile file;
  auto first = open_share(file.path(), 10 * kPage);
  EXPECT_EQ(PageShare::open(file.path(), key_of(1), 10 * kPage).outcome, PageShare::Opened::kBusy);
  first.reset();
  EXPECT_TRUE(open_share(file.path(), 10 * kPage));
}

TEST(PageShareTest, SomethingElsesFileIsLeftAlone) {
  const ShareFile file;
  std::ofstream(file.path()) << "a letter";
  EXPECT_EQ(PageShare::open(file.path(), key_of(1), 10 * kPage).outcome, PageShare::Opened::kForeign);
  std::string text;
  std::getline(std::ifstream(file.path()), text);
  EXPECT_EQ(text, "a letter");
  EXPECT_FALSE(PageShareReader::open(file.path(), key_of(1)));

  const ShareFile link;
  ASSERT_EQ(::symlink(file.path().c_str(), link.path().c_str()), 0);
  EXPECT_EQ(PageShare::open(link.path(), key_of(1), 10 * kPage).outcome, PageShare::Opened::kForeign);

  const ShareFile pipe;
  ASSERT_EQ(::mkfifo(pipe.path().c_str(), 0600), 0);
  EXPECT_EQ(PageShare::open(pipe.path(), key_of(1), 10 * kPage).outcome, PageShare::Opened::kForeign);
  EXPECT_FALSE(PageShareReader::open(pipe.path(), key_of(1)));
}

TEST(PageShareTest, AnotherDomainSeesNothing) {
  const ShareFile file;
  {
    const auto share = open_share(file.path(), 10 * kPage);
    share->insert(share->digest(page_of(1)), page_of(1), 1);
  }
  EXPECT_FALSE(PageShareReader::open(file.path(), key_of(2)));
  // And whoever writes for another domain starts from nothing.
  const auto other = PageShare::open(file.path(), key_of(2), 10 * kPage);
  ASSERT_EQ(other.outcome, PageShare::Opened::kOpened);
  EXPECT_EQ(other.share->stats().pages, 0U);
}

TEST(PageShareTest, TheLeastUsefulLeavesFirst) {
  const ShareFile file;
  const auto share = open_share(file.path(), 5 * kPage);  // header, index, three pages
  std::vector<ContentDigest> digests;
  for (std::uint64_t i = 0; i < 3; ++i) {
    digests.push_back(share->digest(page_of(i)));
    ASSERT_EQ(share->insert(digests[i], page_of(i), static_cast<double>(10 + i)),
              PageShare::Inserted::kInserted);
  }
  EXPECT_EQ(share->insert(share->digest(page_of(3)), page_of(3), 10), PageShare::Inserted::kNoRoom)
      << "what is worth no more than what is there";
  EXPECT_EQ(share->insert(share->digest(page_of(3)), page_of(3), 10.5), PageShare::Inserted::kInserted);
  EXPECT_FALSE(share->holds(digests[0]));
  EXPECT_TRUE(share->set_score(digests[1], 100));
  EXPECT_EQ(share->insert(share->digest(page_of(4)), page_of(4), 50), PageShare::Inserted::kInserted);
  EXPECT_EQ(share->insert(share->digest(page_of(5)), page_of(5), 50), PageShare::Inserted::kInserted);
  EXPECT_TRUE(share->holds(digests[1]));
  EXPECT_FALSE(share->holds(digests[2]));
  EXPECT_LE(share->stats().bytes_used, 5 * kPage);
  EXPECT_EQ(share->stats().evicted, 3U);
  EXPECT_EQ(share->stats().refused, 1U);
}

TEST(PageShareTest, ShrinkingGivesMemoryBack) {
  const ShareFile file;
  const std::uint64_t pages = 4 * kGroup;
  const auto share = open_share(file.path(), 10 * pages * kPage);
  std::vector<ContentDigest> digests;
  for (std::uint64_t i = 0; i < pages; ++i) {
    digests.push_back(share->digest(page_of(i)));
    // The scores go against the order of the slots.
    ASSERT_EQ(share->insert(digests[i], page_of(i), static_cast<double>((i * 37) % pages)),
              PageShare::Inserted::kInserted);
  }
  EXPECT_EQ(share->stats().bytes_used, (1 + 4 + pages) * kPage);
  EXPECT_GE(blocks_bytes(file.path()), pages * kPage);
  const auto reader = PageShareReader::open(file.path(), key_of(1));
  share->set_budget((1 + 4 + pages / 2) * kPage);
  EXPECT_LE(share->stats().bytes_used, (1 + 4 + pages / 2) * kPage);
  EXPECT_LE(blocks_bytes(file.path()), share->stats().bytes_used);
  std::vector<std::byte> into(kPage);
  for (std::uint64_t i = 0; i < pages; ++i) {
    const bool stays = (i * 37) % pages >= pages / 2;
    EXPECT_EQ(share->holds(digests[i]), stays) << i;
    EXPECT_EQ(reader->read(digests[i], into), stays) << i;
    if (stays) {
      EXPECT_EQ(into, page_of(i));
    }
  }
  share->set_budget(0);
  EXPECT_EQ(share->stats().pages, 0U);
  EXPECT_LE(blocks_bytes(file.path()), kPage);
  EXPECT_EQ(share->insert(digests[0], page_of(0), 1e9), PageShare::Inserted::kNoRoom);
}

TEST(PageShareTest, ThePagesOfAnEarlierWriterAreTakenOverAndLookedAt) {
  const ShareFile file;
  const std::uint64_t pages = kGroup + 5;
  std::vector<ContentDigest> digests;
  {
    const auto share = open_share(file.path(), 10 * pages * kPage);
    for (std::uint64_t i = 0; i < pages; ++i) {
      digests.push_back(share->digest(page_of(i)));
      share->insert(digests[i], page_of(i), static_cast<double>(i));
    }
  }
  {
    // Slots 3 and 4 have something else by now.
    std::fstream bytes(file.path(), std::ios::in | std::ios::out | std::ios::binary);
    bytes.seekp(static_cast<std::streamoff>(share::ShareLayout(kPage).page_offset(3)));
    for (const std::byte byte : page_of(77)) bytes.put(static_cast<char>(byte));
    for (const std::byte byte : page_of(78)) bytes.put(static_cast<char>(byte));
  }
  const auto share = open_share(file.path(), 10 * pages * kPage);
  EXPECT_EQ(share->stats().pages, pages);
  EXPECT_EQ(share->stats().unverified, pages);
  EXPECT_FALSE(share->holds(digests[3]));
  EXPECT_TRUE(share->holds(digests[5]));
  EXPECT_EQ(share->insert(digests[3], page_of(3), 1), PageShare::Inserted::kInserted);
  while (share->verify(10)) {
  }
  EXPECT_EQ(share->stats().unverified, 0U);
  EXPECT_EQ(share->stats().dropped, 2U);
  for (std::uint64_t i = 0; i < pages; ++i) EXPECT_EQ(share->holds(digests[i]), i != 4) << i;
  // The score was taken over, too.
  share->set_budget((1 + 2 + pages - 3) * kPage);
  EXPECT_FALSE(share->holds(digests[0]));
  EXPECT_TRUE(share->holds(digests[pages - 1]));
}

TEST(PageShareTest, AnIndexOfNonsenseIsNoPages) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 20; ++round) {
    const ShareFile file;
    const std::uint64_t pages = 2 * kGroup;
    std::vector<ContentDigest> digests;
    {
      const auto share = open_share(file.path(), 10 * pages * kPage);
      for (std::uint64_t i = 0; i < pages; ++i) {
        digests.push_back(share->digest(page_of(i)));
        share->insert(digests[i], page_of(i), 1);
      }
    }
    const int fd = ::open(file.path().c_str(), O_RDWR | O_CLOEXEC);
    struct stat status {};
    ASSERT_EQ(::fstat(fd, &status), 0);
    for (int i = 0; i < 3000; ++i) {
      const std::uint64_t value = random();
      const std::uint64_t in_index =
          random() % 2 == 0 ? kPage + random() % kPage : random() % kPage + kPage * (2 + kGroup);
      const std::uint64_t at =
          i % 3 == 0 ? kPage + random() % (static_cast<std::uint64_t>(status.st_size) - kPage) : in_index;
      ASSERT_GE(::pwrite(fd, &value, 1 + random() % 8, static_cast<off_t>(at)), 1);
    }
    if (round % 2 == 0) {
      ASSERT_EQ(::ftruncate(fd, static_cast<off_t>(random() % static_cast<std::uint64_t>(status.st_size))),
                0);
    }
    ::close(fd);
    std::vector<std::byte> into(kPage);
    if (const auto reader = PageShareReader::open(file.path(), key_of(1))) {
      for (std::uint64_t i = 0; i < pages; ++i) {
        if (reader->read(digests[i], into)) {
          ASSERT_EQ(into, page_of(i));
        }
      }
    }
    auto again = PageShare::open(file.path(), key_of(1), 10 * pages * kPage);
    if (again.outcome == PageShare::Opened::kForeign) continue;  // cut off within the header
    ASSERT_EQ(again.outcome, PageShare::Opened::kOpened);
    while (again.share->verify(64)) {
    }
    const auto reader = PageShareReader::open(file.path(), key_of(1));
    ASSERT_TRUE(reader);
    for (std::uint64_t i = 0; i < pages; ++i) {
      const bool held = again.share->holds(digests[i]);
      ASSERT_EQ(reader->read(digests[i], into), held);
      if (held) {
        ASSERT_EQ(into, page_of(i));
      }
      ASSERT_NE(again.share->insert(digests[i], page_of(i), 2), PageShare::Inserted::kWrong);
    }
    EXPECT_TRUE(reader->refresh());
    for (std::uint64_t i = 0; i < pages; ++i) EXPECT_TRUE(reader->read(digests[i], into)) << i;
  }
}

TEST(PageShareTest, AFileThatIsCutOffUnderAReaderIsPagesThatAreNotThere) {
  const ShareFile file;
  const std::uint64_t pages = 64;
  const auto share = open_share(file.path(), 10 * pages * kPage);
  std::vector<ContentDigest> digests;
  for (std::uint64_t i = 0; i < pages; ++i) {
    digests.push_back(share->digest(page_of(i)));
    share->insert(digests[i], page_of(i), 1);
  }
  const auto reader = PageShareReader::open(file.path(), key_of(1));
  ASSERT_EQ(::truncate(file.path().c_str(), static_cast<off_t>(20 * kPage + 100)), 0);
  std::vector<std::byte> into(kPage);
  for (std::uint64_t i = 0; i < pages; ++i) EXPECT_EQ(reader->read(digests[i], into), i < 18) << i;
  // The writer finds out when it looks.
  (void)share->verify(pages);
  EXPECT_EQ(share->stats().pages, 18U);
  ASSERT_EQ(::truncate(file.path().c_str(), 0), 0);
  EXPECT_FALSE(reader->read(digests[0], into));
  EXPECT_FALSE(reader->refresh());
  ASSERT_EQ(::unlink(file.path().c_str()), 0);
  EXPECT_FALSE(reader->refresh());
}

TEST(PageShareTest, ReadersSeeWholePagesOrNoneWhileTheWriterWrites) {
  const ShareFile file;
  constexpr std::uint64_t kContents = 200;
  const auto share = open_share(file.path(), 50 * kPage);
  std::vector<ContentDigest> digests;
  for (std::uint64_t i = 0; i < kContents; ++i) digests.push_back(share->digest(page_of(i)));
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> found{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(static_cast<std::uint64_t>(t));
      std::vector<std::byte> into(kPage);
      const auto reader = PageShareReader::open(file.path(), key_of(1));
      while (!stop) {
        (void)reader->refresh();
        for (int i = 0; i < 50; ++i) {
          const std::uint64_t wanted = random() % kContents;
          if (!reader->read(digests[wanted], into)) continue;
          ++found;
          ASSERT_EQ(into, page_of(wanted));
        }
      }
    });
  }
  std::mt19937_64 random(99);
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  for (int i = 0; (i < 4000 || found < 100) && std::chrono::steady_clock::now() < until; ++i) {
    const std::uint64_t which = random() % kContents;
    share->insert(digests[which], page_of(which), static_cast<double>(random() % 1000));
    if (i % 500 == 0) share->set_budget((10 + random() % 60) * kPage);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_GE(found, 100U);
}

// Against a model: the same operations on a sorted list of what should be there.
TEST(PageShareTest, BehavesAsItsModel) {
  for (std::uint64_t seed = 1; seed <= 12; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    const ShareFile file;
    std::uint64_t budget = (3 + random() % (3 * kGroup)) * kPage;
    auto share = open_share(file.path(), budget);
    struct Kept {
      double score;
      std::uint64_t age;
    };
    std::map<std::uint64_t, Kept> model;
    std::uint64_t age = 0;
    bool reopened = false;  // ages are in the order of the slots then, which the model does not know
    std::map<ContentDigest, std::uint64_t> known;
    for (int step = 0; step < 3000; ++step) {
      const std::uint64_t which = random() % (4 * kGroup);
      const auto page = page_of(which);
      const ContentDigest digest = share->digest(page);
      known[digest] = which;
      // Once reopened no two scores are equal.
      const double score = static_cast<double>(random() % 50) + (reopened ? 1e-9 * step + 1e-3 : 0);
      const auto settle = [&] {
        for (auto it = model.begin(); it != model.end();) {
          it = share->holds(share->digest(page_of(it->first))) ? std::next(it) : model.erase(it);
        }
      };
      switch (random() % 12) {
        case 0:
          EXPECT_EQ(share->remove(digest), model.erase(which) == 1);
          break;
        case 1:
          EXPECT_EQ(share->set_score(digest, score), model.count(which) == 1);
          if (model.count(which) == 1) model[which].score = score;
          break;
        case 2: {
          if (random() % 20 != 0) break;
          budget = (2 + random() % (4 * kGroup)) * kPage;
          const std::uint64_t before = share->stats().pages;
          std::vector<std::pair<std::pair<double, std::uint64_t>, std::uint64_t>> order;
          for (const auto& [content, kept] : model) order.push_back({{kept.score, kept.age}, content});
          std::sort(order.begin(), order.end());
          share->set_budget(budget);
          const std::uint64_t left = before - share->stats().pages;
          EXPECT_LE(share->stats().bytes_used, std::max(budget, kPage));
          // What has left is what was worth least.
          if (!reopened) {
            for (std::uint64_t i = 0; i < order.size(); ++i) {
              ASSERT_EQ(share->holds(share->digest(page_of(order[i].second))), i >= left)
                  << i << " of " << left;
            }
          }
          settle();
          break;
        }
        case 3:
          if (random() % 200 == 0) {
            share.reset();
            share = open_share(file.path(), budget);
            reopened = true;
          }
          break;
        default: {
          const std::uint64_t before = share->stats().pages;
          const auto inserted = share->insert(digest, page, score);
          if (model.count(which) == 1) {
            EXPECT_EQ(inserted, PageShare::Inserted::kThere);
            model[which].score = score;
            break;
          }
          if (inserted == PageShare::Inserted::kInserted) {
            // At most one has made room for it, the least.
            const std::uint64_t left = before + 1 - share->stats().pages;
            ASSERT_LE(left, 1U);
            if (left == 1 && !reopened) {
              auto least = model.begin();
              for (auto it = model.begin(); it != model.end(); ++it) {
                if (std::pair(it->second.score, it->second.age) <
                    std::pair(least->second.score, least->second.age)) {
                  least = it;
                }
              }
              EXPECT_LT(least->second.score, score);
              EXPECT_FALSE(share->holds(share->digest(page_of(least->first))));
              model.erase(least);
            } else if (left == 1) {
              settle();
            }
            model[which] = {score, age++};
          } else {
            EXPECT_EQ(inserted, PageShare::Inserted::kNoRoom);
            for (const auto& [content, kept] : model) EXPECT_GE(kept.score, score);
          }
        }
      }
      ASSERT_EQ(share->stats().pages, model.size()) << step;
      ASSERT_LE(share->stats().bytes_used, std::max(budget, kPage));
      ASSERT_LE(blocks_bytes(file.path()), std::max(budget, kPage));
    }
    const auto reader = PageShareReader::open(file.path(), key_of(1));
    ASSERT_TRUE(reader);
    EXPECT_EQ(reader->names().size(), model.size());
    std::vector<std::byte> into(kPage);
    for (const auto& [digest, which] : known) {
      EXPECT_EQ(reader->read(digest, into), model.count(which) == 1);
      if (model.count(which) == 1) {
        EXPECT_EQ(into, page_of(which));
      }
    }
  }
}

}  // namespace
}  // namespace memferry
