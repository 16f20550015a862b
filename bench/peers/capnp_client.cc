// capnp_client: promises on the event loop of the thread that opened the connection.
#include "capnp.capnp.h"

#include <capnp/ez-rpc.h>

#include "bench.h"

namespace
{

struct Conn {
    Conn(int port) : rpc("127.0.0.1", static_cast<unsigned>(port)), echo(rpc.getMain<Echo>())
    {
    }
    capnp::EzRpcClient rpc;
    Echo::Client echo;
    kj::Maybe<kj::Promise<void>> calls[BENCH_SLOTS];
    kj::Maybe<capnp::Response<Echo::CallResults>> replies[BENCH_SLOTS];
    int ended[BENCH_SLOTS], ended_count = 0;
    kj::Maybe<kj::Own<kj::PromiseFulfiller<void>>> waiting;
};

void *open_conn(int port)
{
    return new Conn(port);
}

void close_conn(void *conn)
{
    delete static_cast<Conn *>(conn);
}

auto request_of(Conn *c, int slot)
{
    auto request = c->echo.callRequest();
    request.setText(capnp::Text::Reader(bench_payload(slot), bench.size));
    return request;
}

void call(void *conn, int slot)
{
    Conn *c = static_cast<Conn *>(conn);
    auto response = request_of(c, slot).send().wait(c->rpc.getWaitScope());
    bench_check(slot, response.getText().begin(), response.getText().size());
}

void start(void *conn, int slot)
{
    Conn *c = static_cast<Conn *>(conn);
    c->calls[slot] = request_of(c, slot).send().then([c, slot](auto &&response) {
        c->replies[slot] = kj::mv(response); /* a promise must not be replaced in here */
        c->ended[c->ended_count++] = slot;
        KJ_IF_MAYBE (waiting, c->waiting) {
            (*waiting)->fulfill();
        }
    }).eagerlyEvaluate([](kj::Exception &&e) { bench_die("capnp: %s", e.getDescription().cStr()); });
}

void poll_conn(void *conn, bool wait)
{
    Conn *c = static_cast<Conn *>(conn);
    kj::WaitScope &scope = c->rpc.getWaitScope();
    scope.poll();
    if (wait && c->ended_count == 0) {
        auto pair = kj::newPromiseAndFulfiller<void>();
        c->waiting = kj::mv(pair.fulfiller);
        pair.promise.wait(scope);
        c->waiting = nullptr;
    }
    int count = c->ended_count;
    c->ended_count = 0; /* calls begun meanwhile end in a later poll */
    for (int i = 0; i < count; i++) {
        int slot = c->ended[i];
        auto reply = kj::mv(KJ_REQUIRE_NONNULL(c->replies[slot]));
        bench_end(slot, reply.getText().begin(), reply.getText().size());
    }
}

} // namespace

int main(int argc, char **argv)
{
    static const bench_peer peer = {open_conn, close_conn, call,    nullptr, start,
                                    poll_conn, false,      nullptr, nullptr};
    return bench_main(&peer, argc, argv);
}
