/* Products of LoRA factors of one rank, RANK, a multiple of 8; built and called by narrow_products.py.

   A (RANK, n) and B (m, RANK), or their gradients, are row-major and in single precision; n is a
   multiple of 8, m of 4. A factor is thousands of numbers long and RANK wide. BLAS spends as much on
   the call as on such a product; here a factor comes from memory once, the rest happens in registers
   and the nearest cache, and threads take whole pairs. */

#include <stdint.h>
#include <string.h>

enum { WIDTH = 8, TILE = 4, CHUNK = 512 }; /* CHUNK columns of 8 rows fit the nearest cache */
typedef float lanes __attribute__((vector_size(4 * WIDTH)));

static inline lanes load(const float *x) {
  lanes v;
  memcpy(&v, x, sizeof v);
  return v;
}

static inline void store(float *x, lanes v) { memcpy(x, &v, sizeof v); }

static inline float sum(lanes v) {
  float s = 0;
  for (int l = 0; l < WIDTH; l++) s += v[l];
  return s;
}

static inline int64_t end_of_chunk(int64_t start, int64_t end) {
  return end - start < CHUNK ? end : start + CHUNK;
}

/* gram = A A^T: the lower triangle in tiles, each entry a sum of partial sums. */
static void gram_of_rows(const float *A, int64_t n, float *gram) {
  memset(gram, 0, sizeof(float[RANK][RANK]));
  for (int64_t start = 0; start < n; start += CHUNK) {
    int64_t end = end_of_chunk(start, n);
    for (int i = 0; i < RANK; i += TILE)
      for (int k = 0; k <= i; k += TILE) {
        lanes s[TILE][TILE] = {0};
        for (int64_t j = start; j < end; j += WIDTH)
          for (int p = 0; p < TILE; p++)
            for (int q = 0; q < TILE; q++) s[p][q] += load(A + (i + p) * n + j) * load(A + (k + q) * n + j);
        for (int p = 0; p < TILE; p++)
          for (int q = 0; q < TILE; q++) gram[(i + p) * RANK + k + q] += sum(s[p][q]);
      }
  }
  for (int i = 0; i < RANK; i++)
    for (int k = i + 1; k < RANK; k++) gram[i * RANK + k] = gram[k * RANK + i];
}

/* gram = B^T B: each row adds its outer product. */
static void gram_of_columns(const float *B, int64_t m, float *gram) {
  memset(gram, 0, sizeof(float[RANK][RANK]));
  for (int64_t start = 0; start < m; start += CHUNK) {
    int64_t end = end_of_chunk(start, m);
    for (int i = 0; i < RANK; i += WIDTH)
      for (int k = 0; k < RANK; k += WIDTH) {
        lanes s[WIDTH] = {0};
        for (int64_t j = start; j < end; j++)
          for (int p = 0; p < WIDTH; p++) s[p] += B[j * RANK + i + p] * load(B + j * RANK + k);
        for (int p = 0; p < WIDTH; p++) {
          float *row = gram + (i + p) * RANK + k;
          store(row, load(row) + s[p]);
        }
      }
  }
}

/* gradient <- K gradient, for a gradient (RANK, n). */
static void multiply_from_left(const float *K, float *gradient, int64_t n) {
  for (int64_t j = 0; j < n; j += WIDTH) {
    lanes g[RANK];
    for (int k = 0; k < RANK; k++) g[k] = load(gradient + k * n + j);
    for (int i = 0; i < RANK; i += TILE) {
      lanes s[TILE] = {0};
      for (int k = 0; k < RANK; k++)
        for (int p = 0; p < TILE; p++) s[p] += K[(i + p) * RANK + k] * g[k];
      for (int p = 0; p < TILE; p++) store(gradient + (i + p) * n + j, s[p]);
    }
  }
}

/* gradient <- gradient K, for a gradient (m, RANK). */
static void multiply_from_right(const float *K, float *gradient, int64_t m) {
  for (int64_t j = 0; j < m; j += TILE) {
    float g[TILE][RANK];
    memcpy(g, gradient + j * RANK, sizeof g);
    for (int i = 0; i < RANK; i += WIDTH) {
      lanes s[TILE] = {0};
      for (int k = 0; k < RANK; k++)
        for (int p = 0; p < TILE; p++) s[p] += g[p][k] * load(K + k * RANK + i);
      for (int p = 0; p < TILE; p++) store(gradient + (j + p) * RANK + i, s[p]);
    }
  }
}

/* gram_A[i] = A_i A_i^T and gram_B[i] = B_i^T B_i, each (count, RANK, RANK). Threads that call this
   at once, with one *next that starts at 0, share the pairs among them. */
void grams(int64_t *next, int64_t count, const float *const *A, const float *const *B, const int64_t *n,
           const int64_t *m, float *gram_A, float *gram_B) {
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) {
    gram_of_rows(A[i], n[i], gram_A + i * RANK * RANK);
    gram_of_columns(B[i], m[i], gram_B + i * RANK * RANK);
  }
}

/* grad_A_i <- K_A[i] grad_A_i and grad_B_i <- grad_B_i K_B[i]; a null pointer is left out. Threads
   share the pairs as above. */
void multiply(int64_t *next, int64_t count, float *const *grad_A, float *const *grad_B, const int64_t *n,
              const int64_t *m, const float *K_A, const float *K_B) {
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) {
    if (grad_A[i]) multiply_from_left(K_A + i * RANK * RANK, grad_A[i], n[i]);
    if (grad_B[i]) multiply_from_right(K_B + i * RANK * RANK, grad_B[i], m[i]);
  }
}
