// A destination that starts from a base: bytes that somebody put into the regions before the first page. Nothing of
// them counts as arrived until the source has confirmed it by hash: to every other part of the receiver such a page is
// one that is present and was never received, which the switch discards and a completion waits for.
//
// Thread: channel 0's.
#include <time.h>

#include <algorithm>
#include <cstring>

#include "transfer/receiver_impl.h"

namespace memferry {
namespace {

// Answered at a time while hashing, so that the source hears something: about 10 ms.
constexpr std::uint64_t kNodesAtOnce = 32;

std::uint64_t thread_cpu_us() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000 + static_cast<std::uint64_t>(now.tv_nsec) / 1000;
}

}  // namespace

void Receiver::Impl::take_bases() {
  trees.resize(maps.size());
  for (std::size_t region = 0; region < maps.size(); ++region) {
    if (base_of(region) == ReceiverConfig::Base::kNone) continue;
    ArrivalMap& map = *maps[region];
    trees[region] = std::make_unique<HashTree>(config.regions[region], map.pages(), config.base_key);
    // Whoever fills it populates it; what is not confirmed must be found by the switch's discard.
    map.present.set_run({PageNumber{0}, map.pages()});
    base_awaited = true;
  }
}

bool Receiver::Impl::may_compare(Conversation& with) {
  if (with.channel.index != 0) return with.bad("bases are compared on channel 0");
  if (base_awaited && base_sampled == Sampled::kNo) return with.bad("a comparison before the base is there");
  if (state != State::kFilling) return with.bad("a comparison after the switch");
  return true;
}

// As protocol/base-sample.ts lays them out and BaseComparison::choose() asks for them.
bool Receiver::Impl::in_sample(std::uint32_t region, std::uint64_t node) const {
  std::uint64_t nodes = 0;
  std::uint64_t ordinal = node;
  for (std::uint32_t each = 0; each < trees.size(); ++each) {
    if (!trees[each]) continue;
    if (each < region) ordinal += trees[each]->nodes();
    nodes += trees[each]->nodes();
  }
  const std::uint64_t wanted = std::clamp<std::uint64_t>((nodes + 63) / 64, 1, kMostSampled);
  const std::uint64_t step = std::max<std::uint64_t>(1, (nodes + wanted - 1) / wanted);
  return ordinal % step == step / 2;
}

bool Receiver::Impl::on_tree_request(Conversation& with, const wire::FrameHeader& header) {
  if (!with.check_no_payload(header) || !may_compare(with)) return false;
  if (header.region >= trees.size() || !trees[header.region])
    return with.bad("hashes of a region without a base");
  HashTree& tree = *trees[header.region];
  const NodeRun nodes = tree.nodes_of(header.first_page, header.page_count);
  if (nodes.count == 0) return with.bad("hashes of a run that is none of whole nodes");
  const bool kept = header.tag != wire::kTreeEstimate;
  if (!kept) {
    // Nothing of it is kept: it would be hashed again and again. (It may come when the base is there by now.)
    if (nodes.count > most_asked_about) return with.bad("more questions about a base than its sample has");
    most_asked_about -= nodes.count;
  }
  if (base_awaited) {
    if (kept && base_sampled != Sampled::kStays) return with.bad("a comparison with what still changes");
    for (std::uint64_t node = nodes.first; node < nodes.end(); ++node) {
      // The owner may be writing these just now: hashes of anything, which stay.
      if (!in_sample(header.region, node)) return with.bad("more than the sample before the base is there");
    }
  }
  // One answer fits into a frame, whatever the pages' size.
  const std::uint64_t hashes = wire::max_payload(page_size) / sizeof(wire::TreeHash);
  const std::uint64_t most = std::min(kNodesAtOnce, hashes / wire::kTreeNodePages);
  for (std::uint64_t node = nodes.first; node < nodes.end();) {
    const NodeRun part{node, std::min(most, nodes.end() - node)};
    const std::uint64_t started = thread_cpu_us();
    std::vector<std::uint64_t> passing;
    for (; node < part.end(); ++node) {
      if (closing) return with.lost({wire::IoResult::Kind::kCut, 0});
      if (!kept && !tree.hashed(node)) passing.push_back(node);
      tree.hash(node, nullptr);
    }
    const std::uint64_t cpu_us = thread_cpu_us() - started;
    base_hash_us.fetch_add(cpu_us, std::memory_order_relaxed);
    tree_bytes = std::max<std::uint64_t>(tree_bytes, tree.memory_bytes());
    const bool sent = send_hashes(with, header, part, cpu_us);
    for (const std::uint64_t each : passing) tree.forget(each);
    if (!sent) return false;
  }
  return true;
}

