// With bind_*.cpp the only files that know Python: checks shapes, releases the GIL, calls
// the kernels.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "bind/dlpack.hpp"
#include "bind/records.hpp"
#include "mergeprobe/canonical.hpp"
#include "mergeprobe/gram.hpp"
#include "mergeprobe/read.hpp"

namespace py = pybind11;
using namespace mergeprobe;
using namespace mergeprobe::bind;

void bind_tiles(py::module_& m);  // bind_tiles.cpp
void bind_sets(py::module_& m);   // bind_sets.cpp
void bind_angles(py::module_& m);  // bind_angles.cpp
void bind_entries(py::module_& m);  // bind_entries.cpp
void bind_forest(py::module_& m);  // bind_forest.cpp

namespace {

struct Stack {
  std::vector<Block> blocks;

  Stack(const MatrixView& u, const MatrixView& v, const I64Array& offsets, const char* u_name,
        const char* v_name, const char* offsets_name) {
    if (v.rows() != u.rows())
      fail(v_name, "expected " + std::to_string(u.rows()) + " rows like " + u_name + ", got " +
                       std::to_string(v.rows()));
    expect_bounds(offsets, u.rows(), offsets_name);
    for (py::ssize_t i = 0; i + 1 < offsets.size(); i++) {
      const i64 row = offsets.data()[i];
      Block b{u.matrix(), v.matrix(), offsets.data()[i + 1] - row};
      b.u.data = at(u.matrix(), row, 0);
      b.v.data = at(v.matrix(), row, 0);
      blocks.push_back(b);
    }
  }
};

Reduce reduction(const std::string& name) {
  if (name == "both") return Reduce::both;
  if (name == "columns") return Reduce::columns;
  if (name == "none") return Reduce::none;
  fail("reduce", "expected 'both', 'columns' or 'none', got '" + name + "'");
}

void py_block_gram(const py::object& u, const py::object& v, const I64Array& offsets,
                   const py::object& u2, const py::object& v2, const py::object& offsets2,
                   const std::string& reduce, bool fp64, int threads, const std::string& isa,
                   i64 tile_rows, F64Array& out) {
  const MatrixView mu(u, "U"), mv(v, "V");
  const Stack first(mu, mv, offsets, "U", "V", "offsets");
  GramModule g{};
  g.blocks1 = first.blocks.data();
  g.n1 = static_cast<i64>(first.blocks.size());
  g.p = mu.columns();
  g.q = mv.columns();
  std::vector<MatrixView> views;
  std::vector<Block> second;
  i64 rows2 = mu.rows(), n2 = g.n1;
  if (!u2.is_none()) {
    views.emplace_back(u2, "U2");
    views.emplace_back(v2, "V2");
    if (views[0].columns() != g.p) fail("U2", "expected " + std::to_string(g.p) + " columns like U");
    if (views[1].columns() != g.q) fail("V2", "expected " + std::to_string(g.q) + " columns like V");
    second = Stack(views[0], views[1], offsets2.cast<I64Array>(), "U2", "V2", "offsets2").blocks;
    // An empty second stack is still a second stack.
    static const Block none{};
    g.blocks2 = second.empty() ? &none : second.data();
    n2 = g.n2 = static_cast<i64>(second.size());
    rows2 = views[0].rows();
  }
  GramOptions options{&kernels_called(isa), threads, fp64, tile_rows, reduction(reduce)};
  const i64 want_rows = options.reduce == Reduce::both ? g.n1 : mu.rows();
  const i64 want_columns = options.reduce == Reduce::none ? rows2 : n2;
  expect(out.ndim() == 2 && out.shape(0) == want_rows && out.shape(1) == want_columns, "out",
         "wrong shape");
  double* target = out.mutable_data();
  g.out = &target;
  g.out_stride = want_columns;
  const Epilogue sum{Product::uv, -1, -1};
  py::gil_scoped_release release;
  block_gram(&g, 1, &sum, 1, options);
}

struct Side {
  const Block* blocks = nullptr;
  const i64* bounds = nullptr;
  std::vector<i64> first_row;
  const double* weights = nullptr;
  i64 n_weights = 0, rows = 0;

