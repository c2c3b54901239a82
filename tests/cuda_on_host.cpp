// The CUDA kernels of sign statistics on the CPU: csrc/cuda/signs.cuh with threads that are fibers.
// Threads of a block run one after the other, each up to the next barrier, in an order that the
// request names; so a barrier that is missing shows. What lies behind factors and workspace cannot
// be touched. Requests come on stdin, counts go to stdout; see tests/test_cuda_on_host.py.
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/signs.hpp"

using namespace mergeprobe;
using namespace mergeprobe::cuda;

namespace {

enum Fault : i64 { kNoFault, kLastSlab, kEdge, kNoWait, kZerosIgnored, kLanesSwapped, kNotFused };

[[noreturn]] void stop(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::exit(3);
}

class Block;

struct Fiber {
  Block* of = nullptr;
  int number = 0;
  bool done = false, waiting = false;
  int barriers = 0;
  ucontext_t context{};
  struct Copy { Four* to; const u32* from; bool there; };
  std::vector<Copy> copies;  // not there yet
  struct Product { int* sums; Two low, high, right; };
  std::vector<Product> products;  // what it brings to its warp's instructions since a barrier

  int thread() const { return number; }
  i64 block() const;
  i64 split() const;
  void sync();
  bool all(bool x);
  float fma(float a, float b, float c) const;
  int ones(u32 x) const { return __builtin_popcount(x); }
  void add(i64* to, i64 x) const { *to += x; }
  void least(i64* to, i64 x) const { *to = std::min(*to, x); }
  void warp_add(i64* to, int x) const { *to += x; }
  void copy(Four* to, const u32* from, bool there) {
    if (reinterpret_cast<std::uintptr_t>(from) % 16) stop("a copy is not aligned");
    copies.push_back({to, from, there});
  }
  void wait();
  void and_popc(int* d, Two a_low, Two a_high, Two b);
};

class Block {
 public:
  // skipped: the number of a barrier that threads run through, 0 for none.
  Block(i64 block, i64 split, int order, Fault fault, i64 skipped)
      : block_(block), split_(split), order_(order), fault_(fault), skipped_(skipped),
        fibers_(kThreads) {}

  void run(const std::function<void(Fiber&)>& body) {
    body_ = &body;
    for (int i = 0; i < kThreads; i++) start(fibers_[i], i);
    for (int left = kThreads; left > 0;) {
      bool moved = false;
      for (int e = 0; e < kThreads; e++) {
        Fiber& f = fibers_[order_ == 0 ? e : order_ == 1 ? kThreads - 1 - e : e * 77 % kThreads];
        if (f.done || f.waiting) continue;
        moved = true;
        swapcontext(&main_, &f.context);
        left -= f.done;
      }
      if (!moved) stop("threads wait for each other");
    }
  }

  i64 block() const { return block_; }
  i64 split() const { return split_; }
  Fault fault() const { return fault_; }
  i64 skipped() const { return skipped_; }

  // A barrier. The last thread that comes wakes the others.
  void meet(Fiber& f, bool x) {
    f.waiting = true;
    vote_ = vote_ && x;
    if (++here_ < kThreads) {
      swapcontext(&f.context, &main_);
      return;
    }
    for (int i = 0; i < kThreads; i++) {
      if (fibers_[i].done) stop("a thread has left before the others");
      fibers_[i].waiting = false;
      if (i % 32 == 0) multiply(&fibers_[i]);
    }
    result_ = vote_;
    vote_ = true;
    here_ = 0;
  }
  bool result() const { return result_; }

 private:
  void start(Fiber& f, int number) {
    f.of = this;
    f.number = number;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stack(number);
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &main_;
    const auto self = reinterpret_cast<std::uintptr_t>(&f);
    makecontext(&f.context, reinterpret_cast<void (*)()>(&Block::enter), 2,
                static_cast<unsigned>(self), static_cast<unsigned>(self >> 32));
  }
  void multiply(Fiber* lanes) const;

