#include "hand.h"

#define hand_Number_FIELDLIST(X, a) X(a, STATIC, SINGULAR, INT32, value, 1)
#define hand_Number_CALLBACK NULL
#define hand_Number_DEFAULT NULL
PB_BIND(hand_Number, hand_Number, AUTO)
