/* The implementation, private to this file. */
#define CRPC_STATIC
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#ifndef CRPC_IMPLEMENTATION_INCLUDED
#error "there is no implementation in crpc.h"
#endif

int compile_static(void);
int compile_static(void)
{
    return crpc_version() != NULL;
}
