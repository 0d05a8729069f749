/* Loops over a model's vector that numpy makes in several passes: what a device and an aggregator do for each version
   and each update. Each gives the bits of its numpy counterpart: the same float32 operations on the same operands.
   pyproject.toml forbids the compiler to contract a multiplication and an addition.

   apply:  the next version of ternary elements (`Block.apply`)
   change: what a training has changed (`LocalChange.vector`)
   moments: the largest magnitude and the moments of a tensor's change (`terngrad._moments`)
   draw:   TernGrad's trits of a change, packed, with the random numbers of numpy's SFC64 (`terngrad._draw`)
   mean, keep: the nearest ternary block (`ternary.nearest`)
   pack:   five trits to a byte (`ternary.pack`)
   add_rows: a sum of rows to a vector (`Levels.add_to`) */

#define Py_LIMITED_API 0x030B0000 /* buffers are part of it since 3.11 */
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { TRITS = 5, ROW = 8, VALUES = 256, BYTE_MAX = 242, AT_ONCE = 1024, DRAWS = 4, BLOCK = 65536, LANES = 256 };

/* Each such function twice, where the loader can choose by the processor: as for every x86-64, and for those with AVX2. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t bits_of_eight __attribute__((vector_size(32)));
typedef uint64_t lanes __attribute__((vector_size(8 * DRAWS)));

static const int32_t EXPONENT = 0x7F800000; /* all 0: a magnitude below 2^-126, or 0 */
static const int32_t WEIGHT_MAX = 0x53800000; /* 2^40, the largest magnitude of an element of a model */

static inline int32_t bits_of(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float flushed(float value) { return bits_of(value) & EXPONENT ? value : 0.0f; }

static void make_table(float *table, float scale) {
    memset(table, 0, sizeof(float) * ROW * VALUES);
    for (int byte = 0; byte <= BYTE_MAX; byte++)
        for (int place = 0, rest = byte; place < TRITS; place++, rest /= 3)
            table[ROW * byte + place] = (float)(rest % 3 - 1) * scale;
}

WIDE static void apply_trits(float *to, const float *from, Py_ssize_t count, const uint8_t *packed, Py_ssize_t first,
                             float scale) {
    float table[ROW * VALUES];
    Py_ssize_t i = 0;
    make_table(table, scale);
    packed += first / TRITS;
    for (int place = (int)(first % TRITS); place && place < TRITS && i < count; place++, i++)
        to[i] = flushed(from[i] + table[ROW * (size_t)*packed + place]);
    packed += first % TRITS != 0;
    for (; i + ROW <= count; i += TRITS, packed++) { /* the three elements too many are written again */
        const eight sum = *(const eight *)(from + i) + *(const eight *)(table + ROW * (size_t)*packed);
        bits_of_eight bits;
        memcpy(&bits, &sum, sizeof bits);
        bits &= (bits & EXPONENT) != 0; /* as `flushed` */
        memcpy(to + i, &bits, sizeof bits);
    }
    for (int place = 0; i < count; i++) {
        to[i] = flushed(from[i] + table[ROW * (size_t)*packed + place]);
        if (++place == TRITS)
            place = 0, packed++;
    }
}

static int overlap(const Py_buffer *one, const Py_buffer *other) {
    const char *a = one->buf, *b = other->buf;
    return a < b + other->len && b < a + one->len;
}

static PyObject *apply(PyObject *self, PyObject *args) {
    Py_buffer to, from, packed;
    Py_ssize_t first;
    float scale;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*y*y*nf:apply", &to, &from, &packed, &first, &scale))
        return NULL;
    const Py_ssize_t count = from.len / (Py_ssize_t)sizeof(float);
    if (from.len % (Py_ssize_t)sizeof(float) || to.len != from.len || first < 0 || first > packed.len * TRITS ||
        count > packed.len * TRITS - first || overlap(&to, &from)) {
        PyErr_SetString(PyExc_ValueError, "apply(to, from, packed, first, scale): two arrays of float32 (n,), and bytes with "
                                          "first + n trits");
    } else {
        Py_BEGIN_ALLOW_THREADS
        apply_trits(to.buf, from.buf, count, packed.buf, first, scale);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&to);
    PyBuffer_Release(&from);
    PyBuffer_Release(&packed);
    return result;
}

WIDE static int change_all(float *restrict to, const float *restrict trained, const float *restrict start, Py_ssize_t count) {
    int beyond = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        const int32_t magnitude = bits_of(trained[i]) & 0x7FFFFFFF; /* as integers, NaN is above infinity */
        beyond |= magnitude > WEIGHT_MAX;
        to[i] = flushed(trained[i]) - start[i];
    }
    return !beyond;
}

