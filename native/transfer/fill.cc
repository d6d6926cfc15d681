#include "transfer/fill.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "os/kernel_abi.h"
#include "os/sys_error.h"
#include "page/hash.h"

namespace memferry {
namespace {

// Small enough to be hashed from the L2 cache, large enough for the system call not to count.
constexpr std::uint64_t kPieceBytes = 64 * 1024;
// Zeroing costs less than dropping and touching again, up to about this much.
constexpr std::uint64_t kDropBytes = 64 * 1024;

}  // namespace

Filler::Filler(const std::vector<Backing>& backings, TouchAhead* ahead) : ahead_(ahead) {
  discarders_.reserve(backings.size());
  for (const Backing backing : backings) discarders_.emplace_back(backing);
}

wire::IoResult Filler::pages(const Read& read, const wire::FrameHeader& header, ArrivalMap& map,
                             bool& verified) {
  const PageRun run{PageNumber{header.first_page}, header.page_count};
  const std::uint64_t page_size = map.page_size();
  const std::uint64_t piece_pages = std::max<std::uint64_t>(kPieceBytes / page_size, 1);
  hashes_.resize(run.count);
  bool decoded = true;
  if (wire::encoding_of(header) != 0) {
    const wire::IoResult io = receive_encoded(read, header, map, decoded);
    if (!io.done()) return io;
  } else {
    map.zero.clear_run(run);
    populate(map, run);
    std::uint64_t done = 0;
    while (done < run.count) {
      const PageRun piece{PageNumber{run.first.value + done}, std::min(piece_pages, run.count - done)};
      const std::span<std::byte> memory = map.region().contiguous(piece);
      const wire::IoResult io = read(memory);
      if (!io.done()) {
        // Neither the old content nor the new: it must come again, should this migration go on at all.
        map.received.clear_run(run);
        return io;
      }
      hash_pages(memory, page_size, hashes_.data() + done);
      done += memory.size() / page_size;
    }
  }
  verified = decoded && wire::pages_checksum(header, hashes_) == header.checksum;
  if (!verified) {
    map.received.clear_run(run);
    map.suspect.set_run(run);
    map.unnamed.set_run(run);
    return {};
  }
  map.keep_hashes(run, hashes_);
  map.suspect.clear_run(run);
  map.received.set_run(run);
  if (ahead_ != nullptr) ahead_->arrived(header.region, run);
  return {};
}

wire::IoResult Filler::receive_encoded(const Read& read, const wire::FrameHeader& header, ArrivalMap& map,
                                       bool& decoded) {
  const PageRun run{PageNumber{header.first_page}, header.page_count};
  payload_.resize(header.payload_bytes);
  const wire::IoResult io = read(payload_);
  if (!io.done()) {
    map.received.clear_run(run);
    return io;
  }
  // A delta is against what is here; what is not here, or is zeros that nothing lies behind, is no base.
  const bool delta = wire::encoding_of(header) == wire::kFlagDelta;
  decoded = !delta || (map.received.count(run) == run.count && map.zero.count(run) == 0);
  map.zero.clear_run(run);
  if (!decoded) return {};
  populate(map, run);
  decoded = decode(header, map, run);
  if (!decoded) return {};
  std::uint64_t* hashes = hashes_.data();
  map.for_each_part(run, [&](std::span<std::byte> part, PageNumber) {
    hash_pages(part, map.page_size(), hashes);
    hashes += part.size() / map.page_size();
  });
  return {};
}

// Nobody else uses these pages: a codec may read back what it has written there.
bool Filler::decode(const wire::FrameHeader& header, ArrivalMap& map, PageRun run) {
  const std::uint16_t encoding = wire::encoding_of(header);
  const std::span<std::byte> memory = map.region().contiguous(run);
  if (memory.size() == run.count * map.page_size()) return decoder_.decode(encoding, payload_, memory);
  scattered_.resize(static_cast<std::size_t>(run.count * map.page_size()));
  std::byte* at = scattered_.data();
  if (encoding == wire::kFlagDelta) {
    map.for_each_part(run, [&](std::span<std::byte> part, PageNumber) {
      std::memcpy(at, part.data(), part.size());
      at += part.size();
    });
  }
  if (!decoder_.decode(encoding, payload_, scattered_)) return false;
  at = scattered_.data();
  map.for_each_part(run, [&](std::span<std::byte> part, PageNumber) {
    std::memcpy(part.data(), at, part.size());
    at += part.size();
  });
  return true;
}

// One system call for the run instead of a fault for each page.
void Filler::populate(ArrivalMap& map, PageRun run) const {
  if (map.present.count(run) == run.count) return;
  map.present.set_run(run);  // first: should this fail in the middle, some of it is populated
  map.for_each_part(run, [](std::span<std::byte> part, PageNumber) {
    if (::madvise(part.data(), part.size(), abi::kMadvPopulateWrite) == 0) return;
    // EINVAL: a kernel before 5.14; receiving touches the pages then. EAGAIN, EINTR: likewise.
    if (errno == ENOMEM || errno == EFAULT || errno == EHWPOISON) throw_errno("madvise(MADV_POPULATE_WRITE)");
  });
}

void Filler::zeros(std::uint32_t region, ArrivalMap& map, PageRun run) {
  const PageNumber end = run.end();
  const std::uint64_t drop_pages = std::max<std::uint64_t>(kDropBytes / map.page_size(), 1);
  for (PageNumber from = run.first;;) {
    const auto present = map.present.next_set(from, end, run.count);
    if (!present) break;
    if (present->count >= drop_pages) {
      drop_present(region, map, *present);
    } else {
      map.for_each_part(
          *present, [](std::span<std::byte> part, PageNumber) { std::memset(part.data(), 0, part.size()); });
    }
    from = present->end();
  }
  sweep();
  map.keep_zero_hashes(run);
  map.zero.set_run(run);
  map.suspect.clear_run(run);
  map.received.set_run(run);
}

std::uint64_t Filler::discard(std::uint32_t region, ArrivalMap& map, PageRun run) {
  const std::uint64_t received = map.received.clear_run(run);
  map.zero.clear_run(run);
  map.suspect.clear_run(run);
  for (PageNumber from = run.first;;) {
    const auto present = map.present.next_set(from, run.end(), run.count);
    if (!present) return received;
    drop_present(region, map, *present);
    from = present->end();
  }
}

void Filler::discard_unreceived(std::uint32_t region, ArrivalMap& map, bool whole) {
  const PageNumber end{map.pages()};
  for (PageNumber from{0};;) {
    const auto missing = map.received.next_clear(from, end, map.pages());
    if (!missing) break;
    if (whole) drop_present(region, map, *missing);
    discard(region, map, *missing);
    from = missing->end();
  }
  sweep();
}

void Filler::drop_present(std::uint32_t region, ArrivalMap& map, PageRun run) {
  map.for_each_part(run, [&](std::span<std::byte> part, PageNumber) {
    discarders_[region].add(Address::of(part.data()), part.size());
  });
  map.present.clear_run(run);
}

void Filler::sweep() {
  for (Discarder& discarder : discarders_) discarder.flush();
}

}  // namespace memferry
