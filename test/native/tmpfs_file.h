// A file in tmpfs that other than a memfd had a name.
#pragma once

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <string>

#include "os/sys_error.h"
#include "os/unique_fd.h"

namespace memferry {

inline UniqueFd file_in_tmpfs() {
  std::string name = "/dev/shm/memferry-test-XXXXXX";
  UniqueFd file(::mkostemp(name.data(), O_CLOEXEC));
  if (!file) throw_errno("mkostemp in /dev/shm");
  ::unlink(name.c_str());
  return file;
}

}  // namespace memferry
