// Reads many ranges of many files into memory that the caller owns, several files at a time.
#pragma once
#include <string>
#include <vector>

#include "mergeprobe/types.hpp"

namespace mergeprobe {

struct FileRange {
  i64 offset, bytes;
  void* target;
};

struct FileRead {
  const char* path;
  i64 size, mtime_ns, ctime_ns, inode;  // as they were when the header was parsed
  std::vector<FileRange> ranges;
};

// Empty on success, otherwise "index\treason" of the first file that could not be read as stamped.
// Plain reads, no mapping: a file that shrinks is a short read, not a bus error.
std::string read_files(const std::vector<FileRead>& files, int threads);

}  // namespace mergeprobe
