/* What the fuzz targets share. Each defines LLVMFuzzerTestOneInput, so that
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined -D_GNU_SOURCE -DCRPC_ENABLE_ZOOKEEPER=0 \
 *         crpc_impl_tests/fuzz/fuzz_meta.c -lprotobuf-nanopb -lpthread
 *
 * gives a fuzzer, and -DCRPC_FUZZ_MAIN without -fsanitize=fuzzer a program that replays the files
 * it is given or, called with `-n COUNT [SEED]`, runs that many mutations of the target's seeds.
 * The unit test of the section runs the latter for a moment. A target aborts when a property fails.
 */
#ifndef CRPC_FUZZ_H_INCLUDED
#define CRPC_FUZZ_H_INCLUDED

#ifndef CRPC_IMPLEMENTATION
#define CRPC_IMPLEMENTATION
#endif
#include "../../crpc.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FUZZ_FN  static __attribute__((unused))
#define FUZZ_MAX 512 /* bytes of a mutated input */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct fuzz_seed {
    const void *data;
    size_t size;
} fuzz_seed;

#define FUZZ_SEED(text)                                                                            \
    {                                                                                              \
        text, sizeof(text) - 1                                                                     \
    }

#define FUZZ_REQUIRE(condition)                                                                    \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

FUZZ_FN uint32_t fuzz_random(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (uint32_t)(*state * UINT64_C(2685821657736338717) >> 32);
}

/* Changes the `size` bytes of `data`, which has room for FUZZ_MAX, a little; returns the new size.
 */
FUZZ_FN size_t fuzz_mutate(uint8_t *data, size_t size, uint64_t *random)
{
    /* bytes that mean something: tags, continuation bits, small lengths, key of every wire type */
    static const uint8_t telling[] = {0x00, 0x01, 0x02, 0x05, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c,
                                      0x0d, 0x10, 0x12, 0x18, 0x1a, 0x20, 0x22, 0x28, 0x2a, 0x30,
                                      0x32, 0x38, 0x3a, 0x40, 0x42, 0x48, 0x4a, 0x50, 0x52, 0x58,
                                      0x5a, 0x62, 0x68, 0x7f, 0x80, 0x81, 0xc0, 0xf8, 0xfe, 0xff};
    unsigned rounds = 1 + fuzz_random(random) % 4;
    while (rounds--) {
        size_t at = size ? fuzz_random(random) % size : 0, from, n;
        uint8_t value = fuzz_random(random) % 2 ? telling[fuzz_random(random) % sizeof telling]
                                                : (uint8_t)fuzz_random(random);
        switch (fuzz_random(random) % 7) {
        case 0: /* cut */
            if (fuzz_random(random) % 3 == 0)
                size = at;
            break;
        case 1: /* take out */
            n = size ? 1 + fuzz_random(random) % 4 : 0;
            n = n < size - at ? n : size - at;
            memmove(data + at, data + at + n, size - at - n);
            size -= n;
            break;
        case 2: /* put in */
            if (size < FUZZ_MAX) {
                memmove(data + at + 1, data + at, size - at);
                data[at] = value;
                size++;
            }
            break;
        case 3: /* repeat a part, at another place */
            from = size ? fuzz_random(random) % size : 0;
            n = size ? fuzz_random(random) % (size - from) + 1 : 0;
            if (size + n <= FUZZ_MAX) {
                uint8_t part[FUZZ_MAX];
                memcpy(part, data + from, n);
                memmove(data + at + n, data + at, size - at);
                memcpy(data + at, part, n);
                size += n;
            }
            break;
        case 4: /* a bit */
            if (size)
                data[at] ^= (uint8_t)(1u << fuzz_random(random) % 8);
            break;
        default:
            if (size)
                data[at] = value;
        }
    }
    return size;
}

/* Runs the target on `count` mutations of the seeds; each input is a block of its own, so that ASan
 * sees a read past its end. */
FUZZ_FN void fuzz_run(int (*target)(const uint8_t *, size_t), const fuzz_seed *seeds,
                      size_t seed_count, unsigned long count, uint64_t random)
{
    random = random ? random : 1;
    while (count--) {
        uint8_t data[FUZZ_MAX], *copy;
        const fuzz_seed *seed = &seeds[fuzz_random(&random) % seed_count];
        size_t size = seed->size;
        memcpy(data, seed->data, size);
        size = fuzz_mutate(data, size, &random);
        copy = (uint8_t *)malloc(size ? size : 1);
        if (!copy)
            abort();
        memcpy(copy, data, size);
        target(copy, size);
        free(copy);
    }
}

#ifdef CRPC_FUZZ_MAIN
FUZZ_FN int fuzz_main(const fuzz_seed *seeds, size_t seed_count, int argc, char **argv)
{
    int i;
    if (argc >= 3 && strcmp(argv[1], "-n") == 0) {
        fuzz_run(LLVMFuzzerTestOneInput, seeds, seed_count, strtoul(argv[2], NULL, 0),
                 argc >= 4 ? strtoull(argv[3], NULL, 0) : 1);
        return 0;
    }
    for (i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        static uint8_t data[1 << 20];
        uint8_t *copy;
        size_t size;
        if (!file) {
            perror(argv[i]);
            return 1;
        }
        size = fread(data, 1, sizeof data, file);
        fclose(file);
        copy = (uint8_t *)malloc(size ? size : 1);
        if (!copy)
            return 1;
        memcpy(copy, data, size);
        LLVMFuzzerTestOneInput(copy, size);
        free(copy);
    }
    return 0;
}
#endif

#endif /* CRPC_FUZZ_H_INCLUDED */
