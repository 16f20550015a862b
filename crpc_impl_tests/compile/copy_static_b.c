#define CRPC_STATIC
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "copies.h"
#include "serve.h"

int copy_static_b(void)
{
    return serve_and_call("static copy b");
}
