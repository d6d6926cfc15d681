#include "control/schema.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "control/crypto.h"
#include "control/failure.h"
#include "control/text.h"

namespace memferry::control {

namespace {

[[noreturn]] void not_allowed(const std::string& where) {
  throw Failure("PROTOCOL_ERROR", "a control message is not allowed at " + where);
}

}  // namespace

Fields::Fields(const Json& value, std::string where) : value_(value), where_(std::move(where)) {
  if (!value.is_object()) not_allowed(where_.empty() ? "its beginning" : where_);
  if (!where_.empty()) where_ += '.';
}

void Fields::wrong(const char* name) const { not_allowed(at(name)); }

const Json& Fields::any(const char* name) {
  asked_.emplace_back(name);
  static const Json nothing;
  const auto found = value_.find(name);
  return found == value_.end() ? nothing : *found;
}

bool Fields::has(const char* name) const {
  const auto found = value_.find(name);
  return found != value_.end() && !found->is_null();
}

bool Fields::flag(const char* name) {
  const Json& value = any(name);
  if (!value.is_boolean()) wrong(name);
  return value.get<bool>();
}

bool Fields::flag_or(const char* name, bool otherwise) {
  const Json& value = any(name);
  if (!value_.contains(name)) return otherwise;
  if (!value.is_boolean()) wrong(name);
  return value.get<bool>();
}

std::uint64_t count_of(const Json& value, const std::string& where, std::uint64_t least, std::uint64_t most) {
  std::uint64_t count = 0;
  if (value.is_number_unsigned()) {
    count = value.get<std::uint64_t>();
  } else if (value.is_number_float()) {
    // JavaScript has one kind of number: 1e3 is an integer.
    const double real = value.get<double>();
    if (!(real >= 0) || real > static_cast<double>(kMaxCount) || real != std::floor(real)) not_allowed(where);
    count = static_cast<std::uint64_t>(real);
  } else {
    not_allowed(where);
  }
  if (count < least || count > most) not_allowed(where);
  return count;
}

std::uint64_t Fields::count(const char* name, std::uint64_t least, std::uint64_t most) {
  return count_of(any(name), at(name), least, most);
}

double Fields::number(const char* name) {
  const Json& value = any(name);
  if (!value.is_number()) wrong(name);
  const double real = value.get<double>();
  if (!std::isfinite(real) || real < 0) wrong(name);
  return real;
}

std::string Fields::text(const char* name, std::size_t least_units, std::size_t most_units) {
  const Json& value = any(name);
  if (!value.is_string()) wrong(name);
  std::string text = value.get<std::string>();
  const std::size_t units = text_length(text);
  if (units < least_units || units > most_units) wrong(name);
  return text;
}

std::string Fields::hex(const char* name, std::size_t bytes) {
  const Json& value = any(name);
  if (!value.is_string() || !is_hex(value.get_ref<const std::string&>(), bytes)) wrong(name);
  return value.get<std::string>();
}

const Json& Fields::array(const char* name, std::size_t least, std::size_t most) {
  const Json& value = any(name);
  if (!value.is_array() || value.size() < least || value.size() > most) wrong(name);
  return value;
}

void Fields::done() const {
  for (const auto& [name, value] : value_.items()) {
    if (std::ranges::find(asked_, name) == asked_.end()) not_allowed(where_ + cut(name, 64));
  }
}

}  // namespace memferry::control