static PyObject *change(PyObject *self, PyObject *args) {
    Py_buffer to, trained, start;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*y*y*:change", &to, &trained, &start))
        return NULL;
    if (to.len % (Py_ssize_t)sizeof(float) || trained.len != to.len || start.len != to.len || overlap(&to, &trained) ||
        overlap(&to, &start)) {
        PyErr_SetString(PyExc_ValueError, "change(to, trained, start): three arrays of float32 (n,), the first apart");
    } else {
        int bounded;
        Py_BEGIN_ALLOW_THREADS
        bounded = change_all(to.buf, trained.buf, start.buf, to.len / (Py_ssize_t)sizeof(float));
        Py_END_ALLOW_THREADS
        result = PyBool_FromLong(bounded);
    }
    PyBuffer_Release(&to);
    PyBuffer_Release(&trained);
    PyBuffer_Release(&start);
    return result;
}

/* Some elements of a change: those of `values`, or what they are above `start`, which is computed in `room`. Moments and
   draws do so each, since reading two arrays again costs less than writing a third. */
static const float *some_of(float *room, const float *values, const float *start, Py_ssize_t count, int *bounded) {
    if (!start)
        return values;
    *bounded &= change_all(room, values, start, count);
    return room;
}

/* Sums of at most BLOCK elements: LANES of them in float32, then one after the other in double. */
WIDE static void add_block(const float *values, const float *start, Py_ssize_t count, float pilot, int32_t *largest, double *total,
                           double *squares, int *bounded) {
    float sums[LANES] = {0}, of_squares[LANES] = {0}, room[AT_ONCE];
    int32_t bits[LANES] = {0};
    double sum = 0, of_square = 0;
    for (Py_ssize_t done = 0; done < count; done += AT_ONCE) {
        const Py_ssize_t size = count - done < AT_ONCE ? count - done : AT_ONCE;
        const float *from = some_of(room, values + done, start ? start + done : NULL, size, bounded);
        for (Py_ssize_t first = 0; first < size; first += LANES) {
            const int some = size - first < LANES ? (int)(size - first) : LANES;
            for (int i = 0; i < some; i++) {
                const int32_t magnitude = bits_of(from[first + i]) & 0x7FFFFFFF;
                const float off = from[first + i] - pilot;
                bits[i] = bits[i] > magnitude ? bits[i] : magnitude;
                sums[i] += off;
                of_squares[i] += off * off;
            }
        }
    }
    for (int i = 0; i < LANES; i++) {
        *largest = *largest > bits[i] ? *largest : bits[i];
        sum += sums[i];
        of_square += of_squares[i];
    }
    *total += sum;
    *squares += of_square;
}

/* The buffer of an array, or of none for None. */
static int parse_start(PyObject *object, Py_buffer *start) {
    memset(start, 0, sizeof *start);
    return object == Py_None || PyObject_GetBuffer(object, start, PyBUF_SIMPLE) == 0;
}

