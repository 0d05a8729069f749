/* Loops over the bytes of a ternary block, which numpy can only do with memory in between.

   add: rows += table[packed], look-up and addition in one pass over the sum. The additions are the same ones in the same
   order as numpy's, so the sums have the same bits. Rows are 8 floats; the table has one for every value of a byte.
   add_four: four of these in one pass, which reads and writes the sum a quarter as often. It adds in another order: only
   for sums that are exact.
   count_other: how many bytes are not a given one. */

#define Py_LIMITED_API 0x030B0000 /* buffers are part of it since 3.11 */
#include <Python.h>
#include <stdint.h>

enum { ROW = 8, VALUES = 256 };

/* gcc and clang make vector instructions of this on every processor; left to unroll a loop of 8 by themselves, some
   versions make scalar ones. */
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

static void add_rows(float *rows, const float *table, const uint8_t *packed, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        const four *from = (const four *)(table + ROW * (size_t)packed[i]);
        four *to = (four *)(rows + ROW * (size_t)i);
        to[0] += from[0];
        to[1] += from[1];
    }
}

static void add_four_rows(float *rows, const float *tables, const Py_buffer *packed, Py_ssize_t count) {
    const uint8_t *a = packed[0].buf, *b = packed[1].buf, *c = packed[2].buf, *d = packed[3].buf;
    for (Py_ssize_t i = 0; i < count; i++) {
        const four *first = (const four *)(tables + ROW * (size_t)a[i]);
        const four *second = (const four *)(tables + ROW * (VALUES + (size_t)b[i]));
        const four *third = (const four *)(tables + ROW * (2 * VALUES + (size_t)c[i]));
        const four *fourth = (const four *)(tables + ROW * (3 * VALUES + (size_t)d[i]));
        four *to = (four *)(rows + ROW * (size_t)i);
        to[0] += (first[0] + second[0]) + (third[0] + fourth[0]);
        to[1] += (first[1] + second[1]) + (third[1] + fourth[1]);
    }
}

static PyObject *add(PyObject *self, PyObject *args) {
    Py_buffer rows, table, packed;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*y*y*:add", &rows, &table, &packed))
        return NULL;
    if (table.len != (Py_ssize_t)sizeof(float) * ROW * VALUES || rows.len != packed.len * ROW * (Py_ssize_t)sizeof(float)) {
        PyErr_SetString(PyExc_ValueError, "add(rows, table, packed): float32 (n, 8), float32 (256, 8), uint8 (n,)");
    } else {
        Py_BEGIN_ALLOW_THREADS
        add_rows(rows.buf, table.buf, packed.buf, packed.len);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&rows);
    PyBuffer_Release(&table);
    PyBuffer_Release(&packed);
    return result;
}

static PyObject *add_four(PyObject *self, PyObject *args) {
    Py_buffer rows, tables, packed[4];
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*y*y*y*y*y*:add_four", &rows, &tables, packed, packed + 1, packed + 2, packed + 3))
        return NULL;
    const Py_ssize_t count = packed[0].len;
    if (tables.len != (Py_ssize_t)sizeof(float) * 4 * ROW * VALUES || rows.len != count * ROW * (Py_ssize_t)sizeof(float) ||
        packed[1].len != count || packed[2].len != count || packed[3].len != count) {
        PyErr_SetString(PyExc_ValueError,
                        "add_four(rows, tables, a, b, c, d): float32 (n, 8), float32 (4, 256, 8), four times uint8 (n,)");
    } else {
        Py_BEGIN_ALLOW_THREADS
        add_four_rows(rows.buf, tables.buf, packed, count);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&rows);
    PyBuffer_Release(&tables);
    for (int i = 0; i < 4; i++)
        PyBuffer_Release(packed + i);
    return result;
}

static Py_ssize_t others(const uint8_t *bytes, uint8_t value, Py_ssize_t left) {
    Py_ssize_t found = 0;
    while (left > 0) {
        const Py_ssize_t run = left < 255 ? left : 255; /* what a byte can count, so that a vector holds many counts */
        uint8_t count = 0;
        for (Py_ssize_t i = 0; i < run; i++)
            count += bytes[i] != value;
        found += count;
        bytes += run;
        left -= run;
    }
    return found;
}

static PyObject *count_other(PyObject *self, PyObject *args) {
    Py_buffer bytes;
    unsigned char value;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*b:count_other", &bytes, &value))
        return NULL;
    const Py_ssize_t found = others(bytes.buf, value, bytes.len);
    PyBuffer_Release(&bytes);
    return PyLong_FromSsize_t(found);
}

static PyMethodDef methods[] = {
    {"count_other", count_other, METH_VARARGS,
     "count_other(bytes, value): how many of the bytes are not value. Keeps the GIL: it takes microseconds."},
    {"add", add, METH_VARARGS,
     "add(rows, table, packed): rows[i] += table[packed[i]], without the GIL.\n\n"
     "C-contiguous float32 (n, 8), float32 (256, 8) and uint8 (n,). Raises ValueError for other lengths."},
    {"add_four", add_four, METH_VARARGS,
     "add_four(rows, tables, a, b, c, d): rows[i] += tables[0][a[i]] + … + tables[3][d[i]], without the GIL.\n\n"
     "In any order: only for sums that are exact. C-contiguous float32 (n, 8), float32 (4, 256, 8) and four times uint8\n"
     "(n,). Raises ValueError for other lengths."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "ternbus_rows", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_ternbus_rows(void) { return PyModule_Create(&module); }
