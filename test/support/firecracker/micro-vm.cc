// Plays Firecracker's part when it restores a snapshot by userfaultfd, as its public documentation and source describe
// it: the memory, the userfaultfd with its features, the one message with its descriptors, the socket that is never
// closed; then a guest that touches its memory, and a balloon. Every byte is compared with what must be there.
//
//   micro-vm --make-snapshot FILE --bytes N
//   micro-vm --socket PATH --bytes N [--regions 1|2] [--page-size 4096|2097152] [--fields both|page_size|page_size_kib|none]
//            [--fork] [--memfd] [--early-close] [--close-after] [--pieces [BYTES]] [--no-descriptor] [--message TEXT] [--plain-file]
//            [--third-descriptor] [--swapped] [--die-early]
//
// --fork: e2b-dev/firecracker's: WP_ASYNC, and with --memfd a second descriptor. It obeys lines on its standard input,
// and answers each with a line of JSON:
//   random COUNT SEED | sequential | verify [FIRST COUNT] | remove FIRST COUNT | write FIRST COUNT SEED | expect FIRST COUNT SEED | threads COUNT MS | sum | exit
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kWords = kPage / 8;
constexpr std::uint64_t kWpAsync = 1ULL << 15U;  // UFFD_FEATURE_WP_ASYNC, 6.7

[[noreturn]] void die(const char* what) {
  std::perror(what);
  std::exit(1);
}

// Word `i` of page `page` of the snapshot. Every 16th page is zeros.
std::uint64_t snapshot_word(std::uint64_t page, std::uint64_t i) {
  if (page % 16 == 15) return 0;
  std::uint64_t x = page * kWords + i + 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31U);
}
std::uint64_t written_word(std::uint64_t page, std::uint64_t i, std::uint64_t seed) {
  return ~snapshot_word(page, i) + seed;
}

struct Region {
  std::uint64_t* memory;
  std::uint64_t bytes;
  std::uint64_t offset;
};

class Guest {
 public:
  Guest(std::vector<Region> regions, std::uint64_t bytes)
      : regions_(std::move(regions)), expected_(bytes / kPage, kSnapshot) {}

  [[nodiscard]] std::uint64_t pages() const { return expected_.size(); }
  volatile std::uint64_t* page(std::uint64_t number) const {
    const std::uint64_t at = number * kPage;
    for (const Region& region : regions_)
      if (at >= region.offset && at < region.offset + region.bytes)
        return region.memory + (at - region.offset) / 8;
    std::abort();
  }
  bool right(std::uint64_t number) const {
    const volatile std::uint64_t* words = page(number);
    const std::int64_t kind = expected_[number];
    for (std::uint64_t i = 0; i < kWords; ++i) {
      const std::uint64_t want = kind == kSnapshot ? snapshot_word(number, i)
                                 : kind == kZeros  ? 0
                                                  : written_word(number, i, static_cast<std::uint64_t>(kind));
      if (words[i] != want) return false;
    }
    return true;
  }
  void remove(std::uint64_t first, std::uint64_t count) {
    for (std::uint64_t number = first; number < first + count;) {
      // A balloon gives back what lies in one region at a time.
      std::uint64_t end = number + 1;
      while (end < first + count && page(end) == page(end - 1) + kWords) ++end;
      if (::madvise(const_cast<std::uint64_t*>(page(number)), (end - number) * kPage, MADV_DONTNEED) != 0)
        die("madvise");
      number = end;
    }
    for (std::uint64_t number = first; number < first + count; ++number) expected_[number] = kZeros;
  }
  // It was written so before it came here.
  void expect(std::uint64_t first, std::uint64_t count, std::uint64_t seed) {
    for (std::uint64_t number = first; number < first + count; ++number)
      expected_[number] = static_cast<std::int64_t>(seed);
  }
  void write(std::uint64_t first, std::uint64_t count, std::uint64_t seed) {
    for (std::uint64_t number = first; number < first + count; ++number) {
      volatile std::uint64_t* words = page(number);
      for (std::uint64_t i = 0; i < kWords; ++i) words[i] = written_word(number, i, seed);
      expected_[number] = static_cast<std::int64_t>(seed);
    }
  }

 private:
  static constexpr std::int64_t kSnapshot = -1;
  static constexpr std::int64_t kZeros = -2;
  std::vector<Region> regions_;
  std::vector<std::int64_t> expected_;
};

using Options = std::map<std::string, std::string>;

double microseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
}

void make_snapshot(const Options& options) {
  const std::uint64_t bytes = std::stoull(options.at("--bytes"));
  std::FILE* file = std::fopen(options.at("--make-snapshot").c_str(), "wb");
  if (file == nullptr) die("fopen");
  std::vector<std::uint64_t> page(kWords);
  for (std::uint64_t number = 0; number < bytes / kPage; ++number) {
    for (std::uint64_t i = 0; i < kWords; ++i) page[i] = snapshot_word(number, i);
    if (std::fwrite(page.data(), kPage, 1, file) != 1) die("fwrite");
  }
  if (std::fclose(file) != 0) die("fclose");
}

