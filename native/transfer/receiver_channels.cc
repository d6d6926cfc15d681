// Who is connected to the receiver: hellos, the channels' threads, cuts and recovery.
#include <algorithm>

#include "os/worker_thread.h"
#include "transfer/receiver_impl.h"
#include "wire/hello.h"
#include "wire/later_tokens.h"

namespace memferry {
namespace {

constexpr int kDemandThreadNice = -20;

}  // namespace

bool Receiver::Impl::attach(const wire::Hello& hello, UniqueFd& fd) {
  const std::size_t columns = config.channels + 1;
  const bool demand = hello.channel == wire::kDemandChannel;
  // Of a channel that there is not, none.
  const std::size_t column = demand                            ? config.channels
                             : hello.channel < config.channels ? hello.channel
                                                               : columns;
  if (hello.preface != wire::kDataPreface || hello.version != wire::kVersion ||
      hello.migration != config.migration) {
    return false;
  }
  const std::optional<wire::Token> token = wire::data_token(config.tokens, columns, column, hello.epoch);
  if (!token || !wire::equal_tokens(hello.token, *token)) return false;

  const std::lock_guard lock(mutex);
  const State now = state;
  if (closing || now == State::kLost || now == State::kFailed || lost_due) return false;
  if (hello.epoch < epoch || (hello.epoch == epoch && epoch_cut)) return false;
  if (hello.epoch < channels[column]->next_epoch) return false;
  // Only a guest that runs here, or is about to, is worth waiting for.
  const bool may_redial = now == State::kComplete || (now == State::kPaging && switched);
  if (hello.epoch > epoch && !may_redial) return false;
  channels[column]->next_epoch = hello.epoch + 1;
  if (!wire::accept_connection(fd.get())) return false;

  if (hello.epoch > epoch) {
    // The source knows of the cut before us.
    if (!epoch_cut) cut_locked({ChannelEnd::Kind::kCut, "CHANNEL_LOST", "the source has dialled anew"});
    epoch = hello.epoch;
    epoch_cut = false;
    for (const auto& channel : channels) channel->attached = false;
  }
  Channel& channel = *channels[column];
  channel.next = std::make_shared<wire::PlainStream>(std::move(fd));
  channel.epoch = hello.epoch;
  channel.attached = true;
  channel.goodbye = false;
  if (!first_channel) {
    first_channel = true;
    EngineEvent event{};
    event.kind = EngineEventKind::kFirstChannel;
    push(std::move(event));
  }
  if (all_attached_locked() && paused) {
    paused = false;
    recover_by = Clock::time_point::max();
    EngineEvent event{};
    event.kind = EngineEventKind::kRecovered;
    push(std::move(event));
  }
  changed.notify_all();
  return true;
}

// A set of connections counts as a whole: of one that comes back in part nobody can say what it will bring.
bool Receiver::Impl::all_attached_locked() const {
  return std::all_of(channels.begin(), channels.end(), [](const auto& each) { return each->attached; });
}

void Receiver::Impl::channel_main(Channel& channel) {
  // Its answers wake whoever is blocked on a page.
  if (channel.demand) set_this_thread_nice(kDemandThreadNice);
  for (;;) {
    std::shared_ptr<wire::Stream> stream;
    std::uint32_t its_epoch = 0;
    {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return closing || channel.next; });
      if (closing) return;
      stream = std::move(channel.next);
      channel.next = nullptr;
      channel.current = stream;
      its_epoch = channel.epoch;
    }
    ChannelEnd end;
    if (!channel.demand) {
      end = serve(channel, *stream);
    } else if (demand_begins(channel, stream, its_epoch)) {
      end = serve(channel, *stream);
      demand_ends();
    } else {
      end = {ChannelEnd::Kind::kCut, "CHANNEL_LOST", "the bitmap of pages could not be sent"};
    }
    stream->shutdown();
    ended(channel, its_epoch, end);
  }
}

