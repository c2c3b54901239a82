#include "mergeprobe/read.hpp"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "mergeprobe/parallel.hpp"

#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#include <sys/stat.h>
#else
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace mergeprobe {
namespace {

#if defined(_WIN32)
constexpr i64 kLargestRead = 1 << 30;
int open_file(const char* path) { return _open(path, _O_RDONLY | _O_BINARY); }
void close_file(int fd) { _close(fd); }
i64 read_at(int fd, void* to, i64 bytes, i64 offset) {
  if (_lseeki64(fd, offset, SEEK_SET) < 0) return -1;
  return _read(fd, to, static_cast<unsigned>(bytes));
}
bool unchanged(int fd, const FileRead& f) {
  struct _stat64 st;
  return _fstat64(fd, &st) == 0 && st.st_size == f.size;
}
#else
constexpr i64 kLargestRead = i64{1} << 30;
int open_file(const char* path) { return ::open(path, O_RDONLY | O_CLOEXEC); }
void close_file(int fd) { ::close(fd); }
i64 read_at(int fd, void* to, i64 bytes, i64 offset) {
  return ::pread(fd, to, static_cast<std::size_t>(bytes), offset);
}
bool unchanged(int fd, const FileRead& f) {
  struct stat st;
  if (::fstat(fd, &st) != 0 || st.st_size != f.size) return false;
#if defined(__APPLE__)
  const auto modified = st.st_mtimespec, changed = st.st_ctimespec;
#else
  const auto modified = st.st_mtim, changed = st.st_ctim;
#endif
  return i64{modified.tv_sec} * 1000000000 + modified.tv_nsec == f.mtime_ns &&
         i64{changed.tv_sec} * 1000000000 + changed.tv_nsec == f.ctime_ns &&
         static_cast<i64>(st.st_ino) == f.inode;
}
#endif

std::string read_one(const FileRead& file) {
  const int fd = open_file(file.path);
  if (fd < 0) return std::strerror(errno);
  std::string error;
  if (!unchanged(fd, file)) error = "changed since its header was read";
  for (const FileRange& range : file.ranges) {
    if (!error.empty()) break;
    char* to = static_cast<char*>(range.target);
    for (i64 done = 0; done < range.bytes;) {
      const i64 ask = range.bytes - done < kLargestRead ? range.bytes - done : kLargestRead;
      const i64 got = read_at(fd, to + done, ask, range.offset + done);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) {
        error = got < 0 ? std::strerror(errno) : "ended while being read (the file shrank)";
        break;
      }
      done += got;
    }
  }
  // A writer that changed the file during the reads gives neither the old nor the new weights.
  if (error.empty() && !unchanged(fd, file)) error = "changed while being read";
  close_file(fd);
  return error;
}

}  // namespace

std::string read_files(const std::vector<FileRead>& files, int threads) {
  std::vector<std::string> errors(files.size());
  parallel_for(static_cast<i64>(files.size()), threads,
               [&](i64 i, int) { errors[i] = read_one(files[i]); });
  for (std::size_t i = 0; i < errors.size(); i++)
    if (!errors[i].empty()) return std::to_string(i) + "\t" + errors[i];
  return {};
}

}  // namespace mergeprobe