std::string describe(const std::vector<Region>& regions, std::uint64_t page_size, const std::string& fields) {
  std::string text = "[";
  for (const Region& region : regions) {
    if (text.size() > 1) text += ",";
    text += "{\"base_host_virt_addr\":" + std::to_string(reinterpret_cast<std::uintptr_t>(region.memory)) +
            ",\"size\":" + std::to_string(region.bytes) + ",\"offset\":" + std::to_string(region.offset);
    if (fields == "both" || fields == "page_size") text += ",\"page_size\":" + std::to_string(page_size);
    if (fields == "both" || fields == "page_size_kib")
      text += ",\"page_size_kib\":" + std::to_string(page_size);
    text += "}";
  }
  return text + "]";
}

void send_with(int socket, const std::string& text, const std::vector<int>& descriptors) {
  std::vector<char> control(CMSG_SPACE(descriptors.size() * sizeof(int)));
  iovec from{const_cast<char*>(text.data()), text.size()};
  msghdr message{};
  message.msg_iov = &from;
  message.msg_iovlen = 1;
  if (!descriptors.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
    std::memcpy(CMSG_DATA(part), descriptors.data(), descriptors.size() * sizeof(int));
  }
  if (::sendmsg(socket, &message, 0) != static_cast<ssize_t>(text.size())) die("sendmsg");
}

