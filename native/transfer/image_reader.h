// Reads image files for somebody who must not wait for a disk that never answers (a dead NFS server, a FUSE file system
// whose program hangs): on a thread that owns all that it touches, so that one that does not come back is left to itself.
//
// Threads: read() and the destructor from one thread at a time.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

namespace memferry {

class ImageReader {
 public:
  // Gives how many bytes there were: fewer than asked for where the file ends. Throws std::exception.
  using ReadFile =
      std::function<std::size_t(const std::string& path, std::uint64_t offset, std::span<std::byte> into)>;
  // Regular files; each is opened once.
  [[nodiscard]] static ReadFile regular_files();

  explicit ImageReader(ReadFile read_file = regular_files());
  ~ImageReader();
  ImageReader(const ImageReader&) = delete;
  ImageReader& operator=(const ImageReader&) = delete;

  // As ReadFile, into all of `into`. Nothing: not within `patience`, or `go_on` said no, and no further read may be asked
  // for. Rethrows what ReadFile threw.
  std::optional<std::size_t> read(const std::string& path, std::uint64_t offset, std::vector<std::byte>& into,
                                  std::chrono::milliseconds patience, const std::function<bool()>& go_on);

 private:
  struct State;
  static void run(const std::shared_ptr<State>& state);

  std::shared_ptr<State> state_;
  std::thread thread_;
};

}  // namespace memferry
