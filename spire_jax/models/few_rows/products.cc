// A few rows times a weight matrix on CPUs: each weight is read once, on all cores, in the type that
// it is stored in. Called through XLA's foreign function interface; see api.py for what it computes.
//
//   x [M, K] float32, w [K, N] or (transposed) [N, K] float32 or bfloat16  ->  out [M, N] float32
//
// The columns of the result are cut into pieces that the threads of XLA's own pool take one after
// the other. The thread that was called takes pieces too and waits only for those that others have
// begun, so that a busy pool costs speed and nothing else.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kGroup = 12;        // rows of x that share what is read of w: their sums of `rows`
                                  // fill the registers
constexpr int64_t kMaxRows = 64;  // MAX_ROWS of api.py: further groups read w from the cache
constexpr int64_t kLanes = 16;    // numbers of a vector
constexpr int64_t kWide = 512;    // columns whose sums stay in the first-level cache
constexpr int64_t kDeep = 8;      // rows of w that are added to the sums at a time
constexpr int64_t kPiece = 128 << 10;  // bytes of weights that are worth a thread's start

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

inline Floats load(const float* at) { return *reinterpret_cast<const Floats*>(at); }

// A bfloat16 is the upper half of a float32.
inline Floats load(const uint16_t* at) {
#if defined(__AVX512F__)  // two instructions; GCC 12 makes many of the general form
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#else
  const Halves halves = *reinterpret_cast<const Halves*>(at);
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
#endif
}

inline float one(float value) { return value; }

inline float one(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

inline float sum(Floats v) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight eight[2];
  std::memcpy(eight, &v, sizeof(v));
  eight[0] += eight[1];
  Four four[2];
  std::memcpy(four, eight, sizeof(four));
  four[0] += four[1];
  return (four[0][0] + four[0][1]) + (four[0][2] + four[0][3]);
}

// out[:, begin:end] = x @ w[:, begin:end], for at most kWide columns.
template <int M, typename W>
void strip(const float* x, const W* w, float* out, int64_t k, int64_t n, int64_t begin,
           int64_t end) {
  alignas(64) float sums[M][kWide];
  const int64_t width = end - begin, whole = width / kLanes * kLanes;
  for (int m = 0; m < M; ++m) std::fill_n(sums[m], width, 0.0f);
  int64_t i = 0;
  for (; i + kDeep <= k; i += kDeep) {
    const W* row = w + i * n + begin;
    for (int64_t j = 0; j < whole; j += kLanes) {
      Floats read[kDeep];
      for (int r = 0; r < kDeep; ++r) read[r] = load(row + r * n + j);
      for (int m = 0; m < M; ++m) {
        const float* of = x + m * k + i;
        Floats at = load(&sums[m][j]);
        for (int r = 0; r < kDeep; ++r) at += of[r] * read[r];
        *reinterpret_cast<Floats*>(&sums[m][j]) = at;
      }
    }
    for (int64_t j = whole; j < width; ++j)
      for (int m = 0; m < M; ++m)
        for (int r = 0; r < kDeep; ++r) sums[m][j] += x[m * k + i + r] * one(row[r * n + j]);
  }
  for (; i < k; ++i)
    for (int64_t j = 0; j < width; ++j)
      for (int m = 0; m < M; ++m) sums[m][j] += x[m * k + i] * one(w[i * n + begin + j]);
  for (int m = 0; m < M; ++m) std::copy_n(sums[m], width, out + m * n + begin);
}

template <int M, typename W>
void columns(const float* x, const W* w, float* out, int64_t k, int64_t n, int64_t begin,
             int64_t end) {
  for (int64_t at = begin; at < end; at += kWide)
    strip<M>(x, w, out, k, n, at, std::min(end, at + kWide));
}