static PyObject *moments(PyObject *self, PyObject *args) {
    Py_buffer values, start;
    PyObject *object;
    float largest;
    int32_t bits = 0;
    double total = 0, squares = 0;
    int bounded = 1;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*O:moments", &values, &object))
        return NULL;
    if (!parse_start(object, &start)) {
        PyBuffer_Release(&values);
        return NULL;
    }
    const Py_ssize_t count = values.len / (Py_ssize_t)sizeof(float);
    const int fits = count > 0 && values.len % (Py_ssize_t)sizeof(float) == 0 && (!start.buf || start.len == values.len);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        const float *from = values.buf, *before = start.buf;
        const Py_ssize_t size = count < BLOCK ? count : BLOCK;
        add_block(from, before, size, 0.0f, &bits, &total, &squares, &bounded);
        const float pilot = (float)(total / (double)size);
        total = squares = 0;
        for (Py_ssize_t first = 0; first < count; first += BLOCK)
            add_block(from + first, before ? before + first : NULL, count - first < BLOCK ? count - first : BLOCK, pilot, &bits,
                      &total, &squares, &bounded);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&start);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "moments(values, start): an array of float32 (n,), not empty, and another or None");
        return NULL;
    }
    memcpy(&largest, &bits, sizeof largest);
    return Py_BuildValue("dddN", (double)largest, total, squares, PyBool_FromLong(bounded));
}

/* Small Fast Chaotic 64 (C. Doty-Humphrey, PractRand, 2010), as numpy has it: a, b, c and a counter. Each generator waits
   for its last number: four of them side by side take hardly longer than one. Each makes a quarter of the numbers. */
WIDE static void make_random(uint64_t to[DRAWS][AT_ONCE / 2 / DRAWS], uint64_t stored[DRAWS][4]) {
    lanes a, b, c, counter, found;
    for (int lane = 0; lane < DRAWS; lane++)
        a[lane] = stored[lane][0], b[lane] = stored[lane][1], c[lane] = stored[lane][2], counter[lane] = stored[lane][3];
    for (int i = 0; i < AT_ONCE / 2 / DRAWS; i++) {
        found = a + b + counter;
        counter += 1;
        a = b ^ (b >> 11);
        b = c + (c << 3);
        c = ((c << 24) | (c >> 40)) + found;
        for (int lane = 0; lane < DRAWS; lane++)
            to[lane][i] = found[lane];
    }
    for (int lane = 0; lane < DRAWS; lane++)
        stored[lane][0] = a[lane], stored[lane][1] = b[lane], stored[lane][2] = c[lane], stored[lane][3] = counter[lane];
}

WIDE static void draw_some(int8_t *restrict to, const float *restrict values, const uint32_t *restrict random, int count,
                           float scale) {
    for (int i = 0; i < count; i++) {
        const uint32_t bits = (random[i] & 0x007FFFFF) | 0x3F800000; /* 1 + u */
        float bound;
        memcpy(&bound, &bits, sizeof bound);
        bound = (bound - 0x1.fffffep-1f) * scale; /* in the middle of its step: rounding has no bias */
        to[i] = (int8_t)((values[i] > bound) - (values[i] < -bound));
    }
}

/* Eight bytes with five digits of 0 to 2, times POWERS: bits 32 to 39 come to digit[0] + 3 * digit[1] + ... + 81 * digit[4].
   No byte below is above 2 * (3 + 9 + 27 + 81), so that nothing is carried into them. */
static const uint64_t POWERS = 1ull << 32 | 3ull << 24 | 9ull << 16 | 27ull << 8 | 81ull;

static const uint8_t ZEROS = 121; /* five trits of 0 */

