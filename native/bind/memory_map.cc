#include "bind/memory_map.h"

#include "os/process_maps.h"

namespace memferry::bind {

MappedSpan mapped_span(OwnerAddress start) {
  MappedSpan span;
  OwnerAddress at = start;
  bool in_writable_part = true;
  for_each_mapped_area_from(start, [&](const MappedArea& area) {
    const bool first = at == start;
    // One that begins before has grown since the last was told.
    if (area.file || area.start > at) return false;
    const bool writable = area.readable && area.writable;
    if (!writable) in_writable_part = false;
    // Beyond the tail without access begins somebody else's memory; so it does where access is another.
    if (writable && !in_writable_part) return false;
    if (!writable && (area.readable || first)) return false;
    (in_writable_part ? span.writable_bytes : span.reserved_bytes) += area.end.value - at.value;
    at = area.end;
    return true;
  });
  span.reserved_bytes += span.writable_bytes;
  return span;
}

}  // namespace memferry::bind