  static constexpr std::size_t kStack = 1 << 17;
  static char* stack(int i) {
    static const auto all = std::make_unique<char[]>(kThreads * kStack);
    return all.get() + i * kStack;
  }
  static void enter(unsigned low, unsigned high) {
    Fiber& f = *reinterpret_cast<Fiber*>(std::uintptr_t{low} | std::uintptr_t{high} << 32);
    (*f.of->body_)(f);
    f.done = true;
  }

  i64 block_, split_;
  int order_;
  Fault fault_;
  i64 skipped_;
  const std::function<void(Fiber&)>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  ucontext_t main_{};
  int here_ = 0;  // threads at the barrier
  bool vote_ = true, result_ = true;
};

i64 Fiber::block() const { return of->block(); }
i64 Fiber::split() const { return of->split(); }
void Fiber::sync() {
  if (++barriers != of->skipped()) of->meet(*this, true);
}
float Fiber::fma(float a, float b, float c) const {
  if (of->fault() != kNotFused) return std::fmaf(a, b, c);
  const volatile float product = a * b;
  return product + c;
}
bool Fiber::all(bool x) {
  of->meet(*this, x);
  return of->result() || of->fault() == kZerosIgnored;
}
void Fiber::wait() {
  if (of->fault() == kNoWait) return;
  for (const Copy& c : copies) {
    Four x{};
    if (c.there) std::memcpy(&x, c.from, sizeof x);
    *c.to = x;
  }
  copies.clear();
}
// Nobody reads sums before the next barrier, so the instruction may wait until then.
void Fiber::and_popc(int* d, Two a_low, Two a_high, Two b) {
  if (of->fault() == kLanesSwapped) std::swap(a_low, a_high);
  products.push_back({d, a_low, a_high, b});
}
// PTX ISA, fragments of mma.m16n8k256 of type b1: bit i of a lies in row `group`, 8 lower for
// registers 1 and 3, at column 32 * lane + i, 128 further for registers 2 and 3; bit i of b at row
// 32 * lane + i, 128 further for register 1, in column `group`; d[i] in row `group`, 8 lower for
// i > 1, at column 2 * lane + i % 2.
void Block::multiply(Fiber* lanes) const {
  for (std::size_t p = 0; p < lanes[0].products.size(); p++) {
    u32 rows[16][8], columns[8][8];  // words of 32 bits along the 256
    for (int i = 0; i < 32; i++) {
      if (lanes[i].products.size() != lanes[0].products.size()) stop("lanes are apart");
      const Fiber::Product& x = lanes[i].products[p];
      for (int r = 0; r < 2; r++) {
        rows[i / 4][i % 4 + 4 * r] = x.low.v[r];
        rows[i / 4 + 8][i % 4 + 4 * r] = x.high.v[r];
        columns[i / 4][i % 4 + 4 * r] = x.right.v[r];
      }
    }
    for (int i = 0; i < 32; i++)
      for (int e = 0; e < 4; e++) {
        const u32 *y = rows[i / 4 + (e > 1 ? 8 : 0)], *x = columns[i % 4 * 2 + e % 2];
        for (int w = 0; w < 8; w++)
          lanes[i].products[p].sums[e] += __builtin_popcount(y[w] & x[w]);
      }
  }
  for (int i = 0; i < 32; i++) lanes[i].products.clear();
}

struct Host {
  bool matrix;
  int order;
  Fault fault;
  i64 skipped[2];  // barriers of generate and of count
  i64 slabs;       // of the whole call
  i64 seen = 0;

  void clear(void* data, i64 bytes, int value) const {
    std::memset(data, value, static_cast<std::size_t>(bytes));
  }
  void upload(SignDelta* to, const SignDelta* from, i64 n) const { std::copy_n(from, n, to); }

