// capnp_server: Cap'n Proto's RPC on its own event loop.
#include "capnp.capnp.h"

#include <capnp/ez-rpc.h>

#include <cstdio>

class EchoServer final : public Echo::Server
{
    kj::Promise<void> call(CallContext context) override
    {
        context.getResults().setText(context.getParams().getText());
        return kj::READY_NOW;
    }
};

int main()
{
    capnp::EzRpcServer server(kj::heap<EchoServer>(), "127.0.0.1", 0);
    kj::WaitScope &scope = server.getWaitScope();
    printf("%u\n", server.getPort().wait(scope));
    fflush(stdout);
    kj::NEVER_DONE.wait(scope);
}
