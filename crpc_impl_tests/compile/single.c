/* One copy, one file: what an example of the manual is. */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "serve.h"

int main(void)
{
    return serve_and_call(crpc_zookeeper_driver());
}
