// Candidates for the hash by which deduplication knows pages: each over 4 KiB pages that do not fit into a cache, the
// best of several passes, on one thread. Keyed ones start from a prepared state, as a server does.
//
//   content_hash [--bytes N] [--passes N]
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/sha.h>
#include <string.h>

#include "floor.h"
#define XXH_INLINE_ALL
#include <xxhash.h>

enum { PAGE = 4096 };
static uint8_t key[32];
static uint8_t sum[64];

static void use(const uint8_t *digest, size_t bytes) {
  for (size_t i = 0; i < bytes && i < sizeof sum; i++) sum[i] ^= digest[i];
}

static void digest_with(const EVP_MD *md, EVP_MD_CTX *ctx, const char *page) {
  uint8_t out[EVP_MAX_MD_SIZE];
  unsigned length = 0;
  EVP_DigestInit_ex2(ctx, md, NULL);
  EVP_DigestUpdate(ctx, page, PAGE);
  EVP_DigestFinal_ex(ctx, out, &length);
  use(out, length);
}

static void mac_with(EVP_MAC_CTX *prepared, const char *page) {
  uint8_t out[64];
  size_t length = 0;
  EVP_MAC_CTX *ctx = EVP_MAC_CTX_dup(prepared);
  EVP_MAC_update(ctx, (const uint8_t *)page, PAGE);
  EVP_MAC_final(ctx, out, &length, sizeof out);
  EVP_MAC_CTX_free(ctx);
  use(out, length);
}

static SHA256_CTX inner, outer;
static void hmac_by_hand(const char *page) {
  uint8_t out[32];
  SHA256_CTX state = inner;
  SHA256_Update(&state, page, PAGE);
  SHA256_Final(out, &state);
  state = outer;
  SHA256_Update(&state, out, sizeof out);
  SHA256_Final(out, &state);
  use(out, sizeof out);
}

static void xxh3_128(const char *page) {
  const XXH128_hash_t hash = XXH3_128bits(page, PAGE);
  use((const uint8_t *)&hash, sizeof hash);
}

static EVP_MAC_CTX *prepared(const char *name, const char *digest) {
  EVP_MAC *mac = EVP_MAC_fetch(NULL, name, NULL);
  if (!mac) return NULL;
  EVP_MAC_CTX *ctx = EVP_MAC_CTX_new(mac);
  OSSL_PARAM params[2] = {OSSL_PARAM_construct_end(), OSSL_PARAM_construct_end()};
  if (digest) params[0] = OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, (char *)digest, 0);
  return EVP_MAC_init(ctx, key, sizeof key, params) ? ctx : NULL;
}

int main(int argc, char **argv) {
  const uint64_t bytes = option_number(argc, argv, "--bytes", 64u << 20);
  const uint64_t passes = option_number(argc, argv, "--passes", 3);
  char *memory = map_fresh(bytes);
  fill_random(memory, bytes, 1);
  memcpy(key, memory, sizeof key);
  uint8_t block[64];
  for (int pad = 0; pad < 2; pad++) {
    SHA256_CTX *to = pad ? &outer : &inner;
    memset(block, pad ? 0x5c : 0x36, sizeof block);
    for (size_t i = 0; i < sizeof key; i++) block[i] ^= key[i];
    SHA256_Init(to);
    SHA256_Update(to, block, sizeof block);
  }
  EVP_MD_CTX *ctx = EVP_MD_CTX_new();
  const struct {
    const char *name;
    EVP_MD *md;
    EVP_MAC_CTX *mac;
    void (*plain)(const char *);
  } candidates[] = {
    {"hmac-sha256, copied by hand", NULL, NULL, hmac_by_hand},
    {"hmac-sha256, EVP_MAC", NULL, prepared("HMAC", "SHA256"), NULL},
    {"sha256", EVP_MD_fetch(NULL, "SHA256", NULL), NULL, NULL},
    {"sha1", EVP_MD_fetch(NULL, "SHA1", NULL), NULL, NULL},
    {"sha512-256", EVP_MD_fetch(NULL, "SHA512-256", NULL), NULL, NULL},
    {"sha3-256", EVP_MD_fetch(NULL, "SHA3-256", NULL), NULL, NULL},
    {"blake2b512", EVP_MD_fetch(NULL, "BLAKE2B-512", NULL), NULL, NULL},
    {"blake2s256", EVP_MD_fetch(NULL, "BLAKE2S-256", NULL), NULL, NULL},
    {"blake2b, keyed", NULL, prepared("BLAKE2BMAC", NULL), NULL},
    {"blake2s, keyed", NULL, prepared("BLAKE2SMAC", NULL), NULL},
    {"kmac128", NULL, prepared("KMAC128", NULL), NULL},
    {"kmac256", NULL, prepared("KMAC256", NULL), NULL},
    {"xxh3-128, unkeyed", NULL, NULL, xxh3_128},
  };
  printf("{");
  for (size_t c = 0; c < sizeof candidates / sizeof candidates[0]; c++) {
    if (!candidates[c].md && !candidates[c].mac && !candidates[c].plain) continue;
    double best = 0;
    for (uint64_t pass = 0; pass < passes; pass++) {
      const uint64_t start = now_ns();
      for (uint64_t at = 0; at + PAGE <= bytes; at += PAGE) {
        if (candidates[c].plain) candidates[c].plain(memory + at);
        else if (candidates[c].mac) mac_with(candidates[c].mac, memory + at);
        else digest_with(candidates[c].md, ctx, memory + at);
      }
      const double rate = (double)bytes / (double)(now_ns() - start);
      if (rate > best) best = rate;
    }
    printf("%s\"%s\":%.3f", c ? "," : "", candidates[c].name, best);
  }
  printf("}\n");
  return sum[0] == 0 && sum[1] == 1 && sum[2] == 2;
}
