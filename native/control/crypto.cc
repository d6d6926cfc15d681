#include "control/crypto.h"

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <openssl/rand.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "control/failure.h"

namespace memferry::control {

namespace {

constexpr std::size_t kTokensABlock = 255;  // HKDF gives no more hashes at a time
constexpr std::size_t kNonceBytes = 12;
constexpr std::size_t kTagBytes = 16;
constexpr std::string_view kDigits = "0123456789abcdef";

[[noreturn]] void refused(const char* what) {
  throw Failure("SYSTEM", std::string("libcrypto refuses: ") + what);
}

struct Free {
  void operator()(EVP_MAC* mac) const { EVP_MAC_free(mac); }
  void operator()(EVP_MAC_CTX* context) const { EVP_MAC_CTX_free(context); }
  void operator()(EVP_CIPHER_CTX* context) const { EVP_CIPHER_CTX_free(context); }
};

void append_u32(Bytes& bytes, std::uint32_t value) {
  for (unsigned shift = 0; shift < 32; shift += 8) bytes.push_back(static_cast<std::uint8_t>(value >> shift));
}

Key seal_key(const Key& session, std::string_view what) { return hmac_sha256(session, {bytes_of(what)}); }

int small(std::size_t bytes) { return static_cast<int>(bytes); }

}  // namespace

ByteSpan bytes_of(std::string_view text) {
  return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}

Key hmac_sha256(ByteSpan key, std::initializer_list<ByteSpan> parts) {
  const std::unique_ptr<EVP_MAC, Free> mac(EVP_MAC_fetch(nullptr, "HMAC", nullptr));
  const std::unique_ptr<EVP_MAC_CTX, Free> context(mac ? EVP_MAC_CTX_new(mac.get()) : nullptr);
  char digest[] = "SHA256";
  const std::array<OSSL_PARAM, 2> parameters = {
      OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, digest, 0), OSSL_PARAM_construct_end()};
  if (!context || EVP_MAC_init(context.get(), key.data(), key.size(), parameters.data()) != 1)
    refused("HMAC");
  for (const ByteSpan part : parts) {
    if (EVP_MAC_update(context.get(), part.data(), part.size()) != 1) refused("HMAC");
  }
  Key result;
  std::size_t length = 0;
  if (EVP_MAC_final(context.get(), result.data(), &length, result.size()) != 1 || length != result.size())
    refused("HMAC");
  return result;
}

bool equal(ByteSpan a, ByteSpan b) {
  return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

void fill_random(std::span<std::uint8_t> bytes) {
  if (RAND_bytes(bytes.data(), small(bytes.size())) != 1) refused("random bytes");
}

// RFC 5869: extract under a salt of zeros, then expand.
std::vector<wire::Token> token_stream(ByteSpan key, std::string_view label, ByteSpan context,
                                      std::size_t count) {
  const Key salt{};
  const Key extracted = hmac_sha256(salt, {key});
  std::vector<wire::Token> tokens;
  tokens.reserve(count);
  for (std::uint32_t block = 0; tokens.size() < count; ++block) {
    Bytes info(label.begin(), label.end());
    info.insert(info.end(), context.begin(), context.end());
    append_u32(info, block);
    Key last{};
    for (std::size_t i = 0; i < kTokensABlock && tokens.size() < count; ++i) {
      const auto number = static_cast<std::uint8_t>(i + 1);
      const ByteSpan before = i == 0 ? ByteSpan{} : ByteSpan(last);
      last = hmac_sha256(extracted, {before, info, ByteSpan(&number, 1)});
      tokens.push_back(last);
    }
  }
  return tokens;
}

std::vector<wire::Token> data_tokens(const Key& session, const wire::MigrationId& migration,
                                     unsigned channels) {
  return token_stream(session, "memferry data", migration, std::size_t{kMaxEpochs} * (channels + 1));
}

Bytes seal(const Key& session, ByteSpan id, const Key& secret, std::string_view what) {
  const Key key = seal_key(session, what);
  Bytes out(kNonceBytes + secret.size() + kTagBytes);
  fill_random({out.data(), kNonceBytes});
  const std::unique_ptr<EVP_CIPHER_CTX, Free> context(EVP_CIPHER_CTX_new());
  int length = 0;
  if (!context ||
      EVP_EncryptInit_ex(context.get(), EVP_aes_256_gcm(), nullptr, key.data(), out.data()) != 1 ||
      EVP_EncryptUpdate(context.get(), nullptr, &length, id.data(), small(id.size())) != 1 ||
      EVP_EncryptUpdate(context.get(), out.data() + kNonceBytes, &length, secret.data(),
                        small(secret.size())) != 1 ||
      EVP_EncryptFinal_ex(context.get(), out.data() + kNonceBytes + secret.size(), &length) != 1 ||
      EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_GCM_GET_TAG, small(kTagBytes),
                          out.data() + kNonceBytes + secret.size()) != 1)
    refused("AES-256-GCM");
  return out;
}

Key unseal(const Key& session, ByteSpan id, ByteSpan sealed, std::string_view what) {
  Key secret{};
  if (sealed.size() == kNonceBytes + secret.size() + kTagBytes) {
    const Key key = seal_key(session, what);
    Bytes tag(sealed.end() - kTagBytes, sealed.end());
    const std::unique_ptr<EVP_CIPHER_CTX, Free> context(EVP_CIPHER_CTX_new());
    int length = 0;
    if (context &&
        EVP_DecryptInit_ex(context.get(), EVP_aes_256_gcm(), nullptr, key.data(), sealed.data()) == 1 &&
        EVP_DecryptUpdate(context.get(), nullptr, &length, id.data(), small(id.size())) == 1 &&
        EVP_DecryptUpdate(context.get(), secret.data(), &length, sealed.data() + kNonceBytes,
                          small(secret.size())) == 1 &&
        EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_GCM_SET_TAG, small(kTagBytes), tag.data()) == 1 &&
        EVP_DecryptFinal_ex(context.get(), tag.data(), &length) == 1)
      return secret;
    OPENSSL_cleanse(secret.data(), secret.size());
  }
  throw Failure("AUTH_FAILED", "a secret was not sealed for this connection");
}

std::string to_hex(ByteSpan bytes) {
  std::string text;
  text.reserve(2 * bytes.size());
  for (const std::uint8_t byte : bytes) {
    text += kDigits[byte >> 4U];
    text += kDigits[byte & 15U];
  }
  return text;
}

std::string to_hex(const Hash128& digest) {
  Bytes bytes(16);
  for (unsigned at = 0; at < 8; ++at) {
    bytes[at] = static_cast<std::uint8_t>(digest.high >> (56 - 8 * at));
    bytes[8 + at] = static_cast<std::uint8_t>(digest.low >> (56 - 8 * at));
  }
  return to_hex(bytes);
}

bool is_hex(std::string_view text, std::size_t bytes) {
  return text.size() == 2 * bytes &&
         std::ranges::all_of(text, [](char digit) { return kDigits.find(digit) != std::string_view::npos; });
}

Bytes from_hex(std::string_view text) {
  if (text.size() % 2 != 0 || !is_hex(text, text.size() / 2))
    throw Failure("PROTOCOL_ERROR", "these are no hexadecimal digits");
  Bytes bytes(text.size() / 2);
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::uint8_t>(kDigits.find(text[2 * i]) << 4U | kDigits.find(text[2 * i + 1]));
  }
  return bytes;
}

}  // namespace memferry::control
