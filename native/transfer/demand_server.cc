// Answers faults: a thread that blocks on the demand channel and takes no lock that a push thread holds.
#include <algorithm>

#include "transfer/sender_impl.h"
#include "wire/socket.h"

namespace memferry {
namespace {

// A guest waits for every answer; the push can wait.
constexpr int kHighestPriority = -20;
// No more faults for so long: what was answered may as well be acknowledged.
constexpr std::chrono::milliseconds kAnswersSettle{5};
// Nor are they to wait for the end of faults that do not end.
constexpr std::chrono::milliseconds kAnswersLongest{40};

}  // namespace

// The faulted page leaves first and alone; what follows it is only a guess.
std::string Sender::Impl::answer_fault(Epoch& of, const wire::FrameHeader& request, PageFrames& frames) {
  if (request.region >= queue.regions()) return "a fault in an unknown region";
  if (request.first_page >= queue.known_pages(request.region)) return "a fault outside its region";
  const auto& region = queue.region(request.region);
  const PageNumber page{request.first_page};
  const std::uint64_t following = std::min(request.page_count, wire::max_run_pages(page_size)) - 1;

  static const PageFrames::OnHash kNone;
  const PageFrames::OnHash& on_hash = scatter ? scatter->hash_sink(request.region) : kNone;
  std::uint64_t bytes_sent = 0;
  bool many = false;
  wire::IoResult result;
  pacer.fault_begin();
  if (scatter) scatter->fault_begin();
  {
    const std::lock_guard writing(of.demand_write);
    const TouchGate::Pass pass(gate);
    if (!pass) result = {wire::IoResult::Kind::kCut, ECANCELED};
    // A page that is being read here is not given back at the same time.
    std::unique_lock<std::mutex> reading;
    PageRun left{};
    if (pass && scatter) {
      reading = std::unique_lock(scatter->release_mutex());
      if (elsewhere(of, request.region, page, result)) return {};
    }
    if (pass) {
      const SendQueue::FaultTake take = queue.take_for_fault(request.region, page, following);
      left = take.run;
      if (scatter && !take.first_was_pending) scatter->never_release(request.region, page);
    }
    if (scatter && pass) {
      scatter->answering(*of.demand_way, {request.region, left}, left.count * page_size + sizeof request);
    }
    const auto send = [&] {
      const PageFrames::Sent sent = frames.send(*of.demand);
      count_sent(sent);
      bytes_sent += sent.bytes;
      result = sent.result;
    };
    for (bool first = true; left.count > 0 && result.done(); first = false) {
      const PageRun piece = frames.add(request.region, *region, first ? PageRun{page, 1} : left,
                                       first ? wire::kFlagAnswer : 0, on_hash);
      left = PageRun{piece.end(), left.count - piece.count};
      if (first) send();
    }
    if (!frames.empty() && result.done()) send();
    if (scatter && pass) many = scatter->answered(*of.demand_way);
  }
  if (many && result.done()) result = send_answers_barrier(of);
  pacer.fault_end(bytes_sent);
  if (scatter) scatter->fault_end(bytes_sent);
  if (!result.done()) {
    report_cut(of, "demand channel: " + result.describe());
  } else {
    faults_served.fetch_add(1, std::memory_order_relaxed);
  }
  return {};
}

// Behind many answers, or after a pause: one behind each would wake both sides twice for every fault.
wire::IoResult Sender::Impl::send_answers_barrier(Epoch& of) {
  const std::lock_guard writing(of.demand_write);
  const auto tag = scatter->close_answers(*of.demand_way);
  if (!tag) return {};
  wire::FrameHeader barrier = wire::make_header(wire::FrameType::kBarrier, 0, {}, *tag);
  wire::seal(barrier);
  bytes_on_wire += sizeof barrier;
  scatter->answering(*of.demand_way, {}, 0);
  const wire::IoResult result = of.demand->send_all(std::as_bytes(std::span(&barrier, 1)));
  (void)scatter->answered(*of.demand_way);
  return result;
}

// False when the connection is over.
bool Sender::Impl::settle_answers(Epoch& of) {
  if (!scatter || !scatter->answers_open(*of.demand_way)) {
    of.answers_since.reset();
    return true;
  }
  const auto now = Clock::now();
  if (!of.answers_since) of.answers_since = now;
  if (now - *of.answers_since < kAnswersLongest) {
    const auto ready = wire::wait_readable(of.demand->fd(), now + kAnswersSettle, -1);
    if (ready != wire::DialResult::Kind::kTimedOut) return true;  // receiving says whatever there is to say
  }
  of.answers_since.reset();
  const wire::IoResult result = send_answers_barrier(of);
  if (!result.done()) report_cut(of, "demand channel: " + result.describe());
  return result.done();
}

// True when the page has been let go of here: the destination is told where it is.
bool Sender::Impl::elsewhere(Epoch& of, std::uint32_t region, PageNumber page, wire::IoResult& result) {
  wire::Holders holders;
  if (!scatter->released(region, page, holders)) return false;
  const Whereabouts& where = scatter->whereabouts();
  const std::uint64_t hash = where.hashes(region)[static_cast<std::size_t>(page.value)];
  const bool bare = where.zero(region, page) || holders.first == wire::Holders::kDestination;
  const auto payload = bare ? std::span<const std::byte>() : std::as_bytes(std::span(&hash, 1));
  std::array<wire::FrameHeader, 2> headers{
      wire::make_header(wire::FrameType::kMap, region, {page, 1}, holders.tag()),
      wire::make_header(wire::FrameType::kElsewhere, region, {page, 1})};
  if (where.zero(region, page)) headers[0].flags |= wire::kFlagZero;
  wire::seal(headers[0], payload);
  wire::seal(headers[1]);
  std::array<iovec, 3> buffers{iovec{&headers[0], sizeof headers[0]},
                               iovec{const_cast<std::byte*>(payload.data()), payload.size()},
                               iovec{&headers[1], sizeof headers[1]}};
  bytes_on_wire += 2 * sizeof headers[0] + payload.size();
  result = of.demand->send_all(buffers);
  if (!result.done()) report_cut(of, "demand channel: " + result.describe());
  faults_served.fetch_add(1, std::memory_order_relaxed);
  return true;
}

void Sender::Impl::serve_demand(Epoch& of) {
  set_this_thread_nice(kHighestPriority);
  try {
    PageFrames frames(page_size);
    wire::FrameHeader header{};
    std::vector<std::byte> payload;
    while (settle_answers(of) && receive_frame(of, *of.demand, header, payload)) {
      std::string wrong;
      switch (static_cast<wire::FrameType>(header.type)) {
        case wire::FrameType::kFaultRequest:
          if (!serving_faults) {
            // The guest still runs here, and what it holds would be outdated at once. The destination waits,
            // and with it whatever touched that page; one request at a time is read.
            std::unique_lock lock(mutex);
            work_changed.wait(lock, [&] { return serving_faults || of.cut || of.leaving; });
            if (!serving_faults) return;
          }
          wrong = answer_fault(of, header, frames);
          break;
        case wire::FrameType::kBarrierAck: {
          const std::lock_guard lock(mutex);
          if (&of != epoch.get() || of.cut) break;
          if (scatter) {
            wrong = scatter->acknowledged(*of.demand_way, header.tag);
            break;
          }
          if (!of.demand_barrier_sent || of.demand_acknowledged || header.tag != task.tag) {
            wrong = "an answer to a barrier that was not sent";
            break;
          }
          of.demand_acknowledged = true;
          finish_if_acknowledged_locked(of);
          break;
        }
        default:
          wrong = "a frame that a destination does not send here";
          break;
      }
      if (!wrong.empty()) return report_violation(of, wrong);
    }
  } catch (const std::exception& error) {
    report_broken(of, error.what());
  }
}

}  // namespace memferry
