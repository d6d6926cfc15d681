// The file of a page share, as whoever may write there has left it: opened by a reader and by the next writer, and changed
// under both.
//
// Input: u8 how, u8 pages of budget; with kRaw the rest is the file. Otherwise u8 pages of the file's length, u8 how many
// records, then records and, behind them, calls: u8 what, and what that wants.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "input.h"
#include "os/mapping.h"
#include "os/unique_fd.h"
#include "share/page_share.h"
#include "share/share_file.h"
#include "share/share_format.h"

namespace memferry::fuzz {
namespace {

using share::ShareEntry;
using share::ShareHeader;
using share::ShareLayout;

enum How : std::uint8_t {
  kRaw = 1,
  kOtherKey = 2,
  kOtherVersion = 4,
  kOtherPageSize = 8,
  kNoMagic = 16,
  kOddLength = 32,
};
constexpr std::uint64_t kMostSlots = 1024;
constexpr std::size_t kMostSteps = 64;
const ContentKey kKey{1};

std::uint64_t page_size() { return system_page_size(); }

std::vector<std::byte> page_of(std::uint8_t seed) {
  return std::vector<std::byte>(page_size(), static_cast<std::byte>(seed));
}

const ContentHasher& hasher() {
  static const ContentHasher made(kKey);
  return made;
}

// Hashing a page takes as long as all the rest.
const ContentDigest& digest_of(std::uint8_t seed) {
  static std::map<std::uint8_t, ContentDigest> made;
  const auto found = made.find(seed);
  return found != made.end() ? found->second : made.emplace(seed, hasher()(page_of(seed))).first->second;
}

// One for the life of the process, emptied for each input.
class File {
 public:
  File() : path_("/dev/shm/memferry-fuzz-" + std::to_string(::getpid())) {
    fd_.reset(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_EXCL, 0600));
    require(fd_.valid());
  }
  ~File() { ::unlink(path_.c_str()); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }
  void write(std::uint64_t offset, std::span<const std::byte> bytes) const {
    require(::pwrite(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset)) ==
            static_cast<ssize_t>(bytes.size()));
  }
  void resize(std::uint64_t bytes) const { require(::ftruncate(fd_.get(), static_cast<off_t>(bytes)) == 0); }
  [[nodiscard]] std::vector<std::byte> content() const {
    std::vector<std::byte> all(size());
    require(share::read_at(fd_.get(), 0, all));
    return all;
  }
  [[nodiscard]] std::size_t size() const {
    struct stat status {};
    require(::fstat(fd_.get(), &status) == 0);
    return static_cast<std::size_t>(status.st_size);
  }

 private:
  std::string path_;
  UniqueFd fd_;
};

double score_of(Input& input) {
  const std::uint8_t byte = input.byte();
  return byte == 0xff ? input.take<double>() : byte;
}

class World {
 public:
  World(const File& file, Input& input) : file_(file), layout_(page_size()) {
    const std::uint8_t how = input.byte();
    budget_ = (1 + input.byte()) * page_size();
    file_.resize(0);
    if ((how & kRaw) != 0) {
      file_.write(0, input.rest());
    } else {
      lay_out(how, input);
    }
  }

  void open() {
    const auto before = file_.size() <= kMostCompared ? file_.content() : std::vector<std::byte>();
    reader_ = PageShareReader::open(file_.path(), kKey);
    check_reader();
    PageShare::Result result = PageShare::open(file_.path(), kKey, budget_);
    if (result.outcome == PageShare::Opened::kForeign) {
      require(reader_ == nullptr);
      if (!before.empty()) require(before == file_.content());
      return;
    }
    require(result.outcome == PageShare::Opened::kOpened);
    writer_ = std::move(result.share);
    check_writer();
    if (!reader_) reader_ = PageShareReader::open(file_.path(), kKey);
    require(reader_ != nullptr && reader_->refresh());
    check_reader();
  }

  void step(Input& input) {
    const std::uint8_t what = input.byte() % 11;
    const std::uint8_t seed = input.byte();
    if (what == 0) {
      change(input);
    } else if (what == 1) {
      tampered_ = true;
      file_.resize(seed * page_size() / 2);
    } else if (reader_ && what == 2) {
      (void)reader_->refresh();
      check_reader();
    } else if (reader_ && what == 3) {
      read(seed);
    } else if (writer_) {
      write(what, seed, input);
      check_writer();
    }
  }

  // Nothing has been changed under them since: what the writer is sure of, a reader finds.
  void settle() {
    if (!writer_ || tampered_) return;
    while (writer_->verify(kMostSlots)) {
    }
    const PageShareStats stats = writer_->stats();
    require(stats.unverified == 0);
    require(reader_->refresh());
    std::vector<std::byte> page(page_size());
    for (const ContentDigest& digest : writer_->digests()) {
      require(writer_->holds(digest) && reader_->lists(PageShareReader::name_of(digest)));
      require(reader_->read(digest, page) && hasher()(page) == digest);
    }
  }

