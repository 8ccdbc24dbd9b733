/* Matrices with many zeros, stored as a bit mask and the values that are not zero, on the CPU at hand.
 *
 * A row is a whole number of 64-bit words, bit j of word k standing for column 64 k + j; its values follow those of the
 * row before. Sixty-four bytes after the last value must be readable, as whole vectors are loaded. What a row yields
 * does not depend on the number of threads: one thread computes all of it.
 *
 * Values may be codes of 8 bits instead: then a weight is code * scale, rounded to the matrix' type. A row has `groups`
 * scales, the one of 16 columns from 16 p on being number p >> shift.
 */
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "no packed kernel for this processor"
#else
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { BFLOAT16, FLOAT16, FLOAT32 };

typedef struct {
    const uint64_t *mask;   /* rows x words */
    const void *values;
    const int64_t *starts;  /* of each row among the values */
    const void *x;          /* tokens x (64 words): see x_is_bfloat16 */
    const void *bias;       /* rows, of the values' type; or null */
    void *y;                /* product: tokens x rows; unpack: rows x columns; of the matrix' type */
    const uint16_t *scales; /* rows x groups, bfloat16; null where values are weights */
    int64_t rows, words, columns, tokens, groups, shift;
    int32_t type, chunk;
    int64_t next;           /* first row that no thread has taken */
} Job;

static inline float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bfloat16(float value) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The scales of the four times 16 columns of word k of a row. */
static inline void scales_of(const Job *job, int64_t row, int64_t k, float *scales) {
    for (int part = 0; part < 4; part++) {
        int64_t group = (4 * k + part) >> job->shift;
        if (group >= job->groups) group = job->groups - 1; /* behind the last column: there are no values */
        scales[part] = from_bfloat16(job->scales[row * job->groups + group]);
    }
}

static inline void store(const Job *job, int64_t token, int64_t row, float value) {
    int64_t at = token * job->rows + row;
    if (job->type == BFLOAT16) {
        if (job->bias) value += from_bfloat16(((const uint16_t *)job->bias)[row]);
        ((uint16_t *)job->y)[at] = to_bfloat16(value);
    } else if (job->type == FLOAT16) {
        if (job->bias) value += _cvtsh_ss(((const uint16_t *)job->bias)[row]);
        ((uint16_t *)job->y)[at] = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    } else {
        if (job->bias) value += ((const float *)job->bias)[row];
        ((float *)job->y)[at] = value;
    }
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI2__)
/* ---- 32 columns of 16 bits, or 16 of 32 bits, at a time ---- */
#define NAME "avx512"
typedef __m512 Sum;
static inline Sum zero(void) { return _mm512_setzero_ps(); }
static inline float total(Sum a, Sum b) { return _mm512_reduce_add_ps(_mm512_add_ps(a, b)); }

static inline __m512i expand16(const uint16_t *values, uint32_t mask) {
    return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
}
static inline __m512i low(__m512i v) { return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)); }
static inline __m512i high(__m512i v) { return _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)); }

#if defined(__AVX512BF16__)
#define X_IS_BFLOAT16 1
#endif

