/* A message as nanopb's generator writes it for crpc_view fields. */
#ifndef CRPC_FUZZ_MESSAGE_H_INCLUDED
#define CRPC_FUZZ_MESSAGE_H_INCLUDED

typedef struct fuzz_inner {
    crpc_view name;
    crpc_views tags;
} fuzz_inner;

typedef struct fuzz_outer {
    crpc_view text;
    crpc_view blob;
    crpc_views many;
    int32_t number;
    bool has_inner;
    fuzz_inner inner;
} fuzz_outer;

/* clang-format off */
#define FUZZ_INNER_FIELDLIST(X, a)                                                                 \
    X(a, CALLBACK, OPTIONAL, STRING, name, 1)                                                      \
    X(a, CALLBACK, REPEATED, BYTES, tags, 2)
#define FUZZ_INNER_CALLBACK crpc_view_field
#define FUZZ_INNER_DEFAULT NULL

#define FUZZ_OUTER_FIELDLIST(X, a)                                                                 \
    X(a, CALLBACK, SINGULAR, STRING, text, 1)                                                      \
    X(a, CALLBACK, OPTIONAL, BYTES, blob, 2)                                                       \
    X(a, CALLBACK, REPEATED, STRING, many, 3)                                                      \
    X(a, STATIC, SINGULAR, INT32, number, 4)                                                       \
    X(a, STATIC, OPTIONAL, MESSAGE, inner, 5)
#define FUZZ_OUTER_CALLBACK crpc_view_field
#define FUZZ_OUTER_DEFAULT NULL
#define fuzz_outer_inner_MSGTYPE fuzz_inner
/* clang-format on */

extern const pb_msgdesc_t fuzz_inner_msg;
extern const pb_msgdesc_t fuzz_outer_msg;
PB_BIND(FUZZ_INNER, fuzz_inner, 2)
PB_BIND(FUZZ_OUTER, fuzz_outer, 2)

#endif /* CRPC_FUZZ_MESSAGE_H_INCLUDED */