  Side(const py::array& table, const I64Array& module_bounds, const F64Array& w, i64 modules,
       const char* name) {
    blocks = records<Block>(table, name);
    expect(module_bounds.size() == modules + 1, name, "bounds do not fit the modules");
    expect_bounds(module_bounds, table.size(), name);
    bounds = module_bounds.data();
    first_row.assign(1, 0);
    for (i64 l = 0; l < modules; l++) {
      for (i64 i = bounds[l]; i < bounds[l + 1]; i++) {
        expect(blocks[i].rank >= 0, name, "negative rank");
        rows += blocks[i].rank;
      }
      first_row.push_back(rows);
    }
    expect(w.ndim() == 2 && (w.shape(0) == 0 || w.shape(1) == rows), name,
           "weights need one value per stacked row");
    weights = w.data();
    n_weights = w.shape(0);
  }
};

// Views of a pass: matrices of every block, view by view, and how many columns each has a module.
struct PassViews {
  std::vector<View> views;      // module by module
  std::vector<int> of_epilogue;  // Epilogue::view of each
  i64 count = 0;

  PassViews(const py::object& given, const Side& one, const Side& two, i64 modules,
            std::size_t epilogues, bool symmetric) {
    if (given.is_none()) {
      of_epilogue.assign(epilogues, 0);
      return;
    }
    const auto [table1, table2, columns, chosen] =
        given.cast<std::tuple<py::array, py::object, I64Array, std::vector<int>>>();
    expect(columns.ndim() == 2 && columns.shape(1) == modules, "views",
           "columns need one row per view and one value per module");
    count = columns.shape(0);
    const i64 n1 = one.bounds[modules], n2 = two.bounds[modules];
    const Matrix* first = records<Matrix>(table1, "views");
    expect(table1.size() == count * n1, "views", "one matrix per view and block");
    const Matrix* second = first;
    if (!symmetric) {
      const py::array other = table2.cast<py::array>();
      second = records<Matrix>(other, "views");
      expect(other.size() == count * n2, "views", "one matrix per view and block of table2");
    }
    for (i64 l = 0; l < modules; l++)
      for (i64 k = 0; k < count; k++) {
        const i64 q = columns.data()[k * modules + l];
        expect(q >= 0, "views", "negative number of columns");
        views.push_back({first + k * n1 + one.bounds[l], second + k * n2 + two.bounds[l], q});
      }
    of_epilogue = chosen;
    expect(of_epilogue.size() == epilogues, "views", "name one view per epilogue");
    for (int view : of_epilogue) expect(view >= 0 && view <= count, "views", "no such view");
  }
};

void py_gram_pass(const py::array& table1, const I64Array& bounds1, const F64Array& weights1,
                  const py::object& table2, const py::object& bounds2, const py::object& weights2,
                  const I64Array& p, const I64Array& q,
                  const std::vector<std::tuple<int, int, int>>& epilogues, F64Array& out,
                  const I64Array& out_bounds, bool fp64, int threads, const std::string& isa,
                  i64 tile_rows, const py::object& views, int streaming) {
  const i64 modules = p.size();
  expect(q.size() == modules, "q", "one value per module");
  const Side one(table1, bounds1, weights1, modules, "table1");
  const bool symmetric = table2.is_none();
  const py::array t2 = symmetric ? table1 : table2.cast<py::array>();
  const I64Array b2 = symmetric ? bounds1 : bounds2.cast<I64Array>();
  const F64Array w2 = symmetric ? weights1 : weights2.cast<F64Array>();
  const Side two(t2, b2, w2, modules, "table2");
  expect(one.n_weights == two.n_weights, "weights2", "as many weight vectors as weights1");
  const PassViews others(views, one, two, modules, epilogues.size(), symmetric);
  std::vector<Epilogue> list;
  for (const auto& [product, row, column] : epilogues) {
    expect(product >= 0 && product <= 2, "epilogues", "unknown product");
    expect(row >= -1 && row < one.n_weights && column >= -1 && column < one.n_weights, "epilogues",
           "no such weight vector");
    list.push_back({static_cast<Product>(product), row, column, others.of_epilogue[list.size()]});
  }
  expect(out.ndim() == 2 && out.shape(0) == static_cast<py::ssize_t>(list.size()), "out",
         "one row per epilogue");
  expect(out_bounds.size() == modules + 1, "out_bounds", "one bound per module and one more");
  expect_bounds(out_bounds, out.shape(1), "out_bounds");

  const i64 n_w = one.n_weights, n_e = static_cast<i64>(list.size()), total = out.shape(1);
  std::vector<const double*> w1(static_cast<std::size_t>(modules * n_w)), w2p(w1.size());
  std::vector<double*> targets(static_cast<std::size_t>(modules * n_e));
  std::vector<GramModule> jobs(static_cast<std::size_t>(modules));
  static const Block none{};
  for (i64 l = 0; l < modules; l++) {
    for (i64 k = 0; k < n_w; k++) {
      w1[l * n_w + k] = one.weights + k * one.rows + one.first_row[l];
      w2p[l * n_w + k] = two.weights + k * two.rows + two.first_row[l];
    }
    for (i64 e = 0; e < n_e; e++)
      targets[l * n_e + e] = out.mutable_data() + e * total + out_bounds.data()[l];
    GramModule& g = jobs[l];
    g.n1 = one.bounds[l + 1] - one.bounds[l];
    g.n2 = two.bounds[l + 1] - two.bounds[l];
    g.blocks1 = one.blocks + one.bounds[l];
    g.blocks2 = symmetric ? nullptr : g.n2 ? two.blocks + two.bounds[l] : &none;
    g.p = p.data()[l];
    g.q = q.data()[l];
    g.weights1 = w1.data() + l * n_w;
    g.weights2 = w2p.data() + l * n_w;
    g.out = targets.data() + l * n_e;
    g.out_stride = g.n2;
    g.views = others.views.data() + l * others.count;
    expect(out_bounds.data()[l + 1] - out_bounds.data()[l] == g.n1 * g.n2, "out_bounds",
           "a module needs n1 * n2 entries");
  }
  expect(streaming >= 0 && streaming <= 2, "streaming", "expected 0, 1 or 2");
  const GramOptions options{&kernels_called(isa), threads, fp64, tile_rows, Reduce::both,
                            static_cast<Streaming>(streaming)};
  py::gil_scoped_release release;
  block_gram(jobs.data(), modules, list.data(), static_cast<int>(n_e), options);
}

// The layout of a job record; see mergeprobe_fast/ops/_tables.py.
struct CanonicalJob {
  i64 d_out, d_in, max_rank;
  void* u_out;
  i64 u_row, u_col;
  void* v_out;
  i64 v_row, v_col;
  i64 sigma;  // where the spectrum starts in `sigma`
  i64 rank, numerical_rank, status, bad_segment;
};

void py_canonicalise(const py::array& segments, const I64Array& bounds, py::array& jobs,
                     F64Array& sigma, bool fp64_out, bool sigma_in_u, double relative, double noise,
                     int threads, const std::string& isa) {
  const Segment* s = records<Segment>(segments, "segments");
  CanonicalJob* job = records<CanonicalJob>(jobs, "jobs");
  const i64 n = jobs.size();
  expect(bounds.size() == n + 1, "bounds", "one bound per job and one more");
  expect_bounds(bounds, segments.size(), "bounds");
  std::vector<CanonicalEntry> entries(static_cast<std::size_t>(n));
  for (i64 i = 0; i < n; i++) {
    CanonicalEntry& e = entries[i];
    e = CanonicalEntry{};
    e.segments = s + bounds.data()[i];
    e.n_segments = bounds.data()[i + 1] - bounds.data()[i];
    i64 stacked = 0;
    for (i64 k = 0; k < e.n_segments; k++) stacked += e.segments[k].rank;
    const i64 values = std::min({stacked, job[i].d_out, job[i].d_in});
    expect(job[i].sigma >= 0 && job[i].sigma + values <= sigma.size(), "sigma", "too short");
    e.d_out = job[i].d_out;
    e.d_in = job[i].d_in;
    e.max_rank = job[i].max_rank;
    e.u_out = job[i].u_out;
    e.u_row = job[i].u_row;
    e.u_col = job[i].u_col;
    e.v_out = job[i].v_out;
    e.v_row = job[i].v_row;
    e.v_col = job[i].v_col;
    e.out_dtype = fp64_out ? Dtype::f64 : Dtype::f32;
    e.sigma_in_u = sigma_in_u;
    e.sigma = sigma.mutable_data() + job[i].sigma;
  }
  const Kernels& k = kernels_called(isa);
  {
    py::gil_scoped_release release;
    canonicalise(entries.data(), n, RankRule{relative, noise}, k, threads);
  }
  for (i64 i = 0; i < n; i++) {
    job[i].rank = entries[i].rank;
    job[i].numerical_rank = entries[i].numerical_rank;
    job[i].status = static_cast<i64>(entries[i].status);
    job[i].bad_segment = entries[i].bad_segment;
  }
}

py::object py_read_files(const std::vector<std::string>& paths, const I64Array& stamps,
                         const I64Array& bounds, const I64Array& offsets, const I64Array& nbytes,
                         const I64Array& targets, int threads) {
  const i64 n = static_cast<i64>(paths.size());
  expect(n == 0 || (stamps.ndim() == 2 && stamps.shape(0) == n && stamps.shape(1) == 4), "stamps",
         "size, mtime_ns, ctime_ns and inode per path");
  expect(bounds.size() == n + 1, "bounds", "one bound per path and one more");
  expect_bounds(bounds, offsets.size(), "bounds");
  expect(nbytes.size() == offsets.size() && targets.size() == offsets.size(), "targets",
         "one per range");
  std::vector<FileRead> files(static_cast<std::size_t>(n));
  for (i64 i = 0; i < n; i++) {
    const i64* s = stamps.data() + 4 * i;
    files[i] = {paths[i].c_str(), s[0], s[1], s[2], s[3], {}};
    for (i64 r = bounds.data()[i]; r < bounds.data()[i + 1]; r++) {
      expect(offsets.data()[r] >= 0 && nbytes.data()[r] >= 0, "offsets", "negative");
      files[i].ranges.push_back(
          {offsets.data()[r], nbytes.data()[r], reinterpret_cast<void*>(targets.data()[r])});
    }
  }
  std::string error;
  {
    py::gil_scoped_release release;
    error = read_files(files, threads);
  }
  if (error.empty()) return py::none();
  const auto tab = error.find('\t');
  return py::make_tuple(std::stoll(error.substr(0, tab)), error.substr(tab + 1));
}

py::dict build_info() {
  py::dict info;
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#elif defined(_MSC_VER)
  info["compiler"] = "MSVC " + std::to_string(_MSC_VER);
#endif
#if defined(MP_HAVE_X86_SETS)
  info["instruction_sets"] = py::make_tuple("avx512", "avx2", "baseline");
#else
  info["instruction_sets"] = py::make_tuple("baseline");
#endif
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR);
  return info;
}