/* Sums of 64 columns at x of each of `tokens` inputs, into two partial sums of each. */
static inline __attribute__((always_inline)) const void *
word(int type, const void *values, uint64_t mask, const char *x, int64_t stride, int tokens, Sum *a, Sum *b) {
    if (type == FLOAT32) {
        const float *v = values;
        for (int part = 0; part < 4; part++) {
            uint32_t bits = (uint32_t)(mask >> (16 * part)) & 0xffff;
            __m512 w = _mm512_maskz_expand_ps((__mmask16)bits, _mm512_loadu_ps(v));
            v += __builtin_popcount(bits);
            for (int t = 0; t < tokens; t++) {
                Sum *to = part & 1 ? b : a;
                to[t] = _mm512_fmadd_ps(w, _mm512_loadu_ps((const float *)(x + t * stride) + 16 * part), to[t]);
            }
        }
        return v;
    }
    const uint16_t *v = values;
    uint32_t first = (uint32_t)mask, second = (uint32_t)(mask >> 32);
    __m512i w0 = expand16(v, first), w1 = expand16(v + __builtin_popcount(first), second);
    v += __builtin_popcountll(mask);
#if defined(X_IS_BFLOAT16)
    if (type == BFLOAT16) {
        for (int t = 0; t < tokens; t++) {
            const char *at = x + t * stride;
            a[t] = _mm512_dpbf16_ps(a[t], (__m512bh)w0, (__m512bh)_mm512_loadu_si512(at));
            b[t] = _mm512_dpbf16_ps(b[t], (__m512bh)w1, (__m512bh)_mm512_loadu_si512(at + 64));
        }
        return v;
    }
#endif
    for (int part = 0; part < 2; part++) {
        __m512i w = part ? w1 : w0;
        __m512 l, h;
        if (type == BFLOAT16) {
            l = _mm512_castsi512_ps(_mm512_slli_epi32(low(w), 16));
            h = _mm512_castsi512_ps(_mm512_slli_epi32(high(w), 16));
        } else {
            l = _mm512_cvtph_ps(_mm512_castsi512_si256(w));
            h = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1));
        }
        for (int t = 0; t < tokens; t++) {
            const float *at = (const float *)(x + t * stride) + 32 * part;
            a[t] = _mm512_fmadd_ps(l, _mm512_loadu_ps(at), a[t]);
            b[t] = _mm512_fmadd_ps(h, _mm512_loadu_ps(at + 16), b[t]);
        }
    }
    return v;
}

static inline void expand8(const int8_t *values, uint64_t mask, int8_t *to) {
    _mm512_storeu_si512(to, _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(values)));
}

/* 16 codes times their scale, before and after they are rounded to the matrix' type. */
static inline __m512 decoded(const int8_t *codes, float scale) {
    __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
    return _mm512_mul_ps(wide, _mm512_set1_ps(scale));
}
static inline __m512 rounded(int type, __m512 w) {
    if (type == FLOAT16) return _mm512_cvtph_ps(_mm512_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT));
    if (type == FLOAT32) return w;
    __m512i bits = _mm512_castps_si512(w), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));
}

/* The same as `word`, of codes. */
static inline __attribute__((always_inline)) const void *
coded_word(int type, const void *values, uint64_t mask, const float *scales, const char *x, int64_t stride, int tokens,
           Sum *a, Sum *b) {
    int8_t codes[64];
    expand8(values, mask, codes);
#if defined(X_IS_BFLOAT16)
    if (type == BFLOAT16) {
        for (int half = 0; half < 2; half++) {
            const int8_t *here = codes + 32 * half;
            __m512bh w = _mm512_cvtne2ps_pbh(decoded(here + 16, scales[2 * half + 1]), decoded(here, scales[2 * half]));
            for (int t = 0; t < tokens; t++) {
                Sum *to = half ? b : a;
                to[t] = _mm512_dpbf16_ps(to[t], w, (__m512bh)_mm512_loadu_si512(x + t * stride + 64 * half));
            }
        }
        return (const int8_t *)values + __builtin_popcountll(mask);
    }
#endif
    for (int part = 0; part < 4; part++) {
        __m512 w = rounded(type, decoded(codes + 16 * part, scales[part]));
        for (int t = 0; t < tokens; t++) {
            Sum *to = part & 1 ? b : a;
            to[t] = _mm512_fmadd_ps(w, _mm512_loadu_ps((const float *)(x + t * stride) + 16 * part), to[t]);
        }
    }
    return (const int8_t *)values + __builtin_popcountll(mask);
}

