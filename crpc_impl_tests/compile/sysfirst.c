/* The implementation after a system header: works with -D_GNU_SOURCE, else is refused in words. */
#include <stdio.h>

#define CRPC_IMPLEMENTATION
#include "crpc.h"
