#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "copies.h"
#include "serve.h"

int copy_normal(void)
{
    return serve_and_call("normal copy");
}