  template <class Shared, class Body>
  void blocks(i64 n, i64 splits, i64 barrier, const Body& body) const {
    for (i64 e = 0; e < n * splits; e++) {
      const i64 at = order == 0 ? e : n * splits - 1 - e;
      const auto shared = std::make_unique<Shared>();
      std::memset(static_cast<void*>(shared.get()), 0x3f, sizeof(Shared));
      Block(at % n, at / n, order, fault, barrier).run([&](Fiber& f) { body(*shared, f); });
    }
  }
  void generate(i64 n, SignSlab slab) {
    if (++seen == slabs && fault == kLastSlab) return;
    if (fault == kEdge) slab.d_in++;
    blocks<GenerateShared>(n, 1, skipped[0], [&](GenerateShared& shared, Fiber& f) {
      mergeprobe::cuda::generate(slab, shared, f);
    });
  }
  void count(i64 n, i64 splits, const SignSlab& slab, const SignCounts& counts) const {
    blocks<CountShared>(n, splits, skipped[1], [&](CountShared& shared, Fiber& f) {
      if (matrix) {
        mergeprobe::cuda::count<BinaryMatrix>(slab, counts, shared, f);
      } else {
        mergeprobe::cuda::count<Scalar>(slab, counts, shared, f);
      }
    });
  }
};

template <class X>
std::vector<X> read(std::size_t n) {
  std::vector<X> x(n);
  if (n && std::fread(x.data(), sizeof(X), n, stdin) != n) stop("the request is too short");
  return x;
}

// Memory that ends, up to 16 bytes, where a page begins that cannot be touched.
class Guarded {
 public:
  explicit Guarded(i64 bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const auto used = (static_cast<std::size_t>(bytes) + page - 1) / page * page;
    size_ = used + page;
    void* const all =
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) stop("no memory");
    base_ = static_cast<char*>(all);
    mprotect(base_ + used, page, PROT_NONE);
    data_ = base_ + (used - static_cast<std::size_t>(bytes)) / 16 * 16;
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  char* data() const { return data_; }

 private:
  std::size_t size_;
  char *base_, *data_;
};

}  // namespace

// A request: n, d_out, d_in, tiles of a slab, multiprocessors, matrix, order, fault, barriers to be
// left out of generate and of count, bytes of factors; then per delta rank, sign, and of u and of v
// offset, strides and dtype; the factors.
int main() {
  for (;;) {
    i64 head[11];
    if (std::fread(head, sizeof head, 1, stdin) != 1) return 0;
    const auto [n, d_out, d_in, tiles, processors, matrix, order, fault, first, second, bytes] =
        head;
    const auto rows = read<i64>(static_cast<std::size_t>(10 * n));
    const Guarded data(bytes);
    if (bytes && std::fread(data.data(), static_cast<std::size_t>(bytes), 1, stdin) != 1)
      stop("the request is too short");
    std::vector<SignDelta> deltas;
    for (i64 i = 0; i < n; i++) {
      const i64* r = rows.data() + 10 * i;
      deltas.push_back({{data.data() + r[2], r[3], r[4], static_cast<Dtype>(r[5])},
                        {data.data() + r[6], r[7], r[8], static_cast<Dtype>(r[9])},
                        static_cast<std::int32_t>(r[0]), static_cast<std::int32_t>(r[1])});
    }
    const i64 space = sign_table_bytes(n) + tiles * sign_tile_bytes(n);
    if (sign_workspace(n, d_out, d_in, space) > space) stop("more workspace than was asked for");
    const Guarded workspace(space);
    std::memset(workspace.data(), 0xa5, static_cast<std::size_t>(space));
    std::vector<i64> found(static_cast<std::size_t>(2 * n * n + 1), -1);
    SignCall call{deltas.data(), n, d_out, d_in, found.data(), found.data() + n * n,
                  found.data() + 2 * n * n, workspace.data(), space, static_cast<int>(processors)};
    const i64 all = sign_tiles(d_out, d_in);
    Host host{matrix != 0, static_cast<int>(order), static_cast<Fault>(fault), {first, second},
              ceil_div(all, std::min(all, tiles))};
    run_signs(call, host);
    std::fwrite(found.data(), 8, found.size(), stdout);
    std::fflush(stdout);
  }
}