/* 64 columns, of which `left` exist, to y. */
static inline const void *spread(int wide, const void *values, uint64_t mask, void *y, int64_t left) {
    if (wide) {
        const float *v = values;
        for (int part = 0; part < 4 && 16 * part < left; part++) {
            uint32_t bits = (uint32_t)(mask >> (16 * part)) & 0xffff;
            int64_t count = left - 16 * part;
            __mmask16 there = count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
            __m512 w = _mm512_maskz_expand_ps((__mmask16)bits, _mm512_loadu_ps(v));
            _mm512_mask_storeu_ps((float *)y + 16 * part, there, w);
            v += __builtin_popcount(bits);
        }
        return v;
    }
    const uint16_t *v = values;
    for (int part = 0; part < 2 && 32 * part < left; part++) {
        uint32_t bits = (uint32_t)(mask >> (32 * part));
        int64_t count = left - 32 * part;
        __mmask32 there = count >= 32 ? 0xffffffffu : (__mmask32)((1u << count) - 1);
        _mm512_mask_storeu_epi16((uint16_t *)y + 32 * part, there, expand16(v, bits));
        v += __builtin_popcount(bits);
    }
    return v;
}

#else
/* ---- 8 columns at a time: a table says which value goes where ---- */
#define NAME "avx2"
typedef struct { __m256 low, high; } Sum;
static uint8_t shuffle16[256][16] __attribute__((aligned(16))), shuffle8[256][8] __attribute__((aligned(16)));
static int32_t shuffle32[256][8] __attribute__((aligned(32)));

static __attribute__((constructor)) void fill(void) {
    for (int mask = 0; mask < 256; mask++) {
        int from = 0;
        for (int j = 0; j < 8; j++) {
            int there = mask >> j & 1;
            shuffle8[mask][j] = there ? from : 0x80;
            shuffle16[mask][2 * j] = there ? 2 * from : 0x80;
            shuffle16[mask][2 * j + 1] = there ? 2 * from + 1 : 0x80;
            shuffle32[mask][j] = there ? (int32_t)(0x80000000u | from) : 0; /* the sign: keep */
            from += there;
        }
    }
}
static inline Sum zero(void) { return (Sum){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline float total(Sum a, Sum b) {
    __m256 s = _mm256_add_ps(_mm256_add_ps(a.low, a.high), _mm256_add_ps(b.low, b.high));
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
static inline __m128i expand16(const uint16_t *values, uint32_t mask) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)values), _mm_load_si128((const __m128i *)shuffle16[mask]));
}
static inline __m256 expand32(const float *values, uint32_t mask) {
    __m256i order = _mm256_load_si256((const __m256i *)shuffle32[mask]);
    __m256 there = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), order);
    return _mm256_and_ps(there, _mm256_castsi256_ps(_mm256_srai_epi32(order, 31)));
}

static inline __attribute__((always_inline)) const void *
word(int type, const void *values, uint64_t mask, const char *x, int64_t stride, int tokens, Sum *a, Sum *b) {
    const char *v = values;
#pragma GCC unroll 8
    for (int part = 0; part < 8; part++) {
        uint32_t bits = (uint32_t)(mask >> (8 * part)) & 0xff;
        __m256 w;
        if (type == FLOAT32) w = expand32((const float *)v, bits);
        else if (type == FLOAT16) w = _mm256_cvtph_ps(expand16((const uint16_t *)v, bits));
        else w = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(expand16((const uint16_t *)v, bits)), 16));
        v += __builtin_popcount(bits) * (type == FLOAT32 ? 4 : 2);
        for (int t = 0; t < tokens; t++) {
            __m256 *to = part & 2 ? (part & 1 ? &b[t].high : &b[t].low) : (part & 1 ? &a[t].high : &a[t].low);
            *to = _mm256_fmadd_ps(w, _mm256_loadu_ps((const float *)(x + t * stride) + 8 * part), *to);
        }
    }
    return v;
}

static inline void expand8(const int8_t *values, uint64_t mask, int8_t *to) {
    for (int part = 0; part < 8; part++) {
        uint32_t bits = (uint32_t)(mask >> (8 * part)) & 0xff;
        __m128i order = _mm_loadl_epi64((const __m128i *)shuffle8[bits]);
        _mm_storel_epi64((__m128i *)(to + 8 * part), _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)values), order));
        values += __builtin_popcount(bits);
    }
}