void obey(Guest& guest, const std::string& line) {
  std::istringstream words(line);
  std::string verb;
  std::uint64_t a = 0;
  std::uint64_t b = 0;
  std::uint64_t c = 0;
  words >> verb >> a >> b >> c;
  std::uint64_t wrong = 0;
  if (verb == "random") {
    std::mt19937_64 random(b);
    std::vector<std::uint64_t> order(guest.pages());
    for (std::uint64_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    order.resize(std::min<std::uint64_t>(a, order.size()));
    std::vector<double> took;
    for (const std::uint64_t number : order) {
      const auto start = std::chrono::steady_clock::now();
      (void)*guest.page(number);
      took.push_back(microseconds_since(start));
      if (!guest.right(number)) ++wrong;
    }
    std::sort(took.begin(), took.end());
    std::printf("{\"wrong\":%lu,\"count\":%zu,\"p50Us\":%.3f,\"p99Us\":%.3f}\n", wrong, took.size(),
                took.empty() ? 0 : took[took.size() / 2], took.empty() ? 0 : took[took.size() * 99 / 100]);
  } else if (verb == "sequential") {
    const auto start = std::chrono::steady_clock::now();
    std::uint64_t sum = 0;
    for (std::uint64_t number = 0; number < guest.pages(); ++number) {
      const auto* page = const_cast<const std::uint64_t*>(guest.page(number));
      for (std::uint64_t i = 0; i < kWords; ++i) sum += page[i];
    }
    std::printf("{\"sum\":\"%lx\",\"seconds\":%.6f,\"bytes\":%lu}\n", sum, microseconds_since(start) / 1e6,
                guest.pages() * kPage);
  } else if (verb == "verify") {
    std::uint64_t first = 0;
    for (std::uint64_t number = b == 0 ? guest.pages() : a + b; number-- > a;)
      if (!guest.right(number)) {
        ++wrong;
        first = number;
      }
    std::printf("{\"wrong\":%lu,\"first\":%lu}\n", wrong, first);
  } else if (verb == "remove") {
    guest.remove(a, b);
    std::printf("{\"removed\":%lu}\n", b);
  } else if (verb == "write") {
    guest.write(a, b, c);
    std::printf("{\"written\":%lu}\n", b);
  } else if (verb == "expect") {
    guest.expect(a, b, c);
    std::printf("{\"expected\":%lu}\n", b);
  } else if (verb == "threads") {
    // Several virtual CPUs: they read what is not removed meanwhile.
    std::atomic<bool> stop{false};
    std::atomic<std::uint64_t> bad{0};
    std::vector<std::thread> threads;
    for (std::uint64_t i = 0; i < a; ++i) {
      threads.emplace_back([&guest, &stop, &bad, i] {
        std::mt19937_64 random(i);
        while (!stop)
          if (!guest.right(guest.pages() / 2 + random() % (guest.pages() / 2))) ++bad;
      });
    }
    std::mt19937_64 random(99);
    const auto start = std::chrono::steady_clock::now();
    std::uint64_t rounds = 0;
    while (microseconds_since(start) < static_cast<double>(b) * 1e3) {
      const std::uint64_t first = random() % (guest.pages() / 2 - 8);
      if (random() % 2 == 0) guest.remove(first, 1 + random() % 8);
      for (std::uint64_t number = first; number < first + 8; ++number)
        if (!guest.right(number)) ++bad;
      ++rounds;
    }
    stop = true;
    for (std::thread& thread : threads) thread.join();
    std::printf("{\"wrong\":%lu,\"rounds\":%lu}\n", bad.load(), rounds);
  } else if (verb == "exit") {
    std::exit(0);
  } else {
    std::printf("{\"error\":\"what?\"}\n");
  }
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const bool valued = i + 1 < argc && std::strncmp(argv[i + 1], "--", 2) != 0;
    options[name] = valued ? argv[++i] : "";
  }
  if (options.contains("--make-snapshot")) {
    make_snapshot(options);
    return 0;
  }
  const auto text = [&](const char* name, const char* otherwise) {
    return options.contains(name) ? options.at(name) : std::string(otherwise);
  };
  const std::uint64_t bytes = std::stoull(options.at("--bytes"));
  const std::uint64_t page_size = std::stoull(text("--page-size", "4096"));
  const bool huge = page_size != kPage;
  const bool fork = options.contains("--fork");

  // One file for all regions, shared and sealed, as the fork makes it; else private memory.
  int memfd = -1;
  if (options.contains("--memfd")) {
    memfd = static_cast<int>(::syscall(SYS_memfd_create, "guest_mem", MFD_ALLOW_SEALING | MFD_CLOEXEC));
    if (memfd < 0 || ::ftruncate(memfd, static_cast<off_t>(bytes)) != 0) die("memfd");
    if (::fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) die("seals");
  }
  std::vector<Region> regions;
  const std::uint64_t count = std::stoull(text("--regions", "1"));
  for (std::uint64_t i = 0, offset = 0; i < count; ++i) {
    const std::uint64_t part = i + 1 < count ? bytes / count / page_size * page_size : bytes - offset;
    // Guards around each, as Firecracker makes them.
    auto* guarded = static_cast<std::byte*>(
        ::mmap(nullptr, part + 2 * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (guarded == MAP_FAILED) die("mmap");
    auto* start = reinterpret_cast<std::byte*>(
        (reinterpret_cast<std::uintptr_t>(guarded) + 2 * page_size - 1) / page_size * page_size);
    const int flags = MAP_FIXED | MAP_NORESERVE | (memfd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS) |
                      (huge ? MAP_HUGETLB | (21 << MAP_HUGE_SHIFT) : 0);
    void* memory = ::mmap(start, part, PROT_READ | PROT_WRITE, flags, memfd,
                          memfd >= 0 ? static_cast<off_t>(offset) : 0);
    if (memory == MAP_FAILED) die("mmap");
    regions.push_back({static_cast<std::uint64_t*>(memory), part, offset});
    offset += part;
  }

  const int uffd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  if (uffd < 0) die("userfaultfd");
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = UFFD_FEATURE_EVENT_REMOVE;
  if (fork) api.features |= UFFD_FEATURE_MISSING_HUGETLBFS | kWpAsync;
  if (::ioctl(uffd, UFFDIO_API, &api) != 0) die("UFFDIO_API");
  for (const Region& region : regions) {
    uffdio_register reg{};
    reg.range = {reinterpret_cast<std::uint64_t>(region.memory), region.bytes};
    reg.mode = UFFDIO_REGISTER_MODE_MISSING | (fork ? UFFDIO_REGISTER_MODE_WP : 0);
    if (::ioctl(uffd, UFFDIO_REGISTER, &reg) != 0) die("UFFDIO_REGISTER");
  }

  const int socket = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, options.at("--socket").c_str(), sizeof address.sun_path - 1);
  if (::connect(socket, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) die("connect");
  if (options.contains("--early-close")) {
    ::close(socket);
    return 0;
  }
  const std::string message =
      text("--message", describe(regions, page_size, text("--fields", "both")).c_str());
  std::vector<int> descriptors{options.contains("--plain-file") ? ::open("/dev/null", O_RDONLY | O_CLOEXEC)
                                                                : uffd};
  if (fork && memfd >= 0) descriptors.push_back(memfd);
  if (options.contains("--no-descriptor")) descriptors.clear();
  if (options.contains("--third-descriptor"))
    while (descriptors.size() < 3) descriptors.push_back(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  if (options.contains("--swapped")) std::reverse(descriptors.begin(), descriptors.end());
  if (options.contains("--die-early")) {
    send_with(socket, message.substr(0, message.size() / 2), descriptors);
    std::_Exit(0);
  }
  if (options.contains("--pieces")) {
    const std::size_t most = std::stoull(text("--pieces", "").empty() ? "7" : text("--pieces", ""));
    for (std::size_t at = 0; at < message.size(); at += most) {
      send_with(socket, message.substr(at, most), at == 0 ? descriptors : std::vector<int>{});
      if (at == 0) ::usleep(20'000);
    }
  } else {
    send_with(socket, message, descriptors);
  }
  // Releases before 1.10 did; later ones keep it open for good.
  if (options.contains("--close-after")) ::close(socket);

  Guest guest(regions, bytes);
  // Loading device state touches guest memory, before the guest runs.
  const bool loaded = guest.right(0) && guest.right(guest.pages() - 1);
  std::printf("{\"loaded\":%s}\n", loaded ? "true" : "false");
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) obey(guest, line);
  return 0;
}
