#include "control/messages.h"

#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "control/schema.h"
#include "control/text.h"

namespace memferry::control {

namespace {

using Type = SourceSays::Type;

constexpr std::array<std::string_view, 7> kModes = {
    "stop-and-copy", "pre-copy", "post-copy", "hybrid", "scatter", "scatter-pre-copy", "scatter-hybrid"};
constexpr std::size_t kMostRegions = 64;
constexpr std::uint64_t kMostReplayBytes = 4ULL << 20U;  // no source sends more
constexpr std::size_t kMostServers = 250;
constexpr std::size_t kMostSealedBytes = 256;
constexpr std::size_t kLineageBytes = 60;
constexpr std::size_t kSealedKeyBytes = 60;
constexpr std::array<std::pair<std::string_view, std::uint16_t>, 3> kEncodingFlags = {
    {{"lz4", wire::kFlagLz4}, {"zstd", wire::kFlagZstd}, {"delta", wire::kFlagDelta}}};

Offer::Scatter scatter_of(const Json& json) {
  Fields fields(json, "scatter");
  Offer::Scatter scatter;
  for (const Json& entry : fields.array("servers", 1, kMostServers)) {
    Fields server(entry, "scatter.servers");
    scatter.servers.push_back({server.label("name"), server.text("host", 1, 255),
                               static_cast<std::uint16_t>(server.count("port", 1, 65535))});
    server.done();
  }
  const Json& sealed = fields.any("sealedSecret");
  if (!sealed.is_string()) fields.wrong("sealedSecret");
  const auto& text = sealed.get_ref<const std::string&>();
  if (text.empty() || text.size() > 2 * kMostSealedBytes || !is_hex(text, text.size() / 2))
    fields.wrong("sealedSecret");
  scatter.sealed_secret = from_hex(text);
  scatter.gather_timeout_ms = fields.number("gatherTimeoutMs");
  if (scatter.gather_timeout_ms <= 0) fields.wrong("gatherTimeoutMs");
  fields.done();
  return scatter;
}

// What this side makes nothing of is checked all the same.
void pass_over_references(Fields& fields) {
  const Json& references = fields.any("references");
  if (references.is_null()) return;
  Fields of(references, "references");
  (void)of.hex("proof", 32);
  if (!of.any("sealedKey").is_null()) (void)of.hex("sealedKey", kSealedKeyBytes);
  of.done();
}

Offer offer_of(Fields& fields) {
  Offer offer;
  offer.id = fields.hex("migrationId", offer.migration.size());
  const Bytes id = from_hex(offer.id);
  std::ranges::copy(id, offer.migration.begin());
  offer.mode = fields.text("mode", 1, 64);
  if (std::ranges::find(kModes, offer.mode) == kModes.end()) fields.wrong("mode");
  offer.may_page = fields.flag("mayPage");
  offer.verify = fields.flag("verify");
  offer.channels = static_cast<unsigned>(fields.count("channels", 1, 16));
  if (const Json& names = fields.any("encodings"); !names.is_null()) offer.encodings = encoding_flags(names);
  (void)fields.flag_or("base", false);
  offer.replay = fields.flag_or("replay", false);
  if (fields.has("lineage")) {
    (void)fields.hex("lineage", kLineageBytes);
  } else {
    (void)fields.any("lineage");
  }
  pass_over_references(fields);
  if (const Json& scatter = fields.any("scatter"); !scatter.is_null()) offer.scatter = scatter_of(scatter);
  offer.guest = offered_guest(fields.any("guest"));
  return offer;
}

CommitQuestion commit_of(CommitQuestion::Type type, Fields& fields) {
  CommitQuestion question{type, static_cast<std::uint32_t>(fields.count("epoch", 0, kMaxEpoch)), {}};
  if (type == CommitQuestion::Type::kCancel)
    question.cause = {fields.text("code", 1, 64), fields.text("message", 0, 4096)};
  return question;
}

using Read = void (*)(SourceSays&, Fields&);

void read_commit(SourceSays& says, Fields& fields, CommitQuestion::Type type) {
  says.type = Type::kCommit;
  says.commit = commit_of(type, fields);
}

const std::map<std::string, Read, std::less<>>& readers() {
  static const std::map<std::string, Read, std::less<>> all = {
      {"offer",
       [](SourceSays& says, Fields& fields) {
         says.type = Type::kOffer;
         says.offer = offer_of(fields);
       }},
      {"resume-session",
       [](SourceSays& says, Fields& fields) {
         says.type = Type::kResumeSession;
         says.migration = fields.hex("migrationId", 16);
         says.proof = from_hex(fields.hex("proof", 32));
       }},
      {"base-cancel", [](SourceSays& says, Fields&) { says.type = Type::kBaseCancel; }},
      {"base-skip-replay", [](SourceSays& says, Fields&) { says.type = Type::kBaseSkipReplay; }},
      {"grow",
       [](SourceSays& says, Fields& fields) {
         says.type = Type::kGrow;
         says.region = static_cast<std::uint32_t>(fields.count("region", 0, kMostRegions - 1));
         says.length_bytes = fields.count("lengthBytes");
       }},
      {"ask-missing",
       [](SourceSays& says, Fields& fields) {
         says.type = Type::kAskMissing;
         says.question = fields.count("question");
       }},
      {"state",
       [](SourceSays& says, Fields& fields) {
         says.type = Type::kState;
         says.paging = fields.flag("paging");
       }},
      {"evicted",
       [](SourceSays& says, Fields& fields) {
         says.type = Type::kEvicted;
         const Json& digests = fields.any("digests");
         if (digests.is_null()) return;
         says.digests.emplace();
         for (const Json& digest : fields.array("digests", 0, kMostRegions)) {
           if (!digest.is_string() || !is_hex(digest.get_ref<const std::string&>(), 16))
             fields.wrong("digests");
           says.digests->push_back(digest.get<std::string>());
         }
       }},
      {"goodbye", [](SourceSays& says, Fields&) { says.type = Type::kGoodbye; }},
      {"prepare",
       [](SourceSays& says, Fields& fields) { read_commit(says, fields, CommitQuestion::Type::kPrepare); }},
      {"grant",
       [](SourceSays& says, Fields& fields) { read_commit(says, fields, CommitQuestion::Type::kGrant); }},
      {"query",
       [](SourceSays& says, Fields& fields) { read_commit(says, fields, CommitQuestion::Type::kQuery); }},
      {"cancel",
       [](SourceSays& says, Fields& fields) { read_commit(says, fields, CommitQuestion::Type::kCancel); }},
  };
  return all;
}

}  // namespace

SourceSays source_message(const Json& message) {
  Fields fields(message, "");
  const auto reader = readers().find(fields.text("type", 1, 64));
  if (reader == readers().end()) fields.wrong("type");
  SourceSays says;
  reader->second(says, fields);
  fields.done();
  return says;
}

void check_source_message(const Json& message, std::optional<std::uint64_t> binary_bytes) {
  const SourceSays says = source_message(message);
  const bool wanted = says.type == Type::kState || (says.type == Type::kOffer && says.offer.replay);
  if (wanted != binary_bytes.has_value())
    throw Failure("PROTOCOL_ERROR",
                  wanted ? "a message without its binary part" : "a binary part that is not allowed");
  if (says.type == Type::kOffer && binary_bytes.value_or(0) > kMostReplayBytes)
    throw Failure("LIMIT_EXCEEDED", "a replay log of " + std::to_string(*binary_bytes) + " bytes; " +
                                        std::to_string(kMostReplayBytes) + " are allowed");
}

OfferedGuest offered_guest(const Json& json) {
  Fields fields(json, "guest");
  OfferedGuest guest;
  guest.name = fields.label("name");
  if (const Json& module = fields.any("module"); !module.is_null()) {
    Fields of(module, "guest.module");
    guest.module = {of.label("name"), of.hex("sha256", 32)};
    of.done();
  }
  guest.description = to_text(fields.any("description"));
  for (const Json& entry : fields.array("regions", 1, kMostRegions)) {
    Fields of(entry, "guest.regions");
    guest.regions.push_back({of.label("name"), of.count("lengthBytes"), of.count("capacityBytes"),
                             of.count("pageSize", 4096, 1ULL << 30U)});
    of.done();
  }
  fields.done();
  return guest;
}

Json guest_json(const OfferedGuest& guest) {
  Json regions = Json::array();
  for (const OfferedRegion& region : guest.regions) {
    regions.push_back({{"name", region.name},
                       {"lengthBytes", region.length_bytes},
                       {"capacityBytes", region.capacity_bytes},
                       {"pageSize", region.page_size}});
  }
  Json module;
  if (guest.module) module = {{"name", guest.module->name}, {"sha256", guest.module->sha256}};
  return {{"name", guest.name},
          {"module", std::move(module)},
          {"description", guest.description.empty() ? Json() : parse_json(guest.description)},
          {"regions", std::move(regions)}};
}

std::optional<CommitAnswer> commit_answer(const Json& message) {
  using Answer = CommitAnswer::Type;
  static const std::map<std::string, Answer, std::less<>> types = {
      {"ready", Answer::kReady},
      {"resumed", Answer::kResumed},
      {"refused", Answer::kRefused},
      {"unknown-migration", Answer::kUnknownMigration}};
  Fields fields(message, "");
  const auto type = types.find(fields.text("type", 1, 64));
  if (type == types.end()) return {};
  CommitAnswer answer{type->second, static_cast<std::uint32_t>(fields.count("epoch", 0, kMaxEpoch)), {}};
  if (answer.type == Answer::kRefused)
    answer.cause = from_peer(fields.text("code", 1, 64), fields.text("message", 0, 4096));
  fields.done();
  return answer;
}

Json to_json(const CommitAnswer& answer) {
  Json json = {{"epoch", answer.epoch}};
  switch (answer.type) {
    case CommitAnswer::Type::kReady:
      json["type"] = "ready";
      break;
    case CommitAnswer::Type::kResumed:
      json["type"] = "resumed";
      break;
    case CommitAnswer::Type::kRefused:
      json["type"] = "refused";
      json["code"] = answer.cause.code;
      json["message"] = answer.cause.message;
      break;
    case CommitAnswer::Type::kUnknownMigration:
      json["type"] = "unknown-migration";
      break;
  }
  return json;
}

Json to_json(const CommitQuestion& question) {
  Json json = {{"epoch", question.epoch}};
  switch (question.type) {
    case CommitQuestion::Type::kPrepare:
      json["type"] = "prepare";
      break;
    case CommitQuestion::Type::kGrant:
      json["type"] = "grant";
      break;
    case CommitQuestion::Type::kQuery:
      json["type"] = "query";
      break;
    case CommitQuestion::Type::kCancel:
      json["type"] = "cancel";
      json["code"] = question.cause.code;
      json["message"] = question.cause.message;
      break;
  }
  return json;
}

Json encoding_names(std::uint16_t flags) {
  Json names = Json::array();
  for (const auto& [name, flag] : kEncodingFlags) {
    if ((flags & flag) != 0) names.push_back(name);
  }
  return names;
}

// Names that nobody knows yet are passed over.
std::uint16_t encoding_flags(const Json& names) {
  constexpr std::size_t kMostNames = 16;
  std::uint16_t flags = 0;
  if (!names.is_array() || names.size() > kMostNames)
    throw Failure("PROTOCOL_ERROR", "a control message is not allowed at encodings");
  for (const Json& name : names) {
    if (!name.is_string()) throw Failure("PROTOCOL_ERROR", "a control message is not allowed at encodings");
    for (const auto& [known, flag] : kEncodingFlags) {
      if (name.get_ref<const std::string&>() == known) flags = static_cast<std::uint16_t>(flags | flag);
    }
  }
  return flags;
}

}  // namespace memferry::control