// After a cut the source first learns what is here; then everything that somebody waits for is asked again.
bool Receiver::Impl::demand_begins(Channel& channel, const std::shared_ptr<wire::Stream>& stream,
                                   std::uint32_t its_epoch) {
  if (its_epoch > 0 && !send_bitmaps(*stream)) return false;
  if (!pager) return true;
  const std::lock_guard lock(mutex);
  if (closing || channel.epoch != its_epoch) return true;  // serve() will notice
  pager->writer().attach(stream);
  demand_attached = true;
  pager->set_online(switched);
  changed.notify_all();  // it is looked after from here on
  return true;
}

void Receiver::Impl::demand_ends() {
  if (!pager) return;
  const std::lock_guard lock(mutex);
  demand_attached = false;
  pager->set_online(false);
  pager->writer().detach();
}

void Receiver::Impl::ended(Channel& channel, std::uint32_t ended_epoch, const ChannelEnd& end) {
  const std::lock_guard lock(mutex);
  channel.current = nullptr;
  if (closing) return;
  if (end.kind == ChannelEnd::Kind::kFatal) {
    fail_locked(end.code, end.message);
    return;
  }
  if (ended_epoch != epoch || channel.next) return;  // its successors have taken over
  channel.attached = false;
  if (end.kind != ChannelEnd::Kind::kGoodbye) {
    // A connection that ends after everything has been said and is here is no loss.
    if (!(state == State::kComplete && channel.goodbye)) cut_locked(end);
    return;
  }
  channel.goodbye = true;
  if (state == State::kComplete) return;
  if (state == State::kPaging && switched && gather) {
    // The servers have what is missing, and say where. When all of its connections have ended so, it has left.
    source_left =
        std::all_of(channels.begin(), channels.end(), [](const auto& each) { return each->goodbye; });
    changed.notify_all();
    return;
  }
  if (state == State::kPaging && switched) {
    // Pages are still missing, so it is a cut whatever the source calls it.
    cut_locked({ChannelEnd::Kind::kCut, "CHANNEL_LOST", "the source left before every page was here"});
    return;
  }
  const bool all =
      std::all_of(channels.begin(), channels.end() - 1, [](const auto& each) { return each->goodbye; });
  if (!all || state != State::kFilling) return;
  if (suspects() != 0 || !missing_runs(1).empty()) {
    fail_locked("CHANNEL_LOST", "the source left before every page was here");
    return;
  }
  state = State::kComplete;
  EngineEvent event{};
  event.kind = EngineEventKind::kComplete;
  push(std::move(event));
}

void Receiver::Impl::cut_locked(const ChannelEnd& end) {
  if (closing || epoch_cut || state == State::kLost || state == State::kFailed) return;
  const bool guest_is_here = state == State::kPaging && switched;
  if (!guest_is_here && state != State::kComplete) {
    fail_locked(end.code, end.message);
    return;
  }
  epoch_cut = true;
  shut_down_all_locked();
  for (const auto& channel : channels) channel->attached = false;
  if (!guest_is_here) return;
  const std::uint64_t came = pages_received + pages_zero + pages_known;
  barren_epochs = came == came_before_cut ? barren_epochs + 1 : 0;
  came_before_cut = came;
  // With servers it may need no source any more: look_after_gather_locked() finds out.
  if (!paused && !gather) {
    paused = true;
    recover_by = Clock::now() + config.recover_timeout;
    EngineEvent event{};
    event.kind = EngineEventKind::kPaused;
    event.code = end.code;
    event.message = end.message;
    push(std::move(event));
  }
  if (end.kind == ChannelEnd::Kind::kBadFrame && ++bad_frames > kBadFramesForgiven) {
    lose_locked(end.code, "the source keeps sending bad frames: " + end.message);
  } else if ((!gather && barren_epochs > wire::kMostBarrenEpochs) ||
             !wire::has_data_token(config.tokens.size(), config.channels + 1, epoch + 1)) {
    lose_locked("RECOVERY_TIMEOUT", "the connections were cut too often: " + end.message);
  }
}

void Receiver::Impl::shut_down_all_locked() {
  for (const auto& channel : channels) {
    if (channel->current) channel->current->shutdown();
    if (channel->next) channel->next->shutdown();
  }
}

}  // namespace memferry