// out[:, begin:end] = x @ w[begin:end].T; two rows of w at a time share what is read of x.
template <int M, typename W>
void rows(const float* x, const W* w, float* out, int64_t k, int64_t n, int64_t begin,
          int64_t end) {
  const int64_t whole = k / kLanes * kLanes;
  for (int64_t j = begin; j < end; j += 2) {
    const W* first = w + j * k;
    const W* second = j + 1 < end ? first + k : first;
    Floats sums[M][2] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Floats a = load(first + i), b = load(second + i);
      for (int m = 0; m < M; ++m) {
        const Floats of = load(x + m * k + i);
        sums[m][0] += of * a;
        sums[m][1] += of * b;
      }
    }
    for (int m = 0; m < M; ++m) {
      float a = sum(sums[m][0]), b = sum(sums[m][1]);
      for (int64_t i = whole; i < k; ++i) {
        a += x[m * k + i] * one(first[i]);
        b += x[m * k + i] * one(second[i]);
      }
      out[m * n + j] = a;
      if (j + 1 < end) out[m * n + j + 1] = b;
    }
  }
}

template <typename W>
using Piece = void (*)(const float*, const W*, float*, int64_t, int64_t, int64_t, int64_t);

template <typename W, int M = kGroup>
Piece<W> piece_of(int64_t m, bool transposed) {
  if constexpr (M > 1)
    if (m < M) return piece_of<W, M - 1>(m, transposed);
  return transposed ? rows<M, W> : columns<M, W>;
}

struct Shared {
  std::atomic<int64_t> next{0}, done{0};
};

template <typename W>
void product(ffi::ThreadPool pool, const float* x, const W* w, float* out, int64_t m, int64_t k,
             int64_t n, bool transposed) {
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t bytes = k * n * static_cast<int64_t>(sizeof(W));
  // Two pieces a thread, for one that comes late; whole vectors.
  const int64_t wanted = std::clamp<int64_t>(bytes / kPiece, 1, 2 * threads);
  const int64_t width = ((n + wanted - 1) / wanted + kLanes - 1) / kLanes * kLanes;
  const int64_t pieces = (n + width - 1) / width;
  const int64_t groups = (m + kGroup - 1) / kGroup, each = (m + groups - 1) / groups;
  const int64_t last = m - (groups - 1) * each;  // rows of the last group
  const Piece<W> group = piece_of<W>(each, transposed), rest = piece_of<W>(last, transposed);
  const auto shared = std::make_shared<Shared>();
  auto work = [=] {
    for (int64_t at; (at = shared->next.fetch_add(1)) < pieces;) {
      const int64_t begin = at * width, end = std::min(n, begin + width);
      int64_t row = 0;
      for (; row + each < m; row += each) group(x + row * k, w, out + row * n, k, n, begin, end);
      rest(x + row * k, w, out + row * n, k, n, begin, end);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t t = 1; t < std::min(threads, pieces); ++t) {
    auto copy = work;
    pool.Schedule(std::move(copy));
  }
  work();
  while (shared->done.load(std::memory_order_acquire) < pieces) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

using Matrix = ffi::Buffer<ffi::F32, 2>;

ffi::Error product_of_few_rows(ffi::ThreadPool pool, Matrix x, ffi::AnyBuffer w, bool transposed,
                               ffi::Result<Matrix> out) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = out->dimensions()[1];
  const auto shape = w.dimensions();
  if (m < 1 || m > kMaxRows || shape.size() != 2 || shape[transposed ? 1 : 0] != k ||
      shape[transposed ? 0 : 1] != n || out->dimensions()[0] != m)
    return ffi::Error::InvalidArgument("few_rows: shapes that api.py does not pass");
  if (w.element_type() == ffi::F32) {
    product(pool, x.typed_data(), w.typed_data<float>(), out->typed_data(), m, k, n, transposed);
  } else if (w.element_type() == ffi::BF16) {
    const auto* bits = static_cast<const uint16_t*>(w.untyped_data());
    product(pool, x.typed_data(), bits, out->typed_data(), m, k, n, transposed);
  } else {
    return ffi::Error::InvalidArgument("few_rows: weights must be float32 or bfloat16");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRowsProduct, product_of_few_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<bool>("transposed")
                                  .Ret<Matrix>());
