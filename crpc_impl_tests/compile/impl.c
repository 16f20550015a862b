/* The implementation, included twice. */
#define CRPC_IMPLEMENTATION
#include "crpc.h"
#include "crpc.h"

#ifndef CRPC_IMPLEMENTATION_INCLUDED
#error "there is no implementation in crpc.h"
#endif
