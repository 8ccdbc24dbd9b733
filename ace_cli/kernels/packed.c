/* Matrices with many zeros, stored as a bit mask and the values that are not zero, on the CPU at hand.
 *
 * A row is a whole number of 64-bit words, bit j of word k standing for column 64 k + j; its values follow those of the
 * row before. Sixty-four bytes after the last value must be readable, as whole vectors are loaded. What a row yields
 * does not depend on the number of threads: one thread computes all of it.
 *
 * Values may be codes of 8 bits instead: then a weight is code * scale, which unpacking rounds to the matrix' type, and
 * a product does not. A row has `groups` scales, the one of 16 columns from 16 p on being number p >> shift.
 */
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "no packed kernel for this processor"
#else
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { BFLOAT16, FLOAT16, FLOAT32 };
enum { WEIGHTS, ONE_SCALE, SCALES }; /* what values are: weights; codes with one scale, or several, in a word */

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

/* The scales of the four times 16 columns of word k of a row. `one`: the same for all, as `shift` is 2 or more. */
static inline __attribute__((always_inline)) void
scales_of(const Job *job, int one, int64_t row, int64_t k, float *scales) {
    const uint16_t *from = job->scales + row * job->groups;
    if (one) {
        scales[0] = scales[1] = scales[2] = scales[3] = from_bfloat16(from[k >> (job->shift - 2)]);
        return;
    }
    for (int part = 0; part < 4; part++) {
        int64_t group = (4 * k + part) >> job->shift;
        scales[part] = from_bfloat16(from[group < job->groups ? group : job->groups - 1]); /* behind the last column */
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

/* 64 columns. The zeros are hidden from the compiler: the instruction waits for what its target held before, even where
 * it says that the rest is to be zero, and a loop would wait for itself. */
static inline __m512i expand8(const int8_t *values, uint64_t mask) {
    __m512i zeros = _mm512_setzero_si512();
    __asm__("" : "+v"(zeros));
    return _mm512_mask_expand_epi8(zeros, mask, _mm512_loadu_si512(values));
}

/* 16 columns of 64 codes times their scale. */
static inline __m512 decoded(__m512i codes, int part, float scale) {
    __m128i some = part == 0 ? _mm512_castsi512_si128(codes) : part == 1 ? _mm512_extracti32x4_epi32(codes, 1)
                 : part == 2 ? _mm512_extracti32x4_epi32(codes, 2) : _mm512_extracti32x4_epi32(codes, 3);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(some)), _mm512_set1_ps(scale));
}

#if defined(X_IS_BFLOAT16)
/* The low and the high bytes of 0 to 127 as bfloat16, which holds them exactly. */
static uint8_t bytes_of[2][128] __attribute__((aligned(64)));
static __attribute__((constructor)) void fill(void) {
    for (int size = 0; size < 128; size++) {
        bytes_of[0][size] = (uint8_t)to_bfloat16((float)size);
        bytes_of[1][size] = (uint8_t)(to_bfloat16((float)size) >> 8);
    }
}
static inline __m512i looked_up(__m512i sizes, int byte) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(bytes_of[byte]), sizes, _mm512_load_si512(bytes_of[byte] + 64));
}
#endif

/* The same as `word`, of codes; bfloat16 x in the order that bytes are interleaved in (`interleaved` of bitmask.py). */
static inline __attribute__((always_inline)) const void *
coded_word(int type, const void *values, uint64_t mask, int one, const float *scales, const char *x, int64_t stride,
           int tokens, Sum *a, Sum *b) {
    __m512i codes = expand8(values, mask);
    const void *next = (const int8_t *)values + __builtin_popcountll(mask);
#if defined(X_IS_BFLOAT16)
    if (type == BFLOAT16) {
        __m512i sizes = _mm512_abs_epi8(codes), low = looked_up(sizes, 0), high = looked_up(sizes, 1);
        high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8((char)0x80), 0xf8); /* high | (codes & sign) */
        high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(sizes), _mm512_set1_epi8((char)0xc3)); /* -128 = 0xc300 */
        __m512bh w0 = (__m512bh)_mm512_unpacklo_epi8(low, high), w1 = (__m512bh)_mm512_unpackhi_epi8(low, high);
        float l = scales[0], m = scales[1], n = scales[2], o = scales[3];
        __m512 scale = one ? _mm512_set1_ps(l) : _mm512_set_ps(o, o, o, o, n, n, n, n, m, m, m, m, l, l, l, l);
        for (int t = 0; t < tokens; t++) {
            const char *at = x + t * stride;
            __m512 sum = _mm512_dpbf16_ps(_mm512_setzero_ps(), w0, (__m512bh)_mm512_loadu_si512(at));
            sum = _mm512_dpbf16_ps(sum, w1, (__m512bh)_mm512_loadu_si512(at + 64));
            a[t] = _mm512_fmadd_ps(sum, scale, a[t]);
        }
        return next;
    }
