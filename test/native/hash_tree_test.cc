// The keyed hash against a bit-by-bit twin, and a tree of hashes against a naive one.
#include "transfer/hash_tree.h"

#include <gtest/gtest.h>
#include <openssl/evp.h>

#include <cstring>
#include <random>
#include <set>

#include "page/hash.h"
#include "page/keyed_hash.h"

namespace memferry {
namespace {

using Block = std::array<std::uint8_t, 16>;

KeyedHashKey key_of(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  KeyedHashKey key;
  for (auto& byte : key) byte = static_cast<std::uint8_t>(random());
  return key;
}

Block aes(const std::uint8_t* key, const Block& in) {
  Block out{};
  int written = 0;
  EVP_CIPHER_CTX* context = EVP_CIPHER_CTX_new();
  EXPECT_EQ(EVP_EncryptInit_ex(context, EVP_aes_256_ecb(), nullptr, key, nullptr), 1);
  EXPECT_EQ(EVP_EncryptUpdate(context, out.data(), &written, in.data(), 16), 1);
  EVP_CIPHER_CTX_free(context);
  return out;
}

// x * y in GF(2^128) as GCM has it: NIST SP 800-38D, algorithm 1.
Block times(const Block& x, Block y) {
  Block z{};
  for (unsigned bit = 0; bit < 128; ++bit) {
    if ((x[bit / 8] >> (7 - bit % 8) & 1) != 0) {
      for (unsigned i = 0; i < 16; ++i) z[i] ^= y[i];
    }
    const bool carry = (y[15] & 1) != 0;
    for (unsigned i = 15; i > 0; --i) y[i] = static_cast<std::uint8_t>(y[i] >> 1 | (y[i - 1] & 1) << 7);
    y[0] = static_cast<std::uint8_t>(y[0] >> 1);
    if (carry) y[0] ^= 0xe1;
  }
  return z;
}

KeyedHash twin(const KeyedHashKey& key, std::span<const std::byte> bytes, std::uint8_t domain) {
  const Block h = aes(key.data(), {});
  Block y{};
  const auto absorb = [&](const Block& block) {
    for (unsigned i = 0; i < 16; ++i) y[i] ^= block[i];
    y = times(y, h);
  };
  for (std::size_t at = 0; at < bytes.size(); at += 16) {
    Block block{};
    std::memcpy(block.data(), bytes.data() + at, std::min<std::size_t>(16, bytes.size() - at));
    absorb(block);
  }
  Block lengths{};
  const std::uint64_t bits = bytes.size() * 8;
  for (unsigned i = 0; i < 8; ++i) lengths[7 - i] = static_cast<std::uint8_t>(bits >> (8 * i));
  absorb(lengths);
  Block counter{domain};
  counter[15] = 1;
  const Block mask = aes(key.data(), counter);
  for (unsigned i = 0; i < 16; ++i) y[i] ^= mask[i];
  return aes(key.data() + 32, y);
}

std::vector<std::byte> random_memory(std::size_t bytes, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> memory(bytes);
  for (auto& byte : memory) byte = static_cast<std::byte>(random());
  return memory;
}

TEST(KeyedHash, IsWhatABitByBitTwinGives) {
  for (const std::uint64_t seed : {1u, 2u, 3u}) {
    const KeyedHashKey key = key_of(seed);
    KeyedHasher hasher(key);
    for (const std::size_t page : {std::size_t{4096}, std::size_t{16384}}) {
      const auto memory = random_memory(3 * page, seed);
      std::array<KeyedHash, 3> hashes;
      hasher.pages(memory, page, hashes.data());
      for (std::size_t i = 0; i < 3; ++i) {
        EXPECT_EQ(hashes[i], twin(key, std::span(memory).subspan(i * page, page), 0));
      }
      EXPECT_EQ(hasher.node(hashes), twin(key, std::as_bytes(std::span(hashes)), 1));
    }
  }
}

TEST(KeyedHash, EveryByteCountsAndSoDoTheKeyAndTheDomain) {
  auto memory = random_memory(4096, 9);
  const KeyedHashKey key = key_of(4);
  KeyedHasher hasher(key);
  std::set<KeyedHash> seen;
  const auto hash = [&] {
    KeyedHash result;
    hasher.pages(memory, 4096, &result);
    return result;
  };
  seen.insert(hash());
  for (std::size_t at = 0; at < memory.size(); ++at) {
    memory[at] ^= std::byte{0x10};
    EXPECT_TRUE(seen.insert(hash()).second) << "byte " << at;
    memory[at] ^= std::byte{0x10};
  }
  // A node of 256 pages whose hashes are these bytes.
  std::array<KeyedHash, 256> pages;
  std::memcpy(pages.data(), memory.data(), 4096);
  EXPECT_TRUE(seen.insert(hasher.node(pages)).second);
  EXPECT_TRUE(seen.insert(hasher.node(std::span(pages).first(255))).second);
  KeyedHashKey other = key;
  other[63] ^= 1;
  KeyedHash under_another;
  KeyedHasher(other).pages(memory, 4096, &under_another);
  EXPECT_TRUE(seen.insert(under_another).second);
}

std::uint64_t page_size() { return static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)); }

