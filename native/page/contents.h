// Which pages of a region may hold something else than zeros, without touching them: by the page tables of whoever owns
// the memory where it is private and anonymous, by the holes of the file where it is shared.
//
// Threads: one a Contents.
#pragma once

#include <functional>
#include <memory>
#include <optional>

#include "os/pagemap.h"
#include "page/region.h"

namespace memferry {

// The pagemap of whoever owns the memory.
class OwnerPagemap {
 public:
  explicit OwnerPagemap(std::size_t runs_at_once = Pagemap::kUsualRuns) : runs_at_once_(runs_at_once) {}
  Pagemap& of(const Region& region);

 private:
  std::size_t runs_at_once_;
  std::optional<Pagemap> own_;
  std::optional<Pagemap> others_;
  std::shared_ptr<const Process> other_;
};

class Contents {
 public:
  // Visits the runs of pages of `run` that may have content, in order; the others are zeros at some moment of this call.
  // `zero_fill`: said before that memory of these pages which is not populated is zeros, so that the mappings need no
  // look. Throws SystemError, OwnerGone.
  void visit(const Region& region, PageRun run, const std::function<void(PageRun)>& found,
             bool zero_fill = false);

 private:
  OwnerPagemap pagemap_;
};

}  // namespace memferry