#endif
    for (int part = 0; part < 4; part++) {
        __m512 w = decoded(codes, part, scales[part]);
        for (int t = 0; t < tokens; t++) {
            Sum *to = part & 1 ? b : a;
            to[t] = _mm512_fmadd_ps(w, _mm512_loadu_ps((const float *)(x + t * stride) + 16 * part), to[t]);
        }
    }
    return next;
}

/* 16 weights as 16 bits each. */
static inline __m256i in_16_bits(int type, __m512 w) {
    if (type == FLOAT16) return _mm512_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT);
    __m512i bits = _mm512_castps_si512(w), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

/* As `spread`, of codes. */
static inline const void *
spread_codes(int type, const void *values, uint64_t mask, const float *scales, void *y, int64_t left) {
    __m512i codes = expand8(values, mask);
    uint64_t there = left >= 64 ? ~0ull : (1ull << left) - 1;
    for (int half = 0; half < 2; half++) {
        __m512 l = decoded(codes, 2 * half, scales[2 * half]), h = decoded(codes, 2 * half + 1, scales[2 * half + 1]);
        uint32_t some = (uint32_t)(there >> (32 * half));
        if (type == FLOAT32) {
            _mm512_mask_storeu_ps((float *)y + 32 * half, (__mmask16)some, l);
            _mm512_mask_storeu_ps((float *)y + 32 * half + 16, (__mmask16)(some >> 16), h);
        } else {
            __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(in_16_bits(type, l)), in_16_bits(type, h), 1);
            _mm512_mask_storeu_epi16((uint16_t *)y + 32 * half, some, both);
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

/* 8 codes times their scale. */
static inline __m256 decoded(const int8_t *codes, float scale) {
    __m256 w = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
    return _mm256_mul_ps(w, _mm256_set1_ps(scale));
}

static inline __attribute__((always_inline)) const void *
coded_word(int type, const void *values, uint64_t mask, int one, const float *scales, const char *x, int64_t stride,
           int tokens, Sum *a, Sum *b) {
    int8_t codes[64];
    expand8(values, mask, codes);
#pragma GCC unroll 8
    for (int part = 0; part < 8; part++) {
        __m256 w = decoded(codes + 8 * part, scales[part >> 1]);
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
/* As `spread`, of codes. */
static inline const void *
spread_codes(int type, const void *values, uint64_t mask, const float *scales, void *y, int64_t left) {
    int8_t codes[64];
    int64_t size = type == FLOAT32 ? 4 : 2;
    expand8(values, mask, codes);
    for (int part = 0; part < 8 && 8 * part < left; part++) {
        int64_t count = left - 8 * part < 8 ? left - 8 * part : 8;
        __m256 w = decoded(codes + 8 * part, scales[part >> 1]);
        char room[32];
        if (type == FLOAT32) {
            _mm256_storeu_ps((float *)room, w);
        } else if (type == FLOAT16) {
            _mm_storeu_si128((__m128i *)room, _mm256_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT));
        } else {
            __m256i bits = _mm256_castps_si256(w);
            __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
            bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            bits = _mm256_srli_epi32(bits, 16);
            bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
            _mm_storeu_si128((__m128i *)room, _mm256_castsi256_si128(bits));
        }
        memcpy((char *)y + 8 * part * size, room, count * size);
    }
    return (const int8_t *)values + __builtin_popcountll(mask);
}
#endif

#if !defined(X_IS_BFLOAT16)
#define X_IS_BFLOAT16 0
#endif

static inline __attribute__((always_inline)) void
product_rows(const Job *job, int type, int coded, int64_t first, int64_t last, int64_t token, int tokens) {
    int one = coded == ONE_SCALE;
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
                scales_of(job, one, row, k, scales);
                v = coded_word(type, v, mask[k], one, scales, x, stride, tokens, a, b);
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
        if (!job->scales) product_of(job, WEIGHTS, first, last);
        else if (job->shift >= 2) product_of(job, ONE_SCALE, first, last);
        else product_of(job, SCALES, first, last);
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
                    scales_of(job, job->shift >= 2, row, k, scales);
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
