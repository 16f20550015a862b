// grpc_server sync | cq: gRPC C++ with its synchronous interface, or with a completion queue that
// one thread serves, as in gRPC's own example of an asynchronous server.
#include "echo.grpc.pb.h"

#include <grpcpp/grpcpp.h>

#include <cstdio>
#include <cstring>
#include <memory>

class SyncService final : public wire::EchoService::Service
{
    grpc::Status Call(grpc::ServerContext *, const wire::Echo *request,
                      wire::Echo *response) override
    {
        response->set_text(request->text());
        return grpc::Status::OK;
    }
};

// One request from its arrival to its end; then the next one takes its place.
class Request
{
  public:
    Request(wire::EchoService::AsyncService *service, grpc::ServerCompletionQueue *queue)
        : service_(service), queue_(queue), writer_(&context_)
    {
        service_->RequestCall(&context_, &request_, &writer_, queue_, queue_, this);
    }

    void go_on(bool ok)
    {
        if (finished_ || !ok) {
            delete this;
            return;
        }
        new Request(service_, queue_);
        response_.set_text(request_.text());
        finished_ = true;
        writer_.Finish(response_, grpc::Status::OK, this);
    }

  private:
    wire::EchoService::AsyncService *service_;
    grpc::ServerCompletionQueue *queue_;
    grpc::ServerContext context_;
    wire::Echo request_, response_;
    grpc::ServerAsyncResponseWriter<wire::Echo> writer_;
    bool finished_ = false;
};

int main(int argc, char **argv)
{
    bool async = argc > 1 && strcmp(argv[1], "cq") == 0;
    int port = 0;
    SyncService sync_service;
    wire::EchoService::AsyncService async_service;
    grpc::ServerBuilder builder;
    std::unique_ptr<grpc::ServerCompletionQueue> queue;

    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    if (async) {
        builder.RegisterService(&async_service);
        queue = builder.AddCompletionQueue();
    } else {
        builder.RegisterService(&sync_service);
    }
    std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
    if (!server) {
        return 1;
    }
    printf("%d\n", port);
    fflush(stdout);
    if (!async) {
        server->Wait();
        return 1;
    }
    for (int i = 0; i < 64; i++) {
        new Request(&async_service, queue.get());
    }
    void *tag;
    bool ok;
    while (queue->Next(&tag, &ok)) {
        static_cast<Request *>(tag)->go_on(ok);
    }
    return 1;
}
