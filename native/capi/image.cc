#include "control/vmd.h"

#include <algorithm>
#include <exception>
#include <string>

#include "capi/events.h"
#include "capi/handles.h"
#include "capi/secret.h"

using memferry::capi::Callback;
using memferry::capi::Events;
using memferry::capi::guarded;
using memferry::capi::milliseconds_or;
using memferry::capi::required;
using memferry::control::ParkedImage;
using memferry::control::VmdOptions;

struct memferry_image {
  std::shared_ptr<Events> events;
  std::unique_ptr<ParkedImage> image;
  bool dissolved = false;
  std::exception_ptr outcome;  // of the verification, for whoever waits again
};

namespace {

VmdOptions options_of(const memferry_vmd_options& given) {
  VmdOptions options;
  options.secret = memferry::capi::secret_of(given.secret, given.secret_bytes, given.secret_file);
  options.plaintext = given.plaintext != 0;
  options.connect_timeout = milliseconds_or(given.connect_timeout_ms, 5000);
  options.recover_timeout = milliseconds_or(given.recover_timeout_ms, 60000);
  options.in_doubt_timeout = milliseconds_or(given.in_doubt_timeout_ms, 30000);
  if (given.max_state_bytes != 0)
    options.max_state_bytes = std::min<std::uint64_t>(given.max_state_bytes, UINT32_MAX);
  options.with_losses = given.with_losses != 0;
  return options;
}

}  // namespace

extern "C" {

int memferry_image_claim(const memferry_vmd_options* options, const char* ticket, memferry_image** image,
                         memferry_error* error) {
  return guarded(error, [&] {
    required(image, "image") = nullptr;
    const memferry_vmd_options given = memferry::capi::read_sized(options, "options");
    const std::string text = &required(ticket, "ticket");
    auto made = std::make_unique<memferry_image>();
    made->image = std::make_unique<ParkedImage>(text, options_of(given));
    *image = made.release();
  });
}

const char* memferry_image_guest(const memferry_image* image) {
  return image ? image->image->guest().name.c_str() : "";
}

const char* memferry_image_description(const memferry_image* image) {
  return image ? image->image->guest().description.c_str() : "null";
}

size_t memferry_image_region_count(const memferry_image* image) {
  return image ? image->image->guest().regions.size() : 0;
}

int memferry_image_region(const memferry_image* image, size_t index, memferry_offered_region* region,
                          memferry_error* error) {
  return guarded(error, [&] {
    const auto& regions = required(image, "image").image->guest().regions;
    if (index >= regions.size()) throw std::invalid_argument("index: there is no such region");
    const auto& of = regions[index];
    required(region, "region") = {of.name.c_str(), of.length_bytes, of.capacity_bytes, of.page_size};
  });
}

const void* memferry_image_state(const memferry_image* image, size_t* bytes) {
  if (bytes) *bytes = image ? image->image->state().size() : 0;
  return image ? image->image->state().data() : nullptr;
}

int memferry_image_serve(memferry_image* image, memferry_region* const* regions, size_t count,
                         memferry_on_event* on_event, void* context, memferry_error* error) {
  return guarded(error, [&] {
    memferry_image& of = required(image, "image");
    auto events = std::make_shared<Events>(on_event, context);
    of.image->serve(memferry::capi::regions_of(regions, count), Events::callback_of(events));
    of.events = std::move(events);
  });
}

int memferry_image_grant(memferry_image* image, memferry_error* error) {
  return guarded(error, [&] {
    memferry::capi::refuse_in(Callback::kEngine, "memferry_image_grant()");
    ParkedImage& of = *required(image, "image").image;
    (void)of.receiver();
    of.grant();
  });
}

int memferry_image_wait(memferry_image* image, int64_t timeout_ms, memferry_error* error) {
  return guarded(error, [&] {
    memferry_image& of = required(image, "image");
    (void)of.image->receiver();
    // The image goes when all is well, and without a grant it is not ours to end.
    if (!of.image->granted()) throw std::invalid_argument("memferry_image_wait(): not granted yet");
    of.events->wait(MEMFERRY_EVENT_COMPLETE, 0, timeout_ms);
    if (of.outcome) std::rethrow_exception(of.outcome);
    if (of.dissolved) return;
    try {
      of.image->verify_and_dissolve();
      of.dissolved = true;
    } catch (const memferry::control::Failure& failure) {
      if (failure.code() == "VERIFICATION_FAILED") of.outcome = std::current_exception();
      throw;
    }
  });
}

int memferry_image_get_stats(memferry_image* image, memferry_receiver_stats* stats, memferry_error* error) {
  return guarded(
      error, [&] { memferry::capi::write_stats(stats, required(image, "image").image->receiver().stats()); });
}

int memferry_image_close(memferry_image* image, memferry_error* error) {
  return guarded(error, [&] {
    memferry::capi::refuse_in(Callback::kEngine, "memferry_image_close()");
    delete image;
  });
}

}  // extern "C"