/* Pack trits into bytes that are ZEROS where none has been packed; `first` is the place of the first trit. */
static void pack_trits(uint8_t *to, Py_ssize_t first, const int8_t *trits, Py_ssize_t count) {
    static const int8_t powers[TRITS] = {1, 3, 9, 27, 81};
    Py_ssize_t done = 0;
    int place = (int)(first % TRITS);
    to += first / TRITS;
    if (place) {
        for (; place < TRITS && done < count; place++)
            *to = (uint8_t)(*to + powers[place] * trits[done++]);
        to += place == TRITS;
    }
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; done + (Py_ssize_t)sizeof(uint64_t) <= count; done += TRITS) {
        uint64_t digits; /* a trit and 1 more, in two bits: without a carry to the next byte */
        memcpy(&digits, trits + done, sizeof digits);
        digits = ((digits & 0x0303030303) + 0x0101010101) & 0x0303030303;
        *to++ = (uint8_t)(digits * POWERS >> 32);
    }
#endif
    for (place = 0; done < count; to += ++place == TRITS, place %= TRITS)
        *to = (uint8_t)(*to + powers[place] * trits[done++]);
}

static void draw_trits(uint8_t *to, Py_ssize_t place, const float *values, const float *start, void *stored, Py_ssize_t count,
                       float scale) {
    uint64_t states[DRAWS][4], random[DRAWS][AT_ONCE / 2 / DRAWS];
    uint32_t halves[AT_ONCE];
    int8_t trits[AT_ONCE];
    float room[AT_ONCE];
    int bounded = 1; /* `moments` has found whether it is */
    memcpy(states, stored, sizeof states);
    for (Py_ssize_t first = 0; first < count; first += AT_ONCE) {
        const int some = count - first < AT_ONCE ? (int)(count - first) : AT_ONCE;
        const float *from = some_of(room, values + first, start ? start + first : NULL, some, &bounded);
        make_random(random, states);
        memcpy(halves, random, sizeof halves);
        draw_some(trits, from, halves, some, scale);
        pack_trits(to, place + first, trits, some);
    }
    memcpy(stored, states, sizeof states);
}

static PyObject *draw(PyObject *self, PyObject *args) {
    Py_buffer to, values, start, states;
    Py_ssize_t place;
    float scale;
    PyObject *object, *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*ny*Ow*f:draw_packed", &to, &place, &values, &object, &states, &scale))
        return NULL;
    if (parse_start(object, &start)) {
        const Py_ssize_t count = values.len / (Py_ssize_t)sizeof(float);
        if (values.len % (Py_ssize_t)sizeof(float) || (start.buf && start.len != values.len) || place < 0 ||
            place > to.len * TRITS || count > to.len * TRITS - place || states.len != (Py_ssize_t)sizeof(uint64_t[DRAWS][4]) ||
            !(scale > 0)) {
            PyErr_SetString(PyExc_ValueError, "draw_packed(to, first, values, start, states, scale): bytes with first + n trits, "
                                              "float32 (n,), another or None, uint64 (4, 4), and a scale above 0");
        } else {
            Py_BEGIN_ALLOW_THREADS
            draw_trits(to.buf, place, values.buf, start.buf, states.buf, count, scale);
            Py_END_ALLOW_THREADS
            result = Py_NewRef(Py_None);
        }
        PyBuffer_Release(&start);
    }
    PyBuffer_Release(&to);
    PyBuffer_Release(&values);
    PyBuffer_Release(&states);
    return result;
}

/* The sum of the magnitudes, by block as in add_block. */
WIDE static double magnitudes(const float *values, Py_ssize_t count) {
    double total = 0;
    for (Py_ssize_t block = 0; block < count; block += BLOCK) {
        const Py_ssize_t size = count - block < BLOCK ? count - block : BLOCK;
        float sums[LANES] = {0};
        double sum = 0;
        for (Py_ssize_t first = 0; first < size; first += LANES) {
            const int some = size - first < LANES ? (int)(size - first) : LANES;
            for (int i = 0; i < some; i++) {
                const float value = values[block + first + i];
                sums[i] += value < 0 ? -value : value;
            }
        }
        for (int i = 0; i < LANES; i++)
            sum += sums[i];
        total += sum;
    }
    return total;
}

