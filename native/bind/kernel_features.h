// What this kernel offers for paging and tracking, and to this process: found out by trying, with the reason
// where something is missing and the way to grant it.
#pragma once

#include <string>
#include <vector>

namespace memferry::bind {

struct KernelFeature {
  std::string name;
  bool available = false;
  std::string reason;  // where available: a detail worth knowing, or empty
  std::string remedy;  // empty when there is nothing to do, or no way
};

// Never throws for something that is missing.
[[nodiscard]] std::vector<KernelFeature> probe_kernel_features();

}  // namespace memferry::bind
