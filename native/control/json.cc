#include "control/json.h"

#include <string>

#include "control/failure.h"

namespace memferry::control {

namespace {

constexpr int kDeepest = 64;

}  // namespace

Json parse_json(std::string_view text) {
  bool too_deep = false;
  const Json::parser_callback_t watch = [&](int depth, Json::parse_event_t, Json&) {
    if (depth > kDeepest) too_deep = true;
    return !too_deep;
  };
  try {
    Json value = Json::parse(text, watch);
    if (too_deep) throw Failure("PROTOCOL_ERROR", "a control message is nested too deeply");
    return value;
  } catch (const Json::exception&) {
    throw Failure("PROTOCOL_ERROR", "a control message is not JSON");
  }
}

std::string to_text(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }

}  // namespace memferry::control
