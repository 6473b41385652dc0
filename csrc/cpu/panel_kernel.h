// The inner loop of the product, written once over a vector type. product.cpp includes it for each instruction set: SNOWS_SET allows a function its
// instructions, and the namespace around it has its Vector (vector.h). A line of the panel has `Line` bytes.

// Sums of two rows for V vectors of tokens, from `token` on, of a panel `width` tokens wide. An addition waits for the one before to the same
// sums, and with few vectors the processor for both: then steps go in turns to two Sets of sums.
template <int V, int Sets = 1, int Line = 64>
SNOWS_SET SNOWS_INLINE inline void multiply_pairs(const Part& p, int64_t width, int64_t token) {
  const float* w = p.weights;
  const uint16_t* c = p.lines;
  const char* const panel = static_cast<const char*>(p.panel) + 4 * token;
  const auto at = [panel](uint16_t line) SNOWS_SET SNOWS_INLINE { return reinterpret_cast<const float*>(panel + int64_t(line) * Line); };
  for (const Pair* pair = p.pairs; pair < p.pairs + p.count; ++pair) {
    float* first = p.sums + pair->first * width + token;
    float* second = p.sums + pair->second * width + token;
    Vector a[Sets][V], b[Sets][V];
    if (p.bias) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) a[0][v] = set(p.bias[pair->first]), b[0][v] = set(p.bias[pair->second]);
    } else {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) a[0][v] = load(first + kLanes * v), b[0][v] = load(second + kLanes * v);
    }
#pragma GCC unroll 16
    for (int v = 0; v < V && Sets == 2; ++v) a[Sets - 1][v] = b[Sets - 1][v] = set(0);

    const auto shared = [&](Vector(&a)[V], Vector(&b)[V]) SNOWS_SET SNOWS_INLINE {
      const float* x = at(c[0]);
      SNOWS_KEEP("r", x);
      const Vector of_first = set(w[0]), of_second = set(w[1]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        Vector tokens = load(x + kLanes * v);
        SNOWS_KEEP(SNOWS_VECTOR, tokens);
        a[v] = fmadd(of_first, tokens, a[v]);
        b[v] = fmadd(of_second, tokens, b[v]);
      }
      w += 2, ++c;
    };
    const auto both = [&](Vector(&a)[V], Vector(&b)[V]) SNOWS_SET SNOWS_INLINE {
      const auto lines = together<uint32_t>(c);
      const float *x = at(lines), *y = at(lines >> 16);
      SNOWS_KEEP("r", x);
      SNOWS_KEEP("r", y);
      const Vector of_first = set(w[0]), of_second = set(w[1]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) a[v] = fmadd(of_first, load(x + kLanes * v), a[v]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) b[v] = fmadd(of_second, load(y + kLanes * v), b[v]);
      w += 2, c += 2;
    };
    const auto rest = [&](Vector(&a)[V], Vector(&)[V]) SNOWS_SET SNOWS_INLINE {
      const float* x = at(c[0]);
      const Vector of_first = set(w[0]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) a[v] = fmadd(of_first, load(x + kLanes * v), a[v]);
      ++w, ++c;
    };
    const auto times = [&](int count, const auto& step) SNOWS_SET SNOWS_INLINE {
      for (; Sets == 2 && count >= 2; count -= 2) step(a[0], b[0]), step(a[Sets - 1], b[Sets - 1]);
      for (; count > 0; --count) step(a[0], b[0]);
    };
    times(pair->shared, shared), times(pair->both, both), times(pair->rest, rest);

#pragma GCC unroll 16
    for (int v = 0; v < V && Sets == 2; ++v) a[0][v] = add(a[0][v], a[Sets - 1][v]), b[0][v] = add(b[0][v], b[Sets - 1][v]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(first + kLanes * v, a[0][v]), store(second + kLanes * v, b[0][v]);
  }
}

// A strip in parts of up to Most times 8 tokens: for so many the registers hold the sums of two rows, two weights and what is loaded. A wider
// one is cut into equal parts.
template <int Most, int Line>
SNOWS_SET void multiply_parts(const Part& p) {
  constexpr int kEight = 8 / kLanes;  // vectors of 8 tokens
  constexpr auto fits = [](int part) { return part < Most ? part : Most; };
  static constexpr void (*parts[])(const Part&, int64_t, int64_t) = {
      multiply_pairs<kEight, 2, Line>,           multiply_pairs<2 * kEight, Most == 2 ? 1 : 2, Line>, multiply_pairs<fits(3) * kEight, 1, Line>,
      multiply_pairs<fits(4) * kEight, 1, Line>, multiply_pairs<fits(5) * kEight, 1, Line>,          multiply_pairs<fits(6) * kEight, 1, Line>};
  const int64_t width = p.lanes * p.vectors;
  for (int64_t token = 0, left = p.half ? 1 : width / 8, now; left > 0; left -= now, token += 8 * now) {
    const int64_t rest = (left + Most - 1) / Most;
    now = (left + rest - 1) / rest;
    parts[now - 1](p, width, token);
  }
}
