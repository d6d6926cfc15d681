#include "page/keyed_hash.h"

#include <openssl/evp.h>

#include <stdexcept>

namespace memferry {
namespace {

constexpr std::uint8_t kPageDomain = 0;
constexpr std::uint8_t kNodeDomain = 1;

template <typename T, void (*Free)(T*)>
struct Deleter {
  void operator()(T* object) const { Free(object); }
};
using Context = std::unique_ptr<EVP_CIPHER_CTX, Deleter<EVP_CIPHER_CTX, EVP_CIPHER_CTX_free>>;

void require(bool worked) {
  if (!worked) throw std::runtime_error("libcrypto: AES failed");
}

Context context_for(const EVP_CIPHER* cipher, const std::uint8_t* key) {
  Context context(EVP_CIPHER_CTX_new());
  require(context && EVP_EncryptInit_ex(context.get(), cipher, nullptr, key, nullptr) == 1);
  return context;
}

}  // namespace

struct KeyedHasher::Contexts {
  Context ghash;
  Context aes;
};

KeyedHasher::KeyedHasher(const KeyedHashKey& key) : contexts_(std::make_unique<Contexts>()) {
  contexts_->ghash = context_for(EVP_aes_256_gcm(), key.data());
  contexts_->aes = context_for(EVP_aes_256_ecb(), key.data() + 32);
  EVP_CIPHER_CTX_set_padding(contexts_->aes.get(), 0);
}

KeyedHasher::~KeyedHasher() = default;

// GCM with data that is authenticated only is GHASH and a constant; the constant tells the domains apart.
void KeyedHasher::universal(std::span<const std::byte> bytes, std::uint8_t domain, KeyedHash& out) {
  EVP_CIPHER_CTX* context = contexts_->ghash.get();
  const std::array<std::uint8_t, 12> iv{domain};
  int ignored = 0;
  require(EVP_EncryptInit_ex(context, nullptr, nullptr, nullptr, iv.data()) == 1 &&
          EVP_EncryptUpdate(context, nullptr, &ignored, reinterpret_cast<const std::uint8_t*>(bytes.data()),
                            static_cast<int>(bytes.size())) == 1 &&
          EVP_EncryptFinal_ex(context, out.data(), &ignored) == 1 &&
          EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_GCM_GET_TAG, static_cast<int>(out.size()), out.data()) == 1);
}

void KeyedHasher::encrypt(KeyedHash* hashes, std::size_t count) {
  int written = 0;
  const int bytes = static_cast<int>(count * sizeof(KeyedHash));
  require(EVP_EncryptUpdate(contexts_->aes.get(), hashes->data(), &written, hashes->data(), bytes) == 1 &&
          written == bytes);
}

void KeyedHasher::pages(std::span<const std::byte> bytes, std::uint64_t page_size, KeyedHash* out) {
  if (page_size == 0 || bytes.size() % page_size != 0) throw std::invalid_argument("not whole pages");
  const std::size_t count = bytes.size() / page_size;
  if (count == 0) return;
  for (std::size_t i = 0; i < count; ++i) {
    universal(bytes.subspan(i * page_size, page_size), kPageDomain, out[i]);
  }
  encrypt(out, count);
}

KeyedHash KeyedHasher::node(std::span<const KeyedHash> pages) {
  KeyedHash hash;
  universal(std::as_bytes(pages), kNodeDomain, hash);
  encrypt(&hash, 1);
  return hash;
}

}  // namespace memferry
