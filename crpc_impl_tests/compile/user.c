/* A second file of a program: the implementation is in another one. */
#include "crpc.h"

#include <stdio.h>
#include <string.h>

int main(void)
{
    crpc_loop *loop = NULL;

    if (strcmp(crpc_version(), CRPC_VERSION) != 0 || crpc_loop_open(&loop, NULL) != CRPC_OK)
        return 1;
    printf("crpc %s, ZooKeeper driver %s\n", crpc_version(), crpc_zookeeper_driver());
    crpc_loop_close(loop);
    return 0;
}
