// A guest that stands, parked through memferry.h as tests want it: its memory is files, lines on standard input say what to
// do (evict, cancel, stats, same, close), lines on standard output what came of it.
//   MEMFERRY_SECRET=... parker [--OPTION VALUE]... --memory FILE [--memory FILE]... HOST:PORT...
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "capi/memferry.h"
#include "control/json.h"

namespace {

using memferry::control::Json;

std::mutex printing;

void say(const Json& event) {
  const std::lock_guard lock(printing);
  std::cout << memferry::control::to_text(event) << std::endl;
}

memferry_error blank() {
  memferry_error error{};
  error.size = sizeof error;
  return error;
}

Json outcome(const char* event, const memferry_error& error) {
  return {{"event", event}, {"code", memferry_code_name(error.code)}, {"text", std::string(error.text)}};
}

struct Memory {
  std::string name;
  std::vector<char> content;
  memferry_region* region = nullptr;
  // Pages of zeros are left untouched.
  void fill() const {
    const std::size_t page = memferry_page_size();
    const std::vector<char> zeros(page);
    for (std::size_t at = 0; at < content.size(); at += page) {
      if (std::memcmp(&content[at], zeros.data(), page) != 0)
        std::memcpy(memferry_region_page(region, at / page), &content[at], page);
    }
  }
  [[nodiscard]] bool same() const {
    return std::memcmp(memferry_region_page(region, 0), content.data(), content.size()) == 0;
  }
};

struct Wanted {
  std::map<std::string, std::string> options;
  std::vector<Memory> memory;
  std::vector<const char*> servers;
  [[nodiscard]] std::uint32_t number(const char* name) const {
    const auto found = options.find(name);
    return found == options.end() ? 0 : static_cast<std::uint32_t>(std::stoul(found->second));
  }
  [[nodiscard]] const char* text(const char* name) const {
    const auto found = options.find(name);
    return found == options.end() ? nullptr : found->second.c_str();
  }
};

Wanted wanted_of(int argc, char** argv) {
  Wanted wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name.rfind("--", 0) != 0) {
      wanted.servers.push_back(argv[i]);
    } else if (name == "--memory" && i + 1 < argc) {
      std::ifstream file(argv[++i], std::ios::binary);
      wanted.memory.push_back({"memory " + std::to_string(wanted.memory.size()),
                               {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()}});
    } else if (i + 1 < argc) {
      wanted.options[name.substr(2)] = argv[++i];
    }
  }
  return wanted;
}

int create(const Wanted& wanted, memferry_park** park, memferry_error* error) {
  const char* const secret = std::getenv("MEMFERRY_SECRET");
  memferry_park_options options{};
  options.size = sizeof options;
  options.secret = secret;
  options.secret_bytes = secret ? std::strlen(secret) : 0;
  options.servers = wanted.servers.data();
  options.server_count = wanted.servers.size();
  options.guest = "parked in C";
  options.description = R"({"cpus":2})";
  options.replicas = wanted.number("replicas");
  options.bandwidth = wanted.number("bandwidth");
  options.compress = wanted.text("compress");
  options.connect_timeout_ms = wanted.number("connect-timeout-ms");
  options.stall_timeout_ms = wanted.number("stall-timeout-ms");
  options.prepare_timeout_ms = wanted.number("prepare-timeout-ms");
  options.in_doubt_timeout_ms = wanted.number("in-doubt-timeout-ms");
  options.lease_ms = wanted.number("lease-ms");
  std::vector<memferry_named_region> regions;
  for (const Memory& memory : wanted.memory) regions.push_back({memory.name.c_str(), memory.region});
  static const char kState[] = {1, 2, 3};
  return memferry_park_create(&options, regions.data(), regions.size(), kState, sizeof kState, park, error);
}

Json stats_of(memferry_park* park) {
  memferry_error error = blank();
  memferry_park_stats stats{};
  stats.size = sizeof stats;
  memferry_park_get_stats(park, &stats, &error);
  Json json = outcome("stats", error);
  json["pagesSent"] = stats.pages_sent;
  json["pagesZero"] = stats.pages_zero;
  json["pagesResent"] = stats.pages_resent;
  json["pagesPending"] = stats.pages_pending;
  json["bytesOnWire"] = stats.bytes_on_wire;
  json["evictionMs"] = stats.eviction_ms;
  json["servers"] = stats.servers;
  json["serversFailed"] = stats.servers_failed;
  return json;
}

// Until the end of the input. Gives whether the park is closed.
void obey(const Wanted& wanted, memferry_park* park) {
  std::thread evicting;
  const auto join = [&] {
    if (evicting.joinable()) evicting.join();
  };
  bool open = true;
  for (std::string line; std::getline(std::cin, line);) {
    memferry_error error = blank();
    if (line == "evict") {
      join();
      evicting = std::thread([park] {
        memferry_error why = blank();
        memferry_park_evict(park, &why);
        say(outcome("evicted", why));
      });
    } else if (line == "cancel") {
      memferry_park_cancel(park, &error);
      say(outcome("cancelled", error));
    } else if (line == "stats") {
      say(stats_of(park));
    } else if (line == "same") {
      bool same = true;
      for (const Memory& memory : wanted.memory) same = same && memory.same();
      say({{"event", "same"}, {"same", same}});
    } else if (line == "close") {
      join();
      memferry_park_close(park, &error);
      open = false;
      say(outcome("closed", error));
      break;
    }
  }
  join();
  if (open) memferry_park_close(park, nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  Wanted wanted = wanted_of(argc, argv);
  memferry_error error = blank();
  for (Memory& memory : wanted.memory) {
    if (memferry_region_allocate(memory.content.size(), &memory.region, &error) != MEMFERRY_OK) return 2;
    memory.fill();
  }
  memferry_park* park = nullptr;
  if (create(wanted, &park, &error) != MEMFERRY_OK) {
    say(outcome("refused", error));
  } else {
    say({{"event", "created"}, {"ticket", Json::parse(memferry_park_ticket(park))}});
    obey(wanted, park);
  }
  for (const Memory& memory : wanted.memory) memferry_region_close(memory.region, nullptr);
  return 0;
}
