// grpc_client: blocking calls, or calls that end on a completion queue.
#include "echo.grpc.pb.h"

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "bench.h"

namespace
{

struct Call {
    grpc::ClientContext context;
    grpc::Status status;
    wire::Echo response;
    std::unique_ptr<grpc::ClientAsyncResponseReader<wire::Echo>> reader;
    int slot;
};

struct Conn {
    std::unique_ptr<wire::EchoService::Stub> stub;
    grpc::CompletionQueue queue;
};

void *open_conn(int port)
{
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1); // a connection of its own
    Conn *c = new Conn;
    c->stub = wire::EchoService::NewStub(
        grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(port),
                                  grpc::InsecureChannelCredentials(), arguments));
    return c;
}

void close_conn(void *conn)
{
    delete static_cast<Conn *>(conn);
}

wire::Echo request_of(int slot)
{
    wire::Echo request;
    request.set_text(bench_payload(slot), bench.size);
    return request;
}

void must(const grpc::Status &status)
{
    if (!status.ok()) {
        bench_die("grpc: %s", status.error_message().c_str());
    }
}

void call(void *conn, int slot)
{
    grpc::ClientContext context;
    wire::Echo response;
    must(static_cast<Conn *>(conn)->stub->Call(&context, request_of(slot), &response));
    bench_check(slot, response.text().data(), response.text().size());
}

void start(void *conn, int slot)
{
    Conn *c = static_cast<Conn *>(conn);
    Call *call = new Call;
    call->slot = slot;
    call->reader = c->stub->AsyncCall(&call->context, request_of(slot), &c->queue);
    call->reader->Finish(&call->response, &call->status, call);
}

void poll_conn(void *conn, bool wait)
{
    Conn *c = static_cast<Conn *>(conn);
    gpr_timespec until = wait ? gpr_inf_future(GPR_CLOCK_MONOTONIC) : gpr_time_0(GPR_CLOCK_MONOTONIC);
    void *tag;
    bool ok;
    for (int i = 0; i < 64 && c->queue.AsyncNext(&tag, &ok, until) ==
                                  grpc::CompletionQueue::GOT_EVENT; i++) {
        std::unique_ptr<Call> call(static_cast<Call *>(tag));
        must(call->status);
        bench_end(call->slot, call->response.text().data(), call->response.text().size());
        until = gpr_time_0(GPR_CLOCK_MONOTONIC);
    }
}

} // namespace

int main(int argc, char **argv)
{
    static const bench_peer peer = {open_conn, close_conn, call,    nullptr, start,
                                    poll_conn, true,       nullptr, nullptr};
    return bench_main(&peer, argc, argv);
}