 private:
  static constexpr std::size_t kMostCompared = 65536;

  void lay_out(std::uint8_t how, Input& input) {
    const std::uint64_t pages = input.byte() * std::uint64_t{4};
    std::size_t records = input.byte() % kMostSteps;
    file_.resize(pages * page_size() + ((how & kOddLength) != 0 ? 100 : 0));
    ShareHeader header{};
    header.magic = share::kMagic;
    header.version = share::kVersion + ((how & kOtherVersion) != 0 ? 1 : 0);
    header.page_size = static_cast<std::uint32_t>(page_size() << ((how & kOtherPageSize) != 0 ? 1U : 0U));
    header.check = share::check_of(hasher());
    if ((how & kNoMagic) != 0) header.magic[7] = '2';
    if ((how & kOtherKey) != 0) header.check[0] ^= 1U;
    file_.write(0, std::as_bytes(std::span(&header, 1)));
    for (; records > 0 && !input.empty(); --records) record(input);
  }

  // u16 slot, u8 seed, u8 bits (1: no page, 2: another page, 4: another digest, 8: `used` as given), score.
  void record(Input& input) {
    const std::uint64_t slot = input.take<std::uint16_t>() % kMostSlots;
    const std::uint8_t seed = input.byte();
    const std::uint8_t bits = input.byte();
    ShareEntry entry{digest_of(seed), score_of(input), 1};
    if ((bits & 4) != 0) entry.digest[0] ^= 1U;
    if ((bits & 8) != 0) entry.used = input.take<std::uint64_t>();
    if ((bits & 1) == 0)
      file_.write(layout_.page_offset(slot),
                  page_of(static_cast<std::uint8_t>(seed + ((bits & 2) != 0 ? 1 : 0))));
    file_.write(layout_.entry_offset(slot), std::as_bytes(std::span(&entry, 1)));
  }

  void change(Input& input) {
    tampered_ = true;
    if (input.byte() % 2 == 0) {
      record(input);
    } else {
      const std::uint64_t at = input.take<std::uint32_t>() % (kMostSlots * page_size());
      file_.write(at, input.bytes(input.byte()));
    }
  }

  void read(std::uint8_t seed) {
    std::vector<std::byte> page(page_size());
    if (reader_->read(digest_of(seed), page)) require(page == page_of(seed));
  }

  void write(std::uint8_t what, std::uint8_t seed, Input& input) {
    const ContentDigest digest = digest_of(seed);
    switch (what) {
      case 4: {
        const double score = score_of(input);
        const auto inserted = writer_->insert(digest, page_of(seed), score);
        require((inserted == PageShare::Inserted::kWrong) == !std::isfinite(score));
        break;
      }
      case 5:
        require(writer_->insert(digest, page_of(static_cast<std::uint8_t>(seed + 1)), 1) ==
                PageShare::Inserted::kWrong);
        break;
      case 6:
        (void)writer_->holds(digest);
        break;
      case 7:
        (void)writer_->set_score(digest, score_of(input));
        break;
      case 8:
        writer_->remove(digest);
        require(!writer_->holds(digest));
        break;
      case 9:
        budget_ = seed * page_size();
        writer_->set_budget(budget_);
        break;
      default:
        (void)writer_->verify(seed % 16);
    }
  }

  void check_writer() const {
    const PageShareStats stats = writer_->stats();
    require(stats.pages == writer_->digests().size());
    require(stats.unverified <= stats.pages);
    require(stats.pages == 0 || stats.bytes_used <= budget_);
    require(stats.memory_bytes <= kMostMemory);
  }

  // Just read.
  void check_reader() const {
    if (!reader_) return;
    const std::vector<std::uint64_t> names = reader_->names();
    require(names.size() <= layout_.groups_in(file_.size()) * layout_.group_slots());
    for (const std::uint64_t name : names) require(reader_->lists(name));
    require(reader_->memory_bytes() <= kMostMemory);
  }

  // Some 60 bytes for each of the slots that an input can name, and as much again for vectors that grow.
  static constexpr std::uint64_t kMostMemory = 1 << 20;
  const File& file_;
  const ShareLayout layout_;
  std::uint64_t budget_ = 0;
  bool tampered_ = false;
  std::shared_ptr<PageShareReader> reader_;
  std::unique_ptr<PageShare> writer_;
};

}  // namespace
}  // namespace memferry::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const memferry::fuzz::File file;
  memferry::fuzz::Input input(data, size);
  memferry::fuzz::World world(file, input);
  world.open();
  for (std::size_t steps = 0; steps < memferry::fuzz::kMostSteps && !input.empty(); ++steps)
    world.step(input);
  world.settle();
  return 0;
}
