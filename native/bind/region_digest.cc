#include "bind/region_digest.h"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "bind/js_error.h"
#include "page/racy_read.h"

namespace memferry::bind {

namespace {

constexpr std::uint64_t kPieceBytes = 256 * 1024;  // stays in the second-level cache

}  // namespace

bool read_piece(std::span<std::byte> from, std::byte* to, PageNumber first) {
  std::size_t done = 0;
  while (done < from.size()) {
    const iovec local{to + done, from.size() - done};
    const iovec remote{from.data() + done, from.size() - done};
    const ssize_t got = ::process_vm_readv(::getpid(), &local, 1, &remote, 1, 0);
    if (got > 0) {
      done += static_cast<std::size_t>(got);
    } else if (got < 0 && (errno == EPERM || errno == ENOSYS)) {
      return false;
    } else if (!(got < 0 && errno == EINTR)) {
      throw CodedError("UNREADABLE", "a page cannot be read, in the " + std::to_string(from.size() >> 10U) +
                                         " KiB from page " + std::to_string(first.value) + " on");
    }
  }
  return true;
}

void read_run(const Region& region, PageRun run, std::byte* to) {
  const std::size_t bytes = static_cast<std::size_t>(run.count * region.page_size());
  if (region.remote()) {
    if (region.owner()->read_some(region.owner_address(run.first), {to, bytes}) == bytes) return;
    throw CodedError("UNREADABLE", "a page cannot be read, in the " + std::to_string(bytes >> 10U) +
                                       " KiB from page " + std::to_string(run.first.value) + " on");
  }
  if (region.may_shrink()) return region.read_file(run, {to, bytes});
  const std::span<std::byte> piece = region.contiguous(run);
  if (!read_piece(piece, to, run.first)) racy_copy(to, piece.data(), piece.size());
}

Hash128 region_digest(const std::shared_ptr<Region>& region) {
  const RegionUse use(region, "digest");
  const std::uint64_t pages = region->pages();
  const std::uint64_t page_size = region->page_size();
  const std::uint64_t piece_pages = std::max<std::uint64_t>(1, kPieceBytes / page_size);
  std::vector<std::uint64_t> hashes(pages);
  std::vector<std::byte> buffer(piece_pages * page_size);
  for (std::uint64_t page = 0; page < pages;) {
    if (use.revoked()) throw RegionGone("digest");
    const PageNumber first{page};
    const PageRun piece = region->contiguous_run({first, std::min(piece_pages, pages - page)});
    read_run(*region, piece, buffer.data());
    hash_pages({buffer.data(), piece.count * page_size}, page_size, hashes.data() + page);
    page += piece.count;
  }
  return xxh3_128(std::as_bytes(std::span(hashes)));
}

}  // namespace memferry::bind