std::vector<std::string> available_isas() {
  const Kernels* all[4];
  const int n = available_kernels(all, 4);
  std::vector<std::string> names;
  for (int i = 0; i < n; i++) names.emplace_back(all[i]->isa);
  return names;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "CPU kernels on LoRA factors. Use mergeprobe_fast.ops, which checks and documents.";
  m.def("block_gram", &py_block_gram, py::arg("U"), py::arg("V"), py::arg("offsets").noconvert(),
        py::arg("U2"), py::arg("V2"), py::arg("offsets2"), py::arg("reduce"), py::arg("fp64"),
        py::arg("threads"), py::arg("isa"), py::arg("tile_rows"), py::arg("out").noconvert(),
        "P1 on two stacks of rows (DLPack tensors); writes float64 into out.");
  m.def("gram_pass", &py_gram_pass, py::arg("table1"), py::arg("bounds1").noconvert(),
        py::arg("weights1").noconvert(), py::arg("table2"), py::arg("bounds2"),
        py::arg("weights2"), py::arg("p").noconvert(), py::arg("q").noconvert(),
        py::arg("epilogues"), py::arg("out").noconvert(), py::arg("out_bounds").noconvert(),
        py::arg("fp64"), py::arg("threads"), py::arg("isa"), py::arg("tile_rows"),
        py::arg("views") = py::none(), py::arg("streaming") = 0,
        "P1 over many modules at once, several epilogues on the same tiles. views: records of "
        "views of table1 and of table2, columns per view and module, and the view each epilogue "
        "reads (0: v itself). streaming: dense matrices never (0), where it pays (1), always (2).");
  m.def("canonicalise", &py_canonicalise, py::arg("segments"), py::arg("bounds").noconvert(),
        py::arg("jobs"), py::arg("sigma").noconvert(), py::arg("fp64_out"), py::arg("sigma_in_u"),
        py::arg("relative"), py::arg("noise"), py::arg("threads"), py::arg("isa"),
        "P3: singular values and vectors of s B A from the factors; results land in jobs.");
  bind_tiles(m);
  bind_sets(m);
  bind_angles(m);
  bind_entries(m);
  bind_forest(m);
  m.def("read_files", &py_read_files, py::arg("paths"), py::arg("stamps").noconvert(),
        py::arg("bounds").noconvert(),
        py::arg("offsets").noconvert(), py::arg("nbytes").noconvert(),
        py::arg("targets").noconvert(), py::arg("threads"),
        "Reads byte ranges of files into given addresses; (index, reason) of the first failure.");
  m.def("build_info", &build_info, "What this module was built with.");
  m.def("available_isas", &available_isas, "Instruction sets that can be used here, best first.");
}
