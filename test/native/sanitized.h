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

namespace memferry::test {

inline constexpr bool kThreadsChecked = MEMFERRY_TEST_THREADS_CHECKED;
inline constexpr bool kSanitized = kThreadsChecked || MEMFERRY_TEST_ADDRESSES_CHECKED;

}  // namespace memferry::test