TEST(HashTree, IsANaiveTreesTwinWhateverTheOrderAndTheExtents) {
  constexpr std::uint64_t kPages = 3 * wire::kTreeNodePages + 17;
  // Two extents, the border in the middle of a node.
  auto first = Region::allocate(300 * page_size());
  auto second = Region::allocate((kPages - 300) * page_size());
  auto region = Region::adopt({first->extents()[0], second->extents()[0]}, second->bytes());
  const auto memory = random_memory(static_cast<std::size_t>(kPages * page_size()), 11);
  for (std::uint64_t page = 0; page < kPages; ++page) {
    if (page % 5 != 0)
      std::memcpy(region->address(PageNumber{page}).pointer(), memory.data() + page * page_size(),
                  page_size());
  }
  AtomicBitmap untouched(kPages);
  for (std::uint64_t page = 0; page < kPages; page += 10) untouched.set(PageNumber{page});

  const KeyedHashKey key = key_of(5);
  KeyedHasher naive(key);
  std::vector<KeyedHash> pages(kPages);
  std::vector<std::uint64_t> xxh3(kPages);
  for (std::uint64_t page = 0; page < kPages; ++page) {
    const std::span<const std::byte> bytes(region->address(PageNumber{page}).pointer(), page_size());
    naive.pages(bytes, page_size(), &pages[page]);
    xxh3[page] = xxh3_64(bytes);
  }
  HashTree tree(region, kPages, key);
  ASSERT_EQ(tree.nodes(), 4u);
  for (const std::uint64_t node : {2u, 0u, 3u, 1u, 2u}) tree.hash(node, node % 2 == 0 ? &untouched : nullptr);
  const PageRun all{PageNumber{0}, kPages};
  EXPECT_TRUE(std::ranges::equal(tree.page_hashes(all), pages));
  EXPECT_TRUE(std::ranges::equal(tree.xxh3(all), xxh3));
  for (std::uint64_t node = 0; node < 4; ++node) {
    const PageRun run = tree.pages_of({node, 1});
    EXPECT_EQ(run.count, node == 3 ? 17 : wire::kTreeNodePages);
    EXPECT_EQ(tree.node_hashes({node, 1})[0],
              naive.node(std::span(pages).subspan(run.first.value, run.count)));
  }
  EXPECT_TRUE(tree.zero(PageNumber{5}));
  EXPECT_FALSE(tree.zero(PageNumber{6}));
}

TEST(HashTree, TakesRunsOfWholeNodesOnly) {
  constexpr std::uint64_t kNode = wire::kTreeNodePages;
  auto region = Region::allocate((2 * kNode + 3) * page_size());
  const HashTree tree(region, 2 * kNode + 3, key_of(6));
  const auto nodes = [&](std::uint64_t first, std::uint64_t count) {
    const NodeRun run = tree.nodes_of(first, count);
    return std::pair(run.first, run.count);
  };
  using Nodes = std::pair<std::uint64_t, std::uint64_t>;
  EXPECT_EQ(nodes(0, kNode), Nodes(0, 1));
  EXPECT_EQ(nodes(kNode, kNode + 3), Nodes(1, 2));
  EXPECT_EQ(nodes(2 * kNode, 3), Nodes(2, 1));
  EXPECT_EQ(nodes(0, 2 * kNode + 3), Nodes(0, 3));
  for (const auto& [first, count] : std::vector<Nodes>{{0, 0},
                                                       {0, kNode - 1},
                                                       {1, kNode},
                                                       {2 * kNode, 2},
                                                       {2 * kNode, 4},
                                                       {3 * kNode, kNode},
                                                       {kNode, ~std::uint64_t{0}},
                                                       {~std::uint64_t{0} - kNode + 1, kNode}}) {
    EXPECT_EQ(nodes(first, count).second, 0u) << first << " " << count;
  }
}

}  // namespace
}  // namespace memferry