/* Trits of what is at least the threshold in magnitude; the sum of those magnitudes, and how many there are. */
WIDE static double keep_some(int8_t *restrict to, const float *restrict values, Py_ssize_t count, float threshold, Py_ssize_t *kept) {
    double total = 0;
    for (Py_ssize_t block = 0; block < count; block += BLOCK) {
        const Py_ssize_t size = count - block < BLOCK ? count - block : BLOCK;
        float sums[LANES] = {0};
        int32_t counts[LANES] = {0};
        double sum = 0;
        for (Py_ssize_t first = 0; first < size; first += LANES) {
            const int some = size - first < LANES ? (int)(size - first) : LANES;
            for (int i = 0; i < some; i++) {
                const float value = values[block + first + i];
                const int trit = (value >= threshold) - (value <= -threshold);
                to[block + first + i] = (int8_t)trit;
                sums[i] += value * (float)trit;
                counts[i] += trit & 1;
            }
        }
        for (int i = 0; i < LANES; i++) {
            sum += sums[i];
            *kept += counts[i];
        }
        total += sum;
    }
    return total;
}

static PyObject *mean(PyObject *self, PyObject *args) {
    Py_buffer values;
    double total = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*:mean", &values))
        return NULL;
    const Py_ssize_t count = values.len / (Py_ssize_t)sizeof(float);
    const int fits = count > 0 && values.len % (Py_ssize_t)sizeof(float) == 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        total = magnitudes(values.buf, count) / (double)count;
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&values);
    if (fits)
        return PyFloat_FromDouble(total);
    PyErr_SetString(PyExc_ValueError, "mean(values): an array of float32 (n,), not empty");
    return NULL;
}

static PyObject *keep(PyObject *self, PyObject *args) {
    Py_buffer to, values;
    float threshold;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*y*f:keep", &to, &values, &threshold))
        return NULL;
    if (values.len != to.len * (Py_ssize_t)sizeof(float)) {
        PyErr_SetString(PyExc_ValueError, "keep(to, values, threshold): int8 (n,), float32 (n,), and a number");
    } else {
        Py_ssize_t kept = 0;
        double total;
        Py_BEGIN_ALLOW_THREADS
        total = keep_some(to.buf, values.buf, to.len, threshold, &kept);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("dn", total, kept);
    }
    PyBuffer_Release(&to);
    PyBuffer_Release(&values);
    return result;
}

static void add_rows_to(float *restrict to, const float *restrict rows, int place, Py_ssize_t count) {
    Py_ssize_t i = 0;
    rows += place;
    for (; place && place < TRITS && i < count; place++, i++)
        to[i] += *rows++;
    rows += place == TRITS ? ROW - TRITS : 0;
    for (; i + TRITS <= count; i += TRITS, rows += ROW) {
        *(four *)(to + i) += *(const four *)rows;
        to[i + 4] += rows[4];
    }
    for (; i < count; i++)
        to[i] += *rows++;
}

static PyObject *add_rows(PyObject *self, PyObject *args) {
    Py_buffer to, rows;
    Py_ssize_t first;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*y*n:add_rows", &to, &rows, &first))
        return NULL;
    const Py_ssize_t count = to.len / (Py_ssize_t)sizeof(float), whole = rows.len / (ROW * (Py_ssize_t)sizeof(float));
    if (to.len % (Py_ssize_t)sizeof(float) || rows.len % (ROW * (Py_ssize_t)sizeof(float)) || first < 0 || first >= TRITS ||
        first + count > whole * TRITS || overlap(&to, &rows)) {
        PyErr_SetString(PyExc_ValueError, "add_rows(to, rows, first): float32 (n,), float32 (m, 8) with first + n <= 5 m, and "
                                          "0 to 4");
    } else {
        Py_BEGIN_ALLOW_THREADS
        add_rows_to(to.buf, rows.buf, (int)first, count);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&to);
    PyBuffer_Release(&rows);
    return result;
}

