// What came of a guest's migration, and whether that is right: complete, lost as far as faults allow it, or never
// left.
#pragma once

#include <cstring>
#include <string>

#include "schedule_audit.h"

namespace memferry::test {

class ScheduleVerdict : public ScheduleAudit {
 protected:
  using ScheduleAudit::ScheduleAudit;

  void stayed(Migration& of) {
    of.guest.stop_writing();
    of.outcome = Outcome::kStayed;
    of.sender->close(false);
    if (!of.guest.source_unchanged()) fail(of, "the source's memory has changed");
    if (!may_stay(of))
      fail(of, "the migration has failed, and nothing that happened excuses it: " + why(of) + "\n" + state());
  }

  void arrive(Migration& of) {
    using enum EngineEventKind;
    for (;;) {
      const auto event = of.arrivals.take({kComplete, kLost, kFailed, kRestHere}, Clock::now() + ms(20));
      if (event && event->kind == kComplete) return complete(of);
      if (event && event->kind == kRestHere) return lost(of);
      if (event && event->kind == kFailed) {
        of.outcome = Outcome::kClosed;
        if (!of.destination_closed)
          fail(of, "the destination has failed: " + event->code + " " + event->message);
        return;
      }
      if (event) {
        for (const RegionRun& each : event->lost) {
          for (std::uint64_t i = 0; i < each.run.count; ++i) {
            if (!of.lost.insert({each.region, each.run.first.value + i}).second)
              fail(of, "a page is reported as lost twice");
          }
        }
        const std::lock_guard lock(mutex_);
        why_[of.index] = event->message;
      }
      if (Clock::now() > deadline_) return fail(of, "hangs\n" + state());
    }
  }

  void complete(Migration& of) {
    of.outcome = Outcome::kComplete;
    of.guest.stop_touching();
    if (!of.lost.empty()) fail(of, "complete, though pages were said to be lost");
    std::string wrong;
    of.guest.each_page([&](std::uint32_t region, std::uint64_t page) {
      if (!of.guest.arrived(region, page) && wrong.size() < 100)
        wrong += " " + ScatterGuest::name(region, page);
    });
    if (!wrong.empty()) fail(of, "complete with other bytes in" + wrong);
    for (std::uint32_t region = 0; region < of.guest.targets.size(); ++region) {
      if (of.receiver->digest(region) != of.guest.digest(region))
        fail(of, "the destination's digest is wrong");
    }
    if (!of.guest.touches_that_failed().empty()) fail(of, "a touch has failed, though nothing is lost");
  }

  void lost(Migration& of) {
    of.outcome = Outcome::kLost;
    of.receiver->acknowledge_loss();
    PageReader reader;
    std::string wrong;
    std::string forbidden;
    std::uint64_t forbidden_pages = 0;
    of.guest.each_page([&](std::uint32_t region, std::uint64_t page) {
      // Blocks on a lost page until it is poisoned.
      const bool read = reader.read(of.guest.target(region, page));
      const bool named = of.lost.count({region, page}) > 0;
      const std::string name = ScatterGuest::name(region, page);
      if (named && !may_lose(of, {region, page})) {
        ++forbidden_pages;
        if (forbidden.size() < 100) forbidden += " " + name;
      }
      if (wrong.size() > 100) return;
      if (named && read) wrong += " " + name + " lost and readable;";
      if (!named && !read) wrong += " " + name + " not lost and not readable;";
      const auto right = of.guest.right(region, page);
      if (!named && read && std::memcmp(reader.bytes().data(), right.data(), right.size()) != 0)
        wrong += " " + name + " with other bytes;";
    });
    if (!wrong.empty()) fail(of, "after a loss:" + wrong);
    if (!forbidden.empty()) {
      fail(of, std::to_string(forbidden_pages) + " pages lost, and nothing that happened excuses it (" +
                   why(of) + "):" + forbidden + "\n" + state());
    }
    for (const PageId& each : of.guest.touches_that_failed()) {
      if (of.lost.count(each) == 0) fail(of, "a touch has failed, though its page is not lost");
    }
  }

  void finish(Migration& of) {
    of.guest.stop_writing();
    of.guest.expect_faults();
    if (of.sender) {
      of.sender->close(false);
      if (const auto& dedup = of.sender->stats().dedup) of.deduplicated = dedup->pages;
    }
    // Poisons what is missing, which wakes who waits for it.
    if (of.receiver) {
      of.receiver->close();
      const ReceiverStats stats = of.receiver->stats();
      of.gathered = stats.pages_gathered;
      of.remote_faults = stats.faults.count;
    }
    of.guest.stop_touching();
    if (of.listener) of.listener->close();
    if (const std::string wrong = of.guest.wrong(); !wrong.empty()) fail(of, wrong);
    if (std::any_of(schedule_.faults.begin(), schedule_.faults.end(),
                    [](const Schedule::Fault& each) { return about_server(each.kind); })) {
      return;
    }
    for (const std::string& each : of.given_up) given_up_for_nothing_ += each.empty() ? 0 : 1;
  }
};

}  // namespace memferry::test