bool Receiver::Impl::send_hashes(Conversation& with, const wire::FrameHeader& request, NodeRun nodes,
                                 std::uint64_t cpu_us) {
  const HashTree& tree = *trees[request.region];
  const PageRun run = tree.pages_of(nodes);
  const auto hashes = request.tag == wire::kTreeNodes ? tree.node_hashes(nodes) : tree.page_hashes(run);
  const auto payload = std::as_bytes(hashes);
  wire::FrameHeader header =
      wire::make_header(wire::FrameType::kTree, request.region, run, request.tag | cpu_us << 8);
  wire::seal(header, payload);
  std::array<iovec, 2> buffers{iovec{&header, sizeof header},
                               iovec{const_cast<std::byte*>(payload.data()), payload.size()}};
  const wire::IoResult io = with.stream.send_all(buffers);
  return io.done() || with.lost(io);
}

bool Receiver::Impl::on_same(Conversation& with, const wire::FrameHeader& header) {
  if (header.region >= trees.size() || !trees[header.region])
    return with.bad("equal pages of a region without a base");
  if (!may_compare(with)) return false;
  std::vector<std::byte>& staging = with.channel.staging;
  if (!with.read_checked_payload(header, staging)) return false;
  ArrivalMap& map = *maps[header.region];
  const HashTree& tree = *trees[header.region];
  for (std::size_t at = 0; at < staging.size(); at += sizeof(wire::WireRun)) {
    wire::WireRun wanted;
    std::memcpy(&wanted, staging.data() + at, sizeof wanted);
    if (!wire::run_inside(wanted.first_page, wanted.page_count, tree.pages()))
      return with.bad("equal pages outside the region");
    const PageRun run{PageNumber{wanted.first_page}, wanted.page_count};
    for (std::uint64_t node = run.first.value / wire::kTreeNodePages;
         node <= (run.end().value - 1) / wire::kTreeNodePages; ++node) {
      if (!tree.hashed(node)) return with.bad("equal pages that were not compared");
      if (base_awaited && !in_sample(header.region, node))
        return with.bad("equal pages outside the sample before the base is there");
    }
    // Received, discarded or on their way: these are not the base's any more.
    if (map.received.count(run) > 0 || map.suspect.count(run) > 0 || map.arriving.count(run) > 0 ||
        map.present.count(run) != run.count) {
      return with.bad("equal pages that have been sent as well");
    }
    // Before they count as received, so that a complete region has a complete digest.
    map.keep_hashes(run, tree.xxh3(run));
    map.received.set_run(run);
    pages_from_base.fetch_add(run.count, std::memory_order_relaxed);
  }
  return true;
}

bool Receiver::Impl::on_base_end(Conversation& with, const wire::FrameHeader& header) {
  if (!with.check_no_payload(header) || !may_compare(with)) return false;
  if (base_awaited) return with.bad("the end of a comparison before the base is there");
  if (header.tag != 0) {
    // While the guest still runs at the source: thousands of single pages would be dropped during the downtime.
    if (filling_frames != 0) return with.bad("the end of a comparison while pages are in flight");
    std::unique_lock<std::mutex> filling;
    if (gather) filling = std::unique_lock(gather->filling());
    for (std::uint32_t region = 0; region < maps.size(); ++region) {
      if (trees[region]) with.channel.filler->discard_unreceived(region, *maps[region]);
    }
  }
  for (auto& tree : trees) tree.reset();
  return true;
}

bool Receiver::Impl::on_probe(Conversation& with, const wire::FrameHeader& header) {
  if (with.channel.demand || state != State::kFilling) return with.bad("a probe where there is none");
  if (!intake.wait_and_debit(header.payload_bytes, with.channel.thread)) return false;
  return with.read_checked_payload(header, with.channel.staging);
}

}  // namespace memferry
