/* Declarations first, the implementation later. */
#include "crpc.h"

int compile_late(void);
int compile_late(void)
{
    return crpc_version() != NULL;
}

#define CRPC_IMPLEMENTATION
#include "crpc.h"

#ifndef CRPC_IMPLEMENTATION_INCLUDED
#error "there is no implementation in crpc.h"
#endif
