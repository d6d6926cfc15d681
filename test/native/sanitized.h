// Whether a sanitizer watches, which makes everything several times as slow.
#pragma once

#ifdef __has_feature
#define MEMFERRY_TEST_HAS(feature) __has_feature(feature)
#else
#define MEMFERRY_TEST_HAS(feature) 0
#endif
#if defined(__SANITIZE_THREAD__) || MEMFERRY_TEST_HAS(thread_sanitizer)
#define MEMFERRY_TEST_THREADS_CHECKED true
#else
#define MEMFERRY_TEST_THREADS_CHECKED false
#endif
#if defined(__SANITIZE_ADDRESS__) || MEMFERRY_TEST_HAS(address_sanitizer)
#define MEMFERRY_TEST_ADDRESSES_CHECKED true
#else
#define MEMFERRY_TEST_ADDRESSES_CHECKED false
#endif
// For a function that runs while other threads are stopped: a sanitizer's runtime has locks of its own, which one of those
// may hold. (clang's no_sanitize("thread") leaves the atomics to the sanitizer.)
#ifdef __has_attribute
#if __has_attribute(disable_sanitizer_instrumentation)
#define MEMFERRY_TEST_BARE __attribute__((disable_sanitizer_instrumentation))
#endif
#endif
#ifndef MEMFERRY_TEST_BARE
#define MEMFERRY_TEST_BARE __attribute__((no_sanitize("address", "thread", "undefined")))
#endif

namespace memferry::test {

inline constexpr bool kThreadsChecked = MEMFERRY_TEST_THREADS_CHECKED;
inline constexpr bool kSanitized = kThreadsChecked || MEMFERRY_TEST_ADDRESSES_CHECKED;

}  // namespace memferry::test
