// Reading an image's file must end for who asked, whatever the disk does.
#include "transfer/image_reader.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <future>
#include <string>
#include <system_error>
#include <vector>

namespace memferry {
namespace {

using namespace std::chrono_literals;

constexpr auto kGoOn = [] { return true; };

class ImageReaderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    path_ = testing::TempDir() + "memferry-image-" + std::to_string(::getpid());
    std::ofstream(path_, std::ios::binary) << std::string(5000, 'a') << std::string(5000, 'b');
  }
  void TearDown() override { std::remove(path_.c_str()); }

  std::string path_;
};

TEST_F(ImageReaderTest, ReadsWhatThereIs) {
  ImageReader reader;
  std::vector<std::byte> bytes(4096);
  EXPECT_EQ(reader.read(path_, 4096, bytes, 20s, kGoOn), 4096U);
  EXPECT_EQ(bytes[5000 - 4096 - 1], std::byte{'a'});
  EXPECT_EQ(bytes[5000 - 4096], std::byte{'b'});
  EXPECT_EQ(reader.read(path_, 8192, bytes, 20s, kGoOn), 10'000U - 8192U);
  EXPECT_EQ(reader.read(path_, 20'000, bytes, 20s, kGoOn), 0U);
}

TEST_F(ImageReaderTest, SaysWhyAndGoesOn) {
  ImageReader reader;
  std::vector<std::byte> bytes(4096);
  EXPECT_THROW((void)reader.read(path_ + "-is-not-there", 0, bytes, 20s, kGoOn), std::system_error);
  EXPECT_THROW((void)reader.read("/dev/zero", 0, bytes, 20s, kGoOn), std::system_error);
  EXPECT_EQ(reader.read(path_, 0, bytes, 20s, kGoOn), 4096U);
}

// A disk that answers when the test lets it.
struct Disk {
  std::promise<void> answer;
  std::promise<void> asked;
  std::promise<void> over;

  ImageReader::ReadFile read_file() {
    return [this](const std::string&, std::uint64_t, std::span<std::byte> into) {
      asked.set_value();
      answer.get_future().wait();
      std::ranges::fill(into, std::byte{7});  // memory that is this thread's still
      over.set_value();
      return into.size();
    };
  }
};

TEST_F(ImageReaderTest, ADiskThatNeverAnswersHoldsNobodyUp) {
  Disk disk;
  {
    ImageReader reader(disk.read_file());
    std::vector<std::byte> bytes(1 << 16);
    EXPECT_EQ(reader.read(path_, 0, bytes, 30ms, kGoOn), std::nullopt);
    disk.asked.get_future().wait();
  }
  // Here although it still reads; and it ends by itself once it can.
  disk.answer.set_value();
  EXPECT_EQ(disk.over.get_future().wait_for(20s), std::future_status::ready);
}

TEST_F(ImageReaderTest, WhoeverIsToldToStopDoesNotWaitForTheDisk) {
  Disk disk;
  std::atomic<bool> go_on = true;
  {
    ImageReader reader(disk.read_file());
    auto stopping = std::async(std::launch::async, [&] {
      disk.asked.get_future().wait();
      go_on = false;
    });
    std::vector<std::byte> bytes(4096);
    EXPECT_EQ(reader.read(path_, 0, bytes, 3600s, [&] { return go_on.load(); }), std::nullopt);
  }
  disk.answer.set_value();
  EXPECT_EQ(disk.over.get_future().wait_for(20s), std::future_status::ready);
}

}  // namespace
}  // namespace memferry
