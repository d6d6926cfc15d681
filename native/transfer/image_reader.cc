#include "transfer/image_reader.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <exception>
#include <map>
#include <mutex>
#include <utility>

#include "os/regular_file.h"
#include "os/signals_blocked.h"
#include "os/sys_error.h"
#include "os/unique_fd.h"

namespace memferry {
namespace {

using Clock = std::chrono::steady_clock;

// Between two looks at whether to go on.
constexpr std::chrono::milliseconds kLook{20};
// At the end, for a read that is under way.
constexpr std::chrono::milliseconds kFarewell{100};

}  // namespace

struct ImageReader::State {
  ReadFile read_file;  // the thread's

  std::mutex mutex;  // guards the rest
  std::condition_variable changed;
  bool asked = false;
  bool busy = false;
  bool ending = false;
  std::string path;
  std::uint64_t offset = 0;
  std::vector<std::byte> bytes;
  std::size_t got = 0;
  std::exception_ptr error;
};

ImageReader::ReadFile ImageReader::regular_files() {
  auto files = std::make_shared<std::map<std::string, UniqueFd>>();
  return [files](const std::string& path, std::uint64_t offset, std::span<std::byte> into) {
    UniqueFd& file = (*files)[path];
    if (!file) file = open_regular(path, O_RDONLY);
    std::size_t got = 0;
    while (got < into.size()) {
      const ssize_t more =
          ::pread(file.get(), into.data() + got, into.size() - got, static_cast<off_t>(offset + got));
      if (more < 0 && errno == EINTR) continue;
      if (more < 0) throw_errno("pread");
      if (more == 0) break;
      got += static_cast<std::size_t>(more);
    }
    return got;
  };
}

ImageReader::ImageReader(ReadFile read_file) : state_(std::make_shared<State>()) {
  state_->read_file = std::move(read_file);
  const SignalsBlocked inherited_by_the_new_thread;
  thread_ = std::thread([state = state_] { run(state); });
  pthread_setname_np(thread_.native_handle(), "mf-image");
}

ImageReader::~ImageReader() {
  bool left = false;
  {
    std::unique_lock lock(state_->mutex);
    state_->ending = true;
    state_->changed.notify_all();
    left = !state_->changed.wait_for(lock, kFarewell, [this] { return !state_->busy; });
  }
  if (left) {
    thread_.detach();
  } else {
    thread_.join();
  }
}

void ImageReader::run(const std::shared_ptr<State>& state) {
  std::unique_lock lock(state->mutex);
  for (;;) {
    state->changed.wait(lock, [&] { return state->asked || state->ending; });
    if (state->ending) {
      state->busy = false;
      state->changed.notify_all();
      return;
    }
    state->asked = false;
    const std::string path = state->path;
    const std::uint64_t offset = state->offset;
    std::vector<std::byte> bytes = std::move(state->bytes);
    std::size_t got = 0;
    std::exception_ptr error;
    lock.unlock();
    try {
      got = state->read_file(path, offset, bytes);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    state->bytes = std::move(bytes);
    state->got = got;
    state->error = error;
    state->busy = false;
    state->changed.notify_all();
  }
}

std::optional<std::size_t> ImageReader::read(const std::string& path, std::uint64_t offset,
                                             std::vector<std::byte>& into, std::chrono::milliseconds patience,
                                             const std::function<bool()>& go_on) {
  const auto by = Clock::now() + patience;
  State& state = *state_;
  std::unique_lock lock(state.mutex);
  state.path = path;
  state.offset = offset;
  state.bytes = std::move(into);
  state.asked = state.busy = true;
  state.changed.notify_all();
  while (state.busy) {
    if (Clock::now() >= by || !go_on()) return {};
    state.changed.wait_for(lock, kLook);
  }
  into = std::move(state.bytes);
  if (state.error) std::rethrow_exception(std::exchange(state.error, nullptr));
  return state.got;
}

}  // namespace memferry