static PyObject *pack(PyObject *self, PyObject *args) {
    Py_buffer to, trits;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*y*:pack", &to, &trits))
        return NULL;
    if (to.len != trits.len / TRITS + (trits.len % TRITS != 0)) {
        PyErr_SetString(PyExc_ValueError, "pack(to, trits): uint8 (n / 5, rounded up) and int8 (n,)");
    } else {
        Py_BEGIN_ALLOW_THREADS
        memset(to.buf, ZEROS, (size_t)to.len);
        pack_trits(to.buf, 0, trits.buf, trits.len);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&to);
    PyBuffer_Release(&trits);
    return result;
}

static PyMethodDef methods[] = {
    {"apply", apply, METH_VARARGS,
     "apply(to, from, packed, first, scale): to[i] = from[i] + scale * trit[first + i], tiny numbers as +0.\n\n"
     "float32 (n,) twice, which may not overlap, and packed trits. Raises ValueError for other lengths. As the other\n"
     "functions, for C-contiguous arrays and without the GIL."},
    {"change", change, METH_VARARGS,
     "change(to, trained, start): to[i] = trained[i] - start[i], tiny numbers of the first as +0.\n\n"
     "float32 (n,) three times; the first may overlap no other. Returns whether all of trained are at most 2^40 in\n"
     "magnitude. Raises ValueError for other lengths."},
    {"moments", moments, METH_VARARGS,
     "moments(values, start): of a change c[i] = values[i] - start[i], or values[i] where start is None: the largest\n"
     "magnitude, the sum of c[i] - p, that of their squares, and whether `change` finds all values bounded, where start\n"
     "is given; p is the mean of the first 65,536.\n\n"
     "float32 (n,) twice. The largest is NaN if there is a NaN. Sums of 65,536 are 256 in float32, and then one in\n"
     "double. Raises ValueError for other lengths, or an empty array."},
    {"draw_packed", draw, METH_VARARGS,
     "draw_packed(to, first, values, start, states, scale): pack t[i] as the trit first + i; t[i] is the sign of c[i] of\n"
     "`moments` where its magnitude is above u[i] * scale, and else 0; u[i] of 23 random bits, (2 k + 1) / 2^24.\n\n"
     "Bytes, which are 121 where nothing has been packed, float32 (n,) twice, and the states of four SFC64 of numpy,\n"
     "uint64 (4, 4). Of each 1,024 elements the first 256 are by the first of them, two by each of its numbers, and so\n"
     "on; each goes on by 128 numbers also where the last elements are fewer. Raises ValueError for other lengths, or a\n"
     "scale that is not above 0."},
    {"mean", mean, METH_VARARGS,
     "mean(values): the mean magnitude, in the order of `moments`.\n\n"
     "float32 (n,). Raises ValueError for an empty array."},
    {"keep", keep, METH_VARARGS,
     "keep(to, values, threshold): the signs of what is at least the threshold in magnitude, and else 0.\n\n"
     "int8 (n,) and float32 (n,). Returns the sum of those magnitudes, in the order of `moments`, and their number. Raises\n"
     "ValueError for other lengths."},
    {"add_rows", add_rows, METH_VARARGS,
     "add_rows(to, rows, first): to[i] += the element first + i of the rows, each of which has five, and three unused.\n\n"
     "float32 (n,) and float32 (m, 8), with first + n <= 5 m. Raises ValueError for other lengths."},
    {"pack", pack, METH_VARARGS,
     "pack(to, trits): five trits of -1, 0 and 1 to a byte, the first as the lowest power of three; 0 fills the last.\n\n"
     "uint8 (n / 5, rounded up) and int8 (n,). Raises ValueError for other lengths."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "ternbus_vectors", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_ternbus_vectors(void) { return PyModule_Create(&module); }
