// What a destination answers to a source, as the parts of the source take it that keep it: hashes of its base
// (BaseComparison), names of pages that it has, and references that came to nothing.
//
// Input: u8 what, then frames (frame_script.h), of which those count that receive_frame() would let through.
#include <memory>
#include <vector>

#include "frame_script.h"
#include "page/region.h"
#include "transfer/base_comparison.h"
#include "transfer/known_names.h"
#include "transfer/page_referrer.h"
#include "transfer/send_queue.h"

namespace memferry::fuzz {
namespace {

using wire::FrameType;

// Of a node and a part of one, and of less than one.
constexpr std::uint64_t kPages = 270;
constexpr std::uint64_t kFewPages = 3;

struct Guest {
  Guest() {
    for (const std::uint64_t pages : {kPages, kFewPages}) {
      regions.push_back(Region::allocate(pages * system_page_size()));
      for (std::uint64_t page = 0; page < pages; page += 7) *bytes(*regions.back(), page) = std::byte{1};
    }
  }
  static std::byte* bytes(const Region& region, std::uint64_t page) {
    return region.contiguous({PageNumber{page}, 1}).data();
  }
  std::vector<std::shared_ptr<Region>> regions;
};

const KeyedHashKey kKey{1};

const Guest& guest() {
  static const Guest made;
  return made;
}

bool lets_through(const FrameScript::Frame& frame) {
  return !frame.cut && wire::malformed(frame.header, system_page_size()) == nullptr;
}
std::span<const std::byte> payload(const FrameScript::Frame& frame) {
  return std::span(frame.bytes).subspan(sizeof frame.header);
}

// What a destination with the same pages answers.
const HashTree& tree_of(std::uint32_t region) {
  static const std::array<std::unique_ptr<HashTree>, 2> trees = [] {
    std::array<std::unique_ptr<HashTree>, 2> made;
    for (std::size_t i = 0; i < made.size(); ++i) {
      made[i] = std::make_unique<HashTree>(guest().regions[i], guest().regions[i]->pages(), kKey);
      for (std::uint64_t node = 0; node < made[i]->nodes(); ++node) made[i]->hash(node, nullptr);
    }
    return made;
  }();
  return *trees.at(region);
}

// Answers come while the questions are being written: u8 0: no more of them now; below 128: the right ones for some nodes
// (from 64 on, but for a byte of one hash, u8); else a frame.
void hashes(Input& input, CompareDepth depth) {
  const std::vector<std::uint64_t> base = {kPages, kFewPages};
  BaseComparison comparison(guest().regions, base, kKey, std::chrono::milliseconds(0));
  FrameScript script;
  std::vector<wire::FrameHeader> asked;
  std::vector<std::uint64_t> answered;
  std::size_t at = 0;
  bool cut = false;

  const auto answer_right = [&](std::uint64_t most, std::uint8_t wrong) {
    while (at < asked.size() && answered[at] == asked[at].page_count) ++at;
    if (at >= asked.size()) return;
    const wire::FrameHeader& question = asked[at];
    const HashTree& of = tree_of(question.region);
    const std::uint64_t left = question.page_count - answered[at];
    std::uint64_t count = std::min(left, (1 + most) * wire::kTreeNodePages);
    const PageRun run{PageNumber{question.first_page + answered[at]}, count};
    const auto nodes = of.nodes_of(run.first.value, run.count);
    const auto right = question.tag == wire::kTreeNodes ? of.node_hashes(nodes) : of.page_hashes(run);
    std::vector<KeyedHash> said(right.begin(), right.end());
    if (wrong != 0) said[wrong % said.size()][0] ^= wrong;
    wire::FrameHeader header = wire::make_header(FrameType::kTree, question.region, run, question.tag);
    header.payload_bytes = static_cast<std::uint32_t>(said.size() * sizeof(KeyedHash));
    require(wire::malformed(header, system_page_size()) == nullptr);
    require(comparison.answered(header, std::as_bytes(std::span(said))).empty());
    answered[at] += count;
  };

  std::uint64_t same_pages = 0;
  BaseComparison::Way way;
  way.say = [&](std::span<const std::byte> bytes) {
    for (std::size_t from = 0; from < bytes.size();) {
      wire::FrameHeader header{};
      std::memcpy(&header, &bytes[from], sizeof header);
      require(wire::malformed(header, system_page_size()) == nullptr);
      if (header.type == static_cast<std::uint16_t>(FrameType::kTreeRequest)) {
        asked.push_back(header);
        answered.push_back(0);
      }
      from += sizeof header + header.payload_bytes;
    }
    while (!input.empty() && !cut) {
      const std::uint8_t what = input.byte();
      if (what == 0) break;
      if (what < 128) {
        answer_right(what % 4, what < 64 ? std::uint8_t{0} : input.byte());
        continue;
      }
      const FrameScript::Frame frame = script.next(input);
      if (!lets_through(frame) || frame.header.type != static_cast<std::uint16_t>(FrameType::kTree)) continue;
      const std::uint64_t before = comparison.stats().bytes_in;
      if (comparison.answered(frame.header, payload(frame)).empty()) {
        require(at < asked.size() || !asked.empty());
        while (at < asked.size() && answered[at] == asked[at].page_count) ++at;
        require(at < asked.size());
        answered[at] += frame.header.page_count;
        require(answered[at] <= asked[at].page_count);
        require(comparison.stats().bytes_in == before + frame.bytes.size());
      } else {
        require(comparison.stats().bytes_in == before);
        cut = true;
      }
    }
    return !cut;
  };
  way.go_on = [&] { return !cut; };
  way.touching = [](const std::function<void()>& act) {
    act();
    return true;
  };
  way.same = [&](std::uint32_t region, PageRun run, std::span<const std::uint64_t> xxh3) {
    require(region < base.size() && wire::run_inside(run.first.value, run.count, base[region]));
    require(xxh3.size() == run.count);
    same_pages += run.count;
  };
  way.cut = [&](const std::string&) { cut = true; };
  const std::vector<const AtomicBitmap*> untouched(base.size(), nullptr);
  (void)comparison.run(depth == CompareDepth::kAll ? ~std::uint64_t{0} : 2, depth, untouched, way);
  require(same_pages <= kPages + kFewPages && comparison.stats().pages_same == same_pages);
  require(comparison.stats().pages_alike <= comparison.stats().pages_estimated);
  if (depth == CompareDepth::kEstimate) require(same_pages == 0 && comparison.stats().pages_compared == 0);
  // What comes late was asked for by nobody.
  wire::FrameHeader late = wire::make_header(FrameType::kTree, 0, {PageNumber{0}, kPages}, wire::kTreePages);
  require(!comparison.answered(late, {}).empty());
}

void references(Input& input) {
  SendQueue queue(guest().regions);
  References references(ContentKey{1}, queue);
  PageReferrer referrer(references, system_page_size());
  FrameScript script;
  AtomicBitmap referred(kPages);
  while (!input.empty()) {
    const std::uint8_t what = input.byte();
    if (what < 64) {
      const PageRun run{PageNumber{what}, 1 + std::uint64_t{input.byte()} % (kPages - what)};
      referrer.refer(0, run, 0);
      referred.set_run(run);
      continue;
    }
    const FrameScript::Frame frame = script.next(input);
    if (!lets_through(frame)) continue;
    const wire::FrameHeader& header = frame.header;
    // A frame's payload lies in a vector of its own.
    const auto bytes = payload(frame);
    const std::vector<std::byte> names(bytes.begin(), bytes.end());
    if (header.type == static_cast<std::uint16_t>(FrameType::kKnown)) {
      references.told(names);
    } else if (header.type == static_cast<std::uint16_t>(FrameType::kUnresolved)) {
      if (header.region != 0 || !wire::run_inside(header.first_page, header.page_count, kPages)) continue;
      const PageRun run{PageNumber{header.first_page}, header.page_count};
      const bool sent = referred.clear_run(run) == run.count;
      require(references.unresolved(0, run, names).empty() == sent);
    }
  }
  require(references.stats().pages <= kPages * 4096);
}

// The set against a plain one.
void names(Input& input) {
  KnownNames known;
  std::set<std::uint64_t> model;
  while (!input.empty()) {
    const std::uint8_t what = input.byte();
    const std::uint64_t name = (what & 4) != 0 ? input.take<std::uint64_t>() : input.byte();
    const std::uint64_t stored = name == 0 ? 1 : name;
    std::vector<bool> found;
    const std::array<wire::KnownName, 1> one{name};
    if (what % 3 == 0) {
      known.add(one);
      model.insert(stored);
    } else if (what % 3 == 1) {
      known.erase(name);
      model.erase(stored);
    }
    known.look_up(one, found);
    require(found.size() == 1 && found[0] == model.contains(stored));
    require(known.size() == model.size() && known.empty() == model.empty());
  }
}

}  // namespace
}  // namespace memferry::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace memferry::fuzz;
  Input input(data, size);
  switch (input.byte() % 5) {
    case 0:
      hashes(input, memferry::CompareDepth::kAll);
      break;
    case 1:
      hashes(input, memferry::CompareDepth::kSample);
      break;
    case 2:
      references(input);
      break;
    case 4:
      hashes(input, memferry::CompareDepth::kEstimate);
      break;
    default:
      names(input);
  }
  return 0;
}