/* 8 codes times their scale, rounded to the matrix' type. */
static inline __m256 decoded(int type, const int8_t *codes, float scale) {
    __m256 w = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
    w = _mm256_mul_ps(w, _mm256_set1_ps(scale));
    if (type == FLOAT16) return _mm256_cvtph_ps(_mm256_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT));
    if (type == FLOAT32) return w;
    __m256i bits = _mm256_castps_si256(w), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32((int)0xffff0000)));
}

static inline __attribute__((always_inline)) const void *
coded_word(int type, const void *values, uint64_t mask, const float *scales, const char *x, int64_t stride, int tokens,
           Sum *a, Sum *b) {
    int8_t codes[64];
    expand8(values, mask, codes);
#pragma GCC unroll 8
    for (int part = 0; part < 8; part++) {
        __m256 w = decoded(type, codes + 8 * part, scales[part >> 1]);
        for (int t = 0; t < tokens; t++) {
            __m256 *to = part & 2 ? (part & 1 ? &b[t].high : &b[t].low) : (part & 1 ? &a[t].high : &a[t].low);
            *to = _mm256_fmadd_ps(w, _mm256_loadu_ps((const float *)(x + t * stride) + 8 * part), *to);
        }
    }
    return (const int8_t *)values + __builtin_popcountll(mask);
}

static inline const void *spread(int wide, const void *values, uint64_t mask, void *y, int64_t left) {
    const char *v = values;
    for (int part = 0; part < 8 && 8 * part < left; part++) {
        uint32_t bits = (uint32_t)(mask >> (8 * part)) & 0xff;
        int64_t count = left - 8 * part < 8 ? left - 8 * part : 8;
        char room[32];
        if (wide) _mm256_storeu_ps((float *)room, expand32((const float *)v, bits));
        else _mm_storeu_si128((__m128i *)room, expand16((const uint16_t *)v, bits));
        memcpy((char *)y + 8 * part * (wide ? 4 : 2), room, count * (wide ? 4 : 2));
        v += __builtin_popcount(bits) * (wide ? 4 : 2);
    }
    return v;
}
#endif

#if !defined(X_IS_BFLOAT16)
#define X_IS_BFLOAT16 0
#endif

/* As `spread`, of codes. */
static inline const void *
spread_codes(int type, const void *values, uint64_t mask, const float *scales, void *y, int64_t left) {
    int8_t codes[64];
    expand8(values, mask, codes);
    for (int64_t j = 0; j < (left < 64 ? left : 64); j++) {
        float w = (float)codes[j] * scales[j >> 4];
        if (type == BFLOAT16) ((uint16_t *)y)[j] = to_bfloat16(w);
        else if (type == FLOAT16) ((uint16_t *)y)[j] = _cvtss_sh(w, _MM_FROUND_TO_NEAREST_INT);
        else ((float *)y)[j] = w;
    }
    return (const int8_t *)values + __builtin_popcountll(mask);
}

static inline __attribute__((always_inline)) void
product_rows(const Job *job, int type, int coded, int64_t first, int64_t last, int64_t token, int tokens) {
    int64_t step = 64 * (X_IS_BFLOAT16 && type == BFLOAT16 ? 2 : 4), stride = job->words * step;
    for (int64_t row = first; row < last; row++) {
        const uint64_t *mask = job->mask + row * job->words;
        const void *v = (const char *)job->values + job->starts[row] * (coded ? 1 : type == FLOAT32 ? 4 : 2);
        const char *x = (const char *)job->x + token * stride;
        Sum a[4], b[4];
        for (int t = 0; t < tokens; t++) a[t] = b[t] = zero();
        for (int64_t k = 0; k < job->words; k++) {
            if (coded) {
                float scales[4];
                scales_of(job, row, k, scales);
                v = coded_word(type, v, mask[k], scales, x, stride, tokens, a, b);
            } else {
                v = word(type, v, mask[k], x, stride, tokens, a, b);
            }
            x += step;
        }
        for (int t = 0; t < tokens; t++) store(job, token + t, row, total(a[t], b[t]));
    }
}

