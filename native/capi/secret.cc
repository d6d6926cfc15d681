#include "capi/secret.h"

#include <stdexcept>

#include "control/failure.h"
#include "control/secret_file.h"
#include "wire/socket.h"

namespace memferry::capi {

control::Bytes secret_of(const void* secret, std::size_t bytes, const char* file) {
  if ((secret != nullptr) == (file != nullptr))
    throw std::invalid_argument("secret, secret_file: one of them, and not both");
  if (file) return control::read_secret_file(file);
  if (bytes < control::kLeastSecretBytes)
    throw std::invalid_argument("secret: at least " + std::to_string(control::kLeastSecretBytes) + " bytes");
  const auto* const begin = static_cast<const std::uint8_t*>(secret);
  return {begin, begin + bytes};
}

void check_address(const std::string& host, std::uint16_t port, bool plaintext) {
  if (plaintext || wire::SocketAddress::parse(host, port).loopback()) return;
  throw control::Failure(
      "PLAINTEXT_REQUIRED",
      host +
          " is not a loopback address, and the connection is not encrypted: memory and state "
          "could be read and changed on the way. Set plaintext if the network is trusted");
}

}  // namespace memferry::capi
