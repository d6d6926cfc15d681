#include "bind/region_image.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <vector>

#include "bind/region_digest.h"
#include "os/regular_file.h"
#include "os/sys_error.h"
#include "os/unique_fd.h"
#include "page/racy_read.h"
#include "page/zero.h"
#include "wire/frame.h"

namespace memferry::bind {
namespace {

constexpr std::uint64_t kPieceBytes = 256 * 1024;

void check(const Region& region, PageRun run) {
  if (!wire::run_inside(run.first.value, run.count, region.pages()))
    throw std::out_of_range("pages outside the region");
}

// Visits the run in pieces that are contiguous in memory, until visit gives false.
template <typename Visit>
void in_runs(const Region& region, const RegionUse& use, PageRun run, const char* operation, Visit visit) {
  const std::uint64_t most = std::max<std::uint64_t>(1, kPieceBytes / region.page_size());
  for (PageNumber at = run.first; at < run.end();) {
    if (use.revoked()) throw RegionGone(operation);
    const PageRun piece = region.contiguous_run({at, std::min(most, run.end().value - at.value)});
    if (!visit(piece)) return;
    at = piece.end();
  }
}

template <typename Visit>
void in_pieces(const Region& region, const RegionUse& use, PageRun run, const char* operation, Visit visit) {
  if (region.remote())
    throw std::invalid_argument("private memory of another process cannot be filled from here");
  in_runs(region, use, run, operation,
          [&](PageRun piece) { return visit(region.contiguous(piece), piece.first); });
}

}  // namespace

std::uint64_t fill_from_file(const std::shared_ptr<Region>& region, const std::string& path,
                             std::uint64_t offset, PageRun run) {
  const RegionUse use(region, "fill");
  check(*region, run);
  const UniqueFd file = open_regular(path, O_RDONLY);
  std::uint64_t filled = 0;
  in_pieces(*region, use, run, "fill", [&](std::span<std::byte> piece, PageNumber) {
    std::size_t done = 0;
    while (done < piece.size()) {
      const ssize_t got = ::pread(file.get(), piece.data() + done, piece.size() - done,
                                  static_cast<off_t>(offset + filled + done));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw_errno("pread");
      if (got == 0) break;
      done += static_cast<std::size_t>(got);
    }
    filled += done;
    return done == piece.size();
  });
  return filled;
}

std::uint64_t fill_from_region(const std::shared_ptr<Region>& region, const std::shared_ptr<Region>& from,
                               PageRun run) {
  const RegionUse use(region, "fill");
  const RegionUse reading(from, "fill");
  check(*region, run);
  (void)from->check_not_missing("fill");
  from->check_not_lost("fill");
  std::uint64_t filled = 0;
  in_pieces(*region, use, run, "fill", [&](std::span<std::byte> piece, PageNumber first) {
    const std::uint64_t page_size = region->page_size();
    for (std::size_t done = 0; done < piece.size();) {
      const PageNumber at{first.value + done / page_size};
      if (at.value >= from->pages() || reading.revoked()) return false;
      const PageRun part = from->contiguous_run({at, (piece.size() - done) / page_size});
      read_run(*from, part, piece.data() + done);
      done += part.count * page_size;
      filled += part.count * page_size;
    }
    return true;
  });
  return filled;
}

void save_to_file(const std::shared_ptr<Region>& region, const std::string& path, PageRun run) {
  const RegionUse use(region, "save");
  check(*region, run);
  (void)region->check_not_missing("save");
  region->check_not_lost("save");
  const UniqueFd file = open_regular(path, O_WRONLY);
  const std::uint64_t page_size = region->page_size();
  std::vector<std::byte> copy(std::max(kPieceBytes, page_size));
  in_runs(*region, use, run, "save", [&](PageRun piece) {
    const PageNumber first = piece.first;
    read_run(*region, piece, copy.data());
    const std::span<const std::byte> bytes(copy.data(), static_cast<std::size_t>(piece.count * page_size));
    // Whole runs of pages with content go out by one call each.
    for (std::size_t at = 0; at < bytes.size();) {
      if (is_zero(bytes.subspan(at, page_size))) {
        at += page_size;
        continue;
      }
      std::size_t end = at + page_size;
      while (end < bytes.size() && !is_zero(bytes.subspan(end, page_size))) end += page_size;
      while (at < end) {
        const ssize_t wrote = ::pwrite(file.get(), bytes.data() + at, end - at,
                                       static_cast<off_t>(first.value * page_size + at));
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote <= 0) throw_errno("pwrite");
        at += static_cast<std::size_t>(wrote);
      }
    }
    return true;
  });
}

}  // namespace memferry::bind
