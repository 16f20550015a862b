/* tirpc_server: ONC RPC over TCP, without a port mapper; the dispatcher is rpcgen's. */
#include "tirpc.h"

#include <stdio.h>

void bench_program_1(struct svc_req *request, SVCXPRT *transport); /* generated */

text *call_1_svc(text *argument, struct svc_req *request)
{
    (void)request;
    return argument; /* encoded before the arguments are freed */
}

int main(void)
{
    SVCXPRT *transport = svctcp_create(RPC_ANYSOCK, 0, 0);
    if (!transport ||
        !svc_register(transport, BENCH_PROGRAM, BENCH_VERSION, bench_program_1, 0)) {
        return 1;
    }
    printf("%d\n", transport->xp_port);
    fflush(stdout);
    svc_run();
    return 1;
}