static inline __attribute__((always_inline)) void
product_typed(const Job *job, int type, int coded, int64_t first, int64_t last) {
    int64_t t = 0;
    for (; t + 4 <= job->tokens; t += 4) product_rows(job, type, coded, first, last, t, 4);
    if (job->tokens - t >= 2) product_rows(job, type, coded, first, last, t, 2), t += 2;
    if (job->tokens - t) product_rows(job, type, coded, first, last, t, 1);
}

static inline __attribute__((always_inline)) void
product_of(const Job *job, int coded, int64_t first, int64_t last) {
    if (job->type == BFLOAT16) product_typed(job, BFLOAT16, coded, first, last);
    else if (job->type == FLOAT16) product_typed(job, FLOAT16, coded, first, last);
    else product_typed(job, FLOAT32, coded, first, last);
}

static int64_t take(Job *job) { return __atomic_fetch_add(&job->next, job->chunk, __ATOMIC_RELAXED); }

static void product_work(void *what) {
    Job *job = what;
    for (int64_t first; (first = take(job)) < job->rows;) {
        int64_t last = first + job->chunk < job->rows ? first + job->chunk : job->rows;
        if (job->scales) product_of(job, 1, first, last);
        else product_of(job, 0, first, last);
    }
}

static void unpack_work(void *what) {
    Job *job = what;
    int wide = job->type == FLOAT32;
    for (int64_t first; (first = take(job)) < job->rows;) {
        int64_t last = first + job->chunk < job->rows ? first + job->chunk : job->rows;
        for (int64_t row = first; row < last; row++) {
            const uint64_t *mask = job->mask + row * job->words;
            const void *v = (const char *)job->values + job->starts[row] * (job->scales ? 1 : wide ? 4 : 2);
            char *y = (char *)job->y + row * job->columns * (wide ? 4 : 2);
            for (int64_t k = 0; k < job->words; k++, y += wide ? 256 : 128) {
                if (job->scales) {
                    float scales[4];
                    scales_of(job, row, k, scales);
                    v = spread_codes(job->type, v, mask[k], scales, y, job->columns - 64 * k);
                } else {
                    v = spread(wide, v, mask[k], y, job->columns - 64 * k);
                }
            }
        }
    }
}

/* A matrix of unsigned elements of `width` bytes into mask and values, which have room for one more. */
#define PACK(kind)                                                                                        \
    for (int64_t row = 0; row < rows; row++)                                                              \
        for (int64_t first = 0; first < columns; first += 64) {                                           \
            const kind *from = (const kind *)weight + row * columns + first;                              \
            int64_t count = columns - first < 64 ? columns - first : 64;                                  \
            uint64_t bits = 0;                                                                            \
            for (int64_t j = 0; j < count; j++) {                                                         \
                ((kind *)values)[found] = from[j];                                                        \
                bits |= (uint64_t)(from[j] != 0) << j;                                                    \
                found += from[j] != 0;                                                                    \
            }                                                                                             \
            *mask++ = bits;                                                                               \
        }

void ace_pack(const void *weight, uint64_t *mask, void *values, int64_t rows, int64_t columns, int width) {
    int64_t found = 0;
    if (width == 1) PACK(uint8_t) else if (width == 2) PACK(uint16_t) else PACK(uint32_t)
}

/* As OpenMP's runtime has it: the threads that torch computes with. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

static void run(void (*work)(void *), Job *job, Parallel parallel, int threads) {
    if (parallel && threads > 1) parallel(work, job, (unsigned)threads, 0);
    else work(job);
}

void ace_product(Job *job, Parallel parallel, int threads) { run(product_work, job, parallel, threads); }
void ace_unpack(Job *job, Parallel parallel, int threads) { run(unpack_work, job, parallel, threads); }
int ace_x_is_bfloat16(void) { return X_IS_BFLOAT16; }
const char *ace_name(void) { return NAME; }
#endif
