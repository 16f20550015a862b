/* message Number { int32 value = 1; } as a user without protoc writes it for nanopb. */
#ifndef HAND_H_INCLUDED
#define HAND_H_INCLUDED

#include <pb.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct hand_Number {
    int32_t value;
} hand_Number;

extern const pb_msgdesc_t hand_Number_msg;

#ifdef __cplusplus
}
#endif

#endif /* HAND_H_INCLUDED */
