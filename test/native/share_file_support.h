// A page share's file that goes with the test, and pages that are known by a number.
#pragma once

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "os/mapping.h"
#include "share/page_share.h"

namespace memferry::test {

// On tmpfs where there is one: what is tested is what it gives back.
class ShareFile {
 public:
  ShareFile() {
    static std::atomic<int> next{0};
    struct stat status {};
    const std::string directory = ::stat("/dev/shm", &status) == 0 ? "/dev/shm" : "/tmp";
    path_ = directory + "/memferry-test-" + std::to_string(::getpid()) + "-" + std::to_string(next++);
    ::unlink(path_.c_str());
  }
  ~ShareFile() { ::unlink(path_.c_str()); }
  ShareFile(const ShareFile&) = delete;
  ShareFile& operator=(const ShareFile&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline ContentKey key_of(std::uint8_t number) {
  ContentKey key{};
  key.fill(number);
  return key;
}

inline std::vector<std::byte> page_of(std::uint64_t number) {
  std::vector<std::byte> page(system_page_size());
  std::mt19937_64 random(number + 1);
  for (std::size_t at = 0; at < page.size(); at += sizeof(std::uint64_t)) {
    const std::uint64_t value = random();
    std::memcpy(page.data() + at, &value, sizeof value);
  }
  return page;
}

inline std::unique_ptr<PageShare> open_share(const std::string& path, std::uint64_t budget,
                                             const ContentKey& key = key_of(1)) {
  PageShare::Result result = PageShare::open(path, key, budget);
  EXPECT_EQ(result.outcome, PageShare::Opened::kOpened);
  return std::move(result.share);
}

}  // namespace memferry::test
