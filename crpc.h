/* crpc 0.2.0 - remote procedure calls for embedded Linux, in one C header.      MIT or Unlicense
 *
 * A program that includes this file offers protobuf services, finds services by name in ZooKeeper
 * and calls them, over brpc's baidu_std protocol: its peers may be written with crpc, or with brpc,
 * srpc or one of the Java and Go implementations. It needs nanopb for the messages and, unless it
 * is switched off, the ZooKeeper C client.
 *
 * QUICK START
 *
 * In one C file of the program, before any other include:
 *
 *     #define CRPC_IMPLEMENTATION
 *     #include "crpc.h"
 *
 * Everywhere else include it without the first line. Stubs are generated from a .proto file; here
 * from examples/echo/echo.proto, whose .options file makes its strings views (see MESSAGES):
 *
 *     protoc --plugin=protoc-gen-crpc=./protoc-gen-crpc --nanopb_out=. --crpc_out=. echo.proto
 *     cc -c crpc.c echo.pb.c echo.crpc.c
 *     cc ... -lprotobuf-nanopb -lzookeeper_mt -lpthread       (-DTHREADED for the first file)
 *
 * A server:
 *
 * @example server
 * #include "echo.crpc.h"
 * #include <signal.h>
 * #include <stdio.h>
 *
 * static crpc_loop *loop;
 *
 * static void on_signal(int number)
 * {
 *     (void)number;
 *     crpc_loop_stop(loop); // crpc_server_run then finishes what it has begun, and returns
 * }
 *
 * static int echo(crpc_context *context, const example_EchoRequest *request,
 *                 example_EchoResponse *response)
 * {
 *     (void)context;
 *     response->message = request->message; // a view: valid until the reply is finished
 *     return CRPC_OK;
 * }
 *
 * int main(void)
 * {
 *     static const example_EchoService_handlers handlers = {echo};
 *     crpc_server_options options = CRPC_INIT;
 *     crpc_server *server;
 *     crpc_error error;
 *     int status;
 *     options.listen = "tcp://0.0.0.0:8000";
 *     options.registry = "zookeeper://127.0.0.1:2181/dubbo"; // leave it out for none
 *     if (crpc_server_open(&server, &options, &error) != CRPC_OK) {
 *         fprintf(stderr, "%s\n", error.text);
 *         return 1;
 *     }
 *     loop = crpc_server_loop(server);
 *     signal(SIGTERM, on_signal);
 *     status = crpc_server_add(server, &example_EchoService, &handlers, NULL);
 *     if (status == CRPC_OK)
 *         status = crpc_server_run(server); // what fails in here is also logged, with its cause
 *     if (status != CRPC_OK)
 *         fprintf(stderr, "server: %s\n", crpc_status_text(status));
 *     crpc_server_close(server);
 *     return status != CRPC_OK;
 * }
 * @end
 *
 * A client:
 *
 * @example client
 * #include "echo.crpc.h"
 * #include <stdio.h>
 *
 * int main(void)
 * {
 *     const char *url = "zookeeper://127.0.0.1:2181/dubbo/example.EchoService?timeout_ms=200";
 *     example_EchoRequest request = example_EchoRequest_init_zero;
 *     example_EchoResponse response = example_EchoResponse_init_zero;
 *     crpc_call call = CRPC_INIT;
 *     crpc_channel *channel;
 *     int status = crpc_channel_open(&channel, url, NULL, &call.error);
 *     request.message = crpc_view_str("hello");
 *     if (status == CRPC_OK)
 *         status = example_EchoService_Echo(channel, &request, &response, &call);
 *     if (status == CRPC_OK)
 *         printf("%.*s\n", (int)crpc_view_size(response.message),
 *                crpc_view_data(response.message));
 *     else
 *         printf("%s: %s\n", crpc_status_name(status), call.error.text);
 *     crpc_call_reset(&call);      // from here on response.message points nowhere
 *     crpc_channel_close(channel); // NULL is ignored, as by every close
 *     return status != CRPC_OK;
 * }
 * @end
 *
 * SECTION INDEX  (search for the tag)
 *
 *     >>config             what is compiled in, and the limits fixed at compile time
 *     >>platform           the few standard types the interface is written in
 *     >>api-status         result codes, and everything known about a failed call
 *     >>api-version        what was compiled
 *     >>api-view           bytes that somebody else owns, and unbounded protobuf fields
 *     >>api-hooks          allocator, log, clock, resolver
 *     >>api-loop           the reactor: who drives it, file descriptors, timers
 *     >>api-service        tables that describe services; written by protoc-gen-crpc
 *     >>api-options        groups of options that channels and servers share
 *     >>api-channel        the client: calls
 *     >>api-server         the server: services, requests, replies
 *     >>api-coordination   nodes, configuration, locks and elections in ZooKeeper
 *     >>impl-base          system headers, attributes, assertions, small arithmetic, hash
 *     >>impl-thread        mutexes, condition variables, threads, atomic counters
 *     >>impl-status        names and texts of status codes
 *     >>impl-heap          memory, log and clock of a loop and of all objects on it
 *     >>impl-id            {generation, index} ids of objects that may be gone when they are used
 *     >>impl-list          doubly linked lists through members of the items
 *     >>impl-url           URLs, their options, percent-encoding
 *     >>impl-options       tables of options: defaults, ranges, URL keys, key=value lines
 *     >>impl-message       requests and replies; nanopb: views, encoding, decoding
 *     >>impl-frame         the 12 bytes before every message
 *     >>impl-meta          what a message is about: brpc's RpcMeta
 *     >>impl-sock          addresses and sockets, without a loop
 *     >>impl-resolver      host names to numeric addresses; blocks the calling thread
 *     >>impl-transport     how a connection's bytes reach its socket
 *     >>impl-poller        waiting for many descriptors: epoll and poll behind one face
 *     >>impl-wake          a descriptor by which another thread ends the poller's wait
 *     >>impl-timer         hashed hierarchical timing wheel: O(1) to arm and cancel
 *     >>impl-loop          a loop's state: lock, driver, clock, tasks, timers
 *     >>impl-watch         descriptors that a loop waits for
 *     >>impl-user          what the program has on a loop: posts, timers, descriptors
 *     >>impl-drive         who drives a loop, who waits, and how they take turns
 *     >>impl-limiter       token buckets, retry budgets, adaptive concurrency limits
 *     >>impl-breaker       a provider that fails gets no calls, then a probe, then more
 *     >>impl-balance       balancers: which provider of a list a call goes to
 *     >>impl-conn          one connection: its state and descriptor, queueing and sending, closing
 *     >>impl-receive       messages out of a connection: buffers, parsing, bodies over max_body
 *     >>impl-connect       sockets become connections: dialled, accepted; their events
 *     >>impl-baidu         brpc's protocol baidu_std: RpcMeta to messages and back
 *     >>impl-protocols     the table of wire protocols
 *     >>impl-names         provider URLs in Dubbo's notation, and an operator's overrides; pure
 *     >>impl-cache         the last good lists of providers, in a file that survives crashes
 *     >>impl-directory     the live list of a service's providers, and its subscribers
 *     >>impl-file          providers listed in a file: file://
 *     >>impl-multicast     serverless registry over UDP multicast: multicast://
 *     >>impl-zk-servers    servers of an ensemble; the local address towards them
 *     >>impl-zk-job        requests to ZooKeeper: who sends them, and how answers are handled
 *     >>impl-zk-session    a session with ZooKeeper: start, loss, expiry
 *     >>impl-zk-pool       sessions that several users of a loop share: opening, closing
 *     >>impl-zk-node       the two primitives: watching a znode, and owning one
 *     >>impl-zk-directory  zookeeper:// in Dubbo's layout: providers, consumers, overrides
 *     >>impl-open          the table of directory backends: schemes, URL options, paths
 *     >>impl-agreement     common parts of what programs open in ZooKeeper: lifetime, paths, codes
 *     >>impl-operations    reading and writing znodes, one or several at once
 *     >>impl-config        following the value of a znode
 *     >>impl-queue         locks and elections
 *     >>impl-registry      opening and closing a session that programs use
 *     >>impl-request       a method as a channel knows it, and an encoded request
 *     >>impl-reply         a reply: kept, decoded, handed to the caller
 *     >>impl-endpoint      one provider: dialling it, backoff, and the attempts on its connection
 *     >>impl-providers     the providers of a channel, and the choice among them
 *     >>impl-attempt       a pending call: one attempt after another, and its end
 *     >>impl-cluster       several attempts at a time, and tries in the background
 *     >>impl-channel       the forms of calls, and closing
 *     >>impl-opening       URLs and options of a channel, its directory
 *     >>impl-service       finding the method that a request names
 *     >>impl-worker        a pool of threads for handlers, with a bounded queue
 *     >>impl-order         requests with the same ordering key run one after another
 *     >>impl-replay        replies kept for requests that arrive again with the same id
 *     >>impl-peer          the peers of a server: networks, and the accounts of hosts
 *     >>impl-quota         limits of a method: concurrency and rates
 *     >>impl-context       one request in service: its handler, its reply, its end
 *     >>impl-guard         requests that are limited, keep an order, or come again
 *     >>impl-intake        what a server's connections bring: taken in, or refused
 *     >>impl-listener      sockets that accept, and who gets the new connections
 *     >>impl-enrolment     the services of a server in a registry
 *     >>impl-lifecycle     a server's options; opening a server, starting, draining, closing
 *
 * BUILD AND OPTIONS
 *
 * The file that defines CRPC_IMPLEMENTATION must include crpc.h first, or be compiled with
 * -D_GNU_SOURCE. C99 or C++11 and later, gcc or clang, Linux with glibc or musl. nanopb 0.4.5 or
 * newer, compiled with the options that this file sees; crpc_loop_open finds out if they differ
 * (CRPC_EABI).
 *
 *     CRPC_ENABLE_EPOLL      1   0: poll(2) is the only poller
 *     CRPC_ENABLE_THREADS    1   0: no locks; the whole program uses crpc from one thread, and
 *                                ZooKeeper only by libzookeeper_st: CRPC_ZOOKEEPER_ST=1
 *     CRPC_ENABLE_CLIENT     1   0: no channels
 *     CRPC_ENABLE_SERVER     1   0: no server
 *     CRPC_ENABLE_ZOOKEEPER  1   0: no zookeeper://, no ZooKeeper client needed
 *     CRPC_ENABLE_SERVERLESS 1   0: no file://, no multicast://
 *     CRPC_ENABLE_POLICY     1   0: of the calling policies only weighted round robin, failover,
 *                                failfast, deadlines and caps; servers keep no order, replay
 *                                nothing, and of limits have max_concurrency and max_connections.
 *                                Options that ask for more are refused with CRPC_EUNSUPPORTED
 *     CRPC_ENABLE_TEXTS      1   0: the text of an error is its code's name, or what the peer said;
 *                                a log line is its level and "crpc.h:" with the line's number
 *     CRPC_ENABLE_RESOLVER   1   0: host names only by crpc_hooks.resolve: a static program without
 *                                getaddrinfo is some 15 KiB smaller
 *     CRPC_DEBUG             0   1: checks rules of crpc and of its use (an object closed twice, a
 *                                crpc_call that was never initialised) and aborts with a sentence
 *     CRPC_ZOOKEEPER_ST      0   1: libzookeeper_st instead of _mt (compile without -DTHREADED)
 *     CRPC_STATIC                defined: all functions are static in the file that includes the
 *                                implementation. It then needs hand-written tables in that file
 *     CRPC_REALLOC, CRPC_FREE    the default allocator: define both or neither
 *
 * CONTRACTS
 *
 * These rules hold for every function. A comment in the interface says where one differs.
 *
 * Errors. A function that can fail returns CRPC_OK, which is 0, or another crpc_status. Out of
 * memory is one of them: crpc never aborts (unless CRPC_DEBUG asks for it). Output pointers are set
 * to NULL on failure. A function that takes a crpc_error fills it with a sentence: what failed, on
 * which object, which value or limit, what to do. For a call that sentence is in crpc_call.error,
 * with the provider's address, the side that found the error (remote), and how much of the request
 * was sent (sent).
 *
 * Completion. If an asynchronous call returns CRPC_OK, its callback runs exactly once, on the
 * thread that drives the loop, never on the caller's stack. It may run before the call function
 * has returned to its thread. If the function returns an error, the callback never runs. Closing a
 * channel ends its pending calls with CRPC_ECANCELED.
 *
 * Callbacks. A callback may call any function, also the one that closes the object that called
 * back. The exception is what would wait for the callback itself: a synchronous call on the same
 * loop returns CRPC_EDEADLK.
 *
 * Threads. Every function may be called from any thread unless its comment says otherwise. The
 * program must make sure of one thing itself: that no thread uses an object while, or after,
 * another thread closes it.
 *
 * Arguments. A pointer must not be NULL unless the comment allows it. Options structs begin as
 * CRPC_INIT. In an option 0 means the default and -1 means none; values below -1 count as -1.
 *
 * Ownership. crpc borrows what a function is given until the function returns. What a callback is
 * given is valid until the callback returns. A response's views and reply_attachment are valid
 * until crpc_call_reset or the next use of the call. Options and URLs are copied. Hooks,
 * interceptors, service tables and handlers are not: they must outlive the object. method_limits
 * must live until the server has started. Every close function ignores NULL.
 *
 * Process. crpc has no writable global data, installs no signal handler, never raises SIGPIPE, and
 * starts no thread that the program did not ask for. Two exceptions: the ZooKeeper client has two
 * threads of its own (libzookeeper_mt), and an asynchronous call on a loop that nobody drives
 * starts the loop's thread, unless loop options forbid_threads says no. Descriptors are
 * close-on-exec. Times are those of CLOCK_MONOTONIC. After fork the child must not use what the
 * parent opened.
 *
 * Delivery. A call is executed at most once, unless its method is idempotent (in the .proto:
 * `option idempotency_level = IDEMPOTENT;`) or its cluster policy sends it to several providers or
 * again (failback, forking, broadcast). crpc retries by itself in three cases: not a byte of the
 * request was sent; the server refused it because it is stopping (CRPC_ELOGOFF); the connection was
 * lost and the method is idempotent. Each retry goes to a provider other than the last four that
 * were tried. A request with an id (request_ids) is repeated at its own provider instead, and a
 * server with replay_entries executes it once, however often it comes. CRPC_OK means that the
 * handler has finished. CRPC_ETIMEDOUT with sent == CRPC_SENT_YES means that nobody knows.
 *
 * OPTIONS
 *
 * All options stand in structs, where 0 means the default. A program can also take them from text:
 * a channel's URL, and lines of a configuration file or an environment variable, which
 * crpc_channel_options_parse and crpc_server_options_parse read:
 *
 * @example configuration
 * #include "crpc.h"
 * #include <stdlib.h>
 *
 * // ECHO_OPTIONS holds lines such as "timeout_ms=200" and "credential=..."
 * int open_configured(crpc_channel **channel, const char *url, crpc_error *error)
 * {
 *     crpc_channel_options options = CRPC_INIT;
 *     char *text = getenv("ECHO_OPTIONS");
 *     int status = text ? crpc_channel_options_parse(text, &options, error) : CRPC_OK;
 *     if (status == CRPC_OK)
 *         status = crpc_channel_open(channel, url, &options, error);
 *     return status; // error->text: "line 2: timeout_ms=99999999999: at most 86400000"
 * }
 * @end
 *
 * Of several settings of one thing the most specific wins: the call's, the method's
 * (crpc_method_options), the URL's, the options', the .proto's (its timeout), the default. So what
 * an operator writes into a URL goes before what stands in the program and in the .proto.
 *
 * Each line below has the key, what 0 means, what -1 means, and which other values are allowed. In
 * the two columns 0 stands for none, never or no limit: the struct's comment says which.
 *
 * Channels:
 *
 *     cluster                 failover,failfast,failsafe,failback,forking,broadcast
 *     timeout_ms              1000        86400000    1 to 86400000
 *     retries                 2           0           1 to 16
 *     backup_ms               0           0           1 to 86400000
 *     forks                   2           0           1 and more
 *     fail_percent            0           0           1 to 100
 *     lb                      random,wrandom,rr,wrr,la,hash,p2c
 *     hash_field              0           0           1 to 536870911
 *     max_endpoints           0           0           1 and more
 *     wait                    0           0           1
 *     connect_timeout_ms      500         0           1 to 86400000
 *     retry_budget            10          -1          1 and more
 *     request_ids             0           0           1
 *     breaker                 0           0           1
 *     breaker_percent         50          50          1 to 100
 *     breaker_requests        20          1           1 and more
 *     breaker_window_ms       10000       10000       1 to 86400000
 *     breaker_slow_ms         0           0           1 to 86400000
 *     breaker_slow_percent    50          50          1 to 100
 *     breaker_open_ms         1000        1000        1 to 86400000
 *     breaker_open_max_ms     30000       30000       1 to 86400000
 *     breaker_ramp_ms         5000        0           1 to 86400000
 *     breaker_eject_percent   50          100         1 to 100
 *     group                   text, with a registry
 *     version                 text, with a registry
 *     application             text, with a registry
 *     registry_credential     text, secret: not in URLs
 *     registry_timeout_ms     3000        0           1 to 86400000
 *     session_timeout_ms      15000       15000       1 to 86400000
 *     must_connect            0           0           1
 *     allow_empty             0           0           1
 *     stale_ttl_ms            600000      0           1 to 86400000
 *     cache                   text, with a registry
 *     max_body                64 MiB      2 GiB - 1   1 to 2 GiB - 1
 *     max_queued              16 MiB      0           1 and more
 *     inflight                0           0           1 and more
 *     short_names             0           0           1
 *     credential              text, secret: not in URLs
 *     failback_ms             5000        5000        1 to 86400000
 *     failback_max            100         0           1 and more
 *
 * Servers:
 *
 *     listen                  text
 *     registry                text
 *     advertise               text
 *     group                   text
 *     version                 text
 *     application             text
 *     registry_credential     text, secret: not in URLs
 *     registry_timeout_ms     3000        0           1 to 86400000
 *     session_timeout_ms      15000       15000       1 to 86400000
 *     must_connect            0           0           1
 *     weight                  100         0           1 to 1000000
 *     warmup_ms               0           0           1 to 86400000
 *     io_threads              0           0           1 to 1024
 *     workers                 0           0           1 to 1024
 *     worker_queue            1024        0           1 and more
 *     worker_stack            256 KiB     0           16 KiB and more
 *     ordered                 0           -1          1
 *     max_concurrency         8192        0           1 and more
 *     max_connections         1024        0           1 and more
 *     first_request_ms        60000       0           1 to 86400000
 *     allow                   text
 *     peers                   text
 *     max_body                64 MiB      2 GiB - 1   1 to 2 GiB - 1
 *     max_queued              4 MiB       0           1 and more
 *     max_skip                256 MiB     0           1 and more
 *     rate_per_client         0           0           1 and more
 *     burst_per_client        0           0           1 and more
 *     replay_entries          0           0           1 and more
 *     replay_ms               60000       0           1 to 86400000
 *     replay_bytes            4 MiB       0           1 and more
 *     idle_timeout_ms         0           0           1 to 86400000
 *     frame_timeout_ms        30000       0           1 to 86400000
 *     lame_ms                 1000        0           1 to 86400000
 *     drain_ms                5000        0           1 to 86400000
 *
 * Loops: a channel's private_loop, a server's loops. Not in URLs.
 *
 *     poller                  epoll,poll
 *     forbid_threads          0           0           1
 *     stack_size              256 KiB     0           16 KiB and more
 *     max_results             1024        0           1 and more
 *     max_bytes               256 MiB     0           1 and more
 *     log_level               0           -1          1 to 4
 *     thread_name             text
 *
 * LOOPS AND THREADS
 *
 * A loop is a reactor: it waits for sockets and timers and runs what is due. One thread at a time
 * drives it. That is whoever calls crpc_loop_run or crpc_loop_step, or the loop's own thread after
 * crpc_loop_start. A loop that nobody drives is driven by the threads that wait in synchronous
 * calls: one of them polls and reads for all, and when its own reply has come, the next one takes
 * over.
 *
 * So a synchronous call on a private loop costs one send, one wait and one receive, and wakes no
 * other thread. On a loop with a thread of its own each call is handed to that thread and back,
 * which costs some microseconds. For synchronous work give a channel no loop, or one that nobody
 * runs.
 *
 * Callbacks run only on a thread that runs or steps the loop, or waits for a call by its id. A
 * thread in a synchronous call never runs callbacks, so it may hold the program's locks. Handlers
 * are callbacks too: a synchronous call to a server on the same loop gets no answer.
 *
 * Frames that a callback sends leave together when all callbacks of a step have returned. Frames
 * that other threads send leave at once, with one system call each. A program that begins many
 * calls at a time should do so inside a callback: crpc_loop_post runs one.
 *
 * A program with a poll loop of its own asks crpc_loop_pollfds and crpc_loop_timeout before each
 * wait, and calls crpc_loop_step(loop, 0) after it. It must make its first step, or ask one of the
 * two functions, before its first asynchronous call: from then on no thread is started for the
 * loop.
 *
 * MESSAGES
 *
 * A message is a struct that nanopb generates. Strings and bytes are either char arrays of a fixed
 * size (max_size in the .options file) or views, which may have any length:
 *
 *     *                            include:"crpc.h" callback_function:"crpc_view_field"
 *     example.EchoRequest.message  callback_datatype:"crpc_view"
 *     example.Names.list           callback_datatype:"crpc_views"
 *
 * A view to be sent points at bytes of the program. In a request they must stay until the call
 * function returns; in a response, until the reply is finished (crpc_context_alloc gives memory
 * that lives so long). A received view points into the frame, so nothing is copied. A struct with
 * views is cleared before it is decoded. Views do not work inside a oneof; the generator refuses
 * them there. Outside a call crpc_message_decode decodes; nanopb's pb_encode encodes.
 *
 * nanopb 0.4.8 and later initialise a view in X_init_zero with `{0}`, of which gcc warns. X.crpc.h
 * switches that warning off; a program that includes only X.pb.h adds -Wno-missing-braces.
 *
 * Bulk data belongs into the attachment: raw bytes behind the message, which protobuf never sees
 * and crpc copies at most once.
 *
 * WIRE FORMAT
 *
 * baidu_std: "PRPC", body size, meta size (32 bits each, big-endian), RpcMeta, message, attachment.
 *
 *     RpcMeta field          sent by crpc                      received
 *     request, response      one of them                       by role; missing response: success
 *     compress_type          0                                 other than 0: CRPC_EREQUEST
 *     correlation_id         always                            echoed; absent is 0
 *     attachment_size        if there is one                   yes
 *     chunk_info             no                                CRPC_EREQUEST
 *     authentication_data    if a credential is set, always    crpc_context_credential
 *     stream_settings        no                                CRPC_EREQUEST
 *     user_fields            as asked                          yes
 *     content_type           no                                other than 0: CRPC_EREQUEST
 *     checksum_type          no                                other than 0: CRPC_EREQUEST
 *     request: log_id, trace_id, span_id, parent_span_id, timeout_ms (always); no request_id
 *
 * One connection to each provider carries all calls of a loop, and replies come in any order.
 * `inflight=1` is for peers that can answer only one request at a time. A service is found by its
 * full name ("package.Service"), else by its short name.
 *
 * An application's error code is any number except 0-199 and 1000-3999, which belong to operating
 * systems and to RPC frameworks. crpc marks such an error with the user_fields entry "crpc-app";
 * for peers that do not set the mark, the number decides. In a request, "crpc-key" is the key by
 * which an ordered server queues it (crpc_server_options.ordered), and "crpc-rid" is the id by
 * which a server with replay_entries knows it again. Any peer may send both.
 *
 * REGISTRY
 *
 * zookeeper:// uses the layout of Dubbo, so its tools list crpc services. A provider registers an
 * ephemeral node for each service,
 *     /dubbo/package.Service/providers/<URL-encoded crpc://host:port/package.Service?...>
 * and consumers watch that directory. A channel takes the providers whose group and version are
 * those of its URL: unset matches providers that have none, `*` matches all, `a,b` matches either.
 * Nodes in `configurators` change providers at run time, as with Dubbo:
 *     override://10.0.0.1:8000/package.Service?weight=200     or disabled=true, warmup=60000
 * The host 0.0.0.0 stands for all providers. An address without a port is a consumer's: only that
 * consumer obeys. Consumers list themselves in `consumers`; apart from that a consumer only reads.
 *
 * Calls never wait for ZooKeeper. Only opening waits, at most the registry timeout, for the first
 * list. While ZooKeeper is away, or answers with an empty list, the last non-empty list stays in
 * use. When ZooKeeper is back, a provider that it does not list yet stays in use for two seconds
 * and a session timeout more, so that the first provider to register again does not get the load of
 * all. A session that has expired, or has been cut off for twice its timeout, is replaced and
 * everything is registered again; so is a node that somebody removed. The ZooKeeper client gets
 * numeric addresses only; host names are resolved when a channel or a server opens. The client's
 * sockets are not close-on-exec, so a program that execs must close them in the child.
 *
 * Two registries need no server. Both need a loop that is driven.
 *
 * file:///path names a file with a line for each provider. Only the address is required. A channel
 * examines the file once a second and reads it again when it has changed; replace it by renaming,
 * so that no half of it is read.
 *     10.0.0.1:8000 weight=100 warmup_ms=60000 group=g version=1 service=package.Service  # comment
 *
 * multicast://224.5.6.7:1234 needs nothing at all: providers announce themselves every five seconds
 * by UDP multicast, and are dropped after fifteen seconds of silence. Whoever can send to the group
 * can announce a provider, so use it only where every host is trusted.
 *
 * CALLING POLICY
 *
 * A channel has three policies for its providers. The balancer (crpc_balancer) chooses a provider
 * for each attempt. The cluster policy (crpc_cluster) decides what a failure leads to. The breaker
 * takes providers out of the choice that fail. Each can be set for a channel in its options or its
 * URL; the cluster policy and the timeout also for a method and for a single call. The most
 * specific setting wins.
 *
 *     zookeeper://zk:2181/dubbo/demo.User?lb=la&retries=1&breaker=1&backup_ms=50
 *
 * Choosing. A provider with weight 0 is chosen only if there is no other. A provider that
 * registered a warm-up time gets a share that grows during it, by Dubbo's formula. One that cannot
 * be connected rests for up to a second, with a random share of that; one that says it is stopping
 * rests for a second.
 *
 * Retries. All attempts of a call share its one deadline, and all retries of a channel share a
 * budget (retry_budget), so that a fleet that is down is not stormed. A backup request goes to one
 * more provider when an idempotent call has waited backup_ms; the first reply is used and later
 * ones are dropped. When a call has failed for good, the method's fallback stands for the reply.
 *
 * Programs may start in any order: with wait=1 a call that is made while no provider is known, or
 * none can be reached, waits for one until its deadline.
 *
 * The breaker ejects at most half of the providers, and never the last one that could be asked.
 *
 *     graceful stop   The server unregisters, serves on for lame_ms, then refuses requests with
 *                     CRPC_ELOGOFF, finishes those it has, and closes at drain_ms. Channels leave
 *                     it meanwhile and keep their connection until their last call has ended.
 *     registry away   Calls go on with the last list: see stale_ttl_ms, allow_empty.
 *     long lists      max_endpoints uses a part of them, a different one for each channel.
 *
 * COORDINATION
 *
 * A program can use the registry's session for what a fleet has to agree on. crpc_registry_open
 * gives nodes of ZooKeeper to read and write. crpc_config_watch follows a value. crpc_lock_* and
 * crpc_election_* are queues of which one member at a time is first. Their callbacks run on the
 * thread that drives the loop, so the loop has to be driven; crpc_registry_call waits instead.
 *
 *     what             when the connection is lost     when the session is over
 *     an operation     unsent: waits until its         the same
 *                      deadline. Sent: CRPC_ECONN
 *                      and MAYBE; reads are repeated
 *     ephemeral node   stays                           is gone, and is not made again
 *     crpc_config_*    keeps the last value, then      the same
 *                      reads it again
 *     lock, waiting    keeps its place                 gets a new place, at the end
 *     lock, held       is held for the rest of the     CRPC_EGONE, at the latest then
 *                      lease
 *     leader           likewise                        is told, then becomes a candidate again
 *
 * The lease ends nine tenths of the session timeout after the last request that ZooKeeper answered,
 * which is before ZooKeeper can give the lock to another. It is renewed every quarter of the
 * timeout. A process that is stopped or starved gets no callback in time, and what it sent earlier
 * may arrive late. Where two holders at a time would do harm, send the lock's token with each
 * request, and let the receiver refuse a token smaller than the largest it has seen. Nodes are
 * named as in Curator's recipes (InterProcessMutex, LeaderSelector).
 *
 * LIMITS AND TRUST
 *
 * Bytes from a connection are not trusted. Sizes are checked before memory is taken, nothing that
 * is read can reach an assertion, and nanopb runs without allocation of its own. A peer can make a
 * process hold: max_body for each connection, max_queued bytes of replies, 4096 requests in service
 * on a connection (max_concurrency on all together), and max_bytes of buffers on a loop. A request
 * over a limit of the server is answered before it is decoded. This version has neither encryption
 * nor authentication: keep to trusted networks, or to tunnels. The ZooKeeper server is trusted,
 * because its C client aborts on some malformed answers.
 *
 *     limit                  default     when it is reached
 *     timeout_ms             1000 ms     CRPC_ETIMEDOUT
 *     max_body               64 MiB      request: CRPC_EREQUEST; reply: CRPC_ERESPONSE; skipped
 *     RpcMeta                64 KiB      CRPC_EINVAL; received: the connection is closed
 *     channel max_queued     16 MiB      CRPC_EOVERCROWDED, also for one request that is larger
 *     server max_queued      4 MiB       the connection is not read until half is sent
 *     max_connections        1024        CRPC_ELIMIT, 32 at a time, else closed; see below
 *     worker_queue           1024        CRPC_ELIMIT
 *     max_concurrency        8192        CRPC_ELIMIT; for each I/O thread
 *     method_limits, rate_per_client  none CRPC_ELIMIT
 *     replay_entries         none        CRPC_ELIMIT for requests with an id
 *     replay_bytes           4 MiB       a repeated request gets CRPC_EINTERNAL
 *     max_results            1024        CRPC_ELIMIT
 *     max_bytes              256 MiB     CRPC_ENOMEM, or the connection is closed
 *     URL                    2047 bytes  CRPC_EINVAL
 *
 * All connections of one host are an account: an IPv4 address, the /64 of a global IPv6 address, a
 * whole link-local or unique-local one, the user of a unix socket. Below three quarters of
 * max_connections any account may have all of them. Above that, the account with the most, divided
 * by its weight (access.peers), gets no more, and when none is left a newcomer of a smaller account
 * takes one of its connections: one that has asked for nothing yet, else the one that has been idle
 * for longest, never one with a request in service. A gateway that stands for a hundred boards needs
 * a weight. Attackers with as many addresses as max_connections can still shut others out: admit
 * only known networks (access.allow).
 *
 * PORTING
 *
 * Linux 2.6.27 and later. Where the kernel is too old for accept4 (2.6.28, on ARM 2.6.36), for the
 * coarse clock (2.6.32) or for getrandom (3.17), or where a sandbox refuses one of them, epoll or
 * eventfd with ENOSYS or EPERM, crpc does without: with accept and fcntl, the exact clock, a seed
 * from the clock and the process's start, poll, and a pipe. No 64-bit atomics, no unaligned access,
 * no byte order assumed. With musl threads have small stacks: crpc's own use less than 32 KiB of
 * the 256 that they are given, handlers come on top.
 *
 * CHANGES
 *
 * From 0.1 to 0.2. The wire format and the layout in ZooKeeper are the same. Generate the stubs
 * anew.
 *
 *     0.1                                        0.2
 *     crpc_channel_options.timeout_ms, retries,  .policy.*
 *       cluster, backup_ms, forks, fail_percent
 *     .breaker, .breaker_X                       .breaker.enabled, .breaker.X
 *     .max_body, .max_queued                     .limits.*
 *     .inflight, .short_names                    .wire.*
 *     .credential                                .security.credential
 *     .registry_credential                       .directory.credential
 *     .registry_timeout_ms                       .directory.timeout_ms
 *     .session_timeout_ms, must_connect,         .directory.*
 *       application, allow_empty,
 *       stale_ttl_ms, cache
 *     crpc_server_options: group, version and    .directory.*, .limits.*
 *       those above
 *     .limits, .limit_count                      .method_limits, .method_limit_count
 *     crpc_call.timeout_ms, .retries             .policy.timeout_ms, .policy.retries; policy is a
 *                                                struct and no pointer
 *     crpc_method_options.method: "Login"        a pointer: demo_UserService_Login_method;
 *                                                crpc_method_limit likewise
 *
 * What is refused now: values out of range, which were clamped in part; a URL key given twice; port
 * 0 in a channel's URL; a registry URL that is none, already in crpc_server_open; lb=hash with
 * neither a key nor hash_field; a number that is no crpc_status as the result of a handler (only
 * crpc_context_fail sets an application's code); what CRPC_ENABLE_POLICY=0 leaves out.
 *
 * What behaves otherwise: a timeout in a channel's URL or options goes before the one in the
 * .proto. A host name gives all its addresses as providers, sixteen at most. A hash_field that the
 * message leaves at zero is a key like any other. The text of an error names the attempt, and no
 * longer how many there could have been.
 *
 * What is new: wait=1, unix://@name, CRPC_ENABLE_POLICY, CRPC_ENABLE_TEXTS, CRPC_DEBUG,
 * crpc_channel_options_parse and crpc_server_options_parse.
 *
 * HACKING
 *
 * This chapter is for people who change this file.
 *
 * Rooms. The implementation stands bottom up. A section calls only sections above it in the file,
 * so there is no prototype across sections, and the compiler enforces the order. Every function
 * carries its section's prefix (crpci_<section>_), and a section owns its structs. Search for a tag
 * of the index to jump.
 *
 *     ground      base thread status heap id list url options         no I/O
 *     bytes       message frame meta                                  pure, fuzzed
 *     reactor     sock resolver transport poller wake timer           one mutex a loop, one driver
 *                 loop watch user drive
 *     policy      limiter breaker balance                             pure: no sockets, no clock
 *     wire        conn receive connect baidu protocols                bytes to messages and back
 *     directory   names cache directory file multicast zk_servers     live lists of providers
 *                 zk_job zk_session zk_pool zk_node zk_directory open
 *     agreement   agreement operations config queue registry          on a ZooKeeper session
 *     client      request reply endpoint providers attempt cluster channel opening
 *     server      service worker order replay quota context guard intake listener enrolment
 *                 lifecycle
 *
 * Where a lower room has to tell an upper one, the upper one installs a small table of functions:
 * endpoint -> attempt (crpci_endpoint_events), attempt -> cluster (crpci_cluster_ops), context ->
 * guard, session -> directory.
 *
 * Locks. A loop has one mutex for all that belongs to it. It is released while waiting, sending,
 * receiving, and while user code runs. Two loops are never locked at the same time. The server's
 * guard has a mutex that may be taken under a loop's; behind it come only those of workers and
 * heap. Rules P1 to P11 stand where they are used (search for P1 to P11).
 *
 * Where to add what
 *     a balancer       a line in crpc_balancer, a row in CRPCI_BALANCE_MAP
 *     an option        a member of the options struct with its comment, a row in
 *                      crpci_opening_rows (channel) or crpci_lifecycle_rows (server), a line of
 *                      OPTIONS above
 *     a directory      a row in crpci_open_backends, a section with its functions
 *     a protocol       a row in crpci_protocols, a section like impl-baidu
 *     a status         a line at the end of CRPC_STATUS_MAP
 *     a section        a banner, a line in the index, crpc_impl_tests/test_<section>.c
 *
 * What to run
 *     make test T="conn url"     the tests whose names hold one of these words, with ASan and UBSan
 *     make test-tsan             the threads' tests, and builds with one rule left out, which must
 *                                fail
 *     make lint                  order, names, comments, samples; and that each check can fail
 *     make matrix                compilers, standards, toggles
 *     make instructions          instructions of a call against a baseline
 *     make allocs                that a warm call allocates nothing
 *     make size                  bytes and stacks, by section and toggle
 *     bash .ci/run               everything
 *
 * A change of behaviour comes with a test that failed before it. A limit is an option with a safe
 * default. A change of speed comes with the figures of `make instructions`.
 *
 * The licence stands at the end of the file.
 */

#if defined(CRPC_IMPLEMENTATION) && !defined(_GNU_SOURCE)
#if defined(_FEATURES_H)
#error "crpc: where CRPC_IMPLEMENTATION is defined, include crpc.h first or use -D_GNU_SOURCE"
#endif
#define _GNU_SOURCE 1 /* accept4, pthread_setname_np */
#endif

#ifndef CRPC_H_INCLUDED
#define CRPC_H_INCLUDED

/* ======================================================================== */
/* >>config   what is compiled in, and the limits fixed at compile time     */
/* ======================================================================== */

#define CRPC_VERSION_MAJOR 0
#define CRPC_VERSION_MINOR 2
#define CRPC_VERSION_PATCH 0
#define CRPC_VERSION "0.2.0"

/* Each toggle is 0 or 1. Define it before the include in every file, or with -D. No toggle changes
 * a public struct, so two files that disagree can fail to link but never misbehave. */
#ifndef CRPC_ENABLE_EPOLL
#define CRPC_ENABLE_EPOLL 1 /* 0: poll(2) is the only poller */
#endif
#ifndef CRPC_ENABLE_THREADS
#define CRPC_ENABLE_THREADS 1 /* 0: no locks and no threads; one thread uses crpc */
#endif
#ifndef CRPC_ENABLE_CLIENT
#define CRPC_ENABLE_CLIENT 1 /* 0: no crpc_channel_*, no crpc_call_* */
#endif
#ifndef CRPC_ENABLE_SERVER
#define CRPC_ENABLE_SERVER 1 /* 0: no crpc_server_*, no crpc_context_* */
#endif
#ifndef CRPC_ENABLE_ZOOKEEPER
#define CRPC_ENABLE_ZOOKEEPER 1 /* 0: no zookeeper://, and no ZooKeeper C client to link */
#endif
#ifndef CRPC_ENABLE_SERVERLESS
#define CRPC_ENABLE_SERVERLESS 1 /* 0: no file:// and no multicast:// registry */
#endif
#ifndef CRPC_ENABLE_POLICY
#define CRPC_ENABLE_POLICY 1 /* 0: weighted round robin, failover, failfast, caps, deadlines */
#endif
#ifndef CRPC_ENABLE_TEXTS
#define CRPC_ENABLE_TEXTS 1 /* 0: errors say a code's name, log lines a line number of crpc.h */
#endif
#ifndef CRPC_ENABLE_RESOLVER
#define CRPC_ENABLE_RESOLVER 1 /* 0: no getaddrinfo; numeric addresses, or crpc_hooks.resolve */
#endif
#ifndef CRPC_DEBUG
#define CRPC_DEBUG 0 /* 1: crpc checks its rules and their use, and aborts where one is broken */
#endif
#ifndef CRPC_ZOOKEEPER_ST
#define CRPC_ZOOKEEPER_ST 0 /* 1: libzookeeper_st, driven by the loop; 0: libzookeeper_mt */
#endif

/* Linkage of the public functions. Define CRPC_API before the include to add a visibility
 * attribute. With CRPC_STATIC the functions are private to the file that includes the
 * implementation. */
#ifndef CRPC_API
#ifdef CRPC_STATIC
#if defined(__GNUC__)
#define CRPC_API static __attribute__((unused))
#else
#define CRPC_API static
#endif
#else
#define CRPC_API extern
#endif
#endif

/* ======================================================================== */
/* >>platform   the few standard types the interface is written in          */
/* ======================================================================== */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define CRPC_MUST_CHECK __attribute__((warn_unused_result))
#define CRPC_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define CRPC_MUST_CHECK
#define CRPC_PRINTF(fmt, args)
#endif

/* Initialises any crpc struct to "all defaults" in C and in C++: crpc_call call = CRPC_INIT; */
#ifdef __cplusplus
#define CRPC_INIT {}
#else
#define CRPC_INIT {0}
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Types of nanopb and of poll.h, declared here so that the interface includes neither header. */
struct pb_msgdesc_s;
struct pb_istream_s;
struct pb_ostream_s;
struct pb_field_iter_s;
struct pollfd;

/* ======================================================================== */
/* >>api-status   result codes, and everything known about a failed call    */
/* ======================================================================== */

/* Every function that can fail returns CRPC_OK or one of these codes. Their numbers are the same on
 * every architecture. A code that brpc has too keeps brpc's number, because it travels on the wire;
 * codes from 3100 on are crpc's own. Numbers never change, and new codes are added at the end. crpc
 * itself never sets ETOOMANYFAILS, EBACKUPREQUEST, EHTTP and EEOF: they come from peers and
 * handlers. */
#define CRPC_STATUS_MAP(X)                                                                         \
    X(OK, 0, "success")                                                                            \
    X(ENOSERVICE, 1001, "no such service")                                                         \
    X(ENOMETHOD, 1002, "no such method")                                                           \
    X(EREQUEST, 1003, "bad request")                                                               \
    X(EAUTH, 1004, "not authenticated")                                                            \
    X(ETOOMANYFAILS, 1005, "too many sub-calls failed")                                            \
    X(EBACKUPREQUEST, 1007, "backup request")                                                      \
    X(ETIMEDOUT, 1008, "deadline exceeded")                                                        \
    X(ECONN, 1009, "connection failed or lost")                                                    \
    X(EHTTP, 1010, "HTTP error")                                                                   \
    X(EOVERCROWDED, 1011, "too many bytes queued on the connection")                               \
    X(EEOF, 1014, "end of stream")                                                                 \
    X(EREJECT, 1018, "rejected by the client's own policy")                                        \
    X(EINTERNAL, 2001, "internal error of the server")                                             \
    X(ERESPONSE, 2002, "bad response")                                                             \
    X(ELOGOFF, 2003, "the server is stopping")                                                     \
    X(ELIMIT, 2004, "concurrency limit reached")                                                   \
    X(ECLOSE, 2005, "connection closed on purpose")                                                \
    X(EINVAL, 3101, "invalid argument")                                                            \
    X(ENOMEM, 3102, "out of memory")                                                               \
    X(EDEADLK, 3103, "would wait for itself: synchronous call inside a callback of its loop")      \
    X(EBUSY, 3104, "already in use")                                                               \
    X(ECANCELED, 3105, "canceled")                                                                 \
    X(EPENDING, 3106, "not finished yet")                                                          \
    X(ENOTFOUND, 3107, "no such id or name")                                                       \
    X(EGONE, 3108, "the peer is gone")                                                             \
    X(ESYSTEM, 3109, "a system call failed")                                                       \
    X(EADDRESS, 3110, "address in use or not available")                                           \
    X(ERESOLVE, 3111, "host name could not be resolved")                                           \
    X(ENOPROVIDER, 3112, "no provider is known for the service")                                   \
    X(EREGISTRY, 3113, "registry not reachable")                                                   \
    X(EUNSUPPORTED, 3114, "not compiled in or not supported")                                      \
    X(ECODEC, 3115, "message could not be encoded or decoded")                                     \
    X(EAPP, 3116, "the service answered with an error of its own: see app_code")                   \
    X(EABI, 3117, "nanopb or crpc was compiled with other options than this file sees")            \
    X(EEXISTS, 3130, "exists already")                                                             \
    X(EVERSION, 3131, "has another version")                                                       \
    X(ENOTEMPTY, 3132, "has children")

/* clang-format off */
typedef enum crpc_status {
#define CRPC_STATUS_ENUM_(name, number, text) CRPC_##name = number,
    CRPC_STATUS_MAP(CRPC_STATUS_ENUM_)
#undef CRPC_STATUS_ENUM_
    CRPC_STATUS_LAST_ = 3132
} crpc_status;
/* clang-format on */

/* The name of a code, such as "ETIMEDOUT"; "E?" for a number that is none of crpc's. The text is
 * static. Any thread. */
CRPC_API const char *crpc_status_name(int status);

/* A phrase that explains a code, such as "deadline exceeded"; "unknown error" for a number that is
 * none of crpc's. With CRPC_ENABLE_TEXTS=0 it is the code's name. The text is static. Any
 * thread. */
CRPC_API const char *crpc_status_text(int status);

/* How much of a failed request can have reached a peer. */
typedef enum crpc_sent {
    CRPC_SENT_NO = 0,    /* not a byte left this process: the call was certainly not executed */
    CRPC_SENT_MAYBE = 1, /* a part of it was handed to the kernel */
    CRPC_SENT_YES = 2    /* all of it was handed to the kernel: it may have been executed */
} crpc_sent;

/* Sizes of the texts in a crpc_error, their terminating zeros included. */
#define CRPC_ERROR_TEXT_MAX 256
#define CRPC_ADDRESS_MAX 112

/* How a call or an opening ended. A function that takes a crpc_error fills it when it fails; the
 * caller owns it. */
typedef struct crpc_error {
    int code;       /* a crpc_status; CRPC_EAPP if the service answered with a code of its own */
    int app_code;   /* the service's own code, 0 if there is none */
    crpc_sent sent; /* the most that an attempt sent; attempts that a stopping server refused do not
                       count */
    bool remote;    /* true: the peer reported the error; false: this process found it */
    int attempts;   /* how many attempts were made, the first one included */
    char endpoint[CRPC_ADDRESS_MAX]; /* the provider of the last attempt, "" if there was none */
    char text[CRPC_ERROR_TEXT_MAX];  /* what failed, on which object, the cause. Of a call:
                                        service.method, attempt, address, cause, side. Cut to fit,
                                        always terminated */
} crpc_error;

/* ======================================================================== */
/* >>api-version   what was compiled                                        */
/* ======================================================================== */

/* The version of the implementation that was linked, such as "0.2.0". If it differs from
 * CRPC_VERSION, the program was compiled with another crpc.h. Any thread. */
CRPC_API const char *crpc_version(void);

/* The ZooKeeper client that was compiled in: "mt" (libzookeeper_mt), "st" (libzookeeper_st) or
 * "none". Any thread. */
CRPC_API const char *crpc_zookeeper_driver(void);

/* ======================================================================== */
/* >>api-view   bytes that somebody else owns, and unbounded protobuf fields */
/* ======================================================================== */

/* A run of bytes that somebody else owns. A string or bytes field of a nanopb message that has this
 * type has no limit of length (manual, MESSAGES). Use the functions below rather than the members,
 * whose shape only makes nanopb's initialiser `{{NULL}, NULL}` valid. A zeroed view is unset. */
typedef struct crpc_view {
    const void *at[1];
    const void *end;
} crpc_view;

/* The same for a repeated string or bytes field. To send it, make it of an array of crpc_view
 * (crpc_views_of). Walk a received one with crpc_views_next: its elements lie scattered in the
 * frame. */
typedef struct crpc_views {
    const void *at[3];
    const void *end;
} crpc_views;

/* A view of `size` bytes at `data`. With data NULL it is unset. */
static inline crpc_view crpc_view_of(const void *data, size_t size)
{
    crpc_view v;
    v.at[0] = data;
    v.end = data ? (const char *)data + size : NULL;
    return v;
}

/* Where the bytes of a view begin. No zero terminates them. NULL if the view is unset. */
static inline const char *crpc_view_data(crpc_view v)
{
    return (const char *)v.at[0];
}

/* The number of bytes in a view; 0 if it is unset. */
static inline size_t crpc_view_size(crpc_view v)
{
    return v.at[0] ? (size_t)((const char *)v.end - (const char *)v.at[0]) : 0;
}

/* A view of a zero-terminated string, without the zero. With text NULL it is unset. */
CRPC_API crpc_view crpc_view_str(const char *text);

/* Whether the bytes of a view are those of a zero-terminated string. An unset view equals "". */
CRPC_API bool crpc_view_equal(crpc_view v, const char *text);

/* Copies a view into a char array of out_size bytes, cut to fit and terminated by a zero; writes
 * nothing if out_size is 0. Returns the size of the whole view: the copy is complete if that is
 * less than out_size. */
CRPC_API size_t crpc_view_copy(crpc_view v, char *out, size_t out_size);

/* `count` views, to be sent as a repeated field. The array is not copied: it must stay until the
 * call function returns or, in a response, until the reply is finished. */
CRPC_API crpc_views crpc_views_of(const crpc_view *items, size_t count);

/* Writes the next element of a repeated field, received or to be sent, to *item. Begin with *cursor
 * NULL. Returns false after the last element. */
CRPC_API bool crpc_views_next(const crpc_views *views, const void **cursor, crpc_view *item);

/* The nanopb callback for messages that have views: name it in (nanopb_msgopt).callback_function.
 * It encodes the bytes of views. In decoding it points views into the input, which must be a buffer
 * stream. It refuses fields that are not strings or bytes, and fields of a oneof. For nanopb to
 * call, not for programs. */
CRPC_API bool crpc_view_field(struct pb_istream_s *in, struct pb_ostream_s *out,
                              const struct pb_field_iter_s *field);

/* Decodes a message that has views, outside a call. The views point into `bytes`, which must stay
 * as long as they are used. If the type has views, the struct is cleared first. CRPC_ECODEC: the
 * bytes are not such a message. Any thread. (nanopb's pb_encode encodes messages with views; its
 * pb_decode refuses them, because its streams do not tell where the bytes are.) */
CRPC_API CRPC_MUST_CHECK int crpc_message_decode(const void *bytes, size_t size,
                                                 const struct pb_msgdesc_s *desc, void *message,
                                                 size_t message_size);

/* A user_fields entry: text that travels in the meta beside a request or a reply. Both texts are
 * borrowed and terminated by a zero. */
typedef struct crpc_field {
    const char *key;
    const char *value;
} crpc_field;

/* ======================================================================== */
/* >>api-hooks   allocator, log, clock, resolver                            */
/* ======================================================================== */

/* The levels of log lines: crpc_hooks.log_level and the log hook. */
typedef enum crpc_log_level {
    CRPC_LOG_ERROR = 1, /* something failed that crpc does not mend by itself */
    CRPC_LOG_WARN = 2,  /* something failed, and crpc goes on without it or tries again */
    CRPC_LOG_INFO = 3,
    CRPC_LOG_DEBUG = 4
} crpc_log_level;

/* What crpc takes from the system, to be replaced by the program. Hooks are set in
 * crpc_loop_options; everything that is made on the loop uses them. A member that is NULL or 0 has
 * its default. Every thread that uses the loop may call a hook, several threads at once, with or
 * without crpc's locks held: a hook must not call crpc. */
typedef struct crpc_hooks {
    void *user; /* the first argument of every hook. It must outlive the loop */
    /* Allocates (old_size 0), resizes as realloc does, or frees (new_size 0, returns NULL). Memory
     * must be aligned for any type. NULL: out of memory. Default: CRPC_REALLOC and CRPC_FREE. */
    void *(*resize)(void *user, void *ptr, size_t old_size, size_t new_size);
    /* Takes one log line of a crpc_log_level, without a newline. Default: writes it to stderr. */
    void (*log)(void *user, int level, const char *line);
    /* Returns a time in microseconds that never goes back. Default: CLOCK_MONOTONIC. */
    int64_t (*clock_us)(void *user);
    /* Resolves a host name: writes its numeric addresses as text, separated by commas, and returns
     * CRPC_OK or another crpc_status. Called only from crpc_channel_open, crpc_registry_open,
     * crpc_server_open, _listen and _start, on the calling thread. Default: getaddrinfo, which
     * blocks. */
    int (*resolve)(void *user, const char *host, char *addresses, size_t size);
    int log_level; /* lines of a higher level are dropped. 0: CRPC_LOG_WARN. -1: all are dropped */
} crpc_hooks;

/* ======================================================================== */
/* >>api-loop   the reactor: who drives it, file descriptors, timers        */
/* ======================================================================== */

/* A reactor: it waits for sockets and timers and runs what is due (manual, LOOPS AND THREADS). */
typedef struct crpc_loop crpc_loop;

/* Names something that a loop keeps: a watch, a timer, a call. While the loop lives no id is used
 * again, so a stale id is safe: it names nothing. Ids of one loop mean nothing to another. The
 * value 0 names nothing. */
typedef struct crpc_id {
    uint64_t value;
} crpc_id;

/* How a loop waits for descriptors. */
typedef enum crpc_poller {
    CRPC_POLLER_DEFAULT = 0, /* epoll; poll if epoll is not compiled in, or the kernel refuses it */
    CRPC_POLLER_EPOLL = 1,
    CRPC_POLLER_POLL = 2
} crpc_poller;

/* Options of a loop. Copied when the loop is opened; the hooks' user pointer is borrowed. */
typedef struct crpc_loop_options {
    crpc_poller poller; /* 0: CRPC_POLLER_DEFAULT. -1: as 0 */
    crpc_hooks hooks;   /* 0 in a member: its default */
    /* 1: crpc starts no thread for this loop; an asynchronous call fails with CRPC_EINVAL while
     * nobody drives it. 0: such a call starts the loop's own thread. -1: as 0 */
    int forbid_threads;
    const char *thread_name; /* of the loop's own thread, cut to 15 characters. NULL: "crpc" */
    int stack_size;  /* bytes, of the loop's own thread. 0: 256 KiB. -1: the system's default */
    int max_results; /* calls that were begun by id and not fetched yet. 0: 1024. -1: no limit */
    /* Bytes of buffers in use, of all connections of the loop together; each I/O thread of a server
     * has its own. Free buffers that are kept for reuse come on top. 0: 256 MiB. -1: no limit */
    int64_t max_bytes;
} crpc_loop_options;

/* Counters of a loop since it was opened, and its present size. */
typedef struct crpc_loop_stats {
    const char *poller;    /* "epoll" or "poll": the one in use */
    uint64_t waits;        /* calls of epoll_wait or poll */
    uint64_t sends;        /* system calls that send */
    uint64_t receives;     /* system calls that receive */
    uint64_t wakeups;      /* times another thread woke the loop */
    uint64_t promotions;   /* times a thread that waited in a call took over driving */
    uint64_t late_replies; /* replies to no pending call: late, duplicate or forged */
    uint64_t bad_frames;   /* connections closed because of what the peer sent */
    uint64_t calls;        /* calls begun */
    uint64_t requests;     /* requests received */
    uint64_t limited;      /* requests refused with CRPC_ELIMIT before they were served */
    uint64_t refused;      /* connections that a server refused: access.allow, max_connections */
    uint64_t evicted;      /* connections of a server closed in favour of other hosts */
    uint64_t timeouts;     /* connections closed for idle_timeout_ms, frame_timeout_ms and
                              first_request_ms */
    uint64_t replayed;     /* by crpc_server_stats_get: requests answered with a kept reply */
    uint32_t connections;  /* open now, those of clients and of servers */
    uint32_t pending;      /* calls that have not ended, or were not fetched yet */
    uint32_t watches;      /* descriptors watched now, crpc's own included */
    uint64_t memory;       /* bytes held now */
    uint64_t memory_peak;  /* the most bytes ever held */
} crpc_loop_stats;

/* Makes a loop; the caller owns it and closes it with crpc_loop_close. NULL options mean the
 * defaults. CRPC_EABI: nanopb was compiled with other options than this file sees. CRPC_EINVAL: an
 * option is out of range. CRPC_EUNSUPPORTED: the poller is not compiled in. CRPC_ESYSTEM: the
 * kernel refused a poller or a wake-up descriptor. CRPC_ENOMEM. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_loop_open(crpc_loop **loop, const crpc_loop_options *options);

/* Stops and frees a loop: makes the thread that runs it return, joins the loop's own thread, and
 * runs callbacks that are still due. Channels, servers and registries on the loop must have been
 * closed before. Inside a callback of the loop this takes effect when the callback has returned.
 * NULL is ignored. */
CRPC_API void crpc_loop_close(crpc_loop *loop);

/* Drives the loop on this thread until crpc_loop_stop is called. CRPC_EBUSY: another thread runs or
 * steps it. CRPC_EDEADLK: called inside a callback of the loop. */
CRPC_API CRPC_MUST_CHECK int crpc_loop_run(crpc_loop *loop);

/* Drives the loop once: waits at most timeout_ms milliseconds (0: not at all; -1: until something
 * happens), handles what is ready and runs callbacks. CRPC_OK also if nothing happened. CRPC_EBUSY
 * and CRPC_EDEADLK as crpc_loop_run. From the first step on, calls start no thread for this loop:
 * the program must go on stepping it. */
CRPC_API CRPC_MUST_CHECK int crpc_loop_step(crpc_loop *loop, int timeout_ms);

/* Starts a thread that drives the loop until crpc_loop_stop or crpc_loop_close. All signals are
 * blocked in it. CRPC_EBUSY: the loop is driven already. CRPC_ESYSTEM or CRPC_ENOMEM: the thread
 * could not be made. CRPC_EUNSUPPORTED: CRPC_ENABLE_THREADS is 0. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_loop_start(crpc_loop *loop);

/* Makes crpc_loop_run, or the loop's own thread, return soon; does not wait for it. If nobody
 * drives the loop, the next crpc_loop_run returns at once, but crpc_loop_start forgets the request.
 * Any thread; also a signal handler. */
CRPC_API void crpc_loop_stop(crpc_loop *loop);

/* A descriptor that becomes readable when crpc_loop_step(loop, 0) has something to do, for the
 * program's own poll set; timers come beside it, by crpc_loop_timeout. -1 with the poll poller: use
 * crpc_loop_pollfds. The loop owns the descriptor. Any thread. */
CRPC_API int crpc_loop_fd(crpc_loop *loop);

/* Fills up to `max` entries with what the loop waits for, and returns how many there are, which may
 * be more than `max`. Ask again before every wait. Works with both pollers; with epoll there is one
 * entry. Any thread. */
CRPC_API size_t crpc_loop_pollfds(crpc_loop *loop, struct pollfd *fds, size_t max);

/* How many milliseconds the program may wait before it calls crpc_loop_step. 0: call it now. -1: no
 * limit. Ask again before every wait. */
CRPC_API int crpc_loop_timeout(crpc_loop *loop);

/* Runs fn(user) once, on the thread that drives the loop. On the thread of the loop it runs after
 * this function has returned. CRPC_ENOMEM, or CRPC_EINVAL (fn is NULL): it will not run. Any
 * thread. */
CRPC_API CRPC_MUST_CHECK int crpc_loop_post(crpc_loop *loop, void (*fn)(void *user), void *user);

/* What a watch waits for and what its callback is told, combined with |. */
#define CRPC_READABLE 1u /* data, a connection, end of file or an error can be read */
#define CRPC_WRITABLE 2u /* the descriptor can be written, or has failed */

/* Runs on the thread that drives the loop; `events` are those that are ready. */
typedef void (*crpc_watch_fn)(void *user, int fd, unsigned events);

/* Calls fn whenever fd is ready for one of `events`, again and again while it stays ready
 * (level-triggered). The program owns the descriptor, and must unwatch it before it closes it.
 * CRPC_EBUSY: the descriptor is watched already. CRPC_EINVAL: it is negative, fn is NULL, or
 * `events` has other bits. CRPC_ESYSTEM: epoll refuses it, as it does regular files. CRPC_ENOMEM.
 * Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_loop_watch(crpc_loop *loop, int fd, unsigned events,
                                             crpc_watch_fn fn, void *user, crpc_id *id);

/* Changes what is watched for; 0 pauses the watch. CRPC_ENOTFOUND: no watch has this id.
 * CRPC_EINVAL: `events` has other bits. CRPC_ENOMEM, CRPC_ESYSTEM. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_loop_rewatch(crpc_loop *loop, crpc_id id, unsigned events);

/* Ends a watch. A stale id is ignored. After a call from one of the loop's callbacks fn does not
 * run again; after a call from another thread fn may still be running. Any thread. */
CRPC_API void crpc_loop_unwatch(crpc_loop *loop, crpc_id id);

/* Runs on the thread that drives the loop. */
typedef void (*crpc_timer_fn)(void *user);

/* Calls fn delay_ms milliseconds from now, never earlier, and then every period_ms (0: once). `id`
 * may be NULL; then only closing the loop stops the timer. CRPC_EINVAL: fn is NULL, or a time is
 * negative or over 100 years. CRPC_ENOMEM. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_timer_start(crpc_loop *loop, int64_t delay_ms, int64_t period_ms,
                                              crpc_timer_fn fn, void *user, crpc_id *id);

/* Stops a timer. A stale id is ignored. fn may still be running, as with crpc_loop_unwatch. Any
 * thread. */
CRPC_API void crpc_timer_stop(crpc_loop *loop, crpc_id id);

/* The time by the loop's clock in microseconds, which crpc_call.deadline_us refers to. Any
 * thread. */
CRPC_API int64_t crpc_loop_now_us(const crpc_loop *loop);

/* Copies the loop's counters. Any thread. */
CRPC_API void crpc_loop_stats_get(crpc_loop *loop, crpc_loop_stats *stats);

/* ======================================================================== */
/* >>api-service   tables that describe services; written by protoc-gen-crpc */
/* ======================================================================== */

/* One request that a server is serving. */
typedef struct crpc_context crpc_context;

/* Calls the handler of one method, which it picks from `handlers`, with the method's own types.
 * Returns what the handler returns. Generated code has one for each method. */
typedef int (*crpc_serve_fn)(crpc_context *context, const void *request, void *response,
                             const void *handlers);

/* Flag of a method: executing it twice does no harm, so calls may be retried after they were
 * sent. */
#define CRPC_METHOD_IDEMPOTENT 1u

/* Describes one method. A table is never copied: all its pointers must outlive every channel and
 * server that uses it. */
typedef struct crpc_method {
    const char *service;                /* full name with package: "demo.UserService" */
    const char *name;                   /* "Login" */
    const struct pb_msgdesc_s *request; /* nanopb's: demo_LoginRequest_fields */
    const struct pb_msgdesc_s *response;
    size_t request_size; /* sizeof of the structs */
    size_t response_size;
    crpc_serve_fn serve; /* NULL in a table for clients only: servers answer CRPC_ENOMETHOD */
    unsigned flags;      /* CRPC_METHOD_* */
    int timeout_ms; /* deadline of calls if no policy sets one (crpc_policy). 0: 1000. -1: as 0 */
} crpc_method;

/* Describes a service, for crpc_server_add. Lives as long as crpc_method. */
typedef struct crpc_service {
    const char *name; /* full name with package */
    const crpc_method *methods;
    size_t method_count;
} crpc_service;

/* ======================================================================== */
/* >>api-options   groups of options that channels and servers share        */
/* ======================================================================== */

/* In every integer option 0 means the default, and -1 means what the comment says; a value below -1
 * counts as -1. A value out of range fails the opening with CRPC_EINVAL. In URLs and in
 * configuration lines (crpc_channel_options_parse) an option's key is the name of its member,
 * unless its comment gives another key. The manual lists all keys and ranges (OPTIONS). */

/* How a registry is used: by a channel to look up providers, by a server to register its services.
 * Texts are copied. */
typedef struct crpc_directory_options {
    const char *group;   /* Dubbo's group; of a channel also "*" or a list "a,b". NULL: none */
    const char *version; /* Dubbo's version, likewise. NULL: none */
    const char *application; /* name of this program, for people who inspect the registry. NULL:
                                "crpc" */
    const char *credential;  /* key "registry_credential". ZooKeeper digest "user:password". NULL:
                                none */
    int timeout_ms; /* key "registry_timeout_ms". How long opening a channel, or starting a server,
                       waits for the registry. 0: 3000. -1: not at all */
    int session_timeout_ms; /* of the ZooKeeper session: how long a process that died stays
                               registered. 0: 15000. -1: as 0 */
    int must_connect; /* 1: a registry that does not answer in timeout_ms is an error. 0: crpc goes
                         on trying. -1: as 0 */
    /* --- of a channel only ---------------------------------------------- */
    int allow_empty;  /* 1: an empty list from the registry counts, and calls fail with
                         CRPC_ENOPROVIDER. 0: the last non-empty list stays in use. -1: as 0 */
    int stale_ttl_ms; /* how long the registry may fail to confirm a list. After that a provider of
                         it that cannot be reached is dialled only once a minute. 0: 600000. -1: it
                         is dialled as any other */
    const char *cache; /* file in which the registry's last non-empty lists are kept, so that this
                          program can start while the registry is away. No other process may use
                          it. NULL: none */
} crpc_directory_options;

/* How much a peer can make this process hold. */
typedef struct crpc_limits {
    int64_t max_body;   /* bytes of a received message and attachment. 0: 64 MiB. -1: 2 GiB - 1 */
    int64_t max_queued; /* unsent bytes on a connection. Beyond them a channel's call fails with
                           CRPC_EOVERCROWDED, and a server stops reading. 0: 16 MiB, of a server
                           4 MiB. -1: no limit */
} crpc_limits;

/* How requests are written for peers that are not crpc. */
typedef struct crpc_wire_options {
    int inflight;    /* calls at a time on one connection. 0: no limit. -1: no limit */
    int short_names; /* 1: send "Service" instead of "package.Service". 0: full names. -1: as 0 */
} crpc_wire_options;

/* How this process authenticates itself. Secrets belong in options and configuration lines. crpc
 * refuses a URL with a secret, because it logs URLs. */
typedef struct crpc_security_options {
    const char *credential; /* sent with every request. NULL: none */
} crpc_security_options;

/* Who may connect to a server, and how much each may take. */
typedef struct crpc_access_options {
    const char *allow; /* networks whose connections are accepted, as "10.0.0.0/8,fd00::/8,unix";
                          others are closed at once. NULL: all */
    const char *peers; /* weights of hosts and networks that stand for many clients, such as
                          gateways: "10.0.0.7:16,10.1.0.0/16:4". The most specific entry counts.
                          NULL: each host has weight 1 */
} crpc_access_options;

/* ======================================================================== */
/* >>api-channel   the client: calls                                        */
/* ======================================================================== */

/* Calls the providers of one service. */
typedef struct crpc_channel crpc_channel;
typedef struct crpc_call crpc_call;

/* How a channel chooses a provider for each attempt, among those that can be used. No balancer
 * fails while one of them can. */
typedef enum crpc_balancer {
    CRPC_BALANCER_DEFAULT = 0,              /* CRPC_BALANCER_WEIGHTED_ROUND_ROBIN */
    CRPC_BALANCER_RANDOM = 1,               /* lb=random: each is equally likely */
    CRPC_BALANCER_WEIGHTED_RANDOM = 2,      /* lb=wrandom: likely in proportion to its weight */
    CRPC_BALANCER_ROUND_ROBIN = 3,          /* lb=rr: one after another */
    CRPC_BALANCER_WEIGHTED_ROUND_ROBIN = 4, /* lb=wrr: in turn by weight, evenly spread */
    CRPC_BALANCER_LEAST_ACTIVE = 5,         /* lb=la: the fewest calls of this channel in flight */
    CRPC_BALANCER_CONSISTENT_HASH = 6,      /* lb=hash: equal keys, equal provider; see key and
                                               hash_field */
    CRPC_BALANCER_P2C = 7 /* lb=p2c: of two at random the one with less latency times calls */
} crpc_balancer;

/* How many providers a call goes to, and what its failure leads to. These are Dubbo's cluster
 * modes. */
typedef enum crpc_cluster {
    CRPC_CLUSTER_DEFAULT = 0,  /* CRPC_CLUSTER_FAILOVER */
    CRPC_CLUSTER_FAILOVER = 1, /* cluster=failover: up to `retries` more attempts, on other
                                  providers */
    CRPC_CLUSTER_FAILFAST = 2, /* cluster=failfast: one attempt */
    CRPC_CLUSTER_FAILSAFE = 3, /* cluster=failsafe: one attempt; a failure, except an application's
                                  error, is logged, and the call succeeds with an empty response */
    CRPC_CLUSTER_FAILBACK = 4, /* cluster=failback: as failsafe, and crpc sends the request again in
                                  the background, up to `retries` times (see failback_ms) */
    CRPC_CLUSTER_FORKING = 5,  /* cluster=forking: `forks` providers at once; the first success is
                                  the result, and the other attempts are cancelled */
    CRPC_CLUSTER_BROADCAST = 6 /* cluster=broadcast: every provider; the call fails if more than
                                  fail_percent of them fail */
} crpc_cluster;

/* How a call is made. Of each member the most specific setting wins: the call's, then the method's
 * (crpc_method_options), then the channel's URL, then the channel's options. Retries and backup
 * requests never execute a request twice, unless its method is idempotent (manual, Delivery).
 * FAILBACK, FORKING and BROADCAST can execute it several times; a program that chooses them takes
 * the responsibility. */
typedef struct crpc_policy {
    crpc_cluster cluster; /* 0: CRPC_CLUSTER_FAILOVER. -1: as 0 */
    int timeout_ms;   /* of the whole call, all attempts together. 0: the .proto's, else 1000.
                         -1: 86400000, 24 hours; in the policy of a method or a call: as 0 */
    int retries;      /* further attempts, at most 16. 0: 2. -1: none */
    int backup_ms;    /* an idempotent call that has no reply after this time is sent to one more
                         provider; the first reply is used. 0: never. -1: never */
    int forks;        /* providers that a forking call goes to. 0: 2. -1: all */
    int fail_percent; /* share of a broadcast's providers that may fail. 0: none. -1: none */
} crpc_policy;

/* All about one call beside its messages. The caller owns it: initialise it with CRPC_INIT before
 * its first use, and call crpc_call_reset after its last. It serves one call after another, but one
 * call at a time. Every call function takes one as its last parameter; NULL means the defaults, and
 * that the caller wants nothing but the response.
 *
 * The inputs are borrowed until the call function returns. Asynchronous functions only read a
 * crpc_call; the results come in the crpc_call of the callback, or of crpc_channel_fetch. */
struct crpc_call {
    /* --- in ------------------------------------------------------------- */
    crpc_policy policy;  /* 0 in a member: the method's or the channel's setting */
    int64_t deadline_us; /* in the time of crpc_loop_now_us, instead of policy.timeout_ms. 0: unset.
                            -1: as 0 */
    int64_t log_id;      /* travels in the meta; servers may log it. 0: the parent's, else none. -1:
                            sent like any other number */
    const crpc_field *fields; /* user_fields to send */
    size_t field_count;
    crpc_view credential;       /* authentication_data. Unset: the channel's */
    crpc_view attachment;       /* raw bytes to send behind the message */
    const crpc_context *parent; /* the request for which this call is made: the call inherits its
                                   deadline, log id and trace ids. NULL: none */
    crpc_view key;              /* for lb=hash. Unset: the value of the hash_field */
    /* Id of the request, at most 64 bytes, for servers that keep replies
     * (crpc_server_options.replay_entries): of several requests with one id they execute one.
     * Unset: none, unless request_ids makes one */
    crpc_view request_id;
    crpc_view order_key; /* servers execute requests of one key one after another. Unset: none */
    /* --- out ------------------------------------------------------------ */
    crpc_error error;           /* how the call ended; error.code is what the function returned */
    crpc_view reply_attachment; /* raw bytes behind the reply; valid until crpc_call_reset */
    int64_t latency_us;         /* from the begin of the call function to the arrival of the reply.
                                   Of a call begun in a callback up to some milliseconds more, the
                                   time that earlier callbacks of the step took */
    /* --- private -------------------------------------------------------- */
    void *reserved[7];
};

#if CRPC_ENABLE_CLIENT

/* Frees what a finished call holds: views of the response and reply_attachment become invalid. The
 * inputs stay. A call function does this first with the crpc_call it is given. Not while a call
 * uses it. */
CRPC_API void crpc_call_reset(crpc_call *call);

/* Adds a user_fields entry to the request; copies both texts. For the `before` function of an
 * interceptor only: CRPC_EINVAL elsewhere, and for a NULL text. CRPC_ENOMEM. */
CRPC_API CRPC_MUST_CHECK int crpc_call_add_field(crpc_call *call, const char *key,
                                                 const char *value);

/* Finds a user_fields entry of the reply, and writes its value, which is valid until
 * crpc_call_reset. False: there is no such entry. */
CRPC_API bool crpc_call_field(const crpc_call *call, const char *key, crpc_view *value);

#endif /* CRPC_ENABLE_CLIENT */

/* Sees every call of a channel. Either function may be NULL. Several threads may run them at
 * once. */
typedef struct crpc_client_interceptor {
    /* Runs before the request is encoded, on the caller's thread, in the order of the array. It may
     * change the call's inputs and add fields. A result other than CRPC_OK ends the call with that
     * status: later interceptors do not see the call, earlier ones' `after` run. */
    int (*before)(void *user, const crpc_method *method, crpc_call *call);
    /* Runs when the result is known, in the opposite order, on the thread that gets the result. It
     * does not run for one-way calls, nor for ids that are cancelled, never fetched, or dropped
     * with the channel. */
    void (*after)(void *user, const crpc_method *method, crpc_call *call, int status);
    void *user; /* first argument of both */
} crpc_client_interceptor;

/* Options of one method of a channel. Borrowed while the channel lives. */
typedef struct crpc_method_options {
    const crpc_method *method; /* as generated: demo_UserService_Login_method */
    crpc_policy policy;        /* 0 in a member: the channel's setting */
    int hash_field; /* number of the request's field that is the key for lb=hash. 0: the channel's.
                       -1: none */
    /* What stands for the reply when a call has failed, except with an application's error.
     * `fallback` fills the cleared response and returns CRPC_OK, or another status, which becomes
     * the call's. It runs on the thread that gets the result; what its views point to must outlive
     * the call. NULL: `canned` is used */
    int (*fallback)(void *user, const crpc_method *method, const crpc_error *error, void *response);
    void *user;       /* first argument of fallback */
    crpc_view canned; /* an encoded response, which must outlive the channel. Unset: none */
    int degraded; /* 1: fallback or canned is used at once, and no call is made. 0: only when a call
                     has failed. -1: as 0 */
} crpc_method_options;

/* The breaker takes a provider whose calls fail out of the choice for a time, then lets one call
 * probe it, then gives its share back step by step. Timeouts and lost connections count as
 * failures, and an application's errors as successes; CRPC_ELIMIT and cancelled calls count as
 * neither. The keys have "breaker_" in front of the member's name. */
typedef struct crpc_breaker_options {
    int enabled;       /* key "breaker". 1: use it. 0: no. -1: no */
    int percent;       /* share of failed calls at which it opens. 0: 50. -1: as 0 */
    int requests;      /* calls that must be seen in window_ms before it opens. 0: 20. -1: 1 */
    int window_ms;     /* over which calls are counted. 0: 10000. -1: as 0 */
    int slow_ms;       /* a reply slower than this counts as slow. 0: no reply does. -1: no reply
                          does */
    int slow_percent;  /* share of slow replies at which it opens. 0: 50. -1: as 0 */
    int open_ms;       /* how long it stays open first; doubled each time the provider fails soon
                          again. 0: 1000. -1: as 0 */
    int open_max_ms;   /* the most that doubling leads to. 0: 30000. -1: as 0 */
    int ramp_ms;       /* until the provider has its whole share again. 0: 5000. -1: at once */
    int eject_percent; /* share of the providers that may be out at a time. 0: 50. -1: 100 */
} crpc_breaker_options;

/* Options of a channel. Texts are copied; what is borrowed is marked. */
typedef struct crpc_channel_options {
    crpc_loop *loop; /* must outlive the channel. NULL: a private loop */
    crpc_loop_options private_loop; /* options of the private loop */
    crpc_policy policy;             /* of calls and methods that set nothing else */
    /* --- which provider ------------------------------------------------- */
    crpc_balancer balancer; /* key "lb". 0: CRPC_BALANCER_WEIGHTED_ROUND_ROBIN. -1: as 0 */
    int hash_field;         /* as in crpc_method_options. 0: none. -1: none */
    int max_endpoints;      /* how many providers of a longer list this channel uses; a hash chooses
                               them, differently for each channel. 0: all. -1: all */
    /* 1: a call made while no provider is known, or none can be reached, waits for one until its
     * deadline; a BROADCAST only for a list of providers. 0: it fails with CRPC_ENOPROVIDER or
     * CRPC_ECONN. -1: as 0 */
    int wait;
    int connect_timeout_ms; /* of one connection attempt. 0: 500. -1: only the call's deadline */
    /* Retries that the channel may make without a success in between. Each retry takes one from the
     * budget, each success gives a tenth back, so that a fleet that is down is not stormed. Retries
     * are free if the provider has replied over its present connection, after a stopping server's
     * refusal, and after a connection that had gone stale. 0: 10. -1: no limit */
    int retry_budget;
    /* 1: every call gets a request id. If the connection is lost, crpc sends the request to its
     * provider again, even if the method is not idempotent; use it only with servers that keep
     * replies (crpc_server_options.replay_entries). 0: no. -1: no */
    int request_ids;
    crpc_breaker_options breaker;
    /* --- groups that servers have too ----------------------------------- */
    crpc_directory_options directory; /* how providers are looked up in a registry */
    crpc_limits limits;               /* max_body: of a reply; max_queued: of unsent requests */
    crpc_wire_options wire;
    crpc_security_options security;
    /* --- failback ------------------------------------------------------- */
    int failback_ms;  /* from one background attempt of a failed call to the next. 0: 5000. -1: as
                         0 */
    int failback_max; /* failed calls that may wait at a time; further ones are dropped. 0: 100.
                         -1: none */
    /* Told of each waiting call that is dropped, on the thread that drives the loop. NULL: it is
     * logged */
    void (*failback_dropped)(void *user, const crpc_method *method, const crpc_error *error);
    void *failback_user; /* its first argument */
    /* --- borrowed while the channel lives ------------------------------- */
    const crpc_client_interceptor *interceptors;
    size_t interceptor_count;
    const crpc_method_options *methods;
    size_t method_count;
} crpc_channel_options;

#if CRPC_ENABLE_CLIENT

/* Reads options from the lines of a configuration file or an environment variable:
 *
 *     # of the whole fleet
 *     timeout_ms = 200
 *     lb = la
 *     registry_credential = user:password
 *
 * The keys are those of URLs, and those of crpc_channel_options and its private_loop (manual,
 * OPTIONS); secrets are allowed. A key may stand once. Blank lines and lines that begin with # are
 * skipped. Options that no line names stay as they are.
 *
 * `text` is cut in place, and options that are text point into it, so it must stay until the
 * channel is open. CRPC_EINVAL: a line is wrong; CRPC_EUNSUPPORTED: its option is not compiled in.
 * `error` (may be NULL) names the line and what is wrong, and some options may have been set. Any
 * thread. */
CRPC_API CRPC_MUST_CHECK int crpc_channel_options_parse(char *text, crpc_channel_options *options,
                                                        crpc_error *error);

/* Opens a channel to a service. NULL options mean the defaults. The URL is one of
 *
 *   tcp://host:port        list://host:port,host:port
 *   unix:///path           unix://@name (Linux's abstract namespace)
 *   zookeeper://host:port,host:port/root/package.Service
 *   multicast://224.5.6.7:port/package.Service    file:///path
 *
 * It may end in ?key=value&key=value, which override `options`. The keys are those of
 * crpc_channel_options except secrets, with these rules: lb and cluster take the words beside
 * crpc_balancer and crpc_cluster; cache needs zookeeper://. Further keys are interface (a name or
 * an address) with multicast://, service with file://, and protocol, which can be baidu_std. IPv6
 * addresses stand in brackets and have no scope.
 *
 * Host names are resolved here, on this thread, and stand for all their addresses. Connections are
 * made when calls need them. With a registry this function waits up to directory.timeout_ms for the
 * first list. `error` (may be NULL) says what failed. CRPC_EINVAL: the URL or an option is
 * malformed, unknown, given twice or out of range. CRPC_EUNSUPPORTED: the scheme or an option is
 * not compiled in. CRPC_ERESOLVE: no address for a host name. CRPC_EADDRESS: the multicast group or
 * interface cannot be used. CRPC_EREGISTRY: the registry did not answer in time, and must_connect
 * is 1. CRPC_EDEADLK: called inside a callback of the loop, where it would have to wait.
 * CRPC_ENOMEM, and the errors of crpc_loop_open. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_channel_open(crpc_channel **channel, const char *url,
                                               const crpc_channel_options *options,
                                               crpc_error *error);

/* Closes a channel. Pending calls end with CRPC_ECANCELED; their callbacks run on the loop's
 * thread, with a private loop before this function returns, unless a callback of that loop calls
 * it. Any thread, any callback. The last user of a loop's ZooKeeper session can wait up to 4.5 s
 * here if the ZooKeeper server is frozen. NULL is ignored. */
CRPC_API void crpc_channel_close(crpc_channel *channel);

/* The loop that the channel works on. The channel owns it if it is private. Any thread. */
CRPC_API crpc_loop *crpc_channel_loop(crpc_channel *channel);

/* How many providers the channel knows now, usable or not. Any thread. */
CRPC_API size_t crpc_channel_providers(crpc_channel *channel);

/* Calls and waits for the result. `response` is a zeroed or initialised struct of the method's
 * type; its contents are undefined after an error. If its type has views, `call` must not be NULL
 * (CRPC_EINVAL), and the views are valid until crpc_call_reset. Any thread, except that inside a
 * callback of the channel's loop it returns CRPC_EDEADLK.
 *
 * Found by this process: CRPC_ETIMEDOUT (the deadline passed), CRPC_ECONN (no provider could be
 * reached, or the connection was lost), CRPC_ENOPROVIDER (no provider is known), CRPC_EOVERCROWDED
 * (over max_queued), CRPC_ECODEC (the request cannot be encoded), CRPC_EINVAL (over 2 GiB),
 * CRPC_ERESPONSE (the reply is malformed or over max_body), CRPC_EREJECT (the method's options say
 * degraded), CRPC_ECANCELED (another thread closed the channel), CRPC_ENOMEM, and what an
 * interceptor returned. Reported by the server, with call->error.remote set: CRPC_EAPP (see
 * app_code), CRPC_ENOSERVICE, CRPC_ENOMETHOD, CRPC_EREQUEST, CRPC_EAUTH, CRPC_ELIMIT, CRPC_ELOGOFF,
 * CRPC_EINTERNAL and any other code. */
CRPC_API CRPC_MUST_CHECK int crpc_channel_call(crpc_channel *channel, const crpc_method *method,
                                               const void *request, void *response,
                                               crpc_call *call);

#endif /* CRPC_ENABLE_CLIENT */

/* A function whose real type its receiver knows. */
typedef void (*crpc_any_fn)(void);

/* The end of an asynchronous call, as its callback sees it. Everything in it is valid until the
 * callback returns. */
typedef struct crpc_done {
    int status;           /* CRPC_OK, or a code as crpc_channel_call returns it */
    const void *response; /* the method's response struct; NULL unless status is CRPC_OK */
    crpc_call *call;      /* its outputs: error, reply attachment, fields, latency */
    void *user;           /* as given to crpc_channel_call_async */
    crpc_any_fn fn;       /* likewise */
} crpc_done;

/* Runs on the thread that drives the loop. */
typedef void (*crpc_done_fn)(const crpc_done *done);

#if CRPC_ENABLE_CLIENT

/* Begins a call and returns at once. If it returns CRPC_OK, deliver(done) runs exactly once, on the
 * thread that drives the loop; otherwise never. `fn` and `user` are handed through: generated code
 * puts the caller's typed callback there. If nobody drives the loop, crpc starts the loop's own
 * thread. CRPC_EINVAL: `deliver` is NULL, the request is over 2 GiB, or the loop needs a thread and
 * forbid_threads is set. CRPC_ECODEC: the request cannot be encoded. CRPC_ECANCELED: the channel is
 * closed. CRPC_ESYSTEM: the thread could not be started. CRPC_ENOMEM, and what an interceptor
 * returned. Any thread, any callback. */
CRPC_API CRPC_MUST_CHECK int crpc_channel_call_async(crpc_channel *channel,
                                                     const crpc_method *method, const void *request,
                                                     crpc_done_fn deliver, crpc_any_fn fn,
                                                     void *user, const crpc_call *call);

/* Begins a call and returns at once with an id, which belongs to this channel and is used to wait
 * for and fetch the result. Every id must be fetched or cancelled; closing the channel drops the
 * rest. Errors as crpc_channel_call_async, and CRPC_ELIMIT: max_results calls were not fetched yet.
 * If nobody drives the loop, crpc starts the loop's own thread; with forbid_threads
 * crpc_channel_wait drives the loop instead. Any thread, any callback. */
CRPC_API CRPC_MUST_CHECK int crpc_channel_begin(crpc_channel *channel, const crpc_method *method,
                                                const void *request, crpc_id *id,
                                                const crpc_call *call);

/* Tells whether a call by id has ended, without waiting and without driving the loop. CRPC_OK: it
 * has; fetch it. CRPC_EPENDING: not yet. CRPC_ENOTFOUND: the id was fetched, cancelled or never
 * begun. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_channel_poll(crpc_channel *channel, crpc_id id);

/* Waits up to timeout_ms (0: not at all; -1: until the call's deadline) for a call by id to end.
 * Results as crpc_channel_poll, and CRPC_EBUSY: another thread waits for it; CRPC_EDEADLK: called
 * inside a callback of the loop; CRPC_ECANCELED: the channel was closed meanwhile. If nobody drives
 * the loop, this thread drives it and runs callbacks. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_channel_wait(crpc_channel *channel, crpc_id id, int timeout_ms);

/* Takes the result of a call by id: returns how the call ended, and fills `response` on success.
 * The bytes behind views and attachment move into `call`. `method` must be the one that was begun.
 *
 * CRPC_EPENDING (not ended yet), CRPC_ENOTFOUND (no such id), and CRPC_EINVAL (the response has
 * views and `call` is NULL, or the id is of another method) concern the fetching, unless
 * call->error.remote is set: then they are the call's result. After any result but CRPC_EPENDING
 * and CRPC_EINVAL the id is spent. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_channel_fetch(crpc_channel *channel, const crpc_method *method,
                                                crpc_id id, void *response, crpc_call *call);

/* Ends a call by id and forgets it. A request that is not sent yet is withdrawn; a reply that comes
 * later is dropped; a thread in crpc_channel_wait gets CRPC_ENOTFOUND. CRPC_ENOTFOUND: there is no
 * such id. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_channel_cancel(crpc_channel *channel, crpc_id id);

/* Sends a one-way request: no reply is wanted, and nothing tells whether it was executed. CRPC_OK:
 * it is queued, and will be sent unless the connection fails or the deadline passes first. Errors,
 * loop and threads as crpc_channel_call_async. */
CRPC_API CRPC_MUST_CHECK int crpc_channel_notify(crpc_channel *channel, const crpc_method *method,
                                                 const void *request, const crpc_call *call);

#endif /* CRPC_ENABLE_CLIENT */

/* ======================================================================== */
/* >>api-server   the server: services, requests, replies                   */
/* ======================================================================== */

/* Serves the methods of one or more services. */
typedef struct crpc_server crpc_server;

/* Sees every request of a server before its handler. Either function may be NULL. Several threads
 * may run them at once if the server has io_threads or workers. */
typedef struct crpc_server_interceptor {
    /* Runs on the handler's thread, in the order of the array, before the request is decoded. A
     * result other than CRPC_OK ends the request with that status, as if the handler had returned
     * it. */
    int (*before)(void *user, crpc_context *context);
    /* Runs when the reply is ready, in the opposite order, on the thread that finished it. */
    void (*after)(void *user, crpc_context *context, int status);
    void *user; /* first argument of both */
} crpc_server_interceptor;

/* Limits one method or the methods of a service. The first entry that matches a method counts.
 * Requests beyond a limit are answered with CRPC_ELIMIT before they are decoded. An entry that
 * matches no method of the server makes crpc_server_start fail. */
typedef struct crpc_method_limit {
    const crpc_service *service; /* each of its methods gets its own limit. NULL: any service */
    const crpc_method *method;   /* this method alone. NULL: all methods of `service` */
    int max_concurrency; /* requests in service at a time. 0: no limit. -1: no limit */
    int adaptive;        /* 1: as many requests at a time as the method can serve without queueing,
                            measured as brpc's "auto" limiter does, starting with 40, never below
                            `workers`. 0: no such limit. -1: no such limit */
    int rate;            /* requests a second. 0: no limit. -1: no limit */
    int burst;           /* requests at once after a pause. 0: as rate. -1: as rate */
} crpc_method_limit;

/* Options of a server. Texts are copied; what is borrowed is marked. */
typedef struct crpc_server_options {
    const char *listen; /* tcp://host:port (port 0: any free one), unix:///path, or unix://@name for
                           an abstract socket. NULL: crpc_server_listen says where */
    const char *registry; /* zookeeper://host:port,...[/root], without a root in /dubbo, or
                             multicast://224.5.6.7:port[?interface=eth0]. crpc_server_open refuses
                             any other URL. NULL: the server registers nowhere */
    const char *advertise; /* host[:port] to register, resolved when the server starts. NULL: the
                              address of the first TCP listener; if that is 0.0.0.0 or [::], the
                              local address from which the registry is reached */
    crpc_directory_options directory; /* how services are registered */
    int weight; /* registered: the share of calls beside other providers' weights, at most 1000000.
                   0: 100. -1: weight 0, which gets calls only if there is no other provider */
    int warmup_ms; /* registered: how long consumers raise the weight from 1 to its full value. 0:
                      no warm-up. -1: no warm-up */
    crpc_loop *loop;         /* must outlive the server. NULL: a private loop */
    crpc_loop_options loops; /* options of the private loop and of the I/O threads' loops */
    int io_threads;   /* threads with a loop each, which share the connections. 0: the server's loop
                         has all connections. -1: as 0 */
    int workers;      /* threads that run handlers. 0: handlers run on the thread of their
                         connection. -1: as 0 */
    int worker_queue; /* requests that may wait for a worker; beyond it CRPC_ELIMIT. 0: 1024. -1: no
                         limit */
    int worker_stack; /* bytes. 0: 256 KiB. -1: the system's default */
    /* Requests with the same key run one after another in the order in which they came: the next
     * begins when the reply to the one before is ready, whichever thread made it. The key is the
     * request's user_fields entry "crpc-key". At most worker_queue requests wait for their turn.
     * 0: requests without a key run as they come. 1: requests without a key run in the order of
     * their connection. -1: keys are ignored */
    int ordered;
    int max_concurrency; /* requests in service at a time, deferred and waiting ones included;
                            beyond it CRPC_ELIMIT. 0: 8192 for each I/O thread. -1: no limit */
    int max_connections; /* open at a time. Above three quarters of it the host with the most
                            connections, by its weight, gets no more, and yields one to a newcomer
                            when none is left. What is refused gets CRPC_ELIMIT. 0: 1024. -1: no
                            limit */
    int first_request_ms; /* a new connection must send a request in this time. 0: 60000. -1: no
                             limit */
    crpc_access_options access;
    crpc_limits limits;  /* max_body: of a request; max_queued: of unsent replies */
    int64_t max_skip;    /* a request over max_body, but not over this, is skipped and answered with
                            CRPC_EREQUEST; beyond it the connection is closed. 0: 256 MiB. -1: every
                            oversize request closes its connection */
    const crpc_method_limit *method_limits; /* borrowed until crpc_server_start has returned */
    size_t method_limit_count;
    int rate_per_client;  /* requests a second from one IP address, all its connections together;
                             all unix sockets count as one address. 0: no limit. -1: no limit */
    int burst_per_client; /* requests at once after a pause. 0: as rate_per_client. -1: as
                             rate_per_client */
    /* The server keeps its replies to requests that have an id: a user_fields entry "crpc-rid" of
     * at most 64 bytes, which no other call to the method has. A request that comes again gets the
     * kept reply, after the interceptors have let it through, and is not executed. Another request
     * with the same id gets CRPC_EREQUEST. Entries stay for replay_ms; a request that finds none
     * free, or whose host has its share of them (as of max_connections), gets CRPC_ELIMIT and is
     * not executed. A reply over a quarter of replay_bytes, or one for which replay_bytes leaves no
     * room, is not kept: its request fails with CRPC_EINTERNAL when it comes again. A server that
     * gets N such requests a second needs N * replay_ms / 1000 entries. */
    int replay_entries;   /* requests to remember. 0: none. -1: none */
    int replay_ms;        /* how long after its end a request is remembered. 0: 60000. -1: 0 */
    int64_t replay_bytes; /* memory for the entries and their replies. 0: 4 MiB. -1: no limit */
    int idle_timeout_ms;  /* a connection without a request for so long is closed. 0: never. -1:
                             never */
    int frame_timeout_ms; /* a request that has begun to arrive must be complete in this time. 0:
                             30000. -1: no limit */
    int lame_ms;  /* how long a stopping server goes on serving after it has unregistered, because
                     consumers learn of it a little later. 0: 1000 with a registry, else none. -1:
                     not at all */
    int drain_ms; /* how long a stopping server then waits for requests in service. 0: 5000. -1: not
                     at all */
    const crpc_server_interceptor *interceptors; /* borrowed until the server is closed and its last
                                                    deferred request is finished */
    size_t interceptor_count;
} crpc_server_options;

#if CRPC_ENABLE_SERVER

/* Reads options from configuration lines, as crpc_channel_options_parse does. The keys are those of
 * crpc_server_options and its `loops`. `text` must stay until the server is open. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_server_options_parse(char *text, crpc_server_options *options,
                                                       crpc_error *error);

/* Makes a server, and binds options->listen if it is set; the caller owns the server. NULL options
 * mean the defaults. `error` (may be NULL) says what failed. CRPC_EINVAL: an option or a URL is
 * malformed or out of range. CRPC_EUNSUPPORTED: an option or the registry's scheme is not compiled
 * in. CRPC_ENOMEM; the errors of crpc_loop_open and of crpc_server_listen. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_server_open(crpc_server **server,
                                              const crpc_server_options *options,
                                              crpc_error *error);

/* Offers a service. `handlers` is what the table's serve functions expect: generated code has a
 * struct of function pointers. `service`, `handlers` and `user` must outlive the server.
 * CRPC_EBUSY: the server has started, or offers a service with the same short name already.
 * CRPC_EINVAL: `service` has no name. CRPC_ENOMEM. */
CRPC_API CRPC_MUST_CHECK int crpc_server_add(crpc_server *server, const crpc_service *service,
                                             const void *handlers, void *user);

/* Binds a further address; URLs as in options->listen. `error` (may be NULL) says what failed.
 * CRPC_EBUSY: the server has started. CRPC_EINVAL: the URL is malformed. CRPC_ERESOLVE: no address
 * for the host name. CRPC_EADDRESS: the address is in use, is none of this machine's, or needs a
 * permission or a directory that is missing. CRPC_ESYSTEM: another system call failed.
 * CRPC_ENOMEM. */
CRPC_API CRPC_MUST_CHECK int crpc_server_listen(crpc_server *server, const char *url,
                                                crpc_error *error);

/* Takes over a bound and listening socket, as from a service manager. On CRPC_OK the server owns it
 * and closes it with itself; on an error the caller still does. CRPC_EINVAL: the descriptor is not
 * a listening socket. CRPC_EBUSY: the server has started. CRPC_ENOMEM. */
CRPC_API CRPC_MUST_CHECK int crpc_server_listen_fd(crpc_server *server, int fd);

/* Writes the address of listener `index`, counted from 0, as a URL with its real port.
 * CRPC_ENOTFOUND: there are fewer listeners. CRPC_EINVAL: it does not fit into `size` bytes;
 * CRPC_ADDRESS_MAX + 8 are always enough. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_server_address(crpc_server *server, size_t index, char *url,
                                                 size_t size);

/* Begins to serve: starts io_threads and workers, accepts connections, and registers the services,
 * for which it waits up to directory.timeout_ms, unless a callback of the loop calls it. Returns
 * while the server serves. The caller must drive the server's loop, which accepts connections even
 * if there are io_threads: by crpc_server_run or by crpc_loop_start(crpc_server_loop(server)).
 *
 * `error` (may be NULL) says what failed; a server that failed to start can only be closed.
 * CRPC_EBUSY: it was started before. CRPC_EINVAL: no listener, or method_limits name a method that
 * it does not offer. CRPC_EREGISTRY: the registry did not answer in time, and must_connect is 1.
 * CRPC_ERESOLVE, CRPC_EADDRESS: advertise, or the registry's host, is of no use. CRPC_ESYSTEM: a
 * thread or a socket could not be made. CRPC_EUNSUPPORTED: threads are not compiled in.
 * CRPC_ENOMEM. */
CRPC_API CRPC_MUST_CHECK int crpc_server_start(crpc_server *server, crpc_error *error);

/* Starts the server unless it has started, then drives its loop on this thread until
 * crpc_server_stop has taken effect, or crpc_loop_stop was called on the loop. Either way the
 * server is stopped and drained before this returns. Errors as crpc_server_start, which are also
 * logged, and as crpc_loop_run. */
CRPC_API CRPC_MUST_CHECK int crpc_server_run(crpc_server *server);

/* Begins to stop, and returns at once. The server unregisters and serves on for lame_ms; then it
 * closes its listeners, answers new requests with CRPC_ELOGOFF, and waits up to drain_ms for
 * requests in service; then it closes its connections. A second call does nothing. Any thread, any
 * callback; a signal handler calls crpc_loop_stop instead. */
CRPC_API void crpc_server_stop(crpc_server *server);

/* Stops the server as crpc_server_stop does, waits for that and for handlers on workers and I/O
 * threads to return, and frees the server. A request that is finished later gets CRPC_EGONE.
 *
 * In a handler or a callback of the server it does not wait: the server stops, and its loop frees
 * it afterwards. The program must not use it any more in either case, even if crpc_server_run still
 * runs it. NULL is ignored. */
CRPC_API void crpc_server_close(crpc_server *server);

/* The loop that accepts connections. The server owns it if it is private. Any thread. */
CRPC_API crpc_loop *crpc_server_loop(crpc_server *server);

/* Copies the counters of the server's loops, added up. `poller` is that of the accepting loop. Any
 * thread. */
CRPC_API void crpc_server_stats_get(crpc_server *server, crpc_loop_stats *stats);

/* --- inside a handler -------------------------------------------------------------------------
 * A handler gets its context, the decoded request and a zeroed response. It returns one of
 *   CRPC_OK                 the response is sent
 *   CRPC_EPENDING           the handler keeps the context, and the program calls
 *                           crpc_context_finish later, from any thread
 *   crpc_context_fail(...)  an error code of the application is sent
 *   another crpc_status     that status is sent; a number that is no crpc_status, such as -1 or 42,
 *                           is sent as CRPC_EINTERNAL
 * The request, its attachment and its fields stay valid until the reply is finished. One thread at
 * a time may use a context. */

/* Sets an error code of the application and its text, as printf does; the handler returns the
 * result. The code is any int except 0-199 and 1000-3999, which belong to the system and to RPC
 * frameworks; for one of those the caller gets CRPC_EINTERNAL and a text that says so. Texts are
 * cut to CRPC_ERROR_TEXT_MAX. */
CRPC_API int crpc_context_fail(crpc_context *context, int app_code, const char *format, ...)
    CRPC_PRINTF(3, 4);

/* Sets the text that is sent with a crpc_status, as printf does, and returns the status:
 *     return crpc_context_error(context, CRPC_EAUTH, "token expired"); */
CRPC_API int crpc_context_error(crpc_context *context, int status, const char *format, ...)
    CRPC_PRINTF(3, 4);

/* Finishes a request whose handler has returned CRPC_EPENDING, or is about to. `status` is as a
 * handler would return it; CRPC_EPENDING counts as CRPC_EINTERNAL. The context is gone afterwards.
 * CRPC_OK: the reply is queued. CRPC_EGONE: the connection is closed or the server has stopped, and
 * nothing is sent. A peer that has shut down only its sending side still gets its reply. Any
 * thread. */
CRPC_API int crpc_context_finish(crpc_context *context, int status);

/* The response struct, for handlers that return CRPC_EPENDING. */
CRPC_API void *crpc_context_response(crpc_context *context);

/* Zeroed memory that lives until the reply is finished, for what views of the response point to.
 * NULL: out of memory. Two threads must not call it for one context at once. */
CRPC_API void *crpc_context_alloc(crpc_context *context, size_t size);

/* The `user` that was given to crpc_server_add. */
CRPC_API void *crpc_context_user(const crpc_context *context);

/* The method that is called. */
CRPC_API const crpc_method *crpc_context_method(const crpc_context *context);

/* The raw bytes behind the request; unset if there are none. */
CRPC_API crpc_view crpc_context_attachment(const crpc_context *context);

/* Sets the raw bytes to send behind the reply; a second call replaces the first. They are copied,
 * unless they are the request's attachment or a part of it. Nothing is sent with an error.
 * CRPC_EINVAL: over 2 GiB. CRPC_ENOMEM. */
CRPC_API CRPC_MUST_CHECK int crpc_context_set_attachment(crpc_context *context, crpc_view bytes);

/* Finds a user_fields entry of the request and writes its value, which is valid until the reply is
 * finished. False: there is no such entry. */
CRPC_API bool crpc_context_field(const crpc_context *context, const char *key, crpc_view *value);

/* Adds a user_fields entry to the reply; copies both texts. CRPC_EINVAL: one is NULL, or the meta
 * could be over 64 KiB with it. CRPC_ENOMEM. */
CRPC_API CRPC_MUST_CHECK int crpc_context_add_field(crpc_context *context, const char *key,
                                                    const char *value);

/* The request's authentication_data, which crpc does not check; unset if there is none. */
CRPC_API crpc_view crpc_context_credential(const crpc_context *context);

/* The log_id that the caller sent; 0 if it sent none. */
CRPC_API int64_t crpc_context_log_id(const crpc_context *context);

/* Microseconds until the caller's deadline, negative after it; INT64_MAX if the caller sent
 * none. */
CRPC_API int64_t crpc_context_remaining_us(const crpc_context *context);

/* The peer as text, valid until the reply is finished: "10.0.0.7:1234", "[fe80::1%2]:1234", or for a
 * unix socket "unix:uid=1000". "": out of memory. */
CRPC_API const char *crpc_context_peer(crpc_context *context);

#endif /* CRPC_ENABLE_SERVER */

/* ======================================================================== */
/* >>api-coordination   nodes, configuration, locks and elections in ZooKeeper */
/* ======================================================================== */

/* A session with ZooKeeper, for what a fleet has to agree on (manual, COORDINATION). Paths are
 * below the root that the registry's URL names. A leading slash changes nothing, and "" is the root
 * itself. */
typedef struct crpc_registry crpc_registry;

/* The state of a registry's session. */
typedef enum crpc_registry_state {
    CRPC_REGISTRY_CONNECTING = 0, /* there is no session yet, or a new one is being made */
    CRPC_REGISTRY_CONNECTED = 1,
    CRPC_REGISTRY_SUSPENDED = 2, /* the connection is lost; the session may still be alive */
    CRPC_REGISTRY_LOST = 3       /* the session is over, and its ephemeral nodes with it */
} crpc_registry_state;

/* Tells a new state, on the thread that drives the loop. Of several changes in a row perhaps only
 * the last is told. `session` is the number of the present or last session. When it differs from
 * the one before, ephemeral nodes have to be created again. */
typedef void (*crpc_registry_state_fn)(void *user, crpc_registry_state state, int64_t session);

/* Options of a registry. Texts are copied. */
typedef struct crpc_registry_options {
    crpc_loop_options private_loop;  /* options of the private loop */
    const char *credential;          /* ZooKeeper digest "user:password". NULL: none */
    crpc_registry_state_fn on_state; /* told of every new state. NULL: none */
    void *user;                      /* its first argument */
    int session_timeout_ms;  /* silence until ZooKeeper ends the session. 0: 15000. -1: as 0 */
    int registry_timeout_ms; /* how long opening waits for the session. 0: 3000. -1: not at all */
    int must_connect; /* 1: opening fails if there is no session in time. 0: crpc goes on trying.
                         -1: as 0 */
} crpc_registry_options;

/* Flags of a node to create, combined with |. */
#define CRPC_NODE_EPHEMERAL  1u /* ZooKeeper deletes it when the session that created it is over */
#define CRPC_NODE_SEQUENTIAL 2u /* ZooKeeper appends a growing number of ten digits to the name */
#define CRPC_NODE_PARENTS    4u /* creates missing parents too; only for a single operation */
#define CRPC_NODE_PRIVATE    8u /* only the credential's identity may use it; else everybody may */

#define CRPC_NODE_BYTES_MAX 1000000 /* data of a node, and of one transaction together */
#define CRPC_NODE_OPS_MAX 100       /* operations in one transaction */
#define CRPC_NODE_ANY (-1)          /* as a version: any */

/* What an operation does; see the functions that make one. */
typedef enum crpc_node_verb {
    CRPC_NODE_CREATE = 1,
    CRPC_NODE_GET = 2,
    CRPC_NODE_SET = 3,
    CRPC_NODE_DELETE = 4,
    CRPC_NODE_EXISTS = 5,
    CRPC_NODE_CHILDREN = 6,
    CRPC_NODE_CHECK = 7, /* only in a transaction */
    CRPC_NODE_FIRST = 8  /* reads the first node in the queue of a lock or an election */
} crpc_node_verb;

/* One operation on a node; crpc_node_create and the functions beside it make one. What it points to
 * is copied when the operation begins. */
typedef struct crpc_node_op {
    crpc_node_verb verb;
    const char *path; /* below the registry's root */
    crpc_view data;
    int32_t version; /* the version that the node must have. 0: not written since it was created.
                        -1: any */
    unsigned flags;  /* CRPC_NODE_* of a node to create */
} crpc_node_op;

/* What ZooKeeper knows about a node. */
typedef struct crpc_node_stat {
    int64_t created;  /* transaction that created it (czxid) */
    int64_t modified; /* transaction that wrote it last (mzxid) */
    int32_t version;  /* how often it was written since */
    int32_t size;     /* bytes of data */
    int32_t children; /* how many nodes are below it */
    bool ephemeral;
    bool mine; /* it is ephemeral, and the present session created it */
} crpc_node_stat;

/* How one operation of a transaction ended. */
typedef struct crpc_node_part {
    int status;          /* CRPC_ECANCELED: another operation failed, see crpc_node.failed */
    const char *path;    /* as in crpc_node */
    crpc_node_stat stat; /* of a node that was written */
} crpc_node_part;

/* The result of operations. If crpc_registry_call fills it, the caller owns it: initialise it with
 * CRPC_INIT before its first use, and call crpc_node_reset after its last. */
typedef struct crpc_node {
    /* `code` is what was returned. `sent` says whether ZooKeeper can have executed the operations.
     * `remote`: ZooKeeper reported the error, and app_code is its number, such as -101. The text
     * names operation and path. */
    crpc_error error;
    const char *path;            /* of the node, below the root; of a created node its real name */
    crpc_view data;              /* GET and FIRST: all its data; unset if there is none */
    const char *const *children; /* CHILDREN: the names below it, in no particular order */
    size_t child_count;
    crpc_node_stat stat;         /* GET, SET, EXISTS, FIRST */
    const crpc_node_part *parts; /* of a transaction: one for each operation, if it was answered */
    size_t part_count;
    size_t failed; /* of a transaction: index of the operation that failed */
    void *reserved[2];
} crpc_node;

/* Gets the result of operations on the thread that drives the loop. `node` is valid until it
 * returns. */
typedef void (*crpc_node_fn)(void *user, const crpc_node *node);

/* An operation without data and flags. The functions below are easier to read. */
static inline crpc_node_op crpc_node_op_of(crpc_node_verb verb, const char *path, int32_t version)
{
    crpc_node_op op;
    op.verb = verb;
    op.path = path;
    op.data = crpc_view_of(NULL, 0);
    op.version = version;
    op.flags = 0;
    return op;
}

/* Creates a node with `data`, which may be unset, and CRPC_NODE_* flags. CRPC_EEXISTS: the node
 * exists. CRPC_ENOTFOUND: its parent does not exist. */
static inline crpc_node_op crpc_node_create(const char *path, crpc_view data, unsigned flags)
{
    crpc_node_op op = crpc_node_op_of(CRPC_NODE_CREATE, path, CRPC_NODE_ANY);
    op.data = data;
    op.flags = flags;
    return op;
}

/* Reads a node's data and stat. CRPC_ENOTFOUND: the node does not exist. */
static inline crpc_node_op crpc_node_get(const char *path)
{
    return crpc_node_op_of(CRPC_NODE_GET, path, CRPC_NODE_ANY);
}

/* Writes the data of an existing node, if it has this version or `version` is CRPC_NODE_ANY.
 * CRPC_ENOTFOUND: the node does not exist. CRPC_EVERSION: it has another version. */
static inline crpc_node_op crpc_node_set(const char *path, crpc_view data, int32_t version)
{
    crpc_node_op op = crpc_node_op_of(CRPC_NODE_SET, path, version);
    op.data = data;
    return op;
}

/* Deletes a node, if it has this version or `version` is CRPC_NODE_ANY. CRPC_ENOTFOUND: the node
 * does not exist. CRPC_EVERSION: it has another version. CRPC_ENOTEMPTY: it has children. */
static inline crpc_node_op crpc_node_delete(const char *path, int32_t version)
{
    return crpc_node_op_of(CRPC_NODE_DELETE, path, version);
}

/* Reads a node's stat. CRPC_ENOTFOUND: the node does not exist. */
static inline crpc_node_op crpc_node_exists(const char *path)
{
    return crpc_node_op_of(CRPC_NODE_EXISTS, path, CRPC_NODE_ANY);
}

/* Lists the names of a node's children. CRPC_ENOTFOUND: the node does not exist. */
static inline crpc_node_op crpc_node_children(const char *path)
{
    return crpc_node_op_of(CRPC_NODE_CHILDREN, path, CRPC_NODE_ANY);
}

/* In a transaction: all its operations fail unless the node exists (CRPC_ENOTFOUND) with this
 * version (CRPC_EVERSION). */
static inline crpc_node_op crpc_node_check(const char *path, int32_t version)
{
    return crpc_node_op_of(CRPC_NODE_CHECK, path, version);
}

/* Reads who leads the election at a path, or holds the lock: data is the `who` that it gave,
 * stat.created its token. CRPC_ENOTFOUND: nobody. */
static inline crpc_node_op crpc_node_first(const char *path)
{
    return crpc_node_op_of(CRPC_NODE_FIRST, path, CRPC_NODE_ANY);
}

/* Tells the value of a watched node when watching begins and after each change, on the thread that
 * drives the loop. Of several changes in a row perhaps only the last is told. `exists` false: there
 * is no such node, and `value` is unset. `value` is valid until the function returns. */
typedef void (*crpc_config_fn)(void *user, crpc_view value, int32_t version, bool exists);

/* A member of the queue for one lock. */
typedef struct crpc_lock crpc_lock;

/* Tells what became of a lock, on the thread that drives the loop. CRPC_OK: the lock is held, and
 * `token` is larger than that of every earlier holder; give it to whatever the lock protects.
 * CRPC_EGONE: the lock was held and is lost. Any other status: it was not acquired (see
 * crpc_lock_acquire). */
typedef void (*crpc_lock_fn)(void *user, int status, int64_t token);

/* A candidate in one election. */
typedef struct crpc_election crpc_election;

/* Tells, on the thread that drives the loop, that this process begins to lead, with a `token`
 * larger than those of all earlier leaders, or that it no longer leads. */
typedef void (*crpc_election_fn)(void *user, bool leader, int64_t token);

#if CRPC_ENABLE_ZOOKEEPER

/* Opens a session on zookeeper://host:port,...[/root]; the caller owns the registry. Without a
 * root, paths are ZooKeeper's own. The URL may end in
 * ?session_timeout_ms=N&registry_timeout_ms=N&must_connect=N, which override the options. NULL
 * options mean the defaults. Host names are resolved here, on this thread, and the function waits
 * up to registry_timeout_ms for the session. Registries, channels and servers of one loop share a
 * session if they name the same servers, credential and timeout.
 *
 * With `loop` NULL the registry gets a private loop; the first thing with a callback starts its
 * thread. Any other loop must outlive the registry, and the program drives it, or the threads that
 * wait in crpc_registry_call do.
 *
 * `error` (may be NULL) says what failed. CRPC_EINVAL: the URL or an option is malformed or out of
 * range, or the private loop needs a thread and forbid_threads is set. CRPC_EUNSUPPORTED: another
 * scheme. CRPC_ERESOLVE: no address for any server. CRPC_EREGISTRY: no session in time, and
 * must_connect is 1. CRPC_EDEADLK: called inside a callback of the loop, where it would have to
 * wait. CRPC_ENOMEM, and the errors of crpc_loop_open. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_registry_open(crpc_registry **registry, crpc_loop *loop,
                                                const char *url,
                                                const crpc_registry_options *options,
                                                crpc_error *error);

/* Ends everything that was begun through the registry: operations end with CRPC_ECANCELED, and
 * their callbacks still run; watches end; locks are released and elections left, but their handles
 * still have to be closed. If nothing else shares the session, it ends too, and its ephemeral nodes
 * are deleted; this can take 4.5 s if the ZooKeeper server is frozen. Any thread, any callback.
 * NULL is ignored. */
CRPC_API void crpc_registry_close(crpc_registry *registry);

/* The loop that the registry works on. The registry owns it if it is private. Any thread. */
CRPC_API crpc_loop *crpc_registry_loop(crpc_registry *registry);

/* The number of the present session; 0 while there is no connection. Any thread. */
CRPC_API int64_t crpc_registry_session(crpc_registry *registry);

/* Executes one operation, or several as one transaction (CREATE, SET, DELETE and CHECK: all or
 * none), and waits for the result. `node` may be NULL. timeout_ms 0: 5000. -1: 24 hours. If the
 * connection is lost, what is unsent waits for the next connection, and reads are sent again. If
 * nobody drives the loop, this thread does, but runs no callbacks.
 *
 * CRPC_ECONN: no connection in time (sent NO), or it was lost before the answer (sent MAYBE).
 * CRPC_ETIMEDOUT: no answer in time (sent MAYBE). CRPC_EAUTH: the node's access list forbids it.
 * CRPC_EINVAL: a path, flag, version, size or combination is wrong. CRPC_EUNSUPPORTED: the server
 * does not know the operation. CRPC_EDEADLK: called inside a callback of the loop. CRPC_ECANCELED:
 * another thread closed the registry. CRPC_EINTERNAL: any other error of the server (see app_code).
 * CRPC_ENOMEM, and the errors of the operations. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_registry_call(crpc_registry *registry, const crpc_node_op *ops,
                                                size_t count, int timeout_ms, crpc_node *node);

/* As crpc_registry_call, without waiting. If it returns CRPC_OK, fn(user, node) runs exactly once;
 * otherwise never. Operations that one thread begins are sent in their order. CRPC_ELIMIT: 1000
 * operations are in flight. CRPC_EINVAL: fn is NULL, an argument is wrong, or the private loop
 * needs a thread and forbid_threads is set. CRPC_ESYSTEM: that thread could not be started.
 * CRPC_ENOMEM. Any thread, any callback. */
CRPC_API CRPC_MUST_CHECK int crpc_registry_call_async(crpc_registry *registry,
                                                      const crpc_node_op *ops, size_t count,
                                                      int timeout_ms, crpc_node_fn fn, void *user);

/* Frees what crpc_registry_call put into a node; its views and texts become invalid. The struct can
 * be used again. */
CRPC_API void crpc_node_reset(crpc_node *node);

/* Follows the value of a node, which need not exist. fn is told of every change that lasts, also
 * across reconnections and new sessions; while there is no connection the last value stands.
 * CRPC_EINVAL: fn is NULL, the path is malformed, or the private loop needs a thread and
 * forbid_threads is set. CRPC_ESYSTEM: that thread could not be started. CRPC_ENOMEM. Any thread,
 * any callback. */
CRPC_API CRPC_MUST_CHECK int crpc_config_watch(crpc_registry *registry, const char *path,
                                               crpc_config_fn fn, void *user, crpc_id *id);

/* Ends a watch. A stale id is ignored. After a call from one of the loop's callbacks fn does not
 * run again; after a call from another thread fn may still be running. Any thread. */
CRPC_API void crpc_config_unwatch(crpc_registry *registry, crpc_id id);

/* Makes a handle for the lock at a path; the caller owns it. crpc creates the node and its parents
 * when they are needed. It does not acquire the lock. `who` (may be NULL, copied) stands in the
 * lock's nodes for people to read. Errors as crpc_config_watch; the root itself cannot be a lock.
 * Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_lock_open(crpc_lock **lock, crpc_registry *registry,
                                            const char *path, const char *who, crpc_lock_fn fn,
                                            void *user);

/* Joins the queue for the lock, which is first come, first served. timeout_ms 0: fails as soon as
 * ZooKeeper answers that another holds it. -1: no limit. A new session gets a new place, at the
 * end.
 *
 * If this returns CRPC_OK, fn tells the end: CRPC_OK, CRPC_ETIMEDOUT (another holds it), CRPC_ECONN
 * (ZooKeeper could not be reached), CRPC_EAUTH (the credential may not), CRPC_ECANCELED (released
 * or closed meanwhile). CRPC_EBUSY: the lock is held or being acquired, or fn is still to be told
 * of the last attempt. CRPC_ECANCELED: the registry is closed. Any thread, any callback. */
CRPC_API CRPC_MUST_CHECK int crpc_lock_acquire(crpc_lock *lock, int timeout_ms);

/* For how many microseconds the lock is certainly held, by ZooKeeper's last answer; 0: it is not
 * held. crpc renews the lease as long as ZooKeeper answers. Work that may take longer needs the
 * token. Any thread. */
CRPC_API int64_t crpc_lock_lease_us(crpc_lock *lock);

/* Gives up the lock or the attempt. For this process that takes effect at once; the node in
 * ZooKeeper is deleted as soon as ZooKeeper can be reached. Does nothing if there is neither. Any
 * thread, any callback. */
CRPC_API void crpc_lock_release(crpc_lock *lock);

/* Releases the lock and frees the handle. fn may still be running, as with crpc_config_unwatch. Any
 * thread, any callback. NULL is ignored. */
CRPC_API void crpc_lock_close(crpc_lock *lock);

/* Makes this process a candidate in the election at a path, behind those that are there, until
 * crpc_election_close; with each new session it joins again, at the end. The caller owns the
 * handle. `who` (may be unset, copied) is what crpc_node_first tells others about it. Errors as
 * crpc_lock_open; CRPC_EINVAL also if `who` is over CRPC_NODE_BYTES_MAX. Any thread. */
CRPC_API CRPC_MUST_CHECK int crpc_election_open(crpc_election **election, crpc_registry *registry,
                                                const char *path, crpc_view who,
                                                crpc_election_fn fn, void *user);

/* For how many microseconds this process certainly leads, as crpc_lock_lease_us; 0: it does not
 * lead. Any thread. */
CRPC_API int64_t crpc_election_lease_us(crpc_election *election);

/* Steps back behind all other candidates. Without others this process will lead again, with a new
 * token. Any thread, any callback. */
CRPC_API void crpc_election_resign(crpc_election *election);

/* Leaves the election and frees the handle. fn is not told, but may still be running, as with
 * crpc_config_unwatch. Any thread, any callback. NULL is ignored. */
CRPC_API void crpc_election_close(crpc_election *election);

#endif /* CRPC_ENABLE_ZOOKEEPER */

#ifdef __cplusplus
}
#endif

#endif /* CRPC_H_INCLUDED */

/* Everything below is the implementation; stop here if you only want to use crpc. */

#if defined(CRPC_IMPLEMENTATION) && !defined(CRPC_IMPLEMENTATION_INCLUDED)
#define CRPC_IMPLEMENTATION_INCLUDED

/* ======================================================================== */
/* >>impl-base   system headers, attributes, assertions, small arithmetic, hash */
/* ======================================================================== */

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#if CRPC_ENABLE_RESOLVER
#include <netdb.h>
#endif
#if CRPC_ENABLE_EPOLL
#include <sys/epoll.h>
#endif
#if CRPC_ENABLE_THREADS
#include <pthread.h>
#endif

#if !defined(PB_C99_STATIC_ASSERT) && !defined(__cplusplus) && __STDC_VERSION__ < 201112L
#define PB_C99_STATIC_ASSERT 1
#endif
#include <pb.h>
#include <pb_common.h>
#include <pb_decode.h>
#include <pb_encode.h>

#if defined(PB_BUFFER_ONLY) || defined(PB_WITHOUT_64BIT) || defined(PB_NO_ERRMSG)
#error "crpc: nanopb must be compiled without PB_BUFFER_ONLY, PB_WITHOUT_64BIT and PB_NO_ERRMSG"
#endif
#if !defined(PB_PROTO_HEADER_VERSION) || PB_PROTO_HEADER_VERSION < 40
#error "crpc: nanopb 0.4.5 or newer is needed"
#endif
#if CRPC_ENABLE_ZOOKEEPER && !CRPC_ENABLE_THREADS && !CRPC_ZOOKEEPER_ST
#error "crpc: without threads ZooKeeper needs CRPC_ZOOKEEPER_ST=1 and libzookeeper_st"
#endif

#if !defined(CRPC_REALLOC) && !defined(CRPC_FREE)
#define CRPC_REALLOC(ptr, size) realloc(ptr, size)
#define CRPC_FREE(ptr) free(ptr)
#elif !defined(CRPC_REALLOC) || !defined(CRPC_FREE)
#error "crpc: define CRPC_REALLOC and CRPC_FREE together"
#endif

/* Attributes of private functions. A toggle may leave a function without a caller: no compiler need
 * warn. CRPCI_COLD ones run at start, at the end or on errors: they are laid out apart and never
 * inlined, which keeps the code of a call in few cache lines. */
#if defined(__GNUC__)
#define CRPCI_FN static __attribute__((unused))
#define CRPCI_COLD static __attribute__((unused, cold, noinline))
#define CRPCI_LIKELY(x) __builtin_expect(!!(x), 1)
#define CRPCI_UNLIKELY(x) __builtin_expect(!!(x), 0)
#else
#define CRPCI_FN static
#define CRPCI_COLD static
#define CRPCI_LIKELY(x) (x)
#define CRPCI_UNLIKELY(x) (x)
#endif

/* States what must hold; checked where CRPC_DEBUG is 1. For mistakes in crpc itself only: nothing
 * that comes from a peer or from the program may reach one. */
#if CRPC_DEBUG
CRPCI_COLD void crpci_base_abort(const char *what, const char *function)
{
    fprintf(stderr, "crpc: %s: %s\n", function, what);
    abort();
}
#define CRPCI_ASSERT(x, what) ((x) ? (void)0 : crpci_base_abort(what, __func__))
#else
#define CRPCI_ASSERT(x, what) ((void)0)
#endif

/* For mistakes of the program in the use of an object; checked likewise. */
#define CRPCI_DEMAND(x, what) CRPCI_ASSERT(x, what)

/* The struct of which *ptr is the named member. */
#define CRPCI_CONTAINER(ptr, type, member)                                                         \
    ((type *)(void *)((char *)(ptr)-offsetof(type, member)))

CRPCI_FN size_t crpci_base_min(size_t a, size_t b)
{
    return a < b ? a : b;
}

CRPCI_FN int64_t crpci_base_min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* The value of an option: `zero`, the default, if it is 0; `none` if it is negative. */
CRPCI_FN int64_t crpci_base_option(int64_t value, int64_t zero, int64_t none)
{
    return value == 0 ? zero : value < 0 ? none : value;
}

/* 32-bit integers on the wire are big-endian and stand at any address. */
CRPCI_FN uint32_t crpci_base_get32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

CRPCI_FN void crpci_base_put32(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 24);
    p[1] = (uint8_t)(v >> 16);
    p[2] = (uint8_t)(v >> 8);
    p[3] = (uint8_t)v;
}

/* The last steps of splitmix64 (S. Vigna): a change of any bit of x changes each bit of the result
 * with a chance of one half. */
CRPCI_FN uint64_t crpci_base_mix(uint64_t x)
{
    x ^= x >> 30;
    x *= UINT64_C(0xbf58476d1ce4e5b9);
    x ^= x >> 27;
    x *= UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* FNV-1a, then mixed: equal on every machine, because a hash decides which provider of a list all
 * clients choose. Not for keys that an attacker picks to make a table slow. */
CRPCI_FN uint64_t crpci_base_hash(const void *bytes, size_t n)
{
    const uint8_t *p = (const uint8_t *)bytes;
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    size_t i;
    for (i = 0; i < n; i++)
        h = (h ^ p[i]) * UINT64_C(0x100000001b3);
    return crpci_base_mix(h);
}

/* SipHash-2-4 (Aumasson and Bernstein), for keys that a peer chooses: without the secret key it
 * cannot find two of one hash. */
CRPCI_FN void crpci_base_siprounds(uint64_t v[4], int rounds)
{
    while (rounds--) {
        v[0] += v[1];
        v[2] += v[3];
        v[1] = (v[1] << 13 | v[1] >> 51) ^ v[0];
        v[3] = (v[3] << 16 | v[3] >> 48) ^ v[2];
        v[0] = v[0] << 32 | v[0] >> 32;
        v[2] += v[1];
        v[0] += v[3];
        v[1] = (v[1] << 17 | v[1] >> 47) ^ v[2];
        v[3] = (v[3] << 21 | v[3] >> 43) ^ v[0];
        v[2] = v[2] << 32 | v[2] >> 32;
    }
}

CRPCI_FN uint64_t crpci_base_siphash(const uint64_t key[2], const void *bytes, size_t n)
{
    const uint8_t *p = (const uint8_t *)bytes;
    uint64_t v[4], word;
    size_t left = n, i;
    v[0] = key[0] ^ UINT64_C(0x736f6d6570736575);
    v[1] = key[1] ^ UINT64_C(0x646f72616e646f6d);
    v[2] = key[0] ^ UINT64_C(0x6c7967656e657261);
    v[3] = key[1] ^ UINT64_C(0x7465646279746573);
    for (;;) { /* words of eight bytes, little-endian; the last one ends with the length */
        word = left < 8 ? (uint64_t)n << 56 : 0;
        for (i = 0; i < 8 && i < left; i++)
            word |= (uint64_t)p[i] << 8 * i;
        v[3] ^= word;
        crpci_base_siprounds(v, 2);
        v[0] ^= word;
        if (left < 8)
            break;
        p += 8;
        left -= 8;
    }
    v[2] ^= 0xff;
    crpci_base_siprounds(v, 4);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* ======================================================================== */
/* >>impl-thread   mutexes, condition variables, threads, atomic counters    */
/* ======================================================================== */

/* With CRPC_ENABLE_THREADS=0 macros of the same names do nothing, so that the sections below need
 * no #if to lock. */
#if CRPC_ENABLE_THREADS
typedef struct crpci_mutex {
    pthread_mutex_t mutex;
#if CRPC_DEBUG
    uintptr_t holder; /* atomic: tag of the thread that holds it; 0: none does */
#endif
} crpci_mutex;
typedef pthread_cond_t crpci_cond;
typedef pthread_t crpci_thread;

/* The calling thread as a number other than 0. On Linux a pthread_t is an integer or a pointer. */
CRPCI_FN uintptr_t crpci_thread_tag(void)
{
    return (uintptr_t)pthread_self();
}

#if CRPC_DEBUG
/* Whether the calling thread holds a mutex. */
CRPCI_FN bool crpci_thread_holds(const crpci_mutex *m)
{
    return __atomic_load_n(&m->holder, __ATOMIC_RELAXED) == crpci_thread_tag();
}
#endif

/* Records that the calling thread now holds a mutex, or no longer does. */
CRPCI_FN void crpci_thread_set_held(crpci_mutex *m, bool held)
{
#if CRPC_DEBUG
    __atomic_store_n(&m->holder, held ? crpci_thread_tag() : 0, __ATOMIC_RELAXED);
#else
    (void)m;
    (void)held;
#endif
}

CRPCI_FN int crpci_thread_mutex_init(crpci_mutex *m)
{
    crpci_thread_set_held(m, false);
    return pthread_mutex_init(&m->mutex, NULL) ? CRPC_ENOMEM : CRPC_OK;
}

CRPCI_FN void crpci_thread_mutex_free(crpci_mutex *m)
{
    pthread_mutex_destroy(&m->mutex);
}

CRPCI_FN void crpci_thread_lock(crpci_mutex *m)
{
    pthread_mutex_lock(&m->mutex);
    crpci_thread_set_held(m, true);
}

CRPCI_FN void crpci_thread_unlock(crpci_mutex *m)
{
    crpci_thread_set_held(m, false);
    pthread_mutex_unlock(&m->mutex);
}

/* Timed waits go by CLOCK_MONOTONIC: setting the wall clock, by hand or by NTP, moves no
 * deadline. */
CRPCI_FN int crpci_thread_cond_init(crpci_cond *c)
{
    pthread_condattr_t attr;
    int failed = pthread_condattr_init(&attr);
    if (!failed) {
        failed = pthread_condattr_setclock(&attr, CLOCK_MONOTONIC) || pthread_cond_init(c, &attr);
        pthread_condattr_destroy(&attr);
    }
    return failed ? CRPC_ENOMEM : CRPC_OK;
}

CRPCI_FN void crpci_thread_cond_free(crpci_cond *c)
{
    pthread_cond_destroy(c);
}

CRPCI_FN void crpci_thread_signal(crpci_cond *c)
{
    pthread_cond_signal(c);
}

CRPCI_FN void crpci_thread_broadcast(crpci_cond *c)
{
    pthread_cond_broadcast(c);
}

/* Unlocks, waits until signalled or for `us` microseconds, locks again. Negative, or more than a
 * day: a day, so that sums stay in range. It may return early: callers wait in a loop. */
CRPCI_FN void crpci_thread_wait(crpci_cond *c, crpci_mutex *m, int64_t us)
{
    const int64_t day = INT64_C(86400000000);
    struct timespec ts;
    us = us < 0 || us > day ? day : us;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    ts.tv_sec += (time_t)(us / 1000000);
    ts.tv_nsec += (long)(us % 1000000) * 1000;
    if (ts.tv_nsec >= 1000000000) {
        ts.tv_sec++;
        ts.tv_nsec -= 1000000000;
    }
    crpci_thread_set_held(m, false);
    pthread_cond_timedwait(c, &m->mutex, &ts);
    crpci_thread_set_held(m, true);
}

CRPCI_FN crpci_thread crpci_thread_self(void)
{
    return pthread_self();
}

CRPCI_FN bool crpci_thread_is_self(crpci_thread t)
{
    return pthread_equal(t, pthread_self()) != 0;
}

/* Starts a thread. All signals are blocked on it, so that the program's signal handlers run on the
 * program's own threads. stack_size: bytes, 0: the system's default. */
CRPCI_FN int crpci_thread_start(crpci_thread *t, size_t stack_size, void *(*fn)(void *), void *arg)
{
    pthread_attr_t attr;
    sigset_t all, old;
    int failed;
    if (pthread_attr_init(&attr))
        return CRPC_ENOMEM;
    if (stack_size)
        pthread_attr_setstacksize(&attr, stack_size);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    failed = pthread_create(t, &attr, fn, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    return failed ? CRPC_ESYSTEM : CRPC_OK;
}

CRPCI_FN void crpci_thread_join(crpci_thread t)
{
    pthread_join(t, NULL);
}

/* Names the calling thread for ps and gdb; the kernel takes 15 characters. */
CRPCI_FN void crpci_thread_name(const char *name)
{
    char text[16];
    snprintf(text, sizeof text, "%s", name);
    pthread_setname_np(pthread_self(), text);
}
#else
typedef char crpci_mutex;
typedef char crpci_cond;
typedef char crpci_thread;

#define crpci_thread_tag()          ((uintptr_t)1)
#define crpci_thread_holds(m)       ((void)(m), true)
#define crpci_thread_mutex_init(m)  (*(m) = 0)
#define crpci_thread_mutex_free(m)  ((void)(m))
#define crpci_thread_lock(m)        ((void)(m))
#define crpci_thread_unlock(m)      ((void)(m))
#define crpci_thread_cond_init(c)   (*(c) = 0)
#define crpci_thread_cond_free(c)   ((void)(c))
#define crpci_thread_signal(c)      ((void)(c))
#define crpci_thread_broadcast(c)   ((void)(c))
#define crpci_thread_wait(c, m, us) ((void)(c), (void)(m), (void)(us))
#define crpci_thread_self()         ((crpci_thread)0)
#define crpci_thread_is_self(t)     ((void)(t), true)
#endif

/* --- atomic counters and flags: 32 bits wide, for which no Linux target needs libatomic ------- */

/* Takes one more reference of an object on which the caller has one already. */
CRPCI_FN void crpci_thread_ref(uint32_t *n)
{
    __atomic_fetch_add(n, 1, __ATOMIC_RELAXED);
}

CRPCI_FN void crpci_thread_add(uint32_t *n, uint32_t count)
{
    __atomic_fetch_add(n, count, __ATOMIC_ACQ_REL);
}

/* Gives up the caller's reference; true: it was the last one. A count of 1 needs no atomic
 * subtraction: the only reference is the caller's, so no other thread can change the count. */
CRPCI_FN bool crpci_thread_unref(uint32_t *n)
{
    return __atomic_load_n(n, __ATOMIC_ACQUIRE) == 1 ||
           __atomic_sub_fetch(n, 1, __ATOMIC_ACQ_REL) == 0;
}

CRPCI_FN uint32_t crpci_thread_load(const uint32_t *n)
{
    return __atomic_load_n(n, __ATOMIC_ACQUIRE);
}

CRPCI_FN void crpci_thread_store(uint32_t *n, uint32_t v)
{
    __atomic_store_n(n, v, __ATOMIC_RELEASE);
}

/* ======================================================================== */
/* >>impl-status   names and texts of status codes                          */
/* ======================================================================== */

CRPC_API const char *crpc_version(void)
{
    return CRPC_VERSION;
}

CRPC_API const char *crpc_zookeeper_driver(void)
{
    return !CRPC_ENABLE_ZOOKEEPER ? "none" : CRPC_ZOOKEEPER_ST ? "st" : "mt";
}

/* A literal that explains something: only in a build with texts is it in the object. */
#define CRPCI_STATUS_TEXT(text) (CRPC_ENABLE_TEXTS ? (text) : "")

/* The name of a code; its text stands behind the terminating zero. One string of all names and
 * texts is smaller than two switches, and an array of pointers would have to be relocated in a
 * shared library. NULL: no such code. */
CRPCI_COLD const char *crpci_status_entry(int status)
{
#define CRPCI_STATUS_NUMBER(name, number, text) number,
#if CRPC_ENABLE_TEXTS
#define CRPCI_STATUS_ENTRY(name, number, text) #name "\0" text "\0"
#else
#define CRPCI_STATUS_ENTRY(name, number, text) #name "\0"
#endif
    static const uint16_t numbers[] = {CRPC_STATUS_MAP(CRPCI_STATUS_NUMBER)};
    const char *entry = CRPC_STATUS_MAP(CRPCI_STATUS_ENTRY);
#undef CRPCI_STATUS_NUMBER
#undef CRPCI_STATUS_ENTRY
    size_t i;
    for (i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (numbers[i] == status)
            return entry;
        entry += strlen(entry) + 1; /* the name */
        if (CRPC_ENABLE_TEXTS)
            entry += strlen(entry) + 1; /* the text */
    }
    return NULL;
}

CRPC_API const char *crpc_status_name(int status)
{
    const char *name = crpci_status_entry(status);
    return name ? name : "E?";
}

CRPC_API const char *crpc_status_text(int status)
{
    const char *name = crpci_status_entry(status);
    if (!CRPC_ENABLE_TEXTS)
        return crpc_status_name(status);
    return name ? name + strlen(name) + 1 : "unknown error";
}

/* Whether a code is one that foreign peers use for their own errors: errno values and the numbers
 * of RPC frameworks. All others are applications' codes. */
CRPCI_FN bool crpci_status_reserved(int code)
{
    return (code >= 0 && code <= 199) || (code >= 1000 && code <= 3999);
}

/* crpci_status_set describes an error that happened on this side before any attempt, and returns
 * its code; `error` may be NULL. crpci_status_explain writes the text of an error whose code is
 * set, crpci_status_format writes a cause into a buffer, as snprintf does. Without texts an error
 * says the name of its code and a cause is empty; the compiler checks the arguments then, but
 * neither evaluates them nor puts them into the object. */
#if CRPC_ENABLE_TEXTS
#define crpci_status_format              snprintf
#define crpci_status_explain(error, ...) snprintf((error)->text, sizeof(error)->text, __VA_ARGS__)

CRPCI_COLD CRPC_PRINTF(3, 4) int crpci_status_set(crpc_error *error, int code, const char *format,
                                                  ...)
{
    va_list ap;
    if (!error)
        return code;
    memset(error, 0, sizeof *error);
    error->code = code;
    va_start(ap, format);
    vsnprintf(error->text, sizeof error->text, format, ap);
    va_end(ap);
    return code;
}
#else
#define crpci_status_format(out, size, ...)                                                        \
    ((void)(0 ? snprintf(out, size, __VA_ARGS__) : (*(out) = '\0')))
#define crpci_status_explain(error, ...)                                                           \
    ((void)(0 ? (void)printf(__VA_ARGS__) : crpci_status_explain_name(error)))
#define crpci_status_set(error, code, ...)                                                         \
    (0 ? printf(__VA_ARGS__) : crpci_status_set_name(error, code))

CRPCI_COLD void crpci_status_explain_name(crpc_error *error)
{
    snprintf(error->text, sizeof error->text, "%s", crpc_status_name(error->code));
}

CRPCI_COLD int crpci_status_set_name(crpc_error *error, int code)
{
    if (!error)
        return code;
    memset(error, 0, sizeof *error);
    error->code = code;
    crpci_status_explain_name(error);
    return code;
}
#endif

/* ======================================================================== */
/* >>impl-heap   memory, log and clock of a loop and of all objects on it    */
/* ======================================================================== */

/* All bytes that are sent or received lie in chunks: blocks with a reference count, a power of two
 * in size, which the heap keeps for reuse in one list for each size. A chunk has a reference on its
 * heap, because it may outlive the loop: a crpc_call can hold one. The heap has its own mutex,
 * which is the innermost lock of all. */
#define CRPCI_CHUNK_MIN 256u
#define CRPCI_CHUNK_CLASSES 14u /* 256 bytes to 2 MiB; larger ones are never kept */
#define CRPCI_CHUNK_BIG (CRPCI_CHUNK_MIN << (CRPCI_CHUNK_CLASSES - 1))
#define CRPCI_HEAP_KEEP (256u << 10) /* bytes of each size that are kept whatever the load was */

typedef struct crpci_chunk crpci_chunk;
/* Chunks of one size. Those in use and those kept together shall be half as many again as were in
 * use at one time in the recent past. A steady load then finds every chunk kept, and the chunks
 * that a burst took are freed when lighter work follows. */
typedef struct crpci_heap_class {
    crpci_chunk *kept;
    uint32_t kept_count;
    uint32_t used;
    uint64_t recent; /* the most that were in use at a time, fading with each chunk given back; in
                      * 1/65536 of a chunk */
} crpci_heap_class;

typedef struct crpci_heap {
    crpc_hooks hooks;
    crpci_mutex lock;
    uint32_t refs; /* under the lock, which taking or giving a chunk needs anyway */
    size_t limit; /* of chunk_bytes; 0: no limit */
    size_t chunk_bytes; /* in chunks that are in use */
    size_t kept_bytes;  /* in chunks that wait for reuse */
    size_t bytes;       /* everything */
    size_t peak;        /* the most that `bytes` ever was */
    crpci_heap_class classes[CRPCI_CHUNK_CLASSES];
#if CRPC_DEBUG
    void *closed; /* handles of objects that are gone, see crpci_heap_retire */
#endif
} crpci_heap;

struct crpci_chunk {
    crpci_heap *heap;
    crpci_chunk *next;
    uint32_t refs;
    uint32_t size_class; /* CRPCI_CHUNK_CLASSES: too large to be kept */
    size_t cap;          /* bytes behind the header */
};

/* The bytes behind the header are aligned for any type, on 32-bit targets too. */
#define CRPCI_CHUNK_HEADER ((sizeof(crpci_chunk) + 15) & ~(size_t)15)

CRPCI_FN uint8_t *crpci_heap_data(crpci_chunk *c)
{
    return (uint8_t *)c + CRPCI_CHUNK_HEADER;
}

CRPCI_FN void *crpci_heap_default_resize(void *user, void *ptr, size_t old_size, size_t new_size)
{
    (void)user;
    (void)old_size;
    if (new_size)
        return CRPC_REALLOC(ptr, new_size);
    CRPC_FREE(ptr);
    return NULL;
}

/* The default log hook: a line on stderr that begins with the level's letter. */
CRPCI_COLD void crpci_heap_default_log(void *user, int level, const char *line)
{
    static const char letters[] = "?EWID";
    (void)user;
    fprintf(stderr, "crpc %c %s\n", letters[level >= 1 && level <= 4 ? level : 0], line);
}

CRPCI_FN int64_t crpci_heap_micros(const struct timespec *ts)
{
    return (int64_t)ts->tv_sec * 1000000 + (int32_t)ts->tv_nsec / 1000;
}

CRPCI_FN int64_t crpci_heap_default_clock(void *user)
{
    struct timespec ts;
    (void)user;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return crpci_heap_micros(&ts);
}

CRPCI_FN int64_t crpci_heap_now(const crpci_heap *h)
{
    return h->hooks.clock_us(h->hooks.user);
}

/* The same clock as of the kernel's last tick: 1 to 10 ms behind, never ahead. Reading it is a load
 * from memory; the exact clock reads a counter of the processor, which takes longer than everything
 * else that is done to compare a deadline, in a virtual machine many times longer. */
CRPCI_FN int64_t crpci_heap_rough_now(const crpci_heap *h)
{
    struct timespec ts;
    if (h->hooks.clock_us != crpci_heap_default_clock ||
        clock_gettime(CLOCK_MONOTONIC_COARSE, &ts)) /* Linux before 2.6.32 */
        return crpci_heap_now(h);
    return crpci_heap_micros(&ts);
}

#if CRPC_ENABLE_TEXTS
CRPCI_COLD CRPC_PRINTF(3, 4) void crpci_heap_log(crpci_heap *h, int level, const char *format, ...)
{
    char line[512];
    va_list ap;
    if (level > h->hooks.log_level)
        return;
    va_start(ap, format);
    vsnprintf(line, sizeof line, format, ap);
    va_end(ap);
    h->hooks.log(h->hooks.user, level, line);
}
#else
/* Where the text would be there is the number of the line that logs, in this file. */
#define crpci_heap_log(h, level, ...)                                                              \
    (0 ? (void)printf(__VA_ARGS__) : crpci_heap_log_line(h, level, __LINE__))

CRPCI_COLD void crpci_heap_log_line(crpci_heap *h, int level, int number)
{
    char line[24];
    if (level > h->hooks.log_level)
        return;
    snprintf(line, sizeof line, "crpc.h:%d", number);
    h->hooks.log(h->hooks.user, level, line);
}
#endif

/* Whether the system call that has just failed is missing from the kernel or forbidden by a sandbox
 * (errno ENOSYS or EPERM), so that another one has to do. The log tells which. */
CRPCI_COLD bool crpci_heap_refused(crpci_heap *h, const char *call, const char *instead)
{
    if (errno != ENOSYS && errno != EPERM)
        return false;
    crpci_heap_log(h, CRPC_LOG_INFO, "loop: %s: %s; %s is used instead", call,
                   errno == ENOSYS ? "ENOSYS" : "EPERM", instead);
    return true;
}

CRPCI_FN void *crpci_heap_resize_locked(crpci_heap *h, void *ptr, size_t old_size, size_t new_size)
{
    void *out;
    CRPCI_ASSERT(crpci_thread_holds(&h->lock), "the heap is not locked by this thread");
    out = h->hooks.resize(h->hooks.user, ptr, old_size, new_size);
    if (out || !new_size) {
        h->bytes += new_size - old_size;
        if (h->bytes > h->peak)
            h->peak = h->bytes;
    }
    return out;
}

/* realloc for callers that know the old size; new bytes are zero. NULL: out of memory, the old
 * block stays as it is. */
CRPCI_FN void *crpci_heap_resize(crpci_heap *h, void *ptr, size_t old_size, size_t new_size)
{
    void *out;
    if (!new_size && !ptr)
        return NULL;
    crpci_thread_lock(&h->lock);
    out = crpci_heap_resize_locked(h, ptr, old_size, new_size);
    crpci_thread_unlock(&h->lock);
    if (out && new_size > old_size)
        memset((char *)out + old_size, 0, new_size - old_size);
    return out;
}

CRPCI_FN void *crpci_heap_alloc(crpci_heap *h, size_t size)
{
    return crpci_heap_resize(h, NULL, 0, size);
}

CRPCI_FN void crpci_heap_free(crpci_heap *h, void *ptr, size_t size)
{
    if (ptr)
        crpci_heap_resize(h, ptr, size, 0);
}

CRPCI_FN char *crpci_heap_strndup(crpci_heap *h, const char *text, size_t len)
{
    char *copy = (char *)crpci_heap_alloc(h, len + 1);
    if (copy)
        memcpy(copy, text, len);
    return copy;
}

CRPCI_FN void crpci_heap_strfree(crpci_heap *h, char *text)
{
    if (text)
        crpci_heap_free(h, text, strlen(text) + 1);
}

/* What an object that the program closes begins with, where CRPC_DEBUG is 1. */
typedef struct crpci_handle {
    const char *open; /* NULL: closed */
    struct crpci_handle *next;
    size_t size;
} crpci_handle;

#define CRPCI_HANDLE_IS_OPEN "crpc handle"
#if CRPC_DEBUG
#define CRPCI_HANDLE              crpci_handle handle;
#define CRPCI_HANDLE_OPEN(object) ((object)->handle.open = CRPCI_HANDLE_IS_OPEN)
#define CRPCI_HANDLE_CHECK(object)                                                                 \
    CRPCI_DEMAND(__atomic_load_n(&(object)->handle.open, __ATOMIC_RELAXED),                        \
                 "the object is closed already") /* another thread may be closing it right now */
#define CRPCI_HANDLE_CLOSE(object)                                                                 \
    CRPCI_DEMAND(                                                                                  \
        __atomic_exchange_n(&(object)->handle.open, (const char *)NULL, __ATOMIC_RELAXED),         \
        "the object is closed already")
#else
#define CRPCI_HANDLE
#define CRPCI_HANDLE_OPEN(object)  ((void)0)
#define CRPCI_HANDLE_CHECK(object) ((void)0)
#define CRPCI_HANDLE_CLOSE(object) ((void)0)
#endif

/* Frees a closed object of which the program may still have the address. Where CRPC_DEBUG is 1 the
 * memory stays, poisoned but for its handle, until the heap goes with its loop. */
CRPCI_FN void crpci_heap_retire(crpci_heap *h, void *object, size_t size)
{
#if CRPC_DEBUG
    crpci_handle *handle = (crpci_handle *)object;
    memset(object, 0xdb, size);
    handle->open = NULL;
    handle->size = size;
    crpci_thread_lock(&h->lock);
    handle->next = (crpci_handle *)h->closed;
    h->closed = handle;
    crpci_thread_unlock(&h->lock);
#else
    crpci_heap_free(h, object, size);
#endif
}

/* A text as long as it needs to be, for crpci_heap_strfree. NULL: out of memory. */
CRPCI_COLD CRPC_PRINTF(2, 3) char *crpci_heap_format(crpci_heap *h, const char *format, ...)
{
    va_list args;
    int n;
    char *out;
    va_start(args, format);
    n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    out = n < 0 ? NULL : (char *)crpci_heap_alloc(h, (size_t)n + 1);
    if (!out)
        return NULL;
    va_start(args, format);
    vsnprintf(out, (size_t)n + 1, format, args);
    va_end(args);
    return out;
}

/* Makes a heap with one reference; hooks may be NULL. limit: bytes in chunks, 0: none. */
CRPCI_FN int crpci_heap_open(crpci_heap **out, const crpc_hooks *hooks, int64_t limit)
{
    crpc_hooks k;
    crpci_heap *h;
    memset(&k, 0, sizeof k);
    if (hooks)
        k = *hooks;
    if (!k.resize)
        k.resize = crpci_heap_default_resize;
    if (!k.log)
        k.log = crpci_heap_default_log;
    if (!k.clock_us)
        k.clock_us = crpci_heap_default_clock;
    k.log_level = (int)crpci_base_option(k.log_level, CRPC_LOG_WARN, 0);
    *out = NULL;
    h = (crpci_heap *)k.resize(k.user, NULL, 0, sizeof *h);
    if (!h)
        return CRPC_ENOMEM;
    memset(h, 0, sizeof *h);
    h->hooks = k;
    h->limit = (size_t)crpci_base_min64(limit, PTRDIFF_MAX);
    h->refs = 1;
    h->bytes = h->peak = sizeof *h;
    if (crpci_thread_mutex_init(&h->lock)) {
        k.resize(k.user, h, sizeof *h, 0);
        return CRPC_ENOMEM;
    }
    *out = h;
    return CRPC_OK;
}

/* Frees all chunks that are kept for reuse. The heap is locked. */
CRPCI_FN void crpci_heap_trim(crpci_heap *h)
{
    crpci_chunk *c;
    unsigned i;
    for (i = 0; i < CRPCI_CHUNK_CLASSES; i++) {
        while ((c = h->classes[i].kept) != NULL) {
            h->classes[i].kept = c->next;
            crpci_heap_resize_locked(h, c, c->cap + CRPCI_CHUNK_HEADER, 0);
        }
    }
    h->kept_bytes = 0;
}

CRPCI_FN void crpci_heap_ref(crpci_heap *h)
{
    crpci_thread_lock(&h->lock);
    h->refs++;
    crpci_thread_unlock(&h->lock);
}

/* Gives up a reference and unlocks; the last one frees the heap. */
CRPCI_FN void crpci_heap_unlock_unref(crpci_heap *h)
{
    crpc_hooks k;
    if (CRPCI_LIKELY(--h->refs)) {
        crpci_thread_unlock(&h->lock);
        return;
    }
    k = h->hooks;
    crpci_heap_trim(h);
#if CRPC_DEBUG
    while (h->closed) {
        crpci_handle *handle = (crpci_handle *)h->closed;
        h->closed = handle->next;
        k.resize(k.user, handle, handle->size, 0);
    }
#endif
    crpci_thread_unlock(&h->lock);
    crpci_thread_mutex_free(&h->lock);
    k.resize(k.user, h, sizeof *h, 0);
}

CRPCI_FN void crpci_heap_unref(crpci_heap *h)
{
    crpci_thread_lock(&h->lock);
    crpci_heap_unlock_unref(h);
}

/* The list for chunks of so many bytes with their header: class k holds those of 256 << k bytes.
 * CRPCI_CHUNK_CLASSES: they are too large to be kept. */
CRPCI_FN unsigned crpci_heap_class_of(size_t total)
{
    if (total <= CRPCI_CHUNK_MIN)
        return 0;
    if (total > CRPCI_CHUNK_BIG)
        return CRPCI_CHUNK_CLASSES;
    return 32u - (unsigned)__builtin_clz((unsigned)(total - 1) / CRPCI_CHUNK_MIN);
}

/* A chunk of a class: one that was kept, else a new one. The heap is locked. */
CRPCI_FN crpci_chunk *crpci_heap_take(crpci_heap *h, crpci_heap_class *k, size_t total)
{
    crpci_chunk *c = k->kept;
    if (CRPCI_LIKELY(c != NULL)) {
        k->kept = c->next;
        k->kept_count--;
        h->kept_bytes -= total;
    } else {
        c = (crpci_chunk *)crpci_heap_resize_locked(h, NULL, 0, total);
    }
    if (c && (uint64_t)++k->used << 16 > k->recent)
        k->recent = (uint64_t)k->used << 16;
    return c;
}

/* Keeps a chunk for reuse, and frees those of its class that the recent load did not need. Called
 * with the heap locked. */
CRPCI_FN void crpci_heap_give(crpci_heap *h, crpci_heap_class *k, crpci_chunk *c, size_t total)
{
    uint64_t enough;
    k->recent -= k->recent >> 16; /* fades to 1/e in 65536 chunks given back */
    enough = (k->recent + k->recent / 2) >> 16;
    k->used--;
    c->next = k->kept;
    k->kept = c;
    k->kept_count++;
    h->kept_bytes += total;
    while (CRPCI_UNLIKELY(k->used + k->kept_count > enough) &&
           k->kept_count * total > CRPCI_HEAP_KEEP) {
        c = k->kept;
        k->kept = c->next;
        k->kept_count--;
        h->kept_bytes -= total;
        crpci_heap_resize_locked(h, c, total, 0);
    }
}

/* A chunk with one reference and room for at least `size` bytes, not cleared. NULL: out of memory,
 * or over the heap's limit. */
CRPCI_FN crpci_chunk *crpci_heap_chunk(crpci_heap *h, size_t size)
{
    unsigned k = crpci_heap_class_of(size + CRPCI_CHUNK_HEADER);
    size_t total = k < CRPCI_CHUNK_CLASSES ? (size_t)CRPCI_CHUNK_MIN << k
                                           : size + CRPCI_CHUNK_HEADER;
    crpci_chunk *c = NULL;
    if (total < size)
        return NULL;
    crpci_thread_lock(&h->lock);
    if (!h->limit || (h->chunk_bytes <= h->limit && total <= h->limit - h->chunk_bytes))
        c = k < CRPCI_CHUNK_CLASSES
                ? crpci_heap_take(h, &h->classes[k], total)
                : (crpci_chunk *)crpci_heap_resize_locked(h, NULL, 0, total);
    if (c) {
        h->chunk_bytes += total;
        h->refs++;
    }
    crpci_thread_unlock(&h->lock);
    if (!c)
        return NULL;
    c->heap = h;
    c->next = NULL;
    c->refs = 1;
    c->size_class = k;
    c->cap = total - CRPCI_CHUNK_HEADER;
    return c;
}

CRPCI_FN void crpci_heap_chunk_ref(crpci_chunk *c)
{
    crpci_thread_ref(&c->refs);
}

/* Gives up a reference of a chunk, on any thread, with or without the loop's lock. NULL is
 * ignored. */
CRPCI_FN void crpci_heap_chunk_unref(crpci_chunk *c)
{
    crpci_heap *h;
    size_t total;
    if (!c || !crpci_thread_unref(&c->refs))
        return;
    h = c->heap;
    total = c->cap + CRPCI_CHUNK_HEADER;
    crpci_thread_lock(&h->lock);
    h->chunk_bytes -= total;
    if (c->size_class < CRPCI_CHUNK_CLASSES)
        crpci_heap_give(h, &h->classes[c->size_class], c, total);
    else
        crpci_heap_resize_locked(h, c, total, 0);
    crpci_heap_unlock_unref(h);
}

/* ======================================================================== */
/* >>impl-id   {generation, index} ids of objects that may be gone when they are used */
/* ======================================================================== */

/* An id is the slot's generation in the upper 32 bits and its index in the lower ones. Each use of
 * a slot has a generation of its own, so an id finds its object or nothing, never the slot's next
 * object. A table is not locked by itself. */
typedef struct crpci_id_slot {
    void *object;        /* NULL: the slot is free */
    uint32_t generation; /* of the present or last use; 0: it was never used */
    uint32_t next_free;  /* index + 1 of the next free slot; 0: it is the last */
} crpci_id_slot;

/* All zero at first, but for the salt. */
typedef struct crpci_id_table {
    crpci_id_slot *slots;
    uint32_t cap;
    uint32_t used;
    uint32_t free_head; /* index + 1; first in, first out, so that an index is reused late */
    uint32_t free_tail;
    uint32_t salt; /* xor of index and id: an id of another table is, almost surely, no id here */
} crpci_id_table;

/* Appends a slot to the free ones. */
CRPCI_FN void crpci_id_release(crpci_id_table *t, uint32_t index)
{
    t->slots[index].object = NULL;
    t->slots[index].next_free = 0;
    if (t->free_tail)
        t->slots[t->free_tail - 1].next_free = index + 1;
    else
        t->free_head = index + 1;
    t->free_tail = index + 1;
}

CRPCI_FN int crpci_id_grow(crpci_id_table *t, crpci_heap *h)
{
    uint32_t cap = t->cap ? t->cap * 2 : 16, i;
    crpci_id_slot *slots;
    if (cap > (1u << 28))
        return CRPC_ENOMEM;
    slots = (crpci_id_slot *)crpci_heap_resize(h, t->slots, t->cap * sizeof *slots,
                                               cap * sizeof *slots);
    if (!slots)
        return CRPC_ENOMEM;
    t->slots = slots;
    for (i = t->cap; i < cap; i++)
        crpci_id_release(t, i);
    t->cap = cap;
    return CRPC_OK;
}

/* Gives an object an id, which is never 0. */
CRPCI_FN int crpci_id_add(crpci_id_table *t, crpci_heap *h, void *object, uint64_t *id)
{
    crpci_id_slot *s;
    uint32_t index;
    if (!t->free_head && crpci_id_grow(t, h))
        return CRPC_ENOMEM;
    index = t->free_head - 1;
    s = &t->slots[index];
    t->free_head = s->next_free;
    if (!t->free_head)
        t->free_tail = 0;
    if (++s->generation == 0)
        s->generation = 1;
    s->object = object;
    t->used++;
    *id = (uint64_t)s->generation << 32 | (index ^ t->salt);
    return CRPC_OK;
}

/* The object of an id; NULL: it was removed, or the id is from elsewhere. */
CRPCI_FN void *crpci_id_get(const crpci_id_table *t, uint64_t id)
{
    uint32_t index = (uint32_t)id ^ t->salt;
    if (index >= t->cap || t->slots[index].generation != (uint32_t)(id >> 32))
        return NULL;
    return t->slots[index].object;
}

/* Takes an id's validity; one that names nothing is ignored. */
CRPCI_FN void crpci_id_remove(crpci_id_table *t, uint64_t id)
{
    if (!crpci_id_get(t, id))
        return;
    crpci_id_release(t, (uint32_t)id ^ t->salt);
    t->used--;
}

CRPCI_FN void crpci_id_free(crpci_id_table *t, crpci_heap *h)
{
    crpci_heap_free(h, t->slots, t->cap * sizeof *t->slots);
    memset(t, 0, sizeof *t);
}

/* ======================================================================== */
/* >>impl-list   doubly linked lists through members of the items            */
/* ======================================================================== */

/* A ring: the head of a list and the link in an item are of one type. A link that is in no list
 * points to itself, so removing it again is harmless. */
typedef struct crpci_list {
    struct crpci_list *next;
    struct crpci_list *prev;
} crpci_list;

CRPCI_FN void crpci_list_init(crpci_list *l)
{
    l->next = l->prev = l;
}

/* Whether a list has no item, or an item's link is in no list. */
CRPCI_FN bool crpci_list_empty(const crpci_list *l)
{
    return l->next == l;
}

CRPCI_FN void crpci_list_append(crpci_list *head, crpci_list *item)
{
    item->prev = head->prev;
    item->next = head;
    head->prev->next = item;
    head->prev = item;
}

/* Takes an item out of the list that it is in, if any. */
CRPCI_FN void crpci_list_remove(crpci_list *item)
{
    item->prev->next = item->next;
    item->next->prev = item->prev;
    crpci_list_init(item);
}

/* Moves all items of `from` to `to`, which had none or was not initialised. */
CRPCI_FN void crpci_list_move(crpci_list *to, crpci_list *from)
{
    crpci_list_init(to);
    if (crpci_list_empty(from))
        return;
    *to = *from;
    to->next->prev = to->prev->next = to;
    crpci_list_init(from);
}

/* Makes the empty lists of a hash table. NULL: out of memory. */
CRPCI_COLD crpci_list *crpci_list_table(crpci_heap *h, size_t count)
{
    crpci_list *table = (crpci_list *)crpci_heap_alloc(h, count * sizeof *table);
    size_t i;
    for (i = 0; table && i < count; i++)
        crpci_list_init(&table[i]);
    return table;
}

/* ======================================================================== */
/* >>impl-url   URLs, their options, percent-encoding                        */
/* ======================================================================== */

/* Channels, servers and registries parse the URLs that programs and operators write with this
 * section. It allocates one copy of the text and uses no lock, so any thread may call it. */

#define CRPCI_URL_MAX 2048u /* bytes, the final zero included */

/* scheme://authority/path?query, split in place in a copy on the heap. The caller owns it and frees
 * it with crpci_url_free. */
typedef struct crpci_url {
    crpci_heap *heap;
    char *text; /* NULL: not a URL */
    size_t size;
    char *scheme;
    char *authority; /* "" if there is none */
    char *path;      /* without the leading slash, "" if there is none; unix: the whole path */
    char *query;     /* the part that crpci_url_next has not returned yet */
} crpci_url;

/* Also accepts a URL that has been freed already, or that failed to parse. */
CRPCI_COLD void crpci_url_free(crpci_url *u)
{
    crpci_heap_free(u->heap, u->text, u->size);
    u->text = NULL;
}

/* Splits a copy of `text`. After a failure there is nothing to be freed. A unix:// URL has a path
 * and no authority, so that "@name" and relative paths survive as they are. */
CRPCI_COLD int crpci_url_parse(crpci_url *u, crpci_heap *h, const char *text, crpc_error *error)
{
    size_t len = text ? strlen(text) : 0;
    const char *colon = text ? strstr(text, "://") : NULL;
    bool is_unix;
    char *p;
    memset(u, 0, sizeof *u);
    if (!text || len >= CRPCI_URL_MAX)
        return crpci_status_set(error, CRPC_EINVAL, "URL of %zu bytes: the limit is %u", len,
                                CRPCI_URL_MAX - 1);
    if (!colon || colon == text)
        return crpci_status_set(error, CRPC_EINVAL, "not a URL (scheme://...): \"%.100s\"", text);
    is_unix = strncmp(text, "unix://", 7) == 0;
    if (is_unix && strcspn(text + 7, "?") <= (size_t)(text[7] == '/'))
        return crpci_status_set(error, CRPC_EINVAL,
                                "%.100s: no path; expected unix:///path, or "
                                "unix://@name for an abstract socket",
                                text);
    u->heap = h;
    u->size = len + 1;
    u->text = (char *)crpci_heap_alloc(h, u->size);
    if (!u->text)
        return crpci_status_set(error, CRPC_ENOMEM, "%.100s: out of memory", text);
    memcpy(u->text, text, len + 1);
    u->scheme = u->text;
    u->authority = u->text + (colon - text) + 3;
    u->authority[-3] = '\0';
    u->query = strchr(u->authority, '?');
    if (u->query)
        *u->query++ = '\0';
    else
        u->query = u->text + len;
    if (is_unix) {
        u->path = u->authority;
        u->authority = u->text + len;
        return CRPC_OK;
    }
    p = strchr(u->authority, '/');
    u->path = p ? p + 1 : u->text + len;
    if (p)
        *p = '\0';
    return CRPC_OK;
}

/* The value of a hexadecimal digit; -1: not one. */
CRPCI_FN int crpci_url_hex(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* Decodes %XX and '+' in place. Returns false if a %XX is malformed, or stands for a zero byte,
 * which would cut the text short unnoticed. */
CRPCI_FN bool crpci_url_decode(char *text)
{
    char *out = text;
    for (; *text; text++) {
        int hi, lo;
        if (*text != '%') {
            *out++ = *text == '+' ? ' ' : *text;
            continue;
        }
        hi = crpci_url_hex(text[1]);
        lo = hi < 0 ? -1 : crpci_url_hex(text[2]);
        if (lo < 0 || (hi == 0 && lo == 0))
            return false;
        *out++ = (char)(hi << 4 | lo);
        text += 2;
    }
    *out = '\0';
    return true;
}

/* Encodes as Java's URLEncoder does, because Dubbo names its znodes with it. Returns the length
 * that the whole text needs; `out` holds as much of it as fits, always terminated. */
CRPCI_FN size_t crpci_url_encode(char *out, size_t size, const char *text)
{
    static const char digits[] = "0123456789ABCDEF";
    size_t n = 0;
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        char enc[3];
        size_t len = 1, i;
        enc[0] = (char)c;
        if (c == ' ') {
            enc[0] = '+';
        } else if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                     strchr(".-*_", c))) {
            enc[0] = '%';
            enc[1] = digits[c >> 4];
            enc[2] = digits[c & 15];
            len = 3;
        }
        for (i = 0; i < len; i++, n++) {
            if (n + 1 < size)
                out[n] = enc[i];
        }
    }
    if (size)
        out[n < size ? n : size - 1] = '\0';
    return n;
}

/* Takes the next key=value from the query and decodes it in place. Returns CRPC_EPENDING at the
 * end. A key that is given twice is an error, because one of the two values would be ignored. */
CRPCI_FN int crpci_url_next(crpci_url *u, char **key, char **value, crpc_error *error)
{
    const char *again;
    char *end;
    size_t n;
    while (*u->query == '&')
        u->query++;
    if (!*u->query)
        return CRPC_EPENDING;
    *key = u->query;
    end = strchr(u->query, '&');
    u->query = end ? end + 1 : u->query + strlen(u->query);
    if (end)
        *end = '\0';
    *value = strchr(*key, '=');
    if (*value)
        *(*value)++ = '\0';
    if (!*value || !crpci_url_decode(*key) || !crpci_url_decode(*value))
        return crpci_status_set(error, CRPC_EINVAL,
                                "URL option \"%.60s\" is not key=value, or a %%XX in it is not two "
                                "hexadecimal digits",
                                *key);
    n = strlen(*key);
    for (again = u->query; again; again = strchr(again, '&')) {
        again += *again == '&';
        if (strncmp(again, *key, n) == 0 && again[n] == '=')
            return crpci_status_set(error, CRPC_EINVAL, "URL option %.60s is given twice", *key);
    }
    return CRPC_OK;
}

/* Reads a whole decimal number from -1 to `max`; anything else returns false. One that is too large
 * for an int64_t counts as INT64_MAX. */
CRPCI_FN bool crpci_url_number(const char *text, int64_t max, int64_t *out)
{
    char *end;
    long long v = strtoll(text, &end, 10);
    if (!((*text >= '0' && *text <= '9') || *text == '-') || *end || v < -1 || v > max)
        return false;
    *out = v;
    return true;
}

/* ======================================================================== */
/* >>impl-options   tables of options: defaults, ranges, URL keys, key=value lines */
/* ======================================================================== */

/* Each options struct has one table, in the section that opens the object. A row states an option's
 * default, its limits and its URL key; nothing else in the code repeats them. The functions here
 * read URLs and key=value lines into a struct, check it, and replace 0 and -1 by what they stand
 * for. They run while an object is opened, on the opening thread, and need no lock. */

#define CRPCI_OPTION_ANY INT32_C(-1) /* as `most`: any value that fits into the member */

enum {
    CRPCI_OPTION_TEXT = 1,      /* the member is a const char *; without this flag, a number */
    CRPCI_OPTION_SECRET = 2,    /* no URL may set it, no error text may show it */
    CRPCI_OPTION_DIRECTORY = 4, /* only a URL that names a registry may set it */
    CRPCI_OPTION_BACKEND = 8,   /* only a URL whose kind of registry knows it may set it */
    CRPCI_OPTION_POLICY = 16,   /* an error unless CRPC_ENABLE_POLICY is 1 */
    CRPCI_OPTION_WORDS = 32,    /* users write a word, see crpci_options_words */
    CRPCI_OPTION_STACK = 64     /* a thread's stack: CRPCI_OPTION_STACK_MIN bytes at least */
};

#define CRPCI_OPTION_STACK_MIN 16384 /* Linux gives no thread less */

/* One row: how users spell an option, where its member is, and which values it may have. */
typedef struct crpci_option {
    const char *name; /* as users spell it */
    uint16_t offset;  /* in the options struct */
    uint8_t size;     /* of the member in bytes: of an int, an int64_t or a pointer */
    uint8_t flags;    /* CRPCI_OPTION_* */
    int32_t zero;     /* the value that 0 stands for: the default */
    int32_t none;     /* the value that -1 stands for: "no limit", "never" */
    int32_t most;     /* the largest value; the smallest besides 0 and -1 is 1 */
} crpci_option;

typedef struct crpci_options {
    const crpci_option *rows;
    size_t count;
} crpci_options;

#define CRPCI_OPTION_ROW(type, member, name, flags, zero, none, most)                              \
    {name, offsetof(type, member), sizeof(((type *)0)->member), flags, zero, none, most}
#define CRPCI_OPTIONS_OF(rows) rows, sizeof(rows) / sizeof *(rows)

/* Reads a number. Members are int or int64_t; memcpy keeps this legal for any struct. */
CRPCI_COLD int64_t crpci_options_get(const crpci_option *o, const void *options)
{
    const char *at = (const char *)options + o->offset;
    int64_t wide;
    int narrow;
    memcpy(&wide, at, o->size == sizeof wide ? sizeof wide : 0);
    memcpy(&narrow, at, sizeof narrow);
    return o->size == sizeof wide ? wide : narrow;
}

/* Writes a number that has passed crpci_options_check_value. */
CRPCI_COLD void crpci_options_put(const crpci_option *o, void *options, int64_t value)
{
    char *at = (char *)options + o->offset;
    int narrow = (int)value;
    if (o->size == sizeof value)
        memcpy(at, &value, sizeof value);
    else
        memcpy(at, &narrow, sizeof narrow);
}

/* Checks one value against the option's range. The error names the option, the value and the
 * limit. */
CRPCI_COLD int crpci_options_check_value(const crpci_option *o, int64_t value, crpc_error *error)
{
    int64_t most = o->most;
    if (most == CRPCI_OPTION_ANY)
        most = o->size == sizeof(int64_t) ? INT64_MAX : INT32_MAX;
    if (value > 0 && !CRPC_ENABLE_POLICY && (o->flags & CRPCI_OPTION_POLICY))
        return crpci_status_set(error, CRPC_EUNSUPPORTED,
                                "%s=%lld: not compiled in: CRPC_ENABLE_POLICY is 0", o->name,
                                (long long)value);
    if (value > most)
        return crpci_status_set(error, CRPC_EINVAL, "%s=%lld: at most %lld", o->name,
                                (long long)value, (long long)most);
    if (value > 0 && value < CRPCI_OPTION_STACK_MIN && (o->flags & CRPCI_OPTION_STACK))
        return crpci_status_set(error, CRPC_EINVAL, "%s=%lld: at least %d", o->name,
                                (long long)value, CRPCI_OPTION_STACK_MIN);
    return CRPC_OK;
}

/* Checks the ranges of all numbers in a struct; the first one out of range is reported. */
CRPCI_COLD int crpci_options_check(const crpci_options *set, const void *options, crpc_error *error)
{
    size_t i;
    int err = CRPC_OK;
    for (i = 0; i < set->count && !err; i++) {
        const crpci_option *o = &set->rows[i];
        if (!(o->flags & CRPCI_OPTION_TEXT))
            err = crpci_options_check_value(o, crpci_options_get(o, options), error);
    }
    return err;
}

/* Replaces 0 and -1 by the values that they stand for. Runs last: until then 0 still means "not
 * set", so that a more specific setting can win. */
CRPCI_COLD void crpci_options_fill(const crpci_options *set, void *options)
{
    size_t i;
    for (i = 0; i < set->count; i++) {
        const crpci_option *o = &set->rows[i];
        if (!(o->flags & CRPCI_OPTION_TEXT))
            crpci_options_put(o, options,
                              crpci_base_option(crpci_options_get(o, options), o->zero, o->none));
    }
}

/* The row of a key; NULL: the table has no such option. */
CRPCI_COLD const crpci_option *crpci_options_find(const crpci_options *set, const char *key)
{
    size_t i;
    for (i = 0; i < set->count; i++) {
        if (strcmp(set->rows[i].name, key) == 0)
            return &set->rows[i];
    }
    return NULL;
}

/* The words of an option, each behind a comma; the first means 1. They stand behind the zero byte
 * of its name: few rows have any. */
CRPCI_COLD const char *crpci_options_words(const crpci_option *o)
{
    return o->name + strlen(o->name) + 1;
}

/* The position of `value` among such words, counted from 1; 0: it is none of them. */
CRPCI_COLD int64_t crpci_options_word(const char *words, const char *value)
{
    size_t n = strlen(value);
    int64_t i;
    for (i = 1; words; words = strchr(words + 1, ','), i++) {
        if (n && strncmp(words + 1, value, n) == 0 && (words[1 + n] == ',' || words[1 + n] == '\0'))
            return i;
    }
    return 0;
}

/* Reads the text of an option into its member. A text option points at `value` from then on, so the
 * caller must keep that memory. */
CRPCI_COLD int crpci_options_read(const crpci_option *o, void *options, const char *value,
                                  crpc_error *error)
{
    int64_t n;
    int err;
    if (o->flags & CRPCI_OPTION_TEXT) {
        memcpy((char *)options + o->offset, &value, sizeof value);
        return CRPC_OK;
    }
    if (o->flags & CRPCI_OPTION_WORDS) {
        n = crpci_options_word(crpci_options_words(o), value);
        if (!n)
            return crpci_status_set(error, CRPC_EINVAL, "%s=%.60s: not one of %s", o->name, value,
                                    crpci_options_words(o) + 1);
    } else if (!crpci_url_number(value, INT64_MAX, &n)) {
        return crpci_status_set(error, CRPC_EINVAL, "%s=%.60s: not a whole number from -1 on",
                                o->name, value);
    }
    err = crpci_options_check_value(o, n, error);
    if (!err)
        crpci_options_put(o, options, n);
    return err;
}

/* --- key=value lines -------------------------------------------------------------------------- */

/* A table, the struct that it describes, and which of its rows (64 at most) have been read. */
typedef struct crpci_options_target {
    const crpci_options *set;
    void *options;
    uint64_t seen;
} crpci_options_target;

/* Cuts blanks off both ends of a text, in place. */
CRPCI_COLD char *crpci_options_trim(char *text)
{
    size_t n;
    text += strspn(text, " \t\r");
    n = strlen(text);
    while (n && strchr(" \t\r", text[n - 1]))
        n--;
    text[n] = '\0';
    return text;
}

/* Reads one key=value line, whose outer blanks have been cut off, into the first table that has the
 * key. */
CRPCI_COLD int crpci_options_line(crpci_options_target *to, size_t count, char *line,
                                  crpc_error *error)
{
    char *value = strchr(line, '=');
    size_t i;
    if (!value) { /* what follows the first word may be a secret */
        line[strcspn(line, " \t:")] = '\0';
        return crpci_status_set(error, CRPC_EINVAL, "\"%.60s\" is not key=value", line);
    }
    *value = '\0';
    line = crpci_options_trim(line);
    value = crpci_options_trim(value + 1);
    for (i = 0; i < count; i++) {
        const crpci_option *o = crpci_options_find(to[i].set, line);
        uint64_t bit = o ? UINT64_C(1) << (o - to[i].set->rows) : 0;
        if (!o)
            continue;
        if (to[i].seen & bit)
            return crpci_status_set(error, CRPC_EINVAL, "%s: given twice", line);
        to[i].seen |= bit;
        return crpci_options_read(o, to[i].options, value, error);
    }
    return crpci_status_set(error, CRPC_EINVAL, "%.60s: no such option", line);
}

/* Reads key=value lines into the structs of several tables. When two tables have the same key, the
 * first table gets the value. Empty lines and lines that begin with # are skipped. */
CRPCI_COLD int crpci_options_lines(crpci_options_target *to, size_t count, char *text,
                                   crpc_error *error)
{
    crpc_error why;
    char *next;
    int number, err = CRPC_OK;
    for (number = 1; text && !err; number++, text = next) {
        next = strchr(text, '\n');
        if (next)
            *next++ = '\0';
        text = crpci_options_trim(text);
        if (*text && *text != '#')
            err = crpci_options_line(to, count, text, &why);
    }
    return err ? crpci_status_set(error, err, "line %d: %.230s", number - 1, why.text) : CRPC_OK;
}

/* ======================================================================== */
/* >>impl-message   requests and replies; nanopb: views, encoding, decoding  */
/* ======================================================================== */

/* Between protobuf structs and bytes. A crpci_message is a request or a reply independent of the
 * wire protocol; around it stand the calls into nanopb and the views, with which a decoded struct
 * points into the received bytes in place of copying them. All of this is pure and runs on any
 * thread, usually without a loop's lock. */

CRPC_API crpc_view crpc_view_str(const char *text)
{
    return crpc_view_of(text, text ? strlen(text) : 0);
}

CRPC_API bool crpc_view_equal(crpc_view v, const char *text)
{
    size_t n = crpc_view_size(v);
    return strlen(text) == n && (n == 0 || memcmp(crpc_view_data(v), text, n) == 0);
}

CRPC_API size_t crpc_view_copy(crpc_view v, char *out, size_t out_size)
{
    size_t n = crpc_view_size(v);
    if (out_size) {
        size_t fit = crpci_base_min(n, out_size - 1);
        if (fit)
            memcpy(out, crpc_view_data(v), fit);
        out[fit] = '\0';
    }
    return n;
}

/* A program's own array: at[1], which holds the tag of a received field, is NULL. */
CRPC_API crpc_views crpc_views_of(const crpc_view *items, size_t count)
{
    crpc_views v;
    v.at[0] = count ? items : NULL;
    v.at[1] = v.at[2] = NULL;
    v.end = count ? items + count : NULL;
    return v;
}

/* Reads a varint of at most 10 bytes. Returns the address behind it; NULL if it is cut off or too
 * long. */
CRPCI_FN const uint8_t *crpci_message_varint(const uint8_t *p, const uint8_t *end, uint64_t *value)
{
    uint64_t v = 0;
    unsigned shift = 0;
    for (; p < end; p++, shift += 7) {
        if (shift == 63 && *p > 1)
            return NULL;
        v |= (uint64_t)(*p & 0x7f) << shift;
        if (*p < 0x80) {
            *value = v;
            return p + 1;
        }
    }
    return NULL;
}

/* Writes a varint, 10 bytes at most, and returns the address behind it. */
CRPCI_FN uint8_t *crpci_message_put_varint(uint8_t *p, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        *p++ = (uint8_t)(v | 0x80);
    *p++ = (uint8_t)v;
    return p;
}

/* Skips the value of a field whose key has been read. Returns NULL if the value is cut off or is a
 * group, which proto3 no longer has. */
CRPCI_FN const uint8_t *crpci_message_skip(const uint8_t *p, const uint8_t *end, unsigned wire_type)
{
    uint64_t n = 0;
    switch (wire_type) {
    case 0:
        return crpci_message_varint(p, end, &n);
    case 1:
        n = 8;
        break;
    case 2:
        p = crpci_message_varint(p, end, &n);
        break;
    case 5:
        n = 4;
        break;
    default:
        return NULL;
    }
    return p && n <= (uint64_t)(end - p) ? p + n : NULL;
}

/* Walks a program's array, or the elements of a received field. A received crpc_views keeps the
 * first element between at[0] and at[2] and the field's key in at[1]; the other elements are found
 * by searching the message up to `end` for that key. */
CRPC_API bool crpc_views_next(const crpc_views *views, const void **cursor, crpc_view *item)
{
    const uint8_t *p = (const uint8_t *)(*cursor ? *cursor : views->at[0]);
    const uint8_t *end = (const uint8_t *)views->end;
    uint64_t key = 0, n = 0, tag = (uint64_t)(uintptr_t)views->at[1];
    if (!p)
        return false;
    if (!tag) {
        if (p >= end)
            return false;
        *item = *(const crpc_view *)(const void *)p;
        *cursor = p + sizeof(crpc_view);
        return true;
    }
    if (!*cursor) {
        *item = crpc_view_of(p, (size_t)((const uint8_t *)views->at[2] - p));
        *cursor = views->at[2];
        return true;
    }
    while (p && p < end) {
        p = crpci_message_varint(p, end, &key);
        if (p && key == tag) {
            p = crpci_message_varint(p, end, &n);
            if (!p || n > (uint64_t)(end - p))
                return false;
            *item = crpc_view_of(p, (size_t)n);
            *cursor = p + n;
            return true;
        }
        p = p ? crpci_message_skip(p, end, (unsigned)(key & 7)) : NULL;
    }
    return false;
}

/* The input stream of every decoding in crpc: bytes in memory. crpci_message_decode_view recognises
 * such a stream by this callback. nanopb hands a view's callback a stream over a stack buffer when
 * a hostile peer sends a number in place of a string, and a view must never point into that. */
CRPCI_FN bool crpci_message_read(pb_istream_t *stream, pb_byte_t *buf, size_t count)
{
    const pb_byte_t *from = (const pb_byte_t *)stream->state;
    stream->state = (pb_byte_t *)stream->state + count;
    if (buf)
        memcpy(buf, from, count);
    return true;
}

/* Opens an input stream over bytes, which must outlive it. */
CRPCI_FN void crpci_message_stream(pb_istream_t *s, const void *bytes, size_t size)
{
    union {
        const void *in;
        void *out;
    } cast; /* the state is never written through */
    cast.in = bytes;
    s->callback = crpci_message_read;
    s->state = cast.out;
    s->bytes_left = size;
    s->errmsg = NULL;
}

/* Whether crpc_views_next, continuing behind the last known element, arrives at the one at `start`.
 * It does not when the peer split the enclosing message in two, which protobuf would merge. */
CRPCI_FN bool crpci_message_continues(const crpc_views *views, const uint8_t *start, size_t n)
{
    crpc_views walk = *views;
    const void *cursor = views->end;
    crpc_view item = {{NULL}, NULL};
    walk.end = start + n;
    return crpc_views_next(&walk, &cursor, &item) && crpc_view_data(item) == (const char *)start;
}

/* Points a view at the received bytes. A repeated field only remembers where its elements begin and
 * end. */
CRPCI_FN bool crpci_message_decode_view(pb_istream_t *in, const pb_field_iter_t *field)
{
    const uint8_t *start = (const uint8_t *)in->state;
    size_t n = in->bytes_left;
    crpc_views *views = (crpc_views *)field->pData;
    if (in->callback != crpci_message_read)
        PB_RETURN_ERROR(in,
                        CRPCI_STATUS_TEXT(
                            "crpc_view: decode with crpc_message_decode, and bytes, not a number"));
    in->state = (uint8_t *)in->state + n;
    in->bytes_left = 0;
    if (PB_HTYPE(field->type) != PB_HTYPE_REPEATED) {
        *(crpc_view *)field->pData = crpc_view_of(start, n);
        return true;
    }
    if (!views->at[0]) {
        views->at[0] = start;
        views->at[1] = (const void *)(uintptr_t)((uint32_t)field->tag << 3 | 2);
        views->at[2] = start + n;
    } else if (!crpci_message_continues(views, start, n)) {
        PB_RETURN_ERROR(
            in, CRPCI_STATUS_TEXT("crpc_views: the message around the field came in two parts"));
    }
    views->end = start + n;
    return true;
}

/* The output of an encoding: one pass, straight into a chunk that grows by doubling, in place of a
 * pass over the whole message that only computes its size. */
typedef struct crpci_message_out {
    crpci_heap *heap;
    crpci_chunk *chunk;
    size_t len; /* bytes used, including those in front of the message */
    bool lent;  /* the chunk belongs to the caller, who keeps it even if a larger one replaces it */
    bool no_memory;
} crpci_message_out;

/* Makes room for `more` bytes. On failure sets no_memory and returns false. */
CRPCI_FN bool crpci_message_reserve(crpci_message_out *o, size_t more)
{
    crpci_chunk *bigger;
    if (CRPCI_LIKELY(o->chunk->cap - o->len >= more))
        return true;
    bigger = o->len + more < o->len
                 ? NULL
                 : crpci_heap_chunk(o->heap, o->len + (more > o->len ? more : o->len));
    if (!bigger) {
        o->no_memory = true;
        return false;
    }
    memcpy(crpci_heap_data(bigger), crpci_heap_data(o->chunk), o->len);
    if (!o->lent)
        crpci_heap_chunk_unref(o->chunk);
    o->chunk = bigger;
    o->lent = false;
    return true;
}

/* nanopb's output callback. */
CRPCI_FN bool crpci_message_write(pb_ostream_t *stream, const pb_byte_t *buf, size_t count)
{
    crpci_message_out *o = (crpci_message_out *)stream->state;
    if (!crpci_message_reserve(o, count))
        return false;
    memcpy(crpci_heap_data(o->chunk) + o->len, buf, count);
    o->len += count;
    return true;
}

/* Encodes one field of bytes. Into a chunk it goes in one piece, which saves nanopb's three
 * writes. */
CRPCI_FN bool crpci_message_put_view(pb_ostream_t *out, const pb_field_iter_t *field,
                                     crpc_view item)
{
    size_t n = crpc_view_size(item), most = 5 + 10 + n; /* key, length, bytes */
    crpci_message_out *o = (crpci_message_out *)out->state;
    uint8_t *begin, *p;
    if (out->callback != crpci_message_write || out->max_size - out->bytes_written < most)
        return pb_encode_tag_for_field(out, field) &&
               pb_encode_string(out, (const pb_byte_t *)crpc_view_data(item), n);
    if (!crpci_message_reserve(o, most))
        PB_RETURN_ERROR(out, "io error");
    begin = crpci_heap_data(o->chunk) + o->len;
    p = crpci_message_put_varint(begin, (uint32_t)field->tag << 3 | 2);
    p = crpci_message_put_varint(p, n);
    if (n)
        memcpy(p, crpc_view_data(item), n);
    p += n;
    o->len += (size_t)(p - begin);
    out->bytes_written += (size_t)(p - begin);
    return true;
}

/* An unset view is left out, as protobuf does with absent fields, unless the field is required. */
CRPCI_FN bool crpci_message_encode_view(pb_ostream_t *out, const pb_field_iter_t *field)
{
    const crpc_views *views = (const crpc_views *)field->pData;
    const void *cursor = NULL;
    crpc_view item;
    if (PB_HTYPE(field->type) == PB_HTYPE_REPEATED) {
        while (crpc_views_next(views, &cursor, &item)) {
            if (!crpci_message_put_view(out, field, item))
                return false;
        }
        return true;
    }
    item = *(const crpc_view *)field->pData;
    if (!item.at[0] && PB_HTYPE(field->type) != PB_HTYPE_REQUIRED)
        return true;
    return crpci_message_put_view(out, field, item);
}

/* nanopb's callback of messages with views. nanopb calls it for every callback field, so it must
 * refuse the kinds on which a view would corrupt memory: numbers, oneofs, and structs of another
 * size. */
CRPC_API bool crpc_view_field(struct pb_istream_s *in, struct pb_ostream_s *out,
                              const struct pb_field_iter_s *field)
{
    bool repeated = PB_HTYPE(field->type) == PB_HTYPE_REPEATED;
    bool text = PB_LTYPE(field->type) == PB_LTYPE_STRING || PB_LTYPE(field->type) == PB_LTYPE_BYTES;
    if (!text || PB_HTYPE(field->type) == PB_HTYPE_ONEOF ||
        field->data_size != (repeated ? sizeof(crpc_views) : sizeof(crpc_view))) {
        const char *why =
            CRPCI_STATUS_TEXT("crpc_view: only for string and bytes fields outside a oneof");
        if (in)
            PB_RETURN_ERROR(in, why);
        PB_RETURN_ERROR(out, why);
    }
    return in ? crpci_message_decode_view(in, field) : crpci_message_encode_view(out, field);
}

/* Whether a message type holds views at any depth. Static nanopb structs cannot contain themselves;
 * the depth is bounded all the same, against descriptors that are wrong. */
CRPCI_FN bool crpci_message_has_views(const pb_msgdesc_t *desc, int depth)
{
    const pb_msgdesc_t *const *sub;
    if (desc->field_callback == crpc_view_field)
        return true;
    for (sub = desc->submsg_info; depth && *sub; sub++) {
        if (crpci_message_has_views(*sub, depth - 1))
            return true;
    }
    return false;
}

/* Deepest nesting of message types that the two functions around this look into. */
#define CRPCI_MESSAGE_DEPTH 16

/* Whether a struct of zeros is a type's initial state: no field has a default of its own or a
 * callback that the program installs. nanopb wants the address of a struct to iterate over; `any`
 * may be any memory, it is not read. */
CRPCI_FN bool crpci_message_starts_clear(const pb_msgdesc_t *desc, const void *any, int depth)
{
    const pb_msgdesc_t *const *sub;
    pb_field_iter_t i;
    if (desc->default_value || !depth)
        return false;
    if (pb_field_iter_begin_const(&i, desc, any)) {
        do {
            if (PB_LTYPE(i.type) == PB_LTYPE_EXTENSION ||
                (PB_ATYPE(i.type) == PB_ATYPE_CALLBACK && desc->field_callback != crpc_view_field))
                return false;
        } while (pb_field_iter_next(&i));
    }
    for (sub = desc->submsg_info; *sub; sub++) {
        if (!crpci_message_starts_clear(*sub, any, depth - 1))
            return false;
    }
    return true;
}

/* What crpc must know of a type for every message; computed once per method. */
typedef struct crpci_message_type {
    const pb_msgdesc_t *desc;
    size_t size; /* of the struct */
    bool views;
    bool clear; /* zeros are its initial state: nanopb need not initialise the struct */
} crpci_message_type;

/* `desc` may be NULL, in a table that is only inspected; such a type cannot be decoded. */
CRPCI_FN crpci_message_type crpci_message_type_of(const pb_msgdesc_t *desc, size_t size)
{
    crpci_message_type t;
    t.desc = desc;
    t.size = size;
    t.views = desc && crpci_message_has_views(desc, CRPCI_MESSAGE_DEPTH);
    t.clear = desc && crpci_message_starts_clear(desc, &t, CRPCI_MESSAGE_DEPTH);
    return t;
}

/* Decodes into a struct of zeros if the type has views or is `clear`; else into one that the
 * program has initialised. On failure *why is set to a text that lives as long as the program. */
CRPCI_FN bool crpci_message_decode(const void *bytes, size_t size, const crpci_message_type *type,
                                   void *message, const char **why)
{
    pb_istream_t in;
    bool ok;
    crpci_message_stream(&in, bytes, size);
    ok = pb_decode_ex(&in, type->desc, message, type->clear ? PB_DECODE_NOINIT : 0);
    if (CRPCI_UNLIKELY(!ok))
        *why = PB_GET_ERROR(&in);
    return ok;
}

CRPC_API int crpc_message_decode(const void *bytes, size_t size, const struct pb_msgdesc_s *desc,
                                 void *message, size_t message_size)
{
    crpci_message_type type;
    const char *why;
    type.desc = desc;
    type.clear = false;
    if (crpci_message_has_views(desc, CRPCI_MESSAGE_DEPTH))
        memset(message, 0, message_size);
    return crpci_message_decode(bytes, size, &type, message, &why) ? CRPC_OK : CRPC_ECODEC;
}

/* Appends a message to `o`. Fails with CRPC_ENOMEM or CRPC_ECODEC, with the reason in *why. */
CRPCI_FN int crpci_message_encode(crpci_message_out *o, const pb_msgdesc_t *desc,
                                  const void *message, const char **why)
{
    pb_ostream_t out;
    memset(&out, 0, sizeof out);
    out.callback = crpci_message_write;
    out.state = o;
    out.max_size = INT32_MAX;
    if (CRPCI_LIKELY(pb_encode(&out, desc, message)))
        return CRPC_OK;
    *why =
        o->no_memory ? CRPCI_STATUS_TEXT("out of memory, or over max_bytes") : PB_GET_ERROR(&out);
    return o->no_memory ? CRPC_ENOMEM : CRPC_ECODEC;
}

/* --- whether nanopb is the one of the headers ------------------------------------------------- */

typedef struct crpci_message_probe {
    crpc_view text;
    bool has_number;
    int64_t number;
} crpci_message_probe;

#define CRPCI_MESSAGE_PROBE_FIELDLIST(X, a)                                                        \
    X(a, CALLBACK, REQUIRED, STRING, text, 1)                                                      \
    X(a, STATIC, OPTIONAL, INT64, number, 4)

/* PB_BIND would define an object that other files can link to. */
static const uint32_t crpci_message_probe_info[] = {
    CRPCI_MESSAGE_PROBE_FIELDLIST(PB_GEN_FIELD_INFO_2, crpci_message_probe) 0};
static const pb_msgdesc_t *const crpci_message_probe_parts[] = {NULL};
static const pb_msgdesc_t crpci_message_probe_msg = {
    crpci_message_probe_info, crpci_message_probe_parts, NULL, crpc_view_field, 2, 1, 4};

/* Whether nanopb reads and writes known bytes correctly. One that was compiled with other options
 * than this file sees (PB_FIELD_32BIT, say) misreads descriptors without an error; a loop refuses
 * to open then. */
CRPCI_COLD bool crpci_message_self_check(void)
{
    static const char golden[] = "\x0a\x04" "Echo\x20\x81\x80\x80\x80\x10"; /* 2^32 + 1 */
    uint8_t out[sizeof golden + 8];
    pb_ostream_t stream = pb_ostream_from_buffer(out, sizeof out);
    crpci_message_probe probe;
    memset(&probe, 0, sizeof probe);
    return crpc_message_decode(golden, sizeof golden - 1, &crpci_message_probe_msg, &probe,
                               sizeof probe) == CRPC_OK &&
           crpc_view_equal(probe.text, "Echo") && probe.has_number &&
           probe.number == INT64_C(0x100000001) &&
           pb_encode(&stream, &crpci_message_probe_msg, &probe) &&
           stream.bytes_written == sizeof golden - 1 &&
           memcmp(out, golden, sizeof golden - 1) == 0;
}

/* --- requests and replies, independent of the protocol ---------------------------------------- */

/* Names of crpc's own user_fields. The first marks a reply whose status code is the application's;
 * the second carries a request's id, by which a server recognises a retry; the third its ordering
 * key. */
#define CRPCI_MESSAGE_APP_FIELD "crpc-app"
#define CRPCI_MESSAGE_ID_FIELD  "crpc-rid"
#define CRPCI_MESSAGE_KEY_FIELD "crpc-key"

typedef enum crpci_message_kind { CRPCI_MESSAGE_REQUEST, CRPCI_MESSAGE_REPLY } crpci_message_kind;

/* A request or a reply, in whatever protocol its bytes are. When it was received, all its pointers
 * point into `chunk`; code that keeps any of them takes a reference of the chunk, or copies the
 * bytes: the fields stand before the payload, and hold the credential; the attachment stands behind
 * it. */
typedef struct crpci_message {
    crpci_message_kind kind;
    /* Received: a request for the method that the connection expects, or a reply of success. The
     * members below `attachment_size` are then left unset, because all of them would be 0: the
     * reader must not look at them. */
    bool usual;
    /* the caller's choice, which the reply repeats; 0: the protocol carries no ids */
    int64_t id;
    uint32_t turn; /* position of the request on its connection, in protocols without ids */
    int32_t timeout_ms;     /* request; 0: the caller named no deadline */
    crpci_chunk *chunk;     /* received: holds all the bytes */
    /* received: bytes in which protocol->field searches; to send: encoded */
    crpc_view fields;
    const uint8_t *payload;
    size_t payload_size;
    size_t attachment_size; /* it follows the payload */
    bool has_fields;        /* received: false: there are certainly no user_fields */
    int32_t status;         /* reply; 0: success */
    crpc_view text;         /* reply: the text of an error */
    crpc_view names;        /* request to send: service and method, encoded */
    crpc_view service;      /* request received */
    crpc_view method;
    int64_t log_id;
    int64_t trace_id;
    int64_t span_id;
    int64_t parent_span_id;
    crpc_view credential;
    /* received: names what the peer asks for and crpc cannot do; NULL: nothing. The text is valid
     * during the callback that gets the message. */
    const char *unsupported;
} crpci_message;

/* What a server's handler passes on to the calls that it makes for a request: its deadline and
 * trace. The first member of a crpc_context, so that clients need not know that struct. */
typedef struct crpci_origin {
    int64_t deadline_us; /* on the loop's clock; INT64_MAX: the caller named none */
    int64_t log_id;
    int64_t trace_id;
    int64_t span_id;
} crpci_origin;

/* ======================================================================== */
/* >>impl-frame   the 12 bytes before every message                         */
/* ======================================================================== */

/* "PRPC", body size, meta size, both big-endian 32 bits. The body is meta, payload and attachment;
 * its size does not count these 12 bytes. */
#define CRPCI_FRAME_HEADER 12u

typedef enum crpci_frame_result {
    CRPCI_FRAME_NEED, /* more bytes */
    CRPCI_FRAME_OK,
    CRPCI_FRAME_BAD /* not this protocol */
} crpci_frame_result;

/* Reads a header from the first `n` received bytes. A wrong magic is found out by the first byte
 * that differs. CRPCI_FRAME_OK guarantees *meta <= *body; limits are the caller's to check. */
CRPCI_FN crpci_frame_result crpci_frame_header(const uint8_t *p, size_t n, uint32_t *body,
                                               uint32_t *meta)
{
    if (memcmp(p, "PRPC", n < 4 ? n : 4) != 0)
        return CRPCI_FRAME_BAD;
    if (n < CRPCI_FRAME_HEADER)
        return CRPCI_FRAME_NEED;
    *body = crpci_base_get32(p + 4);
    *meta = crpci_base_get32(p + 8);
    return *meta <= *body ? CRPCI_FRAME_OK : CRPCI_FRAME_BAD;
}

/* ======================================================================== */
/* >>impl-meta   what a message is about: brpc's RpcMeta                    */
/* ======================================================================== */

/* RpcMeta is the protobuf message that precedes every baidu_std payload; field numbers are those of
 * brpc's baidu_rpc_meta.proto. nanopb needs about 280 ns for each direction, so crpc writes a meta
 * backwards in front of its payload by hand, and reads by hand too: the two usual shapes by
 * comparing bytes, others field by field. A fuzzer compares both readers with nanopb. All of this
 * is pure: any thread, no lock. */

/* An RpcMeta, flattened. Reading leaves views that point into the input. */
typedef struct crpci_meta {
    crpc_view raw;          /* read: the whole meta; crpci_meta_field searches user_fields in it */
    int64_t correlation_id; /* 0 if there is none */
    int32_t timeout_ms;     /* request */
    int32_t attachment_size;
    /* Read: the meta has one of the two usual shapes, a request for the expected method or a reply
     * of success. The members below are then left unset, because all of them would be 0. */
    bool usual;
    bool fields;        /* false: there are certainly no user_fields */
    int32_t error_code; /* response; 0: success, also when the peer sent no response field */
    int32_t compress_type;
    int32_t content_type;
    int32_t checksum_type;
    crpc_view names;   /* request to write: service and method, encoded */
    crpc_view service; /* request read */
    crpc_view method;
    int64_t log_id;
    int64_t trace_id;
    int64_t span_id;
    int64_t parent_span_id;
    crpc_view error_text;
    crpc_view chunk_info; /* set: the peer splits bodies, an extension that crpc does not know */
    crpc_view credential;
    crpc_view stream_settings; /* set: the peer wants a stream */
} crpci_meta;

/* --- writing: from the payload's start towards lower addresses --------------------------------
 * so that every length is known before it must be written, and nothing is encoded twice. The
 * functions take the address in front of which they write, and return where their bytes begin. */

CRPCI_FN uint8_t *crpci_meta_put_varint(uint8_t *p, uint64_t v)
{
    uint64_t rest;
    uint8_t *begin;
    if (CRPCI_LIKELY(v < 0x80)) {
        *--p = (uint8_t)v;
        return p;
    }
    for (rest = v; rest; rest >>= 7)
        p--;
    begin = p;
    crpci_message_put_varint(p, v);
    return begin;
}

/* Writes an integer field. Field numbers go up to 15 here: their keys are one byte. */
CRPCI_FN uint8_t *crpci_meta_put_int(uint8_t *p, unsigned field, int64_t v)
{
    p = crpci_meta_put_varint(p, (uint64_t)v);
    *--p = (uint8_t)(field << 3);
    return p;
}

/* Writes bytes that are encoded already. */
CRPCI_FN uint8_t *crpci_meta_put_raw(uint8_t *p, crpc_view bytes)
{
    size_t n = crpc_view_size(bytes);
    p -= n;
    if (n)
        memcpy(p, crpc_view_data(bytes), n);
    return p;
}

CRPCI_FN uint8_t *crpci_meta_put_bytes(uint8_t *p, unsigned field, crpc_view bytes)
{
    p = crpci_meta_put_raw(p, bytes);
    p = crpci_meta_put_varint(p, crpc_view_size(bytes));
    *--p = (uint8_t)(field << 3 | 2);
    return p;
}

/* Encodes what every request for a method begins with, service and method, for a crpci_meta's
 * `names`. Done once per method. `out` has `room` bytes: both names and 12 more. */
CRPCI_FN crpc_view crpci_meta_put_names(uint8_t *out, size_t room, crpc_view service,
                                        crpc_view method)
{
    uint8_t *end = out + room;
    uint8_t *p = crpci_meta_put_bytes(end, 2, method);
    p = crpci_meta_put_bytes(p, 1, service);
    return crpc_view_of(p, (size_t)(end - p));
}

/* Zeros of compress_type and correlation_id are written too, because some peers insist on them.
 * Takes the members one by one, so that compilers need not put the struct into memory. */
CRPCI_FN uint8_t *crpci_meta_put_common(uint8_t *p, int32_t attachment_size, int64_t correlation_id,
                                        int32_t compress_type)
{
    if (attachment_size)
        p = crpci_meta_put_int(p, 5, attachment_size);
    p = crpci_meta_put_int(p, 4, correlation_id);
    return crpci_meta_put_int(p, 3, compress_type);
}

/* Closes the submessage between p and end, which is meta field `field`, and writes the frame header
 * in front. `rest` is the size of payload and attachment together. */
CRPCI_FN uint8_t *crpci_meta_put_header(uint8_t *p, const uint8_t *end, unsigned field,
                                        const uint8_t *payload, size_t rest)
{
    size_t meta;
    p = crpci_meta_put_varint(p, (uint64_t)(end - p));
    *--p = (uint8_t)(field << 3 | 2);
    meta = (size_t)(payload - p);
    p -= CRPCI_FRAME_HEADER;
    memcpy(p, "PRPC", 4);
    crpci_base_put32(p + 4, (uint32_t)(meta + rest));
    crpci_base_put32(p + 8, (uint32_t)meta);
    return p;
}

/* Callers reserve CRPCI_META_BOUND bytes and more. If that bound were ever wrong, this stops the
 * program before the overrun reaches the wire. */
CRPCI_FN void crpci_meta_check_room(const uint8_t *low, const uint8_t *begin)
{
    if (CRPCI_UNLIKELY(begin < low))
        abort();
}

/* Writes header and request meta in front of the payload at `payload`; `low` is the lowest address
 * that may be written. `fields` are encoded user_fields. Returns where the frame begins. */
CRPCI_FN uint8_t *crpci_meta_put_request(uint8_t *low, uint8_t *payload, size_t payload_size,
                                         const crpci_meta *m, crpc_view fields)
{
    uint8_t *p = crpci_meta_put_raw(payload, fields), *end;
    if (crpc_view_data(m->credential))
        p = crpci_meta_put_bytes(p, 7, m->credential);
    end = p = crpci_meta_put_common(p, m->attachment_size, m->correlation_id, m->compress_type);
    if (m->timeout_ms)
        p = crpci_meta_put_int(p, 8, m->timeout_ms);
    if (m->trace_id) {
        p = crpci_meta_put_int(p, 6, m->parent_span_id);
        p = crpci_meta_put_int(p, 5, m->span_id);
        p = crpci_meta_put_int(p, 4, m->trace_id);
    }
    if (m->log_id)
        p = crpci_meta_put_int(p, 3, m->log_id);
    p = crpci_meta_put_raw(p, m->names);
    p = crpci_meta_put_header(p, end, 1, payload, payload_size + (size_t)m->attachment_size);
    crpci_meta_check_room(low, p);
    return p;
}

/* Writes header and reply meta in the same way. */
CRPCI_FN uint8_t *crpci_meta_put_reply(uint8_t *low, uint8_t *payload, size_t payload_size,
                                       const crpci_meta *m, crpc_view fields)
{
    uint8_t *p = crpci_meta_put_raw(payload, fields), *end;
    end = p = crpci_meta_put_common(p, m->attachment_size, m->correlation_id, m->compress_type);
    if (crpc_view_size(m->error_text))
        p = crpci_meta_put_bytes(p, 2, m->error_text);
    p = crpci_meta_put_int(p, 1, m->error_code);
    p = crpci_meta_put_header(p, end, 2, payload, payload_size + (size_t)m->attachment_size);
    crpci_meta_check_room(low, p);
    return p;
}

/* Room that header and meta need at most, besides names, texts, credential and fields: the header,
 * nine varint fields of 11 bytes, and keys and lengths. */
#define CRPCI_META_BOUND (CRPCI_FRAME_HEADER + 9 * 11 + 6 * 6)

/* A user_fields entry takes at most this besides key and value: three keys, three lengths. */
#define CRPCI_META_FIELD_COST (3u + 3 * 5)

/* Encodes one user_fields entry (field 9: key 1, value 2) at `out`, which has room for
 * CRPCI_META_FIELD_COST bytes more than key and value. Returns the number of bytes written. */
CRPCI_FN size_t crpci_meta_put_field(uint8_t *out, crpc_view key, crpc_view value)
{
    size_t room = CRPCI_META_FIELD_COST + crpc_view_size(key) + crpc_view_size(value), n;
    uint8_t *end = out + room, *p = crpci_meta_put_bytes(end, 2, value);
    p = crpci_meta_put_bytes(p, 1, key);
    p = crpci_meta_put_varint(p, (uint64_t)(end - p));
    *--p = 9 << 3 | 2;
    n = (size_t)(end - p);
    memmove(out, p, n);
    return n;
}

/* --- reading ---------------------------------------------------------------------------------- */

/* Reads one field: its key, and either a number or bytes. Returns the address behind it; NULL if
 * the input is malformed or has a group. */
CRPCI_FN const uint8_t *crpci_meta_next(const uint8_t *p, const uint8_t *end, uint64_t *key,
                                        uint64_t *number, crpc_view *bytes)
{
    if (p < end && *p < 0x80) {
        *key = *p++;
    } else {
        p = crpci_message_varint(p, end, key);
        if (!p)
            return NULL;
    }
    if (*key < 8 || *key >> 3 > 0x1fffffff) /* field number 0 or out of range */
        return NULL;
    switch (*key & 7) {
    case 0:
        if (p < end && *p < 0x80) {
            *number = *p;
            return p + 1;
        }
        return crpci_message_varint(p, end, number);
    case 2:
        p = crpci_message_varint(p, end, number);
        if (!p || *number > (uint64_t)(end - p))
            return NULL;
        *bytes = crpc_view_of(p, (size_t)*number);
        return p + *number;
    default:
        return crpci_message_skip(p, end, (unsigned)(*key & 7));
    }
}

/* The messages that make up a meta, and what their fields hold. */
enum { CRPCI_META_OUTER, CRPCI_META_REQUEST, CRPCI_META_RESPONSE };

typedef enum crpci_meta_kind {
    CRPCI_META_UNKNOWN,
    CRPCI_META_FIELDS, /* user_fields, which crpci_meta_field reads */
    CRPCI_META_INT32,
    CRPCI_META_INT64,
    CRPCI_META_BYTES, /* this kind and those behind it: wire type 2, before it: 0 */
    CRPCI_META_PART   /* one of the messages */
} crpci_meta_kind;

typedef struct crpci_meta_row {
    uint8_t kind;
    uint8_t at; /* offset in crpci_meta; a part: which */
} crpci_meta_row;

#define CRPCI_META_ROW(kind, member) {CRPCI_META_##kind, offsetof(crpci_meta, member)}
/* clang-format off */
/* Of each message, by field number. */
static const crpci_meta_row crpci_meta_rows[3][12] = {{
    {CRPCI_META_UNKNOWN, 0},
    {CRPCI_META_PART, CRPCI_META_REQUEST},
    {CRPCI_META_PART, CRPCI_META_RESPONSE},
    CRPCI_META_ROW(INT32, compress_type),
    CRPCI_META_ROW(INT64, correlation_id),
    CRPCI_META_ROW(INT32, attachment_size),
    CRPCI_META_ROW(BYTES, chunk_info),
    CRPCI_META_ROW(BYTES, credential),
    CRPCI_META_ROW(BYTES, stream_settings),
    {CRPCI_META_FIELDS, 0},
    CRPCI_META_ROW(INT32, content_type),
    CRPCI_META_ROW(INT32, checksum_type)
}, {
    {CRPCI_META_UNKNOWN, 0},
    CRPCI_META_ROW(BYTES, service),
    CRPCI_META_ROW(BYTES, method),
    CRPCI_META_ROW(INT64, log_id),
    CRPCI_META_ROW(INT64, trace_id),
    CRPCI_META_ROW(INT64, span_id),
    CRPCI_META_ROW(INT64, parent_span_id),
    {CRPCI_META_UNKNOWN, 0},
    CRPCI_META_ROW(INT32, timeout_ms)
}, {
    {CRPCI_META_UNKNOWN, 0},
    CRPCI_META_ROW(INT32, error_code),
    CRPCI_META_ROW(BYTES, error_text)
}};
/* clang-format on */
#undef CRPCI_META_ROW

/* Reads one part into `m`. A part that comes twice is merged, as protobuf asks: the last value of a
 * field counts. False: it is malformed, a known field has an unexpected wire type, or a request
 * does not name service and method. */
CRPCI_FN bool crpci_meta_read_part(const uint8_t *p, const uint8_t *end, unsigned part,
                                   crpci_meta *m)
{
    uint64_t key, n = 0;
    crpc_view v = {{NULL}, NULL};
    if (part == CRPCI_META_REQUEST)
        m->service = m->method = v;
    while (p < end) {
        const crpci_meta_row *row;
        void *at;
        p = crpci_meta_next(p, end, &key, &n, &v);
        if (!p)
            return false;
        row = &crpci_meta_rows[part][key >> 3 < 12 ? key >> 3 : 0];
        at = (char *)m + row->at;
        if (row->kind >= CRPCI_META_INT32 && (key & 7) != (row->kind < CRPCI_META_BYTES ? 0 : 2))
            return false;
        if (row->kind == CRPCI_META_FIELDS)
            m->fields = true;
        else if (row->kind == CRPCI_META_INT32)
            *(int32_t *)at = (int32_t)(uint32_t)n;
        else if (row->kind == CRPCI_META_INT64)
            *(int64_t *)at = (int64_t)n;
        else if (row->kind == CRPCI_META_BYTES)
            *(crpc_view *)at = v;
        else if (row->kind == CRPCI_META_PART &&
                 !crpci_meta_read_part((const uint8_t *)crpc_view_data(v), (const uint8_t *)v.end,
                                       row->at, m))
            return false;
    }
    return part != CRPCI_META_REQUEST || (crpc_view_data(m->service) && crpc_view_data(m->method));
}

/* Reads a meta; false if it does not decode. Its views point into the input. */
CRPCI_FN bool crpci_meta_read(const uint8_t *p, size_t n, crpci_meta *m)
{
    memset(m, 0, sizeof *m);
    m->raw = crpc_view_of(p, n);
    return crpci_meta_read_part(p, p + n, CRPCI_META_OUTER, m);
}

/* Reads a varint that must end exactly at `end`. */
CRPCI_FN bool crpci_meta_last_varint(const uint8_t *p, const uint8_t *end, int64_t *value)
{
    uint64_t v = 0;
    if (crpci_message_varint(p, end, &v) != end || p == end)
        return false;
    *value = (int64_t)v;
    return true;
}

/* Compares a meta with the two shapes that nearly all frames between crpc peers have, byte by byte
 * as crpci_meta_put_request and _put_reply write them: a request for the method of `names`, with or
 * without timeout_ms; and, when `names` is set but empty, a reply of success. False: read it in
 * full. */
CRPCI_FN bool crpci_meta_read_usual(const uint8_t *p, size_t n, crpc_view names, crpci_meta *m)
{
    const uint8_t *end = p + n, *sub_end;
    size_t size = crpc_view_size(names);
    uint64_t timeout = 0;
    m->raw = crpc_view_of(p, n);
    m->timeout_ms = m->attachment_size = 0;
    m->usual = true;
    if (!size)
        return crpc_view_data(names) && n > 7 &&
               memcmp(p, "\x12\x02\x08\x00\x18\x00\x20", 7) == 0 &&
               crpci_meta_last_varint(p + 7, end, &m->correlation_id);
    if (n < size + 6 || p[0] != (1 << 3 | 2) || p[1] < size || p[1] >= 0x80 ||
        (size_t)p[1] + 6 > n || memcmp(p + 2, crpc_view_data(names), size) != 0)
        return false;
    sub_end = p + 2 + p[1];
    p += 2 + size;
    if (p != sub_end && (*p != 8 << 3 || crpci_message_varint(p + 1, sub_end, &timeout) != sub_end))
        return false;
    m->timeout_ms = (int32_t)(uint32_t)timeout;
    return memcmp(sub_end, "\x18\x00\x20", 3) == 0 &&
           crpci_meta_last_varint(sub_end + 3, end, &m->correlation_id);
}

/* Searches the value of a user_fields entry. The last entry of a key wins, as in a protobuf map. */
CRPCI_FN bool crpci_meta_field(crpc_view raw, const char *key, crpc_view *value)
{
    const uint8_t *p = (const uint8_t *)crpc_view_data(raw), *end = (const uint8_t *)raw.end;
    bool found = false;
    while (p && p < end) {
        uint64_t k = 0, n = 0;
        crpc_view entry = {{NULL}, NULL}, name, text, v = {{NULL}, NULL};
        const uint8_t *q, *entry_end;
        p = crpci_meta_next(p, end, &k, &n, &entry);
        if (!p || k != (9 << 3 | 2))
            continue;
        name = text = crpc_view_of("", 0);
        entry_end = (const uint8_t *)entry.end;
        for (q = (const uint8_t *)crpc_view_data(entry); q && q < entry_end;) {
            q = crpci_meta_next(q, entry_end, &k, &n, &v);
            if (q && k == (1 << 3 | 2))
                name = v;
            else if (q && k == (2 << 3 | 2))
                text = v;
        }
        if (q && crpc_view_equal(name, key)) {
            *value = text;
            found = true;
        }
    }
    return found;
}

/* ======================================================================== */
/* >>impl-sock   addresses and sockets, without a loop                       */
/* ======================================================================== */

typedef struct crpci_addr {
    union {
        struct sockaddr any;
        struct sockaddr_in in4;
        struct sockaddr_in6 in6;
        struct sockaddr_un un;
    } u;
    socklen_t len;
} crpci_addr;

/* Splits "host:port" or "[IPv6]:port" into a host without brackets and a port of 0 to 65535. False:
 * it is neither, or the host does not fit. */
CRPCI_FN bool crpci_sock_split(const char *text, char *host, size_t size, unsigned *port)
{
    const char *colon = strrchr(text, ':'), *from = text, *to = colon;
    int64_t n;
    if (!colon || !crpci_url_number(colon + 1, 65535, &n) || n < 0)
        return false;
    if (*text == '[') {
        if (colon == text || colon[-1] != ']')
            return false;
        from++;
        to--;
    } else if (memchr(text, ':', (size_t)(colon - text))) {
        return false; /* an IPv6 address needs brackets */
    }
    if ((size_t)(to - from) >= size)
        return false;
    memcpy(host, from, (size_t)(to - from));
    host[to - from] = '\0';
    *port = (unsigned)n;
    return true;
}

/* Reads a numeric "1.2.3.4:80", "[::1]:80", "unix:/path", or "unix:@name": a name in the abstract
 * namespace of Linux, which stands behind a zero byte and has none at its end. */
CRPCI_FN bool crpci_sock_parse(crpci_addr *a, const char *text)
{
    char host[INET6_ADDRSTRLEN];
    unsigned port;
    memset(a, 0, sizeof *a);
    if (strncmp(text, "unix:", 5) == 0) {
        size_t n = strlen(text + 5);
        bool abstract = text[5] == '@';
        if (n <= abstract || n > CRPC_ADDRESS_MAX - 6) /* it must fit crpci_sock_format */
            return false;
        a->u.un.sun_family = AF_UNIX;
        memcpy(a->u.un.sun_path, text + 5, n + 1);
        a->len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n + !abstract);
        if (abstract)
            a->u.un.sun_path[0] = '\0';
        return true;
    }
    if (!crpci_sock_split(text, host, sizeof host, &port))
        return false;
    if (inet_pton(AF_INET, host, &a->u.in4.sin_addr) == 1) {
        a->u.in4.sin_family = AF_INET;
        a->u.in4.sin_port = htons((uint16_t)port);
        a->len = sizeof a->u.in4;
        return true;
    }
    if (inet_pton(AF_INET6, host, &a->u.in6.sin6_addr) == 1) {
        a->u.in6.sin6_family = AF_INET6;
        a->u.in6.sin6_port = htons((uint16_t)port);
        a->len = sizeof a->u.in6;
        return true;
    }
    return false;
}

/* In the host's byte order; 0: none. */
CRPCI_FN unsigned crpci_sock_port(const crpci_addr *a)
{
    return a->u.any.sa_family == AF_INET    ? ntohs(a->u.in4.sin_port)
           : a->u.any.sa_family == AF_INET6 ? ntohs(a->u.in6.sin6_port)
                                            : 0;
}

CRPCI_FN void crpci_sock_format(const crpci_addr *a, char *out, size_t size)
{
    const size_t head = offsetof(struct sockaddr_un, sun_path);
    char host[INET6_ADDRSTRLEN] = "?";
    if (a->u.any.sa_family == AF_UNIX && a->len > head + 1 && !a->u.un.sun_path[0])
        snprintf(out, size, "unix:@%.*s",
                 (int)crpci_base_min(a->len - head - 1, CRPC_ADDRESS_MAX - 7),
                 a->u.un.sun_path + 1);
    else if (a->u.any.sa_family == AF_UNIX)
        snprintf(out, size, "unix:%.*s", CRPC_ADDRESS_MAX - 6,
                 a->len > head ? a->u.un.sun_path : "");
    else if (a->u.any.sa_family == AF_INET6)
        snprintf(out, size, "[%s]:%u",
                 inet_ntop(AF_INET6, &a->u.in6.sin6_addr, host, sizeof host),
                 ntohs(a->u.in6.sin6_port));
    else
        snprintf(out, size, "%s:%u", inet_ntop(AF_INET, &a->u.in4.sin_addr, host, sizeof host),
                 ntohs(a->u.in4.sin_port));
}

CRPCI_FN void crpci_sock_local(int fd, crpci_addr *a)
{
    memset(a, 0, sizeof *a);
    a->len = sizeof a->u;
    if (getsockname(fd, &a->u.any, &a->len))
        a->len = 0;
}

CRPCI_FN void crpci_sock_peer(int fd, crpci_addr *a)
{
    memset(a, 0, sizeof *a);
    a->len = sizeof a->u;
    if (getpeername(fd, &a->u.any, &a->len))
        a->len = 0;
}

#define CRPCI_SOCK_NAME_MAX 64 /* bytes of a crpci_sock_name as text */

typedef enum crpci_sock_kind {
    CRPCI_SOCK_IP, /* IPv4 addresses are mapped: ::ffff:a.b.c.d */
    CRPCI_SOCK_UNIX
} crpci_sock_kind;

/* The other end of a connection, kept as long as the connection is, since the kernel forgets it when
 * the peer resets. */
typedef struct crpci_sock_name {
    uint8_t address[16]; /* of a unix socket all zeros */
    uint32_t scope;      /* interface of a link-local address; of a unix socket the peer's uid */
    uint16_t port;
    uint8_t kind; /* crpci_sock_kind */
} crpci_sock_name;

static const uint8_t crpci_sock_mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

CRPCI_FN bool crpci_sock_is_ipv4(const crpci_sock_name *p)
{
    return p->kind == CRPCI_SOCK_IP && memcmp(p->address, crpci_sock_mapped, 12) == 0;
}

/* Names the peer with the address `a` of a connected socket. A unix peer whose user the kernel does
 * not tell gets the uid 65534, nobody. */
CRPCI_FN void crpci_sock_name_of(crpci_sock_name *p, const crpci_addr *a, int fd)
{
    memset(p, 0, sizeof *p);
    if (a->u.any.sa_family == AF_INET6) {
        memcpy(p->address, &a->u.in6.sin6_addr, 16);
        p->port = ntohs(a->u.in6.sin6_port);
        p->scope = a->u.in6.sin6_scope_id;
    } else if (a->u.any.sa_family == AF_INET) {
        memcpy(p->address, crpci_sock_mapped, 12);
        memcpy(p->address + 12, &a->u.in4.sin_addr, 4);
        p->port = ntohs(a->u.in4.sin_port);
    } else {
        struct ucred who;
        socklen_t len = sizeof who;
        p->kind = CRPCI_SOCK_UNIX;
        p->scope = getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &len) ? 65534 : who.uid;
    }
}

/* Writes "10.0.0.7:1234", "[fe80::1%2]:1234" or "unix:uid=1000". */
CRPCI_COLD void crpci_sock_name_format(const crpci_sock_name *p, char *out, size_t size)
{
    char host[INET6_ADDRSTRLEN] = "?", scope[16] = "";
    if (p->kind == CRPCI_SOCK_UNIX) {
        snprintf(out, size, "unix:uid=%u", (unsigned)p->scope);
    } else if (crpci_sock_is_ipv4(p)) {
        snprintf(out, size, "%s:%u", inet_ntop(AF_INET, p->address + 12, host, sizeof host),
                 p->port);
    } else {
        if (p->scope)
            snprintf(scope, sizeof scope, "%%%u", (unsigned)p->scope);
        snprintf(out, size, "[%s%s]:%u", inet_ntop(AF_INET6, p->address, host, sizeof host), scope,
                 p->port);
    }
}

CRPCI_FN void crpci_sock_set(int fd, int level, int option, int value)
{
    setsockopt(fd, level, option, &value, sizeof value);
}

/* Sets what every TCP connection gets. TCP_NODELAY: a small request is not held back for the
 * acknowledgement of the one before. Keepalive: a peer that vanished while nothing was sent is
 * found after 90 s, one that stops acknowledging what was sent after 30 s (TCP_USER_TIMEOUT; Linux
 * 2.6.37). Failures are ignored: the connection works without. */
CRPCI_FN void crpci_sock_tune(int fd)
{
    crpci_sock_set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    crpci_sock_set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
#ifdef TCP_KEEPIDLE
    crpci_sock_set(fd, IPPROTO_TCP, TCP_KEEPIDLE, 60);
    crpci_sock_set(fd, IPPROTO_TCP, TCP_KEEPINTVL, 10);
    crpci_sock_set(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
#endif
#ifdef TCP_USER_TIMEOUT
    crpci_sock_set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 30000);
#endif
}

/* Sends multicast datagrams through an interface; the routing table decides where `via` is NULL or
 * names none. False: errno. */
CRPCI_FN bool crpci_sock_leave_by(int fd, const struct ip_mreqn *via)
{
    return !via || (!via->imr_ifindex && !via->imr_address.s_addr) ||
           setsockopt(fd, IPPROTO_IP, IP_MULTICAST_IF, via, sizeof *via) == 0;
}

/* The address of this host that packets to `to` leave from, without a port; the routing table is
 * asked by connecting a datagram socket, which sends nothing. False: there is none that other hosts
 * could use. */
CRPCI_FN bool crpci_sock_route(const crpci_addr *to, const struct ip_mreqn *via, char *host,
                               size_t size)
{
    int fd = socket(to->u.any.sa_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    crpci_addr a;
    *host = '\0';
    if (fd < 0)
        return false;
    if (crpci_sock_leave_by(fd, via) && connect(fd, &to->u.any, to->len) == 0) {
        crpci_sock_local(fd, &a);
        if (a.len && a.u.any.sa_family == AF_INET && a.u.in4.sin_addr.s_addr != INADDR_ANY)
            inet_ntop(AF_INET, &a.u.in4.sin_addr, host, (socklen_t)size);
        else if (a.len && a.u.any.sa_family == AF_INET6 &&
                 !IN6_IS_ADDR_UNSPECIFIED(&a.u.in6.sin6_addr) &&
                 !IN6_IS_ADDR_LINKLOCAL(&a.u.in6.sin6_addr))
            inet_ntop(AF_INET6, &a.u.in6.sin6_addr, host, (socklen_t)size);
    }
    close(fd);
    return *host != '\0';
}

/* A stream socket for an address, which does not block. -1 and errno on failure. */
CRPCI_FN int crpci_sock_open(const crpci_addr *a)
{
    int fd = socket(a->u.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd >= 0 && a->u.any.sa_family != AF_UNIX)
        crpci_sock_tune(fd);
    return fd;
}

/* Whether an address, as text, is a loopback one. */
CRPCI_FN bool crpci_sock_is_loopback(const char *text)
{
    static const char *const begins[] = {"127.", "[::1]", "::1:", "[::ffff:127.", "::ffff:127."};
    size_t i;
    for (i = 0; i < sizeof begins / sizeof *begins; i++) {
        if (strncmp(text, begins[i], strlen(begins[i])) == 0)
            return true;
    }
    return false;
}

/* Whether a connection leads to its own socket: connecting to a port of the ephemeral range on
 * which nobody listens can draw that very port as the local one, and TCP lets the socket connect to
 * itself. */
CRPCI_FN bool crpci_sock_is_self(int fd)
{
    crpci_addr a, b;
    crpci_sock_local(fd, &a);
    crpci_sock_peer(fd, &b);
    return a.u.any.sa_family != AF_UNIX && a.len && a.len == b.len &&
           memcmp(&a.u, &b.u, a.len) == 0;
}

/* Removes the file of a unix socket on which nobody listens any more, as a server that crashed
 * leaves it behind. One in use stays, and bind fails with EADDRINUSE. */
CRPCI_COLD void crpci_sock_unlink_stale(const crpci_addr *a)
{
    struct stat st;
    int fd;
    if (a->u.any.sa_family != AF_UNIX || stat(a->u.un.sun_path, &st) || !S_ISSOCK(st.st_mode))
        return;
    fd = crpci_sock_open(a);
    if (fd < 0)
        return;
    if (connect(fd, &a->u.any, a->len) && errno == ECONNREFUSED)
        unlink(a->u.un.sun_path);
    close(fd);
}

/* Accepts a connection; its descriptor does not block and is closed on exec. ARM kernels before
 * 2.6.36, and some sandboxes, refuse accept4: then a child that another thread forks and executes
 * between the calls inherits the descriptor. -1 and errno on failure. */
CRPCI_FN int crpci_sock_accept(int listener, crpci_addr *peer)
{
    int fd;
    memset(peer, 0, sizeof *peer);
    peer->len = sizeof peer->u;
    fd = accept4(listener, &peer->u.any, &peer->len, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0 || (errno != ENOSYS && errno != EPERM))
        return fd;
    peer->len = sizeof peer->u;
    fd = accept(listener, &peer->u.any, &peer->len);
    if (fd >= 0) {
        fcntl(fd, F_SETFL, O_NONBLOCK);
        fcntl(fd, F_SETFD, FD_CLOEXEC);
    }
    return fd;
}

/* Binds and listens. -1 and errno on failure. */
CRPCI_COLD int crpci_sock_listen(const crpci_addr *a)
{
    int fd = crpci_sock_open(a), saved;
    if (fd < 0)
        return -1;
    crpci_sock_set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    crpci_sock_unlink_stale(a);
    if (bind(fd, &a->u.any, a->len) == 0 && listen(fd, 1024) == 0)
        return fd;
    saved = errno;
    close(fd);
    errno = saved;
    return -1;
}

/* ======================================================================== */
/* >>impl-resolver   host names to numeric addresses; blocks the calling thread */
/* ======================================================================== */

#if CRPC_ENABLE_RESOLVER
/* Asks getaddrinfo, which may block for many seconds where no DNS server answers. On failure `out`
 * tells why. */
CRPCI_COLD int crpci_resolver_system(const char *host, char *out, size_t size)
{
    struct addrinfo hints, *list, *i;
    size_t used = 0;
    int failed;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    *out = '\0';
    failed = getaddrinfo(host, NULL, &hints, &list);
    if (failed) {
        snprintf(out, size, "getaddrinfo: %s", gai_strerror(failed));
        return CRPC_ERESOLVE;
    }
    for (i = list; i; i = i->ai_next) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)i->ai_addr;
        const struct sockaddr_in *in4 = (const struct sockaddr_in *)(const void *)i->ai_addr;
        char text[INET6_ADDRSTRLEN];
        if (i->ai_family == AF_INET6 && in6->sin6_scope_id)
            continue; /* link-local: without its scope it leads nowhere */
        if (!inet_ntop(i->ai_family,
                       i->ai_family == AF_INET6 ? (const void *)&in6->sin6_addr : &in4->sin_addr,
                       text, sizeof text))
            continue;
        if (used + strlen(text) + 2 > size)
            break;
        used += (size_t)snprintf(out + used, size - used, "%s%s", used ? "," : "", text);
    }
    freeaddrinfo(list);
    if (*out)
        return CRPC_OK;
    crpci_status_format(out, size,
                        "getaddrinfo: no IPv4 or IPv6 address (link-local ones do not count)");
    return CRPC_ERESOLVE;
}
#endif

/* Writes the numeric addresses of a host, separated by commas: those of the program's hook, else of
 * getaddrinfo. On failure `out` tells why. */
CRPCI_COLD int crpci_resolver_lookup(crpci_heap *h, const char *host, char *out, size_t size)
{
    int err = CRPC_ERESOLVE;
    if (h->hooks.resolve) {
        err = h->hooks.resolve(h->hooks.user, host, out, size);
        if (err)
            crpci_status_format(out, size, "the resolve hook returned %d", err);
        return err;
    }
#if CRPC_ENABLE_RESOLVER
    err = crpci_resolver_system(host, out, size);
#else
    crpci_status_format(out, size, "crpc was built with CRPC_ENABLE_RESOLVER=0: give a numeric "
                                   "address, or set hooks.resolve");
#endif
    return err;
}

/* Looks "host:port" up: writes the host's numeric addresses, separated by commas, and the port. */
CRPCI_COLD int crpci_resolver_split(crpci_heap *h, const char *text, char *list, size_t size,
                                    unsigned *port, crpc_error *error)
{
    char host[256];
    if (!crpci_sock_split(text, host, sizeof host, port) || !*host)
        return crpci_status_set(error, CRPC_EINVAL,
                                "\"%.80s\" is not host:port with a port of 0 to 65535; an IPv6 "
                                "address needs brackets: [::1]:80",
                                text);
    if (strchr(host, '%'))
        return crpci_status_set(error, CRPC_EINVAL,
                                "\"%.80s\": an IPv6 address with a scope (%s) is not supported; "
                                "use one without, or IPv4",
                                text, strchr(host, '%'));
    if (crpci_resolver_lookup(h, host, list, size))
        return crpci_status_set(error, CRPC_ERESOLVE, "host \"%.80s\": %.120s", host, list);
    return CRPC_OK;
}

/* Takes the next address off such a list and writes it with its port. False: there is none. */
CRPCI_COLD bool crpci_resolver_next(char **list, unsigned port, char *out, size_t size)
{
    crpci_addr a;
    while (*list && **list) {
        char *item = *list, *next = strchr(item, ',');
        if (next)
            *next++ = '\0';
        *list = next;
        snprintf(out, size, strchr(item, ':') ? "[%s]:%u" : "%s:%u", item, port);
        if (crpci_sock_parse(&a, out))
            return true;
    }
    return false;
}

/* Turns "host:port" into a numeric address and its port. Of several addresses the first IPv4 one is
 * taken, else the first. A numeric one is only written in its canonical form. */
CRPCI_COLD int crpci_resolver_address(crpci_heap *h, const char *text, char *out, size_t size,
                                      crpc_error *error)
{
    char list[1024], one[CRPC_ADDRESS_MAX], *rest = list;
    unsigned port;
    crpci_addr a;
    int err;
    if (crpci_sock_parse(&a, text)) {
        crpci_sock_format(&a, out, size);
        return CRPC_OK;
    }
    err = crpci_resolver_split(h, text, list, sizeof list, &port, error);
    if (err)
        return err;
    *out = '\0';
    while (crpci_resolver_next(&rest, port, one, sizeof one)) {
        if (!*out || (*out == '[' && *one != '['))
            snprintf(out, size, "%s", one);
    }
    if (crpci_sock_parse(&a, out)) /* it is there, and whole */
        return CRPC_OK;
    return crpci_status_set(error, CRPC_ERESOLVE,
                            "\"%.80s\": the resolve hook gave no numeric address: \"%.80s\"", text,
                            list);
}

/* ======================================================================== */
/* >>impl-transport   how a connection's bytes reach its socket            */
/* ======================================================================== */

#define CRPCI_TRANSPORT_GATHER 1u /* writev takes several pieces; else only the first of them */
#define CRPCI_TRANSPORT_DUPLEX 2u /* one thread may read while another writes */
#define CRPCI_TRANSPORT_REPEAT 4u /* bytes offered when it would block must be offered again */

/* A transport carries a connection's bytes: plain sockets today, TLS later. readv and writev behave
 * like the system calls of these names (-1 and EAGAIN when they would block) and run without the
 * loop's lock. The other functions run with the lock; without DUPLEX they must not run while readv
 * or writev does, because all of them use the same state. A transport that sets its connections up
 * itself will add open, handshake, shut, identity, explain and close. */
typedef struct crpci_transport {
    const char *name;
    unsigned flags;
    ssize_t (*readv)(int fd, void *state, struct iovec *iov, int count);
    ssize_t (*writev)(int fd, void *state, struct iovec *iov, int count);
    /* Whether the transport has buffered input that the poller cannot see. NULL: it never does. */
    bool (*pending)(void *state);
    /* Which readiness to poll for in order to make progress on `events` (a TLS read may have to
     * write first). Asked again after each read and write; the connection then tries both
     * directions. NULL: poll for the same events. */
    unsigned (*want)(void *state, unsigned events);
    /* Whether no unread input from the peer is waiting. */
    bool (*idle)(int fd, void *state);
} crpci_transport;

CRPCI_FN ssize_t crpci_transport_plain_readv(int fd, void *state, struct iovec *iov, int count)
{
    struct msghdr m;
    (void)state;
    if (count == 1)
        return recv(fd, iov->iov_base, iov->iov_len, 0);
    memset(&m, 0, sizeof m);
    m.msg_iov = iov;
    m.msg_iovlen = (size_t)count;
    return recvmsg(fd, &m, 0);
}

CRPCI_FN ssize_t crpci_transport_plain_writev(int fd, void *state, struct iovec *iov, int count)
{
    struct msghdr m;
    (void)state;
    if (count == 1)
        return send(fd, iov->iov_base, iov->iov_len, MSG_NOSIGNAL);
    memset(&m, 0, sizeof m);
    m.msg_iov = iov;
    m.msg_iovlen = (size_t)count;
    return sendmsg(fd, &m, MSG_NOSIGNAL);
}

CRPCI_FN bool crpci_transport_plain_idle(int fd, void *state)
{
    char byte;
    (void)state;
    return recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) <= 0;
}

static const crpci_transport crpci_transport_plain = {
    "tcp",
    CRPCI_TRANSPORT_GATHER | CRPCI_TRANSPORT_DUPLEX,
    crpci_transport_plain_readv,
    crpci_transport_plain_writev,
    NULL,
    NULL,
    crpci_transport_plain_idle};

/* ======================================================================== */
/* >>impl-poller   waiting for many descriptors: epoll and poll behind one face */
/* ======================================================================== */

#define CRPCI_POLLER_BATCH 64 /* events that one wait reports at most */

/* A descriptor, as its owner registers it. Events are CRPC_READABLE and CRPC_WRITABLE. */
typedef struct crpci_poller_item {
    int fd;
    unsigned events; /* registered for; 0: not registered */
    uint32_t at;     /* poll: index in `items` */
    uint64_t id;     /* the owner's; the poller reports it with the events */
} crpci_poller_item;

typedef struct crpci_poller_event {
    uint64_t id;
    unsigned events;
} crpci_poller_event;

typedef struct crpci_poller {
    crpc_poller kind;
    int epoll_fd;
    /* poll: what is registered */
    crpci_poller_item **items;
    uint32_t count, cap;
    /* poll: a copy of it, on which a wait works without the lock: ids, behind them pollfds */
    uint64_t *ids;
    uint32_t copied, room;
    uint32_t next; /* where the next wait begins to look for events, when a batch was full */
    /* What the last wait found. On the driver's stack it would be most of what a call needs. */
    union {
#if CRPC_ENABLE_EPOLL
        struct epoll_event epoll[CRPCI_POLLER_BATCH];
#endif
        crpci_poller_event poll[CRPCI_POLLER_BATCH];
    } found;
} crpci_poller;

/* Bytes of a descriptor's copy. */
#define CRPCI_POLLER_COPY (sizeof(uint64_t) + sizeof(struct pollfd))

/* What poll calls events; epoll has the same numbers for these. */
CRPCI_FN short crpci_poller_mask(unsigned events)
{
    return (short)((events & CRPC_READABLE ? POLLIN : 0) | (events & CRPC_WRITABLE ? POLLOUT : 0));
}

/* An error or a hang-up is reported as readable and writable: the owner's read or write then finds
 * out. */
CRPCI_FN unsigned crpci_poller_events(unsigned mask)
{
    const unsigned both = POLLHUP | POLLERR | POLLNVAL;
    return (mask & (POLLIN | both) ? CRPC_READABLE : 0) |
           (mask & (POLLOUT | both) ? CRPC_WRITABLE : 0);
}

CRPCI_FN const char *crpci_poller_name(const crpci_poller *p)
{
    return p->kind == CRPC_POLLER_EPOLL ? "epoll" : "poll";
}

/* Opens epoll, unless poll is asked for; with CRPC_POLLER_DEFAULT poll takes its place where the
 * system refuses epoll. */
CRPCI_FN int crpci_poller_open(crpci_poller *p, crpci_heap *h, crpc_poller kind)
{
    memset(p, 0, sizeof *p);
    p->epoll_fd = -1;
    p->kind = CRPC_POLLER_POLL;
#if CRPC_ENABLE_EPOLL
    if (kind == CRPC_POLLER_POLL)
        return CRPC_OK;
    p->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (p->epoll_fd >= 0)
        p->kind = CRPC_POLLER_EPOLL;
    else if (kind != CRPC_POLLER_DEFAULT || !crpci_heap_refused(h, "epoll_create1", "poll"))
        return CRPC_ESYSTEM;
    return CRPC_OK;
#else
    (void)h;
    return kind == CRPC_POLLER_EPOLL ? CRPC_EUNSUPPORTED : CRPC_OK;
#endif
}

CRPCI_FN void crpci_poller_close(crpci_poller *p, crpci_heap *h)
{
    if (p->epoll_fd >= 0)
        close(p->epoll_fd);
    crpci_heap_free(h, p->items, p->cap * sizeof *p->items);
    crpci_heap_free(h, p->ids, p->room * CRPCI_POLLER_COPY);
    memset(p, 0, sizeof *p);
    p->epoll_fd = -1;
}

#if CRPC_ENABLE_EPOLL
typedef char crpci_poller_same_numbers[EPOLLIN == POLLIN && EPOLLOUT == POLLOUT &&
                                               EPOLLERR == POLLERR && EPOLLHUP == POLLHUP
                                           ? 1
                                           : -1];

/* ENOENT and EEXIST are no errors: a library that owns the descriptor (the ZooKeeper client) may
 * have closed it, which took it out of the epoll set, and the number may be that of another one
 * now. */
CRPCI_FN int crpci_poller_epoll_set(crpci_poller *p, crpci_poller_item *i, unsigned events)
{
    struct epoll_event e;
    memset(&e, 0, sizeof e);
    e.data.u64 = i->id;
    e.events = (uint32_t)crpci_poller_mask(events);
    if (!events) {
        epoll_ctl(p->epoll_fd, EPOLL_CTL_DEL, i->fd, &e);
        return CRPC_OK;
    }
    if (epoll_ctl(p->epoll_fd, i->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, i->fd, &e) == 0)
        return CRPC_OK;
    if (errno == ENOENT && epoll_ctl(p->epoll_fd, EPOLL_CTL_ADD, i->fd, &e) == 0)
        return CRPC_OK;
    if (errno == EEXIST && epoll_ctl(p->epoll_fd, EPOLL_CTL_MOD, i->fd, &e) == 0)
        return CRPC_OK;
    return errno == ENOMEM ? CRPC_ENOMEM : CRPC_ESYSTEM;
}
#endif

/* Removing fills the gap with the last entry. */
CRPCI_FN int crpci_poller_poll_set(crpci_poller *p, crpci_heap *h, crpci_poller_item *i,
                                   unsigned events)
{
    if (!events) {
        p->items[i->at] = p->items[--p->count];
        p->items[i->at]->at = i->at;
        return CRPC_OK;
    }
    if (i->events)
        return CRPC_OK;
    if (p->count == p->cap) {
        uint32_t cap = p->cap ? p->cap * 2 : 16;
        crpci_poller_item **items = (crpci_poller_item **)crpci_heap_resize(
            h, p->items, p->cap * sizeof *items, cap * sizeof *items);
        if (!items)
            return CRPC_ENOMEM;
        p->items = items;
        p->cap = cap;
    }
    i->at = p->count++;
    p->items[i->at] = i;
    return CRPC_OK;
}

/* Registers an item, changes its events, or removes it (events 0). Its fd and id may change only
 * while it is removed. On failure its registration stays as it was. */
CRPCI_FN int crpci_poller_set(crpci_poller *p, crpci_heap *h, crpci_poller_item *i, unsigned events)
{
    int err;
    if (events == 0 && i->events == 0)
        return CRPC_OK;
#if CRPC_ENABLE_EPOLL
    if (p->kind == CRPC_POLLER_EPOLL)
        err = crpci_poller_epoll_set(p, i, events);
    else
#endif
        err = crpci_poller_poll_set(p, h, i, events);
    if (!err)
        i->events = events;
    return err;
}

CRPCI_FN struct pollfd *crpci_poller_fds(const crpci_poller *p)
{
    return (struct pollfd *)(void *)(p->ids + p->room);
}

CRPCI_FN struct pollfd crpci_poller_pollfd(const crpci_poller_item *i)
{
    struct pollfd f;
    f.fd = i->fd;
    f.events = crpci_poller_mask(i->events);
    f.revents = 0;
    return f;
}

/* Under the loop's lock, before a wait without it. CRPC_ENOMEM: the wait covers only as many
 * descriptors as the last copy had room for. */
CRPCI_FN int crpci_poller_prepare(crpci_poller *p, crpci_heap *h)
{
    uint64_t *ids;
    uint32_t i;
    if (p->kind == CRPC_POLLER_EPOLL)
        return CRPC_OK;
    if (p->room < p->cap) {
        ids = (uint64_t *)crpci_heap_resize(h, p->ids, p->room * CRPCI_POLLER_COPY,
                                            p->cap * CRPCI_POLLER_COPY);
        if (ids) {
            p->ids = ids;
            p->room = p->cap;
        }
    }
    p->copied = p->count < p->room ? p->count : p->room;
    for (i = 0; i < p->copied; i++) {
        p->ids[i] = p->items[i]->id;
        crpci_poller_fds(p)[i] = crpci_poller_pollfd(p->items[i]);
    }
    return p->room < p->cap ? CRPC_ENOMEM : CRPC_OK;
}

/* Milliseconds for epoll_wait and poll, rounded up; negative: no limit; a day at most. */
CRPCI_FN int crpci_poller_ms(int64_t us)
{
    return us < 0 ? -1 : us > INT64_C(86400000000) ? 86400000 : (int)((us + 999) / 1000);
}

/* Waits at most `us` microseconds (negative: no limit), rounded up to a millisecond. Called without
 * the lock, by one thread at a time. Returns how many events it put into out[CRPCI_POLLER_BATCH].
 * Further ones come with the next wait, which under poll begins behind the last one reported, so
 * that every descriptor gets its turn; epoll does that by itself. A failure, such as EINTR, counts
 * as no event. */
CRPCI_FN int crpci_poller_wait(crpci_poller *p, int64_t us)
{
    crpci_poller_event *out = p->found.poll;
    int n = 0, ready;
    uint32_t i;
#if CRPC_ENABLE_EPOLL
    if (p->kind == CRPC_POLLER_EPOLL) {
        n = epoll_wait(p->epoll_fd, p->found.epoll, CRPCI_POLLER_BATCH, crpci_poller_ms(us));
        return n < 0 ? 0 : n;
    }
#endif
    ready = poll(crpci_poller_fds(p), (nfds_t)p->copied, crpci_poller_ms(us));
    for (i = 0; ready > 0 && i < p->copied && n < CRPCI_POLLER_BATCH; i++) {
        uint32_t k = (p->next + i) % p->copied;
        unsigned got = (unsigned short)crpci_poller_fds(p)[k].revents;
        if (!got)
            continue;
        ready--;
        out[n].id = p->ids[k];
        out[n].events = crpci_poller_events(got);
        if (++n == CRPCI_POLLER_BATCH)
            p->next = k + 1;
    }
    return n;
}

/* One of the events that the last wait has returned the number of. */
CRPCI_FN crpci_poller_event crpci_poller_found(const crpci_poller *p, int i)
{
#if CRPC_ENABLE_EPOLL
    if (p->kind == CRPC_POLLER_EPOLL) {
        crpci_poller_event e;
        e.id = p->found.epoll[i].data.u64;
        e.events = crpci_poller_events(p->found.epoll[i].events);
        return e;
    }
#endif
    return p->found.poll[i];
}

/* ======================================================================== */
/* >>impl-wake   a descriptor by which another thread ends the poller's wait */
/* ======================================================================== */

/* An eventfd, or the two ends of a pipe. */
typedef struct crpci_wake {
    int read_fd;  /* the poller waits for it */
    int write_fd; /* an eventfd: the same one */
} crpci_wake;

CRPCI_FN int crpci_wake_open(crpci_wake *w, crpci_heap *h)
{
    int fds[2];
    w->read_fd = w->write_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (w->read_fd >= 0)
        return CRPC_OK;
    if (!crpci_heap_refused(h, "eventfd", "a pipe") || pipe2(fds, O_NONBLOCK | O_CLOEXEC))
        return CRPC_ESYSTEM;
    w->read_fd = fds[0];
    w->write_fd = fds[1];
    return CRPC_OK;
}

CRPCI_FN void crpci_wake_close(crpci_wake *w)
{
    if (w->read_fd >= 0)
        close(w->read_fd);
    if (w->write_fd >= 0 && w->write_fd != w->read_fd)
        close(w->write_fd);
    w->read_fd = w->write_fd = -1;
}

/* Makes read_fd readable. Async-signal-safe. A write into a full pipe fails, but then the pipe is
 * readable anyway. */
CRPCI_FN void crpci_wake_kick(const crpci_wake *w)
{
    uint64_t one = 1;
    int saved = errno;
    ssize_t n = write(w->write_fd, &one, sizeof one);
    (void)n;
    errno = saved;
}

/* Makes read_fd unreadable until the next kick. */
CRPCI_FN void crpci_wake_drain(const crpci_wake *w)
{
    uint64_t buf[8];
    ssize_t n;
    do {
        n = read(w->read_fd, buf, sizeof buf);
    } while (n == (ssize_t)sizeof buf); /* a pipe may hold more; an eventfd gives 8 bytes once */
}

/* ======================================================================== */
/* >>impl-timer   hashed hierarchical timing wheel: O(1) to arm and cancel   */
/* ======================================================================== */

/* After G. Varghese, T. Lauck: Hashed and Hierarchical Timing Wheels (1987), scheme 7. A tick is a
 * millisecond; due times are rounded up to ticks, so no timer is early. Level k has 32 slots of
 * 32^k ticks each. A timer goes to the level that the highest bit tells in which its tick differs
 * from the present one, and when the wheel comes to its slot, to a lower level, until it fires on
 * level 0. A timer farther off than 2^30 ticks (12 days) waits in the last slot of the top level
 * and is put in again from there. The slots repeat every 2^30 ticks, so 32 bits of a tick find
 * them. */
#define CRPCI_TIMER_LEVELS 6

typedef struct crpci_timer crpci_timer;
struct crpci_timer {
    crpci_timer *next;
    crpci_timer **prev; /* the pointer that points here; NULL: the timer is not armed */
    int64_t due_us;
    /* Called with the loop locked and the timer not armed; may unlock and lock again. */
    void (*fn)(crpc_loop *loop, crpci_timer *timer);
};

typedef struct crpci_timer_wheel {
    int64_t tick;       /* all timers up to this tick have fired */
    crpci_timer *fired; /* timers that are due, for the loop to run */
    uint32_t levels; /* a bit for each level that may hold a timer */
    uint32_t used[CRPCI_TIMER_LEVELS]; /* likewise for each slot */
    crpci_timer *slots[CRPCI_TIMER_LEVELS][32];
} crpci_timer_wheel;

CRPCI_FN void crpci_timer_init(crpci_timer *t, void (*fn)(crpc_loop *, crpci_timer *))
{
    memset(t, 0, sizeof *t);
    t->fn = fn;
}

CRPCI_FN void crpci_timer_link(crpci_timer **head, crpci_timer *t)
{
    t->next = *head;
    if (t->next)
        t->next->prev = &t->next;
    *head = t;
    t->prev = head;
}

/* Disarms a timer, also one that has fired and was not run yet. */
CRPCI_FN void crpci_timer_cancel(crpci_timer *t)
{
    if (!t->prev)
        return;
    *t->prev = t->next;
    if (t->next)
        t->next->prev = t->prev;
    t->prev = NULL; /* the slot keeps its bit in `used`: the wheel will find it empty */
}

/* Puts a timer into its slot, or into the list at `due` if its tick has come. */
CRPCI_FN void crpci_timer_insert(crpci_timer_wheel *w, crpci_timer *t, crpci_timer **due)
{
    const uint32_t most = (1u << 5 * CRPCI_TIMER_LEVELS) - (1u << 5 * (CRPCI_TIMER_LEVELS - 1));
    int64_t ahead = t->due_us / 1000 + (t->due_us % 1000 > 0) - w->tick;
    uint32_t now = (uint32_t)w->tick, tick;
    unsigned level, slot;
    if (ahead <= 0) {
        crpci_timer_link(due, t);
        return;
    }
    tick = now + (ahead < most ? (uint32_t)ahead : most);
    level = (31u - (unsigned)__builtin_clz(tick ^ now)) / 5;
    if (level >= CRPCI_TIMER_LEVELS) /* in the next turn of the top level, and not yet this slot */
        level = CRPCI_TIMER_LEVELS - 1;
    slot = tick >> 5 * level & 31;
    crpci_timer_link(&w->slots[level][slot], t);
    w->used[level] |= 1u << slot;
    w->levels |= 1u << level;
}

/* Arms a timer, or moves one that is armed. */
CRPCI_FN void crpci_timer_set(crpci_timer_wheel *w, crpci_timer *t, int64_t due_us)
{
    crpci_timer_cancel(t);
    t->due_us = due_us;
    crpci_timer_insert(w, t, &w->fired);
}

/* How many ticks ahead the next used slot begins, and which slot that is. No timer in the slots is
 * due before. INT64_MAX: they hold none. */
CRPCI_FN int64_t crpci_timer_ahead(const crpci_timer_wheel *w, unsigned *level, unsigned *slot)
{
    uint32_t tick = (uint32_t)w->tick, levels;
    for (levels = w->levels; levels; levels &= levels - 1) {
        unsigned k = (unsigned)__builtin_ctz(levels), now = tick >> 5 * k & 31, steps;
        uint32_t bits = w->used[k] >> now | w->used[k] << (-now & 31);
        bits &= ~1u; /* the present slot was emptied; its bit is of a cancelled timer */
        if (!bits)
            continue;
        steps = (unsigned)__builtin_ctz(bits);
        *level = k;
        *slot = (now + steps) & 31;
        return (uint32_t)((((tick >> 5 * k) + steps) << 5 * k) - tick);
    }
    return INT64_MAX;
}

/* Moves every timer that is due at `now_us` to the end of w->fired, in the order of their ticks,
 * and within a tick in the order in which they were armed. */
CRPCI_FN void crpci_timer_advance(crpci_timer_wheel *w, int64_t now_us)
{
    int64_t now = now_us / 1000;
    crpci_timer **end = &w->fired;
    while (*end)
        end = &(*end)->next;
    while (now > w->tick) {
        unsigned level = 0, slot = 0;
        int64_t ahead = crpci_timer_ahead(w, &level, &slot);
        crpci_timer *turned = NULL, *t;
        if (ahead > now - w->tick) {
            w->tick = now;
            return;
        }
        w->tick += ahead;
        w->used[level] &= ~(1u << slot);
        if (!w->used[level])
            w->levels &= ~(1u << level);
        while ((t = w->slots[level][slot]) != NULL) { /* armed last stands first: turn the order */
            crpci_timer_cancel(t);
            crpci_timer_link(&turned, t);
        }
        while ((t = turned) != NULL) {
            crpci_timer_cancel(t);
            crpci_timer_insert(w, t, end);
            if (*end)
                end = &(*end)->next;
        }
    }
}

/* The time at which the wheel must be advanced next, in microseconds; INT64_MAX: there is no
 * timer. */
CRPCI_FN int64_t crpci_timer_next_us(const crpci_timer_wheel *w)
{
    unsigned level, slot;
    int64_t ahead = w->fired ? 0 : crpci_timer_ahead(w, &level, &slot);
    return ahead == INT64_MAX ? ahead : (w->tick + ahead) * 1000;
}

/* ======================================================================== */
/* >>impl-loop   a loop's state: lock, driver, clock, tasks, timers         */
/* ======================================================================== */

/* How threads share a loop is written down as the rules P1 to P11; each stands where it is kept.
 * The rules that decide when to wake, to hand over and to close can be left out one at a time, in
 * builds that the tests must then find wrong. */
#ifdef CRPCI_MUTANT_P4_HANDOVER
#define CRPCI_RULE_P4 0
#else
#define CRPCI_RULE_P4 1 /* a driver that leaves names its successor in the same hold of the lock */
#endif
#ifdef CRPCI_MUTANT_P6_KICK
#define CRPCI_RULE_P6 0
#else
#define CRPCI_RULE_P6 1 /* a driver that sleeps too long is woken */
#endif
#ifdef CRPCI_MUTANT_P7_CLOSE
#define CRPCI_RULE_P7 0
#else
#define CRPCI_RULE_P7 1 /* a descriptor is closed only when no thread reads or writes it: its number
                         * is that of the next one opened */
#endif

/* A deadline that is at least this far off, in microseconds, is compared with the coarse clock. */
#define CRPCI_LOOP_SOON 50000
#define CRPCI_LOOP_SHARES 256u /* references of the receive buffer that are counted in advance */

/* Work queued in a loop. `run` is called with the loop locked and may unlock and lock again. */
typedef struct crpci_task crpci_task;
struct crpci_task {
    crpci_list link;
    void (*run)(crpc_loop *loop, crpci_task *task);
};

/* A descriptor that the loop waits for. `fn` is called as a task's `run` is. */
typedef struct crpci_watch crpci_watch;
struct crpci_watch {
    crpci_poller_item item;
    void (*fn)(crpc_loop *loop, crpci_watch *watch, unsigned events);
};

/* What the driver is doing: the one thread that steps the loop. */
typedef enum crpci_loop_driver {
    CRPCI_LOOP_UNDRIVEN, /* no thread steps the loop */
    CRPCI_LOOP_WORKING,  /* the driver runs tasks and moves bytes; it flushes before it sleeps */
    CRPCI_LOOP_SLEEPING, /* it waits in the poller, unlocked */
    CRPCI_LOOP_IN_USER   /* it runs the program's code, unlocked and for any time */
} crpci_loop_driver;

/* Which threads may become the driver. An owned loop always has one. */
typedef enum crpci_loop_mode {
    CRPCI_LOOP_PASSIVE, /* callers that wait for a reply: one drives, the others follow */
    CRPCI_LOOP_CLAIMED, /* an owner, as soon as the caller that drives has left */
    CRPCI_LOOP_OWNED    /* crpc_loop_run, _step or the own thread; callers only wait */
} crpci_loop_mode;

typedef enum crpci_loop_thread_state {
    CRPCI_LOOP_NO_THREAD,
    CRPCI_LOOP_THREAD_RUNS,
    CRPCI_LOOP_THREAD_ENDED /* it was stopped and takes no lock any more: to be joined */
} crpci_loop_thread_state;

/* A program that polls the loop's descriptors in a loop of its own, and then steps this one. */
typedef enum crpci_loop_foreign {
    CRPCI_LOOP_NOT_FOREIGN,
    CRPCI_LOOP_FOREIGN_AWAKE,   /* it asks for descriptors and timeout before it polls */
    CRPCI_LOOP_FOREIGN_POLLING, /* it has asked: it may poll until foreign_at */
    CRPCI_LOOP_FOREIGN_STALE    /* it may poll, but for descriptors that have changed since */
} crpci_loop_foreign;

typedef enum crpci_loop_end {
    CRPCI_LOOP_OPEN,
    CRPCI_LOOP_CLOSING, /* crpc_loop_close waits for the owner to leave */
    CRPCI_LOOP_DISPOSED /* it was closed inside a callback: the driver frees it as it leaves */
} crpci_loop_end;

/* Shared with the sections below: heap, conns, endpoints, registries, calls, results, resume,
 * dirty, io_cond, io_waiters, now, fresh, max_results, forbid_threads, stats, the receive
 * buffer. */
struct crpc_loop {
    crpci_mutex lock;
    crpci_heap *heap;
    uint32_t refs;
    uint32_t stop; /* atomic: set by crpc_loop_stop, in signal handlers too */
    crpci_wake wake;
    crpci_watch wake_watch;
    crpci_poller poller;
    crpci_timer_wheel timers;
    crpci_id_table watches;
    crpci_id_table users; /* the program's timers and watches */
    crpci_list ready;     /* tasks that run user code: run by an owner or a wait by id (P8) */
    crpci_list resume;    /* internal tasks: input already read */
    crpci_list dirty;     /* internal tasks: output to be sent */
    /* who drives */
    crpci_loop_driver driver;
    crpci_loop_mode mode;
    crpci_loop_foreign foreign;
    crpci_loop_thread_state thread_state;
    crpci_loop_end end;
    bool kicked;        /* the wake descriptor is readable, or the driver is about to drain it */
    bool skip_sleep;    /* the driver's own wait ended during this step: do not sleep */
    bool step_user;     /* the step that is under way runs user code */
    int64_t wake_at;    /* when the driver will wake by itself */
    int64_t foreign_at; /* when the foreign loop will */
    int64_t last_step;  /* when the poller last returned */
    int64_t now;        /* the clock when it was last read, see crpci_loop_time */
    bool fresh;         /* since then neither a wait nor user code can have taken time */
    uintptr_t user_thread; /* atomic: tag of the thread that is inside a callback; 0: none is */
    int64_t user_now;      /* that thread's alone: the clock when it last read it */
    crpci_thread thread;
    crpci_cond owner_cond; /* the driver has left: for owners, and for crpc_loop_close */
    crpci_cond io_cond;    /* a send has ended */
    unsigned io_waiters;   /* threads that wait for io_cond */
    crpci_list followers;  /* callers that wait, first come first: crpci_waiter */
    /* the sections' below */
    crpci_list conns;
    crpci_list endpoints;
    crpci_list registries;
    crpci_id_table calls;
    uint32_t results;
    crpci_chunk *spare; /* the receive buffer */
    size_t spare_pos;
    uint32_t spare_refs; /* references of it that are counted already, to be given away */
    uint32_t random;
    /* options */
    bool forbid_threads;
    char thread_name[16];
    int64_t stack_size;
    int64_t max_results;
    crpc_loop_stats stats;
};

CRPCI_FN void crpci_loop_lock(crpc_loop *l)
{
    crpci_thread_lock(&l->lock);
}

CRPCI_FN void crpci_loop_unlock(crpc_loop *l)
{
    crpci_thread_unlock(&l->lock);
}

/* States that the calling thread holds the loop's lock; checked where CRPC_DEBUG is 1. */
CRPCI_FN void crpci_loop_assert_locked(const crpc_loop *l)
{
    CRPCI_ASSERT(crpci_thread_holds(&l->lock), "the loop is not locked by this thread");
    (void)l;
}

CRPCI_FN void crpci_loop_hold(crpc_loop *l)
{
    crpci_thread_ref(&l->refs);
}

/* Takes a reference of bytes just received. Every message takes one of the receive buffer; those
 * are counted in advance, CRPCI_LOOP_SHARES at a time, to save an atomic addition for each. */
CRPCI_FN void crpci_loop_share(crpc_loop *l, crpci_chunk *c)
{
    crpci_loop_assert_locked(l);
    if (c != l->spare) {
        crpci_heap_chunk_ref(c);
        return;
    }
    if (!l->spare_refs) {
        l->spare_refs = CRPCI_LOOP_SHARES;
        crpci_thread_add(&c->refs, CRPCI_LOOP_SHARES);
    }
    l->spare_refs--;
}

/* Gives a shared reference back. Without the lock crpci_heap_chunk_unref does the same. NULL is
 * ignored. */
CRPCI_FN void crpci_loop_unshare(crpc_loop *l, crpci_chunk *c)
{
    crpci_loop_assert_locked(l);
    if (c && c == l->spare)
        l->spare_refs++;
    else
        crpci_heap_chunk_unref(c);
}

/* Whether the loop alone still refers to its receive buffer: no message points into it. */
CRPCI_FN bool crpci_loop_spare_alone(const crpc_loop *l)
{
    return crpci_thread_load(&l->spare->refs) == 1 + l->spare_refs;
}

CRPCI_FN void crpci_loop_drop_spare(crpc_loop *l)
{
    if (l->spare_refs)
        crpci_thread_add(&l->spare->refs, 0 - l->spare_refs);
    crpci_heap_chunk_unref(l->spare);
    l->spare = NULL;
    l->spare_refs = 0;
}

CRPCI_COLD void crpci_loop_free(crpc_loop *l)
{
    crpci_heap *h = l->heap;
    crpci_loop_drop_spare(l);
    crpci_poller_close(&l->poller, h);
    crpci_wake_close(&l->wake);
    crpci_id_free(&l->watches, h);
    crpci_id_free(&l->users, h);
    crpci_id_free(&l->calls, h);
    crpci_thread_cond_free(&l->owner_cond);
    crpci_thread_cond_free(&l->io_cond);
    crpci_thread_mutex_free(&l->lock);
    crpci_heap_free(h, l, sizeof *l);
    crpci_heap_unref(h);
}

CRPCI_FN void crpci_loop_release(crpc_loop *l)
{
    if (crpci_thread_unref(&l->refs))
        crpci_loop_free(l);
}

/* --- random numbers, the clock ---------------------------------------------------------------- */

/* xorshift32, G. Marsaglia: Xorshift RNGs (2003). For jitter and choices only: a few numbers
 * give away all others. */
CRPCI_FN uint32_t crpci_loop_random(crpc_loop *l)
{
    l->random ^= l->random << 13;
    l->random ^= l->random >> 17;
    l->random ^= l->random << 5;
    return l->random;
}

/* 128 bits that no peer can guess, from the kernel's random generator. Kernels before 3.17, and some
 * sandboxes, have no getrandom; then the random bytes that the kernel gave the process at its start
 * must do, mixed with the clock, the process id and an address, since boards with one image may
 * boot in the same microsecond. */
CRPCI_COLD void crpci_loop_secret(const crpc_loop *l, uint64_t out[2])
{
    uint64_t here = (uint64_t)crpci_heap_now(l->heap) ^ (uint64_t)(uintptr_t)out << 20 ^
                    (uint64_t)getpid() << 44;
    const void *start = (const void *)(uintptr_t)getauxval(AT_RANDOM);
    long n = -1;
    out[0] = out[1] = 0;
#ifdef SYS_getrandom
    n = syscall(SYS_getrandom, out, 16, 1 /* GRND_NONBLOCK */);
#endif
    if (n != 16 && start)
        memcpy(out, start, 16);
    out[0] = crpci_base_mix(out[0] ^ crpci_base_mix(here));
    out[1] = crpci_base_mix(out[1] ^ crpci_base_mix(here + 1));
}

/* Seed of crpci_loop_random. xorshift never leaves 0. */
CRPCI_COLD uint32_t crpci_loop_seed(const crpc_loop *l)
{
    uint64_t bytes[2];
    crpci_loop_secret(l, bytes);
    return (uint32_t)bytes[0] ? (uint32_t)bytes[0] : 1;
}

CRPCI_FN int64_t crpci_loop_now(const crpc_loop *l)
{
    return crpci_heap_now(l->heap);
}

/* The loop's time: the clock as it stood after the last wait, the last run of user code, or the
 * begin of the present call. Reading it again for every use would cost more than the uses. */
CRPCI_FN int64_t crpci_loop_time(crpc_loop *l)
{
    crpci_loop_assert_locked(l);
    if (!l->fresh) {
        l->now = crpci_loop_now(l);
        l->fresh = true;
    }
    return l->now;
}

/* The loop's time, up to some milliseconds behind. */
CRPCI_FN int64_t crpci_loop_rough_time(crpc_loop *l)
{
    crpci_loop_assert_locked(l);
    if (!l->fresh) {
        int64_t now = crpci_heap_rough_now(l->heap);
        l->now = now > l->now ? now : l->now;
    }
    return l->now;
}

/* Microseconds until `at`, which may be INT64_MAX; 0: it has come. */
CRPCI_FN int64_t crpci_loop_left(crpc_loop *l, int64_t at)
{
    int64_t now = crpci_loop_rough_time(l);
    if (at < now + CRPCI_LOOP_SOON)
        now = crpci_loop_time(l);
    return at > now ? at - now : 0;
}

/* P1: a thread that is inside a callback of the loop must not wait for the loop: the callers
 * return EDEADLK. Needs no lock, since only this thread stores its own tag. */
CRPCI_FN bool crpci_loop_in_callback(const crpc_loop *l)
{
    return __atomic_load_n(&l->user_thread, __ATOMIC_RELAXED) == crpci_thread_tag();
}

/* The time at which a call begins; not locked. A callback may begin many calls in a row: the exact
 * clock is then read only when the coarse one has advanced. */
CRPCI_FN int64_t crpci_loop_start_time(crpc_loop *l)
{
    if (!crpci_loop_in_callback(l))
        return crpci_loop_now(l);
    if (crpci_heap_rough_now(l->heap) > l->user_now)
        l->user_now = crpci_loop_now(l);
    return l->user_now;
}

/* --- from here on every function expects the loop to be locked -------------------------------- */

/* P6: wakes the driver, or the program that polls for the loop, unless that was done already. The
 * callers do so for an earlier timer, a post, an owner that wants in, a close, and with poll a
 * changed descriptor: never for bytes to be sent, never for epoll_ctl, which the kernel heeds while
 * epoll_wait sleeps, and never for a follower's own deadline. */
CRPCI_FN void crpci_loop_kick(crpc_loop *l)
{
    bool polled = l->driver == CRPCI_LOOP_UNDRIVEN && l->foreign != CRPCI_LOOP_NOT_FOREIGN;
    crpci_loop_assert_locked(l);
    if ((l->driver == CRPCI_LOOP_SLEEPING || polled) && !l->kicked && CRPCI_RULE_P6) {
        l->kicked = true;
        l->stats.wakeups++;
        crpci_wake_kick(&l->wake);
    }
}

/* P2: whether a thread that has queued output should send it itself. A driver that works does so
 * before it sleeps; one that sleeps, or is busy with the program's code, would send it late. */
CRPCI_FN bool crpci_loop_may_send(const crpc_loop *l)
{
    crpci_loop_assert_locked(l);
    return l->driver == CRPCI_LOOP_UNDRIVEN || l->driver == CRPCI_LOOP_SLEEPING ||
           (l->driver == CRPCI_LOOP_IN_USER && !crpci_loop_in_callback(l));
}

CRPCI_FN void crpci_loop_task_init(crpci_task *t, void (*run)(crpc_loop *, crpci_task *))
{
    crpci_list_init(&t->link);
    t->run = run;
}

/* Queues a task that runs user code. One that is queued already stays where it is. */
CRPCI_FN void crpci_loop_ready(crpc_loop *l, crpci_task *t)
{
    crpci_loop_assert_locked(l);
    if (!crpci_list_empty(&t->link))
        return;
    crpci_list_append(&l->ready, &t->link);
    crpci_loop_kick(l);
}

/* Queues an internal task on `resume` or `dirty`. One that is queued already stays where it is. */
CRPCI_FN void crpci_loop_queue(crpci_list *list, crpci_task *t)
{
    if (crpci_list_empty(&t->link))
        crpci_list_append(list, &t->link);
}

/* The driver runs user code between these two; crpci_loop_user_begin unlocks, crpci_loop_user_end
 * locks again. */
CRPCI_FN void crpci_loop_user_begin(crpc_loop *l)
{
    crpci_loop_assert_locked(l);
    CRPCI_ASSERT(l->driver == CRPCI_LOOP_WORKING, "only the driver runs user code");
    l->driver = CRPCI_LOOP_IN_USER;
    l->fresh = false;
    l->user_now = l->now;
    __atomic_store_n(&l->user_thread, crpci_thread_tag(), __ATOMIC_RELAXED);
    crpci_loop_unlock(l);
}

CRPCI_FN void crpci_loop_user_end(crpc_loop *l)
{
    crpci_loop_lock(l);
    __atomic_store_n(&l->user_thread, 0, __ATOMIC_RELAXED);
    l->driver = CRPCI_LOOP_WORKING;
    l->fresh = false;
}

/* Runs the tasks that are on the list now; one that queues itself again runs the next time. */
CRPCI_FN void crpci_loop_run_list(crpc_loop *l, crpci_list *list)
{
    crpci_list now;
    crpci_loop_assert_locked(l);
    crpci_list_move(&now, list);
    while (!crpci_list_empty(&now)) {
        crpci_task *t = CRPCI_CONTAINER(now.next, crpci_task, link);
        crpci_list_remove(&t->link);
        t->run(l, t);
    }
}

/* Runs the user tasks that are queued now. What they send goes out every 32 tasks, so that one
 * send carries several replies. */
CRPCI_FN void crpci_loop_run_ready(crpc_loop *l)
{
    crpci_list now;
    unsigned n = 0;
    crpci_list_move(&now, &l->ready);
    while (!crpci_list_empty(&now)) {
        crpci_task *t = CRPCI_CONTAINER(now.next, crpci_task, link);
        crpci_list_remove(&t->link);
        t->run(l, t);
        if (++n % 32 == 0)
            crpci_loop_run_list(l, &l->dirty);
    }
}

/* P6: a timer that is due before the driver, or the foreign loop, will wake by itself wakes it. */
CRPCI_FN void crpci_loop_timer_at(crpc_loop *l, crpci_timer *t, int64_t due)
{
    crpci_loop_assert_locked(l);
    crpci_timer_set(&l->timers, t, due);
    if (due < (l->driver != CRPCI_LOOP_UNDRIVEN ? l->wake_at : l->foreign_at))
        crpci_loop_kick(l);
}

CRPCI_FN void crpci_loop_timer_set(crpc_loop *l, crpci_timer *t, int64_t delay_us)
{
    crpci_loop_timer_at(l, t, crpci_loop_now(l) + (delay_us > 0 ? delay_us : 0));
}

CRPCI_FN void crpci_loop_timer_cancel(crpc_loop *l, crpci_timer *t)
{
    crpci_loop_assert_locked(l);
    crpci_timer_cancel(t);
}

CRPCI_FN void crpci_loop_run_timers(crpc_loop *l)
{
    crpci_timer *due, *t;
    if (crpci_loop_left(l, crpci_timer_next_us(&l->timers)))
        return;
    crpci_timer_advance(&l->timers, crpci_loop_time(l));
    due = l->timers.fired;
    if (!due)
        return;
    /* A timer that its own function sets to the present time belongs to the next step. */
    l->timers.fired = NULL;
    due->prev = &due;
    while ((t = due) != NULL) {
        crpci_timer_cancel(t);
        t->fn(l, t);
    }
}

/* ======================================================================== */
/* >>impl-watch   descriptors that a loop waits for                         */
/* ======================================================================== */

CRPCI_FN void crpci_watch_init(crpci_watch *w, void (*fn)(crpc_loop *, crpci_watch *, unsigned))
{
    memset(w, 0, sizeof *w);
    w->item.fd = -1;
    w->fn = fn;
}

/* Stops watching; events that the poller has reported already no longer find the watch. */
CRPCI_FN void crpci_watch_remove(crpc_loop *l, crpci_watch *w)
{
    crpci_poller_set(&l->poller, l->heap, &w->item, 0);
    crpci_id_remove(&l->watches, w->item.id);
    l->stats.watches--;
}

CRPCI_FN int crpci_watch_add(crpc_loop *l, crpci_watch *w, int fd, unsigned events)
{
    int err = crpci_id_add(&l->watches, l->heap, w, &w->item.id);
    if (err)
        return err;
    w->item.fd = fd;
    err = crpci_poller_set(&l->poller, l->heap, &w->item, events);
    if (err)
        crpci_id_remove(&l->watches, w->item.id);
    else
        l->stats.watches++;
    return err;
}

/* Watches a descriptor for `events`, which replace those from before; 0 stops. The poller reports
 * an {index, generation} id and not an address: the watch may be gone when its event is handled. */
CRPCI_FN int crpci_watch_set(crpc_loop *l, crpci_watch *w, int fd, unsigned events)
{
    int err = CRPC_OK;
    crpci_loop_assert_locked(l);
    if (w->item.events && (w->item.fd != fd || !events))
        crpci_watch_remove(l, w);
    if (events && !w->item.events)
        err = crpci_watch_add(l, w, fd, events);
    else if (events != w->item.events)
        err = crpci_poller_set(&l->poller, l->heap, &w->item, events);
    if (l->poller.kind == CRPC_POLLER_POLL) {
        if (l->foreign == CRPCI_LOOP_FOREIGN_POLLING)
            l->foreign = CRPCI_LOOP_FOREIGN_STALE;
        crpci_loop_kick(l); /* P6: poll sleeps on a copy of the descriptors */
    }
    return err;
}

/* ======================================================================== */
/* >>impl-user   what the program has on a loop: posts, timers, descriptors */
/* ======================================================================== */

/* Posts, timers and watches of the program are objects of one type: a task that runs a callback in
 * user code, with an id in l->users. A timer without a period, and a post, which is one that is due
 * at once, removes itself after its callback; the others stay until the program ends them or closes
 * the loop. */
typedef struct crpci_user {
    crpci_task task;
    uint64_t id;
    void *user;
    bool running;
    bool ended; /* while its callback ran, which frees it */
    crpc_timer_fn on_timer; /* NULL: a watch */
    crpci_timer timer;
    int64_t period_us;
    crpc_watch_fn on_event;
    crpci_watch watch;
    int fd;
    unsigned wanted; /* events that the program asked for */
    unsigned got;    /* events that its callback is still to be told */
} crpci_user;

/* Ends a post, timer or watch: its callback does not run again. */
CRPCI_FN void crpci_user_remove(crpc_loop *l, crpci_user *u)
{
    crpci_id_remove(&l->users, u->id);
    crpci_timer_cancel(&u->timer);
    crpci_watch_set(l, &u->watch, u->fd, 0);
    crpci_list_remove(&u->task.link);
    if (u->running)
        u->ended = true;
    else
        crpci_heap_free(l->heap, u, sizeof *u);
}

CRPCI_COLD void crpci_user_remove_all(crpc_loop *l)
{
    uint32_t i;
    for (i = 0; i < l->users.cap; i++) {
        if (l->users.slots[i].object)
            crpci_user_remove(l, (crpci_user *)l->users.slots[i].object);
    }
}

/* Runs the callback. Meanwhile, unlocked, the program may end the object: it is then freed here. */
CRPCI_FN void crpci_user_run(crpc_loop *l, crpci_task *task)
{
    crpci_user *u = CRPCI_CONTAINER(task, crpci_user, task);
    unsigned got = u->got & u->wanted;
    u->got = 0;
    u->running = true;
    crpci_loop_user_begin(l);
    if (u->on_timer)
        u->on_timer(u->user);
    else if (got)
        u->on_event(u->user, u->fd, got);
    crpci_loop_user_end(l);
    u->running = false;
    if (u->ended)
        crpci_heap_free(l->heap, u, sizeof *u);
    else if (!u->on_timer)
        crpci_watch_set(l, &u->watch, u->fd, u->wanted);
    else if (!u->period_us)
        crpci_user_remove(l, u);
}

/* A periodic timer keeps its rhythm; periods that have passed entirely are left out. */
CRPCI_FN void crpci_user_on_timer(crpc_loop *l, crpci_timer *timer)
{
    crpci_user *u = CRPCI_CONTAINER(timer, crpci_user, timer);
    if (u->period_us) {
        int64_t now = crpci_loop_now(l), next = timer->due_us + u->period_us;
        crpci_timer_set(&l->timers, timer, next > now ? next : now + u->period_us);
    }
    crpci_loop_ready(l, &u->task);
}

/* A driver that may not run user code (P8) stops watching the descriptor until the callback has
 * run: the poller reports a level, and the driver would spin. */
CRPCI_FN void crpci_user_on_event(crpc_loop *l, crpci_watch *watch, unsigned events)
{
    crpci_user *u = CRPCI_CONTAINER(watch, crpci_user, watch);
    u->got |= events;
    crpci_loop_ready(l, &u->task);
    if (!l->step_user)
        crpci_watch_set(l, watch, u->fd, 0);
}

/* A new object with an id; of a watch the caller sets the rest. NULL: out of memory. */
CRPCI_FN crpci_user *crpci_user_add(crpc_loop *l, crpc_timer_fn on_timer, void *user)
{
    crpci_user *u = (crpci_user *)crpci_heap_alloc(l->heap, sizeof *u);
    crpci_loop_assert_locked(l);
    if (!u)
        return NULL;
    u->on_timer = on_timer;
    u->user = user;
    u->fd = -1;
    crpci_loop_task_init(&u->task, crpci_user_run);
    crpci_timer_init(&u->timer, crpci_user_on_timer);
    crpci_watch_init(&u->watch, crpci_user_on_event);
    if (crpci_id_add(&l->users, l->heap, u, &u->id)) {
        crpci_heap_free(l->heap, u, sizeof *u);
        return NULL;
    }
    return u;
}

CRPC_API int crpc_loop_post(crpc_loop *l, void (*fn)(void *user), void *user)
{
    crpci_user *u;
    if (!fn)
        return CRPC_EINVAL;
    crpci_loop_lock(l);
    u = crpci_user_add(l, fn, user);
    if (u)
        crpci_loop_ready(l, &u->task);
    crpci_loop_unlock(l);
    return u ? CRPC_OK : CRPC_ENOMEM;
}

/* Whether the program watches a descriptor already. Programs watch few: a search is enough. */
CRPCI_FN bool crpci_user_watches(const crpc_loop *l, int fd)
{
    uint32_t i;
    for (i = 0; i < l->users.cap; i++) {
        const crpci_user *u = (const crpci_user *)l->users.slots[i].object;
        if (u && !u->on_timer && u->fd == fd)
            return true;
    }
    return false;
}

CRPC_API int crpc_loop_watch(crpc_loop *l, int fd, unsigned events, crpc_watch_fn fn, void *user,
                             crpc_id *id)
{
    crpci_user *u;
    int err = CRPC_ENOMEM;
    id->value = 0;
    if (fd < 0 || !fn || events & ~(CRPC_READABLE | CRPC_WRITABLE))
        return CRPC_EINVAL;
    crpci_loop_lock(l);
    if (crpci_user_watches(l, fd)) { /* epoll takes each descriptor once */
        crpci_loop_unlock(l);
        return CRPC_EBUSY;
    }
    u = crpci_user_add(l, NULL, user);
    if (u) {
        u->fd = fd;
        u->on_event = fn;
        u->wanted = events;
        err = crpci_watch_set(l, &u->watch, fd, events);
        if (err)
            crpci_user_remove(l, u);
        else
            id->value = u->id;
    }
    crpci_loop_unlock(l);
    return err;
}

CRPC_API int crpc_loop_rewatch(crpc_loop *l, crpc_id id, unsigned events)
{
    crpci_user *u;
    int err = CRPC_ENOTFOUND;
    if (events & ~(CRPC_READABLE | CRPC_WRITABLE))
        return CRPC_EINVAL;
    crpci_loop_lock(l);
    u = (crpci_user *)crpci_id_get(&l->users, id.value);
    if (u && !u->on_timer) {
        u->wanted = events;
        err = crpci_watch_set(l, &u->watch, u->fd, events);
    }
    crpci_loop_unlock(l);
    return err;
}

/* Ends a timer or a watch; an id that is stale, or of the other kind, is ignored. */
CRPCI_FN void crpci_user_stop(crpc_loop *l, crpc_id id, bool timer)
{
    crpci_user *u;
    crpci_loop_lock(l);
    u = (crpci_user *)crpci_id_get(&l->users, id.value);
    if (u && timer == (u->on_timer != NULL))
        crpci_user_remove(l, u);
    crpci_loop_unlock(l);
}

CRPC_API void crpc_loop_unwatch(crpc_loop *l, crpc_id id)
{
    crpci_user_stop(l, id, false);
}

CRPC_API int crpc_timer_start(crpc_loop *l, int64_t delay_ms, int64_t period_ms, crpc_timer_fn fn,
                              void *user, crpc_id *id)
{
    const int64_t longest = INT64_C(3153600000000); /* 100 years */
    crpci_user *u;
    crpc_id unwanted;
    id = id ? id : &unwanted;
    id->value = 0;
    if (!fn || delay_ms < 0 || period_ms < 0 || delay_ms > longest || period_ms > longest)
        return CRPC_EINVAL;
    crpci_loop_lock(l);
    u = crpci_user_add(l, fn, user);
    if (u) {
        u->period_us = period_ms * 1000;
        crpci_loop_timer_set(l, &u->timer, delay_ms * 1000);
        id->value = u->id;
    }
    crpci_loop_unlock(l);
    return u ? CRPC_OK : CRPC_ENOMEM;
}

CRPC_API void crpc_timer_stop(crpc_loop *l, crpc_id id)
{
    crpci_user_stop(l, id, true);
}

/* ======================================================================== */
/* >>impl-drive   who drives a loop, who waits, and how they take turns     */
/* ======================================================================== */

/* A thread that waits for something that the driver will do. It lives on that thread's stack, so
 * every access is made under the loop's lock, to the last (P5). All zero at first. */
typedef enum crpci_waiter_place {
    CRPCI_WAITER_APART,   /* it neither drives nor sleeps */
    CRPCI_WAITER_QUEUED,  /* it sleeps among the followers */
    CRPCI_WAITER_DRIVING  /* it drives, or was promoted in its sleep and is about to */
} crpci_waiter_place;

typedef struct crpci_waiter {
    crpci_list link;
    crpci_cond cond; /* initialised while queued */
    crpci_waiter_place place;
    bool done;
} crpci_waiter;

/* How long the poller may wait, in microseconds; negative: no limit. */
CRPCI_FN int64_t crpci_drive_patience(crpc_loop *l, int64_t until, bool user)
{
    int64_t at = crpci_timer_next_us(&l->timers);
    at = crpci_base_min64(at, until);
    l->wake_at = at;
    if ((user && !crpci_list_empty(&l->ready)) || !crpci_list_empty(&l->resume) ||
        !crpci_list_empty(&l->dirty) || l->skip_sleep || l->mode == CRPCI_LOOP_CLAIMED ||
        (l->mode == CRPCI_LOOP_OWNED && crpci_thread_load(&l->stop)))
        return 0;
    return at == INT64_MAX ? -1 : crpci_loop_left(l, at);
}

/* P5: one step: timers and tasks, then flush, sleep in the poller, handle the events. `until`
 * (INT64_MAX: none) bounds the sleep; `user` allows user code, which the driver that is itself a
 * synchronous caller never runs (P8): the program's callbacks could wait for a lock that the caller
 * holds, or outlast its deadline. Sending unlocks, so another thread may queue output after the
 * flush; the step then does not sleep, and the next one flushes. */
CRPCI_FN void crpci_drive_step(crpc_loop *l, int64_t until, bool user)
{
    int64_t patience;
    int n, i;
    crpci_loop_assert_locked(l);
    l->step_user = user;
    l->skip_sleep = false;
    crpci_loop_run_timers(l);
    crpci_loop_run_list(l, &l->resume);
    if (user)
        crpci_loop_run_ready(l);
    crpci_loop_run_list(l, &l->dirty);
    patience = crpci_drive_patience(l, until, user);
    if (crpci_poller_prepare(&l->poller, l->heap)) /* out of memory: some are not waited for */
        patience = crpci_base_min64(patience < 0 ? 1000 : patience, 1000);
    l->stats.waits++;
    l->driver = CRPCI_LOOP_SLEEPING;
    l->fresh = false;
    crpci_loop_unlock(l);
    n = crpci_poller_wait(&l->poller, patience);
    crpci_loop_lock(l);
    l->driver = CRPCI_LOOP_WORKING;
    l->fresh = false; /* a caller may have read the clock meanwhile */
    l->last_step = crpci_loop_time(l);
    for (i = 0; i < n; i++) {
        crpci_poller_event e = crpci_poller_found(&l->poller, i);
        crpci_watch *w = (crpci_watch *)crpci_id_get(&l->watches, e.id);
        if (w)
            w->fn(l, w, e.events);
    }
    if (user)
        crpci_loop_run_ready(l);
    crpci_loop_run_list(l, &l->dirty);
}

/* Whether what a foreign loop polls for has changed while a caller drove. */
CRPCI_FN bool crpci_drive_foreign_due(const crpc_loop *l)
{
    return l->foreign != CRPCI_LOOP_NOT_FOREIGN &&
           (l->foreign == CRPCI_LOOP_FOREIGN_STALE || !crpci_list_empty(&l->resume) ||
            crpci_timer_next_us(&l->timers) < l->foreign_at);
}

/* P4: every way out of driving leads through here, and hands over before the lock is released: to
 * an owner that waits, else to the follower that has waited longest (P11). Without either the loop
 * is undriven. The driver flushes before it leaves; without a successor, until nothing is
 * queued. */
CRPCI_FN void crpci_drive_leave(crpc_loop *l)
{
    crpci_loop_assert_locked(l);
    CRPCI_ASSERT(l->mode != CRPCI_LOOP_OWNED, "the driver of an owned loop leaves");
    do {
        crpci_loop_run_list(l, &l->dirty);
    } while (!crpci_list_empty(&l->dirty) && l->mode != CRPCI_LOOP_CLAIMED &&
             crpci_list_empty(&l->followers));
    l->driver = CRPCI_LOOP_UNDRIVEN;
    l->fresh = false;
    if (!crpci_list_empty(&l->ready) || crpci_drive_foreign_due(l))
        crpci_loop_kick(l);
    if (l->mode == CRPCI_LOOP_CLAIMED || l->end == CRPCI_LOOP_CLOSING) {
        crpci_thread_broadcast(&l->owner_cond);
    } else if (!crpci_list_empty(&l->followers)) {
        crpci_waiter *w = CRPCI_CONTAINER(l->followers.next, crpci_waiter, link);
        crpci_list_remove(&w->link);
        w->place = CRPCI_WAITER_DRIVING;
        l->driver = CRPCI_LOOP_WORKING; /* on behalf of w, until that thread runs */
        l->stats.promotions++;
        crpci_thread_signal(&w->cond);
    }
}

/* P5, P9: marks what a waiter waits for as done, and wakes it only if it sleeps. The waiter does
 * the rest on its own thread: decoding, retries, policy. */
CRPCI_FN void crpci_drive_end_wait(crpc_loop *l, crpci_waiter *w)
{
    crpci_loop_assert_locked(l);
    w->done = true;
    if (w->place == CRPCI_WAITER_QUEUED) {
        crpci_thread_signal(&w->cond);
    } else if (w->place == CRPCI_WAITER_DRIVING) {
        l->skip_sleep = true;
        crpci_loop_kick(l);
    }
}

/* Sleeps among the followers until promoted, done, or past `until`. */
CRPCI_FN void crpci_drive_follow(crpc_loop *l, crpci_waiter *w, int64_t until)
{
    int64_t us = until - crpci_loop_now(l);
    if (crpci_thread_cond_init(&w->cond)) {
        w->done = true; /* no memory for a condition variable: giving up is better than to spin */
        return;
    }
    w->place = CRPCI_WAITER_QUEUED;
    l->fresh = false;
    crpci_list_append(&l->followers, &w->link);
    crpci_thread_wait(&w->cond, &l->lock, us > 0 ? us : 0);
    if (w->place == CRPCI_WAITER_QUEUED) {
        crpci_list_remove(&w->link);
        w->place = CRPCI_WAITER_APART;
    }
    crpci_thread_cond_free(&w->cond);
}

/* P3: waits until w->done or `until`: drives a loop that is undriven, follows the driver of any
 * other. `user`: as the driver, run callbacks too (P8). */
CRPCI_FN void crpci_drive_wait(crpc_loop *l, crpci_waiter *w, int64_t until, bool user)
{
    crpci_loop_assert_locked(l);
    l->fresh = false; /* encoding the request may have taken long */
    while (!w->done && crpci_loop_left(l, until)) {
        if (l->driver == CRPCI_LOOP_UNDRIVEN && l->mode == CRPCI_LOOP_PASSIVE) {
            l->driver = CRPCI_LOOP_WORKING;
            w->place = CRPCI_WAITER_DRIVING;
        }
        if (w->place == CRPCI_WAITER_DRIVING)
            crpci_drive_step(l, until, user);
        else
            crpci_drive_follow(l, w, until);
        if (w->place == CRPCI_WAITER_DRIVING && l->mode == CRPCI_LOOP_CLAIMED) {
            w->place = CRPCI_WAITER_APART;
            crpci_drive_leave(l);
        }
    }
    if (w->place == CRPCI_WAITER_DRIVING) { /* also promoted when it was done, or too late */
        w->place = CRPCI_WAITER_APART;
        if (CRPCI_RULE_P4 || !w->done)
            crpci_drive_leave(l);
    }
}

/* P10: a passive loop that was idle for 10 ms takes one step without waiting before it sends: a
 * connection that the peer closed meanwhile is found before a request is written into it. Back to
 * back, calls do without, and cost one send, one wait and one receive each. */
CRPCI_FN void crpci_drive_catch_up(crpc_loop *l)
{
    if (l->driver != CRPCI_LOOP_UNDRIVEN || l->mode != CRPCI_LOOP_PASSIVE ||
        crpci_loop_rough_time(l) - l->last_step < 10000)
        return;
    l->driver = CRPCI_LOOP_WORKING;
    crpci_drive_step(l, 0, false);
    crpci_drive_leave(l);
}

/* --- owners ----------------------------------------------------------------------------------- */

/* Waits until the caller that drives has left, then owns the loop. */
CRPCI_FN void crpci_drive_take_over(crpc_loop *l)
{
    l->mode = CRPCI_LOOP_CLAIMED;
    while (l->driver != CRPCI_LOOP_UNDRIVEN) {
        crpci_loop_kick(l);
        crpci_thread_wait(&l->owner_cond, &l->lock, -1);
    }
    l->mode = CRPCI_LOOP_OWNED;
    l->driver = CRPCI_LOOP_WORKING;
    l->fresh = false;
}

/* Becomes the owner. CRPC_EDEADLK: this thread is inside a callback of the loop. CRPC_EBUSY: the
 * loop has an owner. */
CRPCI_FN int crpci_drive_own(crpc_loop *l)
{
    crpci_loop_assert_locked(l);
    if (crpci_loop_in_callback(l))
        return CRPC_EDEADLK;
    if (l->mode != CRPCI_LOOP_PASSIVE)
        return CRPC_EBUSY;
    crpci_drive_take_over(l);
    return CRPC_OK;
}

/* Before a loop is freed: runs the callbacks that are due, and ends the program's timers and
 * watches. A callback may queue the next one, but not for ever. */
CRPCI_COLD void crpci_drive_finish(crpc_loop *l)
{
    int rounds = 1000;
    while (!crpci_list_empty(&l->ready) && rounds--)
        crpci_loop_run_ready(l);
    crpci_user_remove_all(l);
}

/* Joins the own thread if it has ended; it needs no lock for its last instructions. */
CRPCI_FN void crpci_drive_join(crpc_loop *l)
{
#if CRPC_ENABLE_THREADS
    if (l->thread_state == CRPCI_LOOP_THREAD_ENDED) {
        crpci_thread_join(l->thread);
        l->thread_state = CRPCI_LOOP_NO_THREAD;
    }
#endif
    (void)l;
}

/* Ends ownership and unlocks. A loop that a callback has closed loses its last reference here. */
CRPCI_FN void crpci_drive_disown(crpc_loop *l)
{
    bool disposed = l->end == CRPCI_LOOP_DISPOSED;
    if (disposed)
        crpci_drive_finish(l);
    l->mode = CRPCI_LOOP_PASSIVE;
    l->end = disposed ? CRPCI_LOOP_OPEN : l->end;
    crpci_drive_leave(l);
    if (l->thread_state != CRPCI_LOOP_NO_THREAD && crpci_thread_is_self(l->thread))
        l->thread_state = CRPCI_LOOP_THREAD_ENDED;
    else if (disposed)
        crpci_drive_join(l);
    crpci_loop_unlock(l);
    if (disposed)
        crpci_loop_release(l);
}

/* Unlocks after a wait that ran callbacks, one of which may have closed the loop. */
CRPCI_FN void crpci_drive_unlock(crpc_loop *l)
{
    if (l->end == CRPCI_LOOP_DISPOSED && crpci_drive_own(l) == CRPC_OK)
        crpci_drive_disown(l);
    else
        crpci_loop_unlock(l);
}

/* Steps as the owner until stopped. */
CRPCI_FN void crpci_drive_run(crpc_loop *l)
{
    while (!crpci_thread_load(&l->stop))
        crpci_drive_step(l, INT64_MAX, true);
    crpci_thread_store(&l->stop, 0);
}

#if CRPC_ENABLE_THREADS
/* The loop's own thread. crpci_drive_start_thread has claimed the loop for it. */
CRPCI_FN void *crpci_drive_thread(void *arg)
{
    crpc_loop *l = (crpc_loop *)arg;
    crpci_thread_name(l->thread_name);
    crpci_loop_lock(l);
    crpci_drive_take_over(l);
    crpci_drive_run(l);
    if (l->end == CRPCI_LOOP_DISPOSED) { /* closed inside a callback: no thread will join it */
        pthread_detach(pthread_self());
        l->thread_state = CRPCI_LOOP_NO_THREAD;
    }
    crpci_drive_disown(l);
    crpci_loop_release(l);
    return NULL;
}
#endif

CRPCI_FN int crpci_drive_start_thread(crpc_loop *l)
{
#if CRPC_ENABLE_THREADS
    int err;
    crpci_loop_assert_locked(l);
    crpci_drive_join(l);
    if (l->mode != CRPCI_LOOP_PASSIVE || l->thread_state != CRPCI_LOOP_NO_THREAD)
        return CRPC_EBUSY;
    crpci_thread_store(&l->stop, 0); /* a stop from before was not meant for the new thread */
    l->mode = CRPCI_LOOP_CLAIMED;
    crpci_loop_hold(l); /* the thread's reference */
    err = crpci_thread_start(&l->thread, (size_t)l->stack_size, crpci_drive_thread, l);
    if (err) {
        l->mode = CRPCI_LOOP_PASSIVE;
        crpci_loop_release(l);
        return err;
    }
    l->thread_state = CRPCI_LOOP_THREAD_RUNS;
    crpci_loop_kick(l);
    return CRPC_OK;
#else
    (void)l;
    return CRPC_EUNSUPPORTED;
#endif
}

/* P8: the callback of an asynchronous call needs a thread that runs it. Where the program neither
 * owns nor steps the loop, the loop's own thread is started. CRPC_EINVAL: the option forbids it. */
CRPCI_FN int crpci_drive_ensure_owner(crpc_loop *l)
{
    crpci_loop_assert_locked(l);
    if (l->mode != CRPCI_LOOP_PASSIVE || l->foreign != CRPCI_LOOP_NOT_FOREIGN ||
        l->thread_state == CRPCI_LOOP_THREAD_RUNS)
        return CRPC_OK;
    return l->forbid_threads ? CRPC_EINVAL : crpci_drive_start_thread(l);
}

/* --- opening and closing ---------------------------------------------------------------------- */

#define CRPCI_DRIVE_OPTION(member, name, flags, zero, none, most)                                  \
    CRPCI_OPTION_ROW(crpc_loop_options, member, name, flags, zero, none, most)

static const crpci_option crpci_drive_rows[] = {
    CRPCI_DRIVE_OPTION(poller, "poller\0,epoll,poll", CRPCI_OPTION_WORDS, 0, 0, 2),
    CRPCI_DRIVE_OPTION(forbid_threads, "forbid_threads", 0, 0, 0, 1),
    CRPCI_DRIVE_OPTION(stack_size, "stack_size", CRPCI_OPTION_STACK, 256 << 10, 0,
                       CRPCI_OPTION_ANY),
    CRPCI_DRIVE_OPTION(max_results, "max_results", 0, 1024, 0, CRPCI_OPTION_ANY),
    CRPCI_DRIVE_OPTION(max_bytes, "max_bytes", 0, 256 << 20, 0, CRPCI_OPTION_ANY),
    /* The hooks are resolved by the heap, which loops share with their I/O threads. */
    CRPCI_DRIVE_OPTION(hooks.log_level, "log_level", 0, 0, -1, 4),
    CRPCI_DRIVE_OPTION(thread_name, "thread_name", CRPCI_OPTION_TEXT, 0, 0, 0),
};

static const crpci_options crpci_drive_options = {CRPCI_OPTIONS_OF(crpci_drive_rows)};

/* The wake descriptor is readable: a kick has come, or crpc_loop_stop. */
CRPCI_FN void crpci_drive_on_wake(crpc_loop *l, crpci_watch *w, unsigned events)
{
    (void)w;
    (void)events;
    crpci_wake_drain(&l->wake);
    l->kicked = false;
}

/* Fills in a loop that is all zero. The seed of the random numbers differs from process to process,
 * the salt of the ids from loop to loop. */
CRPCI_FN void crpci_drive_init(crpc_loop *l, crpci_heap *h, const crpc_loop_options *o)
{
    l->heap = h;
    l->refs = 1;
    l->wake.read_fd = l->wake.write_fd = l->poller.epoll_fd = -1;
    crpci_list_init(&l->ready);
    crpci_list_init(&l->resume);
    crpci_list_init(&l->dirty);
    crpci_list_init(&l->followers);
    crpci_list_init(&l->conns);
    crpci_list_init(&l->endpoints);
    crpci_list_init(&l->registries);
    l->forbid_threads = o->forbid_threads || !CRPC_ENABLE_THREADS;
    snprintf(l->thread_name, sizeof l->thread_name, "%s", o->thread_name ? o->thread_name : "crpc");
    l->stack_size = o->stack_size;
    l->max_results = o->max_results;
    l->last_step = crpci_loop_now(l);
    l->timers.tick = l->last_step / 1000;
    l->random = crpci_loop_seed(l);
    l->users.salt = crpci_loop_random(l);
    l->calls.salt = crpci_loop_random(l);
}

CRPC_API int crpc_loop_open(crpc_loop **loop, const crpc_loop_options *options)
{
    crpc_loop_options o;
    crpci_heap *h;
    crpc_loop *l;
    int err;
    *loop = NULL;
    memset(&o, 0, sizeof o);
    if (options)
        o = *options;
    if (!crpci_message_self_check())
        return CRPC_EABI;
    err = crpci_options_check(&crpci_drive_options, &o, NULL);
    if (err)
        return err;
    crpci_options_fill(&crpci_drive_options, &o);
    err = crpci_heap_open(&h, &o.hooks, o.max_bytes);
    if (err)
        return err;
    l = (crpc_loop *)crpci_heap_alloc(h, sizeof *l);
    if (!l) {
        crpci_heap_unref(h);
        return CRPC_ENOMEM;
    }
    crpci_drive_init(l, h, &o);
    err = crpci_thread_mutex_init(&l->lock);
    err = err ? err : crpci_thread_cond_init(&l->owner_cond);
    err = err ? err : crpci_thread_cond_init(&l->io_cond);
    err = err ? err : crpci_poller_open(&l->poller, h, o.poller);
    err = err ? err : crpci_wake_open(&l->wake, h);
    crpci_watch_init(&l->wake_watch, crpci_drive_on_wake);
    if (!err) {
        crpci_loop_lock(l);
        err = crpci_watch_set(l, &l->wake_watch, l->wake.read_fd, CRPC_READABLE);
        err = err ? err : crpci_poller_prepare(&l->poller, h);
        crpci_loop_unlock(l);
    }
    if (err) {
        crpci_loop_free(l);
        return err;
    }
    *loop = l;
    return CRPC_OK;
}

CRPC_API void crpc_loop_close(crpc_loop *l)
{
    if (!l)
        return;
    crpci_loop_lock(l);
    if (crpci_loop_in_callback(l)) {
        l->end = CRPCI_LOOP_DISPOSED;
        crpci_thread_store(&l->stop, 1);
        crpci_loop_unlock(l);
        return;
    }
    l->end = CRPCI_LOOP_CLOSING;
    while (l->mode != CRPCI_LOOP_PASSIVE) { /* crpc_loop_step clears a stop, so it is set again */
        crpci_thread_store(&l->stop, 1);
        crpci_wake_kick(&l->wake);
        crpci_thread_wait(&l->owner_cond, &l->lock, 100000);
    }
    if (crpci_drive_own(l) == CRPC_OK) {
        crpci_drive_finish(l);
        l->mode = CRPCI_LOOP_PASSIVE;
        crpci_drive_leave(l);
    }
    crpci_drive_join(l); /* not before: a thread that leaves may send, unlocked, until it left */
    crpci_loop_unlock(l);
    crpci_loop_release(l);
}

CRPC_API int crpc_loop_run(crpc_loop *l)
{
    int err;
    crpci_loop_lock(l);
    err = crpci_drive_own(l);
    if (err) {
        crpci_loop_unlock(l);
        return err;
    }
    crpci_drive_run(l);
    crpci_drive_disown(l);
    return CRPC_OK;
}

/* A program that steps is taken for one with a loop of its own: it will step again, so asynchronous
 * calls need no thread, and it asks for descriptors and timeout before it polls. */
CRPC_API int crpc_loop_step(crpc_loop *l, int timeout_ms)
{
    int64_t until = INT64_MAX;
    int err;
    crpci_loop_lock(l);
    l->foreign = CRPCI_LOOP_FOREIGN_AWAKE;
    l->foreign_at = 0;
    err = crpci_drive_own(l);
    if (err) {
        crpci_loop_unlock(l);
        return err;
    }
    if (timeout_ms >= 0)
        until = crpci_loop_now(l) + (int64_t)timeout_ms * 1000;
    crpci_drive_step(l, until, true);
    crpci_thread_store(&l->stop, 0); /* a stop ends this step and none to come */
    crpci_drive_disown(l);
    return CRPC_OK;
}

CRPC_API int crpc_loop_start(crpc_loop *l)
{
    int err;
    crpci_loop_lock(l);
    err = crpci_drive_start_thread(l);
    crpci_loop_unlock(l);
    return err;
}

CRPC_API void crpc_loop_stop(crpc_loop *l)
{
    crpci_thread_store(&l->stop, 1);
    crpci_wake_kick(&l->wake);
}

/* --- inside a loop of the program's ----------------------------------------------------------- */

/* The program polls, or will poll, for the loop: until `at`, unless that was said before. */
CRPCI_FN void crpci_drive_foreign(crpc_loop *l, crpci_loop_foreign state, int64_t at)
{
    crpci_loop_assert_locked(l);
    if (l->foreign >= state)
        return;
    l->foreign = state;
    l->foreign_at = at;
}

CRPC_API int crpc_loop_fd(crpc_loop *l)
{
    crpci_loop_lock(l);
    crpci_drive_foreign(l, CRPCI_LOOP_FOREIGN_AWAKE, 0);
    crpci_loop_unlock(l);
    return l->poller.epoll_fd;
}

CRPC_API size_t crpc_loop_pollfds(crpc_loop *l, struct pollfd *fds, size_t max)
{
    size_t n = 1, i;
    crpci_loop_lock(l);
    crpci_drive_foreign(l, CRPCI_LOOP_FOREIGN_POLLING, INT64_MAX);
    if (l->poller.kind == CRPC_POLLER_EPOLL) {
        if (max) {
            fds->fd = l->poller.epoll_fd;
            fds->events = POLLIN;
            fds->revents = 0;
        }
    } else {
        n = l->poller.count;
        for (i = 0; i < n && i < max; i++)
            fds[i] = crpci_poller_pollfd(l->poller.items[i]);
    }
    crpci_loop_unlock(l);
    return n;
}

CRPC_API int crpc_loop_timeout(crpc_loop *l)
{
    int ms;
    crpci_loop_lock(l);
    l->fresh = false; /* the program did other things since the loop last read the clock */
    ms = crpci_poller_ms(crpci_drive_patience(l, INT64_MAX, true));
    crpci_drive_foreign(l, CRPCI_LOOP_FOREIGN_POLLING, 0);
    l->foreign_at = l->wake_at;
    crpci_loop_unlock(l);
    return ms;
}

CRPC_API int64_t crpc_loop_now_us(const crpc_loop *l)
{
    return crpci_loop_now(l);
}

CRPC_API void crpc_loop_stats_get(crpc_loop *l, crpc_loop_stats *stats)
{
    crpci_loop_lock(l);
    *stats = l->stats;
    stats->poller = crpci_poller_name(&l->poller);
    stats->pending = l->calls.used;
    crpci_loop_unlock(l);
    crpci_thread_lock(&l->heap->lock);
    stats->memory = l->heap->bytes;
    stats->memory_peak = l->heap->peak;
    crpci_thread_unlock(&l->heap->lock);
}

/* ======================================================================== */
/* >>impl-limiter   token buckets, retry budgets, adaptive concurrency limits */
/* ======================================================================== */

/* What the end of an attempt tells the balancer and the breaker about the provider. */
typedef enum crpci_outcome {
    CRPCI_OUTCOME_OK,
    CRPCI_OUTCOME_ERROR,
    CRPCI_OUTCOME_IGNORE /* nothing: the attempt was cancelled, or refused over a limit */
} crpci_outcome;

/* A token bucket in the form of the generic cell rate algorithm (GCRA). It counts what was taken
 * and has not come back yet, as a debt in millionths of a token: each microsecond pays back exactly
 * per_second of them, so nothing is ever rounded. All zero, it limits nothing. */
#define CRPCI_LIMITER_TOKEN INT64_C(1000000)
#define CRPCI_LIMITER_MOST (INT64_C(1) << 40) /* of rate and burst: their products fit 62 bits */

typedef struct crpci_limiter_bucket {
    int64_t per_second; /* 0: no limit */
    int64_t most;       /* the largest debt: the burst */
    int64_t clear_us;   /* the time in which the largest debt is paid back */
    int64_t debt;       /* as of at_us */
    int64_t at_us;
} crpci_limiter_bucket;

/* per_second below 1: no limit. burst below 1: one second's worth. */
CRPCI_COLD void crpci_limiter_bucket_init(crpci_limiter_bucket *b, int64_t per_second,
                                          int64_t burst)
{
    memset(b, 0, sizeof *b);
    if (per_second < 1)
        return;
    b->per_second = crpci_base_min64(per_second, CRPCI_LIMITER_MOST);
    burst = crpci_base_min64(burst < 1 ? b->per_second : burst, CRPCI_LIMITER_MOST);
    b->most = burst * CRPCI_LIMITER_TOKEN;
    b->clear_us = b->most / b->per_second + 1;
    b->at_us = INT64_MIN / 2;
}

/* Takes a token; false: there is none. */
CRPCI_FN bool crpci_limiter_bucket_take(crpci_limiter_bucket *b, int64_t now_us)
{
    int64_t passed = now_us - b->at_us;
    if (!b->per_second)
        return true;
    if (passed > 0) { /* a clock that steps back pays nothing back */
        b->debt = passed < b->clear_us ? b->debt - passed * b->per_second : 0;
        b->debt = b->debt > 0 ? b->debt : 0;
        b->at_us = now_us;
    }
    if (b->debt + CRPCI_LIMITER_TOKEN > b->most)
        return false;
    b->debt += CRPCI_LIMITER_TOKEN;
    return true;
}

/* A retry budget: each retry costs a token, each successful call earns some tenths of one. When all
 * calls fail, no more retries are made than there were tokens, so that retries cannot multiply the
 * load of providers that are down for being overloaded. */
typedef struct crpci_limiter_budget {
    uint64_t tenths;
    uint64_t most;
    uint32_t earn;
} crpci_limiter_budget;

CRPCI_FN void crpci_limiter_budget_init(crpci_limiter_budget *b, uint32_t tokens,
                                        uint32_t earn_tenths)
{
    b->tenths = b->most = (uint64_t)tokens * 10;
    b->earn = earn_tenths;
}

CRPCI_FN bool crpci_limiter_budget_spend(crpci_limiter_budget *b)
{
    if (b->tenths < 10)
        return false;
    b->tenths -= 10;
    return true;
}

/* For a call that has succeeded. */
CRPCI_FN void crpci_limiter_budget_earn(crpci_limiter_budget *b)
{
    b->tenths += b->earn;
    if (b->tenths > b->most)
        b->tenths = b->most;
}

/* The adaptive limit of calls in service that brpc calls "auto". By Little's law a server that is
 * just busy holds (replies a second at most) x (latency without a queue) calls. Both are measured;
 * the limit is their product and 6 to 30 per cent more: more as long as latency does not grow, to
 * find out whether the server can do more. The latency without a queue is measured anew from time
 * to time, while fewer calls are let in. Three things differ from brpc:
 * - A first measurement during an overload contains the queue. So the latency is measured anew soon
 *   after the start, and soon again as long as it comes out much lower; while calls are refused,
 *   only half as many calls are let in for it, where brpc lets nine tenths in.
 * - The most replies a second fade faster while calls are refused: then the server has become
 *   slower. Otherwise fewer replies may only mean fewer calls.
 * - A limit that the calls did not reach while latency was low is not lowered: few calls do not
 *   mean a weak server, and after a quiet time the next calls would be refused without reason.
 * / */
#define CRPCI_LIMITER_SAMPLES 200       /* so many samples end a window */
#define CRPCI_LIMITER_SAMPLES_LEAST 100 /* a window with fewer changes nothing */
#define CRPCI_LIMITER_SAMPLE_US 100     /* two samples are at least so far apart */
#define CRPCI_LIMITER_WINDOW_US 1000000 /* the longest window */
#define CRPCI_LIMITER_ANEW_US 25000000  /* once to twice this, between measurements of free_us */
#define CRPCI_LIMITER_ANEW_SOON_US 2000000 /* the same while the last one may hold a queue */
#define CRPCI_LIMITER_EXPLORE_LEAST 6 /* per cent; steps lead from one end exactly to the other */
#define CRPCI_LIMITER_EXPLORE_MOST 30
#define CRPCI_LIMITER_EXPLORE_STEP 2
#define CRPCI_LIMITER_LATENCY_MOST 60000000        /* longer ones count as this */
#define CRPCI_LIMITER_QPS_MOST INT64_C(1000000000) /* a million a second, in thousandths */

typedef struct crpci_limiter_auto {
    uint32_t least;
    uint32_t limit;
    uint32_t active;    /* calls in service */
    uint32_t peak;      /* the most of them in this window */
    uint32_t samples;   /* of this window */
    uint32_t ok;        /* those that succeeded */
    uint32_t replies;   /* all successes of this window, samples or not */
    bool refused;       /* a call was refused in this window */
    bool soon;          /* free_us may still contain a queue: measure it again soon */
    uint8_t explore;    /* per cent that the limit is above the product */
    int64_t sum_us;     /* of the samples' latencies */
    int64_t window_us;  /* when this window began; 0: none has */
    int64_t sample_us;  /* when the last sample was taken */
    uint32_t free_us;   /* latency without a queue; 0: not measured */
    uint32_t free_was;  /* its value from the measurement before */
    uint32_t qps;       /* the most replies a second, fading; in thousandths */
    int64_t anew_us;    /* when to measure free_us anew; 0: not planned */
    int64_t drained_us; /* while it is measured: when the queue will be gone; 0: it is not */
} crpci_limiter_auto;

/* The limit starts at `start` and is never below `least`; both are 1 at least. */
CRPCI_FN void crpci_limiter_auto_init(crpci_limiter_auto *a, uint32_t least, uint32_t start)
{
    memset(a, 0, sizeof *a);
    a->least = least ? least : 1;
    a->limit = start > a->least ? start : a->least;
    a->explore = CRPCI_LIMITER_EXPLORE_MOST;
    a->soon = true;
}

/* Lets a call in, which must then leave. False: the limit is reached. */
CRPCI_FN bool crpci_limiter_auto_enter(crpci_limiter_auto *a)
{
    if (a->active >= a->limit) {
        a->refused = true;
        return false;
    }
    if (++a->active > a->peak)
        a->peak = a->active;
    return true;
}

/* Begins a new window. */
CRPCI_FN void crpci_limiter_auto_window(crpci_limiter_auto *a, int64_t now_us)
{
    a->peak = a->active;
    a->samples = a->ok = a->replies = 0;
    a->refused = false;
    a->sum_us = 0;
    a->window_us = now_us;
}

CRPCI_FN void crpci_limiter_auto_set(crpci_limiter_auto *a, int64_t limit)
{
    limit = crpci_base_min64(limit, INT32_MAX);
    a->limit = limit > (int64_t)a->least ? (uint32_t)limit : a->least;
}

/* Plans the next measurement, at a time that differs from server to server: they must not all let
 * fewer calls in at once. */
CRPCI_FN void crpci_limiter_auto_plan(crpci_limiter_auto *a, int64_t now_us)
{
    int64_t wait = a->soon ? CRPCI_LIMITER_ANEW_SOON_US : CRPCI_LIMITER_ANEW_US;
    uint32_t draw = (uint32_t)now_us * 2654435769u; /* Knuth's multiplicative hash */
    a->anew_us = now_us + wait + (int64_t)((uint64_t)wait * draw >> 32);
}

/* Takes the averages of a full window into the two measured numbers. */
CRPCI_FN void crpci_limiter_auto_measure(crpci_limiter_auto *a, uint32_t avg_us, uint32_t qps)
{
    uint32_t part = a->refused ? 20 : 100;
    if (!a->free_us) {
        a->free_us = avg_us;
        a->soon = !a->free_was || avg_us < a->free_was - a->free_was / 5;
    } else if (avg_us < a->free_us) {
        a->free_us = (avg_us + a->free_us * 9) / 10;
    }
    a->free_us = a->free_us > 0 ? a->free_us : 1;
    a->qps = qps >= a->qps ? qps : a->qps - (a->qps - qps) / part;
}

/* Sets the limit by a full window. */
CRPCI_FN void crpci_limiter_auto_adjust(crpci_limiter_auto *a, int64_t now_us)
{
    int64_t passed = now_us > a->window_us ? now_us - a->window_us : 1;
    /* the failures' time counts too */
    uint32_t avg_us = (uint32_t)crpci_base_min64((a->sum_us + a->ok - 1) / a->ok,
                                                 CRPCI_LIMITER_LATENCY_MOST);
    uint32_t qps = (uint32_t)crpci_base_min64((int64_t)a->replies * 1000000000 / passed,
                                              CRPCI_LIMITER_QPS_MOST);
    uint32_t percent;
    int64_t limit;
    bool quick, more;
    crpci_limiter_auto_measure(a, avg_us, qps);
    quick = (uint64_t)avg_us * 100 <= (uint64_t)a->free_us * (100 + CRPCI_LIMITER_EXPLORE_LEAST);
    if (!a->anew_us)
        crpci_limiter_auto_plan(a, now_us);
    if (now_us >= a->anew_us) {
        percent = a->refused ? 50 : 90;
        a->drained_us = now_us + avg_us * 2;
    } else {
        more = quick ||
               (uint64_t)qps * (100 + CRPCI_LIMITER_EXPLORE_LEAST) <= (uint64_t)a->qps * 100;
        if (more && a->explore < CRPCI_LIMITER_EXPLORE_MOST)
            a->explore = (uint8_t)(a->explore + CRPCI_LIMITER_EXPLORE_STEP);
        else if (!more && a->explore > CRPCI_LIMITER_EXPLORE_LEAST)
            a->explore = (uint8_t)(a->explore - CRPCI_LIMITER_EXPLORE_STEP);
        percent = 100 + a->explore;
    }
    /* both factors are below 2^30, so this is below 2^60 */
    limit = ((int64_t)a->free_us * a->qps / 1000 * percent + 99999999) / 100000000;
    if (limit < (int64_t)a->limit && a->peak < a->limit && avg_us * 2 <= a->free_us * 3)
        return; /* the calls did not reach the limit, and latency was low */
    crpci_limiter_auto_set(a, limit);
}

/* A call leaves. ok: it succeeded. latency_us: how long it was in service; -1: the call is no
 * measure of the server (refused for another reason, or cancelled). */
CRPCI_FN void crpci_limiter_auto_leave(crpci_limiter_auto *a, bool ok, int64_t latency_us,
                                       int64_t now_us)
{
    if (a->active)
        a->active--;
    if (latency_us < 0)
        return;
    a->replies += ok;
    if (now_us - a->sample_us < CRPCI_LIMITER_SAMPLE_US && a->window_us)
        return;
    a->sample_us = now_us;
    if (a->drained_us) {
        if (now_us < a->drained_us)
            return;
        a->drained_us = a->anew_us = 0;
        a->free_was = a->free_us;
        a->free_us = 0;
        crpci_limiter_auto_window(a, now_us);
    }
    if (!a->window_us)
        crpci_limiter_auto_window(a, now_us);
    a->sum_us += crpci_base_min64(latency_us, CRPCI_LIMITER_LATENCY_MOST);
    a->samples++;
    a->ok += ok;
    if (a->samples < CRPCI_LIMITER_SAMPLES && now_us - a->window_us < CRPCI_LIMITER_WINDOW_US)
        return;
    if (a->samples >= CRPCI_LIMITER_SAMPLES_LEAST && a->ok)
        crpci_limiter_auto_adjust(a, now_us);
    else if (a->samples >= CRPCI_LIMITER_SAMPLES_LEAST)
        crpci_limiter_auto_set(a, a->limit / 2);
    crpci_limiter_auto_window(a, now_us);
}

/* ======================================================================== */
/* >>impl-breaker   a provider that fails gets no calls, then a probe, then more */
/* ======================================================================== */

/* Closed: the breaker counts outcomes over the last window_us, in slices. When of at least
 * min_requests too many were errors, or slow, it opens. Open: the provider gets no calls, for a
 * time. Then the next call is a probe, and no other goes to the provider until it ends. If the
 * probe succeeds the breaker closes, and the share of calls that it lets through grows from a tenth
 * to all within ramp_us; if the probe fails, or is slow where slowness counts, the breaker opens
 * again for twice as long.
 *
 * A call that began before the breaker last opened or closed does not count when it ends: it must
 * neither decide a probe nor fill the window of a provider that has recovered. */
#define CRPCI_BREAKER_SLICES 8
#define CRPCI_BREAKER_AGAIN_US 30000000 /* a breaker that opens so soon after closing doubles */
#define CRPCI_BREAKER_LOST_US 30000000  /* a probe not ended after this and open_max_us is lost */
#define CRPCI_BREAKER_RAMP_PERCENT 10   /* share of calls with which the ramp begins */

typedef struct crpci_breaker_options {
    int error_percent;   /* opens at this share of errors. 0: no breaker; over 100: never */
    int min_requests;    /* a window with fewer calls does not open it; 0: 1 */
    int64_t window_us;
    int64_t slow_us;     /* a call that takes this long is slow. 0: latency does not count */
    int slow_percent;    /* opens at this share of slow calls. 0: latency does not count */
    int64_t open_us;     /* how long it is open the first time */
    int64_t open_max_us; /* the longest that doubling gives; below open_us: open_us */
    int64_t ramp_us;     /* 0: all calls at once */
} crpci_breaker_options;

typedef enum {
    CRPCI_BREAKER_CLOSED, /* a breaker that is all zero */
    CRPCI_BREAKER_OPEN,
    CRPCI_BREAKER_PROBING
} crpci_breaker_state;

typedef struct crpci_breaker_slice {
    uint32_t calls, errors, slow;
} crpci_breaker_slice;

typedef struct crpci_breaker {
    crpci_breaker_state state;
    uint32_t active;  /* calls in flight */
    int64_t since_us; /* when it last opened or closed */
    int64_t until_us; /* open: when a probe may be sent; probing: when the probe counts as lost */
    int64_t open_us;  /* how long it was open the last time; 0: it never was */
    int64_t slice;    /* number of the newest slice: time / width of a slice */
    crpci_breaker_slice slices[CRPCI_BREAKER_SLICES];
} crpci_breaker;

/* Closes at once, with no ramp and nothing counted. */
CRPCI_FN void crpci_breaker_reset(crpci_breaker *b)
{
    b->state = CRPCI_BREAKER_CLOSED;
    b->open_us = 0;
    memset(b->slices, 0, sizeof b->slices);
}

/* Whether the provider counts as taken out: the breaker is open, or waits for its probe. */
CRPCI_FN bool crpci_breaker_ejected(const crpci_breaker *b)
{
    return b->state != CRPCI_BREAKER_CLOSED;
}

/* The longest time that it may be open. */
CRPCI_FN int64_t crpci_breaker_open_most(const crpci_breaker_options *o)
{
    return o->open_max_us > o->open_us ? o->open_max_us : o->open_us;
}

/* Whether the provider must not be picked now. */
CRPCI_FN bool crpci_breaker_open(const crpci_breaker *b, const crpci_breaker_options *o,
                                 int64_t now_us)
{
    if (CRPCI_LIKELY(b->state == CRPCI_BREAKER_CLOSED) || o->error_percent <= 0)
        return false;
    return now_us < b->until_us;
}

/* Whether this call may go to a provider that is on the ramp: `random` falls into the share of
 * calls that it gets by now. True also without a ramp. */
CRPCI_FN bool crpci_breaker_ramped(const crpci_breaker *b, const crpci_breaker_options *o,
                                   int64_t now_us, uint32_t random)
{
    int64_t passed = now_us - b->since_us;
    uint64_t share;
    if (CRPCI_LIKELY(!b->open_us) || b->state != CRPCI_BREAKER_CLOSED || o->error_percent <= 0 ||
        passed >= o->ramp_us)
        return true;
    share = passed > 0 ? (uint64_t)passed * (1u << 16) / (uint64_t)o->ramp_us : 0;
    share = ((1u << 16) * CRPCI_BREAKER_RAMP_PERCENT + share * (100 - CRPCI_BREAKER_RAMP_PERCENT)) /
            100;
    return random >> 16 < share;
}

/* A call goes to the provider: also while the breaker is open, where no other provider is left. */
CRPCI_FN void crpci_breaker_begin(crpci_breaker *b, const crpci_breaker_options *o, int64_t now_us)
{
    b->active++;
    if (b->state == CRPCI_BREAKER_CLOSED || o->error_percent <= 0 ||
        crpci_breaker_open(b, o, now_us))
        return;
    b->state = CRPCI_BREAKER_PROBING;
    b->until_us = now_us + crpci_breaker_open_most(o) + CRPCI_BREAKER_LOST_US;
}

/* Opens the breaker. again: for twice the last time. */
CRPCI_FN void crpci_breaker_trip(crpci_breaker *b, const crpci_breaker_options *o, bool again,
                                 int64_t now_us, uint32_t random)
{
    int64_t most = crpci_breaker_open_most(o);
    if (!again || !b->open_us)
        b->open_us = o->open_us;
    else
        b->open_us = b->open_us > most / 2 ? most : b->open_us * 2;
    b->open_us = b->open_us > 0 ? b->open_us : 1;
    b->state = CRPCI_BREAKER_OPEN;
    b->since_us = now_us;
    /* between three quarters of that and all of it, so that not all clients probe together */
    b->until_us =
        now_us + b->open_us - (int64_t)((uint64_t)(b->open_us / 4) * (random >> 16) >> 16);
}

/* Counts a call in the newest slice, empties the slices that have left the window, and returns
 * whether the window holds too many errors or slow calls. */
CRPCI_FN bool crpci_breaker_count(crpci_breaker *b, const crpci_breaker_options *o, bool error,
                                  bool slow, int64_t now_us)
{
    int64_t width = o->window_us / CRPCI_BREAKER_SLICES;
    int64_t slice = now_us / (width > 0 ? width : 1);
    uint64_t calls = 0, errors = 0, slows = 0;
    crpci_breaker_slice *s;
    unsigned i;
    if (slice - b->slice >= CRPCI_BREAKER_SLICES || b->slice - slice > 1) /* window_us changed */
        b->slice = slice - CRPCI_BREAKER_SLICES;
    while (b->slice < slice)
        memset(&b->slices[++b->slice & (CRPCI_BREAKER_SLICES - 1)], 0, sizeof *s);
    s = &b->slices[b->slice & (CRPCI_BREAKER_SLICES - 1)];
    s->calls++;
    s->errors += error;
    s->slow += slow;
    for (i = 0; i < CRPCI_BREAKER_SLICES; i++) {
        calls += b->slices[i].calls;
        errors += b->slices[i].errors;
        slows += b->slices[i].slow;
    }
    if (calls < (uint64_t)(o->min_requests > 0 ? o->min_requests : 1))
        return false;
    return errors * 100 >= calls * (uint64_t)o->error_percent ||
           (slows && slows * 100 >= calls * (uint64_t)o->slow_percent);
}

/* Counts the end of a call, which took latency_us. True: the breaker has just opened, perhaps
 * because a probe failed. If the caller has taken out as many providers as it may, it closes this
 * breaker again with crpci_breaker_reset. */
CRPCI_FN bool crpci_breaker_end(crpci_breaker *b, const crpci_breaker_options *o,
                                crpci_outcome outcome, int64_t latency_us, int64_t now_us,
                                uint32_t random)
{
    bool alone = b->active <= 1; /* it must be the probe, even if its latency begins earlier */
    bool old = now_us - latency_us < b->since_us;
    bool slow = o->slow_us > 0 && o->slow_percent > 0 && latency_us >= o->slow_us;
    if (b->active)
        b->active--;
    if (o->error_percent <= 0 || b->state == CRPCI_BREAKER_OPEN)
        return false;
    if (b->state == CRPCI_BREAKER_CLOSED) {
        if (old || outcome == CRPCI_OUTCOME_IGNORE ||
            !crpci_breaker_count(b, o, outcome == CRPCI_OUTCOME_ERROR, slow, now_us))
            return false;
        crpci_breaker_trip(b, o, now_us - b->since_us < CRPCI_BREAKER_AGAIN_US, now_us, random);
        return true;
    }
    if (old && !alone)
        return false;
    if (outcome == CRPCI_OUTCOME_IGNORE) { /* the probe decided nothing: the next call is one */
        b->state = CRPCI_BREAKER_OPEN;
        b->until_us = now_us;
        return false;
    }
    if (outcome == CRPCI_OUTCOME_ERROR || slow) {
        crpci_breaker_trip(b, o, true, now_us, random);
        return true;
    }
    b->state = CRPCI_BREAKER_CLOSED;
    b->since_us = now_us;
    memset(b->slices, 0, sizeof b->slices);
    return false;
}

/* ======================================================================== */
/* >>impl-balance   balancers: which provider of a list a call goes to       */
/* ======================================================================== */

/* Each kind of balancer picks in constant time, or in that of a heap. If the pick cannot be used it
 * picks again, a few times, and then searches all providers: a pick fails only if no provider can
 * be used. A provider of weight 0 is drained: it is picked only if no other can be used.
 *
 *   random                uniformly
 *   weighted random       in proportion to the weights
 *   round robin           in the order of the list
 *   weighted round robin  each provider has a turn every 1/weight of virtual time; the first turn
 *                         is at a random time
 *   least active          fewest calls in flight per weight; among equals by weighted round robin:
 *                         with equal weights the one that was picked longest ago
 *   consistent hash       160 points of each provider on a ring; weights are ignored
 *   p2c                   the better one of two random providers, by latency x (calls in flight
 *                         + 1) / weight
 *
 * A turn is 2^52 / weight long. Virtual time wraps, so two times are compared by their
 * difference. */
#define CRPCI_BALANCE_TURN (INT64_C(1) << 52)
#define CRPCI_BALANCE_CATCH_UP_BITS 60 /* crpci_balance_catch_up runs every 2^60 of virtual time */
#define CRPCI_BALANCE_TRIES 8          /* picks before all providers are searched */
#define CRPCI_BALANCE_POINTS 160       /* of a provider on the ring */
#define CRPCI_BALANCE_INDEX_BITS 20    /* lower bits of a point: the index; above them the hash */
#define CRPCI_BALANCE_MOST (1u << CRPCI_BALANCE_INDEX_BITS) /* providers in a list */
#define CRPCI_BALANCE_WALK 64        /* points tried along the ring before all are searched */
#define CRPCI_BALANCE_HALF_BITS 23   /* a latency halves in 2^23 us (8.4 s): e^(-t / 12 s) */
#define CRPCI_BALANCE_LATENCY_BITS 8 /* fraction of a microsecond: small steps must count */
#define CRPCI_BALANCE_LATENCY_MOST (INT64_C(1) << (25 + CRPCI_BALANCE_LATENCY_BITS)) /* 33 s */

/* All balancers: the value of crpc_balancer, in its order, the word of lb=, the function that
 * picks, and what it needs. A new balancer takes a row here and a value there. */
#define CRPCI_BALANCE_MAP(X)                                                                       \
    X(CRPC_BALANCER_RANDOM, "random", crpci_balance_pick_random, 0)                                \
    X(CRPC_BALANCER_WEIGHTED_RANDOM, "wrandom", crpci_balance_pick_weighted, CRPCI_BALANCE_SUMS)   \
    X(CRPC_BALANCER_ROUND_ROBIN, "rr", crpci_balance_pick_next, 0)                                 \
    X(CRPC_BALANCER_WEIGHTED_ROUND_ROBIN, "wrr", crpci_balance_pick_turn, CRPCI_BALANCE_TURNS)     \
    X(CRPC_BALANCER_LEAST_ACTIVE, "la", crpci_balance_pick_turn,                                   \
      CRPCI_BALANCE_TURNS | CRPCI_BALANCE_ACTIVE)                                                  \
    X(CRPC_BALANCER_CONSISTENT_HASH, "hash", crpci_balance_pick_hashed, CRPCI_BALANCE_RING)        \
    X(CRPC_BALANCER_P2C, "p2c", crpci_balance_pick_two, CRPCI_BALANCE_LATENCY)

enum {
    CRPCI_BALANCE_SUMS = 1,   /* sums of weights */
    CRPCI_BALANCE_TURNS = 2,  /* the heap of turns */
    CRPCI_BALANCE_ACTIVE = 4, /* the heap is ordered by calls in flight first */
    CRPCI_BALANCE_RING = 8,   /* the ring; each call must have a key */
    CRPCI_BALANCE_LATENCY = 16 /* each call's latency */
};

#define CRPCI_BALANCE_WORD(which, word, pick, needs) "," word
#define CRPCI_BALANCE_ONE(which, word, pick, needs)  +1
#define CRPCI_BALANCE_WORDS                          CRPCI_BALANCE_MAP(CRPCI_BALANCE_WORD)
#define CRPCI_BALANCE_KINDS                          (0 CRPCI_BALANCE_MAP(CRPCI_BALANCE_ONE))

/* A provider in a balancer's list, owned by the caller. All zero but for address and weight when it
 * is first put into a list; it may leave the list and come back. In one balancer at a time. */
typedef struct crpci_balance_item {
    const char *address;
    uint32_t weight;    /* 0: drained. While in a list only crpci_balance_reweigh changes it */
    uint32_t active;    /* calls in flight */
    uint32_t index;     /* in the list */
    uint32_t at;        /* position in the heap + 1; 0: not in it */
    uint64_t hash;      /* of the address */
    uint64_t length;    /* of a turn, in virtual time */
    uint64_t turn;      /* virtual time of the next turn */
    int64_t latency;    /* in 1/256 us; rises at once, fades slowly; 0: not measured */
    int64_t latency_us; /* the time at which `latency` held */
} crpci_balance_item;

typedef struct crpci_balance {
    uint8_t kind;    /* crpc_balancer */
    uint8_t needs;   /* CRPCI_BALANCE_*, as in the map */
    bool uniform;    /* no memory for the list: picks are uniform */
    uint32_t salt;   /* clients with one list begin at different places of it */
    uint32_t next;   /* round robin: index of the next pick */
    uint32_t heaped; /* items in the heap */
    uint32_t shift;  /* a point >> shift is its bucket */
    size_t count;
    crpci_balance_item **items; /* the caller's array, which must stay until the next list */
    void *memory;
    size_t size; /* of memory, in bytes */
    /* These point into memory, of which each kind of balancer uses what it needs. */
    uint64_t *sums; /* Fenwick tree of the weights: sums[i - 1] is of (i & -i) items up to i */
    crpci_balance_item **heap; /* in heap order of crpci_balance_before */
    uint64_t *ring;            /* points, sorted */
    uint32_t *buckets;         /* where in the ring each bucket ends */
    uint64_t total;            /* of the weights */
    uint64_t now;              /* virtual time */
    int64_t latency;           /* slow average of all successful calls, in 1/256 us */
} crpci_balance;

/* Whether a provider can be used. It may be called several times for a provider in one pick, and
 * must return the same value each time. */
typedef bool (*crpci_balance_usable_fn)(void *user, size_t index);

/* splitmix64: the next random number of a sequence that begins with any state. */
CRPCI_FN uint64_t crpci_balance_draw(uint64_t *state)
{
    *state += UINT64_C(0x9e3779b97f4a7c15);
    return crpci_base_mix(*state);
}

/* A random number below n, which is below 2^32. */
CRPCI_FN size_t crpci_balance_below(uint64_t *state, size_t n)
{
    return (size_t)((crpci_balance_draw(state) >> 32) * (uint64_t)n >> 32);
}

/* The weight of a provider that is warming up, as in Dubbo: in proportion to its uptime, 1 at
 * least. */
CRPCI_FN uint32_t crpci_balance_warm_weight(uint32_t weight, int64_t uptime_ms, int64_t warmup_ms)
{
    uint64_t w;
    if (!weight || uptime_ms >= warmup_ms || warmup_ms <= 0)
        return weight;
    w = uptime_ms > 0 ? (uint64_t)uptime_ms * weight / (uint64_t)warmup_ms : 0;
    return w ? (uint32_t)w : 1;
}

/* A provider that a client's subset may take in. */
typedef struct crpci_balance_choice {
    uint64_t rank; /* the subset takes the highest */
    size_t index;  /* the caller's */
} crpci_balance_choice;

CRPCI_FN void crpci_balance_choice_init(crpci_balance_choice *c, size_t index, const char *address,
                                        uint64_t seed)
{
    c->rank =
        crpci_base_mix(crpci_base_hash(address, strlen(address)) ^ crpci_base_mix(seed));
    c->index = index;
}

CRPCI_FN int crpci_balance_choice_order(const void *a, const void *b)
{
    const crpci_balance_choice *x = (const crpci_balance_choice *)a;
    const crpci_balance_choice *y = (const crpci_balance_choice *)b;
    return x->rank > y->rank ? -1 : x->rank < y->rank;
}

/* Rendezvous hashing: moves the `max` choices of the highest rank to the front, and returns how
 * many there are. Clients with different seeds get different subsets, and a provider that joins or
 * leaves the list changes at most one place of a subset. */
CRPCI_FN size_t crpci_balance_subset(crpci_balance_choice *choices, size_t count, size_t max)
{
    qsort(choices, count, sizeof *choices, crpci_balance_choice_order);
    return crpci_base_min(count, max);
}

/* --- turns: weighted round robin and least active, which keep a heap -------------------------- */

/* Without CRPC_ENABLE_POLICY there is only weighted round robin: the compiler drops the rest. */
CRPCI_FN bool crpci_balance_need(const crpci_balance *b, unsigned what)
{
    return CRPC_ENABLE_POLICY ? (b->needs & what) != 0 : what == CRPCI_BALANCE_TURNS;
}

/* Whether x is picked before y. Neither has weight 0. */
CRPCI_FN bool crpci_balance_before(bool by_active, const crpci_balance_item *x,
                                   const crpci_balance_item *y)
{
    if (by_active) {
        uint64_t busy = (uint64_t)x->active * y->weight, other = (uint64_t)y->active * x->weight;
        if (busy != other)
            return busy < other;
    }
    return (int64_t)(x->turn - y->turn) < 0;
}

CRPCI_FN void crpci_balance_place(crpci_balance *b, uint32_t at, crpci_balance_item *item)
{
    b->heap[at] = item;
    item->at = at + 1;
}

/* Restores the heap after the item at a position has changed. */
CRPCI_FN void crpci_balance_sift(crpci_balance *b, uint32_t at)
{
    const bool by_active = crpci_balance_need(b, CRPCI_BALANCE_ACTIVE);
    crpci_balance_item *item = b->heap[at], *next;
    uint32_t child;
    while (at && crpci_balance_before(by_active, item, b->heap[(at - 1) / 2])) {
        crpci_balance_place(b, at, b->heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    while ((child = 2 * at + 1) < b->heaped) {
        next = b->heap[child];
        if (child + 1 < b->heaped && crpci_balance_before(by_active, b->heap[child + 1], next))
            next = b->heap[++child];
        if (!crpci_balance_before(by_active, next, item))
            break;
        crpci_balance_place(b, at, next);
        at = child;
    }
    crpci_balance_place(b, at, item);
}

/* After an item's weight has changed, or it joined the list: its next turn is no later than before,
 * and no later than one turn of the new length from now. The first one is at a random time within
 * its length, so that items of equal weight do not follow each other in the order of the list. */
CRPCI_FN void crpci_balance_retime(crpci_balance *b, crpci_balance_item *item)
{
    int64_t ahead = (int64_t)(item->turn - b->now);
    bool fresh = !item->length;
    item->length = item->weight ? (uint64_t)CRPCI_BALANCE_TURN / item->weight : 0;
    if (!item->weight)
        return;
    if (fresh || ahead > CRPCI_BALANCE_TURN || ahead < -CRPCI_BALANCE_TURN)
        item->turn = b->now + crpci_base_mix(item->hash ^ b->salt) % item->length;
    else if (ahead > (int64_t)item->length)
        item->turn = b->now + item->length;
}

/* Gives an item its place in the heap, or takes it out if it is drained. */
CRPCI_FN void crpci_balance_turn(crpci_balance *b, crpci_balance_item *item)
{
    uint32_t at = item->at - 1;
    crpci_balance_retime(b, item);
    if (item->weight) {
        if (!item->at)
            crpci_balance_place(b, b->heaped++, item);
        crpci_balance_sift(b, item->at - 1);
    } else if (item->at) {
        crpci_balance_item *last = b->heap[--b->heaped];
        item->at = 0;
        if (last == item)
            return;
        crpci_balance_place(b, at, last);
        crpci_balance_sift(b, at);
    }
}

/* Moves turns that lie in the past to the present: no two times may be 2^63 apart, where the sign
 * of their difference turns. No two items change their order, so the heap remains a heap. */
CRPCI_FN void crpci_balance_catch_up(crpci_balance *b)
{
    uint32_t at;
    for (at = 0; at < b->heaped; at++) {
        crpci_balance_item *item = b->heap[at];
        if ((int64_t)(item->turn - b->now) < 0)
            item->turn = b->now;
    }
}

/* Takes an item's turn; the next one is a length later. An item that could not be used for a while
 * has one turn at once, and not all that it missed. */
CRPCI_FN void crpci_balance_take(crpci_balance *b, crpci_balance_item *item)
{
    uint64_t was = b->now;
    if ((int64_t)(item->turn - b->now) > 0)
        b->now = item->turn;
    else
        b->now++; /* no two turns at one time: items of equal weight keep their order */
    item->turn = b->now + item->length;
    crpci_balance_sift(b, item->at - 1);
    if ((was ^ b->now) >> CRPCI_BALANCE_CATCH_UP_BITS)
        crpci_balance_catch_up(b);
}

/* --- the ring: consistent hash ---------------------------------------------------------------- */

/* Point number k of an item: the hash in the upper bits, the item's index in the lower ones. */
CRPCI_FN uint64_t crpci_balance_point(const crpci_balance_item *item, unsigned k)
{
    uint64_t state = item->hash + k * UINT64_C(0x9e3779b97f4a7c15);
    return crpci_balance_draw(&state) >> CRPCI_BALANCE_INDEX_BITS << CRPCI_BALANCE_INDEX_BITS |
           item->index;
}

/* Sorts the points: first into buckets of about four by their upper bits (a counting sort), then by
 * insertion, which moves each point past a few neighbours at most. */
CRPCI_FN void crpci_balance_ring_build(crpci_balance *b)
{
    size_t points = b->count * CRPCI_BALANCE_POINTS, i, j;
    size_t buckets = (size_t)1 << (64 - b->shift);
    unsigned k;
    for (i = 0; i < b->count; i++) {
        for (k = 0; k < CRPCI_BALANCE_POINTS; k++)
            b->buckets[crpci_balance_point(b->items[i], k) >> b->shift]++;
    }
    for (i = 0, j = 0; i < buckets; i++) { /* a bucket's size becomes its begin */
        size_t has = b->buckets[i];
        b->buckets[i] = (uint32_t)j;
        j += has;
    }
    for (i = 0; i < b->count; i++) {
        for (k = 0; k < CRPCI_BALANCE_POINTS; k++) {
            uint64_t point = crpci_balance_point(b->items[i], k);
            b->ring[b->buckets[point >> b->shift]++] = point;
        }
    }
    for (i = 1; i < points; i++) {
        uint64_t point = b->ring[i];
        for (j = i; j && b->ring[j - 1] > point; j--)
            b->ring[j] = b->ring[j - 1];
        b->ring[j] = point;
    }
}

/* The position of the first point at or after a hash; after the last point comes the first. */
CRPCI_FN size_t crpci_balance_ring_find(const crpci_balance *b, uint64_t hash)
{
    size_t bucket = (size_t)(hash >> b->shift);
    size_t i = bucket ? b->buckets[bucket - 1] : 0;
    while (i < b->buckets[bucket] && b->ring[i] < hash)
        i++;
    return i < b->count * CRPCI_BALANCE_POINTS ? i : 0;
}

/* --- lists ------------------------------------------------------------------------------------ */

/* Adds to the weight of item i in the Fenwick tree. */
CRPCI_FN void crpci_balance_sums_add(crpci_balance *b, size_t i, uint64_t by)
{
    for (i++; i <= b->count; i += i & (0 - i))
        b->sums[i - 1] += by; /* modulo 2^64: adding 2^64 - x takes x away */
}

/* The item that owns `offset`, a number below the total, when the weights stand one after
 * another. */
CRPCI_FN size_t crpci_balance_sums_find(const crpci_balance *b, uint64_t offset)
{
    size_t i = 0, step = 1;
    while (step <= b->count / 2)
        step *= 2;
    for (; step; step /= 2) {
        if (i + step <= b->count && b->sums[i + step - 1] <= offset) {
            i += step;
            offset -= b->sums[i - 1];
        }
    }
    return i;
}

/* The memory that the list needs, in bytes. A ring has a quarter as many buckets as points. */
CRPCI_FN size_t crpci_balance_bytes(crpci_balance *b)
{
    size_t points = b->count * CRPCI_BALANCE_POINTS;
    if (crpci_balance_need(b, CRPCI_BALANCE_SUMS))
        return b->count * sizeof *b->sums;
    if (crpci_balance_need(b, CRPCI_BALANCE_TURNS))
        return b->count * sizeof *b->heap;
    if (!crpci_balance_need(b, CRPCI_BALANCE_RING) || !points)
        return 0;
    for (b->shift = 63; points >> (66 - b->shift);)
        b->shift--;
    return points * sizeof *b->ring + (sizeof *b->buckets << (64 - b->shift));
}

/* Memory for a list of b->count. A block that is large enough, and not four times too large,
 * stays. */
CRPCI_FN int crpci_balance_reserve(crpci_balance *b, crpci_heap *h)
{
    bool many = b->count > CRPCI_BALANCE_MOST;
    size_t size = many ? 0 : crpci_balance_bytes(b);
    if (size > b->size || size < b->size / 4) {
        crpci_heap_free(h, b->memory, b->size);
        b->memory = size ? crpci_heap_alloc(h, size) : NULL;
        b->size = b->memory ? size : 0;
    }
    b->uniform = many || b->size < size;
    if (b->uniform)
        return CRPC_ENOMEM;
    if (size)
        memset(b->memory, 0, size);
    b->sums = b->ring = (uint64_t *)b->memory;
    b->heap = (crpci_balance_item **)b->memory;
    b->buckets = size ? (uint32_t *)(void *)(b->ring + b->count * CRPCI_BALANCE_POINTS) : NULL;
    return CRPC_OK;
}

/* Takes the weight of an item into what the balancer keeps: it has grown by `more`, modulo 2^64. */
CRPCI_FN void crpci_balance_weigh(crpci_balance *b, crpci_balance_item *item, uint64_t more)
{
    b->total += more;
    if (crpci_balance_need(b, CRPCI_BALANCE_SUMS))
        crpci_balance_sums_add(b, item->index, more);
    else if (crpci_balance_need(b, CRPCI_BALANCE_TURNS))
        crpci_balance_turn(b, item);
}

/* Replaces the list. An item that was in the old list, which must still exist, keeps its
 * statistics; one that is not in the new list is not used again. An empty list holds no memory.
 * CRPC_ENOMEM: picks are uniform over the new list from now on. */
CRPCI_FN int crpci_balance_reset(crpci_balance *b, crpci_heap *h, crpci_balance_item **items,
                                 size_t count)
{
    size_t i;
    while (b->heaped)
        b->heap[--b->heaped]->at = 0;
    b->items = items;
    b->count = count;
    b->total = 0;
    if (crpci_balance_reserve(b, h))
        return CRPC_ENOMEM;
    if (count)
        b->next %= (uint32_t)count;
    for (i = 0; i < count; i++) {
        crpci_balance_item *item = items[i];
        item->index = (uint32_t)i;
        if (!item->hash)
            item->hash = crpci_base_hash(item->address, strlen(item->address));
        crpci_balance_weigh(b, item, item->weight);
    }
    if (crpci_balance_need(b, CRPCI_BALANCE_RING) && count)
        crpci_balance_ring_build(b);
    return CRPC_OK;
}

/* Changes the weight of item i of the list. */
CRPCI_FN void crpci_balance_reweigh(crpci_balance *b, size_t i, uint32_t weight)
{
    crpci_balance_item *item = i < b->count ? b->items[i] : NULL;
    uint64_t more;
    if (!item || item->weight == weight)
        return;
    more = (uint64_t)weight - item->weight;
    item->weight = weight;
    if (!b->uniform)
        crpci_balance_weigh(b, item, more);
}

/* --- picking ---------------------------------------------------------------------------------- */

typedef struct crpci_balance_query {
    uint64_t key;
    uint64_t state; /* of the random numbers */
    int64_t now_us;
    crpci_balance_usable_fn usable;
    void *user;
    int except; /* a search of the whole list leaves it out; -1: none */
} crpci_balance_query;

/* Whether item i can be used and is not drained. */
CRPCI_FN bool crpci_balance_fit(const crpci_balance *b, const crpci_balance_query *q, size_t i)
{
    return b->items[i]->weight && q->usable(q->user, i);
}

/* Searches the whole list: a random one, by weight where the balancer goes by it, of the providers
 * that can be used and are drained, or are not. -1: there is none. */
CRPCI_FN int crpci_balance_scan(const crpci_balance *b, crpci_balance_query *q, bool drained)
{
    uint64_t total = 0;
    int chosen = -1;
    size_t i;
    for (i = 0; i < b->count; i++) {
        uint32_t weight = b->items[i]->weight;
        if ((weight == 0) != drained || (int)i == q->except || !q->usable(q->user, i))
            continue;
        weight = weight && crpci_balance_need(b, CRPCI_BALANCE_SUMS) ? weight : 1;
        total += weight;
        if (crpci_balance_draw(&q->state) % total < weight)
            chosen = (int)i;
    }
    return chosen;
}

CRPCI_FN int crpci_balance_pick_random(crpci_balance *b, crpci_balance_query *q)
{
    int tries;
    for (tries = 0; tries < CRPCI_BALANCE_TRIES; tries++) {
        size_t i = crpci_balance_below(&q->state, b->count);
        if (crpci_balance_fit(b, q, i))
            return (int)i;
    }
    return crpci_balance_scan(b, q, false);
}

CRPCI_FN int crpci_balance_pick_weighted(crpci_balance *b, crpci_balance_query *q)
{
    int tries;
    for (tries = 0; tries < CRPCI_BALANCE_TRIES && b->total; tries++) {
        size_t i = crpci_balance_sums_find(b, crpci_balance_draw(&q->state) % b->total);
        if (q->usable(q->user, i))
            return (int)i;
    }
    return crpci_balance_scan(b, q, false);
}

CRPCI_FN int crpci_balance_pick_next(crpci_balance *b, crpci_balance_query *q)
{
    size_t tries;
    for (tries = 0; tries < b->count; tries++) {
        uint32_t i = b->next;
        b->next = i + 1 < b->count ? i + 1 : 0;
        if (crpci_balance_fit(b, q, i))
            return (int)i;
    }
    return -1;
}

/* The first item of the heap; one that cannot be used loses its turn. */
CRPCI_FN int crpci_balance_pick_turn(crpci_balance *b, crpci_balance_query *q)
{
    const bool by_active = crpci_balance_need(b, CRPCI_BALANCE_ACTIVE);
    crpci_balance_item *best = NULL;
    int tries;
    size_t i;
    for (tries = 0; tries < CRPCI_BALANCE_TRIES && b->heaped; tries++) {
        crpci_balance_item *item = b->heap[0];
        bool usable = q->usable(q->user, item->index);
        crpci_balance_take(b, item);
        if (usable)
            return (int)item->index;
        if (item->at == 1) /* least active puts it first again, whatever its turn */
            break;
    }
    for (i = 0; i < b->count; i++) {
        crpci_balance_item *item = b->items[i];
        if (item->weight && (!best || crpci_balance_before(by_active, item, best)) &&
            q->usable(q->user, i))
            best = item;
    }
    if (!best)
        return -1;
    crpci_balance_take(b, best);
    return (int)best->index;
}

/* The first provider that can be used from the key's place on the ring on. Where only few can be
 * used, the one of all whose address hashed with the key is highest: it is as constant for a key,
 * but takes a search of the whole list. */
CRPCI_FN int crpci_balance_pick_hashed(crpci_balance *b, crpci_balance_query *q)
{
    uint64_t hash = crpci_base_mix(q->key), most = 0;
    size_t points = b->count * CRPCI_BALANCE_POINTS, i, last = b->count;
    size_t at =
        crpci_balance_ring_find(b, hash >> CRPCI_BALANCE_INDEX_BITS << CRPCI_BALANCE_INDEX_BITS);
    int tries, chosen = -1;
    for (tries = 0; tries < CRPCI_BALANCE_WALK; tries++) {
        i = (size_t)(b->ring[at] & ((1u << CRPCI_BALANCE_INDEX_BITS) - 1));
        if (i != last && crpci_balance_fit(b, q, i))
            return (int)i;
        last = i;
        at = at + 1 < points ? at + 1 : 0;
    }
    for (i = 0; i < b->count; i++) {
        uint64_t rank = crpci_base_mix(b->items[i]->hash ^ hash);
        if ((chosen < 0 || rank > most) && crpci_balance_fit(b, q, i)) {
            chosen = (int)i;
            most = rank;
        }
    }
    return chosen;
}

/* --- p2c: the cost of a call to a provider ---------------------------------------------------- */

/* Lets a latency decay by the time that has passed, rounded up. Between two halvings the parabola
 * 1 - 0.675 x + 0.175 x^2 stands for 2^-x, with an error of 0.4 per cent. */
CRPCI_FN int64_t crpci_balance_fade(int64_t latency, int64_t passed_us)
{
    int64_t halvings = passed_us >> CRPCI_BALANCE_HALF_BITS;
    int64_t x = passed_us & ((1 << CRPCI_BALANCE_HALF_BITS) - 1);
    if (passed_us <= 0)
        return latency;
    if (halvings > 62)
        return 0;
    latency >>= halvings;
    x = x * (5662310 - (1468006 * x >> CRPCI_BALANCE_HALF_BITS)) >> CRPCI_BALANCE_HALF_BITS;
    return latency - (latency * x >> CRPCI_BALANCE_HALF_BITS);
}

/* The cost of a call to an item. One that was never measured costs nothing until a call goes to it,
 * and then, until that call has ended, as much as the slowest. */
CRPCI_FN uint64_t crpci_balance_cost(const crpci_balance_item *item, int64_t now_us)
{
    uint64_t active = item->active < (1u << 20) ? item->active : 1u << 20;
    uint64_t latency = CRPCI_BALANCE_LATENCY_MOST;
    if (!item->latency && !item->active)
        return 0;
    if (item->latency)
        latency = (uint64_t)crpci_balance_fade(item->latency, now_us - item->latency_us) + 1;
    return (latency * (active + 1) << 8) / item->weight; /* below 2^63 */
}

/* Takes the latency of a call into that of the item: upwards at once, downwards slowly, since a
 * slow reply shows a queue and one quick reply does not show that the queue has gone. */
CRPCI_FN void crpci_balance_measure(crpci_balance *b, crpci_balance_item *item, bool ok,
                                    int64_t latency_us, int64_t now_us)
{
    int64_t most = CRPCI_BALANCE_LATENCY_MOST, above;
    int64_t latency =
        crpci_base_min64(latency_us > 1 ? latency_us : 1, most >> CRPCI_BALANCE_LATENCY_BITS)
        << CRPCI_BALANCE_LATENCY_BITS;
    if (ok) {
        b->latency += b->latency ? (latency - b->latency) / 64 : latency;
    } else { /* a fast failure must not look like low latency */
        int64_t usual = b->latency > item->latency ? b->latency : item->latency;
        latency = crpci_base_min64(latency > 2 * usual ? latency : 2 * usual, most);
    }
    above = item->latency - latency;
    if (above > 0) {
        latency += crpci_balance_fade(above, now_us - item->latency_us);
        if (latency == item->latency)
            return; /* rounded to no step: keep latency_us, so that the time counts next time */
    }
    item->latency = latency;
    item->latency_us = now_us;
}

CRPCI_FN int crpci_balance_pick_two(crpci_balance *b, crpci_balance_query *q)
{
    int first = -1, i, tries;
    for (;;) {
        for (tries = 0; tries < CRPCI_BALANCE_TRIES; tries++) {
            i = (int)crpci_balance_below(&q->state, b->count);
            if (i != first && crpci_balance_fit(b, q, (size_t)i))
                break;
        }
        if (tries == CRPCI_BALANCE_TRIES)
            i = crpci_balance_scan(b, q, false);
        if (i < 0 || first >= 0)
            break;
        q->except = first = i;
    }
    return i >= 0 && crpci_balance_cost(b->items[i], q->now_us) <
                         crpci_balance_cost(b->items[first], q->now_us)
               ? i
               : first;
}

/* --- the balancer as a whole ------------------------------------------------------------------ */

/* salt: a random number, by which each client begins at a place of its own. CRPC_EUNSUPPORTED: not
 * compiled in. CRPC_EINVAL: no balancer has that number. */
CRPCI_COLD int crpci_balance_open(crpci_balance *b, crpc_balancer which, uint32_t salt)
{
#define CRPCI_BALANCE_NEEDS(which, word, pick, needs) needs,
    static const uint8_t needs[] = {CRPCI_BALANCE_MAP(CRPCI_BALANCE_NEEDS)};
#undef CRPCI_BALANCE_NEEDS
    int64_t number = (int64_t)which; /* C++ takes an enum's range for granted */
    if (number < 1 || number > CRPCI_BALANCE_KINDS)
        return CRPC_EINVAL;
    if (!CRPC_ENABLE_POLICY && which != CRPC_BALANCER_WEIGHTED_ROUND_ROBIN)
        return CRPC_EUNSUPPORTED;
    memset(b, 0, sizeof *b);
    b->kind = (uint8_t)number;
    b->needs = needs[number - 1];
    b->salt = b->next = salt;
    return CRPC_OK;
}

/* The index of the provider for a call; -1: none can be used. key: any number, for the consistent
 * hash only. random: any random number. */
CRPCI_FN int crpci_balance_pick(crpci_balance *b, uint64_t key, uint32_t random, int64_t now_us,
                                crpci_balance_usable_fn usable, void *user)
{
    crpci_balance_query q;
    int i;
    if (!b->count)
        return -1;
    q.key = key;
    q.state = random;
    q.now_us = now_us;
    q.usable = usable;
    q.user = user;
    q.except = -1;
    if (b->uniform) {
        i = crpci_balance_pick_random(b, &q);
    } else if (crpci_balance_need(b, CRPCI_BALANCE_TURNS)) {
        /* not in the switch: called once, it is inlined */
        i = crpci_balance_pick_turn(b, &q);
    } else {
        switch (b->kind) {
#define CRPCI_BALANCE_PICK(which, word, pick, needs)                                               \
    case which:                                                                                    \
        i = (needs) & CRPCI_BALANCE_TURNS ? -1 : pick(b, &q);                                      \
        break;
            CRPCI_BALANCE_MAP(CRPCI_BALANCE_PICK)
#undef CRPCI_BALANCE_PICK
        default:
            i = -1;
        }
    }
    return i >= 0 ? i : crpci_balance_scan(b, &q, true);
}

/* A call goes to an item. */
CRPCI_FN void crpci_balance_item_begin(crpci_balance *b, crpci_balance_item *item)
{
    item->active++;
    if (crpci_balance_need(b, CRPCI_BALANCE_ACTIVE) && item->at)
        crpci_balance_sift(b, item->at - 1);
}

/* A call to an item has ended. latency_us: since its begin; -1: it is no measure of the provider
 * (cancelled, or refused over a limit). The item may have left the list meanwhile. */
CRPCI_FN void crpci_balance_item_end(crpci_balance *b, crpci_balance_item *item, bool ok,
                                     int64_t latency_us, int64_t now_us)
{
    if (item->active)
        item->active--;
    if (crpci_balance_need(b, CRPCI_BALANCE_LATENCY) && latency_us >= 0)
        crpci_balance_measure(b, item, ok, latency_us, now_us);
    else if (crpci_balance_need(b, CRPCI_BALANCE_ACTIVE) && item->at)
        crpci_balance_sift(b, item->at - 1);
}

/* ======================================================================== */
/* >>impl-conn   one connection: its state and descriptor, queueing and sending, closing */
/* ======================================================================== */

/* A crpci_conn is one connection, dialled by a channel or accepted by a server. It owns the
 * descriptor, cuts input into messages with its protocol, and queues and sends frames. Channels and
 * servers are called back through crpci_conn_events. All functions need the loop's lock; flush and
 * read release it around the system call, so a connection may be closed by another thread
 * meanwhile. This section never retries and never knows what a message is for. */

/* Bytes and frames that one connection may use up in one step of the loop, so that a flooding peer
 * cannot starve the others. The rest waits for the next step. */
#define CRPCI_CONN_READ ((64u << 10) - CRPCI_CHUNK_HEADER)
#define CRPCI_CONN_FRAMES 128

#define CRPCI_CONN_IOV 64    /* pieces in one send */
#define CRPCI_CONN_SHORT 512 /* frames up to this size are copied together before a send */
#define CRPCI_CONN_FLAT (8192 - CRPCI_CHUNK_HEADER) /* bytes of such copies in one send */
#define CRPCI_CONN_ROUNDS 16 /* sends in a row before a flush hands over to the loop's driver */

/* Whether there are transports besides plain sockets, and protocols besides baidu_std. While there
 * are none the compiler drops what only those need. Tests bring their own. */
#ifndef CRPCI_CONN_TRANSPORTS
#define CRPCI_CONN_TRANSPORTS 0
#endif
#ifdef CRPCI_TEST_PROTOCOLS
#define CRPCI_CONN_PROTOCOLS 1
#else
#define CRPCI_CONN_PROTOCOLS 0
#endif

/* A frame to be sent. The struct stands at the beginning of the chunk that also holds the frame's
 * head. A request's frame belongs to its call, which can withdraw it; a reply's frame belongs to
 * the connection once it is queued. */
typedef struct crpci_out crpci_out;
struct crpci_out {
    crpci_out *next;
    crpci_chunk *chunk; /* holds this struct and the head */
    const uint8_t *head;
    size_t head_len;
    const uint8_t *tail; /* attachment: in tail_chunk; borrowed from the program if that is NULL */
    size_t tail_len;
    crpci_chunk *tail_chunk;
    size_t sent;   /* bytes handed to the transport */
    void *owner;   /* the call, which holds the chunk; NULL: the frame holds it itself */
    struct crpci_conn *conn; /* while queued */
    int64_t id;     /* of a request; its reply will carry the same id */
    uint32_t turn;  /* of a reply, in ordered protocols: the position of its request */
    bool inflight;  /* a send that runs without the lock uses it */
    bool committed; /* must be offered to the transport again: CRPCI_TRANSPORT_REPEAT */
    bool awaited;   /* its id is in the connection's ring of awaited replies */
    bool queued;
};

typedef struct crpci_conn crpci_conn;

/* Callbacks of the connection's owner, a channel's endpoint or a server. All are called with the
 * loop locked and must not unlock it. */
typedef struct crpci_conn_events {
    void (*opened)(crpci_conn *c); /* a dialled connection is up */
    void (*message)(crpci_conn *c, const crpci_message *m);
    void (*oversize)(crpci_conn *c, const crpci_message *m, uint64_t body); /* no payload in m */
    void (*sent)(crpci_conn *c, crpci_out *out); /* all bytes left; freed next */
    void (*eof)(crpci_conn *c); /* the peer sends no more; it may still read */
    void (*closed)(crpci_conn *c); /* exactly once, whichever side closed; c->why is set */
    void (*timer)(crpci_conn *c);
} crpci_conn_events;

typedef enum crpci_detected {
    CRPCI_DETECTED_NO,
    CRPCI_DETECTED_YES,
    CRPCI_DETECTED_MORE /* too few bytes to decide */
} crpci_detected;

#define CRPCI_PROTOCOL_ORDERED 1u /* no ids: replies come in the order of the requests */
#define CRPCI_PROTOCOL_NAMES 16u  /* bytes that encoding may add to service and method */
/* Bytes before a payload: what is larger no peer has to read, so it is not sent either. */
#define CRPCI_PROTOCOL_HEAD_MAX (64u << 10)

/* A protocol turns bytes into messages and messages into bytes. A server recognises it by the first
 * bytes of a connection; a channel's URL names it, because a request's bytes are laid out before a
 * connection exists. Flags SINGLE, STREAMS and ATTACH, and open, close, eof, submit, writable,
 * consumed, bind, cancel, farewell and timer will come with the protocols that need them. */
typedef struct crpci_protocol {
    const char *name; /* the value of protocol= in a URL */
    unsigned flags;
    size_t state_size; /* of the state that each connection gets, all zeros at first; 0: none */
    size_t headroom;   /* most bytes before a payload, besides names, text, credential, fields */
    size_t field_cost; /* most bytes of a field besides its key and value */
    crpci_detected (*detect)(const uint8_t *p, size_t n);
    /* Takes one message, or part of one, from the front of the input in `chunk`, and passes it to
     * crpci_receive_deliver. Returns the number of bytes used. When it needs more, it sets
     * c->rx_total to more than n and returns 0: the connection calls again with that many bytes,
     * and feed then uses all of them or asks for more. Locked; it may close the connection. */
    size_t (*feed)(crpci_conn *c, crpci_chunk *chunk, const uint8_t *p, size_t n);
    /* The functions below are pure and run on any thread. `names` encodes service and method into
     * `out`, once per method; `room` is CRPCI_PROTOCOL_NAMES more than both texts take. Returns
     * the encoded part of `out`, for a request's `names`. */
    crpc_view (*names)(uint8_t *out, size_t room, crpc_view service, crpc_view method);
    size_t (*put_field)(uint8_t *out, crpc_view key, crpc_view value); /* returns bytes written */
    bool (*field)(crpc_view fields, const char *key, crpc_view *value);
    /* Write a frame's head in front of the payload at `payload`, not below `low`, and return where
     * it begins. The attachment is sent behind the payload. */
    uint8_t *(*request)(uint8_t *low, uint8_t *payload, const crpci_message *m);
    uint8_t *(*reply)(uint8_t *low, uint8_t *payload, const crpci_message *m);
} crpci_protocol;

struct crpci_conn {
    crpci_list link; /* in loop->conns */
    crpc_loop *loop;
    crpci_watch watch;
    crpci_task flush;
    crpci_task resume;
    crpci_timer timer;
    const crpci_transport *io;
    void *io_state;
    const crpci_protocol *protocol;         /* NULL: not detected yet */
    const crpci_protocol *const *protocols; /* accepted: the candidates, ended by NULL */
    size_t protocol_index;                  /* of `protocol` in `protocols` */
    void *protocol_state;
    const crpci_conn_events *up;
    void *owner;
    crpci_sock_name peer;
    void *account; /* a server's account of the peer's host; NULL: none */
    uint32_t refs;
    uint32_t busy; /* requests being served */
    int fd;
    int why;       /* crpc_status of the close */
    int why_errno; /* 0: none */
    bool connecting, closed, reading, writing, eof, paused, blocked;
    bool close_when_sent;
    bool refused; /* accepted over max_connections, only to say so */
    bool unread; /* input is waiting: it could not be read while another thread wrote */
    uint32_t max_body;
    int64_t max_skip;
    uint64_t skip;      /* bytes of a refused body still to be dropped */
    crpci_chunk *rx;    /* a message of which only a part has arrived; NULL: none */
    size_t rx_len;
    size_t rx_need;     /* bytes to collect in rx before it grows or is parsed */
    size_t rx_total;    /* bytes that the protocol asked for */
    int64_t rx_since;   /* when the partial message began, for frame_timeout_us */
    int64_t frame_timeout_us; /* 0: none */
    int64_t linger_bytes;     /* tx_bytes when the timer of close_when_sent was set */
    crpci_chunk *left;  /* input over the step's budget */
    const uint8_t *left_at;
    size_t left_len;
    crpci_out *tx_head; /* the queue, and where to append the next frame */
    crpci_out **tx_end;
    int64_t tx_bytes;
    int64_t tx_memory; /* bytes of memory in the queue: small frames take more than tx_bytes */
    /* In ordered protocols. Accepted: each request gets a turn, and `held` keeps the replies whose
     * turn has not come, sorted. Dialled: the ring `awaited` holds the ids of requests that are
     * being sent or were sent, in the order in which their replies will arrive. */
    uint32_t turns;
    uint32_t turn_due;
    crpci_out *held;
    int64_t *awaited;
    size_t awaited_size, awaited_first, awaited_count;
    int64_t opened_us;
    int64_t active_us; /* when the last message arrived */
    /* Encoded names that the next request is likely to have, so that crpci_meta_read_usual can
     * compare them, and the server's method for them; "" when replies are expected. */
    crpc_view expect;
    const void *expected;
};

/* Whether replies come in the order of the requests, in place of ids. */
CRPCI_FN bool crpci_conn_ordered(const crpci_conn *c)
{
    return CRPCI_CONN_PROTOCOLS && CRPCI_UNLIKELY(c->protocol->flags & CRPCI_PROTOCOL_ORDERED);
}

/* Whether the ids of sent requests have to be kept in `awaited`: the side that dialled does so. */
CRPCI_FN bool crpci_conn_awaits(const crpci_conn *c)
{
    return crpci_conn_ordered(c) && !c->protocols;
}

CRPCI_FN size_t crpci_conn_out_len(const crpci_out *o)
{
    return o->head_len + o->tail_len;
}

/* Whether the peer may have received part of a frame, so that it can no longer be withdrawn. */
CRPCI_FN bool crpci_conn_out_begun(const crpci_out *o)
{
    return o->sent || o->inflight || o->committed;
}

/* Memory that a queued frame is charged with, against the limit of a connection's queue. */
CRPCI_FN int64_t crpci_conn_out_memory(const crpci_out *o)
{
    return (int64_t)(CRPCI_CHUNK_HEADER + o->chunk->cap + o->tail_len);
}

CRPCI_FN void crpci_conn_out_free(crpci_out *o)
{
    crpci_heap_chunk_unref(o->tail_chunk);
    if (!o->owner)
        crpci_heap_chunk_unref(o->chunk);
}

/* Lets a frame that can no longer be withdrawn outlive the call that owned it. If it borrows the
 * call's attachment, crpci_request_settle must follow. */
CRPCI_FN void crpci_conn_out_orphan(crpci_out *o)
{
    o->owner = NULL;
    crpci_heap_chunk_ref(o->chunk);
}

/* A short text for a connection's errno, 0 included, which means end of input. */
CRPCI_COLD const char *crpci_conn_errno_text(int e)
{
    static const struct {
        int number, twin;
        const char *text;
    } known[] = {{0, 0, "closed by the peer"},
                 {ECONNREFUSED, 0, "connection refused"},
                 {ECONNRESET, EPIPE, "connection reset by the peer"},
                 {ETIMEDOUT, 0, "no answer from the peer's host"},
                 {EHOSTUNREACH, ENETUNREACH, "host or network unreachable"},
                 {EMFILE, ENFILE, "too many open files"},
                 {ENOENT, 0, "no such socket file"},
                 {EACCES, EPERM, "not permitted"},
                 {EADDRNOTAVAIL, 0, "no local port or address available"},
                 {EADDRINUSE, 0, "address already in use"}};
    size_t i;
    if (!CRPC_ENABLE_TEXTS)
        return "";
    for (i = 0; i < sizeof known / sizeof *known; i++) {
        if (e == known[i].number || e == known[i].twin)
            return known[i].text;
    }
    return "system error";
}

/* Keeps the struct alive over a call that may close the connection. The loop holds one reference
 * until the close. */
CRPCI_FN void crpci_conn_hold(crpci_conn *c)
{
    c->refs++;
}

CRPCI_COLD void crpci_conn_free(crpci_conn *c)
{
    crpci_heap *h = c->loop->heap;
    if (CRPCI_CONN_PROTOCOLS && c->protocol) {
        crpci_heap_free(h, c->protocol_state, c->protocol->state_size);
        crpci_heap_free(h, c->awaited, c->awaited_size * sizeof *c->awaited);
    }
    crpci_heap_free(h, c, sizeof *c);
}

CRPCI_FN void crpci_conn_drop(crpci_conn *c)
{
    if (--c->refs == 0)
        crpci_conn_free(c);
}

CRPCI_FN void crpci_conn_out_free_all(crpci_out **list)
{
    crpci_out *o;
    while ((o = *list) != NULL) {
        *list = o->next;
        o->queued = false;
        crpci_conn_out_free(o);
    }
}

/* After a close: releases the queue, the buffers and the descriptor, unless a thread without the
 * lock still uses them. */
CRPCI_FN void crpci_conn_cleanup(crpci_conn *c)
{
    if (c->reading || c->writing)
        return; /* rule P7: the thread that uses the descriptor calls this when it is done */
    crpci_conn_out_free_all(&c->tx_head);
    crpci_conn_out_free_all(&c->held);
    c->tx_end = &c->tx_head;
    crpci_heap_chunk_unref(c->rx);
    crpci_heap_chunk_unref(c->left);
    c->rx = c->left = NULL;
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
}

/* Closes at once and drops queued output. Calling it again does nothing. A descriptor in use by
 * another thread is shut down, which ends that thread's system call, and closed by that thread: the
 * kernel could otherwise give its number to another file meanwhile. */
CRPCI_FN void crpci_conn_close(crpci_conn *c, int why, int why_errno)
{
    crpc_loop *l = c->loop;
    if (c->closed)
        return;
    c->closed = true;
    c->why = why;
    c->why_errno = why_errno;
    l->stats.connections--;
    crpci_watch_set(l, &c->watch, c->fd, 0);
    crpci_timer_cancel(&c->timer);
    crpci_list_remove(&c->flush.link);
    crpci_list_remove(&c->resume.link);
    crpci_list_remove(&c->link);
    if (CRPCI_RULE_P7) {
        if (c->reading || c->writing)
            shutdown(c->fd, SHUT_RDWR);
    } else {
        close(c->fd);
        c->fd = -1;
    }
    c->up->closed(c);
    crpci_conn_cleanup(c);
    crpci_conn_drop(c); /* the loop's reference */
}

CRPCI_FN const crpci_transport *crpci_conn_transport(const crpci_conn *c)
{
    return CRPCI_CONN_TRANSPORTS ? c->io : &crpci_transport_plain;
}

/* Whether its transport is nothing but the socket: then much need not be asked. */
CRPCI_FN bool crpci_conn_is_plain(const crpci_conn *c)
{
    return CRPCI_LIKELY(crpci_conn_transport(c) == &crpci_transport_plain);
}

/* Whether a thread without the lock uses a transport that only one may use at a time. */
CRPCI_FN bool crpci_conn_engaged(const crpci_conn *c)
{
    return !crpci_conn_is_plain(c) && (c->reading || c->writing) &&
           !(c->io->flags & CRPCI_TRANSPORT_DUPLEX);
}

/* Tells the poller which events the connection waits for. May close the connection. */
CRPCI_FN void crpci_conn_interest(crpci_conn *c)
{
    unsigned events = 0;
    if (c->closed || crpci_conn_engaged(c)) /* the thread in the transport calls this afterwards */
        return;
    if (!c->connecting && !c->paused && !c->eof)
        events |= CRPC_READABLE;
    if (c->connecting || c->blocked)
        events |= CRPC_WRITABLE;
    if (!crpci_conn_is_plain(c) && c->io->want && !c->connecting)
        events = c->io->want(c->io_state, events);
    if (crpci_watch_set(c->loop, &c->watch, c->fd, events))
        crpci_conn_close(c, CRPC_ENOMEM, 0);
}

/* Schedules a read for the next step, for input that the poller cannot see. */
CRPCI_FN void crpci_conn_read_on(crpci_conn *c)
{
    crpci_loop_queue(&c->loop->resume, &c->resume);
    crpci_loop_kick(c->loop);
}

/* Whether there is input that the poller will not report: already read, or inside the transport. */
CRPCI_FN bool crpci_conn_has_unseen(const crpci_conn *c)
{
    if (c->left || c->unread)
        return true;
    return !crpci_conn_is_plain(c) && c->io->pending && !crpci_conn_engaged(c) &&
           c->io->pending(c->io_state);
}

/* Stops or resumes reading, while a peer's requests or the replies to them pile up. The time of a
 * partial message begins anew on resuming, because the pause was not the peer's slowness. */
CRPCI_FN void crpci_conn_pause(crpci_conn *c, bool paused)
{
    if (c->paused == paused || c->closed)
        return;
    c->paused = paused;
    c->rx_since = crpci_loop_now(c->loop);
    if (!paused && crpci_conn_has_unseen(c))
        crpci_conn_read_on(c);
    crpci_conn_interest(c);
}

/* Whether a connection is at rest: nothing to send, nothing partly received, nothing unread. A
 * draining server can close such a connection without losing a request. */
CRPCI_FN bool crpci_conn_idle(const crpci_conn *c)
{
    return !c->tx_head && !c->held && !c->left && !c->rx && !c->skip && !crpci_conn_engaged(c) &&
           crpci_conn_transport(c)->idle(c->fd, c->io_state);
}

/* --- sending ---------------------------------------------------------------------------------- */

/* The pieces of one send. Short frames are copied together, because the kernel spends more time on
 * each piece of an iovec than the copy takes. The copies are on the heap: on the stack they would
 * be most of the stack that a synchronous call needs. */
typedef struct crpci_conn_batch {
    struct iovec iov[CRPCI_CONN_IOV];
    int count;
    size_t used;
    crpci_chunk *copies; /* NULL: there is only one frame, or no memory; none is copied then */
} crpci_conn_batch;

/* Adds a piece: a copy of it, joined with the copy before where possible, or what the send reads
 * where it is. */
CRPCI_FN void crpci_conn_add(crpci_conn_batch *b, const uint8_t *p, size_t n, bool copy)
{
    struct iovec *next = &b->iov[b->count];
    if (copy) {
        p = (uint8_t *)memcpy(crpci_heap_data(b->copies) + b->used, p, n);
        b->used += n;
    }
    if (copy && b->count && (uint8_t *)next[-1].iov_base + next[-1].iov_len == p) {
        next[-1].iov_len += n;
        return;
    }
    next->iov_base = (void *)(uintptr_t)p; /* iovec has no const */
    next->iov_len = n;
    b->count++;
}

/* Appends the id of a request that is about to be sent to the ring of awaited replies. This must
 * happen before the send, because another thread may read the reply before this one has the lock
 * again. */
CRPCI_COLD void crpci_conn_await(crpci_conn *c, crpci_out *o)
{
    size_t size = c->awaited_size, more = size ? 2 * size : 16;
    if (c->awaited_count == size) {
        int64_t *ring = (int64_t *)crpci_heap_alloc(c->loop->heap, more * sizeof *ring);
        size_t i;
        if (!ring) {
            crpci_conn_close(c, CRPC_ENOMEM, 0);
            return;
        }
        for (i = 0; i < size; i++)
            ring[i] = c->awaited[(c->awaited_first + i) % size];
        crpci_heap_free(c->loop->heap, c->awaited, size * sizeof *ring);
        c->awaited = ring;
        c->awaited_size = more;
        c->awaited_first = 0;
    }
    c->awaited[(c->awaited_first + c->awaited_count++) % c->awaited_size] = o->id;
    o->awaited = true;
}

/* Removes the ids of requests of which a send has taken no byte: they can still be withdrawn. They
 * are the last ones of the ring. */
CRPCI_COLD void crpci_conn_await_not(crpci_conn *c)
{
    crpci_out *o;
    for (o = c->tx_head; o && (o->awaited || o->sent); o = o->next) {
        if (!o->sent) {
            o->awaited = false;
            c->awaited_count -= c->awaited_count != 0; /* 0: the peer answered unsent requests */
        }
    }
}

/* Collects queued frames for one send and marks them as in flight. The first frame may be sent in
 * part already; its `sent` bytes are skipped. */
CRPCI_FN void crpci_conn_gather(crpci_conn *c, crpci_conn_batch *b)
{
    crpci_out *o;
    b->count = 0;
    b->used = 0;
    if (c->tx_head->next && !b->copies)
        b->copies = crpci_heap_chunk(c->loop->heap, CRPCI_CONN_FLAT);
    for (o = c->tx_head; o && b->count + 2 <= CRPCI_CONN_IOV; o = o->next) {
        size_t skip = o->sent, head = skip < o->head_len ? o->head_len - skip : 0;
        if (head)
            crpci_conn_add(b, o->head + skip, head,
                           b->copies && head <= CRPCI_CONN_SHORT &&
                               head <= CRPCI_CONN_FLAT - b->used);
        skip = head ? 0 : skip - o->head_len;
        if (o->tail_len)
            crpci_conn_add(b, o->tail + skip, o->tail_len - skip, false);
        o->inflight = true;
        if (crpci_conn_awaits(c) && !o->awaited)
            crpci_conn_await(c, o);
    }
}

/* Accounts for `n` sent bytes. Complete frames leave the queue, and their owners are told. */
CRPCI_FN void crpci_conn_advance(crpci_conn *c, size_t n)
{
    crpci_chunk *chunk, *tail;
    crpci_out *o;
    for (o = c->tx_head; o && o->inflight; o = o->next)
        o->inflight = false;
    c->tx_bytes -= (int64_t)n;
    while ((o = c->tx_head) != NULL && (n || crpci_conn_out_len(o) == o->sent)) {
        size_t step = crpci_base_min(n, crpci_conn_out_len(o) - o->sent);
        o->sent += step;
        n -= step;
        if (o->sent < crpci_conn_out_len(o))
            break;
        c->tx_head = o->next;
        if (!c->tx_head)
            c->tx_end = &c->tx_head;
        o->queued = false;
        c->tx_memory -= crpci_conn_out_memory(o);
        chunk = o->owner ? NULL : o->chunk;
        tail = o->tail_chunk;
        if (!c->closed) /* else the owner got `closed`, and may have freed itself */
            c->up->sent(c, o); /* the owner may free `o` here */
        crpci_heap_chunk_unref(tail);
        crpci_heap_chunk_unref(chunk);
    }
    if (crpci_conn_awaits(c))
        crpci_conn_await_not(c);
    if (c->loop->io_waiters)
        crpci_thread_broadcast(&c->loop->io_cond);
}

/* How many pieces of a batch the transport may be offered. 0: the connection was closed, because
 * memory for copies was lacking, and less than was offered before cannot be offered again. */
CRPCI_COLD int crpci_conn_may_offer(crpci_conn *c, const crpci_conn_batch *b)
{
    if (c->tx_head->committed && c->tx_head->next && !b->copies) {
        crpci_conn_close(c, CRPC_ENOMEM, 0);
        return 0;
    }
    return c->io->flags & CRPCI_TRANSPORT_GATHER ? b->count : 1;
}

/* Sending has to wait until the transport takes more. What it was offered it may have to be offered
 * again. */
CRPCI_COLD void crpci_conn_block(crpci_conn *c, const struct iovec *iov, int count)
{
    crpci_out *o = c->tx_head;
    size_t offered = 0;
    c->blocked = true;
    if (!crpci_conn_is_plain(c) && c->io->flags & CRPCI_TRANSPORT_REPEAT) {
        while (count)
            offered += iov[--count].iov_len;
        for (; o && offered; o = o->next) {
            o->committed = true;
            offered -= crpci_base_min(offered, crpci_conn_out_len(o) - o->sent);
        }
    }
    crpci_conn_interest(c);
}

/* Sends the queue until it is empty or the transport takes no more. Unlocks the loop while sending;
 * meanwhile other threads may append frames, withdraw frames that are not in flight, or close the
 * connection. */
CRPCI_FN void crpci_conn_flush(crpci_conn *c)
{
    crpc_loop *l = c->loop;
    crpci_conn_batch batch;
    int rounds = 0, count;
    if (c->writing || c->closed || c->connecting || c->blocked)
        return;
    if (crpci_conn_engaged(c))
        return; /* whoever reads queues the flush again */
    batch.copies = NULL;
    crpci_list_remove(&c->flush.link);
    crpci_conn_hold(c);
    c->writing = true;
    while (c->tx_head && !c->closed) {
        int saved;
        ssize_t n;
        if (rounds++ >= CRPCI_CONN_ROUNDS && l->driver) {
            /* Other threads append as fast as this one sends: the loop's driver goes on, so that a
             * synchronous caller can return to its own call. */
            crpci_loop_queue(&l->dirty, &c->flush);
            crpci_loop_kick(l);
            break;
        }
        crpci_conn_gather(c, &batch);
        count = batch.count;
        if (!crpci_conn_is_plain(c))
            count = crpci_conn_may_offer(c, &batch);
        if (!count)
            break;
        l->stats.sends++;
        crpci_loop_unlock(l);
        n = crpci_conn_transport(c)->writev(c->fd, c->io_state, batch.iov, count);
        saved = errno;
        crpci_loop_lock(l);
        crpci_conn_advance(c, n > 0 ? (size_t)n : 0);
        if (n >= 0 || saved == EINTR)
            continue;
        if (saved == EAGAIN || saved == EWOULDBLOCK) {
            crpci_conn_block(c, batch.iov, count);
            break;
        }
        c->writing = false;
        crpci_conn_close(c, CRPC_ECONN, saved);
    }
    crpci_heap_chunk_unref(batch.copies);
    c->writing = false;
    if (c->closed) {
        crpci_conn_cleanup(c);
    } else if (c->close_when_sent && !c->tx_head) {
        crpci_conn_close(c, CRPC_ECLOSE, 0);
    } else if (!crpci_conn_is_plain(c)) {
        crpci_conn_interest(c);
        if (!c->closed && !c->paused && crpci_conn_has_unseen(c))
            crpci_conn_read_on(c);
    }
    crpci_conn_drop(c);
}

CRPCI_FN void crpci_conn_flush_task(crpc_loop *l, crpci_task *task)
{
    (void)l;
    crpci_conn_flush(CRPCI_CONTAINER(task, crpci_conn, flush));
}

/* Appends a frame; the loop's driver will send it. If the frame has no owner, the connection takes
 * over the caller's reference of the chunk. */
CRPCI_FN void crpci_conn_queue(crpci_conn *c, crpci_out *o)
{
    o->next = NULL;
    o->sent = 0;
    o->inflight = o->committed = o->awaited = false;
    o->queued = true;
    o->conn = c;
    *c->tx_end = o;
    c->tx_end = &o->next;
    c->tx_bytes += (int64_t)crpci_conn_out_len(o);
    c->tx_memory += crpci_conn_out_memory(o);
    if (!c->blocked && !c->writing)
        crpci_loop_queue(&c->loop->dirty, &c->flush);
}

/* Queues the reply to the request of `turn`. In an ordered protocol, keeps it until the replies to
 * all earlier requests are queued. */
CRPCI_FN void crpci_conn_reply(crpci_conn *c, crpci_out *o, uint32_t turn)
{
    crpci_out **at = &c->held;
    if (!crpci_conn_ordered(c)) {
        crpci_conn_queue(c, o);
        return;
    }
    while (*at && (int32_t)((*at)->turn - turn) < 0)
        at = &(*at)->next;
    o->turn = turn;
    o->next = *at;
    *at = o;
    c->tx_memory += crpci_conn_out_memory(o);
    while ((o = c->held) != NULL && o->turn == c->turn_due) {
        c->turn_due++;
        c->held = o->next;
        c->tx_memory -= crpci_conn_out_memory(o);
        crpci_conn_queue(c, o);
    }
}

/* Removes a queued frame of which nothing was sent. False: part of it may have left already. */
CRPCI_FN bool crpci_conn_withdraw(crpci_conn *c, crpci_out *o)
{
    crpci_out **at = &c->tx_head;
    if (!o->queued || crpci_conn_out_begun(o))
        return false;
    while (*at != o)
        at = &(*at)->next;
    *at = o->next;
    if (!o->next)
        c->tx_end = at;
    c->tx_bytes -= (int64_t)crpci_conn_out_len(o);
    c->tx_memory -= crpci_conn_out_memory(o);
    o->queued = false;
    crpci_conn_out_free(o);
    return true;
}

/* ======================================================================== */
/* >>impl-receive   messages out of a connection: buffers, parsing, bodies over max_body */
/* ======================================================================== */

/* Reads a connection's socket, collects messages that arrive in parts, and feeds the protocol,
 * which calls back with whole messages. The peer is not trusted: a step of the loop takes a bounded
 * number of bytes and messages from each connection, and memory is reserved only for bytes that
 * have come. All functions need the loop's lock; crpci_receive_read releases it around the system
 * call. */

#define CRPCI_RECEIVE_LEAST (2048 - CRPCI_CHUNK_HEADER) /* bytes for a partial message */

/* Closes a connection whose peer broke its protocol, with a warning that says how. */
CRPCI_FN void crpci_receive_bad(crpci_conn *c, const char *what)
{
    char peer[CRPCI_SOCK_NAME_MAX];
    c->loop->stats.bad_frames++;
    crpci_sock_name_format(&c->peer, peer, sizeof peer);
    crpci_heap_log(c->loop->heap, CRPC_LOG_WARN, "connection with %s closed: %s", peer, what);
    crpci_conn_close(c, CRPC_ERESPONSE, 0);
}

/* A partial message is buffered: starts its timeout, unless the timer fires earlier for another
 * reason. */
CRPCI_FN void crpci_receive_begun(crpci_conn *c)
{
    c->rx_since = crpci_loop_now(c->loop);
    if (c->frame_timeout_us &&
        (!c->timer.prev || c->timer.due_us > c->rx_since + c->frame_timeout_us))
        crpci_loop_timer_set(c->loop, &c->timer, c->frame_timeout_us);
}

/* Orders a message of an ordered protocol: a request gets the next turn, a reply the id of the
 * oldest awaited request. False: the connection was closed. */
CRPCI_COLD bool crpci_receive_place(crpci_conn *c, crpci_message *m)
{
    if (m->kind == CRPCI_MESSAGE_REQUEST) {
        m->turn = c->turns++;
    } else if (c->awaited_count) {
        m->id = c->awaited[c->awaited_first];
        c->awaited_first = (c->awaited_first + 1) % c->awaited_size;
        c->awaited_count--;
    } else {
        crpci_receive_bad(c, "the peer sent a reply, but no request awaits one");
        return false;
    }
    return true;
}

/* Tells whether a connection receives requests or replies: the side that dialled gets replies. */
CRPCI_FN crpci_message_kind crpci_receive_kind(const crpci_conn *c)
{
    return c->protocols ? CRPCI_MESSAGE_REQUEST : CRPCI_MESSAGE_REPLY;
}

/* For protocols: passes a complete message to the connection's owner. May close the connection. */
CRPCI_FN void crpci_receive_deliver(crpci_conn *c, crpci_message *m)
{
    c->active_us = crpci_loop_time(c->loop);
    if (!crpci_conn_ordered(c) || crpci_receive_place(c, m))
        c->up->message(c, m);
}

/* For protocols: reports a message whose body of `size` bytes is over max_body, and skips the next
 * `skip` bytes of input. The connection stays usable, so that the peer gets an error in place of a
 * reset. */
CRPCI_COLD void crpci_receive_oversize(crpci_conn *c, crpci_message *m, uint64_t size,
                                       uint64_t skip)
{
    c->active_us = crpci_loop_time(c->loop);
    c->skip = skip;
    if (skip)
        crpci_receive_begun(c);
    if (!crpci_conn_ordered(c) || crpci_receive_place(c, m))
        c->up->oversize(c, m, size);
}

/* Fixes the connection's protocol. False: out of memory, and the connection was closed. */
CRPCI_FN bool crpci_receive_speak(crpci_conn *c, const crpci_protocol *p)
{
    c->protocol = p;
    if (!CRPCI_CONN_PROTOCOLS || !p->state_size)
        return true;
    c->protocol_state = crpci_heap_alloc(c->loop->heap, p->state_size);
    if (!c->protocol_state)
        crpci_conn_close(c, CRPC_ENOMEM, 0);
    return c->protocol_state != NULL;
}

/* Recognises the protocol of an accepted connection. False: too few bytes yet, or closed. */
CRPCI_COLD bool crpci_receive_detect(crpci_conn *c, const uint8_t *p, size_t n)
{
    bool more = false;
    size_t i;
    for (i = 0; c->protocols[i]; i++) {
        crpci_detected found = c->protocols[i]->detect(p, n);
        if (found == CRPCI_DETECTED_YES) {
            c->protocol_index = i;
            return crpci_receive_speak(c, c->protocols[i]);
        }
        more = more || found == CRPCI_DETECTED_MORE;
    }
    if (more)
        c->rx_total = n + 1;
    else
        crpci_receive_bad(c, "the peer speaks none of the protocols of this server");
    return false;
}

/* Passes input to the protocol and returns the number of bytes it used. 0: it needs more
 * (c->rx_total), or the connection is closed. */
CRPCI_FN size_t crpci_receive_parse(crpci_conn *c, crpci_chunk *chunk, const uint8_t *p, size_t n)
{
    if (CRPC_ENABLE_SERVER && CRPCI_UNLIKELY(!c->protocol) && !crpci_receive_detect(c, p, n))
        return 0;
    return c->protocol->feed(c, chunk, p, n);
}

/* Moves the first `have` bytes of a message into a new, larger c->rx. It has room for twice as many,
 * because a peer must not reserve memory by announcing large sizes; for the whole message when a
 * fifth of it is there. Doubling to the end would copy an attachment of 1 MiB twice. False: out of
 * memory, and the connection was closed. */
CRPCI_FN bool crpci_receive_reserve(crpci_conn *c, const uint8_t *p, size_t have)
{
    size_t room = have > CRPCI_RECEIVE_LEAST / 2 ? 2 * have : CRPCI_RECEIVE_LEAST;
    crpci_chunk *chunk;
    if (room > c->rx_total || have >= c->rx_total / 5)
        room = c->rx_total;
    chunk = crpci_heap_chunk(c->loop->heap, room);
    if (!chunk) {
        crpci_conn_close(c, CRPC_ENOMEM, 0);
        return false;
    }
    memcpy(crpci_heap_data(chunk), p, have);
    crpci_heap_chunk_unref(c->rx);
    c->rx = chunk;
    c->rx_len = have;
    c->rx_need = crpci_base_min(chunk->cap, c->rx_total);
    return true;
}

/* c->rx holds the bytes that were asked for: parses them, and grows if the protocol needs more. */
CRPCI_FN void crpci_receive_full(crpci_conn *c)
{
    crpci_chunk *chunk = c->rx;
    if (c->rx_len == c->rx_total) {
        c->rx = NULL;
        if (crpci_receive_parse(c, chunk, crpci_heap_data(chunk), c->rx_len) || c->closed) {
            crpci_heap_chunk_unref(chunk);
            return;
        }
        c->rx = chunk;
    }
    c->rx_need = c->rx_total;
    if (c->rx_total > chunk->cap)
        crpci_receive_reserve(c, crpci_heap_data(chunk), c->rx_len);
}

/* Takes one piece of input: a whole message in place, or bytes that begin or continue c->rx.
 * Returns the number of bytes used. */
CRPCI_FN size_t crpci_receive_feed_one(crpci_conn *c, crpci_chunk *chunk, const uint8_t *p,
                                       size_t n)
{
    size_t used;
    if (c->skip) {
        n = (size_t)crpci_base_min64((int64_t)n, (int64_t)c->skip);
        c->skip -= n;
        return n;
    }
    if (c->rx) {
        n = crpci_base_min(n, c->rx_need - c->rx_len);
        memcpy(crpci_heap_data(c->rx) + c->rx_len, p, n);
        c->rx_len += n;
        if (c->rx_len == c->rx_need)
            crpci_receive_full(c);
        return n;
    }
    used = crpci_receive_parse(c, chunk, p, n);
    if (CRPCI_LIKELY(used) || c->closed || !crpci_receive_reserve(c, p, n))
        return used;
    crpci_receive_begun(c);
    return n;
}

/* Takes input until the step's budget is used up or the connection pauses; the rest waits in
 * c->left. */
CRPCI_FN void crpci_receive_feed(crpci_conn *c, crpci_chunk *chunk, const uint8_t *p, size_t n)
{
    int frames = 0;
    while (n && !c->closed) {
        size_t used;
        if (frames++ == CRPCI_CONN_FRAMES || c->paused) {
            crpci_heap_chunk_ref(chunk);
            c->left = chunk;
            c->left_at = p;
            c->left_len = n;
            if (!c->paused)
                crpci_loop_queue(&c->loop->resume, &c->resume);
            return;
        }
        used = crpci_receive_feed_one(c, chunk, p, n);
        p += used;
        n -= used;
    }
}

/* Continues with input that was over the budget. False if some of it is still left. */
CRPCI_FN bool crpci_receive_catch_up(crpci_conn *c)
{
    crpci_chunk *chunk = c->left;
    if (!chunk)
        return true;
    if (c->paused)
        return false;
    c->left = NULL;
    crpci_receive_feed(c, chunk, c->left_at, c->left_len);
    crpci_heap_chunk_unref(chunk);
    return !c->left;
}

/* Provides the loop's receive buffer, one for all connections, because only the driver reads.
 * Messages that are still referred to keep their part of it; the next read goes behind them. */
CRPCI_FN bool crpci_receive_spare(crpc_loop *l)
{
    if (l->spare && crpci_loop_spare_alone(l))
        l->spare_pos = 0;
    if (l->spare && l->spare_pos + CRPCI_CONN_READ / 8 > l->spare->cap)
        crpci_loop_drop_spare(l);
    if (!l->spare) {
        l->spare = crpci_heap_chunk(l->heap, CRPCI_CONN_READ);
        l->spare_pos = 0;
    }
    return l->spare != NULL;
}

/* Processes `n` bytes that readv put into c->rx and, behind that, into the loop's buffer. */
CRPCI_FN void crpci_receive_bytes(crpci_conn *c, size_t n)
{
    crpc_loop *l = c->loop;
    crpci_chunk *chunk = l->spare;
    const uint8_t *p = crpci_heap_data(chunk) + l->spare_pos;
    crpci_loop_share(l, chunk); /* a callback may drop the loop's buffer */
    if (c->rx) {
        size_t direct = crpci_base_min(n, c->rx_need - c->rx_len);
        c->rx_len += direct;
        n -= direct;
        if (c->rx_len == c->rx_need)
            crpci_receive_full(c);
    }
    crpci_receive_feed(c, chunk, p, n);
    crpci_loop_unshare(l, chunk);
    if (l->spare == chunk)
        l->spare_pos += (n + 7) & ~(size_t)7;
}

/* With a transport that is more than a socket, a read may have changed what it waits for, and
 * whether it can write. */
CRPCI_COLD void crpci_receive_after_read(crpci_conn *c)
{
    if (c->closed)
        return;
    if (c->tx_head && !c->blocked)
        crpci_loop_queue(&c->loop->dirty, &c->flush);
    if (crpci_conn_has_unseen(c))
        crpci_conn_read_on(c);
    crpci_conn_interest(c);
}

/* Reads once. Partial messages are read straight into their chunk. Unlocks the loop while
 * reading. */
CRPCI_FN void crpci_receive_read(crpci_conn *c)
{
    crpc_loop *l = c->loop;
    struct iovec iov[2];
    int count = 0, saved;
    ssize_t n;
    if (!crpci_receive_catch_up(c) || c->closed || c->reading || c->paused || c->eof)
        return;
    c->unread = crpci_conn_engaged(c);
    if (c->unread) /* the thread that writes schedules the read when it is done */
        return;
    if (!crpci_receive_spare(l)) {
        crpci_conn_close(c, CRPC_ENOMEM, 0);
        return;
    }
    if (c->rx) {
        iov[count].iov_base = crpci_heap_data(c->rx) + c->rx_len;
        iov[count++].iov_len = c->rx_need - c->rx_len;
    }
    iov[count].iov_base = crpci_heap_data(l->spare) + l->spare_pos;
    iov[count++].iov_len = l->spare->cap - l->spare_pos;
    l->stats.receives++;
    c->reading = true;
    crpci_loop_unlock(l);
    n = crpci_conn_transport(c)->readv(c->fd, c->io_state, iov, count);
    saved = errno;
    crpci_loop_lock(l);
    c->reading = false;
    if (!crpci_conn_is_plain(c))
        crpci_receive_after_read(c);
    if (c->closed)
        crpci_conn_cleanup(c);
    else if (n > 0)
        crpci_receive_bytes(c, (size_t)n);
    else if (n == 0)
        c->up->eof(c);
    else if (saved != EAGAIN && saved != EWOULDBLOCK && saved != EINTR)
        crpci_conn_close(c, CRPC_ECONN, saved);
}

/* ======================================================================== */
/* >>impl-connect   sockets become connections: dialled, accepted; their events */
/* ======================================================================== */

/* The last part of a connection, on top of sending and receiving: the callbacks of the poller, the
 * loop's tasks and the timer, and the two ways to get a connection. Endpoints dial, listeners hand
 * over accepted sockets. All functions need the loop's lock and never block. */

/* A dialled socket has become writable: it is connected, or SO_ERROR says why not. A socket that
 * connected to itself, which the kernel does on local ephemeral ports, counts as refused. */
CRPCI_FN void crpci_connect_finish(crpci_conn *c)
{
    int e = 0;
    socklen_t len = sizeof e;
    if (getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &e, &len))
        e = errno;
    if (!e && crpci_sock_is_self(c->fd))
        e = ECONNREFUSED;
    if (e) {
        crpci_conn_close(c, CRPC_ECONN, e);
        return;
    }
    c->connecting = false;
    crpci_timer_cancel(&c->timer);
    crpci_conn_interest(c);
    if (!c->closed)
        c->up->opened(c);
}

/* The poller's callback. */
CRPCI_FN void crpci_connect_event(crpc_loop *l, crpci_watch *w, unsigned events)
{
    crpci_conn *c = CRPCI_CONTAINER(w, crpci_conn, watch);
    (void)l;
    crpci_conn_hold(c);
    if (c->connecting) {
        crpci_connect_finish(c);
    } else {
        if (!crpci_conn_is_plain(c) && c->io->want)
            events |= CRPC_READABLE | CRPC_WRITABLE; /* which of them goes on, it does not say */
        if (events & CRPC_WRITABLE && c->blocked) {
            c->blocked = false;
            crpci_conn_interest(c);
            crpci_loop_queue(&l->dirty, &c->flush);
        }
        if (events & CRPC_READABLE && !c->closed)
            crpci_receive_read(c);
    }
    crpci_conn_drop(c);
}

/* Runs in the next step: continues with input over the budget, then with input that the poller
 * cannot see. */
CRPCI_FN void crpci_connect_resume_task(crpc_loop *l, crpci_task *task)
{
    crpci_conn *c = CRPCI_CONTAINER(task, crpci_conn, resume);
    crpci_conn_hold(c);
    if (!c->closed && crpci_receive_catch_up(c) && !c->closed && crpci_conn_has_unseen(c))
        crpci_connect_event(l, &c->watch, CRPC_READABLE);
    crpci_conn_drop(c);
}

CRPCI_FN void crpci_connect_on_timer(crpc_loop *l, crpci_timer *t)
{
    crpci_conn *c = CRPCI_CONTAINER(t, crpci_conn, timer);
    (void)l;
    crpci_conn_hold(c);
    c->up->timer(c);
    crpci_conn_drop(c);
}

/* Takes over a socket, connecting or accepted; on failure the socket is closed. The loop has a
 * reference until the connection closes. The caller sets `protocols` of an accepted connection, and
 * calls crpci_receive_speak for a dialled one, before the loop runs again. NULL: out of memory. */
CRPCI_FN crpci_conn *crpci_connect_new(crpc_loop *l, int fd, bool connecting,
                                       const crpci_conn_events *up, void *owner)
{
    crpci_conn *c = (crpci_conn *)crpci_heap_alloc(l->heap, sizeof *c);
    if (!c) {
        close(fd);
        return NULL;
    }
    c->loop = l;
    c->fd = fd;
    c->refs = 1;
    c->io = &crpci_transport_plain;
    c->up = up;
    c->owner = owner;
    c->connecting = connecting;
    c->max_body = INT32_MAX;
    c->tx_end = &c->tx_head;
    c->opened_us = c->active_us = crpci_loop_now(l);
    crpci_watch_init(&c->watch, crpci_connect_event);
    crpci_loop_task_init(&c->flush, crpci_conn_flush_task);
    crpci_loop_task_init(&c->resume, crpci_connect_resume_task);
    crpci_timer_init(&c->timer, crpci_connect_on_timer);
    crpci_list_append(&l->conns, &c->link);
    if (crpci_watch_set(l, &c->watch, fd, connecting ? CRPC_WRITABLE : CRPC_READABLE)) {
        crpci_list_remove(&c->link);
        close(fd);
        crpci_heap_free(l->heap, c, sizeof *c);
        return NULL;
    }
    l->stats.connections++;
    return c;
}

/* Begins to connect. Fails with CRPC_ECONN and the errno in *e if connect failed at once. */
CRPCI_FN int crpci_connect_dial(crpc_loop *l, const crpci_addr *to, const crpci_conn_events *up,
                                void *owner, crpci_conn **out, int *e)
{
    int fd = crpci_sock_open(to);
    *out = NULL;
    *e = 0;
    if (fd < 0) {
        *e = errno;
        return CRPC_ECONN;
    }
    if (connect(fd, &to->u.any, to->len) && errno != EINPROGRESS) {
        *e = errno;
        close(fd);
        return CRPC_ECONN;
    }
    /* Connected at once (a unix socket) or later: the poller reports it writable either way. */
    *out = crpci_connect_new(l, fd, true, up, owner);
    if (*out)
        crpci_sock_name_of(&(*out)->peer, to, fd);
    return *out ? CRPC_OK : CRPC_ENOMEM;
}

/* ======================================================================== */
/* >>impl-baidu   brpc's protocol baidu_std: RpcMeta to messages and back   */
/* ======================================================================== */

/* Cuts baidu_std's frames (see impl-frame, impl-meta) into messages, and lays out requests and
 * replies. The peer is not trusted: each size is checked before memory is reserved for it. */

/* Reading a meta takes about a second for each 60 MiB, with the loop locked. */
#define CRPCI_BAIDU_META_MAX CRPCI_PROTOCOL_HEAD_MAX

/* The first four bytes are "PRPC"; fewer that match leave it open. */
CRPCI_FN crpci_detected crpci_baidu_detect(const uint8_t *p, size_t n)
{
    if (memcmp(p, "PRPC", crpci_base_min(n, 4)) != 0)
        return CRPCI_DETECTED_NO;
    return n < 4 ? CRPCI_DETECTED_MORE : CRPCI_DETECTED_YES;
}

/* Whether crpc supports all that a meta asks for; if not, `text` says what it does not support, for
 * the error reply. */
CRPCI_COLD bool crpci_baidu_check(const crpci_meta *m, size_t body, char *text, size_t size)
{
    if (m->attachment_size < 0 || (size_t)m->attachment_size > body)
        crpci_status_format(text, size, "attachment_size %d is larger than the body's %zu bytes",
                            m->attachment_size, body);
    else if (m->compress_type)
        crpci_status_format(text, size, "compress_type %d is not supported; send uncompressed",
                            m->compress_type);
    else if (m->content_type)
        crpci_status_format(text, size, "content_type %d is not supported; send protobuf",
                            m->content_type);
    else if (m->checksum_type)
        crpci_status_format(text, size, "checksum_type %d is not supported; send none",
                            m->checksum_type);
    else if (crpc_view_data(m->stream_settings))
        crpci_status_format(text, size, "streaming is not supported");
    else if (crpc_view_data(m->chunk_info))
        crpci_status_format(text, size, "chunked bodies are not supported; send one frame");
    else
        return true;
    return false;
}

/* Fills a message whose meta may say anything; its body has `body` bytes. `text` is for
 * m->unsupported. */
CRPCI_FN void crpci_baidu_full(const crpci_meta *meta, crpci_message *m, size_t body, char *text,
                               size_t size)
{
    bool able = crpci_baidu_check(meta, body, text, size);
    m->unsupported = able ? NULL : text;
    m->attachment_size = able ? (size_t)meta->attachment_size : 0;
    m->payload_size = body - m->attachment_size;
    m->has_fields = meta->fields;
    m->status = meta->error_code;
    m->text = meta->error_text;
    m->service = meta->service;
    m->method = meta->method;
    m->log_id = meta->log_id;
    m->trace_id = meta->trace_id;
    m->span_id = meta->span_id;
    m->parent_span_id = meta->parent_span_id;
    m->credential = meta->credential;
}

/* A body over the limit: reads the meta, which names the call to answer with an error, and skips
 * the rest. Closes the connection instead if even skipping would exceed max_skip. */
CRPCI_COLD size_t crpci_baidu_oversize(crpci_conn *c, const uint8_t *p, size_t n, uint32_t body,
                                       uint32_t size)
{
    crpci_meta meta;
    crpci_message m;
    if ((int64_t)body > c->max_skip) {
        crpci_receive_bad(c, "the peer announced a body over max_skip");
        return 0;
    }
    c->rx_total = (size_t)CRPCI_FRAME_HEADER + size;
    if (n < c->rx_total)
        return 0;
    if (!crpci_meta_read(p + CRPCI_FRAME_HEADER, size, &meta)) {
        crpci_receive_bad(c, "the peer's RpcMeta does not decode");
        return 0;
    }
    memset(&m, 0, sizeof m);
    m.kind = crpci_receive_kind(c);
    m.id = meta.correlation_id;
    crpci_receive_oversize(c, &m, body, (uint64_t)body - size);
    return (size_t)CRPCI_FRAME_HEADER + size;
}

/* The hot path of every request and reply. The message is filled member by member, not cleared: see
 * crpci_message.usual. */
CRPCI_FN size_t crpci_baidu_feed(crpci_conn *c, crpci_chunk *chunk, const uint8_t *p, size_t n)
{
    uint32_t body = 0, size = 0;
    crpci_meta meta;
    crpci_message m;
    char text[120];
    switch (crpci_frame_header(p, n, &body, &size)) {
    case CRPCI_FRAME_BAD:
        crpci_receive_bad(c, "the peer does not speak baidu_std");
        return 0;
    case CRPCI_FRAME_NEED:
        c->rx_total = CRPCI_FRAME_HEADER;
        return 0;
    default:
        break;
    }
    if (CRPCI_UNLIKELY(size > CRPCI_BAIDU_META_MAX)) {
        crpci_receive_bad(c, "the peer announced an RpcMeta over 64 KiB");
        return 0;
    }
    if (CRPCI_UNLIKELY(body > c->max_body))
        return crpci_baidu_oversize(c, p, n, body, size);
    if (n < (size_t)CRPCI_FRAME_HEADER + body) {
        c->rx_total = (size_t)CRPCI_FRAME_HEADER + body;
        return 0;
    }
    p += CRPCI_FRAME_HEADER;
    m.usual = crpci_meta_read_usual(p, size, c->expect, &meta);
    if (CRPCI_UNLIKELY(!m.usual) && !crpci_meta_read(p, size, &meta)) {
        crpci_receive_bad(c, "the peer's RpcMeta does not decode");
        return 0;
    }
    m.kind = crpci_receive_kind(c);
    m.id = meta.correlation_id;
    m.turn = 0;
    m.timeout_ms = meta.timeout_ms;
    m.chunk = chunk;
    m.fields = meta.raw;
    m.payload = p + size;
    m.payload_size = body - size;
    m.attachment_size = 0;
    if (CRPCI_UNLIKELY(!m.usual))
        crpci_baidu_full(&meta, &m, body - size, text, sizeof text);
    crpci_receive_deliver(c, &m);
    return (size_t)CRPCI_FRAME_HEADER + body;
}

/* Writes the head of a request, see crpci_protocol.request. */
CRPCI_FN uint8_t *crpci_baidu_request(uint8_t *low, uint8_t *payload, const crpci_message *m)
{
    crpci_meta meta; /* only the members that crpci_meta_put_request reads */
    meta.names = m->names;
    meta.credential = m->credential;
    meta.log_id = m->log_id;
    meta.trace_id = m->trace_id;
    meta.span_id = m->span_id;
    meta.parent_span_id = m->parent_span_id;
    meta.attachment_size = (int32_t)m->attachment_size;
    meta.correlation_id = m->id;
    meta.timeout_ms = m->timeout_ms;
    meta.compress_type = 0;
    return crpci_meta_put_request(low, payload, m->payload_size, &meta, m->fields);
}

/* Writes the head of a reply. */
CRPCI_FN uint8_t *crpci_baidu_reply(uint8_t *low, uint8_t *payload, const crpci_message *m)
{
    crpci_meta meta; /* only the members that crpci_meta_put_reply reads */
    meta.error_code = m->status;
    meta.error_text = m->text;
    meta.attachment_size = (int32_t)m->attachment_size;
    meta.correlation_id = m->id;
    meta.compress_type = 0;
    return crpci_meta_put_reply(low, payload, m->payload_size, &meta, m->fields);
}

static const crpci_protocol crpci_baidu = {"baidu_std",
                                           0,
                                           0,
                                           CRPCI_META_BOUND,
                                           CRPCI_META_FIELD_COST,
                                           crpci_baidu_detect,
                                           crpci_baidu_feed,
                                           crpci_meta_put_names,
                                           crpci_meta_put_field,
                                           crpci_meta_field,
                                           CRPC_ENABLE_CLIENT ? crpci_baidu_request : NULL,
                                           CRPC_ENABLE_SERVER ? crpci_baidu_reply : NULL};

/* ======================================================================== */
/* >>impl-protocols   the table of wire protocols                          */
/* ======================================================================== */

/* A server tries these in order to detect a connection's protocol; a channel's URL names one. A new
 * protocol is added here; tests add theirs through CRPCI_TEST_PROTOCOLS. */
static const crpci_protocol *const crpci_protocols[] = {
    &crpci_baidu,
#ifdef CRPCI_TEST_PROTOCOLS
    CRPCI_TEST_PROTOCOLS,
#endif
    NULL};

#define CRPCI_PROTOCOLS_COUNT (sizeof crpci_protocols / sizeof crpci_protocols[0] - 1)

/* The protocol of that name; NULL: there is none. */
CRPCI_COLD const crpci_protocol *crpci_protocols_find(const char *name)
{
    size_t i;
    for (i = 0; crpci_protocols[i]; i++) {
        if (strcmp(crpci_protocols[i]->name, name) == 0)
            break;
    }
    return crpci_protocols[i];
}

/* ======================================================================== */
/* >>impl-names   provider URLs in Dubbo's notation, and an operator's overrides; pure */
/* ======================================================================== */

/* Registries store a provider as the name of a znode or the text of a datagram: a URL in Dubbo's
 * notation. This section writes and reads those URLs, decides whether a provider is what a consumer
 * wants, and applies an operator's override:// rules. It is pure: any thread, no lock; names come
 * from the network and are not trusted. */

#define CRPCI_DIRECTORY (CRPC_ENABLE_ZOOKEEPER || CRPC_ENABLE_SERVERLESS) /* any registry */

#define CRPCI_NAMES_WEIGHT     100 /* of a provider whose URL has no weight= */
#define CRPCI_NAMES_WEIGHT_MAX 1000000

/* A service, as a provider offers it or a consumer wants it. A text that is NULL counts as "". */
typedef struct crpci_names_service {
    const char *service; /* "demo.UserService" */
    const char *group;
    const char *version;
    const char *application; /* the program's name: shown to operators, matched by overrides */
    const char *methods;     /* of a provider: "Login,Register" */
    const char *address;     /* of a provider: "host:port", the host numeric. ":port": the local
                              * address on the route to the registry; "0.0.0.0:port": the same, but
                              * an IPv4 address */
    int weight;
    int warmup_ms;    /* 0: none */
    bool allow_empty; /* of a consumer: an empty list, read completely, replaces a good one */
} crpci_names_service;

/* One instance that offers a service. */
typedef struct crpci_provider {
    char address[CRPC_ADDRESS_MAX]; /* canonical, with a numeric host: "[::1]:8000" */
    int weight;                     /* its share of the calls; 0: it gets none */
    int warmup_ms;                  /* after timestamp_ms, in which its share rises; 0: none */
    int64_t timestamp_ms;           /* wall clock when it registered; 0: unknown */
    uint64_t group, version, application; /* their hashes: all that overrides compare */
    bool disabled; /* by its URL (disabled=true) or an override; lists leave it out */
    bool kept;     /* protected: not listed again since the registry was away */
} crpci_provider;

/* Encoded provider names; the array and the texts are one block at `name`. */
typedef struct crpci_names {
    size_t size; /* of the block at `name` */
    size_t count;
    char **name;
} crpci_names;

CRPCI_COLD void crpci_names_free(crpci_heap *h, crpci_names *n)
{
    crpci_heap_free(h, n->name, n->size);
    n->name = NULL;
    n->count = 0;
}

/* Copies a service and its texts, which form one block; the address is not copied. False: out of
 * memory. */
CRPCI_FN bool crpci_names_copy(crpci_heap *h, crpci_names_service *to,
                               const crpci_names_service *from)
{
    const char *const text[5] = {from->service, from->group, from->version, from->application,
                                 from->methods};
    const char **const place[5] = {&to->service, &to->group, &to->version, &to->application,
                                   &to->methods};
    size_t size = 0, n, i;
    char *p;
    for (i = 0; i < 5; i++)
        size += (text[i] ? strlen(text[i]) : 0) + 1;
    p = (char *)crpci_heap_alloc(h, size);
    if (!p)
        return false;
    *to = *from;
    to->address = NULL;
    for (i = 0; i < 5; i++) {
        n = text[i] ? strlen(text[i]) : 0;
        if (n)
            memcpy(p, text[i], n);
        *place[i] = p;
        p += n + 1;
    }
    return true;
}

/* Frees the texts of a copy. A service that is all zero has none. */
CRPCI_FN void crpci_names_release(crpci_heap *h, crpci_names_service *s)
{
    if (s->service) /* the block begins with `service` and ends with `methods` */
        crpci_heap_free(h, (void *)(uintptr_t)s->service,
                        (size_t)(s->methods - s->service) + strlen(s->methods) + 1);
    memset(s, 0, sizeof *s);
}

/* --- node names: Dubbo's URLs ----------------------------------------------------------------- */

/* Output of a URL. As with snprintf, `len` counts what does not fit too. */
typedef struct crpci_names_text {
    char *out;
    size_t size;
    size_t len;
} crpci_names_text;

CRPCI_FN CRPC_PRINTF(2, 3) void crpci_names_put(crpci_names_text *t, const char *format, ...)
{
    size_t used = crpci_base_min(t->len, t->size);
    va_list args;
    int n;
    va_start(args, format);
    n = vsnprintf(t->size ? t->out + used : NULL, t->size - used, format, args);
    va_end(args);
    t->len += n > 0 ? (size_t)n : 0;
}

/* Appends `before` and the value, percent-encoding the characters that would end a value; appends
 * nothing if the value is empty. Dubbo writes values unencoded, but could not read back one that
 * has such a character. */
CRPCI_FN void crpci_names_put_value(crpci_names_text *t, const char *before, const char *value)
{
    if (!value || !*value)
        return;
    crpci_names_put(t, "%s", before);
    for (; *value; value++) {
        unsigned char c = (unsigned char)*value;
        bool odd = c <= ' ' || c == 0x7f || strchr("%&=#+?", c);
        crpci_names_put(t, odd ? "%%%02X" : "%c", c);
    }
}

/* Writes the URL of a provider, or of a consumer, whose address is a host without a port. The
 * parameters are in alphabetical order, as Dubbo writes them. Returns the length that the whole URL
 * needs. */
CRPCI_FN size_t crpci_names_url(char *out, size_t size, const crpci_names_service *s, bool consumer,
                                const char *address, int64_t timestamp_ms, long pid)
{
    const char *application = s->application && *s->application ? s->application : "crpc";
    crpci_names_text t;
    t.out = out;
    t.size = size;
    t.len = 0;
    crpci_names_put(&t, "%s://%s", consumer ? "consumer" : "crpc", address);
    crpci_names_put_value(&t, "/", s->service);
    crpci_names_put_value(&t, "?application=", application);
    crpci_names_put(&t, "%s", consumer ? "&category=consumers&check=false"
                                       : "&category=providers&dynamic=true&enabled=true");
    crpci_names_put_value(&t, "&group=", s->group);
    crpci_names_put_value(&t, "&interface=", s->service);
    crpci_names_put_value(&t, "&methods=", consumer ? NULL : s->methods);
    crpci_names_put(&t, "&pid=%ld&side=%s&timestamp=%lld", pid, consumer ? "consumer" : "provider",
                    (long long)timestamp_ms);
    crpci_names_put_value(&t, "&version=", s->version);
    if (!consumer && s->warmup_ms > 0)
        crpci_names_put(&t, "&warmup=%d", s->warmup_ms);
    if (!consumer)
        crpci_names_put(&t, "&weight=%d", s->weight < 0 ? 0 : s->weight);
    return t.len;
}

/* The contents of a provider's name. The texts point into the name, which is modified. */
typedef struct crpci_names_node {
    const char *scheme;
    crpci_provider provider;
    crpci_names_service of;
    bool enabled; /* false: enabled=false; the provider is ignored, overrides or not */
} crpci_names_node;

CRPCI_FN uint64_t crpci_names_hash(const char *text)
{
    return crpci_base_hash(text, strlen(text));
}

/* Reads a number that is not negative; -1 counts as 0. False: it is malformed, and *out is
 * unchanged. */
CRPCI_FN bool crpci_names_number(const char *value, int64_t max, int *out)
{
    int64_t number;
    if (!crpci_url_number(value, max, &number))
        return false;
    *out = number < 0 ? 0 : (int)number;
    return true;
}

/* Takes a parameter that providers and overrides have in common. Returns 1 if it is one of these, 0
 * if not, and -1 if its value is malformed, which leaves the service unchanged. */
CRPCI_FN int crpci_names_common(crpci_names_service *s, const char *key, const char *value)
{
    if (strcmp(key, "group") == 0)
        s->group = value;
    else if (strcmp(key, "version") == 0)
        s->version = value;
    else if (strcmp(key, "interface") == 0)
        s->service = value;
    else if (strcmp(key, "application") == 0)
        s->application = value;
    else if (strcmp(key, "weight") == 0)
        return crpci_names_number(value, CRPCI_NAMES_WEIGHT_MAX, &s->weight) ? 1 : -1;
    else if (strcmp(key, "warmup") == 0)
        return crpci_names_number(value, INT32_MAX, &s->warmup_ms) ? 1 : -1;
    else
        return 0;
    return 1;
}

/* A malformed value is ignored, so that a provider whose weight cannot be read still gets calls. */
CRPCI_FN void crpci_names_param(crpci_names_node *n, const char *key, const char *value)
{
    int64_t number;
    if (crpci_names_common(&n->of, key, value))
        return;
    if (strcmp(key, "enabled") == 0)
        n->enabled = n->enabled && strcmp(value, "false") != 0;
    else if (strcmp(key, "disabled") == 0)
        n->provider.disabled = n->provider.disabled || strcmp(value, "true") == 0;
    else if (strcmp(key, "timestamp") == 0 && crpci_url_number(value, INT64_MAX, &number))
        n->provider.timestamp_ms = number < 0 ? 0 : number;
}

/* Splits a URL in place. Parts that are missing become "". False: the text is not a URL. */
CRPCI_FN bool crpci_names_split(char *url, char **address, char **service, char **query)
{
    char *path, *user;
    if ((*address = strstr(url, "://")) == NULL || *address == url)
        return false;
    **address = '\0';
    *service = *query = *address;
    *address += 3;
    path = strchr(*address, '?');
    if (path) {
        *path = '\0';
        *query = path + 1;
    }
    path = strchr(*address, '/');
    if (path) {
        *path = '\0';
        *service = path + 1;
    }
    user = strrchr(*address, '@'); /* user:password, which crpc has no use for */
    if (user)
        *address = user + 1;
    return true;
}

/* Takes the next key=value of a query and decodes the value. Returns 1 for a pair, 0 at the end, -1
 * if a value is malformed. */
CRPCI_FN int crpci_names_next(char **query, char **key, char **value)
{
    while (**query) {
        char *end = strchr(*query, '&');
        *key = *query;
        *query = end ? end + 1 : *query + strlen(*query);
        if (end)
            *end = '\0';
        *value = strchr(*key, '=');
        if (!*value)
            continue;
        *(*value)++ = '\0';
        return crpci_url_decode(*value) ? 1 : -1;
    }
    return 0;
}

/* Reads a provider's URL, in place. False: malformed, or its address is not numeric. */
CRPCI_FN bool crpci_names_read(crpci_names_node *n, char *url)
{
    char *address, *service, *query, *key, *value;
    crpci_addr a;
    int more;
    memset(n, 0, sizeof *n);
    n->of.group = n->of.version = n->of.application = "";
    n->enabled = true;
    n->of.weight = CRPCI_NAMES_WEIGHT;
    if (!crpci_names_split(url, &address, &service, &query))
        return false;
    n->scheme = url;
    n->of.service = service;
    if (!crpci_sock_parse(&a, address) || !crpci_sock_port(&a))
        return false;
    crpci_sock_format(&a, n->provider.address, sizeof n->provider.address);
    while ((more = crpci_names_next(&query, &key, &value)) > 0)
        crpci_names_param(n, key, value);
    n->provider.weight = n->of.weight;
    n->provider.warmup_ms = n->of.warmup_ms;
    n->provider.group = crpci_names_hash(n->of.group);
    n->provider.version = crpci_names_hash(n->of.version);
    n->provider.application = crpci_names_hash(n->of.application);
    return more == 0;
}

/* Reads the name of a znode, in place. It is a provider's URL, percent-encoded as a whole. */
CRPCI_FN bool crpci_names_parse(crpci_names_node *n, char *name)
{
    return crpci_url_decode(name) && crpci_names_read(n, name);
}

/* Whether a consumer's group or version ("" or NULL: only "", "*": any, "a,b": either) accepts a
 * provider's. */
CRPCI_FN bool crpci_names_match(const char *want, const char *have)
{
    size_t n = strlen(have);
    want = want ? want : "";
    if (strcmp(want, "*") == 0 || strcmp(want, have) == 0)
        return true;
    while (n && want) {
        if (strncmp(want, have, n) == 0 && (want[n] == ',' || want[n] == '\0'))
            return true;
        want = strchr(want, ',');
        want = want ? want + 1 : NULL;
    }
    return false;
}

/* Whether a consumer wants a provider. Registries are shared with Dubbo, so only URLs of schemes
 * that speak baidu_std are taken. */
CRPCI_FN bool crpci_names_takes(const crpci_names_service *q, const crpci_names_node *n)
{
    if (strcmp(n->scheme, "crpc") != 0 && strcmp(n->scheme, "brpc") != 0 &&
        strcmp(n->scheme, "baidu_std") != 0)
        return false;
    return n->enabled && crpci_names_match(q->group, n->of.group) &&
           crpci_names_match(q->version, n->of.version) &&
           (!*n->of.service || !*q->service || strcmp(n->of.service, q->service) == 0);
}

/* --- overrides: rules by which an operator changes providers at run time ---------------------- */

/* One of Dubbo's override:// rules. Its texts are in the block of its crpci_names_overrides. */
typedef struct crpci_names_override {
    const char *name; /* of the znode; set only while the rules are sorted */
    char host[INET6_ADDRSTRLEN + 2]; /* canonical, IPv6 in brackets; "": any host */
    unsigned port;                   /* 0: any port */
    bool here; /* the host, given without a port, is this consumer's: hits all providers */
    crpci_names_service of; /* conditions, "": any; weight and warm-up to set, -1: unchanged */
    int64_t priority;
    int disabled; /* to set; -1: unchanged */
} crpci_names_override;

/* The rules of a directory in the order in which they are applied. Immutable, so that readers need
 * only a reference, no lock. */
typedef struct crpci_names_overrides {
    uint32_t refs;
    crpci_heap *heap;
    size_t size; /* of the block */
    size_t count;
    crpci_names_override *rules;
} crpci_names_overrides;

CRPCI_FN void crpci_names_overrides_unref(crpci_names_overrides *r)
{
    crpci_heap *h;
    if (!r || !crpci_thread_unref(&r->refs))
        return;
    h = r->heap;
    crpci_heap_free(h, r, r->size);
    crpci_heap_unref(h);
}

/* Reads a rule's host and port. Any host is written as 0.0.0.0, and a missing port means any
 * port. */
CRPCI_FN bool crpci_names_override_address(crpci_names_override *r, const char *address)
{
    const char *colon = strrchr(address, ':'), *bracket = strrchr(address, ']');
    char text[CRPC_ADDRESS_MAX];
    crpci_addr a;
    int n = snprintf(text, sizeof text, "%s%s", address,
                     !colon || (bracket && colon < bracket) ? ":0" : "");
    if (n < 0 || (size_t)n >= sizeof text || !crpci_sock_parse(&a, text) ||
        a.u.any.sa_family == AF_UNIX)
        return false;
    r->port = crpci_sock_port(&a);
    crpci_sock_format(&a, text, sizeof text);
    *strrchr(text, ':') = '\0';
    if (strcmp(text, "0.0.0.0") == 0 || strcmp(text, "[::]") == 0)
        *text = '\0';
    memcpy(r->host, text, sizeof r->host);
    r->host[sizeof r->host - 1] = '\0';
    return true;
}

/* Takes one parameter. False: crpc does not understand it. That rejects the whole rule, because
 * without an unknown condition it would hit more providers than the operator meant. */
CRPCI_FN bool crpci_names_override_param(crpci_names_override *r, bool *enabled, const char *key,
                                         const char *value)
{
    int common = crpci_names_common(&r->of, key, strcmp(value, "*") == 0 ? "" : value);
    if (common)
        return common > 0;
    if (strcmp(key, "enabled") == 0)
        *enabled = strcmp(value, "false") != 0;
    else if (strcmp(key, "disabled") == 0)
        r->disabled = strcmp(value, "true") == 0;
    else if (strcmp(key, "providerAddresses") == 0 || *key == '~')
        return !*value || strcmp(value, "*") == 0;
    else if (strcmp(key, "priority") == 0)
        return crpci_url_number(value, INT32_MAX, &r->priority);
    return true;
}

/* Reads a rule from the name of a znode, in place. Returns 1 for a rule to apply, 0 for one that
 * changes nothing here, -1 if it is not understood. `host` is this consumer's address, as a rule
 * would write it. */
CRPCI_FN int crpci_names_override_read(crpci_names_override *r, char *name, const char *host)
{
    char *address, *service, *query, *key, *value;
    bool enabled = true;
    int more;
    memset(r, 0, sizeof *r);
    r->of.group = r->of.version = r->of.application = "";
    r->of.weight = r->of.warmup_ms = r->disabled = -1;
    if (!crpci_url_decode(name) || !crpci_names_split(name, &address, &service, &query) ||
        strcmp(name, "override") != 0 || !crpci_names_override_address(r, address))
        return -1;
    r->of.service = strcmp(service, "*") == 0 ? "" : service;
    while ((more = crpci_names_next(&query, &key, &value)) > 0) {
        if (!crpci_names_override_param(r, &enabled, key, value))
            return -1;
    }
    if (more < 0)
        return -1;
    r->here = *r->host && !r->port;
    return enabled && !(r->here && strcmp(r->host, host) != 0) &&
           !(r->of.weight < 0 && r->of.warmup_ms < 0 && r->disabled < 0);
}

/* Dubbo's order: rules for any host before those for one host, then by priority, the highest last,
 * so that the most specific setting wins. */
CRPCI_FN int crpci_names_override_order(const void *a, const void *b)
{
    const crpci_names_override *p = (const crpci_names_override *)a;
    const crpci_names_override *q = (const crpci_names_override *)b;
    int c = strcmp(p->host, q->host);
    if (!c)
        c = p->priority < q->priority ? -1 : p->priority > q->priority;
    return c ? c : strcmp(p->name, q->name);
}

/* Reads the names of all rules. *bad: how many were not understood. NULL: out of memory. */
CRPCI_FN crpci_names_overrides *crpci_names_overrides_read(crpci_heap *h, char *const *names,
                                                           size_t count, const char *host,
                                                           size_t *bad)
{
    const size_t head = (sizeof(crpci_names_overrides) + 15) & ~(size_t)15;
    size_t size = head + count * sizeof(crpci_names_override), i;
    crpci_names_overrides *r;
    char *text;
    *bad = 0;
    for (i = 0; i < count; i++)
        size += names[i] ? strlen(names[i]) + 1 : 1;
    r = (crpci_names_overrides *)crpci_heap_alloc(h, size);
    if (!r)
        return NULL;
    crpci_heap_ref(h);
    r->refs = 1;
    r->heap = h;
    r->size = size;
    r->rules = (crpci_names_override *)(void *)((char *)r + head);
    text = (char *)(r->rules + count);
    for (i = 0; i < count; i++) {
        size_t n = names[i] ? strlen(names[i]) + 1 : 1;
        int kind;
        memcpy(text, names[i] ? names[i] : "", n);
        kind = crpci_names_override_read(&r->rules[r->count], text, host);
        r->rules[r->count].name = names[i];
        *bad += kind < 0;
        r->count += kind > 0;
        text += n;
    }
    if (r->count)
        qsort(r->rules, r->count, sizeof *r->rules, crpci_names_override_order);
    for (i = 0; i < r->count; i++)
        r->rules[i].name = NULL; /* borrowed from the caller, only as a tie-breaker of the sort */
    return r;
}

/* Whether a rule's conditions hold for a provider. The application may be the provider's or the
 * consumer's, as in Dubbo. */
CRPCI_FN bool crpci_names_override_fits(const crpci_names_override *r, const crpci_names_service *q,
                                        const crpci_provider *p)
{
    size_t len = strlen(r->host);
    const char *colon = strrchr(p->address, ':');
    if (len && !r->here &&
        (len != (size_t)(colon - p->address) || memcmp(r->host, p->address, len) != 0))
        return false;
    if (r->port && r->port != (unsigned)strtoul(colon + 1, NULL, 10))
        return false;
    return (!*r->of.service || strcmp(r->of.service, q->service) == 0) &&
           (!*r->of.group || crpci_names_hash(r->of.group) == p->group) &&
           (!*r->of.version || crpci_names_hash(r->of.version) == p->version) &&
           (!*r->of.application || crpci_names_hash(r->of.application) == p->application ||
            (q->application && strcmp(r->of.application, q->application) == 0));
}

/* Changes a provider by the rules, in their order. `rules` may be NULL. */
CRPCI_FN void crpci_names_overrides_apply(const crpci_names_overrides *rules,
                                          const crpci_names_service *q, crpci_provider *p)
{
    size_t i;
    for (i = 0; rules && i < rules->count; i++) {
        const crpci_names_override *r = &rules->rules[i];
        if (!crpci_names_override_fits(r, q, p))
            continue;
        p->weight = r->of.weight < 0 ? p->weight : r->of.weight;
        p->warmup_ms = r->of.warmup_ms < 0 ? p->warmup_ms : r->of.warmup_ms;
        p->disabled = r->disabled < 0 ? p->disabled : r->disabled != 0;
    }
}

/* ======================================================================== */
/* >>impl-cache   the last good lists of providers, in a file that survives crashes */
/* ======================================================================== */

/* Directories put their lists into a file, so that a program can start while its registry is away:
 *
 *     crpc-cache 1
 *     D zookeeper://10.0.0.1:2181/dubbo/demo.Echo/providers
 *     N crpc%3A%2F%2F10.0.0.2%3A8000%2Fdemo.Echo%3F...
 *     C 0123abcd
 *
 * The last line is the CRC-32 of all lines before it. A file with any error in it is ignored. It is
 * replaced as a whole, by renaming, and several programs, or loops of one program, may share it:
 * each keeps the lists of the others. In memory it is the same text without its first and last
 * line; the lines of one directory are called its part. The loop's lock guards the struct; the file
 * is read and written without it. */
#define CRPCI_CACHE_HEAD "crpc-cache 1\n"
#define CRPCI_CACHE_MAX  (1u << 20) /* largest file, in bytes */
#define CRPCI_CACHE_MS   60000      /* default time between two writes: flash wears out */

/* The cache file of one registry session. */
typedef struct crpci_cache {
    crpci_heap *heap;
    char *path;  /* NULL: no cache */
    char *found; /* the file's parts at the start; NULL: none */
    char *own;   /* parts that this program has read since, empty ones too; NULL: none */
    int64_t interval_us;
    int64_t written_us; /* the last write; 0: none by this object */
    bool dirty;         /* `own` has news that the file lacks */
    bool writing;       /* crpci_cache_save is at work without the lock */
    bool failed; /* the last write failed, which was logged */
} crpci_cache;

/* CRC-32 as in zlib. Bit by bit, because files are small and a table would take 1 KiB. */
CRPCI_FN uint32_t crpci_cache_crc(const char *data, size_t n)
{
    uint32_t crc = 0xffffffffu;
    for (; n; n--) {
        int k;
        crc ^= (unsigned char)*data++;
        for (k = 0; k < 8; k++)
            crc = crc >> 1 ^ (0xedb88320u & (0u - (crc & 1)));
    }
    return ~crc;
}

/* A cache that is all zero has nothing to free. */
CRPCI_COLD void crpci_cache_clear(crpci_cache *c)
{
    crpci_heap_strfree(c->heap, c->path);
    crpci_heap_strfree(c->heap, c->found);
    crpci_heap_strfree(c->heap, c->own);
    c->path = c->found = c->own = NULL;
}

/* The part of a directory; `name` ends with a newline or zero. NULL: it has none. */
CRPCI_FN const char *crpci_cache_find(const char *text, const char *name, size_t *len)
{
    size_t n = strcspn(name, "\n");
    while (text && *text) {
        const char *next = strstr(text, "\nD ");
        *len = next ? (size_t)(next - text) + 1 : strlen(text);
        if (strncmp(text + 2, name, n) == 0 && text[2 + n] == '\n')
            return text;
        text += *len;
    }
    return NULL;
}

/* Replaces the part of a directory, or appends it. A part without names removes the old one unless
 * `empty` is set. False: out of memory, and nothing changed. */
CRPCI_COLD bool crpci_cache_set(crpci_heap *h, char **text, const char *part, size_t len,
                                bool empty)
{
    size_t size = *text ? strlen(*text) : 0, gone = 0, at;
    const char *old = crpci_cache_find(*text, part + 2, &gone);
    char *out;
    gone = old ? gone : 0;
    at = old ? (size_t)(old - *text) : size;
    if (!empty && len == strcspn(part, "\n") + 1)
        len = 0;
    out = (char *)crpci_heap_alloc(h, size - gone + len + 1);
    if (!out)
        return false;
    if (size)
        memcpy(out, *text, at);
    memcpy(out + at, part, len);
    if (size)
        memcpy(out + at + len, *text + at + gone, size - at - gone);
    crpci_heap_strfree(h, *text);
    *text = out;
    return true;
}

/* Takes the names that a directory holds now; NULL among them, from an answer that the client could
 * not read, is left out. False: out of memory. */
CRPCI_COLD bool crpci_cache_put(crpci_cache *c, const char *name, char *const *names, size_t count)
{
    size_t size = strlen(name) + 4, n, i, len = 0;
    const char *own = crpci_cache_find(c->own, name, &len);
    const char *old = own ? own : crpci_cache_find(c->found, name, &len);
    bool ok, same;
    char *part;
    for (i = 0; i < count; i++)
        size += names[i] ? strlen(names[i]) + 3 : 0;
    part = (char *)crpci_heap_alloc(c->heap, size);
    if (!part)
        return false;
    n = (size_t)snprintf(part, size, "D %s\n", name);
    for (i = 0; i < count; i++) {
        if (names[i] && *names[i] && !strchr(names[i], '\n'))
            n += (size_t)snprintf(part + n, size - n, "N %s\n", names[i]);
    }
    same = old ? len == n && memcmp(old, part, n) == 0 : n == strlen(name) + 3;
    ok = (same && (own || !old)) || crpci_cache_set(c->heap, &c->own, part, n, true);
    c->dirty = c->dirty || (ok && !same);
    crpci_heap_free(c->heap, part, size);
    return ok;
}

/* The names that were last known of a directory. Empty: none, or out of memory. */
CRPCI_COLD void crpci_cache_get(const crpci_cache *c, const char *name, crpci_names *out)
{
    size_t count = 0, len = 0, i;
    const char *part = crpci_cache_find(c->own, name, &len);
    char *p;
    if (!part)
        part = crpci_cache_find(c->found, name, &len);
    memset(out, 0, sizeof *out);
    for (i = 0; part && i < len; i++)
        count += part[i] == '\n';
    if (count < 2)
        return;
    out->size = count * sizeof *out->name + len + 1;
    out->name = (char **)crpci_heap_alloc(c->heap, out->size);
    if (!out->name)
        return;
    p = (char *)(out->name + count);
    memcpy(p, part, len);
    while ((p = strchr(p, '\n')) != NULL) {
        *p++ = '\0';
        if (*p)
            out->name[out->count++] = p + 2;
    }
}

/* The bytes of a file, with a zero byte behind them; *size is that of the block. NULL: the file
 * cannot be read, changes while it is read, or is larger than `max`. */
CRPCI_COLD char *crpci_cache_read_file(crpci_heap *h, const char *path, size_t max, size_t *size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t n = 0;
    ssize_t got = 1;
    struct stat st;
    char *out = NULL;
    if (fd < 0)
        return NULL;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size >= 0 &&
        (uint64_t)st.st_size <= max) {
        *size = (size_t)st.st_size + 1;
        out = (char *)crpci_heap_alloc(h, *size);
    }
    while (out && n + 1 < *size && got > 0) {
        got = read(fd, out + n, *size - 1 - n);
        if (got < 0 && errno == EINTR)
            got = 1;
        else if (got > 0)
            n += (size_t)got;
    }
    close(fd);
    if (out && (got < 0 || n + 1 != *size)) { /* the file shrank meanwhile */
        crpci_heap_free(h, out, *size);
        out = NULL;
    }
    return out;
}

/* Whether a file's text is complete and consists of parts only. */
CRPCI_COLD bool crpci_cache_is_good(const char *text, size_t len)
{
    const size_t head = sizeof CRPCI_CACHE_HEAD - 1, tail = 11; /* "C 0123abcd\n" */
    const char *end, *p;
    char crc[16];
    if (len < head + tail || memcmp(text, CRPCI_CACHE_HEAD, head) != 0 || memchr(text, '\0', len))
        return false;
    end = text + len - tail;
    snprintf(crc, sizeof crc, "C %08x\n", (unsigned)crpci_cache_crc(text, len - tail));
    if (memcmp(end, crc, tail) != 0 || end[-1] != '\n')
        return false;
    for (p = text + head; p < end; p += strcspn(p, "\n") + 1) {
        if (end - p < 4 || p[1] != ' ' || p[2] == '\n' ||
            (*p != 'D' && (*p != 'N' || p == text + head)))
            return false; /* the checksum is right, but the lines are not ours */
    }
    return true;
}

/* The parts that a file holds. NULL: none, the file is damaged, or out of memory. */
CRPCI_COLD char *crpci_cache_read(crpci_heap *h, const char *path)
{
    const size_t head = sizeof CRPCI_CACHE_HEAD - 1;
    size_t size = 0;
    char *text = crpci_cache_read_file(h, path, CRPCI_CACHE_MAX, &size), *out = NULL;
    if (text && crpci_cache_is_good(text, size - 1))
        out = crpci_heap_strndup(h, text + head, size - 1 - head - 11);
    else if (text)
        crpci_heap_log(h, CRPC_LOG_WARN,
                       "registry: cache file %.200s is damaged (wrong format or checksum); it is "
                       "ignored and will be overwritten",
                       path);
    crpci_heap_free(h, text, size);
    return out;
}

/* Begins with what the file holds. False: out of memory; crpci_cache_clear is due all the same. */
CRPCI_COLD bool crpci_cache_init(crpci_cache *c, crpci_heap *h, const char *path, int interval_ms)
{
    memset(c, 0, sizeof *c);
    c->heap = h;
    c->interval_us = crpci_base_option(interval_ms, CRPCI_CACHE_MS, 0) * 1000;
    c->path = crpci_heap_strndup(h, path, strlen(path));
    c->found = crpci_cache_read(h, path);
    return c->path != NULL;
}

/* Opens the temporary file and locks it, so that one program writes at a time. -1: another one is
 * writing. The file may have been renamed between open and flock, and would then be the real file
 * by now; comparing inodes finds that. */
CRPCI_COLD int crpci_cache_lock(const char *path)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    struct stat a, b;
    if (fd < 0)
        return -1;
    if ((flock(fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) && fstat(fd, &a) == 0 &&
        stat(path, &b) == 0 && a.st_ino == b.st_ino && a.st_dev == b.st_dev)
        return fd;
    close(fd);
    errno = EWOULDBLOCK;
    return -1;
}

/* Writes a whole file under the temporary name, and renames it when it is safely on the disk: after
 * a power cut either the old file is there or the new one. */
CRPCI_COLD bool crpci_cache_replace(crpci_heap *h, int fd, const char *temp, const char *path,
                                    const char *parts)
{
    size_t n = 0, len = sizeof CRPCI_CACHE_HEAD - 1 + strlen(parts), size = len + 12;
    char *text = (char *)crpci_heap_alloc(h, size);
    bool ok = text && size - 1 <= CRPCI_CACHE_MAX && ftruncate(fd, 0) == 0;
    if (ok) {
        snprintf(text, size, "%s%s", CRPCI_CACHE_HEAD, parts);
        snprintf(text + len, 12, "C %08x\n", (unsigned)crpci_cache_crc(text, len));
    }
    while (ok && n + 1 < size) {
        ssize_t put = write(fd, text + n, size - 1 - n);
        ok = put >= 0 || errno == EINTR;
        n += put > 0 ? (size_t)put : 0;
    }
    crpci_heap_free(h, text, size);
    return ok && fsync(fd) == 0 && rename(temp, path) == 0;
}

/* Merges the program's own parts into the file. Waits for the disk, so the caller must not hold the
 * lock. False: it could not be written now. */
CRPCI_COLD bool crpci_cache_write(crpci_heap *h, const char *path, const char *own)
{
    char *temp = crpci_heap_format(h, "%s.tmp", path), *all = NULL;
    const char *mine = own;
    int fd = temp ? crpci_cache_lock(temp) : -1;
    bool ok = fd >= 0, news = false;
    size_t len, there;
    all = ok ? crpci_cache_read(h, path) : NULL;
    for (; ok && *own; own += len) {
        const char *old = crpci_cache_find(all, own + 2, &there);
        (void)crpci_cache_find(own, own + 2, &len);
        if (old ? len == there && memcmp(old, own, len) == 0 : len == strcspn(own, "\n") + 1)
            continue;
        ok = crpci_cache_set(h, &all, own, len, false);
        news = true;
    }
    if (ok && news)
        ok = crpci_cache_replace(h, fd, temp, path, all) || /* perhaps over CRPCI_CACHE_MAX? */
             crpci_cache_replace(h, fd, temp, path, mine);
    else if (fd >= 0)
        unlink(temp);
    if (fd >= 0)
        close(fd);
    crpci_heap_strfree(h, all);
    crpci_heap_strfree(h, temp);
    return ok;
}

/* When the file should be written next, on the loop's clock; INT64_MAX: there is nothing new. */
CRPCI_FN int64_t crpci_cache_due(const crpci_cache *c)
{
    if (!c->path || !c->dirty || c->writing)
        return INT64_MAX;
    return c->written_us ? c->written_us + c->interval_us : 0;
}

/* Writes the news to the file. Called locked; unlocks while it waits for the disk, and signals
 * `cond` at the end. After a failure the news stay due. */
CRPCI_COLD void crpci_cache_save(crpci_cache *c, crpc_loop *l, crpci_cond *cond)
{
    char *own = c->own ? crpci_heap_strndup(c->heap, c->own, strlen(c->own)) : NULL;
    bool ok;
    c->dirty = false;
    c->writing = true;
    crpci_loop_unlock(l);
    ok = own && crpci_cache_write(c->heap, c->path, own);
    if (!ok && !c->failed)
        crpci_heap_log(c->heap, CRPC_LOG_WARN,
                       "registry: cache file %.200s cannot be written: %s; crpc tries again later",
                       c->path, strerror(errno));
    crpci_heap_strfree(c->heap, own);
    crpci_loop_lock(l);
    c->failed = !ok;
    c->dirty = c->dirty || !ok;
    c->writing = false;
    c->written_us = crpci_loop_now(l);
    crpci_thread_broadcast(cond);
}

/* ======================================================================== */
/* >>impl-directory   the live list of a service's providers, and its subscribers */
/* ======================================================================== */

/* A backend (a file, a multicast group, ZooKeeper) finds out which providers there are and reports
 * the names that it read. A directory turns the names into lists and hands each subscriber its own:
 * filtered by service, group and version, changed by the operator's overrides, protected against a
 * registry that is away, wiped or half filled, and kept in the cache file.
 *
 * A backend uses it like this:
 *
 *     crpci_directory_init      one directory for each service, or one for a whole file or group
 *     crpci_directory_add       adds a subscriber; crpci_directory_recall then gives it the list
 *                               of the cache file
 *     crpci_directory_update    these names were read just now
 *     crpci_directory_override  these overrides were read just now; the next update applies them
 *     crpci_directory_age       marks all lists stale: the registry is away or unreadable
 *     crpci_directory_remove    removes a subscriber
 *     crpci_directory_end       removes all of them, and drops the backend's reference
 *
 * All but the first are called with the loop's lock held, on any thread. Those marked "unlocks"
 * release the lock while lists are made and callbacks run; anything may have changed when they
 * return. The directory lives as long as it has references (`refs`); a backend holds one around
 * calls that unlock. A result of false means that some subscriber did not take its list, because
 * memory is short, or its callback or another pass is running: the backend must report the same
 * again about a second later. */

#define CRPCI_DIRECTORY_RETRY_US 1000000 /* before a list that was not taken is offered again */

/* All providers of a service at one time, sorted by address, each address once. Immutable once it
 * has been handed out, so that readers need a reference but no lock. */
typedef struct crpci_snapshot {
    uint32_t refs;
    crpci_heap *heap;
    size_t size; /* of the block */
    bool stale;  /* the registry is away, or lists nothing: this is the last good list */
    size_t count;
    crpci_provider *providers;
} crpci_snapshot;

/* A list with room for `count` zeroed providers, in one block, with one reference. NULL: out of
 * memory. */
CRPCI_FN crpci_snapshot *crpci_directory_snapshot(crpci_heap *h, size_t count)
{
    const size_t head = (sizeof(crpci_snapshot) + 15) & ~(size_t)15;
    crpci_snapshot *s;
    size_t size;
    if (count > (SIZE_MAX / 2 - head) / sizeof(crpci_provider))
        return NULL;
    size = head + count * sizeof(crpci_provider);
    s = (crpci_snapshot *)crpci_heap_alloc(h, size);
    if (!s)
        return NULL;
    crpci_heap_ref(h);
    s->refs = 1;
    s->heap = h;
    s->size = size;
    s->count = count;
    s->providers = (crpci_provider *)(void *)((char *)s + head);
    return s;
}

CRPCI_FN void crpci_directory_snapshot_ref(crpci_snapshot *s)
{
    crpci_thread_ref(&s->refs);
}

/* NULL is ignored. */
CRPCI_FN void crpci_directory_snapshot_unref(crpci_snapshot *s)
{
    crpci_heap *h;
    if (!s || !crpci_thread_unref(&s->refs))
        return;
    h = s->heap;
    crpci_heap_free(h, s, s->size);
    crpci_heap_unref(h);
}

/* Whether a subscriber would see no difference. `kept` is not compared: it is the directory's own
 * mark. */
CRPCI_FN bool crpci_directory_snapshot_equal(const crpci_snapshot *a, const crpci_snapshot *b)
{
    size_t i;
    if (a->count != b->count || a->stale != b->stale)
        return false;
    for (i = 0; i < a->count; i++) {
        const crpci_provider *p = &a->providers[i], *q = &b->providers[i];
        if (strcmp(p->address, q->address) != 0 || p->weight != q->weight ||
            p->warmup_ms != q->warmup_ms || p->timestamp_ms != q->timestamp_ms)
            return false;
    }
    return true;
}

/* Sorts by address; of one address a listed entry comes before a protected one, and the newest
 * registration first. */
CRPCI_FN int crpci_directory_order(const void *a, const void *b)
{
    const crpci_provider *p = (const crpci_provider *)a, *q = (const crpci_provider *)b;
    int c = strcmp(p->address, q->address);
    c = c ? c : p->kept - q->kept;
    if (c)
        return c;
    return p->timestamp_ms < q->timestamp_ms ? 1 : p->timestamp_ms > q->timestamp_ms ? -1 : 0;
}

/* Sorts a list and removes duplicates. A provider that restarted within its session timeout has two
 * znodes; only the newer one counts. */
CRPCI_FN void crpci_directory_sort(crpci_snapshot *s)
{
    size_t i, n = 0;
    qsort(s->providers, s->count, sizeof *s->providers, crpci_directory_order);
    for (i = 0; i < s->count; i++) {
        if (!n || strcmp(s->providers[n - 1].address, s->providers[i].address) != 0)
            s->providers[n++] = s->providers[i];
    }
    s->count = n;
}

/* Makes the list of those names that a consumer wants, with the overrides applied (NULL: none).
 * *bad: how many names were malformed. NULL: out of memory. Runs without the lock. */
CRPCI_FN crpci_snapshot *crpci_directory_collect(crpci_heap *h, char *const *names, size_t count,
                                                 const crpci_names_service *want,
                                                 const crpci_names_overrides *overrides,
                                                 size_t *bad)
{
    crpci_snapshot *s = crpci_directory_snapshot(h, count);
    crpci_names_node node;
    size_t i;
    *bad = 0;
    if (s)
        s->count = 0;
    for (i = 0; s && i < count; i++) {
        const char *name = names[i] ? names[i] : "";
        size_t size = strlen(name) + 1;
        char *text = (char *)crpci_heap_alloc(h, size);
        if (!text) {
            crpci_directory_snapshot_unref(s);
            return NULL;
        }
        memcpy(text, name, size);
        if (!crpci_names_parse(&node, text)) {
            ++*bad;
        } else if (crpci_names_takes(want, &node)) {
            crpci_names_overrides_apply(overrides, want, &node.provider);
            s->providers[s->count] = node.provider;
            s->count += !node.provider.disabled;
        }
        crpci_heap_free(h, text, size);
    }
    if (s)
        crpci_directory_sort(s);
    return s;
}

/* --- callbacks -------------------------------------------------------------------------------- */

/* Gives a subscriber a new list. Called on any thread, without a lock; the list is borrowed. A
 * result other than 0 means that it was not taken; the directory offers it again later. */
typedef int (*crpci_directory_push_fn)(void *user, crpci_snapshot *list);

/* Reports that a service was registered (CRPC_OK), or that an attempt failed; attempts go on.
 * Called on any thread, without a lock. */
typedef void (*crpci_directory_status_fn)(void *user, int status, const char *text);

/* Whether a subscriber's or provider's callback is running, and on which thread. */
typedef struct crpci_directory_caller {
    bool running;
    crpci_thread thread;
} crpci_directory_caller;

/* The callback runs between this and crpci_directory_call_end, without the loop's lock. */
CRPCI_FN void crpci_directory_call_begin(crpc_loop *l, crpci_directory_caller *c)
{
    c->running = true;
    c->thread = crpci_thread_self();
    crpci_loop_unlock(l);
}

CRPCI_FN void crpci_directory_call_end(crpc_loop *l, crpci_cond *cond, crpci_directory_caller *c)
{
    crpci_loop_lock(l);
    c->running = false;
    crpci_thread_broadcast(cond);
}

/* Waits until the callback has returned. On the thread that is inside it returns at once, so that a
 * callback may remove its own subscriber. */
CRPCI_FN void crpci_directory_call_wait(crpc_loop *l, crpci_cond *cond,
                                        const crpci_directory_caller *c)
{
    while (c->running && !crpci_thread_is_self(c->thread))
        crpci_thread_wait(cond, &l->lock, -1);
}

/* --- registrations ---------------------------------------------------------------------------- */

/* A service that this process registers, or a consumer that it announces. Part of a backend's own
 * struct; guarded by the loop's lock. */
typedef struct crpci_directory_offer {
    crpci_names_service what;
    crpci_directory_status_fn status; /* NULL: none */
    void *user;
    crpci_directory_caller caller;
    int64_t timestamp_ms; /* part of the name, so constant while the service is offered */
    unsigned port;        /* 0: a consumer */
    bool auto_host;       /* the host is the local address on the route to the registry */
    bool v4;              /* ... and must be IPv4, because the listener takes no IPv6 */
    bool ended;           /* withdrawn: `status` is not called any more */
    char host[INET6_ADDRSTRLEN];    /* auto_host: as last determined; "": unknown yet */
    char address[CRPC_ADDRESS_MAX]; /* "" as long as the host is unknown */
} crpci_directory_offer;

/* Prepares a registration. Without an address it is a consumer, which has no port. CRPC_EINVAL: the
 * address is not "host:port" with a numeric host. */
CRPCI_FN int crpci_directory_offer_init(crpci_directory_offer *o, crpci_heap *h,
                                        const crpci_names_service *what,
                                        crpci_directory_status_fn status, void *user)
{
    struct timespec ts;
    crpci_addr a;
    memset(o, 0, sizeof *o);
    o->status = status;
    o->user = user;
    o->auto_host = true;
    if (what->address) {
        if (!crpci_sock_split(what->address, o->host, sizeof o->host, &o->port) || !o->port)
            return CRPC_EINVAL;
        o->v4 = strcmp(o->host, "0.0.0.0") == 0;
        o->auto_host = !*o->host || o->v4 || strcmp(o->host, "::") == 0;
        if (!o->auto_host && !crpci_sock_parse(&a, what->address))
            return CRPC_EINVAL;
        if (o->auto_host)
            o->host[0] = '\0';
        else
            crpci_sock_format(&a, o->address, sizeof o->address);
    }
    clock_gettime(CLOCK_REALTIME, &ts); /* shown to operators; crpc times nothing by it */
    o->timestamp_ms = (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
    return crpci_names_copy(h, &o->what, what) ? CRPC_OK : CRPC_ENOMEM;
}

/* Sets the host of an automatic address. True: it differs from before, so that the service has to
 * be registered anew. */
CRPCI_FN bool crpci_directory_offer_move(crpci_directory_offer *o, const char *host)
{
    if (strcmp(host, o->host) == 0)
        return false;
    snprintf(o->host, sizeof o->host, "%s", host);
    snprintf(o->address, sizeof o->address, strchr(host, ':') ? "[%s]:%u" : "%s:%u", host, o->port);
    if (!o->port)
        *strrchr(o->address, ':') = '\0';
    return true;
}

/* Calls the status callback, unless it runs already. Locked; unlocks for the callback. */
CRPCI_FN void crpci_directory_tell(crpc_loop *l, crpci_cond *cond, crpci_directory_offer *o,
                                   int status, const char *text)
{
    if (o->ended || o->caller.running || !o->status)
        return;
    crpci_directory_call_begin(l, &o->caller);
    o->status(o->user, status, text);
    crpci_directory_call_end(l, cond, &o->caller);
}

/* --- the directory ---------------------------------------------------------------------------- */

/* One list and its subscribers; part of a backend's own struct. The loop's lock guards it. */
typedef struct crpci_directory crpci_directory;
struct crpci_directory {
    crpc_loop *loop;
    char *name;      /* in log lines and the cache file: "zookeeper://10.0.0.1/dubbo/S/providers" */
    uint32_t refs;   /* of the backend, of each subscriber, and of each call that unlocks */
    void (*free)(crpci_directory *d); /* frees the block at the last reference; locked */
    crpci_cond cond;                  /* a callback has returned */
    crpci_timer timer;                /* fires at the earliest hold_until_us */
    crpci_list subscribers;
    uint32_t round; /* number of the current pass over the subscribers */
    bool busy;      /* a pass is under way */
    bool ended;
    bool names_warned;     /* a malformed name was logged */
    bool overrides_warned; /* an override that is not understood was logged */
    /* Optional; a backend sets these after crpci_directory_init: */
    int64_t hold_us;     /* how long protection lasts; 0: none */
    crpci_cache *cache;  /* NULL: none */
    char *override_name; /* name of the overrides in the cache; the directory frees it */
    crpci_names_overrides *overrides; /* as read last; NULL: none */
};

/* One consumer of a directory's list. A backend's own struct may begin with it. */
typedef struct crpci_subscriber {
    crpci_list link; /* in directory->subscribers */
    crpci_directory *directory;
    size_t size; /* of the block */
    uint32_t refs;
    uint32_t round; /* the last pass that reached it */
    crpci_names_service want;
    crpci_directory_push_fn push;
    void *user;
    crpci_directory_caller caller;
    crpci_snapshot *last;  /* the list that it took last; NULL: none yet */
    int64_t first_us;      /* before this time an empty first list is withheld */
    int64_t hold_until_us; /* end of protection; 0: `last` has no kept providers */
    bool doubted;          /* its list is stale: providers missing in the next one are kept */
    bool warned;           /* keeping the last good list was logged */
    bool ended;            /* removed: nothing is pushed any more */
} crpci_subscriber;

/* Drops a reference, the last one frees the directory. Locked. */
CRPCI_FN void crpci_directory_unref(crpci_directory *d)
{
    if (--d->refs)
        return;
    crpci_heap_strfree(d->loop->heap, d->name);
    crpci_heap_strfree(d->loop->heap, d->override_name);
    crpci_names_overrides_unref(d->overrides);
    crpci_thread_cond_free(&d->cond);
    d->free(d);
}

/* Adds a subscriber, which stands at the start of a block of `size` bytes; the rest of the block
 * is zero. NULL: out of memory. */
CRPCI_FN crpci_subscriber *crpci_directory_add(crpci_directory *d, size_t size,
                                               const crpci_names_service *want,
                                               crpci_directory_push_fn push, void *user)
{
    crpci_subscriber *s = (crpci_subscriber *)crpci_heap_alloc(d->loop->heap, size);
    if (!s || !crpci_names_copy(d->loop->heap, &s->want, want)) {
        crpci_heap_free(d->loop->heap, s, size);
        return NULL;
    }
    s->directory = d;
    s->size = size;
    s->refs = 1;
    s->round = d->round; /* a pass that is under way skips it: its report is older */
    s->push = push;
    s->user = user;
    d->refs++;
    crpci_list_append(&d->subscribers, &s->link);
    return s;
}

CRPCI_FN void crpci_directory_subscriber_unref(crpci_subscriber *s)
{
    crpci_directory *d = s->directory;
    if (--s->refs)
        return;
    crpci_directory_snapshot_unref(s->last);
    crpci_names_release(d->loop->heap, &s->want);
    crpci_heap_free(d->loop->heap, s, s->size);
    crpci_directory_unref(d);
}

/* Removes a subscriber, and waits for its callback unless this thread is inside it. Unlocks. */
CRPCI_FN void crpci_directory_remove(crpci_subscriber *s)
{
    s->ended = true;
    crpci_list_remove(&s->link);
    crpci_directory_call_wait(s->directory->loop, &s->directory->cond, &s->caller);
    crpci_directory_subscriber_unref(s);
}

/* Removes every subscriber, and drops the reference of crpci_directory_init. Unlocks. */
CRPCI_FN void crpci_directory_end(crpci_directory *d)
{
    d->ended = true;
    crpci_loop_timer_cancel(d->loop, &d->timer);
    while (!crpci_list_empty(&d->subscribers))
        crpci_directory_remove(CRPCI_CONTAINER(d->subscribers.next, crpci_subscriber, link));
    crpci_directory_unref(d);
}

/* What a backend has read, borrowed during the call. */
typedef struct crpci_directory_report {
    char *const *names;
    size_t count;
    bool whole; /* read completely and without an error: an empty list is credible */
} crpci_directory_report;

/* --- one subscriber's list -------------------------------------------------------------------- */

/* Calls a subscriber with a list, unless it would see no difference; takes over the caller's
 * reference. False: it did not take the list. Unlocks. */
CRPCI_FN bool crpci_directory_push(crpci_subscriber *s, crpci_snapshot *list)
{
    crpci_directory *d = s->directory;
    bool running = s->caller.running; /* on another thread, or further up this thread's stack */
    bool taken = !running && s->last && crpci_directory_snapshot_equal(s->last, list);
    if (!running && !taken) {
        crpci_directory_call_begin(d->loop, &s->caller);
        taken = s->push(s->user, list) == CRPC_OK;
        crpci_directory_call_end(d->loop, &d->cond, &s->caller);
    }
    if (taken) { /* where the lists are equal, the `kept` marks may differ */
        crpci_snapshot *before = s->last;
        s->last = list;
        list = before;
    }
    crpci_directory_snapshot_unref(list);
    return taken;
}

/* Protection. After an outage of the registry, providers register again one after another. If a
 * subscriber followed the first list at once, the first provider to return would get the load of
 * all. So providers that the list lacks are kept until hold_us has passed; one that a list has
 * named again is no longer protected. With `list` NULL, where none can be believed, the whole last
 * list is kept. Overrides still count: a provider that they disable is never kept. NULL: out of
 * memory. */
CRPCI_FN crpci_snapshot *crpci_directory_protect(const crpci_subscriber *s,
                                                 const crpci_snapshot *list)
{
    const crpci_directory *d = s->directory;
    bool hold = !list || (list->count && crpci_loop_now(d->loop) < s->hold_until_us);
    size_t listed = list ? list->count : 0, kept = hold && s->last ? s->last->count : 0, i;
    crpci_snapshot *out = crpci_directory_snapshot(d->loop->heap, listed + kept);
    if (!out)
        return NULL;
    if (listed)
        memcpy(out->providers, list->providers, listed * sizeof *list->providers);
    out->count = listed;
    for (i = 0; i < kept; i++) {
        crpci_provider *p = &out->providers[out->count];
        *p = s->last->providers[i];
        if (list && !s->doubted && !p->kept)
            continue;
        p->kept = p->kept || list;
        crpci_names_overrides_apply(d->overrides, &s->want, p);
        out->count += !p->disabled;
    }
    out->stale = !list && out->count;
    crpci_directory_sort(out);
    return out;
}

/* Offers a list that was read, and the providers that protection keeps; with NULL, the last list,
 * marked stale. False: the subscriber did not take it. Unlocks. */
CRPCI_FN bool crpci_directory_propose(crpci_subscriber *s, const crpci_snapshot *list)
{
    const crpci_directory *d = s->directory;
    crpci_snapshot *out;
    bool taken, doubted;
    if (!list)
        s->doubted = true;
    else if (s->doubted)
        s->hold_until_us = crpci_loop_now(d->loop) + d->hold_us;
    out = crpci_directory_protect(s, list);
    if (!out)
        return false;
    doubted = s->doubted;
    s->doubted = !list; /* before the push, which unlocks: the registry may go away meanwhile */
    taken = crpci_directory_push(s, out);
    s->doubted = s->doubted || (doubted && !taken);
    return taken;
}

/* The registry is away: marks a subscriber's list stale and tells it so, once. Unlocks. */
CRPCI_FN bool crpci_directory_doubt(crpci_subscriber *s, const crpci_directory_report *r)
{
    (void)r;
    return s->ended || !s->last || !s->last->count || crpci_directory_propose(s, NULL);
}

/* Gives a subscriber a list that was read, if it differs. An empty list replaces a good one only if
 * the program allowed that (allow_empty) and the registry was read completely (`whole`): it may
 * come from a wiped server, from a mistaken delete, or from providers that all lost their sessions
 * at once. False: the subscriber did not take it. Unlocks. */
CRPCI_FN bool crpci_directory_deliver(crpci_subscriber *s, crpci_snapshot *list, bool whole)
{
    crpci_directory *d = s->directory;
    bool refused = s->last && s->last->count && !list->count && !(s->want.allow_empty && whole);
    bool taken;
    if (s->ended || (!s->last && !list->count && crpci_loop_now(d->loop) < s->first_us))
        return true;
    taken = crpci_directory_propose(s, refused ? NULL : list);
    if (refused && !s->warned && s->last->count)
        crpci_heap_log(d->loop->heap, CRPC_LOG_WARN,
                       "registry %s: no provider of %s is listed; "
                       "the last %zu known stay in use",
                       d->name, s->want.service, s->last->count);
    s->warned = refused;
    return taken;
}

/* Makes a subscriber's list from a report and offers it. Unlocks. */
CRPCI_FN bool crpci_directory_serve(crpci_subscriber *s, const crpci_directory_report *r)
{
    crpci_directory *d = s->directory;
    crpci_names_overrides *overrides = d->overrides;
    crpci_snapshot *list;
    size_t bad = 0;
    bool taken;
    if (overrides)
        crpci_thread_ref(&overrides->refs);
    crpci_loop_unlock(d->loop);
    list = crpci_directory_collect(d->loop->heap, r->names, r->count, &s->want, overrides, &bad);
    crpci_names_overrides_unref(overrides);
    crpci_loop_lock(d->loop);
    if (bad && !d->names_warned)
        crpci_heap_log(d->loop->heap, CRPC_LOG_WARN,
                       "registry %s: %zu names are not a provider's URL with a numeric address; "
                       "they are ignored",
                       d->name, bad);
    d->names_warned = d->names_warned || bad;
    taken = list && crpci_directory_deliver(s, list, r->whole && !bad);
    crpci_directory_snapshot_unref(list);
    return taken;
}

/* Protection has ended: drops the providers that no list has named again. Unlocks. */
CRPCI_FN bool crpci_directory_release(crpci_subscriber *s, const crpci_directory_report *r)
{
    crpci_snapshot *list;
    bool taken;
    size_t i;
    (void)r;
    if (!s->hold_until_us || s->hold_until_us > crpci_loop_now(s->directory->loop))
        return true;
    taken = s->doubted || !s->last; /* away again: the registry's next list begins a new hold */
    list = taken ? NULL : crpci_directory_snapshot(s->last->heap, s->last->count);
    if (list) {
        list->count = 0;
        for (i = 0; i < s->last->count; i++) {
            list->providers[list->count] = s->last->providers[i];
            list->count += !s->last->providers[i].kept;
        }
        taken = crpci_directory_deliver(s, list, false);
    }
    crpci_directory_snapshot_unref(list);
    if (taken)
        s->hold_until_us = 0;
    return taken;
}

/* --- passes over all subscribers -------------------------------------------------------------- */

/* Sets the timer to the end of the first protection; to a second from now for one that has ended,
 * but whose subscriber did not take the list without it. */
CRPCI_FN void crpci_directory_arm(crpci_directory *d)
{
    int64_t now = crpci_loop_now(d->loop), next = INT64_MAX;
    crpci_list *i;
    for (i = d->subscribers.next; i != &d->subscribers; i = i->next) {
        const crpci_subscriber *s = CRPCI_CONTAINER(i, crpci_subscriber, link);
        if (s->hold_until_us)
            next = crpci_base_min64(next, s->hold_until_us > now ? s->hold_until_us - now
                                                                 : CRPCI_DIRECTORY_RETRY_US);
    }
    if (next != INT64_MAX && !d->ended)
        crpci_loop_timer_set(d->loop, &d->timer, next);
}

/* Calls `each` once for every subscriber. The list may change while a callback runs unlocked, so
 * each pass has a number, subscribers remember the last pass that reached them, and the walk
 * restarts from the front. False: some subscriber has to be served again, or another pass is
 * running. Unlocks. */
CRPCI_FN bool crpci_directory_run(crpci_directory *d,
                                  bool (*each)(crpci_subscriber *, const crpci_directory_report *),
                                  const crpci_directory_report *report)
{
    bool complete = true;
    crpci_list *i;
    if (d->busy)
        return false; /* on another thread: two passes would overwrite each other's marks */
    d->busy = true;
    d->refs++;
    d->round++;
    for (i = d->subscribers.next; i != &d->subscribers && !d->ended;) {
        crpci_subscriber *s = CRPCI_CONTAINER(i, crpci_subscriber, link);
        i = i->next;
        if (s->round == d->round)
            continue;
        s->round = d->round;
        s->refs++;
        complete = each(s, report) && complete;
        crpci_directory_subscriber_unref(s);
        i = d->subscribers.next;
    }
    d->busy = false;
    crpci_directory_arm(d);
    crpci_directory_unref(d);
    return complete;
}

CRPCI_FN void crpci_directory_on_timer(crpc_loop *l, crpci_timer *timer)
{
    (void)l; /* a pass that is under way arms the timer anew */
    (void)crpci_directory_run(CRPCI_CONTAINER(timer, crpci_directory, timer),
                              crpci_directory_release, NULL);
}

/* Makes a directory with one reference in a block of zeros. It takes over `name`, a heap text, or
 * NULL for "out of memory". False: out of memory; only the block is left to free. Runs without the
 * lock. */
CRPCI_FN bool crpci_directory_init(crpci_directory *d, crpc_loop *l, char *name,
                                   void (*free_fn)(crpci_directory *d))
{
    if (!name || crpci_thread_cond_init(&d->cond)) {
        crpci_heap_strfree(l->heap, name);
        return false;
    }
    d->name = name;
    d->loop = l;
    d->refs = 1;
    d->free = free_fn;
    crpci_timer_init(&d->timer, crpci_directory_on_timer);
    crpci_list_init(&d->subscribers);
    return true;
}

/* The registry is away or refuses to be read: marks all lists stale. Unlocks. */
CRPCI_FN bool crpci_directory_age(crpci_directory *d)
{
    crpci_list *i;
    /* Before the pass, which does not begin while another one runs: their next lists are protected
     * all the same. */
    for (i = d->subscribers.next; i != &d->subscribers; i = i->next) {
        crpci_subscriber *s = CRPCI_CONTAINER(i, crpci_subscriber, link);
        s->doubted = s->doubted || (s->last && s->last->count);
    }
    return crpci_directory_run(d, crpci_directory_doubt, NULL);
}

/* Puts names into the cache's next version. A list of providers is put there only if it has a
 * usable one: an empty list is useless to a program that starts. Unlocks. */
CRPCI_COLD void crpci_directory_remember(crpci_directory *d, const char *name, char *const *names,
                                         size_t count)
{
    crpci_names_service any;
    crpci_snapshot *list;
    size_t bad;
    bool usable = name != d->name;
    if (!d->cache || !name)
        return;
    memset(&any, 0, sizeof any);
    any.service = "";
    any.group = any.version = "*";
    if (!usable) {
        crpci_loop_unlock(d->loop);
        list = crpci_directory_collect(d->loop->heap, names, count, &any, NULL, &bad);
        usable = list && list->count;
        crpci_directory_snapshot_unref(list);
        crpci_loop_lock(d->loop);
    }
    if (usable)
        (void)crpci_cache_put(d->cache, name, names, count);
}

/* Serves all subscribers from names that were just read. Unlocks. */
CRPCI_FN bool crpci_directory_update(crpci_directory *d, const crpci_directory_report *report)
{
    bool complete;
    d->refs++;
    if (report->whole)
        crpci_directory_remember(d, d->name, report->names, report->count);
    complete = crpci_directory_run(d, crpci_directory_serve, report);
    crpci_directory_unref(d);
    return complete;
}

/* Replaces the overrides by those that were just read; `host` is this consumer's address as an
 * override would write it. Returns 1 if lists may change, so that the backend must read the
 * providers again, 0 if not, and -1 when out of memory. Unlocks. */
CRPCI_FN int crpci_directory_override(crpci_directory *d, char *const *names, size_t count,
                                      const char *host)
{
    crpci_names_overrides *now;
    size_t bad = 0;
    int changed = -1;
    d->refs++;
    crpci_loop_unlock(d->loop);
    now = crpci_names_overrides_read(d->loop->heap, names, count, host, &bad);
    crpci_loop_lock(d->loop);
    if (bad && !d->overrides_warned)
        crpci_heap_log(d->loop->heap, CRPC_LOG_WARN,
                       "registry %s: %zu overrides are malformed or unsupported; they are ignored",
                       d->name, bad);
    d->overrides_warned = d->overrides_warned || bad;
    if (now) {
        crpci_directory_remember(d, d->override_name, names, count);
        changed = now->count || (d->overrides && d->overrides->count);
        crpci_names_overrides_unref(d->overrides);
        d->overrides = now;
    }
    crpci_directory_unref(d);
    return changed;
}

/* Gives a new subscriber the list of the cache file, marked stale, so that a program can start
 * while its registry is away. Unlocks. */
CRPCI_COLD void crpci_directory_recall(crpci_subscriber *s)
{
    crpci_directory *d = s->directory;
    crpci_heap *h = d->loop->heap;
    crpci_names names, override_names;
    crpci_names_overrides *overrides;
    crpci_snapshot *list = NULL;
    size_t bad;
    if (!d->cache)
        return;
    crpci_cache_get(d->cache, d->name, &names);
    crpci_cache_get(d->cache, d->override_name ? d->override_name : "", &override_names);
    s->refs++;
    crpci_loop_unlock(d->loop);
    overrides = crpci_names_overrides_read(h, override_names.name, override_names.count, "", &bad);
    if (overrides)
        list = crpci_directory_collect(h, names.name, names.count, &s->want, overrides, &bad);
    crpci_names_overrides_unref(overrides);
    crpci_names_free(h, &names);
    crpci_names_free(h, &override_names);
    crpci_loop_lock(d->loop);
    if (list && list->count && !s->last && !s->ended) {
        list->stale = true;
        (void)crpci_directory_push(s, list);
    } else {
        crpci_directory_snapshot_unref(list);
    }
    crpci_directory_subscriber_unref(s);
}

/* --- backends --------------------------------------------------------------------------------- */

/* Options of an open registry; zero means the default. */
typedef struct crpci_directory_options {
    int session_timeout_ms;
    const char *credential;  /* NULL: none */
    const char *application; /* the program's name, for operators and overrides. NULL: "crpc" */
    bool register_consumer;  /* registers subscriptions too, so that operators see them */
    const char *cache;       /* file for the last good lists; NULL: none */
    int cache_interval_ms;   /* between two writes of it. 0: 60000. -1: none */
    int spread_ms;           /* random delay of a reconnect, for fleets. 0: 2000. -1: none */
    const char *interface;   /* multicast: name or IPv4 address. NULL: by the routing table */
} crpci_directory_options;

typedef struct crpci_backend crpci_backend;

/* The functions of a backend. None waits for the network. All are called without the loop's lock,
 * on any thread, and inside callbacks too. `withdraw` and `unsubscribe` wait for a callback that is
 * running, unless this thread is inside it; afterwards it is not called any more. `close` ends all
 * registrations and subscriptions that were made through the handle. */
typedef struct crpci_backend_ops {
    /* Both NULL: the backend has no registrations. */
    int (*enroll)(crpci_backend *b, const crpci_names_service *what,
                  crpci_directory_status_fn status, void *user, void **handle);
    void (*withdraw)(crpci_backend *b, void *handle);
    int (*subscribe)(crpci_backend *b, const crpci_names_service *want,
                     crpci_directory_push_fn push, void *user, crpci_subscriber **out);
    void (*unsubscribe)(crpci_backend *b, crpci_subscriber *s);
    void (*close)(crpci_backend *b);
} crpci_backend_ops;

/* An open registry; a backend's own struct begins with this. */
struct crpci_backend {
    const crpci_backend_ops *ops;
    crpc_loop *loop;
};

/* Registers a service, and keeps it registered until it is withdrawn. */
CRPCI_FN int crpci_directory_enroll(crpci_backend *b, const crpci_names_service *what,
                                    crpci_directory_status_fn status, void *user, void **handle)
{
    *handle = NULL;
    if (!b->ops->enroll)
        return CRPC_EUNSUPPORTED;
    if (!what->service || !*what->service || !what->address)
        return CRPC_EINVAL;
    return b->ops->enroll(b, what, status, user, handle);
}

/* NULL is ignored. */
CRPCI_FN void crpci_directory_withdraw(crpci_backend *b, void *handle)
{
    if (handle)
        b->ops->withdraw(b, handle);
}

CRPCI_FN int crpci_directory_subscribe(crpci_backend *b, const crpci_names_service *want,
                                       crpci_directory_push_fn push, void *user,
                                       crpci_subscriber **out)
{
    *out = NULL;
    return b->ops->subscribe(b, want, push, user, out);
}

/* NULL is ignored. */
CRPCI_FN void crpci_directory_unsubscribe(crpci_backend *b, crpci_subscriber *s)
{
    if (s)
        b->ops->unsubscribe(b, s);
}

/* NULL is ignored. */
CRPCI_FN void crpci_directory_close(crpci_backend *b)
{
    if (b)
        b->ops->close(b);
}

/* The `unsubscribe` of backends that keep nothing else for a subscriber. */
CRPCI_FN void crpci_directory_leave(crpci_backend *b, crpci_subscriber *s)
{
    crpci_loop_lock(b->loop);
    crpci_directory_remove(s);
    crpci_loop_unlock(b->loop);
}

/* ======================================================================== */
/* >>impl-file   providers listed in a file: file://                        */
/* ======================================================================== */

#if CRPC_ENABLE_SERVERLESS

/* A line for each provider:
 *
 *     host:port [weight=N] [warmup_ms=N] [group=G] [version=V] [service=S]     # comment
 *
 * Hosts are numeric, because resolving names would block the loop. The loop checks the file once a
 * second for a change; crpc never writes it. */
#define CRPCI_FILE_PERIOD_US 1000000
#define CRPCI_FILE_MAX       (1u << 20) /* largest file, in bytes */

/* A file://; its directory serves all services in the file. The loop's lock guards it. */
typedef struct crpci_file {
    crpci_backend base;
    crpci_directory directory; /* its last reference frees this struct */
    crpci_timer timer;
    const char *path; /* points into the directory's name */
    struct stat seen; /* of the last read; zeros: read it in any case */
    bool again;       /* read once more: a change within the same tick of mtime is invisible */
    size_t bad;       /* number of malformed lines that was logged, and the first of them */
    size_t bad_line;
} crpci_file;

/* The result of reading a file. */
typedef struct crpci_file_text {
    crpci_names names;
    size_t bad;      /* malformed lines */
    size_t bad_line; /* number of the first one */
} crpci_file_text;

/* Translates one line, in place, into a provider's URL. False: malformed, or an unknown key. */
CRPCI_FN bool crpci_file_line(char *line, char *out, size_t size)
{
    static const char blank[] = " \t\r";
    static const struct {
        const char *word, *parameter;
        int max; /* of a number; 0: a text */
    } known[] = {{"service=", "&interface=", 0},
                 {"group=", "&group=", 0},
                 {"version=", "&version=", 0},
                 {"weight=", "&weight=", CRPCI_NAMES_WEIGHT_MAX},
                 {"warmup_ms=", "&warmup=", INT32_MAX}};
    char *save = NULL, *word = strtok_r(line, blank, &save);
    crpci_names_text t;
    crpci_addr a;
    size_t i;
    int n;
    if (!crpci_sock_parse(&a, word) || !crpci_sock_port(&a))
        return false;
    t.out = out;
    t.size = size;
    t.len = 0;
    crpci_names_put(&t, "crpc://%s/?side=provider", word);
    while ((word = strtok_r(NULL, blank, &save)) != NULL) {
        for (i = 0; i < sizeof known / sizeof *known; i++) {
            const char *value = word + strlen(known[i].word);
            if (strncmp(word, known[i].word, strlen(known[i].word)) != 0)
                continue;
            if (known[i].max && !crpci_names_number(value, known[i].max, &n))
                return false;
            crpci_names_put_value(&t, known[i].parameter, value);
            break;
        }
        if (i == sizeof known / sizeof *known)
            return false;
    }
    return t.len < size;
}

/* Parses a text, in place. Malformed lines are counted and skipped. False: out of memory. */
CRPCI_FN bool crpci_file_parse(crpci_heap *h, char *text, crpci_file_text *out)
{
    size_t lines = 1, len = strlen(text), number = 0, used = 0;
    crpci_names *names = &out->names;
    char *p, *next, *pool, url[1024];
    memset(out, 0, sizeof *out);
    for (p = text; *p; p++)
        lines += *p == '\n';
    /* A line grows by a URL's fixed parts, and each of its bytes may be encoded twice, as 3 x 3. */
    names->size = lines * (sizeof *names->name + 256) + 9 * len;
    names->name = (char **)crpci_heap_alloc(h, names->size);
    if (!names->name)
        return false;
    pool = (char *)(names->name + lines);
    for (p = text; p; p = next) {
        next = strchr(p, '\n');
        if (next)
            *next++ = '\0';
        number++;
        p[strcspn(p, "#")] = '\0';
        if (!p[strspn(p, " \t\r")])
            continue;
        if (!crpci_file_line(p, url, sizeof url)) {
            out->bad_line = out->bad++ ? out->bad_line : number;
            continue;
        }
        names->name[names->count++] = pool + used;
        used += crpci_url_encode(pool + used, lines * 256 + 9 * len - used, url) + 1;
    }
    return true;
}

/* Reads the file. CRPC_OK: read; a missing file counts as empty. CRPC_ESYSTEM: it cannot be read.
 * Also CRPC_ENOMEM. Runs without the lock. */
CRPCI_FN int crpci_file_read(const crpci_file *f, crpci_file_text *out)
{
    crpci_heap *h = f->base.loop->heap;
    size_t size = 0;
    char *text;
    bool ok;
    memset(out, 0, sizeof *out);
    errno = 0;
    text = crpci_cache_read_file(h, f->path, CRPCI_FILE_MAX, &size);
    if (!text)
        return errno == ENOENT ? CRPC_OK : CRPC_ESYSTEM;
    ok = crpci_file_parse(h, text, out);
    crpci_heap_free(h, text, size);
    return ok ? CRPC_OK : CRPC_ENOMEM;
}

/* Whether two stats are those of the same, unchanged file. Renaming a new file over the old one
 * changes the inode. */
CRPCI_FN bool crpci_file_same(const struct stat *a, const struct stat *b)
{
    return a->st_ino == b->st_ino && a->st_dev == b->st_dev && a->st_size == b->st_size &&
           a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

/* Reads the file if it has changed. Locked, unlocks meanwhile. */
CRPCI_FN void crpci_file_examine(crpci_file *f)
{
    crpci_directory *d = &f->directory;
    crpci_directory_report report;
    crpci_file_text text;
    struct stat st;
    bool same;
    int err;
    crpci_loop_unlock(d->loop);
    if (stat(f->path, &st)) {
        memset(&st, 0, sizeof st);
        st.st_size = -1; /* missing, in contrast to never examined */
    }
    crpci_loop_lock(d->loop);
    same = crpci_file_same(&st, &f->seen);
    if ((same && !f->again) || d->ended)
        return;
    f->again = !same;
    f->seen = st;
    crpci_loop_unlock(d->loop);
    err = crpci_file_read(f, &text);
    crpci_loop_lock(d->loop);
    if (text.bad && (text.bad != f->bad || text.bad_line != f->bad_line))
        crpci_heap_log(d->loop->heap, CRPC_LOG_WARN,
                       "registry %.200s: %zu lines are not \"host:port key=value ...\" with a "
                       "numeric host and known keys, the first of them line %zu; they are ignored",
                       d->name, text.bad, text.bad_line);
    f->bad = text.bad;
    f->bad_line = text.bad_line;
    if (err == CRPC_ESYSTEM)
        (void)crpci_directory_age(d);
    report.names = text.names.name;
    report.count = text.names.count;
    report.whole = !text.bad;
    if (err || !crpci_directory_update(d, &report))
        memset(&f->seen, 0, sizeof f->seen);
    crpci_names_free(d->loop->heap, &text.names);
}

/* Checks the file once a second while there are subscribers. */
CRPCI_FN void crpci_file_on_timer(crpc_loop *l, crpci_timer *timer)
{
    crpci_file *f = CRPCI_CONTAINER(timer, crpci_file, timer);
    f->directory.refs++;
    crpci_file_examine(f);
    if (!f->directory.ended && !crpci_list_empty(&f->directory.subscribers))
        crpci_loop_timer_set(l, &f->timer, CRPCI_FILE_PERIOD_US);
    crpci_directory_unref(&f->directory);
}

/* Reads the file on the caller's thread, so that the subscriber has a list when this returns. */
CRPCI_FN int crpci_file_subscribe(crpci_backend *b, const crpci_names_service *want,
                                  crpci_directory_push_fn push, void *user, crpci_subscriber **out)
{
    crpci_file *f = (crpci_file *)(void *)b;
    crpci_subscriber *s;
    crpci_loop_lock(b->loop);
    s = crpci_directory_add(&f->directory, sizeof *s, want, push, user);
    if (s) {
        *out = s;
        memset(&f->seen, 0, sizeof f->seen); /* read it, changed or not */
        crpci_file_on_timer(b->loop, &f->timer);
    }
    crpci_loop_unlock(b->loop);
    return s ? CRPC_OK : CRPC_ENOMEM;
}

/* The directory's `free`: no reference is left. */
CRPCI_FN void crpci_file_free(crpci_directory *d)
{
    crpci_heap_free(d->loop->heap, CRPCI_CONTAINER(d, crpci_file, directory), sizeof(crpci_file));
}

/* Ends the timer and the subscribers, and releases the loop. */
CRPCI_FN void crpci_file_close(crpci_backend *b)
{
    crpci_file *f = (crpci_file *)(void *)b;
    crpc_loop *l = b->loop;
    crpci_loop_lock(l);
    crpci_loop_timer_cancel(l, &f->timer);
    crpci_directory_end(&f->directory);
    crpci_loop_unlock(l);
    crpci_loop_release(l);
}

static const crpci_backend_ops crpci_file_ops = {NULL, NULL, crpci_file_subscribe,
                                                 crpci_directory_leave, crpci_file_close};

/* Opens file:///path. The file need not exist yet. */
CRPCI_COLD int crpci_file_open(crpc_loop *l, const crpci_url *url,
                               const crpci_directory_options *options, crpci_backend **out,
                               crpc_error *error)
{
    crpci_file *f;
    (void)options;
    if (*url->authority || !*url->path)
        return crpci_status_set(error, CRPC_EINVAL,
                                "file://%.60s/%.60s: expected file:///path/of/the/list",
                                url->authority, url->path);
    f = (crpci_file *)crpci_heap_alloc(l->heap, sizeof *f);
    if (!f ||
        !crpci_directory_init(&f->directory, l, crpci_heap_format(l->heap, "file:///%s", url->path),
                              crpci_file_free)) {
        crpci_heap_free(l->heap, f, sizeof *f);
        return crpci_status_set(error, CRPC_ENOMEM, "file:///%.100s: out of memory", url->path);
    }
    f->path = f->directory.name + strlen("file://");
    f->base.ops = &crpci_file_ops;
    f->base.loop = l;
    crpci_timer_init(&f->timer, crpci_file_on_timer);
    crpci_loop_hold(l);
    *out = &f->base;
    return CRPC_OK;
}

#endif /* CRPC_ENABLE_SERVERLESS */

/* ======================================================================== */
/* >>impl-multicast   serverless registry over UDP multicast: multicast://  */
/* ======================================================================== */

#if CRPC_ENABLE_SERVERLESS

/* Datagrams of one line, as Dubbo's multicast registry sends them:
 *
 *     register crpc://10.0.0.1:8000/demo.Echo?...&ttl=15000     announces a provider: at its start,
 *                                                               at every interval, and in answer
 *                                                               to a subscribe
 *     unregister crpc://...                                     the provider is about to stop
 *     subscribe consumer://10.0.0.9/demo.Echo?...               asks for announcements
 *
 * A provider that was not heard for its ttl (in milliseconds) is dropped. Peers are not trusted:
 * malformed datagrams are counted and dropped, providers without a subscriber here are not kept,
 * and the number of kept ones is limited. Everything happens on the loop and under its lock,
 * because sending and receiving a datagram does not block; while nobody drives the loop, nothing is
 * announced. */
#define CRPCI_MULTICAST_INTERVAL_MS 5000
#define CRPCI_MULTICAST_TTL         3u /* intervals */
#define CRPCI_MULTICAST_TTL_MIN_MS  1000 /* a peer's ttl is clamped to this range */
#define CRPCI_MULTICAST_TTL_MAX_MS  600000
#define CRPCI_MULTICAST_SIZE        1400u   /* bytes of a datagram */
#define CRPCI_MULTICAST_MAX         1024u   /* kept providers, of all services together */
#define CRPCI_MULTICAST_BATCH       16u     /* datagrams read in one step */
#define CRPCI_MULTICAST_ANSWER_US   100000  /* answers to a subscribe are spread over this */
#define CRPCI_MULTICAST_QUIET_US    500000  /* least time between two announcements of a service */
#define CRPCI_MULTICAST_GATHER_US   10000   /* changes within this time are reported together */
#define CRPCI_MULTICAST_FIRST_US    1000000 /* without an answer until then the list is empty */
#define CRPCI_MULTICAST_TICK_US     1000000
#define CRPCI_MULTICAST_GRACE_US    2000000 /* time for answers after the loop did not run */

/* A provider that was heard. One block, with the name behind the struct. */
typedef struct crpci_multicast_peer {
    crpci_list link;
    size_t size; /* of the block */
    char *name;  /* its URL, percent-encoded as the name of a znode is */
    uint64_t url, service; /* hashes of the URL and of the service */
    crpci_provider is;
    int64_t expires_us;
} crpci_multicast_peer;

/* One multicast:// group. The loop's lock guards it. */
typedef struct crpci_multicast {
    crpci_backend base;
    crpci_directory directory; /* of all services; its last reference frees this struct */
    crpci_timer timer;
    int fd;
    crpci_watch watch;
    crpci_addr group;
    struct ip_mreqn which; /* the interface to send and receive on */
    crpci_list peers;
    size_t peer_count;
    crpci_list regs; /* services that this process offers */
    int64_t serve_us; /* when to report changes to the directory; 0: there are none */
    int64_t tick_us;  /* when the timer ran last */
    uint32_t ignored; /* malformed datagrams, and providers above the limit */
    bool failed;      /* the last send failed, which was logged */
    char datagram[CRPCI_MULTICAST_SIZE + 1]; /* the one just received */
    char scratch[CRPCI_MULTICAST_SIZE + 1];  /* a copy to parse in place, or a text to send */
} crpci_multicast;

/* A service that this process offers. Its references are the handle's, and one around its
 * callback. */
typedef struct crpci_multicast_reg {
    crpci_list link;
    crpci_multicast *owner;
    uint32_t refs;
    crpci_directory_offer offer;
    int64_t due_us;  /* of the next announcement */
    int64_t sent_us; /* of the last one */
    int told;        /* the status last reported to the program; -1: none */
} crpci_multicast_reg;

/* A subscriber, and the subscribes that it still has to send. */
typedef struct crpci_multicast_sub {
    crpci_subscriber base;
    int64_t question_us; /* when to send the next subscribe */
    unsigned questions;  /* how many are left to send: a datagram can be lost */
} crpci_multicast_sub;

/* --- the socket ------------------------------------------------------------------------------- */

/* Reads the option `interface`: an IPv4 address, a name, or NULL for the routing table's choice.
 * False: no such interface. */
CRPCI_COLD bool crpci_multicast_interface(const char *interface, struct ip_mreqn *out)
{
    memset(out, 0, sizeof *out);
    if (!interface || !*interface || inet_pton(AF_INET, interface, &out->imr_address) == 1)
        return true;
    out->imr_ifindex = (int)if_nametoindex(interface);
    return out->imr_ifindex != 0;
}

/* A socket that has joined the group. On failure returns -1 and errno, with the name of the failed
 * call in *call. Datagrams stay within the local network (TTL 1). */
CRPCI_COLD int crpci_multicast_socket(const crpci_addr *group, struct ip_mreqn *which,
                                      const char **call)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), saved;
    *call = "socket";
    if (fd < 0)
        return -1;
    which->imr_multiaddr = group->u.in4.sin_addr;
    crpci_sock_set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    crpci_sock_set(fd, IPPROTO_IP, IP_MULTICAST_LOOP, 1);
    crpci_sock_set(fd, IPPROTO_IP, IP_MULTICAST_TTL, 1);
    *call = "bind";
    if (bind(fd, &group->u.any, group->len) == 0) {
        *call = CRPCI_STATUS_TEXT("joining the group");
        if (crpci_sock_leave_by(fd, which) &&
            setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, which, sizeof *which) == 0)
            return fd;
    }
    saved = errno;
    close(fd);
    errno = saved;
    return -1;
}

/* Sends a text to the group. A failure is logged once until a send succeeds again. Locked. */
CRPCI_FN bool crpci_multicast_send(crpci_multicast *r, const char *text)
{
    size_t n = strlen(text);
    bool ok = sendto(r->fd, text, n, MSG_NOSIGNAL, &r->group.u.any, r->group.len) == (ssize_t)n;
    if (!ok && !r->failed)
        crpci_heap_log(r->base.loop->heap, CRPC_LOG_WARN,
                       "registry %s: sendto: %s; crpc tries again at every announcement",
                       r->directory.name, strerror(errno));
    r->failed = !ok;
    return ok;
}

/* --- receiving -------------------------------------------------------------------------------- */

/* The kept providers have changed: schedules a report to the directory. */
CRPCI_FN void crpci_multicast_changed(crpci_multicast *r)
{
    if (!r->serve_us)
        r->serve_us = crpci_loop_now(r->base.loop) + CRPCI_MULTICAST_GATHER_US;
}

/* Frees a kept provider. The caller reports the change. */
CRPCI_FN void crpci_multicast_forget(crpci_multicast *r, crpci_multicast_peer *p)
{
    crpci_list_remove(&p->link);
    r->peer_count--;
    crpci_heap_free(r->base.loop->heap, p, p->size);
}

/* The kept entry of the same provider, possibly of an earlier run of it. */
CRPCI_FN crpci_multicast_peer *crpci_multicast_find(const crpci_multicast *r,
                                                    const crpci_names_node *n)
{
    uint64_t service = crpci_names_hash(n->of.service);
    crpci_list *i;
    for (i = r->peers.next; i != &r->peers; i = i->next) {
        crpci_multicast_peer *p = CRPCI_CONTAINER(i, crpci_multicast_peer, link);
        if (p->service == service && p->is.group == n->provider.group &&
            p->is.version == n->provider.version && strcmp(p->is.address, n->provider.address) == 0)
            return p;
    }
    return NULL;
}

/* Whether any subscriber wants this provider; others are not kept, to bound memory. */
CRPCI_FN bool crpci_multicast_wanted(const crpci_multicast *r, const crpci_names_node *n)
{
    crpci_list *i;
    for (i = r->directory.subscribers.next; i != &r->directory.subscribers; i = i->next) {
        if (crpci_names_takes(&CRPCI_CONTAINER(i, crpci_subscriber, link)->want, n))
            return true;
    }
    return false;
}

/* How long a URL is valid, in microseconds; clamped, because peers are not trusted. */
CRPCI_FN int64_t crpci_multicast_ttl(const char *url)
{
    const char *at = strstr(url, "&ttl=");
    char *end;
    long ms = at ? strtol(at + 5, &end, 10) : 0;
    if (ms <= 0)
        ms = (long)CRPCI_MULTICAST_INTERVAL_MS * (long)CRPCI_MULTICAST_TTL;
    ms = ms < CRPCI_MULTICAST_TTL_MIN_MS ? CRPCI_MULTICAST_TTL_MIN_MS : ms;
    ms = ms > CRPCI_MULTICAST_TTL_MAX_MS ? CRPCI_MULTICAST_TTL_MAX_MS : ms;
    return (int64_t)ms * 1000;
}

/* Whether an address can be connected to: neither a multicast nor an unspecified one. */
CRPCI_FN bool crpci_multicast_is_host(const char *address)
{
    crpci_addr a;
    if (!crpci_sock_parse(&a, address))
        return false;
    if (a.u.any.sa_family == AF_INET6)
        return !IN6_IS_ADDR_MULTICAST(&a.u.in6.sin6_addr) &&
               !IN6_IS_ADDR_UNSPECIFIED(&a.u.in6.sin6_addr);
    return ntohl(a.u.in4.sin_addr.s_addr) >> 28 < 14 && a.u.in4.sin_addr.s_addr != 0;
}

/* Stores a provider, and removes its earlier entry `old`, if there is one. */
CRPCI_FN void crpci_multicast_keep(crpci_multicast *r, const char *url, const crpci_names_node *n,
                                   crpci_multicast_peer *old)
{
    size_t len = crpci_url_encode(NULL, 0, url) + 1, size = sizeof(crpci_multicast_peer) + len;
    crpci_multicast_peer *p = (crpci_multicast_peer *)crpci_heap_alloc(r->base.loop->heap, size);
    if (!p)
        return; /* the provider will announce itself again */
    p->size = size;
    p->name = (char *)(p + 1);
    crpci_url_encode(p->name, len, url);
    p->url = crpci_names_hash(url);
    p->service = crpci_names_hash(n->of.service);
    p->is = n->provider;
    p->expires_us = crpci_loop_now(r->base.loop) + crpci_multicast_ttl(url);
    if (old)
        crpci_multicast_forget(r, old);
    crpci_list_append(&r->peers, &p->link);
    r->peer_count++;
    crpci_multicast_changed(r);
}

/* A provider announces itself, or is about to stop (`going`). False: malformed, or over the limit
 * of kept providers. */
CRPCI_FN bool crpci_multicast_heard(crpci_multicast *r, const char *url, bool going)
{
    crpci_names_node n;
    crpci_multicast_peer *old;
    memcpy(r->scratch, url, strlen(url) + 1);
    if (!crpci_names_read(&n, r->scratch) || !*n.of.service ||
        !crpci_multicast_is_host(n.provider.address))
        return false;
    old = crpci_multicast_find(r, &n);
    if (old && old->is.timestamp_ms > n.provider.timestamp_ms)
        return true; /* delayed in the network: the provider has been restarted since */
    if (going) {
        if (old) {
            crpci_multicast_forget(r, old);
            crpci_multicast_changed(r);
        }
        return true;
    }
    if (old && old->url == crpci_names_hash(url))
        old->expires_us = crpci_loop_now(r->base.loop) + crpci_multicast_ttl(url);
    else if (crpci_multicast_wanted(r, &n)) {
        if (!old && r->peer_count >= CRPCI_MULTICAST_MAX)
            return false;
        crpci_multicast_keep(r, url, &n, old);
    }
    return true;
}

/* A consumer asks for a service: our providers of it announce themselves soon. The answers are
 * spread at random, and a provider answers at most twice a second, so that questions cannot be
 * amplified into a flood. */
CRPCI_FN bool crpci_multicast_asked(crpci_multicast *r, const char *url)
{
    char *address, *service, *query;
    int64_t now = crpci_loop_now(r->base.loop);
    crpci_list *i;
    memcpy(r->scratch, url, strlen(url) + 1);
    if (!crpci_names_split(r->scratch, &address, &service, &query) || !*service)
        return false;
    for (i = r->regs.next; i != &r->regs; i = i->next) {
        crpci_multicast_reg *reg = CRPCI_CONTAINER(i, crpci_multicast_reg, link);
        int64_t at = now + (int64_t)(crpci_loop_random(r->base.loop) % CRPCI_MULTICAST_ANSWER_US);
        if (strcmp(service, "*") != 0 && strcmp(service, reg->offer.what.service) != 0)
            continue;
        if (at < reg->sent_us + CRPCI_MULTICAST_QUIET_US)
            at = reg->sent_us + CRPCI_MULTICAST_QUIET_US;
        reg->due_us = crpci_base_min64(reg->due_us, at);
    }
    return true;
}

/* Handles one datagram. `size` is its original size; larger ones arrive cut off. False:
 * malformed. */
CRPCI_FN bool crpci_multicast_take(crpci_multicast *r, char *text, size_t size)
{
    if (size > CRPCI_MULTICAST_SIZE || memchr(text, '\0', size))
        return false;
    while (size && (text[size - 1] == '\n' || text[size - 1] == '\r' || text[size - 1] == ' '))
        size--;
    text[size] = '\0';
    if (strncmp(text, "register ", 9) == 0)
        return crpci_multicast_heard(r, text + 9, false);
    if (strncmp(text, "unregister ", 11) == 0)
        return crpci_multicast_heard(r, text + 11, true);
    if (strncmp(text, "subscribe ", 10) == 0)
        return crpci_multicast_asked(r, text + 10);
    return false;
}

/* --- sending ---------------------------------------------------------------------------------- */

/* Writes "VERB URL" into the scratch buffer; without the methods if it would be too long. False:
 * too long even so. */
CRPCI_FN bool crpci_multicast_write(const crpci_multicast_reg *reg, const char *verb)
{
    crpci_multicast *r = reg->owner;
    crpci_names_service what = reg->offer.what;
    const size_t size = sizeof r->scratch;
    size_t head = (size_t)snprintf(r->scratch, size, "%s ", verb), n;
    int round;
    for (round = 0; round < 2; round++) {
        n = head + crpci_names_url(r->scratch + head, size - head, &what, false, reg->offer.address,
                                   reg->offer.timestamp_ms, (long)getpid());
        if (n < size)
            n += (size_t)snprintf(r->scratch + n, size - n, "&ttl=%u",
                                  CRPCI_MULTICAST_INTERVAL_MS * CRPCI_MULTICAST_TTL);
        if (n < size)
            return true;
        what.methods = "";
    }
    return false;
}

/* Drops a reference; the last one frees the registration. Locked. */
CRPCI_FN void crpci_multicast_reg_unref(crpci_multicast_reg *reg)
{
    crpci_heap *h = reg->owner->base.loop->heap;
    if (--reg->refs)
        return;
    crpci_names_release(h, &reg->offer.what);
    crpci_heap_free(h, reg, sizeof *reg);
}

/* Announces a service and schedules the next announcement. Tells the program when the outcome
 * differs from the last one. Unlocks. */
CRPCI_FN void crpci_multicast_announce(crpci_multicast_reg *reg)
{
    crpci_multicast *r = reg->owner;
    const uint32_t interval = CRPCI_MULTICAST_INTERVAL_MS * 1000, part = interval / 4;
    char host[INET6_ADDRSTRLEN];
    bool ok = true;
    int status;
    reg->sent_us = crpci_loop_now(r->base.loop);
    reg->due_us = reg->sent_us + interval - part / 2 +
                  (int64_t)(crpci_loop_random(r->base.loop) % (part + 1));
    if (reg->offer.auto_host) {
        ok = crpci_sock_route(&r->group, &r->which, host, sizeof host);
        if (ok)
            (void)crpci_directory_offer_move(&reg->offer, host);
    }
    ok = ok && crpci_multicast_write(reg, "register") && crpci_multicast_send(r, r->scratch);
    status = ok ? CRPC_OK : CRPC_EREGISTRY;
    if (reg->told == status)
        return;
    reg->told = status;
    reg->refs++;
    crpci_directory_tell(r->base.loop, &r->directory.cond, &reg->offer, status,
                         ok ? "announced"
                            : CRPCI_STATUS_TEXT("no datagram can be sent to the group; tried again "
                                                "at every announcement"));
    crpci_multicast_reg_unref(reg);
}

/* Asks providers of a service to announce themselves. */
CRPCI_FN void crpci_multicast_ask(crpci_multicast *r, const crpci_names_service *want)
{
    static const char head[] = "subscribe ";
    const size_t at = sizeof head - 1, room = sizeof r->scratch - at;
    char host[INET6_ADDRSTRLEN];
    if (!crpci_sock_route(&r->group, &r->which, host, sizeof host))
        snprintf(host, sizeof host, "0.0.0.0");
    memcpy(r->scratch, head, sizeof head);
    if (crpci_names_url(r->scratch + at, room, want, true, host, 0, (long)getpid()) < room)
        (void)crpci_multicast_send(r, r->scratch);
}

/* --- the timer -------------------------------------------------------------------------------- */

/* Sets the timer to the next thing that is due, a tick from now at the latest. */
CRPCI_FN void crpci_multicast_arm(crpci_multicast *r)
{
    int64_t now = crpci_loop_now(r->base.loop), next = now + CRPCI_MULTICAST_TICK_US;
    crpci_list *i;
    if (r->directory.ended)
        return;
    if (r->serve_us)
        next = crpci_base_min64(next, r->serve_us);
    for (i = r->regs.next; i != &r->regs; i = i->next)
        next = crpci_base_min64(next, CRPCI_CONTAINER(i, crpci_multicast_reg, link)->due_us);
    for (i = r->directory.subscribers.next; i != &r->directory.subscribers; i = i->next) {
        crpci_multicast_sub *s = CRPCI_CONTAINER(i, crpci_multicast_sub, base.link);
        if (s->questions)
            next = crpci_base_min64(next, s->question_us);
        if (!s->base.last && !r->serve_us)
            next = crpci_base_min64(next, s->base.first_us);
    }
    crpci_loop_timer_set(r->base.loop, &r->timer, next - now);
}

/* Drops providers that were silent for too long. If the loop did not run for several ticks, silence
 * proves nothing, because datagrams were not read or were lost: then all are asked to announce
 * themselves, and get time to answer. */
CRPCI_FN void crpci_multicast_expire(crpci_multicast *r, int64_t now)
{
    bool rested = now - r->tick_us > 3 * (int64_t)CRPCI_MULTICAST_TICK_US;
    crpci_list *i;
    r->tick_us = now;
    for (i = r->peers.next; i != &r->peers;) {
        crpci_multicast_peer *p = CRPCI_CONTAINER(i, crpci_multicast_peer, link);
        i = i->next;
        if (rested && p->expires_us < now + CRPCI_MULTICAST_GRACE_US)
            p->expires_us = now + CRPCI_MULTICAST_GRACE_US;
        if (now < p->expires_us)
            continue;
        crpci_multicast_forget(r, p);
        crpci_multicast_changed(r);
    }
    for (i = r->directory.subscribers.next; rested && i != &r->directory.subscribers; i = i->next) {
        crpci_multicast_sub *s = CRPCI_CONTAINER(i, crpci_multicast_sub, base.link);
        s->question_us = now;
        s->questions = 2;
    }
}

/* Reports the kept providers to the directory. Unlocks. */
CRPCI_FN void crpci_multicast_serve(crpci_multicast *r)
{
    crpci_heap *h = r->base.loop->heap;
    crpci_directory_report report;
    crpci_names names;
    crpci_list *i;
    char *p;
    memset(&names, 0, sizeof names);
    names.size = r->peer_count * sizeof *names.name + 1;
    for (i = r->peers.next; i != &r->peers; i = i->next)
        names.size += strlen(CRPCI_CONTAINER(i, crpci_multicast_peer, link)->name) + 1;
    names.name = (char **)crpci_heap_alloc(h, names.size);
    if (!names.name)
        return; /* serve_us stays set: the next tick tries again */
    p = (char *)(names.name + r->peer_count);
    for (i = r->peers.next; i != &r->peers; i = i->next) {
        const char *name = CRPCI_CONTAINER(i, crpci_multicast_peer, link)->name;
        size_t n = strlen(name) + 1;
        names.name[names.count++] = (char *)memcpy(p, name, n);
        p += n;
    }
    r->serve_us = 0;
    report.names = names.name;
    report.count = names.count;
    report.whole = true;
    if (!crpci_directory_update(&r->directory, &report))
        r->serve_us = crpci_loop_now(r->base.loop) + CRPCI_MULTICAST_TICK_US;
    crpci_names_free(h, &names);
}

/* Does everything that is due. Unlocks. */
CRPCI_FN void crpci_multicast_run(crpci_multicast *r)
{
    int64_t now = crpci_loop_now(r->base.loop);
    crpci_list *i;
    crpci_multicast_expire(r, now);
    for (i = r->directory.subscribers.next; i != &r->directory.subscribers; i = i->next) {
        crpci_multicast_sub *s = CRPCI_CONTAINER(i, crpci_multicast_sub, base.link);
        if (s->questions && s->question_us <= now) {
            s->question_us = now + CRPCI_MULTICAST_FIRST_US / 2;
            s->questions--;
            crpci_multicast_ask(r, &s->base.want);
        }
        if (!s->base.last && s->base.first_us <= now) /* nobody answered: the list is empty */
            crpci_multicast_changed(r);
    }
    for (i = r->regs.next; i != &r->regs && !r->directory.ended;) {
        crpci_multicast_reg *reg = CRPCI_CONTAINER(i, crpci_multicast_reg, link);
        i = i->next;
        if (reg->due_us > now)
            continue;
        crpci_multicast_announce(reg);
        i = r->regs.next; /* the list may have changed while unlocked */
    }
    if (r->serve_us && r->serve_us <= now && !r->directory.ended)
        crpci_multicast_serve(r);
}

/* Does what is due, then sets the timer anew. The reference keeps the object alive while a callback
 * closes it. */
CRPCI_FN void crpci_multicast_on_timer(crpc_loop *l, crpci_timer *timer)
{
    crpci_multicast *r = CRPCI_CONTAINER(timer, crpci_multicast, timer);
    (void)l;
    r->directory.refs++;
    crpci_multicast_run(r);
    crpci_multicast_arm(r);
    crpci_directory_unref(&r->directory);
}

/* Reads a bounded number of datagrams; the poller reports the rest in the next step. */
CRPCI_FN void crpci_multicast_on_event(crpc_loop *l, crpci_watch *watch, unsigned events)
{
    crpci_multicast *r = CRPCI_CONTAINER(watch, crpci_multicast, watch);
    char text[CRPC_ADDRESS_MAX];
    crpci_addr from;
    unsigned n;
    (void)events;
    for (n = 0; n < CRPCI_MULTICAST_BATCH; n++) {
        ssize_t got;
        from.len = sizeof from.u;
        got = recvfrom(r->fd, r->datagram, CRPCI_MULTICAST_SIZE, MSG_DONTWAIT | MSG_TRUNC,
                       &from.u.any, &from.len);
        if (got < 0)
            break;
        if (crpci_multicast_take(r, r->datagram, (size_t)got) || r->ignored++)
            continue;
        crpci_sock_format(&from, text, sizeof text);
        crpci_heap_log(l->heap, CRPC_LOG_WARN,
                       "registry %s: malformed datagram from %s, or one above the limit of %u "
                       "providers, ignored; further ones are counted, not logged",
                       r->directory.name, text, CRPCI_MULTICAST_MAX);
    }
    crpci_multicast_arm(r);
}

/* --- the backend's functions ------------------------------------------------------------------ */

/* The first announcement is due at once; the loop sends it. */
CRPCI_FN int crpci_multicast_enroll(crpci_backend *b, const crpci_names_service *what,
                                    crpci_directory_status_fn status, void *user, void **handle)
{
    crpci_multicast *r = (crpci_multicast *)(void *)b;
    crpci_multicast_reg *reg = (crpci_multicast_reg *)crpci_heap_alloc(b->loop->heap, sizeof *reg);
    int err;
    if (!reg)
        return CRPC_ENOMEM;
    reg->owner = r;
    reg->refs = 1;
    reg->told = -1;
    crpci_list_init(&reg->link);
    err = crpci_directory_offer_init(&reg->offer, b->loop->heap, what, status, user);
    crpci_loop_lock(b->loop);
    /* The datagram must fit with the longest address and the longer verb. */
    if (reg->offer.auto_host)
        snprintf(reg->offer.address, sizeof reg->offer.address, "255.255.255.255:65535");
    if (!err && !crpci_multicast_write(reg, "unregister"))
        err = CRPC_EINVAL;
    if (err) {
        crpci_multicast_reg_unref(reg);
    } else {
        reg->due_us = crpci_loop_now(b->loop);
        crpci_list_append(&r->regs, &reg->link);
        *handle = reg;
        crpci_multicast_arm(r);
    }
    crpci_loop_unlock(b->loop);
    return err;
}

/* Withdraws a service: says so to the group, and waits for its callback. Locked, unlocks
 * meanwhile. */
CRPCI_FN void crpci_multicast_reg_end(crpci_multicast_reg *reg)
{
    crpci_multicast *r = reg->owner;
    reg->offer.ended = true;
    crpci_list_remove(&reg->link);
    if (reg->told == CRPC_OK && crpci_multicast_write(reg, "unregister"))
        (void)crpci_multicast_send(r, r->scratch);
    crpci_directory_call_wait(r->base.loop, &r->directory.cond, &reg->offer.caller);
    crpci_multicast_reg_unref(reg);
}

CRPCI_FN void crpci_multicast_withdraw(crpci_backend *b, void *handle)
{
    crpci_loop_lock(b->loop);
    crpci_multicast_reg_end((crpci_multicast_reg *)handle);
    crpci_loop_unlock(b->loop);
}

/* Asks twice, half a second apart. Without an answer after a second the first list is empty. */
CRPCI_FN int crpci_multicast_subscribe(crpci_backend *b, const crpci_names_service *want,
                                       crpci_directory_push_fn push, void *user,
                                       crpci_subscriber **out)
{
    crpci_multicast *r = (crpci_multicast *)(void *)b;
    crpci_multicast_sub *s;
    if (!want->service || !*want->service)
        return CRPC_EINVAL;
    crpci_loop_lock(b->loop);
    s = (crpci_multicast_sub *)(void *)crpci_directory_add(&r->directory, sizeof *s, want, push,
                                                           user);
    if (s) {
        s->question_us = crpci_loop_now(b->loop);
        s->questions = 2;
        s->base.first_us = s->question_us + CRPCI_MULTICAST_FIRST_US;
        *out = &s->base;
        if (r->peer_count)
            crpci_multicast_changed(r);
        crpci_multicast_arm(r);
    }
    crpci_loop_unlock(b->loop);
    return s ? CRPC_OK : CRPC_ENOMEM;
}

/* The directory's `free`: no reference is left. */
CRPCI_FN void crpci_multicast_free(crpci_directory *d)
{
    crpci_multicast *r = CRPCI_CONTAINER(d, crpci_multicast, directory);
    while (!crpci_list_empty(&r->peers))
        crpci_multicast_forget(r, CRPCI_CONTAINER(r->peers.next, crpci_multicast_peer, link));
    if (r->fd >= 0)
        close(r->fd);
    crpci_heap_free(d->loop->heap, r, sizeof *r);
}

/* Withdraws what is still registered, leaves the group with the socket, and releases the loop. */
CRPCI_FN void crpci_multicast_close(crpci_backend *b)
{
    crpci_multicast *r = (crpci_multicast *)(void *)b;
    crpc_loop *l = b->loop;
    crpci_loop_lock(l);
    while (!crpci_list_empty(&r->regs))
        crpci_multicast_reg_end(CRPCI_CONTAINER(r->regs.next, crpci_multicast_reg, link));
    crpci_loop_timer_cancel(l, &r->timer);
    crpci_watch_set(l, &r->watch, r->fd, 0);
    crpci_directory_end(&r->directory);
    crpci_loop_unlock(l);
    crpci_loop_release(l);
}

static const crpci_backend_ops crpci_multicast_ops = {
    crpci_multicast_enroll, crpci_multicast_withdraw, crpci_multicast_subscribe,
    crpci_directory_leave, crpci_multicast_close};

/* Opens multicast://224.5.6.7:port. */
CRPCI_COLD int crpci_multicast_open(crpc_loop *l, const crpci_url *url,
                                    const crpci_directory_options *o, crpci_backend **out,
                                    crpc_error *error)
{
    const char *call = NULL;
    struct ip_mreqn which;
    crpci_addr group;
    crpci_multicast *r;
    int err = CRPC_OK;
    if (!crpci_sock_parse(&group, url->authority) || group.u.any.sa_family != AF_INET ||
        ntohl(group.u.in4.sin_addr.s_addr) >> 28 != 14 || group.u.in4.sin_port == 0)
        return crpci_status_set(error, CRPC_EINVAL,
                                "multicast://%.60s: expected an address from 224.0.0.0 to "
                                "239.255.255.255, and a port",
                                url->authority);
    if (!crpci_multicast_interface(o->interface, &which))
        return crpci_status_set(error, CRPC_EADDRESS,
                                "multicast://%.60s: interface \"%.40s\" does not exist; see "
                                "`ip address`",
                                url->authority, o->interface);
    r = (crpci_multicast *)crpci_heap_alloc(l->heap, sizeof *r);
    if (!r || !crpci_directory_init(&r->directory, l,
                                    crpci_heap_format(l->heap, "multicast://%s", url->authority),
                                    crpci_multicast_free)) {
        crpci_heap_free(l->heap, r, sizeof *r);
        return crpci_status_set(error, CRPC_ENOMEM, "multicast://%.60s: out of memory",
                                url->authority);
    }
    r->base.ops = &crpci_multicast_ops;
    r->base.loop = l;
    r->group = group;
    r->which = which;
    crpci_list_init(&r->peers);
    crpci_list_init(&r->regs);
    crpci_timer_init(&r->timer, crpci_multicast_on_timer);
    crpci_watch_init(&r->watch, crpci_multicast_on_event);
    crpci_loop_hold(l);
    r->fd = crpci_multicast_socket(&group, &r->which, &call);
    if (r->fd < 0) {
        err = crpci_status_set(error, CRPC_EADDRESS,
                               "multicast://%.60s: %s: %s; interface= names the interface to use",
                               url->authority, call, strerror(errno));
    } else {
        crpci_loop_lock(l);
        r->tick_us = crpci_loop_now(l);
        err = crpci_watch_set(l, &r->watch, r->fd, CRPC_READABLE);
        crpci_loop_unlock(l);
        if (err)
            crpci_status_set(error, err, "multicast://%.60s: %s", url->authority,
                             crpc_status_text(err));
    }
    if (err)
        crpci_multicast_close(&r->base);
    else
        *out = &r->base;
    return err;
}

#endif /* CRPC_ENABLE_SERVERLESS */

/* ======================================================================== */
/* >>impl-zk-servers   servers of an ensemble; the local address towards them */
/* ======================================================================== */

#if CRPC_ENABLE_ZOOKEEPER
#if CRPC_ZOOKEEPER_ST && defined(THREADED)
#error "crpc: CRPC_ZOOKEEPER_ST=1 is for libzookeeper_st, which wants THREADED undefined"
#endif
#include <zookeeper/zookeeper.h>

/* Runs while a session is opened, mostly without the lock: resolving names blocks the caller. The
 * list is fixed afterwards; a changed DNS entry needs a new session. */

#define CRPCI_ZK_SERVERS_PORT ":2181" /* where the URL names no port */

/* The servers that a URL's authority names. Filled once, then only read (a test changes an
 * address). */
typedef struct crpci_zk_servers {
    crpci_heap *heap;
    const char *authority; /* as the user wrote it; the owner of this struct keeps it */
    crpci_addr *addr;
    size_t count;
    char *hosts; /* for zookeeper_init2: numeric, shuffled */
} crpci_zk_servers;

CRPCI_COLD void crpci_zk_servers_free(crpci_zk_servers *z)
{
    crpci_heap_strfree(z->heap, z->hosts);
    crpci_heap_free(z->heap, z->addr, z->count * sizeof *z->addr);
}

/* Adds an address unless it is there already. */
CRPCI_COLD int crpci_zk_servers_add(crpci_zk_servers *z, const crpci_addr *a)
{
    size_t i, size = z->count * sizeof *z->addr;
    crpci_addr *more;
    for (i = 0; i < z->count; i++) {
        if (a->len == z->addr[i].len && memcmp(&a->u, &z->addr[i].u, a->len) == 0)
            return CRPC_OK;
    }
    more = (crpci_addr *)crpci_heap_resize(z->heap, z->addr, size, size + sizeof *more);
    if (!more)
        return CRPC_ENOMEM;
    more[z->count++] = *a;
    z->addr = more;
    return CRPC_OK;
}

/* Resolves one part of the authority: "host", "host:port", "[v6]" or "[v6]:port". A name stands for
 * all of its addresses. */
CRPCI_COLD int crpci_zk_servers_resolve_one(crpci_zk_servers *z, const char *item, size_t size,
                                            crpc_error *why)
{
    char text[300], list[1024], one[CRPC_ADDRESS_MAX], *rest = list;
    const char *colon;
    unsigned port;
    crpci_addr a;
    int err, added = CRPC_ERESOLVE;
    snprintf(text, sizeof text - strlen(CRPCI_ZK_SERVERS_PORT), "%.*s", (int)size, item);
    colon = strrchr(text, ':');
    if (!colon || strchr(colon, ']'))
        memcpy(text + strlen(text), CRPCI_ZK_SERVERS_PORT, sizeof CRPCI_ZK_SERVERS_PORT);
    if (crpci_sock_parse(&a, text) && crpci_sock_port(&a))
        return crpci_zk_servers_add(z, &a);
    err = crpci_resolver_split(z->heap, text, list, sizeof list, &port, why);
    if (err)
        return err;
    while (added != CRPC_ENOMEM && crpci_resolver_next(&rest, port, one, sizeof one)) {
        if (crpci_sock_parse(&a, one) && crpci_sock_port(&a))
            added = crpci_zk_servers_add(z, &a);
    }
    return added ? crpci_status_set(why, added, "\"%.80s\": no numeric address, or port 0", text)
                 : CRPC_OK;
}

/* Resolves every server, because the client must get numeric addresses only: it would resolve names
 * on its own thread whenever it is not connected, and would spin when that fails. A name that
 * cannot be resolved is only logged if another server is left. */
CRPCI_COLD int crpci_zk_servers_resolve(crpci_zk_servers *z, crpc_error *error)
{
    const char *p = z->authority;
    crpc_error why;
    int err = crpci_status_set(&why, CRPC_EINVAL, "no server named; expected host:port,...");
    while (*p) {
        size_t n = strcspn(p, ",");
        err = crpci_zk_servers_resolve_one(z, p, n, &why);
        if (err && err != CRPC_ERESOLVE)
            break;
        if (err)
            crpci_heap_log(z->heap, CRPC_LOG_WARN, "registry zookeeper://%s: %s; left out",
                           z->authority, why.text);
        p += n;
        p += *p == ',';
        err = z->count ? CRPC_OK : err;
    }
    return err ? crpci_status_set(error, err, "zookeeper://%.80s: %.160s", z->authority, why.text)
               : CRPC_OK;
}

/* Whether IPv4 servers must be written as IPv4-mapped IPv6 addresses. The client passes its list to
 * getaddrinfo whenever it is not connected. glibc's fails even for a numeric IPv4 address while the
 * host has an IPv6 address but has lost its IPv4 one, and the client would spin. */
CRPCI_FN bool crpci_zk_servers_maps_v4(void)
{
#ifdef __GLIBC__
    int fd = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd >= 0)
        close(fd);
    return fd >= 0;
#else
    return false;
#endif
}

/* Shuffles the servers, so that a fleet spreads over them, and writes the list for the client,
 * which wants IPv6 addresses without brackets. */
CRPCI_COLD int crpci_zk_servers_list(crpci_zk_servers *z, crpc_loop *loop)
{
    bool map = crpci_zk_servers_maps_v4();
    char text[CRPC_ADDRESS_MAX], *bracket, *longer;
    size_t i, j;
    for (i = 0; i < z->count; i++) {
        crpci_addr swap = z->addr[i];
        crpci_loop_lock(loop);
        j = i + crpci_loop_random(loop) % (z->count - i);
        crpci_loop_unlock(loop);
        z->addr[i] = z->addr[j];
        z->addr[j] = swap;
        crpci_sock_format(&z->addr[i], text, sizeof text);
        bracket = strchr(text, ']');
        if (bracket)
            *bracket++ = '\0';
        longer = crpci_heap_format(z->heap, "%s%s%s%s%s", z->hosts ? z->hosts : "", i ? "," : "",
                                   map && !bracket ? "::ffff:" : "", text + (bracket != NULL),
                                   bracket ? bracket : "");
        crpci_heap_strfree(z->heap, z->hosts);
        z->hosts = longer;
        if (!longer)
            return CRPC_ENOMEM;
    }
    return CRPC_OK;
}

/* Determines the local address (v4: an IPv4 one) on the route to the servers. False: there is no
 * route to any server. */
CRPCI_FN bool crpci_zk_servers_local(const crpci_zk_servers *z, bool v4, char *out, size_t size)
{
    size_t i;
    *out = '\0';
    for (i = 0; i < z->count; i++) {
        if ((!v4 || z->addr[i].u.any.sa_family == AF_INET) &&
            crpci_sock_route(&z->addr[i], NULL, out, size))
            return true;
    }
    return false;
}

/* Whether a server accepts connections. Blocks for up to 200 ms; call it without the lock. */
CRPCI_FN bool crpci_zk_servers_reachable(const crpci_addr *to)
{
    int fd = crpci_sock_open(to), failed = 0;
    socklen_t len = sizeof failed;
    struct pollfd p;
    if (fd < 0)
        return false;
    p.fd = fd;
    p.events = POLLOUT;
    if (connect(fd, &to->u.any, to->len) && (errno != EINPROGRESS || poll(&p, 1, 200) != 1 ||
                                             getsockopt(fd, SOL_SOCKET, SO_ERROR, &failed, &len)))
        failed = 1;
    close(fd);
    return failed == 0;
}
#endif /* CRPC_ENABLE_ZOOKEEPER */

/* ======================================================================== */
/* >>impl-zk-job   requests to ZooKeeper: who sends them, and how answers are handled */
/* ======================================================================== */

#if CRPC_ENABLE_ZOOKEEPER

/* Everything in a loop that names the same servers, credential, timeout and cache file shares one
 * session. The sections below put *jobs* on it. A job decides what to send next and when; the
 * session (impl-zk-session) sends it, at most one request per job at a time, and tells the job the
 * outcome. These structs belong to both sections; other sections may use only the members loop,
 * heap, authority, phase, id and negotiated_ms of a session.
 *
 * The loop's lock guards all of this. It is never held while the client library is called, nor
 * while the program is called back.
 *
 * The context of a client callback must outlive the last call of it. Each completion holds a
 * request; requests whose completion never comes, because the handle was closed at the wrong
 * moment, are freed with the handle. Watches may fire several times or never, so they hold only the
 * handle, and jobs recognise them by path. */

#define CRPCI_ZK_JOB_RETRY_US   1000000  /* wait after a request that got no answer */
#define CRPCI_ZK_JOB_BACKOFF_US 30000000 /* longest wait between two tries */
#define CRPCI_ZK_JOB_THROTTLED  (-127)   /* ZTHROTTLEDOP, which older clients do not define */

typedef struct crpci_zk_session crpci_zk_session;
typedef struct crpci_zk_job crpci_zk_job;
typedef struct crpci_zk_request crpci_zk_request;

/* One zhandle_t of the client library, from its making to its last callback. */
typedef struct crpci_zk_handle {
    crpci_zk_session *session;
    zhandle_t *zh;
    crpci_list requests; /* those whose completion may still come */
    bool authed;         /* there is no credential, or the client has accepted it for sending */
    bool inside;         /* a callback of the client is running, on `thread` */
    crpci_thread thread;
#if !CRPC_ZOOKEEPER_ST
    pthread_key_t key; /* its destructor frees this struct, see crpci_zk_session_free_later */
#endif
} crpci_zk_handle;

/* The states of a session, and what is done at due_us:
 *
 *     ABSENT     no handle                        make one         made       -> STARTING
 *     STARTING   the handle never had a session   log the silence  connected  -> CONNECTED
 *     CONNECTED  requests may be sent                              lost       -> LOST
 *     LOST       the session may live             probe            connected  -> CONNECTED
 *     OVER       the handle has to be replaced                     closed     -> ABSENT
 *
 * OVER can follow each of the three states before it: the session expired, the servers refused the
 * credential, the peer was not a ZooKeeper server, or the watchdog gave the session up. */
typedef enum crpci_zk_phase {
    CRPCI_ZK_ABSENT,
    CRPCI_ZK_STARTING,
    CRPCI_ZK_CONNECTED,
    CRPCI_ZK_LOST,
    CRPCI_ZK_OVER
} crpci_zk_phase;

struct crpci_zk_session {
    crpci_list node; /* in loop->registries, while it has users */
    crpc_loop *loop;
    crpci_heap *heap;
    uint32_t refs;    /* of users, of handles, and of functions that unlock */
    uint32_t users;   /* open registries and directories; the last one closes the session */
    uint32_t handles; /* handles whose callbacks may still come */
    char *authority;
    char *credential; /* or NULL */
    int timeout_ms;   /* requested */
    int negotiated_ms; /* granted by the server */
    int64_t spread_us;
    crpci_zk_servers servers;
    crpci_cache cache;   /* the last good lists of `services`; path NULL: no cache */
    /* The next three belong to impl-zk-directory: the services that it follows; the timestamp of
     * the last consumer, because no two may be equal; and a function that marks all lists stale
     * (locked, unlocks meanwhile; false: call it again; NULL: no directory uses this session). */
    crpci_list services;
    int64_t stamp_ms;
    bool (*age)(crpci_zk_session *s);
    crpci_cond cond; /* `busy`, a callback or a handle has ended, or `closing` was set */
    crpci_timer timer;
    crpci_list jobs;
    crpci_zk_handle *handle;
    crpci_zk_phase phase;
    bool busy; /* busy_thread alone uses or replaces the handle */
    crpci_thread busy_thread;
    bool again; /* something changed while busy: run once more */
    bool closing;
    bool deferred; /* closed inside a callback: crpci_zk_session_run finishes the closing */
    bool aged;     /* the lists have been marked stale since the loss */
    bool warned;   /* the current trouble has been logged */
    int64_t id;    /* the server's session id; 0: this handle has had none yet */
    int64_t lost_us;
    int64_t due_us; /* see the states; INT64_MAX: nothing is due */
    /* LOST: connections accepted and closed without a session, since the session's timeout */
    unsigned refused;
    unsigned failures; /* handles made since the last good answer */
    unsigned turn;     /* index of the server that the next probe dials */
#if CRPC_ZOOKEEPER_ST
    crpci_watch watch;
    unsigned events;
    int fd;
    int64_t client_us; /* when the client must be called again */
    bool refusal;      /* one was counted since the last probe */
#endif
};

/* --- requests --------------------------------------------------------------------------------- */

typedef enum crpci_zk_verb {
    CRPCI_ZK_STAT, /* whether the znode exists */
    CRPCI_ZK_GET,
    CRPCI_ZK_LIST,
    CRPCI_ZK_CREATE, /* this one and those below are not idempotent */
    CRPCI_ZK_SET,
    CRPCI_ZK_DELETE,
    CRPCI_ZK_MULTI
} crpci_zk_verb;

/* Operations and results of a transaction. */
typedef struct crpci_zk_multi {
    int count;
    zoo_op_t *ops;
    zoo_op_result_t *results;
} crpci_zk_multi;

/* What a job wants to send. The path is copied; the data and `multi` must live as long as the
 * job, which each request holds until its completion. */
typedef struct crpci_zk_order {
    crpci_zk_verb verb;
    const char *path;
    const char *data; /* CREATE, SET */
    int size;
    int version;    /* SET, DELETE; -1: any */
    unsigned flags; /* CREATE: CRPC_NODE_* */
    bool watch;     /* STAT, GET, LIST: also set a watch on the path */
    const crpci_zk_multi *multi;
} crpci_zk_order;

/* One request in flight, from sending to its completion. */
struct crpci_zk_request {
    crpci_list node; /* in handle->requests */
    crpci_zk_handle *handle;
    crpci_zk_job *job;
    crpci_zk_order order;
    bool parent; /* it creates a znode above the one that the job wants */
    int64_t sent_us; /* 0: the client refused it */
    size_t size;     /* of this block */
    char path[1];    /* more follows */
};

/* The server's answer; valid only during the callback. */
typedef struct crpci_zk_answer {
    int rc;
    const struct Stat *stat;
    const struct String_vector *names;
    const char *text; /* the path of a new node; bytes */
    int size;
} crpci_zk_answer;

/* Events of a job. The last six are sent while the session walks its list of jobs: during these the
 * job must neither unlock nor remove another job from the session. */
typedef enum crpci_zk_event {
    /* with the request and its answer; the job has nothing due until it sets due_us */
    CRPCI_ZK_ANSWERED,
    /* with the request, a write: no answer will come; it may have been executed */
    CRPCI_ZK_DOUBTED,
    CRPCI_ZK_RESUMED,   /* connected again, with the same session */
    CRPCI_ZK_RENEWED,   /* connected, with another session than before */
    CRPCI_ZK_SUSPENDED, /* the connection is lost */
    CRPCI_ZK_ENDED,     /* the session and its ephemeral nodes are gone; may come twice */
    CRPCI_ZK_CHANGED,   /* the znode at `watched` has changed */
    CRPCI_ZK_REMOVED    /* the znode at `watched` was removed */
} crpci_zk_event;

/* The functions of a kind of job. The session calls them locked. */
typedef struct crpci_zk_work {
    /* Fills in the next request. False: nothing to send; unless the job has set due_us, it is asked
     * again in a second. Must not unlock. NULL: the job only listens to events. */
    bool (*order)(crpci_zk_job *job, crpci_zk_order *order);
    void (*event)(crpci_zk_job *job, crpci_zk_event event, const crpci_zk_request *q,
                  const crpci_zk_answer *a);
    void (*clear)(crpci_zk_job *job); /* frees what the job owns. NULL: it owns nothing */
} crpci_zk_work;

/* A user of the session, part of its holder's struct. `release` drops the reference to the holder
 * when neither the session nor a request refers to the job any more. */
struct crpci_zk_job {
    crpci_list node; /* in session->jobs */
    const crpci_zk_work *work;
    void *holder;
    void (*release)(void *holder); /* locked */
    crpci_zk_session *session;
    uint32_t refs;          /* of the session's list, of requests, of functions that unlock */
    crpci_zk_request *sent; /* in flight; NULL: none, or its answer no longer matters */
    int64_t due_us;         /* when to call `order`; 0: now; INT64_MAX: not at all */
    const char *watched;    /* path whose watch events the job gets, or NULL; the job's memory */
    /* CREATE: length of the part of the path that is created next; 0: the node itself */
    size_t made;
};

/* --- waits ------------------------------------------------------------------------------------ */

CRPCI_FN int64_t crpci_zk_job_now(const crpci_zk_session *s)
{
    return crpci_heap_now(s->heap);
}

/* Varies `us` at random by so many percent, so that a fleet does not act in step. Locked. */
CRPCI_FN int64_t crpci_zk_job_spread(crpci_zk_session *s, int64_t us, unsigned percent)
{
    int64_t part = us / 100 * percent;
    return us - part + (int64_t)(crpci_loop_random(s->loop) % 1024u) * part / 512;
}

/* The wait before retry number `n`: it doubles, and is random within a factor of two. */
CRPCI_FN int64_t crpci_zk_job_backoff(crpci_zk_session *s, unsigned n)
{
    int64_t us = (int64_t)CRPCI_ZK_JOB_RETRY_US / 2 << (n < 8 ? n : 8);
    return crpci_zk_job_spread(s, crpci_base_min64(us, CRPCI_ZK_JOB_BACKOFF_US), 33);
}

/* A random delay within the spread, or within half of a short session timeout. Locked. */
CRPCI_FN int64_t crpci_zk_job_scatter(crpci_zk_session *s)
{
    int64_t most = crpci_base_min64((int64_t)s->timeout_ms * 500, s->spread_us);
    return (int64_t)(crpci_loop_random(s->loop) % 4096u) * most / 4096;
}

/* The time between two probes. Not shorter than a second, because a server that is starting closes
 * connections too, and would look like one that refuses the session. */
CRPCI_FN int64_t crpci_zk_job_pace(const crpci_zk_session *s)
{
    int64_t us = (int64_t)s->negotiated_ms * 250;
    return us > 1000000 ? us : 1000000;
}

/* The wait before a handle is replaced. Random at first, so that a fleet that lost its server does
 * not return all at once. */
CRPCI_FN int64_t crpci_zk_job_delay(crpci_zk_session *s)
{
    return s->failures ? crpci_zk_job_backoff(s, s->failures) : crpci_zk_job_scatter(s);
}

/* Lets the job send its next request in `us` microseconds. */
CRPCI_FN void crpci_zk_job_later(crpci_zk_job *job, int64_t us)
{
    job->due_us = crpci_zk_job_now(job->session) + us;
}

/* Schedules it in `us` microseconds, varied at random by so many percent. */
CRPCI_FN void crpci_zk_job_around(crpci_zk_job *job, int64_t us, unsigned percent)
{
    crpci_zk_job_later(job, crpci_zk_job_spread(job->session, us, percent));
}

/* Whether a code leaves open whether the server executed the request. */
CRPCI_FN bool crpci_zk_job_unanswered(int rc)
{
    return (rc < 0 && rc > ZAPIERROR && rc != ZUNIMPLEMENTED && rc != ZBADARGUMENTS) ||
           rc == ZSESSIONEXPIRED || rc == ZCLOSING || rc == ZSESSIONMOVED || rc == ZAUTHFAILED;
}

/* --- memory ----------------------------------------------------------------------------------- */

/* Puts a job on its session; it takes over one reference to its holder. With due_us INT64_MAX it
 * only listens. Locked. */
CRPCI_FN void crpci_zk_job_add(crpci_zk_job *job, const crpci_zk_work *work, crpci_zk_session *s,
                               int64_t due_us, void *holder, void (*release)(void *holder))
{
    crpci_list_init(&job->node);
    job->work = work;
    job->holder = holder;
    job->release = release;
    job->session = s;
    job->refs = 1;
    job->due_us = due_us;
    crpci_list_append(&s->jobs, &job->node);
}

CRPCI_FN void crpci_zk_job_unref(crpci_zk_job *job)
{
    if (--job->refs)
        return;
    if (job->work->clear)
        job->work->clear(job);
    job->release(job->holder);
}

/* Removes a job from its session, and the list's reference with it. Does nothing if it is not
 * there. */
CRPCI_FN void crpci_zk_job_drop(crpci_zk_job *job)
{
    if (crpci_list_empty(&job->node))
        return;
    crpci_list_remove(&job->node);
    crpci_zk_job_unref(job);
}

/* The answer to the request in flight no longer matters. */
CRPCI_FN void crpci_zk_job_forget(crpci_zk_job *job)
{
    job->sent = NULL;
    job->made = 0;
}

/* Whether a request of the job itself is in flight; creating parents does not count. */
CRPCI_FN bool crpci_zk_job_pending(const crpci_zk_job *job)
{
    return job->sent && !job->sent->parent;
}

/* Whether that request changes something. */
CRPCI_FN bool crpci_zk_job_writing(const crpci_zk_job *job)
{
    return crpci_zk_job_pending(job) && job->sent->order.verb >= CRPCI_ZK_CREATE;
}

/* A request for s->handle: the order or, while job->made is set, the creation of a directory above
 * the node. NULL: out of memory. */
CRPCI_FN crpci_zk_request *crpci_zk_job_request(crpci_zk_session *s, crpci_zk_job *job,
                                                const crpci_zk_order *order)
{
    size_t n = strlen(order->path), size = sizeof(crpci_zk_request) + n;
    crpci_zk_request *q = (crpci_zk_request *)crpci_heap_alloc(s->heap, size);
    if (!q)
        return NULL;
    q->size = size;
    q->handle = s->handle;
    q->job = job;
    q->order = *order;
    q->order.path = q->path;
    memcpy(q->path, order->path, n);
    q->parent = job->made && order->verb == CRPCI_ZK_CREATE;
    if (q->parent) {
        q->path[job->made] = '\0';
        q->order.data = "";
        q->order.size = 0;
        q->order.flags = CRPC_NODE_PARENTS;
    }
    job->refs++;
    crpci_list_append(&s->handle->requests, &q->node);
    return q;
}

CRPCI_FN void crpci_zk_job_request_free(crpci_zk_request *q)
{
    crpci_heap *h = q->handle->session->heap;
    crpci_list_remove(&q->node);
    crpci_zk_job_unref(q->job);
    crpci_heap_free(h, q, q->size);
}

/* --- answers ---------------------------------------------------------------------------------- */

/* Handles the answer to a CREATE whose directory may be missing. job->made goes up the path while
 * the directory above is missing too, then down again. False: the answer is meant for the job. */
CRPCI_FN bool crpci_zk_job_climb(crpci_zk_job *job, const crpci_zk_request *q, int rc)
{
    const char *slash = NULL;
    if (q->parent && (rc == ZOK || rc == ZNODEEXISTS)) { /* the rest of the path follows its \0 */
        slash = strchr(q->path + strlen(q->path) + 1, '/');
        job->made = slash ? (size_t)(slash - q->path) : 0;
        return true;
    }
    if (rc == ZNONODE && q->order.verb == CRPCI_ZK_CREATE && q->order.flags & CRPC_NODE_PARENTS)
        slash = strrchr(q->path, '/');
    job->made = slash ? (size_t)(slash - q->path) : 0;
    return job->made != 0;
}

/* Decides what an answer means for its job. Locked; the job may unlock. */
CRPCI_FN void crpci_zk_job_take(crpci_zk_request *q, const crpci_zk_answer *a)
{
    crpci_zk_job *job = q->job;
    const crpci_zk_order *o = &q->order;
    bool skipped = a->rc == CRPCI_ZK_JOB_THROTTLED || a->rc == ZINVALIDSTATE; /* not executed */
    job->sent = NULL;
    if (skipped || crpci_zk_job_unanswered(a->rc)) { /* to be sent again, except a doubtful write */
        crpci_zk_job_around(job, CRPCI_ZK_JOB_RETRY_US, 50);
        if (!skipped && o->verb >= CRPCI_ZK_CREATE && !q->parent)
            job->work->event(job, CRPCI_ZK_DOUBTED, q, a);
        return;
    }
    job->due_us = 0;
    if (crpci_zk_job_climb(job, q, a->rc))
        return;
    job->due_us = INT64_MAX;
    job->work->event(job, CRPCI_ZK_ANSWERED, q, a);
}

/* Sends an event to every job. */
CRPCI_FN void crpci_zk_job_tell(crpci_zk_session *s, crpci_zk_event event)
{
    crpci_list *i, *next;
    for (i = s->jobs.next; i != &s->jobs; i = next) {
        crpci_zk_job *job = CRPCI_CONTAINER(i, crpci_zk_job, node);
        next = i->next;
        job->work->event(job, event, NULL, NULL);
    }
}

/* The session is over: requests in flight get no answer that counts. Jobs with a write in flight
 * hear DOUBTED first, then all hear ENDED. */
CRPCI_FN void crpci_zk_job_over(crpci_zk_session *s)
{
    crpci_list *i, *next;
    for (i = s->jobs.next; i != &s->jobs; i = next) {
        crpci_zk_job *job = CRPCI_CONTAINER(i, crpci_zk_job, node);
        crpci_zk_request *q = crpci_zk_job_writing(job) ? job->sent : NULL;
        next = i->next;
        crpci_zk_job_forget(job);
        if (q)
            job->work->event(job, CRPCI_ZK_DOUBTED, q, NULL);
    }
    crpci_zk_job_tell(s, CRPCI_ZK_ENDED);
}

#endif /* CRPC_ENABLE_ZOOKEEPER */

/* ======================================================================== */
/* >>impl-zk-session   a session with ZooKeeper: start, loss, expiry */
/* ======================================================================== */

#if CRPC_ENABLE_ZOOKEEPER

/* Keeps a session with ZooKeeper alive for the jobs on it. When a session has expired, or must be
 * abandoned, its handle is replaced and every job is told to begin anew. `busy` marks the one
 * thread that uses or replaces the handle.
 *
 * With libzookeeper_mt, answers and events come on the client's completion thread. Everything that
 * must happen in time happens there, because the program may not drive the loop for hours: reading
 * and pushing lists, replacing a handle and waiting before that. The loop's timer paces retries and
 * checks, and drives the watchdog: a connection that stays lost for two session timeouts ends the
 * session, because a server that has lost its data refuses an old session for ever and never says
 * that it expired. Closing a handle can block, so the timer does not do that; it sends a probe. The
 * probe's completion, which comes with an error while no server answers, runs on the completion
 * thread and lets that thread replace the handle.
 *
 * With libzookeeper_st everything happens in crpci_zk_session_run on the thread that drives the
 * loop.
 *
 * When a handle is closed outside its callbacks, no callback comes after zookeeper_close returns.
 * When it is closed inside one, libzookeeper_mt cleans up later, on its completion thread; a
 * destructor of thread-specific data then frees the handle when that thread ends. */

#define CRPCI_ZK_SESSION_TIMEOUT_MAX_MS 3600000 /* no ZooKeeper grants a longer one */
#define CRPCI_ZK_SESSION_LINGER_US      200000  /* closing waits this long for answers */
#define CRPCI_ZK_SESSION_SILENT_US      2000000 /* a start without an answer is logged after it */
#define CRPCI_ZK_SESSION_FLAGS          3u /* CRPC_NODE_EPHEMERAL, _SEQUENTIAL: as the client's */
#define CRPCI_ZK_SESSION_REFUSALS       3u /* connections accepted and closed: session unknown */
#define CRPCI_ZK_SESSION_PATIENCE       2u /* session timeouts without a connection: given up */

/* Every callback of the client ends with this function. It sends requests that are due, and these
 * refer to the callbacks: the one cycle of this section, hence the prototype. Unlocks. */
static void crpci_zk_session_leave(crpci_zk_handle *handle);

/* --- handles and sessions: memory ---------------------------------------------------------- */

/* No callback of the handle can come any more: frees it, and the requests whose completion never
 * came. */
CRPCI_FN void crpci_zk_session_handle_free(crpci_zk_handle *handle)
{
    crpci_zk_session *s = handle->session;
    while (!crpci_list_empty(&handle->requests))
        crpci_zk_job_request_free(CRPCI_CONTAINER(handle->requests.next, crpci_zk_request, node));
    crpci_heap_free(s->heap, handle, sizeof *handle);
    s->handles--;
    s->refs--; /* never the last one: the caller has one too */
    crpci_thread_broadcast(&s->cond);
}

CRPCI_COLD void crpci_zk_session_free(crpci_zk_session *s)
{
    crpci_heap *h = s->heap;
    crpc_loop *l = s->loop;
    crpci_cache_clear(&s->cache);
    crpci_zk_servers_free(&s->servers);
    crpci_heap_strfree(h, s->authority);
    crpci_heap_strfree(h, s->credential);
    crpci_thread_cond_free(&s->cond);
    crpci_heap_free(h, s, sizeof *s);
    crpci_loop_release(l);
}

/* Unlocks the loop and drops one reference of the session. */
CRPCI_FN void crpci_zk_session_unlock(crpci_zk_session *s)
{
    bool last = --s->refs == 0;
    crpci_loop_unlock(s->loop);
    if (last)
        crpci_zk_session_free(s);
}

/* --- callbacks of the client ------------------------------------------------------------------ */

/* Drops the client's log lines, because they do not say which session they concern. The session's
 * own lines report each loss and each return once. */
CRPCI_FN void crpci_zk_session_on_log(const char *line)
{
    (void)line;
}

/* A callback of the client begins: locks, and notes which thread is inside. crpci_zk_session_leave
 * ends it. */
CRPCI_FN void crpci_zk_session_enter(crpci_zk_handle *handle)
{
    crpci_loop_lock(handle->session->loop);
    handle->inside = true;
    handle->thread = crpci_thread_self();
}

/* Enters a phase, in which something is due in `us` microseconds. INT64_MAX: nothing is. */
CRPCI_FN void crpci_zk_session_to(crpci_zk_session *s, crpci_zk_phase phase, int64_t us)
{
    s->phase = phase;
    s->due_us = us == INT64_MAX ? us : crpci_zk_job_now(s) + us;
}

/* For how many whole session timeouts the connection has been lost. From the first on the session
 * may be gone and anything may have changed at the registry. */
CRPCI_FN unsigned crpci_zk_session_absence(const crpci_zk_session *s)
{
    if (s->phase != CRPCI_ZK_LOST)
        return 0;
    return (unsigned)((crpci_zk_job_now(s) - s->lost_us) / ((int64_t)s->negotiated_ms * 1000));
}

/* Whether the session has been lost or refused for too long. A load balancer or a restart can
 * refuse connections for almost a session timeout while the session lives on: only later refusals
 * are counted. */
CRPCI_FN bool crpci_zk_session_is_hopeless(const crpci_zk_session *s)
{
    return s->phase == CRPCI_ZK_LOST && (s->refused >= CRPCI_ZK_SESSION_REFUSALS ||
                                         crpci_zk_session_absence(s) >= CRPCI_ZK_SESSION_PATIENCE);
}

/* Marks the lists stale, once for each loss. On the thread that delivers lists, so that the two
 * never overlap. Locked, unlocks meanwhile. */
CRPCI_FN void crpci_zk_session_age(crpci_zk_session *s)
{
    if (!s->aged)
        s->aged = !s->age || s->age(s);
}

/* Every completion of a request comes here. An answer counts only if it is that of the current
 * handle and of the job's request in flight. */
CRPCI_FN void crpci_zk_session_on_answer(const void *data, const crpci_zk_answer *a)
{
    crpci_zk_request *q = (crpci_zk_request *)(uintptr_t)data;
    crpci_zk_handle *handle = q->handle;
    crpci_zk_session *s = handle->session;
    crpci_zk_session_enter(handle);
    if (!crpci_zk_job_unanswered(a->rc))
        s->failures = 0;
    if (q->job->sent == q) {
        q->job->sent = NULL;
        if (handle == s->handle && !s->closing)
            crpci_zk_job_take(q, a);
    }
    crpci_zk_job_request_free(q);
    if (s->closing)
        crpci_thread_broadcast(&s->cond);
    crpci_zk_session_leave(handle);
}

CRPCI_FN void crpci_zk_session_on_data(int rc, const char *bytes, int size, const struct Stat *stat,
                                       const void *data)
{
    crpci_zk_answer a = {rc, stat, NULL, bytes, size};
    crpci_zk_session_on_answer(data, &a);
}

CRPCI_FN void crpci_zk_session_on_string(int rc, const char *value, const void *data)
{
    crpci_zk_session_on_data(rc, value, 0, NULL, data);
}

CRPCI_FN void crpci_zk_session_on_stat(int rc, const struct Stat *stat, const void *data)
{
    crpci_zk_session_on_data(rc, NULL, 0, stat, data);
}

CRPCI_FN void crpci_zk_session_on_void(int rc, const void *data)
{
    crpci_zk_session_on_data(rc, NULL, 0, NULL, data);
}

CRPCI_FN void crpci_zk_session_on_names(int rc, const struct String_vector *names, const void *data)
{
    crpci_zk_answer a = {rc, NULL, names, NULL, 0};
    crpci_zk_session_on_answer(data, &a);
}

/* A watch fired. A job with a request in flight is not told, because the client delivers watch
 * events before answers that already show the change. Watches also get session events, which
 * crpci_zk_session_on_session handles. */
CRPCI_FN void crpci_zk_session_on_change(zhandle_t *zh, int type, int state, const char *path,
                                         void *context)
{
    crpci_zk_handle *handle = (crpci_zk_handle *)context;
    crpci_zk_session *s = handle->session;
    crpci_list *i, *next;
    (void)zh;
    (void)state;
    if (type == ZOO_SESSION_EVENT || !path)
        return;
    crpci_zk_session_enter(handle);
    for (i = s->jobs.next; handle == s->handle && i != &s->jobs; i = next) {
        crpci_zk_job *job = CRPCI_CONTAINER(i, crpci_zk_job, node);
        next = i->next;
        if (job->watched && !job->sent && strcmp(job->watched, path) == 0)
            job->work->event(job, type == ZOO_DELETED_EVENT ? CRPCI_ZK_REMOVED : CRPCI_ZK_CHANGED,
                             NULL, NULL);
    }
    crpci_zk_session_leave(handle);
}

/* The client has connected. A peer that is not ZooKeeper can grant an absurd timeout, by which it
 * is recognised. */
CRPCI_FN void crpci_zk_session_connected(crpci_zk_session *s, int64_t id, int timeout_ms)
{
    bool fresh = id != s->id;
    if (timeout_ms <= 0 || timeout_ms > CRPCI_ZK_SESSION_TIMEOUT_MAX_MS) {
        crpci_heap_log(
            s->heap, CRPC_LOG_ERROR,
            "registry zookeeper://%s: the peer is not a ZooKeeper server (it granted a session "
            "timeout of %d ms); trying again later",
            s->authority, timeout_ms);
        s->failures += s->failures == 0;
        crpci_zk_session_to(s, CRPCI_ZK_OVER, INT64_MAX);
        return;
    }
    crpci_heap_log(s->heap, s->warned ? CRPC_LOG_WARN : CRPC_LOG_INFO,
                   "registry zookeeper://%s: connected, %s session 0x%llx, timeout %d ms",
                   s->authority, fresh ? "new" : "same", (unsigned long long)id, timeout_ms);
    crpci_zk_session_to(s, CRPCI_ZK_CONNECTED, INT64_MAX);
    s->warned = s->aged = false;
    s->id = id;
    s->negotiated_ms = timeout_ms;
    s->refused = 0;
    crpci_zk_job_tell(s, fresh ? CRPCI_ZK_RENEWED : CRPCI_ZK_RESUMED);
}

CRPCI_FN void crpci_zk_session_disconnected(crpci_zk_session *s)
{
    if (s->phase != CRPCI_ZK_CONNECTED)
        return;
    crpci_heap_log(s->heap, CRPC_LOG_WARN,
                   "registry zookeeper://%s: connection lost; data already read stays in use",
                   s->authority);
    crpci_zk_session_to(s, CRPCI_ZK_LOST, (int64_t)s->negotiated_ms * 1000);
    s->warned = true;
    s->lost_us = crpci_zk_job_now(s);
    crpci_zk_job_tell(s, CRPCI_ZK_SUSPENDED);
}

/* The server ended the session, or refused the credential. */
CRPCI_FN void crpci_zk_session_expired(crpci_zk_session *s, bool credential)
{
    if (credential)
        crpci_heap_log(s->heap, CRPC_LOG_ERROR,
                       "registry zookeeper://%s: the servers refuse the credential; trying again "
                       "later",
                       s->authority);
    s->warned = true;
    s->failures += credential && s->failures == 0;
    crpci_zk_session_to(s, CRPCI_ZK_OVER, INT64_MAX);
    crpci_zk_job_over(s);
}

/* The client's session events. They come for every handle, also for one that was replaced. */
CRPCI_FN void crpci_zk_session_on_session(zhandle_t *zh, int type, int state, const char *path,
                                          void *context)
{
    crpci_zk_handle *handle = (crpci_zk_handle *)context;
    crpci_zk_session *s = handle->session;
    int64_t id = zoo_client_id(zh)->client_id;
    int timeout_ms = state == ZOO_CONNECTED_STATE ? zoo_recv_timeout(zh) : 0;
    (void)path;
    if (type != ZOO_SESSION_EVENT)
        return;
    crpci_zk_session_enter(handle);
    if (handle == s->handle && !s->closing) {
        if (state == ZOO_CONNECTED_STATE || state == ZOO_READONLY_STATE)
            crpci_zk_session_connected(s, id, timeout_ms);
        else if (state == ZOO_EXPIRED_SESSION_STATE || state == ZOO_AUTH_FAILED_STATE)
            crpci_zk_session_expired(s, state == ZOO_AUTH_FAILED_STATE);
        else
            crpci_zk_session_disconnected(s);
    }
    crpci_zk_session_leave(handle);
}

/* --- calls of the client ---------------------------------------------------------------------- */

/* Who may use a node that is created. */
CRPCI_FN const struct ACL_vector *crpci_zk_session_acl(unsigned flags)
{
    return flags & CRPC_NODE_PRIVATE ? &ZOO_CREATOR_ALL_ACL : &ZOO_OPEN_ACL_UNSAFE;
}

/* Passes a request to the client. Unlocked. Returns the client's code; crpci_zk_session_send
 * handles errors. */
CRPCI_FN int crpci_zk_session_call(zhandle_t *zh, crpci_zk_request *q)
{
    const crpci_zk_order *o = &q->order;
    watcher_fn watch = o->watch ? crpci_zk_session_on_change : NULL;
    switch (o->verb) {
    case CRPCI_ZK_LIST:
        return zoo_awget_children(zh, o->path, watch, q->handle, crpci_zk_session_on_names, q);
    case CRPCI_ZK_GET:
        return zoo_awget(zh, o->path, watch, q->handle, crpci_zk_session_on_data, q);
    case CRPCI_ZK_CREATE:
        return zoo_acreate(zh, o->path, o->data, o->size, crpci_zk_session_acl(o->flags),
                           (int)(o->flags & CRPCI_ZK_SESSION_FLAGS), crpci_zk_session_on_string, q);
    case CRPCI_ZK_SET:
        return zoo_aset(zh, o->path, o->data, o->size, o->version, crpci_zk_session_on_stat, q);
    case CRPCI_ZK_DELETE:
        return zoo_adelete(zh, o->path, o->version, crpci_zk_session_on_void, q);
    case CRPCI_ZK_MULTI:
        return zoo_amulti(zh, o->multi->count, o->multi->ops, o->multi->results,
                          crpci_zk_session_on_void, q);
    default:
        return zoo_awexists(zh, o->path, watch, q->handle, crpci_zk_session_on_stat, q);
    }
}

/* Sends a request, whose job the caller holds. With libzookeeper_mt it may be answered and freed
 * before this returns: `q` is compared, not read. Locked, unlocks meanwhile. */
CRPCI_FN void crpci_zk_session_send(crpci_zk_session *s, crpci_zk_request *q)
{
    crpci_zk_job *job = q->job;
    zhandle_t *zh = q->handle->zh;
    crpci_zk_answer a;
    memset(&a, 0, sizeof a);
    q->sent_us = crpci_zk_job_now(s);
    crpci_loop_unlock(s->loop);
    a.rc = crpci_zk_session_call(zh, q);
    crpci_loop_lock(s->loop);
    if (a.rc != ZOK) {
        if (job->sent == q) {
            q->sent_us = 0;
            crpci_zk_job_take(q, &a);
        }
        /* When out of memory, the client may have queued the request all the same and may call
         * back: then it is left to the handle, which frees it at the end. */
        if (a.rc == ZINVALIDSTATE || a.rc == ZBADARGUMENTS)
            crpci_zk_job_request_free(q);
    }
}

/* Sends a job's next request. If it has none, or memory is short, it is asked again later. */
CRPCI_FN void crpci_zk_session_issue(crpci_zk_session *s, crpci_zk_job *job)
{
    crpci_zk_request *q = NULL;
    crpci_zk_order o;
    int64_t now = crpci_zk_job_now(s);
    memset(&o, 0, sizeof o);
    o.version = -1;
    job->refs++;
    if (job->work->order(job, &o))
        q = crpci_zk_job_request(s, job, &o);
    if (q) {
        job->sent = q;
        crpci_zk_session_send(s, q);
    } else if (job->due_us <= now) {
        crpci_zk_job_later(job, CRPCI_ZK_JOB_RETRY_US);
    }
    crpci_zk_job_unref(job);
}

/* Gives the client the credential, which it then sends with each connection. The client refuses it
 * while it is between two dials, so this is repeated. Locked, unlocks meanwhile. */
CRPCI_FN void crpci_zk_session_authenticate(crpci_zk_session *s)
{
    crpci_zk_handle *handle = s->handle;
    int rc;
    if (handle->authed)
        return;
    crpci_loop_unlock(s->loop);
    rc = zoo_add_auth(handle->zh, "digest", s->credential, (int)strlen(s->credential), NULL, NULL);
    crpci_loop_lock(s->loop);
    handle->authed = rc == ZOK;
}

/* The job whose next request is due first. NULL: there is none, or requests may not be sent: with a
 * credential they may only after the client has taken it. */
CRPCI_FN crpci_zk_job *crpci_zk_session_next(crpci_zk_session *s)
{
    crpci_zk_job *first = NULL;
    crpci_list *i;
    if (s->phase != CRPCI_ZK_CONNECTED || !s->handle->authed || s->closing)
        return NULL;
    for (i = s->jobs.next; i != &s->jobs; i = i->next) {
        crpci_zk_job *job = CRPCI_CONTAINER(i, crpci_zk_job, node);
        if (!job->sent && (!first || job->due_us < first->due_us))
            first = job;
    }
    return first;
}

/* Calls zookeeper_init2 with all signals blocked: the client's threads inherit the mask, so that
 * none of them runs the program's signal handlers. Unlocked. */
CRPCI_FN zhandle_t *crpci_zk_session_init(const crpci_zk_session *s, crpci_zk_handle *handle)
{
    zhandle_t *zh;
    int failure;
#if !CRPC_ZOOKEEPER_ST
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
#endif
    zh = zookeeper_init2(s->servers.hosts, crpci_zk_session_on_session, s->timeout_ms, NULL, handle,
                         ZOO_NO_LOG_CLIENTENV, crpci_zk_session_on_log);
    failure = errno;
#if !CRPC_ZOOKEEPER_ST
    pthread_sigmask(SIG_SETMASK, &old, NULL);
#endif
    if (zh)
        zoo_set_servers_resolution_delay(zh, -1);
    errno = failure;
    return zh;
}

/* Makes a handle. That can fail: memory is short, or getaddrinfo refuses an IPv4 server while the
 * host has an IPv6 address but no IPv4 address yet. The caller is busy; locked, unlocks
 * meanwhile. */
CRPCI_FN void crpci_zk_session_connect(crpci_zk_session *s)
{
    crpci_zk_handle *handle = (crpci_zk_handle *)crpci_heap_alloc(s->heap, sizeof *handle);
    int64_t wait = crpci_zk_job_backoff(s, ++s->failures);
    int failure;
    crpci_zk_session_to(s, CRPCI_ZK_ABSENT, wait);
    if (!handle)
        return;
    crpci_list_init(&handle->requests);
    handle->session = s;
    handle->authed = !s->credential;
    s->refs++;
    s->handles++;
    s->handle = handle; /* events may come before zookeeper_init2 returns */
    crpci_zk_session_to(s, CRPCI_ZK_STARTING, CRPCI_ZK_SESSION_SILENT_US);
    s->id = 0;
    crpci_loop_unlock(s->loop);
    handle->zh = crpci_zk_session_init(s, handle);
    failure = errno;
    crpci_loop_lock(s->loop);
    if (!handle->zh) {
        s->handle = NULL;
        crpci_zk_session_to(s, CRPCI_ZK_ABSENT, wait);
        crpci_zk_session_handle_free(handle);
        if (!s->warned)
            crpci_heap_log(s->heap, CRPC_LOG_WARN,
                           "registry zookeeper://%s: zookeeper_init2: %s; next attempt in %d ms",
                           s->authority, strerror(failure), (int)(wait / 1000));
        s->warned = true;
        return;
    }
    crpci_zk_session_authenticate(s);
    s->again = true;
}

#if !CRPC_ZOOKEEPER_ST
/* The completion thread of a handle that was closed in its own callback is ending: no callback can
 * come. */
CRPCI_FN void crpci_zk_session_on_thread_end(void *data)
{
    crpci_zk_handle *handle = (crpci_zk_handle *)data;
    crpci_zk_session *s = handle->session;
    pthread_key_delete(handle->key);
    crpci_loop_lock(s->loop);
    s->refs++;
    crpci_zk_session_handle_free(handle);
    crpci_zk_session_unlock(s);
}

/* Whether the handle is being closed inside its own callback. If so, it will be freed when this
 * thread, its own, ends. If no key is available the handle is leaked: nothing else tells when
 * freeing is safe. */
CRPCI_FN bool crpci_zk_session_free_later(crpci_zk_handle *handle)
{
    if (!handle->inside || !crpci_thread_is_self(handle->thread))
        return false;
    if (pthread_key_create(&handle->key, crpci_zk_session_on_thread_end) == 0) {
        if (pthread_setspecific(handle->key, handle) == 0)
            return true;
        pthread_key_delete(handle->key);
    }
    handle->session->handles--; /* so that crpci_zk_session_shut does not wait for it */
    return true;
}
#endif

/* Closes the handle. Its session ends at once if a server can be told, and with it the ephemeral
 * nodes. The caller is busy; locked, unlocks meanwhile. */
CRPCI_FN void crpci_zk_session_disconnect(crpci_zk_session *s)
{
    crpci_zk_handle *handle = s->handle;
    bool later = false;
    s->handle = NULL;
    crpci_zk_session_to(s, CRPCI_ZK_ABSENT, crpci_zk_job_delay(s));
    if (!s->closing)
        crpci_heap_log(s->heap, CRPC_LOG_WARN,
                       "registry zookeeper://%s: session expired, refused or silent; opening "
                       "another",
                       s->authority);
    crpci_zk_job_over(s);
    if (!handle)
        return;
#if CRPC_ZOOKEEPER_ST
    crpci_watch_set(s->loop, &s->watch, s->fd, 0);
    s->fd = -1;
#else
    later = crpci_zk_session_free_later(handle);
#endif
    crpci_loop_unlock(s->loop);
    zookeeper_close(handle->zh);
    crpci_loop_lock(s->loop);
    if (!later)
        crpci_zk_session_handle_free(handle);
}

#if CRPC_ZOOKEEPER_ST
/* Lets the client read, write, and call back. Locked, unlocks meanwhile. */
CRPCI_FN void crpci_zk_session_process(crpci_zk_session *s)
{
    zhandle_t *zh = s->handle->zh;
    unsigned events = s->events;
    int before, after;
    s->events = 0;
    /* From here on the client may close its socket at any time, and another file of the program may
     * get the number: it is not watched until the client names its descriptor again. */
    crpci_watch_set(s->loop, &s->watch, s->fd, 0);
    crpci_loop_unlock(s->loop);
    before = zoo_state(zh);
    zookeeper_process(zh, (events & CRPC_READABLE ? ZOOKEEPER_READ : 0) |
                              (events & CRPC_WRITABLE ? ZOOKEEPER_WRITE : 0));
    after = zoo_state(zh);
    crpci_loop_lock(s->loop);
    /* Counted at most once per pace: the client redials within milliseconds, and a server that is
     * starting closes each connection. */
    if (before == ZOO_ASSOCIATING_STATE && after != before && after != ZOO_CONNECTED_STATE &&
        crpci_zk_session_absence(s) && !s->refusal) {
        s->refused++;
        s->refusal = true;
    }
}

/* Asks the client which descriptor and events to wait for. After an error its answers are invalid:
 * they may be those of a closed socket. */
CRPCI_FN void crpci_zk_session_interest(crpci_zk_session *s)
{
    zhandle_t *zh = s->handle->zh;
    int fd = -1, want = 0, rc, state;
    struct timeval tv;
    unsigned events;
    tv.tv_sec = 1;
    tv.tv_usec = 0;
    crpci_loop_unlock(s->loop);
    rc = zookeeper_interest(zh, &fd, &want, &tv);
    state = zoo_state(zh);
    crpci_loop_lock(s->loop);
    if (state != ZOO_CONNECTED_STATE && state != ZOO_READONLY_STATE)
        crpci_zk_session_disconnected(s); /* a loss noticed while sending raises no event */
    if (rc == ZINVALIDSTATE) {
        crpci_zk_session_to(s, CRPCI_ZK_OVER, INT64_MAX);
        s->again = true;
    }
    if (rc != ZOK) {
        fd = -1;
        /* a ping failed: only reading or writing reveals the loss */
        if (state == ZOO_CONNECTED_STATE)
            s->events = CRPC_READABLE | CRPC_WRITABLE;
    }
    events = fd < 0 ? 0
                    : (want & ZOOKEEPER_READ ? CRPC_READABLE : 0u) |
                          (want & ZOOKEEPER_WRITE ? CRPC_WRITABLE : 0u);
    if (fd >= 0 && (fd != s->fd || state != ZOO_CONNECTED_STATE))
        fcntl(fd, F_SETFD, FD_CLOEXEC);
    s->fd = fd;
    s->client_us = crpci_zk_job_now(s) + (int64_t)tv.tv_sec * 1000000 + tv.tv_usec;
    if (events && crpci_watch_set(s->loop, &s->watch, fd, events)) {
        s->events = events; /* no memory to watch it: call the client ten times a second */
        s->client_us = crpci_zk_job_now(s) + 100000;
    }
}

/* Lets the client run, and replaces a session that is over or must be abandoned. Closing a handle
 * may block this loop. The caller is busy; locked, unlocks meanwhile. */
CRPCI_FN void crpci_zk_session_renew(crpci_zk_session *s)
{
    if (s->handle)
        crpci_zk_session_process(s);
    if (crpci_zk_session_is_hopeless(s))
        crpci_zk_session_to(s, CRPCI_ZK_OVER, INT64_MAX);
    if (crpci_zk_session_absence(s) || s->phase == CRPCI_ZK_OVER)
        crpci_zk_session_age(s);
    if (s->phase == CRPCI_ZK_OVER && !s->closing)
        crpci_zk_session_disconnect(s);
}

/* The client dials by itself and crpci_zk_session_process sees how that ends: lets it count the
 * next refusal. */
CRPCI_FN void crpci_zk_session_probe(crpci_zk_session *s)
{
    s->refusal = false;
    s->due_us = crpci_zk_job_now(s) + crpci_zk_job_pace(s);
}
#else
/* Handles a failed probe: still no connection. Dials one server itself: a server that accepts
 * connections and never returns the session does not know the session. Unlocks meanwhile. */
CRPCI_FN void crpci_zk_session_probed(crpci_zk_session *s, crpci_zk_handle *handle, int rc)
{
    const crpci_addr *to;
    bool accepts;
    s->due_us = crpci_zk_job_now(s) + crpci_zk_job_pace(s);
    if (rc == ZOK || !crpci_zk_session_absence(s))
        return;
    crpci_zk_session_age(s);
    to = &s->servers.addr[s->turn++ % s->servers.count];
    crpci_loop_unlock(s->loop);
    accepts = crpci_zk_servers_reachable(to);
    crpci_loop_lock(s->loop);
    if (s->closing || s->handle != handle || !crpci_zk_session_absence(s) ||
        zoo_state(handle->zh) == ZOO_CONNECTED_STATE)
        return; /* connected this moment: that event is behind this one in the client's queue */
    s->refused += accepts;
    if (crpci_zk_session_is_hopeless(s))
        crpci_zk_session_to(s, CRPCI_ZK_OVER, INT64_MAX);
}

CRPCI_FN void crpci_zk_session_on_probe(int rc, const struct Stat *stat, const void *data)
{
    crpci_zk_handle *handle = (crpci_zk_handle *)(uintptr_t)data;
    crpci_zk_session *s = handle->session;
    (void)stat;
    crpci_zk_session_enter(handle);
    if (handle == s->handle && !s->closing)
        crpci_zk_session_probed(s, handle, rc);
    crpci_zk_session_leave(handle);
}

/* Sends a request whose completion, with or without an answer, comes on the completion thread.
 * Locked, unlocks meanwhile. */
CRPCI_FN void crpci_zk_session_probe(crpci_zk_session *s)
{
    crpci_zk_handle *handle = s->handle;
    int rc;
    crpci_loop_unlock(s->loop);
    rc = zoo_aexists(handle->zh, "/", 0, crpci_zk_session_on_probe, handle);
    crpci_loop_lock(s->loop);
    if (rc != ZOK)
        s->due_us = crpci_zk_job_now(s) + crpci_zk_job_pace(s);
}
#endif

/* Does what the phase has due. The caller is busy; locked, unlocks meanwhile. */
CRPCI_FN void crpci_zk_session_supervise(crpci_zk_session *s)
{
#if CRPC_ZOOKEEPER_ST
    crpci_zk_session_renew(s);
#endif
    if (s->closing || crpci_zk_job_now(s) < s->due_us)
        return;
    s->due_us = INT64_MAX;
    if (s->phase == CRPCI_ZK_ABSENT) {
        crpci_zk_session_connect(s);
    } else if (s->phase == CRPCI_ZK_LOST) {
        crpci_zk_session_probe(s);
    } else if (s->phase == CRPCI_ZK_STARTING && !s->warned) {
        s->warned = true;
        crpci_heap_log(s->heap, CRPC_LOG_WARN,
                       "registry zookeeper://%s: no server has answered yet; crpc keeps trying",
                       s->authority);
    }
}

/* Sets the timer to the next thing that is due. Locked. */
CRPCI_FN void crpci_zk_session_arm(crpci_zk_session *s)
{
    int64_t next = crpci_base_min64(s->due_us, crpci_cache_due(&s->cache));
    int64_t now = crpci_zk_job_now(s);
    const crpci_zk_job *job = crpci_zk_session_next(s);
    if (job)
        next = crpci_base_min64(next, job->due_us);
    if (s->phase == CRPCI_ZK_CONNECTED && !s->handle->authed)
        next = crpci_base_min64(next, now + CRPCI_ZK_JOB_RETRY_US / 10);
#if CRPC_ZOOKEEPER_ST
    if (s->handle)
        next = crpci_base_min64(next, s->client_us);
#endif
    if (next != INT64_MAX)
        crpci_loop_timer_set(s->loop, &s->timer, next - now);
    else
        crpci_loop_timer_cancel(s->loop, &s->timer);
}

/* Ends the session: waits briefly for answers, closes the handle, and releases the jobs. `closing`
 * is set and no thread is busy. Locked, unlocks meanwhile. */
CRPCI_COLD void crpci_zk_session_shut(crpci_zk_session *s)
{
    bool inside = s->handle && s->handle->inside && crpci_thread_is_self(s->handle->thread);
    int64_t until = crpci_zk_job_now(s) + (CRPC_ZOOKEEPER_ST ? 0 : CRPCI_ZK_SESSION_LINGER_US);
    s->busy = true;
    s->busy_thread = crpci_thread_self();
    s->deferred = false;
    crpci_loop_timer_cancel(s->loop, &s->timer);
    /* libzookeeper_mt leaks requests that are unfinished when it is closed. */
    while (s->phase == CRPCI_ZK_CONNECTED && !inside && !crpci_list_empty(&s->handle->requests) &&
           crpci_zk_job_now(s) < until)
        crpci_thread_wait(&s->cond, &s->loop->lock, until - crpci_zk_job_now(s));
    crpci_zk_session_disconnect(s);
    while (!crpci_list_empty(&s->jobs))
        crpci_zk_job_drop(CRPCI_CONTAINER(s->jobs.next, crpci_zk_job, node));
    s->busy = false;
    crpci_thread_broadcast(&s->cond);
    while (s->handles && !inside)
        crpci_thread_wait(&s->cond, &s->loop->lock, -1);
}

/* Does everything that is due. If another thread is busy, that thread will do it (`again`). Locked,
 * unlocks meanwhile. */
CRPCI_FN void crpci_zk_session_run(crpci_zk_session *s)
{
    crpci_zk_job *job;
    s->again = true;
    if (s->busy || s->closing)
        return;
    s->busy = true;
    s->busy_thread = crpci_thread_self();
    while (s->again && !s->closing) {
        s->again = false;
        crpci_zk_session_supervise(s);
        if (s->phase == CRPCI_ZK_CONNECTED && !s->closing)
            crpci_zk_session_authenticate(s);
        while ((job = crpci_zk_session_next(s)) != NULL && job->due_us <= crpci_zk_job_now(s))
            crpci_zk_session_issue(s, job);
#if CRPC_ZOOKEEPER_ST
        if (s->handle && !s->closing)
            crpci_zk_session_interest(s);
#endif
    }
    if (!s->closing)
        crpci_zk_session_arm(s);
    s->busy = false;
    crpci_thread_broadcast(&s->cond);
    if (s->deferred)
        crpci_zk_session_shut(s);
}

#if !CRPC_ZOOKEEPER_ST
/* Replaces the handle on its own completion thread. That thread has nothing else to do any more, so
 * it can also wait for the delay. Locked, unlocks meanwhile. */
CRPCI_COLD void crpci_zk_session_replace(crpci_zk_session *s, const crpci_zk_handle *handle)
{
    crpci_zk_session_age(s);
    while (s->busy && !s->closing)
        crpci_thread_wait(&s->cond, &s->loop->lock, -1);
    if (s->closing || s->handle != handle)
        return;
    s->busy = true;
    s->busy_thread = crpci_thread_self();
    crpci_zk_session_disconnect(s);
    while (!s->closing && !s->handle) {
        int64_t left = s->due_us - crpci_zk_job_now(s);
        if (left > 0)
            crpci_thread_wait(&s->cond, &s->loop->lock, left);
        else
            crpci_zk_session_connect(s);
    }
    s->busy = false;
    crpci_thread_broadcast(&s->cond);
    crpci_zk_session_run(s);
}
#endif

/* Writes the cache file when it is due. Unlocks meanwhile. */
CRPCI_FN void crpci_zk_session_save(crpci_zk_session *s)
{
    if (!s->closing && crpci_cache_due(&s->cache) <= crpci_zk_job_now(s))
        crpci_cache_save(&s->cache, s->loop, &s->cond);
}

static void crpci_zk_session_leave(crpci_zk_handle *handle)
{
    crpci_zk_session *s = handle->session;
    crpc_loop *l = s->loop;
    crpci_zk_session_run(s);
#if !CRPC_ZOOKEEPER_ST
    if (s->phase == CRPCI_ZK_OVER && s->handle == handle)
        crpci_zk_session_replace(s, handle);
    crpci_zk_session_save(s); /* here and not only in the loop: writing waits for the disk */
#endif
    handle->inside = false;
    crpci_loop_unlock(l);
}

/* --- callbacks of the loop -------------------------------------------------------------------- */

CRPCI_FN void crpci_zk_session_on_timer(crpc_loop *l, crpci_timer *timer)
{
    crpci_zk_session *s = CRPCI_CONTAINER(timer, crpci_zk_session, timer);
    s->refs++;
    crpci_zk_session_run(s);
    crpci_zk_session_save(s);
    crpci_zk_session_unlock(s);
    crpci_loop_lock(l);
}

#if CRPC_ZOOKEEPER_ST
CRPCI_FN void crpci_zk_session_on_event(crpc_loop *l, crpci_watch *watch, unsigned events)
{
    crpci_zk_session *s = CRPCI_CONTAINER(watch, crpci_zk_session, watch);
    s->events |= events;
    crpci_zk_session_on_timer(l, &s->timer);
}
#endif

/* Schedules a run by the loop's timer. For callers that must not unlock or call the client.
 * Locked. */
CRPCI_FN void crpci_zk_session_soon(crpci_zk_session *s)
{
    s->again = true;
    if (!s->busy && !s->closing)
        crpci_loop_timer_set(s->loop, &s->timer, 0);
}

/* Runs what is due now, or schedules it where only the loop's thread may call the client. Locked,
 * unlocks meanwhile. */
CRPCI_FN void crpci_zk_session_kick(crpci_zk_session *s)
{
    if (CRPC_ZOOKEEPER_ST)
        crpci_zk_session_soon(s);
    else
        crpci_zk_session_run(s);
}
#endif /* CRPC_ENABLE_ZOOKEEPER */

/* ======================================================================== */
/* >>impl-zk-pool   sessions that several users of a loop share: opening, closing */
/* ======================================================================== */

#if CRPC_ENABLE_ZOOKEEPER

/* Channels, servers and registries of a loop that name the same servers, credential, timeout and
 * cache file join one session here; the last one to leave closes it. Opening resolves names and so
 * blocks the calling thread, without the lock; it never waits for a server. */

#define CRPCI_ZK_POOL_SPREAD_MS      2000
#define CRPCI_ZK_POOL_TIMEOUT_MS     15000
#define CRPCI_ZK_POOL_TIMEOUT_MIN_MS 200 /* the client redials every sixtieth of it */

/* Whether two texts are equal; NULL equals "". */
CRPCI_FN bool crpci_zk_pool_same(const char *a, const char *b)
{
    return strcmp(a ? a : "", b ? b : "") == 0;
}

/* The open session with the same servers and options, or NULL. Locked. */
CRPCI_FN crpci_zk_session *crpci_zk_pool_find(crpc_loop *l, const char *authority,
                                              const crpci_directory_options *o)
{
    crpci_list *i;
    for (i = l->registries.next; i != &l->registries; i = i->next) {
        crpci_zk_session *s = CRPCI_CONTAINER(i, crpci_zk_session, node);
        if (strcmp(s->authority, authority) == 0 && s->timeout_ms == o->session_timeout_ms &&
            crpci_zk_pool_same(s->credential, o->credential) &&
            crpci_zk_pool_same(s->cache.path, o->cache))
            return s;
    }
    return NULL;
}

/* Makes a session that is not in the loop's list yet. Resolves names, so it must run unlocked. */
CRPCI_COLD int crpci_zk_pool_new(crpc_loop *l, const char *authority,
                                 const crpci_directory_options *o, crpci_zk_session **out,
                                 crpc_error *error)
{
    crpci_zk_session *s = (crpci_zk_session *)crpci_heap_alloc(l->heap, sizeof *s);
    int err = CRPC_OK;
    *out = NULL;
    if (!s || crpci_thread_cond_init(&s->cond)) {
        crpci_heap_free(l->heap, s, sizeof *s);
        return crpci_status_set(error, CRPC_ENOMEM, "zookeeper://%.150s: out of memory", authority);
    }
    crpci_loop_hold(l);
    crpci_list_init(&s->node);
    crpci_list_init(&s->jobs);
    s->loop = l;
    s->heap = l->heap;
    s->refs = 1;
    s->users = 1;
    s->timeout_ms = o->session_timeout_ms;
    s->spread_us = crpci_base_option(o->spread_ms, CRPCI_ZK_POOL_SPREAD_MS, 0) * 1000;
    crpci_timer_init(&s->timer, crpci_zk_session_on_timer);
#if CRPC_ZOOKEEPER_ST
    crpci_watch_init(&s->watch, crpci_zk_session_on_event);
    s->fd = -1;
#endif
    crpci_list_init(&s->services);
    s->servers.heap = s->cache.heap = s->heap;
    s->authority = crpci_heap_strndup(s->heap, authority, strlen(authority));
    if (o->credential)
        s->credential = crpci_heap_strndup(s->heap, o->credential, strlen(o->credential));
    if (!s->authority || (o->credential && !s->credential) ||
        (o->cache && !crpci_cache_init(&s->cache, s->heap, o->cache, o->cache_interval_ms)))
        err = CRPC_ENOMEM;
    s->servers.authority = s->authority;
    err = err ? err : crpci_zk_servers_resolve(&s->servers, error);
    err = err ? err : crpci_zk_servers_list(&s->servers, l);
    if (err == CRPC_ENOMEM)
        crpci_status_set(error, err, "zookeeper://%.150s: out of memory", authority);
    if (err) {
        crpci_zk_session_free(s);
        return err;
    }
    *out = s;
    return CRPC_OK;
}

/* Joins the open session with the same options, or begins one. Resolves names; never waits for a
 * server. */
CRPCI_COLD int crpci_zk_pool_open(crpc_loop *l, const char *authority,
                                  const crpci_directory_options *options, crpci_zk_session **out,
                                  crpc_error *error)
{
    crpci_directory_options o = *options;
    crpci_zk_session *s, *made = NULL;
    int err = CRPC_OK;
    o.session_timeout_ms = (int)crpci_base_option(o.session_timeout_ms, CRPCI_ZK_POOL_TIMEOUT_MS,
                                                  CRPCI_ZK_POOL_TIMEOUT_MS);
    if (o.session_timeout_ms < CRPCI_ZK_POOL_TIMEOUT_MIN_MS)
        o.session_timeout_ms = CRPCI_ZK_POOL_TIMEOUT_MIN_MS;
    crpci_loop_lock(l);
    s = crpci_zk_pool_find(l, authority, &o);
    if (!s) { /* without the lock, to resolve names: another thread may open the same meanwhile */
        crpci_loop_unlock(l);
        err = crpci_zk_pool_new(l, authority, &o, &made, error);
        if (err)
            return err;
        crpci_loop_lock(l);
        s = crpci_zk_pool_find(l, authority, &o);
    }
    if (s) {
        s->refs++;
        s->users++;
    } else {
        s = made;
        made = NULL;
        crpci_list_append(&l->registries, &s->node);
        crpci_zk_session_kick(s); /* makes a handle; after a failure the timer tries again */
    }
    crpci_loop_unlock(l);
    if (made)
        crpci_zk_session_free(made);
    *out = s;
    return CRPC_OK;
}

/* A user begins to close. Returns true for the last one; the session then accepts nothing new and
 * is no longer found. Locked; crpci_zk_pool_close must follow. */
CRPCI_FN bool crpci_zk_pool_leave(crpci_zk_session *s)
{
    if (--s->users)
        return false;
    s->closing = true;
    crpci_list_remove(&s->node);
    crpci_thread_broadcast(&s->cond);
    return true;
}

/* Completes what crpci_zk_pool_leave began, and unlocks. With libzookeeper_mt and a server
 * that hangs, this can take up to 4.5 s. */
CRPCI_FN void crpci_zk_pool_close(crpci_zk_session *s, bool last)
{
    if (last && s->busy && CRPC_ZOOKEEPER_ST && crpci_thread_is_self(s->busy_thread)) {
        s->deferred = true;
    } else if (last) {
        while (s->busy || s->cache.writing)
            crpci_thread_wait(&s->cond, &s->loop->lock, -1);
        if (crpci_cache_due(&s->cache) != INT64_MAX) /* unsaved news: write them now */
            crpci_cache_save(&s->cache, s->loop, &s->cond);
        crpci_zk_session_shut(s);
    }
    crpci_zk_session_unlock(s);
}
#endif /* CRPC_ENABLE_ZOOKEEPER */

/* ======================================================================== */
/* >>impl-zk-node   the two primitives: watching a znode, and owning one   */
/* ======================================================================== */

#if CRPC_ENABLE_ZOOKEEPER

/* Everything that crpc does in ZooKeeper for longer than one request is one of these two jobs. They
 * alone set watches again, decide what follows a request without an answer, when to retry and when
 * to read again. Their callbacks come locked, on the thread that runs the client. */

#define CRPCI_ZK_NODE_REFUSED_US 5000000   /* between reads that the server refuses */
#define CRPCI_ZK_NODE_REREAD_US  300000000 /* between reads without an event: a watch can be lost */
#define CRPCI_ZK_NODE_CHECK_US   60000000  /* between checks that the own node still exists */
#define CRPCI_ZK_NODE_BACK_US    500000    /* before a node that was removed is made again */
#define CRPCI_ZK_NODE_FIGHTS     3u        /* evictions of another session's node without a wait */
/* failed removals; then it is left to the session's end */
#define CRPCI_ZK_NODE_FORGET     10u

/* --- paths and numbers ------------------------------------------------------------------------ */

/* "directory/name" on the heap. NULL: out of memory. */
CRPCI_FN char *crpci_zk_node_join(crpci_heap *h, const char *directory, const char *name)
{
    return crpci_heap_format(h, "%s/%s", directory, name);
}

/* Whether ZooKeeper accepts a text as one part of a path. */
CRPCI_FN bool crpci_zk_node_is_part(const char *text, size_t n)
{
    size_t i;
    if (n == 0 || (n == 1 && text[0] == '.') || (n == 2 && text[0] == '.' && text[1] == '.'))
        return false;
    for (i = 0; i < n; i++) {
        if ((unsigned char)text[i] < ' ' || text[i] == 0x7f || text[i] == '/')
            return false;
    }
    return true;
}

/* Whether the first `n` bytes of a path are such parts with single slashes between them. */
CRPCI_FN bool crpci_zk_node_is_path(const char *path, size_t n)
{
    size_t at, part;
    for (at = 0; at < n; at += part + 1) {
        part = crpci_base_min(strcspn(path + at, "/"), n - at);
        if (!crpci_zk_node_is_part(path + at, part))
            return false;
    }
    return n == 0 || path[n - 1] != '/';
}

/* Makes the root of a tree from a URL's path: "a/b" and "a/b/" give "/a/b", "" gives
 * `otherwise`. */
CRPCI_COLD int crpci_zk_node_root(crpci_heap *h, const char *path, const char *otherwise,
                                  char **out, crpc_error *error)
{
    size_t n = strlen(path);
    while (n && path[n - 1] == '/')
        n--;
    if (!crpci_zk_node_is_path(path, n))
        return crpci_status_set(error, CRPC_EINVAL,
                                "zookeeper: root \"%.100s\" is not a valid path: it has an empty "
                                "part, \".\", \"..\" or a control character",
                                path);
    *out = n ? crpci_heap_format(h, "/%.*s", (int)n, path)
             : crpci_heap_strndup(h, otherwise, strlen(otherwise));
    return *out ? CRPC_OK : crpci_status_set(error, CRPC_ENOMEM, "zookeeper: out of memory");
}

/* The names in the answer to a LIST, and their number. NULL: none. */
CRPCI_FN char *const *crpci_zk_node_names(const crpci_zk_answer *a, size_t *count)
{
    *count = a->rc == ZOK && a->names && a->names->count > 0 ? (size_t)a->names->count : 0;
    return *count ? a->names->data : NULL;
}

/* Reads a sequential node's number, which ZooKeeper writes with "%010d". The counter wraps:
 * -2147483648 follows 2147483647. False: not such a number. */
CRPCI_FN bool crpci_zk_node_number(const char *text, int32_t *number)
{
    bool negative = *text == '-';
    size_t digits = 0;
    int64_t v = 0;
    for (text += negative; *text >= '0' && *text <= '9' && digits < 11; text++, digits++)
        v = v * 10 + (*text - '0');
    v = negative ? -v : v;
    if (*text || (digits != 10 && !(negative && digits == 9)) || v > INT32_MAX || v < INT32_MIN)
        return false;
    *number = (int32_t)v;
    return true;
}

/* Whether number `a` was given out before `b`, assuming that less than half of the range lies
 * between. */
CRPCI_FN bool crpci_zk_node_earlier(int32_t a, int32_t b)
{
    return (uint32_t)a - (uint32_t)b > UINT32_C(0x80000000);
}

/* --- watch ------------------------------------------------------------------------------------ */

typedef enum crpci_zk_watch_kind {
    CRPCI_ZK_WATCH_CHILDREN,      /* reports the names below the node */
    CRPCI_ZK_WATCH_DATA,          /* reports its bytes */
    CRPCI_ZK_WATCH_CHILDREN_ONCE, /* reports the names once; sets no watch */
    CRPCI_ZK_WATCH_END            /* reports once, when the node does not exist */
} crpci_zk_watch_kind;

/* Follows a node. `value` is called with each answer: at first, after each change, after each
 * reconnect, and every few minutes. The answer's rc is ZOK, ZNONODE (the node does not exist), or
 * the reason why it cannot be read (then it is read again soon). `value` may unlock, except when it
 * reports an END. If it returns false, out of memory, the same is read again. */
typedef struct crpci_zk_watch {
    crpci_zk_job job;
    bool (*value)(struct crpci_zk_watch *w, const crpci_zk_answer *a);
    crpci_zk_watch_kind kind;
    char *path;   /* on the heap */
    bool missing; /* the node did not exist: the next request sets a watch on its creation */
    bool told;    /* `value` was called in this session */
    bool refused; /* the server refuses to let it be read, which was logged */
} crpci_zk_watch;

/* Reads the node or, while it does not exist, asks whether it exists: either request sets a
 * watch. */
CRPCI_FN bool crpci_zk_node_watch_order(crpci_zk_job *job, crpci_zk_order *o)
{
    crpci_zk_watch *w = CRPCI_CONTAINER(job, crpci_zk_watch, job);
    bool children = w->kind == CRPCI_ZK_WATCH_CHILDREN || w->kind == CRPCI_ZK_WATCH_CHILDREN_ONCE;
    o->verb = w->missing ? CRPCI_ZK_STAT : children ? CRPCI_ZK_LIST : CRPCI_ZK_GET;
    o->watch = w->kind != CRPCI_ZK_WATCH_CHILDREN_ONCE;
    o->path = w->path;
    return true;
}

/* Decides what an answer means, schedules the next read, and calls `value`. */
CRPCI_FN void crpci_zk_node_watch_answered(crpci_zk_watch *w, const crpci_zk_request *q,
                                           const crpci_zk_answer *a)
{
    crpci_zk_job *job = &w->job;
    bool follows = w->kind == CRPCI_ZK_WATCH_CHILDREN || w->kind == CRPCI_ZK_WATCH_DATA;
    bool looked = q->order.verb == CRPCI_ZK_STAT, gone = a->rc == ZNONODE;
    w->missing = gone && !looked && follows;
    if (w->missing || (looked && a->rc == ZOK)) { /* ask for its creation; or it exists: read it */
        job->due_us = 0;
        return;
    }
    if (a->rc != ZOK && !gone && !w->refused)
        crpci_heap_log(job->session->heap, CRPC_LOG_WARN,
                       "registry zookeeper://%s: %s cannot be read: %s; trying again",
                       job->session->authority, w->path, zerror(a->rc));
    w->refused = a->rc != ZOK && !gone;
    if (w->refused)
        crpci_zk_job_around(job, CRPCI_ZK_NODE_REFUSED_US, 20);
    else if (w->kind == CRPCI_ZK_WATCH_END && !gone)
        crpci_zk_job_around(job, CRPCI_ZK_NODE_CHECK_US, 20);
    else if (follows)
        crpci_zk_job_around(job, CRPCI_ZK_NODE_REREAD_US, 20);
    if (w->kind == CRPCI_ZK_WATCH_END && !gone)
        return;
    w->told = true;
    if (!w->value(w, a))
        crpci_zk_job_later(job, CRPCI_ZK_JOB_RETRY_US);
}

CRPCI_FN void crpci_zk_node_watch_event(crpci_zk_job *job, crpci_zk_event event,
                                        const crpci_zk_request *q, const crpci_zk_answer *a)
{
    crpci_zk_watch *w = CRPCI_CONTAINER(job, crpci_zk_watch, job);
    if (event == CRPCI_ZK_ANSWERED) {
        crpci_zk_node_watch_answered(w, q, a);
        return;
    }
    if (job->due_us == INT64_MAX && !job->sent) /* idle: it has reported once, or has not begun */
        return;
    if (event == CRPCI_ZK_REMOVED && w->kind == CRPCI_ZK_WATCH_END) {
        const crpci_zk_answer gone = {ZNONODE, NULL, NULL, NULL, 0};
        job->due_us = INT64_MAX;
        if (!w->value(w, &gone))
            crpci_zk_job_later(job, CRPCI_ZK_JOB_RETRY_US);
        return;
    }
    if (event == CRPCI_ZK_RENEWED)
        w->told = false;
    if (event == CRPCI_ZK_RESUMED && w->told)
        /* In the same session, watches report what was missed. Reading is only a safety net, so it
         * is spread over time for the sake of a whole fleet. */
        crpci_zk_job_later(job, crpci_zk_job_scatter(job->session));
    else if (event != CRPCI_ZK_SUSPENDED && event != CRPCI_ZK_ENDED) {
        job->due_us = 0;
        w->missing = false;
    }
}

CRPCI_FN void crpci_zk_node_watch_clear(crpci_zk_job *job)
{
    crpci_heap_strfree(job->session->heap, CRPCI_CONTAINER(job, crpci_zk_watch, job)->path);
}

static const crpci_zk_work crpci_zk_node_watch_work = {
    crpci_zk_node_watch_order, crpci_zk_node_watch_event, crpci_zk_node_watch_clear};

/* Begins to follow `path`, in place of the path before; it takes over the text. False if `path` is
 * NULL, because memory is short or nothing is to be followed. The caller kicks the session. */
CRPCI_FN bool crpci_zk_node_watch_set(crpci_zk_watch *w, crpci_zk_watch_kind kind, char *path)
{
    crpci_zk_job_forget(&w->job);
    crpci_heap_strfree(w->job.session->heap, w->path);
    w->path = path;
    w->kind = kind;
    w->missing = w->told = w->refused = false;
    w->job.watched = kind == CRPCI_ZK_WATCH_CHILDREN_ONCE ? NULL : path;
    w->job.due_us = path ? 0 : INT64_MAX;
    return path != NULL;
}

/* Stops reading; crpci_zk_node_watch_again begins anew. */
CRPCI_FN void crpci_zk_node_watch_stop(crpci_zk_watch *w)
{
    crpci_zk_job_forget(&w->job);
    w->job.due_us = INT64_MAX;
}

/* Reads the node now; the answer to a request in flight is ignored. */
CRPCI_FN void crpci_zk_node_watch_again(crpci_zk_watch *w)
{
    crpci_zk_job_forget(&w->job);
    w->job.due_us = 0;
}

/* Puts an idle watch on the session; crpci_zk_node_watch_again begins. It takes over `path`, which
 * may be NULL, and a reference to its holder. */
CRPCI_FN void crpci_zk_node_watch_init(crpci_zk_watch *w, crpci_zk_session *s,
                                       crpci_zk_watch_kind kind, char *path,
                                       bool (*value)(crpci_zk_watch *, const crpci_zk_answer *),
                                       void *holder, void (*release)(void *holder))
{
    crpci_zk_job_add(&w->job, &crpci_zk_node_watch_work, s, INT64_MAX, holder, release);
    w->value = value;
    crpci_zk_node_watch_set(w, kind, path);
    crpci_zk_node_watch_stop(w);
}

/* --- own -------------------------------------------------------------------------------------- */

/* The states of an owned node, the request that is sent in each, and the state that the answer
 * leads to. A request without an answer is sent again; the one exception is named. Where several
 * states can follow, the owner's wish (below) decides.
 *
 *     ABSENT  nothing is there                 nothing             wanted: CREATE
 *     CREATE  under a new name                 create              ok: OWNED; exists: CHECK;
 *                                                                  sequential, no answer: FIND
 *     FIND    sequential: was it made?         list the directory  none: AGAIN; one: OWNED;
 *                                                                  several: REMOVE the later
 *     AGAIN   sequential: under the same name  create              ok: FIND; no answer: FIND
 *     CHECK   a node of this name: whose?      exists              ours: OWNED; none: CREATE;
 *                                                                  another session's: EVICT
 *     OWNED   this session's, as of late       exists, every       as in CHECK
 *                                              check_us
 *     EVICT   another session's, perhaps of    delete              gone: CREATE
 *             an earlier run of this program
 *     REMOVE  ours, not wanted (any more)      delete              gone: FIND if there may be a
 *                                                                  second one, else ABSENT
 *
 * As soon as no node is wanted, all of them become REMOVE, FIND or ABSENT, by what may be there.
 * The end of the session takes its nodes with it: OWNED becomes CREATE. */
typedef enum crpci_zk_own_state {
    CRPCI_ZK_OWN_ABSENT,
    CRPCI_ZK_OWN_CREATE,
    CRPCI_ZK_OWN_FIND,
    CRPCI_ZK_OWN_AGAIN,
    CRPCI_ZK_OWN_CHECK,
    CRPCI_ZK_OWN_OWNED,
    CRPCI_ZK_OWN_EVICT,
    CRPCI_ZK_OWN_REMOVE
} crpci_zk_own_state;

typedef enum crpci_zk_wish {
    CRPCI_ZK_WISH_UNWANTED,
    CRPCI_ZK_WISH_ENDED,  /* unwanted; the job leaves the session when the node is removed */
    CRPCI_ZK_WISH_AFRESH, /* unwanted until the node is removed, then WANTED */
    CRPCI_ZK_WISH_WANTED
} crpci_zk_wish;

typedef struct crpci_zk_own crpci_zk_own;

/* Functions of a node's owner. All are called locked. */
typedef struct crpci_zk_owner {
    /* Returns the path of the node to be made, on the heap; for a sequential one, the part before
     * the number, different each time. NULL: no path now, or no memory. Must not unlock. */
    char *(*name)(crpci_zk_own *own);
    /* The node existed and belonged to this session at some time after `sent_us`. Called with each
     * check; `news` is set only the first time since it was made. `stat` is NULL when it was just
     * made or found. May unlock. */
    void (*owned)(crpci_zk_own *own, int64_t sent_us, const struct Stat *stat, bool news);
    /* ZNONODE: another client removed the node. ZSESSIONEXPIRED: the session is over. Other codes:
     * an attempt failed for a reason that a new connection does not cure; then it may unlock. A
     * wanted node is tried again in all cases. */
    void (*lost)(crpci_zk_own *own, int rc);
} crpci_zk_owner;

/* An ephemeral node that this process wants to exist, or to be removed. */
struct crpci_zk_own {
    crpci_zk_job job;
    const crpci_zk_owner *owner;
    crpci_zk_own_state state;
    crpci_zk_wish wish;
    bool sequential;
    bool unwatched;   /* sets no watch: the next check notices a removal */
    const char *dir;  /* the directory; the owner's memory */
    const char *data; /* the node's content; the owner's memory */
    int size;
    int64_t check_us; /* between two checks */
    char *path;       /* of the node, once it may exist; NULL: none does */
    /* sequential: name without number, while a create may have made it; or NULL */
    char *prefix;
    unsigned failures;
    unsigned fights; /* how often in a row the node was another session's */
};

/* Replaces own->path or own->prefix. */
CRPCI_FN void crpci_zk_node_own_set(crpci_zk_own *own, char **text, char *value)
{
    crpci_heap_strfree(own->job.session->heap, *text);
    *text = value;
    own->job.watched = own->path;
}

/* Adjusts the state to the wish, and schedules the state's request. If a request is in flight, its
 * answer leads back here. */
CRPCI_FN void crpci_zk_node_own_next(crpci_zk_own *own)
{
    bool there = own->path || own->prefix;
    if (own->job.sent)
        return;
    if (own->wish == CRPCI_ZK_WISH_AFRESH && !there) {
        own->wish = CRPCI_ZK_WISH_WANTED;
        own->state = CRPCI_ZK_OWN_ABSENT;
    }
    if (own->wish != CRPCI_ZK_WISH_WANTED)
        own->state = own->path     ? CRPCI_ZK_OWN_REMOVE
                     : own->prefix ? CRPCI_ZK_OWN_FIND
                                   : CRPCI_ZK_OWN_ABSENT;
    else if (own->state == CRPCI_ZK_OWN_ABSENT)
        own->state = CRPCI_ZK_OWN_CREATE;
    own->job.due_us = own->state == CRPCI_ZK_OWN_ABSENT ? INT64_MAX : 0;
    if (own->wish == CRPCI_ZK_WISH_ENDED && !there)
        crpci_zk_job_drop(&own->job);
}

CRPCI_FN void crpci_zk_node_own_to(crpci_zk_own *own, crpci_zk_own_state state)
{
    own->state = state;
    crpci_zk_node_own_next(own);
}

/* Postpones the state's request. */
CRPCI_FN void crpci_zk_node_own_wait(crpci_zk_own *own, int64_t us)
{
    if (own->job.due_us != INT64_MAX)
        crpci_zk_job_later(&own->job, us);
}

/* An attempt failed, and retrying at once would not help: backs off. */
CRPCI_FN void crpci_zk_node_own_fail(crpci_zk_own *own, int rc, const char *why)
{
    crpci_zk_session *s = own->job.session;
    bool wanted = own->wish == CRPCI_ZK_WISH_WANTED;
    int64_t wait = crpci_zk_job_backoff(s, own->failures);
    if (own->failures++ % 10 == 0)
        crpci_heap_log(s->heap, CRPC_LOG_WARN,
                       "registry zookeeper://%s: cannot %s a node in %s: %s; next attempt in %d ms",
                       s->authority, wanted ? "make" : "remove", own->dir, why, (int)(wait / 1000));
    if (!wanted && own->failures > CRPCI_ZK_NODE_FORGET) { /* ends with the session */
        crpci_zk_node_own_set(own, &own->path, NULL);
        crpci_zk_node_own_set(own, &own->prefix, NULL);
    }
    crpci_zk_node_own_next(own);
    crpci_zk_node_own_wait(own, wait);
    if (rc && wanted)
        own->owner->lost(own, rc);
}

/* Determines the name of the node to be made. If a node may exist under an earlier name, because
 * the local address has changed, that one is removed first. False: not now. */
CRPCI_FN bool crpci_zk_node_own_name(crpci_zk_own *own)
{
    char *path = own->owner->name(own);
    if (!path) {
        crpci_zk_node_own_fail(own, 0,
                               "no local address can reach the servers (name one with the "
                               "option `advertise`), or out of memory");
        return false;
    }
    if (own->path && strcmp(own->path, path) != 0) {
        crpci_heap_strfree(own->job.session->heap, path);
        own->state = CRPCI_ZK_OWN_REMOVE;
    } else {
        crpci_zk_node_own_set(own, own->sequential ? &own->prefix : &own->path, path);
    }
    return true;
}

/* The state's request, by the table above. The wish may have changed while a parent was created. */
CRPCI_FN bool crpci_zk_node_own_order(crpci_zk_job *job, crpci_zk_order *o)
{
    static const uint8_t verbs[] = {CRPCI_ZK_STAT,   CRPCI_ZK_CREATE, CRPCI_ZK_LIST,
                                    CRPCI_ZK_CREATE, CRPCI_ZK_STAT,   CRPCI_ZK_STAT,
                                    CRPCI_ZK_DELETE, CRPCI_ZK_DELETE};
    crpci_zk_own *own = CRPCI_CONTAINER(job, crpci_zk_own, job);
    crpci_zk_node_own_next(own);
    if (own->state == CRPCI_ZK_OWN_CREATE && !crpci_zk_node_own_name(own))
        return false;
    o->verb = (crpci_zk_verb)verbs[own->state];
    o->path = o->verb == CRPCI_ZK_LIST ? own->dir : own->path ? own->path : own->prefix;
    o->watch = o->verb == CRPCI_ZK_STAT && !own->unwatched;
    o->data = own->data;
    o->size = own->size;
    o->flags = CRPC_NODE_EPHEMERAL | CRPC_NODE_PARENTS;
    o->flags |= own->sequential ? CRPC_NODE_SEQUENTIAL : 0;
    return o->path != NULL;
}

/* The node exists and is ours. One that was just made is checked at once, which sets the watch. */
CRPCI_FN void crpci_zk_node_own_mine(crpci_zk_own *own, int64_t sent_us, const struct Stat *stat)
{
    bool news = own->state != CRPCI_ZK_OWN_OWNED;
    own->failures = own->fights = 0;
    crpci_zk_node_own_to(own, CRPCI_ZK_OWN_OWNED);
    if (own->state != CRPCI_ZK_OWN_OWNED)
        return; /* no longer wanted: it is being removed */
    if (stat || own->unwatched)
        crpci_zk_job_around(&own->job, own->check_us, 20);
    own->owner->owned(own, sent_us, stat, news);
}

/* A create succeeded. */
CRPCI_FN void crpci_zk_node_own_made(crpci_zk_own *own, int64_t sent_us, const char *path)
{
    bool again = own->state == CRPCI_ZK_OWN_AGAIN;
    if (own->sequential) {
        char *copy =
            again || !path ? NULL : crpci_heap_strndup(own->job.session->heap, path, strlen(path));
        if (!copy) { /* out of memory, or an earlier create may have made a second one: list them */
            crpci_zk_node_own_to(own, CRPCI_ZK_OWN_FIND);
            return;
        }
        crpci_zk_node_own_set(own, &own->prefix, NULL);
        crpci_zk_node_own_set(own, &own->path, copy);
    }
    crpci_zk_node_own_mine(own, sent_us, NULL);
}

/* Each create whose answer was lost may have made a node, so there may be several. The directory
 * has been listed: keeps the earliest node with this prefix and removes a later one. */
CRPCI_FN void crpci_zk_node_own_found(crpci_zk_own *own, int64_t sent_us, const crpci_zk_answer *a)
{
    const char *base = strrchr(own->prefix, '/') + 1, *first = NULL, *later = NULL;
    size_t count, i, n = strlen(base);
    char *const *names = crpci_zk_node_names(a, &count);
    int32_t number, least = 0;
    char *path;
    for (i = 0; i < count; i++) {
        if (!names[i] || strncmp(names[i], base, n) != 0 ||
            !crpci_zk_node_number(names[i] + n, &number))
            continue;
        if (!first || crpci_zk_node_earlier(number, least)) {
            later = first;
            first = names[i];
            least = number;
        } else {
            later = names[i];
        }
    }
    if (!first) {
        if (own->wish != CRPCI_ZK_WISH_WANTED)
            crpci_zk_node_own_set(own, &own->prefix, NULL);
        crpci_zk_node_own_to(own, CRPCI_ZK_OWN_AGAIN);
        return;
    }
    path = crpci_zk_node_join(own->job.session->heap, own->dir, later ? later : first);
    if (!path) {
        crpci_zk_job_later(&own->job, CRPCI_ZK_JOB_RETRY_US);
        return;
    }
    crpci_zk_node_own_set(own, &own->path, path);
    if (later || own->wish != CRPCI_ZK_WISH_WANTED) {
        crpci_zk_node_own_to(own, CRPCI_ZK_OWN_REMOVE);
        return;
    }
    crpci_zk_node_own_set(own, &own->prefix, NULL);
    crpci_zk_node_own_mine(own, sent_us, NULL);
}

/* The node does not exist, or belongs to another session (`foreign`): left by a process of the same
 * name that died a moment ago, or by this process before its session expired. It would vanish with
 * that session, so it is made anew. */
CRPCI_FN void crpci_zk_node_own_lose(crpci_zk_own *own, bool foreign)
{
    bool tell = own->wish == CRPCI_ZK_WISH_WANTED && own->state == CRPCI_ZK_OWN_OWNED;
    if (own->sequential)
        crpci_zk_node_own_set(own, &own->path, NULL);
    own->state = foreign && own->path ? CRPCI_ZK_OWN_EVICT : CRPCI_ZK_OWN_CREATE;
    if (tell)
        own->owner->lost(own, ZNONODE);
    crpci_zk_node_own_next(own);
    if (own->state == CRPCI_ZK_OWN_EVICT && ++own->fights > CRPCI_ZK_NODE_FIGHTS)
        crpci_zk_node_own_wait(
            own, crpci_zk_job_backoff(own->job.session, own->fights - CRPCI_ZK_NODE_FIGHTS));
}

CRPCI_FN void crpci_zk_node_own_answered(crpci_zk_own *own, const crpci_zk_request *q,
                                         const crpci_zk_answer *a)
{
    bool creates = q->order.verb == CRPCI_ZK_CREATE;
    if (a->rc == ZNODEEXISTS && creates) {
        crpci_zk_node_own_to(own, CRPCI_ZK_OWN_CHECK);
    } else if (a->rc != ZOK && (creates || a->rc != ZNONODE)) {
        if (own->state == CRPCI_ZK_OWN_CREATE) /* nothing was made */
            crpci_zk_node_own_set(own, &own->prefix, NULL);
        crpci_zk_node_own_fail(own, a->rc, zerror(a->rc));
    } else if (creates) {
        crpci_zk_node_own_made(own, q->sent_us, a->text);
    } else if (own->state == CRPCI_ZK_OWN_FIND) {
        crpci_zk_node_own_found(own, q->sent_us, a);
    } else if (own->state == CRPCI_ZK_OWN_EVICT) {
        crpci_zk_node_own_to(own, CRPCI_ZK_OWN_CREATE);
    } else if (own->state == CRPCI_ZK_OWN_REMOVE) {
        crpci_zk_node_own_set(own, &own->path, NULL);
        crpci_zk_node_own_to(own, own->prefix ? CRPCI_ZK_OWN_FIND : CRPCI_ZK_OWN_ABSENT);
    } else if (a->rc == ZNONODE || a->stat->ephemeralOwner != own->job.session->id) {
        crpci_zk_node_own_lose(own, a->rc == ZOK);
    } else {
        crpci_zk_node_own_mine(own, q->sent_us, a->stat);
    }
}

/* The session is over. A node with a fixed name may still exist, as another session's. */
CRPCI_FN void crpci_zk_node_own_over(crpci_zk_own *own)
{
    bool tell = own->state == CRPCI_ZK_OWN_OWNED && own->wish == CRPCI_ZK_WISH_WANTED;
    crpci_zk_job_forget(&own->job);
    own->failures = 0;
    if (own->sequential) {
        crpci_zk_node_own_set(own, &own->path, NULL);
        crpci_zk_node_own_set(own, &own->prefix, NULL);
    }
    if (own->state != CRPCI_ZK_OWN_REMOVE || !own->path)
        own->state = CRPCI_ZK_OWN_ABSENT;
    crpci_zk_node_own_next(own);
    if (tell)
        own->owner->lost(own, ZSESSIONEXPIRED);
}

CRPCI_FN void crpci_zk_node_own_event(crpci_zk_job *job, crpci_zk_event event,
                                      const crpci_zk_request *q, const crpci_zk_answer *a)
{
    crpci_zk_own *own = CRPCI_CONTAINER(job, crpci_zk_own, job);
    crpci_zk_session *s = job->session;
    int64_t soon;
    switch (event) {
    case CRPCI_ZK_ANSWERED:
        crpci_zk_node_own_answered(own, q, a);
        break;
    case CRPCI_ZK_DOUBTED:
        crpci_zk_node_own_to(own, own->prefix && !own->path ? CRPCI_ZK_OWN_FIND : own->state);
        crpci_zk_node_own_wait(own, crpci_zk_job_spread(s, CRPCI_ZK_JOB_RETRY_US, 50));
        break;
    case CRPCI_ZK_RESUMED: /* the local address may have changed: check soon */
        own->failures = 0;
        crpci_zk_node_own_next(own);
        soon = crpci_base_min64(crpci_zk_job_scatter(s), own->check_us / 16);
        if (own->state == CRPCI_ZK_OWN_OWNED)
            crpci_zk_node_own_wait(own, soon);
        break;
    case CRPCI_ZK_RENEWED:
    case CRPCI_ZK_ENDED:
        crpci_zk_node_own_over(own);
        break;
    case CRPCI_ZK_REMOVED:
        /* A whole tree may have been removed: its owners make their nodes again at random times. */
        soon = crpci_zk_job_now(s) + crpci_zk_job_spread(s, CRPCI_ZK_NODE_BACK_US, 90);
        if (own->state == CRPCI_ZK_OWN_OWNED)
            job->due_us = crpci_base_min64(job->due_us, soon);
        break;
    default:
        break;
    }
}

CRPCI_FN void crpci_zk_node_own_clear(crpci_zk_job *job)
{
    crpci_zk_own *own = CRPCI_CONTAINER(job, crpci_zk_own, job);
    crpci_zk_node_own_set(own, &own->path, NULL);
    crpci_zk_node_own_set(own, &own->prefix, NULL);
}

static const crpci_zk_work crpci_zk_node_own_work = {
    crpci_zk_node_own_order, crpci_zk_node_own_event, crpci_zk_node_own_clear};

/* Puts the job on the session; it takes over a reference to its holder. No node is wanted yet. */
CRPCI_FN void crpci_zk_node_own_init(crpci_zk_own *own, crpci_zk_session *s,
                                     const crpci_zk_owner *owner, const char *dir, void *holder,
                                     void (*release)(void *holder))
{
    crpci_zk_job_add(&own->job, &crpci_zk_node_own_work, s, INT64_MAX, holder, release);
    own->owner = owner;
    own->dir = dir;
    own->check_us = CRPCI_ZK_NODE_CHECK_US;
}

/* Changes the wish; the caller kicks the session. ENDED may free the owner, unless it has other
 * references. */
CRPCI_FN void crpci_zk_node_own_want(crpci_zk_own *own, crpci_zk_wish wish)
{
    own->wish = wish;
    own->failures = 0;
    crpci_zk_node_own_next(own);
}

/* Checks the node now, and from now on at this interval. */
CRPCI_FN void crpci_zk_node_own_check(crpci_zk_own *own, int64_t check_us)
{
    own->check_us = check_us;
    if (own->state == CRPCI_ZK_OWN_OWNED && !own->job.sent)
        own->job.due_us = 0;
}
#endif /* CRPC_ENABLE_ZOOKEEPER */

/* ======================================================================== */
/* >>impl-zk-directory   zookeeper:// in Dubbo's layout: providers, consumers, overrides */
/* ======================================================================== */

#if CRPC_ENABLE_ZOOKEEPER

/* Below the root, "/dubbo" unless the URL names another, each service has a directory:
 *
 *     /dubbo/demo.UserService/providers/      an ephemeral node for each provider
 *     /dubbo/demo.UserService/consumers/      one for each consumer, with register_consumer
 *     /dubbo/demo.UserService/configurators/  the operator's overrides
 *
 * A node's name is a URL (impl-names); its content is the host. This section watches the
 * providers and overrides, and owns the nodes of this process (impl-zk-node); impl-directory keeps
 * lists, protection and the cache file. The loop's lock guards everything here. */

#define CRPCI_ZK_DIRECTORY_ROOT        "/dubbo"
#define CRPCI_ZK_DIRECTORY_TWIN_US     5000000 /* before the next sweep for stale twins; doubles */
#define CRPCI_ZK_DIRECTORY_TWIN_ROUNDS 5u      /* sweeps that removed a node; then it gives up */

/* A service with subscribers; shared by all subscribers on the session. */
typedef struct crpci_zk_service {
    crpci_directory directory;
    crpci_list link; /* in session->services */
    crpci_zk_watch providers;
    crpci_zk_watch overrides;
    bool following; /* providers are read: only after the overrides, so that no subscriber sees a
                     * provider that an override has disabled */
    bool aged;      /* visited by the current pass of crpci_zk_directory_age */
} crpci_zk_service;

/* An open zookeeper:// URL. */
typedef struct crpci_zk_directory {
    crpci_backend base;
    crpci_zk_session *session;
    char *root;
    char *application;
    bool register_consumer;
    crpci_list registrations;
    crpci_list subscribers;
} crpci_zk_directory;

/* A registered provider or consumer. Its references are its backend's list and its two jobs. */
typedef struct crpci_zk_registration {
    crpci_list link; /* in backend->registrations */
    uint32_t refs;
    crpci_zk_session *session;
    crpci_directory_offer offer;
    char *dir;
    crpci_zk_own own;
    /* A sweep removes twins: nodes of the same address that a dead session left. */
    crpci_zk_job sweep;
    crpci_zk_verb step; /* LIST; of each twin STAT, then DELETE */
    char *twin;         /* path of the twin that was examined last, or NULL */
    int twin_version;
    bool evicted;    /* this sweep removed one */
    unsigned rounds; /* number of sweeps that removed one */
} crpci_zk_registration;

/* One subscription, with the consumer node that announces it. */
typedef struct crpci_zk_subscriber {
    crpci_subscriber base;
    crpci_list link;                 /* in backend->subscribers */
    crpci_zk_registration *consumer; /* NULL: register_consumer is off */
} crpci_zk_subscriber;

/* "/dubbo/demo.UserService/providers", or another category of the service, on the heap. */
CRPCI_FN char *crpci_zk_directory_path(const crpci_zk_directory *b, const char *service,
                                       const char *category)
{
    return crpci_heap_format(b->session->heap, "%s/%s/%s", b->root, service, category);
}

/* The session's `age`: marks the lists of all services stale. */
CRPCI_FN bool crpci_zk_directory_age(crpci_zk_session *s)
{
    bool complete = true;
    crpci_list *i;
    for (i = s->services.next; i != &s->services; i = i->next)
        CRPCI_CONTAINER(i, crpci_zk_service, link)->aged = false;
    for (i = s->services.next; i != &s->services && !s->closing;) {
        crpci_zk_service *v = CRPCI_CONTAINER(i, crpci_zk_service, link);
        i = i->next;
        if (v->aged)
            continue;
        v->aged = true;
        complete = crpci_directory_age(&v->directory) && complete;
        i = s->services.next; /* the list may have changed while unlocked */
    }
    return complete;
}

/* --- services --------------------------------------------------------------------------------- */

/* The overrides were read, do not exist, or cannot be read: begins to read the providers, or reads
 * them again. Unlocks. */
CRPCI_FN bool crpci_zk_directory_on_overrides(crpci_zk_watch *w, const crpci_zk_answer *a)
{
    crpci_zk_service *v = CRPCI_CONTAINER(w, crpci_zk_service, overrides);
    char ip[INET6_ADDRSTRLEN], host[INET6_ADDRSTRLEN + 2];
    size_t count;
    char *const *names = crpci_zk_node_names(a, &count);
    int changed = 0;
    if (a->rc == ZOK || a->rc == ZNONODE) {
        crpci_zk_servers_local(&w->job.session->servers, false, ip, sizeof ip);
        snprintf(host, sizeof host, strchr(ip, ':') ? "[%s]" : "%s", ip);
        changed = crpci_directory_override(&v->directory, names, count, host);
    }
    if (changed < 0)
        return false;
    if (changed || !v->following)
        crpci_zk_node_watch_again(&v->providers);
    v->following = true;
    return true;
}

/* The providers were read. A directory that does not exist counts as empty, because the first
 * provider creates it. Unlocks. */
CRPCI_FN bool crpci_zk_directory_on_providers(crpci_zk_watch *w, const crpci_zk_answer *a)
{
    crpci_zk_service *v = CRPCI_CONTAINER(w, crpci_zk_service, providers);
    crpci_directory_report report;
    if (a->rc != ZOK && a->rc != ZNONODE)
        return crpci_directory_age(&v->directory);
    report.names = crpci_zk_node_names(a, &report.count);
    report.whole = true;
    return crpci_directory_update(&v->directory, &report);
}

CRPCI_FN void crpci_zk_directory_service_free(crpci_directory *d)
{
    crpci_heap_free(d->loop->heap, CRPCI_CONTAINER(d, crpci_zk_service, directory),
                    sizeof(crpci_zk_service));
}

/* Drops the directory's reference of one of the two watches. */
CRPCI_FN void crpci_zk_directory_release(void *service)
{
    crpci_directory_unref(&((crpci_zk_service *)service)->directory);
}

/* The last subscriber has left: stops watching. Unlocks. */
CRPCI_FN void crpci_zk_directory_service_end(crpci_zk_service *v)
{
    crpci_list_remove(&v->link);
    crpci_zk_job_drop(&v->overrides.job);
    crpci_zk_job_drop(&v->providers.job);
    crpci_directory_end(&v->directory);
}

/* Watches a service, whose directory of providers is at `providers`; takes that text over. NULL:
 * out of memory. Locked. */
CRPCI_FN crpci_zk_service *crpci_zk_directory_service_new(const crpci_zk_directory *b,
                                                          const char *service, char *providers)
{
    crpci_zk_session *s = b->session;
    crpci_zk_service *v = (crpci_zk_service *)crpci_heap_alloc(s->heap, sizeof *v);
    char *overrides = crpci_zk_directory_path(b, service, "configurators");
    bool ok = v && providers && overrides &&
              crpci_directory_init(
                  &v->directory, s->loop,
                  crpci_heap_format(s->heap, "zookeeper://%s%s", s->authority, providers),
                  crpci_zk_directory_service_free);
    if (!ok) {
        crpci_heap_strfree(s->heap, providers);
        crpci_heap_strfree(s->heap, overrides);
        crpci_heap_free(s->heap, v, sizeof *v);
        return NULL;
    }
    v->directory.hold_us = s->spread_us + (int64_t)s->timeout_ms * 1000;
    v->directory.cache = s->cache.path ? &s->cache : NULL;
    v->directory.override_name =
        crpci_heap_format(s->heap, "zookeeper://%s%s", s->authority, overrides);
    v->directory.refs += 2;
    crpci_zk_node_watch_init(&v->overrides, s, CRPCI_ZK_WATCH_CHILDREN, overrides,
                             crpci_zk_directory_on_overrides, v, crpci_zk_directory_release);
    crpci_zk_node_watch_init(&v->providers, s, CRPCI_ZK_WATCH_CHILDREN, providers,
                             crpci_zk_directory_on_providers, v, crpci_zk_directory_release);
    crpci_zk_node_watch_again(&v->overrides);
    crpci_list_append(&s->services, &v->link);
    return v;
}

/* The service, which is watched from now on. NULL: out of memory. Locked. */
CRPCI_FN crpci_zk_service *crpci_zk_directory_service_get(const crpci_zk_directory *b,
                                                          const char *service)
{
    char *path = crpci_zk_directory_path(b, service, "providers");
    crpci_list *all = &b->session->services, *i;
    for (i = all->next; path && i != all; i = i->next) {
        crpci_zk_service *v = CRPCI_CONTAINER(i, crpci_zk_service, link);
        if (strcmp(v->providers.path, path) == 0) {
            crpci_heap_strfree(b->session->heap, path);
            return v;
        }
    }
    return crpci_zk_directory_service_new(b, service, path);
}

/* --- stale twins ------------------------------------------------------------------------------ */

/* Whether a name is that of another node with the same address: both names begin with the same
 * encoded "crpc://address/". Nodes of other software have other schemes and are left alone. */
CRPCI_FN bool crpci_zk_directory_is_twin(const crpci_zk_registration *reg, const char *name)
{
    const char *own = strrchr(reg->own.path, '/') + 1;
    size_t n = crpci_url_encode(NULL, 0, "crpc://") +
               crpci_url_encode(NULL, 0, reg->offer.address) + crpci_url_encode(NULL, 0, "/");
    return strncmp(name, own, n) == 0 && strcmp(name, own) != 0;
}

/* Takes the next twin in the order of names, so that a sweep visits each once. False: none is left,
 * or out of memory. */
CRPCI_FN bool crpci_zk_directory_next_twin(crpci_zk_registration *reg, const crpci_zk_answer *a)
{
    crpci_heap *h = reg->sweep.session->heap;
    const char *last = reg->twin ? strrchr(reg->twin, '/') + 1 : "", *next = NULL;
    size_t count, i;
    char *const *names = crpci_zk_node_names(a, &count);
    char *path;
    for (i = 0; i < count; i++) {
        if (names[i] && strcmp(names[i], last) > 0 && (!next || strcmp(names[i], next) < 0) &&
            crpci_zk_directory_is_twin(reg, names[i]))
            next = names[i];
    }
    path = next ? crpci_zk_node_join(h, reg->dir, next) : NULL;
    crpci_heap_strfree(h, reg->twin);
    reg->twin = path;
    return path != NULL;
}

/* A sweep has ended. Sweeps that removed a node are repeated at growing intervals and then given
 * up: if the node comes back, another live process is configured with the same address, and
 * removing does not settle that. */
CRPCI_FN void crpci_zk_directory_swept(crpci_zk_registration *reg)
{
    crpci_zk_session *s = reg->sweep.session;
    if (reg->evicted && ++reg->rounds < CRPCI_ZK_DIRECTORY_TWIN_ROUNDS)
        crpci_zk_job_around(&reg->sweep, (int64_t)CRPCI_ZK_DIRECTORY_TWIN_US << (reg->rounds - 1),
                            20);
    else if (reg->evicted)
        crpci_heap_log(s->heap, CRPC_LOG_ERROR,
                       "registry zookeeper://%s: another process keeps registering %s at %s; its "
                       "node is not removed any more. Give each process an address of its own",
                       s->authority, reg->offer.what.service, reg->offer.address);
    reg->evicted = false;
}

CRPCI_FN bool crpci_zk_directory_sweep_order(crpci_zk_job *job, crpci_zk_order *o)
{
    crpci_zk_registration *reg = CRPCI_CONTAINER(job, crpci_zk_registration, sweep);
    if (reg->own.state != CRPCI_ZK_OWN_OWNED) { /* crpci_zk_directory_owned starts it again */
        job->due_us = INT64_MAX;
        return false;
    }
    o->verb = reg->step;
    o->path = reg->step == CRPCI_ZK_LIST ? reg->dir : reg->twin;
    o->version = reg->step == CRPCI_ZK_DELETE ? reg->twin_version : -1;
    return true;
}

/* Lists the directory, asks whose each twin is, and deletes those of other sessions. */
CRPCI_FN void crpci_zk_directory_sweep_event(crpci_zk_job *job, crpci_zk_event event,
                                             const crpci_zk_request *q, const crpci_zk_answer *a)
{
    crpci_zk_registration *reg = CRPCI_CONTAINER(job, crpci_zk_registration, sweep);
    crpci_zk_session *s = job->session;
    if (event != CRPCI_ZK_ANSWERED && event != CRPCI_ZK_DOUBTED)
        return;
    reg->step = CRPCI_ZK_LIST;
    if (event == CRPCI_ZK_DOUBTED)
        return;
    job->due_us = 0;
    if (q->order.verb == CRPCI_ZK_LIST) {
        job->due_us = INT64_MAX;
        if (reg->own.state != CRPCI_ZK_OWN_OWNED)
            return;
        if (crpci_zk_directory_next_twin(reg, a)) {
            reg->step = CRPCI_ZK_STAT;
            job->due_us = 0;
        } else {
            crpci_zk_directory_swept(reg);
        }
    } else if (q->order.verb == CRPCI_ZK_STAT) {
        /* A node without an owning session was made by an operator, and stays. */
        if (a->rc == ZOK && a->stat->ephemeralOwner != 0 && a->stat->ephemeralOwner != s->id) {
            reg->twin_version = a->stat->version;
            reg->step = CRPCI_ZK_DELETE;
        }
    } else if (a->rc == ZOK) {
        reg->evicted = true;
        crpci_heap_log(s->heap, reg->rounds ? CRPC_LOG_WARN : CRPC_LOG_INFO,
                       "registry zookeeper://%s: removed another session's node of %s at %s",
                       s->authority, reg->offer.what.service, reg->offer.address);
    }
}

/* --- registrations ---------------------------------------------------------------------------- */

/* Drops a reference to a registration: its two jobs and the list of registrations hold one each. */
CRPCI_FN void crpci_zk_directory_unref(void *registration)
{
    crpci_zk_registration *reg = (crpci_zk_registration *)registration;
    crpci_heap *h = reg->session->heap;
    if (--reg->refs)
        return;
    crpci_names_release(h, &reg->offer.what);
    crpci_heap_strfree(h, reg->dir);
    crpci_heap_strfree(h, reg->twin);
    crpci_heap_free(h, reg, sizeof *reg);
}

static const crpci_zk_work crpci_zk_directory_sweep = {crpci_zk_directory_sweep_order,
                                                       crpci_zk_directory_sweep_event, NULL};

/* Determines the local address, unless the program gave one. False: no route to the servers.
 * *moved: it has changed. */
CRPCI_FN bool crpci_zk_directory_locate(crpci_zk_registration *reg, char *host, size_t size,
                                        bool *moved)
{
    *moved = false;
    if (!reg->offer.auto_host)
        return true;
    if (!crpci_zk_servers_local(&reg->session->servers, reg->offer.v4, host, size))
        return false;
    *moved = strcmp(host, reg->offer.host) != 0;
    return true;
}

/* The node's path, with the present address. */
CRPCI_FN char *crpci_zk_directory_name(crpci_zk_own *own)
{
    crpci_zk_registration *reg = CRPCI_CONTAINER(own, crpci_zk_registration, own);
    crpci_directory_offer *o = &reg->offer;
    crpci_heap *h = own->job.session->heap;
    char host[INET6_ADDRSTRLEN], *url, *path;
    size_t url_size, size, at = strlen(reg->dir) + 1;
    long pid = (long)getpid();
    bool moved;
    if (!crpci_zk_directory_locate(reg, host, sizeof host, &moved))
        return NULL;
    if (moved)
        crpci_directory_offer_move(o, host);
    own->data = o->host;
    own->size = (int)strlen(o->host);
    url_size = crpci_names_url(NULL, 0, &o->what, !o->port, o->address, o->timestamp_ms, pid) + 1;
    url = (char *)crpci_heap_alloc(h, url_size);
    if (!url)
        return NULL;
    crpci_names_url(url, url_size, &o->what, !o->port, o->address, o->timestamp_ms, pid);
    size = at + crpci_url_encode(NULL, 0, url) + 1;
    path = (char *)crpci_heap_alloc(h, size);
    if (path) {
        snprintf(path, size, "%s/", reg->dir);
        crpci_url_encode(path + at, size - at, url);
    }
    crpci_heap_free(h, url, url_size);
    return path;
}

/* The node is registered. If the local address has changed since, it is registered anew under the
 * new one. */
CRPCI_FN void crpci_zk_directory_owned(crpci_zk_own *own, int64_t sent_us, const struct Stat *stat,
                                       bool news)
{
    crpci_zk_registration *reg = CRPCI_CONTAINER(own, crpci_zk_registration, own);
    crpci_zk_session *s = own->job.session;
    bool provider = reg->offer.port != 0, moved;
    char host[INET6_ADDRSTRLEN];
    (void)sent_us;
    (void)stat;
    if (crpci_zk_directory_locate(reg, host, sizeof host, &moved) && moved) {
        crpci_zk_node_own_want(own, CRPCI_ZK_WISH_AFRESH);
        return;
    }
    if (!news)
        return;
    if (provider && reg->rounds < CRPCI_ZK_DIRECTORY_TWIN_ROUNDS &&
        reg->sweep.due_us == INT64_MAX && !reg->sweep.sent)
        reg->sweep.due_us = 0;
    crpci_heap_log(s->heap, provider ? CRPC_LOG_INFO : CRPC_LOG_DEBUG,
                   "registry zookeeper://%s: registered %s%s at %s", s->authority,
                   provider ? "" : "as a consumer of ", reg->offer.what.service,
                   reg->offer.address);
    crpci_directory_tell(s->loop, &s->cond, &reg->offer, CRPC_OK, "registered");
}

/* Reports a failed registration to the program; removal and expiry are repaired silently. */
CRPCI_FN void crpci_zk_directory_lost(crpci_zk_own *own, int rc)
{
    crpci_zk_registration *reg = CRPCI_CONTAINER(own, crpci_zk_registration, own);
    crpci_zk_session *s = own->job.session;
    char text[CRPC_ERROR_TEXT_MAX];
    if (rc == ZNONODE || rc == ZSESSIONEXPIRED)
        return;
    crpci_status_format(text, sizeof text, "registering %s%.70s at zookeeper://%.70s: %.50s",
                        reg->offer.port ? "" : "as a consumer of ", reg->offer.what.service,
                        s->authority, zerror(rc));
    crpci_directory_tell(s->loop, &s->cond, &reg->offer,
                         rc == ZNOAUTH ? CRPC_EAUTH : CRPC_EREGISTRY, text);
}

static const crpci_zk_owner crpci_zk_directory_owner = {
    crpci_zk_directory_name, crpci_zk_directory_owned, crpci_zk_directory_lost};

/* Registers a provider or, without an address, a consumer. Locked; the caller kicks the session. */
CRPCI_FN int crpci_zk_directory_register(crpci_zk_directory *b, const crpci_names_service *what,
                                         crpci_directory_status_fn status, void *user,
                                         crpci_zk_registration **out)
{
    crpci_zk_session *s = b->session;
    crpci_zk_registration *reg = (crpci_zk_registration *)crpci_heap_alloc(s->heap, sizeof *reg);
    int err;
    if (!reg)
        return CRPC_ENOMEM;
    reg->refs = 1;
    reg->session = s;
    err = crpci_directory_offer_init(&reg->offer, s->heap, what, status, user);
    if (!err)
        reg->dir =
            crpci_zk_directory_path(b, what->service, what->address ? "providers" : "consumers");
    if (err || !reg->dir) {
        crpci_zk_directory_unref(reg);
        return err ? err : CRPC_ENOMEM;
    }
    if (!what->address) /* only the timestamp distinguishes the consumers of one process */
        reg->offer.timestamp_ms = s->stamp_ms =
            reg->offer.timestamp_ms > s->stamp_ms ? reg->offer.timestamp_ms : s->stamp_ms + 1;
    reg->step = CRPCI_ZK_LIST;
    reg->refs += 2;
    crpci_list_append(&b->registrations, &reg->link);
    crpci_zk_node_own_init(&reg->own, s, &crpci_zk_directory_owner, reg->dir, reg,
                           crpci_zk_directory_unref);
    reg->own.unwatched = !what->address;
    crpci_zk_job_add(&reg->sweep, &crpci_zk_directory_sweep, s, INT64_MAX, reg,
                     crpci_zk_directory_unref);
    crpci_zk_node_own_want(&reg->own, CRPCI_ZK_WISH_WANTED);
    *out = reg;
    return CRPC_OK;
}

/* Withdraws a registration. The node is removed after this has returned, or ends with the session.
 * Locked, unlocks meanwhile. */
CRPCI_FN void crpci_zk_directory_registration_end(crpci_zk_registration *reg)
{
    crpci_zk_session *s = reg->session;
    reg->offer.ended = true;
    crpci_list_remove(&reg->link);
    crpci_directory_call_wait(s->loop, &s->cond, &reg->offer.caller);
    crpci_zk_job_drop(&reg->sweep);
    crpci_zk_node_own_want(&reg->own, CRPCI_ZK_WISH_ENDED);
    if (!s->closing)
        crpci_zk_session_kick(s);
    crpci_zk_directory_unref(reg);
}

/* --- the backend ------------------------------------------------------------------------------ */

/* A loopback address that only this host can reach is registered all the same, with a warning,
 * because tests and single-host systems want it. */
CRPCI_FN int crpci_zk_directory_enroll(crpci_backend *base, const crpci_names_service *what,
                                       crpci_directory_status_fn status, void *user, void **handle)
{
    crpci_zk_directory *b = (crpci_zk_directory *)(void *)base;
    crpci_zk_session *s = b->session;
    crpci_zk_registration *reg = NULL;
    int err = CRPC_EINVAL;
    crpci_loop_lock(s->loop);
    if (crpci_zk_node_is_part(what->service, strlen(what->service)))
        err = crpci_zk_directory_register(b, what, status, user, &reg);
    if (!err && !reg->offer.auto_host && crpci_sock_is_loopback(reg->offer.address) &&
        !crpci_sock_is_loopback(s->servers.hosts))
        crpci_heap_log(s->heap, CRPC_LOG_WARN,
                       "registry zookeeper://%s: %s is registered at %s, which other hosts cannot "
                       "reach; set advertise",
                       s->authority, what->service, reg->offer.address);
    if (!err)
        crpci_zk_session_kick(s);
    *handle = reg;
    crpci_loop_unlock(s->loop);
    return err;
}

CRPCI_FN void crpci_zk_directory_withdraw(crpci_backend *base, void *handle)
{
    crpci_loop_lock(base->loop);
    crpci_zk_directory_registration_end((crpci_zk_registration *)handle);
    crpci_loop_unlock(base->loop);
}

/* Removes a subscriber and its consumer's node. Locked, unlocks meanwhile. */
CRPCI_FN void crpci_zk_directory_leave(crpci_zk_subscriber *sub)
{
    crpci_zk_service *v = CRPCI_CONTAINER(sub->base.directory, crpci_zk_service, directory);
    crpci_list_remove(&sub->link);
    if (sub->consumer)
        crpci_zk_directory_registration_end(sub->consumer);
    v->directory.refs++;
    crpci_directory_remove(&sub->base);
    if (crpci_list_empty(&v->directory.subscribers) && !v->directory.ended)
        crpci_zk_directory_service_end(v);
    crpci_directory_unref(&v->directory);
}

/* If ZooKeeper is not connected, the subscriber gets the list of the cache file first. */
CRPCI_FN int crpci_zk_directory_subscribe(crpci_backend *base, const crpci_names_service *want,
                                          crpci_directory_push_fn push, void *user,
                                          crpci_subscriber **out)
{
    crpci_zk_directory *b = (crpci_zk_directory *)(void *)base;
    crpci_zk_session *s = b->session;
    crpci_names_service w = *want;
    crpci_zk_subscriber *sub = NULL;
    crpci_zk_service *v;
    int err = CRPC_ENOMEM;
    if (!w.service || !crpci_zk_node_is_part(w.service, strlen(w.service)))
        return CRPC_EINVAL;
    w.application = w.application && *w.application ? w.application : b->application;
    w.address = NULL;
    crpci_loop_lock(s->loop);
    v = crpci_zk_directory_service_get(b, w.service);
    if (v)
        sub = (crpci_zk_subscriber *)(void *)crpci_directory_add(&v->directory, sizeof *sub, &w,
                                                                 push, user);
    if (sub) {
        crpci_list_append(&b->subscribers, &sub->link);
        err = b->register_consumer ? crpci_zk_directory_register(b, &w, NULL, NULL, &sub->consumer)
                                   : CRPC_OK;
    }
    if (err && sub) {
        crpci_zk_directory_leave(sub);
    } else if (err && v && crpci_list_empty(&v->directory.subscribers)) {
        crpci_zk_directory_service_end(v);
    } else if (!err) {
        *out = &sub->base;
        if (v->following)
            crpci_zk_node_watch_again(&v->providers);
        if (s->phase != CRPCI_ZK_CONNECTED)
            crpci_directory_recall(&sub->base);
        crpci_zk_session_kick(s);
    }
    crpci_loop_unlock(s->loop);
    return err;
}

CRPCI_FN void crpci_zk_directory_unsubscribe(crpci_backend *base, crpci_subscriber *s)
{
    crpci_loop_lock(base->loop);
    crpci_zk_directory_leave((crpci_zk_subscriber *)(void *)s);
    crpci_loop_unlock(base->loop);
}

CRPCI_FN void crpci_zk_directory_free(crpci_heap *h, crpci_zk_directory *b)
{
    crpci_heap_strfree(h, b->application);
    crpci_heap_strfree(h, b->root);
    crpci_heap_free(h, b, sizeof *b);
}

/* Withdraws everything that was registered and subscribed through this URL. */
CRPCI_FN void crpci_zk_directory_close(crpci_backend *base)
{
    crpci_zk_directory *b = (crpci_zk_directory *)(void *)base;
    crpci_zk_session *s = b->session;
    crpci_heap *h = s->heap;
    bool last;
    crpci_heap_ref(h);
    crpci_loop_lock(s->loop);
    last = crpci_zk_pool_leave(s);
    while (!crpci_list_empty(&b->subscribers))
        crpci_zk_directory_leave(CRPCI_CONTAINER(b->subscribers.next, crpci_zk_subscriber, link));
    while (!crpci_list_empty(&b->registrations))
        crpci_zk_directory_registration_end(
            CRPCI_CONTAINER(b->registrations.next, crpci_zk_registration, link));
    crpci_zk_pool_close(s, last);
    crpci_zk_directory_free(h, b);
    crpci_heap_unref(h);
}

static const crpci_backend_ops crpci_zk_directory_ops = {
    crpci_zk_directory_enroll, crpci_zk_directory_withdraw, crpci_zk_directory_subscribe,
    crpci_zk_directory_unsubscribe, crpci_zk_directory_close};

/* Opens zookeeper://host:port,.../root. Resolves names; never waits for a server. */
CRPCI_COLD int crpci_zk_directory_open(crpc_loop *l, const crpci_url *url,
                                       const crpci_directory_options *o, crpci_backend **out,
                                       crpc_error *error)
{
    crpci_heap *h = l->heap;
    crpci_zk_directory *b = (crpci_zk_directory *)crpci_heap_alloc(h, sizeof *b);
    const char *application = o->application ? o->application : "";
    int err;
    if (!b)
        return crpci_status_set(error, CRPC_ENOMEM, "zookeeper: out of memory");
    b->base.ops = &crpci_zk_directory_ops;
    b->base.loop = l;
    b->register_consumer = o->register_consumer;
    crpci_list_init(&b->registrations);
    crpci_list_init(&b->subscribers);
    b->application = crpci_heap_strndup(h, application, strlen(application));
    err = b->application
              ? crpci_zk_node_root(h, url->path, CRPCI_ZK_DIRECTORY_ROOT, &b->root, error)
              : crpci_status_set(error, CRPC_ENOMEM, "zookeeper: out of memory");
    err = err ? err : crpci_zk_pool_open(l, url->authority, o, &b->session, error);
    if (err) {
        crpci_zk_directory_free(h, b);
        return err;
    }
    crpci_loop_lock(l);
    b->session->age = crpci_zk_directory_age;
    crpci_loop_unlock(l);
    *out = &b->base;
    return CRPC_OK;
}
#endif /* CRPC_ENABLE_ZOOKEEPER */

/* ======================================================================== */
/* >>impl-open   the table of directory backends: schemes, URL options, paths */
/* ======================================================================== */

/* Every kind of registry is one row of crpci_open_backends; no other code names a scheme. A new
 * backend is a section above this one, with an open function and a table of crpci_backend_ops, and
 * a row here. Channels and servers open their registries through this section. */
typedef struct crpci_open_backend {
    const char *scheme;
    /* May wait for name resolution, never for the registry. The options are not NULL. */
    int (*open)(crpc_loop *l, const crpci_url *url, const crpci_directory_options *options,
                crpci_backend **out, crpc_error *error);
    unsigned parts;          /* least number of parts in a channel's path, the last of which is
                              * the service; 0: the backend interprets the whole path */
    const char *keys;        /* URL options that a channel's URL may have */
    const char *server_keys; /* URL options that a server's URL may have */
} crpci_open_backend;

#if CRPCI_DIRECTORY

static const crpci_open_backend crpci_open_backends[] = {
#if CRPC_ENABLE_ZOOKEEPER
    {"zookeeper", crpci_zk_directory_open, 2, "group,version,cache", ""},
#endif
#if CRPC_ENABLE_SERVERLESS
    {"multicast", crpci_multicast_open, 1, "group,version,interface", "interface"},
    {"file", crpci_file_open, 0, "group,version,service", ""},
#endif
};

/* The contents of a URL besides the registry's address. The texts point into the URL. */
typedef struct crpci_open_request {
    const crpci_open_backend *backend;
    crpci_directory_options options;
    crpci_names_service want;
} crpci_open_request;

static const struct {
    const char *name;
    size_t place; /* of a text in crpci_open_request */
} crpci_open_keys[] = {{"group", offsetof(crpci_open_request, want.group)},
                       {"version", offsetof(crpci_open_request, want.version)},
                       {"service", offsetof(crpci_open_request, want.service)},
                       {"cache", offsetof(crpci_open_request, options.cache)},
                       {"interface", offsetof(crpci_open_request, options.interface)}};

/* Clears a request, and finds the backend for a URL's scheme. */
CRPCI_COLD int crpci_open_find(crpci_open_request *r, const crpci_url *u, crpc_error *error)
{
    size_t i;
    memset(r, 0, sizeof *r);
    for (i = 0; i < sizeof crpci_open_backends / sizeof *crpci_open_backends; i++) {
        if (strcmp(crpci_open_backends[i].scheme, u->scheme) == 0) {
            r->backend = &crpci_open_backends[i];
            return CRPC_OK;
        }
    }
    return crpci_status_set(
        error, CRPC_EUNSUPPORTED, "%.40s:// is not a registry of this build, which has%s%s",
        u->scheme,
        CRPC_ENABLE_ZOOKEEPER ? " zookeeper://" : " no zookeeper:// (CRPC_ENABLE_ZOOKEEPER=0)",
        CRPC_ENABLE_SERVERLESS ? " multicast:// file://"
                               : " no multicast:// and file:// (CRPC_ENABLE_SERVERLESS=0)");
}

/* Takes a URL option that belongs to the registry. False: it does not. */
CRPCI_COLD bool crpci_open_option(crpci_open_request *r, bool server, const char *key,
                                  const char *value)
{
    size_t i;
    if (!crpci_names_match(server ? r->backend->server_keys : r->backend->keys, key))
        return false;
    for (i = 0; i < sizeof crpci_open_keys / sizeof *crpci_open_keys; i++) {
        if (strcmp(crpci_open_keys[i].name, key) == 0) {
            memcpy((char *)r + crpci_open_keys[i].place, &value, sizeof value);
            return true;
        }
    }
    return false;
}

/* Cuts the service off the end of a channel's path. */
CRPCI_COLD int crpci_open_service(crpci_open_request *r, crpci_url *u, crpc_error *error)
{
    char *slash = strrchr(u->path, '/');
    if (!r->backend->parts)
        return CRPC_OK;
    r->want.service = slash ? slash + 1 : u->path;
    if (!*r->want.service || slash == u->path || (!slash && r->backend->parts > 1))
        return crpci_status_set(error, CRPC_EINVAL, "%s://%.80s/%.80s: expected %s/package.Service",
                                u->scheme, u->authority, u->path,
                                r->backend->parts > 1 ? "/root" : "");
    if (slash)
        *slash = '\0';
    else
        u->path += strlen(u->path);
    return CRPC_OK;
}

/* Opens a server's registry. Options in the URL win over `options` (NULL: defaults). With `out`
 * NULL the URL is only checked. */
CRPCI_COLD int crpci_open_registry(crpc_loop *l, const char *url,
                                   const crpci_directory_options *options, crpci_backend **out,
                                   crpc_error *error)
{
    crpci_open_request r;
    char *key, *value;
    crpci_url u;
    int err = crpci_url_parse(&u, l->heap, url, error);
    if (out)
        *out = NULL;
    if (err)
        return err;
    err = crpci_open_find(&r, &u, error);
    if (options)
        r.options = *options;
    while (!err) {
        err = crpci_url_next(&u, &key, &value, error);
        if (!err && !crpci_open_option(&r, true, key, value))
            err = crpci_status_set(
                error, CRPC_EINVAL, "URL option %.60s=%.60s: a server's %s:// takes %s", key, value,
                u.scheme, *r.backend->server_keys ? r.backend->server_keys : "none");
    }
    if (err == CRPC_EPENDING)
        err = out ? r.backend->open(l, &u, &r.options, out, error) : CRPC_OK;
    crpci_url_free(&u);
    return err;
}

#endif /* CRPCI_DIRECTORY */

/* ======================================================================== */
/* >>impl-agreement   common parts of what programs open in ZooKeeper: lifetime, paths, codes */
/* ======================================================================== */

#if CRPC_ENABLE_ZOOKEEPER

/* The sections from here to impl-registry serve programs that agree on something. An operation, a
 * watched configuration, a place in a queue and the state of the session are *items* of an open
 * registry. Jobs of the session (impl-zk-job, impl-zk-node) work for them, on the thread that
 * runs the client. What the program is to hear is left in the item, whose loop task tells it on the
 * thread that drives the loop. Deadlines and leases are timers of the loop.
 *
 * An item's references are those of its jobs, of its queued loop task, of a synchronous caller that
 * waits for it, and of the handle of a lock or an election. The item has a reference to the
 * session, so that the session outlives it. */

#define CRPCI_AGREEMENT_LONGEST_MS 86400000 /* longest timeout that an option accepts */
#define CRPCI_AGREEMENT_PATH       4096u    /* longest path, in bytes */
#define CRPCI_AGREEMENT_MARK       "-lock-" /* before a queue's number, as in Curator's recipes */

/* An open registry, as programs have it. The sections down to impl-registry share its members. */
struct crpc_registry {
    crpc_loop *loop;
    bool private_loop;
    crpci_zk_session *session;
    char *root; /* "/app", or "" */
    crpci_list items;
    crpci_id_table configs;
    uint32_t pending; /* operations that have not finished */
};

typedef struct crpci_item crpci_item;

/* Functions of a kind of item. All are called locked. */
typedef struct crpci_item_kind {
    size_t size;                    /* of the struct that contains the item */
    void (*tell)(crpci_item *item); /* runs the program's callback; unlocks meanwhile */
    void (*end)(crpci_item *item);  /* the registry closes: removes the item from it */
    void (*free)(crpci_item *item); /* frees what the item owns. NULL: nothing */
} crpci_item_kind;

/* First member of the struct of each kind. The loop's lock guards it. */
struct crpci_item {
    const crpci_item_kind *kind;
    crpci_list node;      /* in owner->items */
    crpc_registry *owner; /* NULL: the item has ended */
    crpci_zk_session *session;
    uint32_t refs;
    crpci_task ready;     /* queued when the program is to be told something */
    crpci_timer timer;
    void *user;
};

/* Drops a reference. Locked, like the functions below. The caller must hold the session, or know
 * that the item is not its last holder. */
CRPCI_FN void crpci_agreement_unref(void *holder)
{
    crpci_item *item = (crpci_item *)holder;
    crpci_zk_session *s = item->session;
    if (--item->refs)
        return;
    s->refs--;
    if (item->kind->free)
        item->kind->free(item);
    crpci_heap_free(s->heap, item, item->kind->size);
}

/* The loop task of an item, on the thread that drives the loop. */
CRPCI_FN void crpci_agreement_run(crpc_loop *l, crpci_task *task)
{
    crpci_item *item = CRPCI_CONTAINER(task, crpci_item, ready);
    crpci_zk_session *s = item->session;
    s->refs++;
    item->kind->tell(item);
    crpci_agreement_unref(item);
    crpci_zk_session_unlock(s);
    crpci_loop_lock(l);
}

/* Schedules the program's callback on the thread that drives the loop. */
CRPCI_FN void crpci_agreement_ready(crpci_item *item)
{
    if (!crpci_list_empty(&item->ready.link))
        return;
    item->refs++;
    crpci_loop_ready(item->session->loop, &item->ready);
}

/* A new item with one reference, the caller's. `timer` is NULL where the kind sets none. NULL: out
 * of memory. */
CRPCI_FN void *crpci_agreement_new(crpc_registry *r, const crpci_item_kind *kind,
                                   void (*timer)(crpc_loop *l, crpci_timer *timer), void *user)
{
    crpci_item *item = (crpci_item *)crpci_heap_alloc(r->session->heap, kind->size);
    if (!item)
        return NULL;
    item->kind = kind;
    item->owner = r;
    item->session = r->session;
    item->session->refs++;
    item->refs = 1;
    item->user = user;
    crpci_loop_task_init(&item->ready, crpci_agreement_run);
    crpci_timer_init(&item->timer, timer);
    crpci_list_append(&r->items, &item->node);
    return item;
}

/* Removes an item from its registry, which may close without it now. */
CRPCI_FN void crpci_agreement_end(crpci_item *item)
{
    item->owner = NULL;
    crpci_list_remove(&item->node);
    crpci_loop_timer_cancel(item->session->loop, &item->timer);
}

/* Removes a new item that could not be completed for want of memory. */
CRPCI_FN void crpci_agreement_discard(crpci_item *item)
{
    crpci_agreement_end(item);
    crpci_agreement_unref(item);
}

/* Makes sure that a private loop has a thread, which everything with a callback needs. */
CRPCI_FN int crpci_agreement_need_owner(const crpc_registry *r)
{
    return r->private_loop ? crpci_drive_ensure_owner(r->loop) : CRPC_OK;
}

/* --- paths ------------------------------------------------------------------------------------ */

/* Whether a path below the root is valid. A sequential one may end in a slash: its name is then the
 * number alone. */
CRPCI_FN bool crpci_agreement_path_ok(const char *path, bool sequential)
{
    size_t n = path ? strlen(path) : 0;
    if (!path || n > CRPCI_AGREEMENT_PATH)
        return false;
    if (sequential && n > 1 && path[n - 1] == '/')
        n--;
    return *path == '/' ? crpci_zk_node_is_path(path + 1, n - 1) : crpci_zk_node_is_path(path, n);
}

/* Writes the full path of a path below the root, and returns its length, as snprintf does. */
CRPCI_FN size_t crpci_agreement_full(char *out, size_t size, const char *root, const char *path)
{
    path += *path == '/';
    return (size_t)snprintf(out, size, "%s%s%s", root, *path || !*root ? "/" : "", path);
}

/* The full path, on the heap. */
CRPCI_FN char *crpci_agreement_path(crpci_heap *h, const char *root, const char *path)
{
    size_t size = crpci_agreement_full(NULL, 0, root, path) + 1;
    char *out = (char *)crpci_heap_alloc(h, size);
    if (out)
        crpci_agreement_full(out, size, root, path);
    return out;
}

/* The path below the root, for the program. `root` is the root's length. */
CRPCI_FN const char *crpci_agreement_relative(const char *full, size_t root)
{
    if (strlen(full) >= root) /* false only for a server that answers nonsense */
        full += root;
    return full + (*full == '/');
}

/* --- the nodes of a queue --------------------------------------------------------------------- */

/* Reads the number in the name of a queue's node. False: the node is not part of a queue. */
CRPCI_FN bool crpci_agreement_number(const char *name, int32_t *number)
{
    const char *at = NULL, *next = name;
    while ((next = strstr(next, CRPCI_AGREEMENT_MARK)) != NULL)
        at = next++;
    return at && crpci_zk_node_number(at + strlen(CRPCI_AGREEMENT_MARK), number);
}

/* The last node before the node `than` or, with NULL, the first of all. NULL: none. */
CRPCI_FN const char *crpci_agreement_pick(char *const *names, size_t count, const char *than)
{
    const char *best = NULL;
    int32_t bound = 0, number, found = 0;
    size_t i;
    if (than)
        crpci_agreement_number(than, &bound);
    for (i = 0; i < count; i++) {
        if (!names[i] || !crpci_agreement_number(names[i], &number) ||
            (than && !crpci_zk_node_earlier(number, bound)))
            continue;
        if (!best || crpci_zk_node_earlier(number, found) == !than) {
            best = names[i];
            found = number;
        }
    }
    return best;
}

/* Translates a code of the client. */
CRPCI_FN int crpci_agreement_status(int rc)
{
    static const struct {
        int16_t rc, status;
    } codes[] = {{ZOK, CRPC_OK},
                 {ZNONODE, CRPC_ENOTFOUND},
                 {ZNODEEXISTS, CRPC_EEXISTS},
                 {ZBADVERSION, CRPC_EVERSION},
                 {ZNOTEMPTY, CRPC_ENOTEMPTY},
                 {ZNOAUTH, CRPC_EAUTH},
                 {ZINVALIDACL, CRPC_EAUTH},
                 {ZBADARGUMENTS, CRPC_EINVAL},
                 {ZNOCHILDRENFOREPHEMERALS, CRPC_EINVAL},
                 {ZUNIMPLEMENTED, CRPC_EUNSUPPORTED}};
    size_t i;
    for (i = 0; i < sizeof codes / sizeof *codes; i++) {
        if (codes[i].rc == rc)
            return codes[i].status;
    }
    return crpci_zk_job_unanswered(rc) ? CRPC_ECONN : CRPC_EINTERNAL;
}
#endif /* CRPC_ENABLE_ZOOKEEPER */

/* ======================================================================== */
/* >>impl-operations   reading and writing znodes, one or several at once  */
/* ======================================================================== */

/* An operation is an item (impl-agreement) with one job. A write is sent at most once: without an
 * answer it is reported as CRPC_SENT_MAYBE. Reads are repeated until the deadline. Programs call
 * this section on any thread; it takes the loop's lock itself. */

#if CRPC_ENABLE_ZOOKEEPER

#define CRPCI_OPERATIONS_TIMEOUT_MS 5000  /* where the program gives 0 */
#define CRPCI_OPERATIONS_PENDING    1000u /* unfinished asynchronous operations of a registry */
#define CRPCI_OPERATIONS_NUMBER     16    /* room for what ZooKeeper appends to a sequential name */

/* One operation, or several as one transaction. The item's references are the job, the queued
 * callback, and a synchronous caller. The loop's lock guards it. */
typedef struct crpci_operations_call {
    crpci_item item;
    crpci_zk_job job;
    crpc_node_fn fn;
    crpci_waiter *waiter; /* of a synchronous one */
    crpc_node_op *ops;    /* copies with full paths, in the block */
    crpci_zk_multi multi; /* the same for a transaction, in the block */
    size_t count;
    void *block; /* see crpci_operations_copy */
    size_t block_size;
    size_t root; /* length of the root in front of the paths */
    char *first; /* CRPC_NODE_FIRST: the node that was found */
    bool finished;
    int64_t deadline_us;
    crpc_node result;
} crpci_operations_call;

/* An operation's name, for error texts. */
CRPCI_FN const char *crpci_operations_name(crpc_node_verb verb)
{
    static const char words[][10] = {"?",      "create", "get",   "set",     "delete",
                                     "exists", "list",   "check", "first of"};
    return words[verb >= CRPC_NODE_CREATE && verb <= CRPC_NODE_FIRST ? verb : 0];
}

/* --- requests --------------------------------------------------------------------------------- */

/* Whether an operation can be one of `count`. ZooKeeper's transactions have no reads. */
CRPCI_FN bool crpci_operations_allowed(const crpc_node_op *o, size_t count)
{
    const unsigned all =
        CRPC_NODE_EPHEMERAL | CRPC_NODE_SEQUENTIAL | CRPC_NODE_PARENTS | CRPC_NODE_PRIVATE;
    if (o->verb < CRPC_NODE_CREATE || o->verb > CRPC_NODE_FIRST || o->version < -1 ||
        (o->flags && (o->verb != CRPC_NODE_CREATE || o->flags & ~all)))
        return false;
    if (count == 1)
        return o->verb != CRPC_NODE_CHECK;
    return (o->verb == CRPC_NODE_CREATE && !(o->flags & CRPC_NODE_PARENTS)) ||
           o->verb == CRPC_NODE_SET || o->verb == CRPC_NODE_DELETE || o->verb == CRPC_NODE_CHECK;
}

/* Checks operations before any of them is sent. *size: bytes that their copies need. */
CRPCI_COLD int crpci_operations_check(const crpc_registry *r, const crpc_node_op *ops, size_t count,
                                      size_t *size, crpc_error *error)
{
    size_t i, bytes = 0;
    *size = 0;
    if (!ops || count == 0 || count > CRPC_NODE_OPS_MAX)
        return crpci_status_set(error, CRPC_EINVAL, "%zu operations in one call: expected 1 to %d",
                                ops ? count : 0, CRPC_NODE_OPS_MAX);
    for (i = 0; i < count; i++) {
        const crpc_node_op *o = &ops[i];
        const char *verb = crpci_operations_name(o->verb);
        size_t n = crpc_view_size(o->data);
        if (!crpci_operations_allowed(o, count))
            return crpci_status_set(error, CRPC_EINVAL,
                                    "operation %zu (%s): unknown verb, flags or version that it "
                                    "does not take, or %s",
                                    i, verb,
                                    count == 1 ? "check cannot be the only operation of a call"
                                               : "not one of create without PARENTS, set, delete "
                                                 "and check, which go together");
        if (!crpci_agreement_path_ok(o->path, (o->flags & CRPC_NODE_SEQUENTIAL) != 0))
            return crpci_status_set(error, CRPC_EINVAL,
                                    "%s \"%.100s\": not a valid path: it has an empty part, "
                                    "\".\", \"..\" or a control character, or is too long",
                                    verb, o->path ? o->path : "");
        if (n > CRPC_NODE_BYTES_MAX || bytes > CRPC_NODE_BYTES_MAX - n)
            return crpci_status_set(error, CRPC_EINVAL, "%s \"%.100s\": over %d bytes of data",
                                    verb, o->path, CRPC_NODE_BYTES_MAX);
        bytes += n;
        *size += sizeof *o + sizeof(zoo_op_t) + sizeof(zoo_op_result_t) + sizeof(struct Stat) + n +
                 2 * (crpci_agreement_full(NULL, 0, r->root, o->path) + 1) +
                 CRPCI_OPERATIONS_NUMBER;
    }
    return CRPC_OK;
}

/* Copies operations with full paths, and prepares the arrays that zoo_amulti needs until its
 * completion: all of them in the block, the most aligned first. */
CRPCI_FN void crpci_operations_copy(crpci_operations_call *c, const char *root,
                                    const crpc_node_op *ops)
{
    struct Stat *stats = (struct Stat *)c->block;
    char *at, *end = (char *)c->block + c->block_size;
    size_t i;
    c->ops = (crpc_node_op *)(void *)(stats + c->count);
    c->multi.count = (int)c->count;
    c->multi.ops = (zoo_op_t *)(void *)(c->ops + c->count);
    c->multi.results = (zoo_op_result_t *)(void *)(c->multi.ops + c->count);
    at = (char *)(c->multi.results + c->count);
    for (i = 0; i < c->count; i++) {
        zoo_op_t *to = &c->multi.ops[i];
        crpc_node_op *o = &c->ops[i];
        size_t n = crpc_view_size(ops[i].data), room;
        char *path = at, *data;
        room = crpci_agreement_full(at, (size_t)(end - at), root, ops[i].path) + 1;
        data = at += room;
        if (n)
            memcpy(data, crpc_view_data(ops[i].data), n);
        at += n;
        *o = ops[i];
        o->path = path;
        o->data = crpc_view_of(data, n);
        room += CRPCI_OPERATIONS_NUMBER;
        if (o->verb == CRPC_NODE_CREATE)
            zoo_create_op_init(to, path, data, (int)n, crpci_zk_session_acl(o->flags),
                               (int)(o->flags & CRPCI_ZK_SESSION_FLAGS), at, (int)room);
        else if (o->verb == CRPC_NODE_SET)
            zoo_set_op_init(to, path, data, (int)n, o->version, &stats[i]);
        else if (o->verb == CRPC_NODE_DELETE)
            zoo_delete_op_init(to, path, o->version);
        else
            zoo_check_op_init(to, path, o->version);
        at += room;
    }
}

CRPCI_FN bool crpci_operations_order(crpci_zk_job *job, crpci_zk_order *order)
{
    static const uint8_t verbs[] = {CRPCI_ZK_CREATE, CRPCI_ZK_GET,  CRPCI_ZK_SET,   CRPCI_ZK_DELETE,
                                    CRPCI_ZK_STAT,   CRPCI_ZK_LIST, CRPCI_ZK_MULTI, CRPCI_ZK_LIST};
    crpci_operations_call *c = CRPCI_CONTAINER(job, crpci_operations_call, job);
    const crpc_node_op *o = &c->ops[0];
    order->verb = c->count > 1 ? CRPCI_ZK_MULTI
                  : c->first   ? CRPCI_ZK_GET
                               : (crpci_zk_verb)verbs[o->verb - CRPC_NODE_CREATE];
    order->path = c->first ? c->first : o->path;
    order->data = crpc_view_data(o->data);
    order->size = (int)crpc_view_size(o->data);
    order->version = o->version;
    order->flags = o->flags;
    order->multi = c->count > 1 ? &c->multi : NULL;
    return true;
}

/* --- results ---------------------------------------------------------------------------------- */

/* Translates ZooKeeper's Stat. `mine` compares with the present session. */
CRPCI_COLD void crpci_operations_stat(const crpci_zk_session *s, crpc_node_stat *out,
                                      const struct Stat *stat)
{
    out->created = stat->czxid;
    out->modified = stat->mzxid;
    out->version = stat->version;
    out->size = stat->dataLength;
    out->children = stat->numChildren;
    out->ephemeral = stat->ephemeralOwner != 0;
    out->mine = stat->ephemeralOwner != 0 && stat->ephemeralOwner == s->id;
}

/* Copies bytes to *at, in a block whose size was computed before. */
CRPCI_FN char *crpci_operations_put(char **at, const char *bytes, size_t size)
{
    char *out = *at;
    if (size)
        memcpy(out, bytes, size);
    *at += size;
    return out;
}

/* The results of a transaction. When it failed, one part has the reason and the others are
 * CRPC_ECANCELED. */
CRPCI_FN void crpci_operations_put_parts(crpci_operations_call *c, crpc_node_part *parts, char **at,
                                         const crpci_zk_multi *m, int rc)
{
    size_t i;
    bool found = false;
    for (i = 0; i < c->count; i++) {
        const zoo_op_result_t *from = &m->results[i];
        bool guilty = rc != ZOK && !found && from->err == rc;
        const char *path = rc == ZOK && c->ops[i].verb == CRPC_NODE_CREATE && from->value
                               ? from->value
                               : c->ops[i].path;
        path = crpci_agreement_relative(path, c->root);
        memset(&parts[i], 0, sizeof parts[i]);
        parts[i].status = rc == ZOK ? CRPC_OK
                          : guilty  ? crpci_agreement_status(rc)
                                    : CRPC_ECANCELED;
        parts[i].path = crpci_operations_put(at, path, strlen(path) + 1);
        if (rc == ZOK && c->ops[i].verb == CRPC_NODE_SET && from->stat)
            crpci_operations_stat(c->item.session, &parts[i].stat, from->stat);
        if (guilty)
            c->result.failed = i;
        found = found || guilty;
    }
    c->result.parts = parts;
    c->result.part_count = c->count;
}

/* Copies the whole answer into one chunk, because the client frees its own after the callback. `q`
 * and `a` are NULL if there was no answer. False: out of memory. */
CRPCI_FN bool crpci_operations_keep(crpci_operations_call *c, const crpci_zk_request *q,
                                    const crpci_zk_answer *a)
{
    const char *path = a && q->order.verb == CRPCI_ZK_CREATE && a->text ? a->text
                       : c->first                                       ? c->first
                                                                        : c->ops[0].path;
    bool reads = a && q->order.verb == CRPCI_ZK_GET && a->rc == ZOK && a->size >= 0 && a->text;
    size_t count = 0, size, i;
    char *const *names = a ? crpci_zk_node_names(a, &count) : NULL;
    const crpci_zk_multi *m = a ? q->order.multi : NULL;
    crpci_chunk *chunk;
    const char **list;
    char *at;
    path = crpci_agreement_relative(path, c->root);
    size = strlen(path) + 1 + (reads ? (size_t)a->size : 0) + count * sizeof *list;
    for (i = 0; i < count; i++)
        size += (names[i] ? strlen(names[i]) : 0) + 1;
    for (i = 0; m && i < c->count; i++)
        size += sizeof(crpc_node_part) + strlen(c->ops[i].path) + CRPCI_OPERATIONS_NUMBER;
    chunk = crpci_heap_chunk(c->item.session->heap, size);
    if (!chunk)
        return false;
    c->result.reserved[0] = chunk;
    list = (const char **)(void *)crpci_heap_data(chunk);
    at = (char *)(list + count);
    if (m) {
        at = (char *)crpci_heap_data(chunk) + c->count * sizeof(crpc_node_part);
        crpci_operations_put_parts(c, (crpc_node_part *)(void *)crpci_heap_data(chunk), &at, m,
                                   a->rc);
    }
    for (i = 0; i < count; i++)
        list[i] = crpci_operations_put(&at, names[i] ? names[i] : "",
                                       (names[i] ? strlen(names[i]) : 0) + 1);
    c->result.children = count ? list : NULL;
    c->result.child_count = count;
    c->result.path = crpci_operations_put(&at, path, strlen(path) + 1);
    if (reads)
        c->result.data =
            crpc_view_of(crpci_operations_put(&at, a->text, (size_t)a->size), (size_t)a->size);
    if (a && a->rc == ZOK && a->stat)
        crpci_operations_stat(c->item.session, &c->result.stat, a->stat);
    return true;
}

/* Ends an operation and wakes its caller or schedules its callback. `q` and `a` are NULL if there
 * was no answer. */
CRPCI_FN void crpci_operations_finish(crpci_operations_call *c, int code, crpc_sent sent,
                                      const crpci_zk_request *q, const crpci_zk_answer *a)
{
    crpci_zk_session *s = c->item.session;
    crpc_error *e = &c->result.error;
    const crpc_node_op *o = &c->ops[0];
    bool kept;
    if (c->finished)
        return;
    c->finished = true;
    c->result.path = "";
    /* false: the server's answer is lost for want of memory */
    kept = crpci_operations_keep(c, q, a);
    if (!kept)
        code = code ? code : CRPC_ENOMEM;
    if (kept && c->result.part_count)
        o = &c->ops[c->result.failed];
    if (code)
        crpci_status_set(e, code, "%s \"%.100s\" at zookeeper://%.60s: %s (%s)",
                         crpci_operations_name(o->verb), crpci_agreement_relative(o->path, c->root),
                         s->authority, crpc_status_text(code),
                         sent == CRPC_SENT_YES     ? "remote"
                         : sent == CRPC_SENT_MAYBE ? "local; ZooKeeper may have executed it"
                                                   : "local; nothing was sent");
    e->sent = sent;
    e->remote = sent == CRPC_SENT_YES && kept;
    e->app_code = a ? a->rc : 0;
    e->attempts = 1;
    snprintf(e->endpoint, sizeof e->endpoint, "%s", s->authority);
    c->item.owner->pending--;
    crpci_agreement_end(&c->item);
    if (c->waiter)
        crpci_drive_end_wait(s->loop, c->waiter);
    else
        crpci_agreement_ready(&c->item);
    crpci_zk_job_drop(&c->job);
}

/* Runs an asynchronous operation's callback; the result is freed with the item. */
CRPCI_FN void crpci_operations_tell(crpci_item *item)
{
    crpci_operations_call *c = CRPCI_CONTAINER(item, crpci_operations_call, item);
    crpci_loop_user_begin(item->session->loop);
    c->fn(item->user, &c->result);
    crpci_loop_user_end(item->session->loop);
}

/* The deadline of an operation. */
CRPCI_FN void crpci_operations_timer(crpc_loop *l, crpci_timer *timer)
{
    crpci_item *item = CRPCI_CONTAINER(timer, crpci_item, timer);
    crpci_operations_call *c = CRPCI_CONTAINER(item, crpci_operations_call, item);
    bool sent = crpci_zk_job_pending(&c->job);
    (void)l;
    crpci_operations_finish(c, c->job.sent ? CRPC_ETIMEDOUT : CRPC_ECONN,
                            sent ? CRPC_SENT_MAYBE : CRPC_SENT_NO, NULL, NULL);
}

/* The answers of CRPC_NODE_FIRST: a list, then the content of its first node. */
CRPCI_FN void crpci_operations_first(crpci_operations_call *c, const crpci_zk_request *q,
                                     const crpci_zk_answer *a)
{
    crpci_heap *h = c->item.session->heap;
    size_t count;
    char *const *names = crpci_zk_node_names(a, &count);
    const char *first;
    if (q->order.verb == CRPCI_ZK_GET && a->rc == ZNONODE) {
        crpci_heap_strfree(h, c->first); /* removed since the list was read: list again */
        c->first = NULL;
        c->job.due_us = 0;
        return;
    }
    if (q->order.verb == CRPCI_ZK_GET || a->rc != ZOK) {
        crpci_operations_finish(c, crpci_agreement_status(a->rc), CRPC_SENT_YES, q, a);
        return;
    }
    first = crpci_agreement_pick(names, count, NULL);
    c->first = first ? crpci_zk_node_join(h, c->ops[0].path, first) : NULL;
    c->job.due_us = 0;
    if (!c->first)
        crpci_operations_finish(c, first ? CRPC_ENOMEM : CRPC_ENOTFOUND,
                                first ? CRPC_SENT_MAYBE : CRPC_SENT_YES, NULL, NULL);
}

CRPCI_FN void crpci_operations_event(crpci_zk_job *job, crpci_zk_event event,
                                     const crpci_zk_request *q, const crpci_zk_answer *a)
{
    crpci_operations_call *c = CRPCI_CONTAINER(job, crpci_operations_call, job);
    if (event == CRPCI_ZK_RESUMED || event == CRPCI_ZK_RENEWED)
        job->due_us = 0;
    else if (event == CRPCI_ZK_DOUBTED)
        crpci_operations_finish(c, a && a->rc == ZSYSTEMERROR ? CRPC_ENOMEM : CRPC_ECONN,
                                CRPC_SENT_MAYBE, NULL, NULL);
    else if (event == CRPCI_ZK_ANSWERED && !q->sent_us)
        crpci_operations_finish(c, CRPC_EINVAL, CRPC_SENT_NO, NULL, NULL);
    else if (event == CRPCI_ZK_ANSWERED && c->ops[0].verb == CRPC_NODE_FIRST)
        crpci_operations_first(c, q, a);
    else if (event == CRPCI_ZK_ANSWERED)
        crpci_operations_finish(c, crpci_agreement_status(a->rc), CRPC_SENT_YES, q, a);
}

static const crpci_zk_work crpci_operations_work = {crpci_operations_order, crpci_operations_event,
                                                    NULL};

/* The registry closes. */
CRPCI_FN void crpci_operations_end(crpci_item *item)
{
    crpci_operations_call *c = CRPCI_CONTAINER(item, crpci_operations_call, item);
    crpci_operations_finish(c, CRPC_ECANCELED,
                            crpci_zk_job_writing(&c->job) ? CRPC_SENT_MAYBE : CRPC_SENT_NO, NULL,
                            NULL);
}

CRPCI_FN void crpci_operations_free(crpci_item *item)
{
    crpci_operations_call *c = CRPCI_CONTAINER(item, crpci_operations_call, item);
    crpci_heap_chunk_unref((crpci_chunk *)c->result.reserved[0]);
    crpci_heap_free(item->session->heap, c->block, c->block_size);
    crpci_heap_strfree(item->session->heap, c->first);
}

static const crpci_item_kind crpci_operations_kind = {sizeof(crpci_operations_call),
                                                      crpci_operations_tell, crpci_operations_end,
                                                      crpci_operations_free};

/* Checks and begins an operation. The caller gets a reference to the one in *out. Locked, unlocks
 * meanwhile. */
CRPCI_FN int crpci_operations_begin(crpc_registry *r, const crpc_node_op *ops, size_t count,
                                    int timeout_ms, crpc_node_fn fn, void *user,
                                    crpci_waiter *waiter, crpci_operations_call **out,
                                    crpc_error *error)
{
    int64_t ms =
        crpci_base_option(timeout_ms, CRPCI_OPERATIONS_TIMEOUT_MS, CRPCI_AGREEMENT_LONGEST_MS);
    size_t size;
    crpci_operations_call *c;
    int err = crpci_operations_check(r, ops, count, &size, error);
    if (err)
        return err;
    c = (crpci_operations_call *)crpci_agreement_new(r, &crpci_operations_kind,
                                                     crpci_operations_timer, user);
    if (c)
        c->block = crpci_heap_alloc(r->session->heap, size);
    if (!c || !c->block) {
        if (c)
            crpci_agreement_discard(&c->item);
        return crpci_status_set(error, CRPC_ENOMEM, "crpc_registry_call: out of memory");
    }
    c->fn = fn;
    c->waiter = waiter;
    c->root = strlen(r->root);
    c->count = count;
    c->block_size = size;
    crpci_operations_copy(c, r->root, ops);
    r->pending++;
    c->deadline_us = crpci_loop_now(r->loop) + ms * 1000;
    c->item.refs++;
    crpci_zk_job_add(&c->job, &crpci_operations_work, r->session, 0, &c->item,
                     crpci_agreement_unref);
    crpci_loop_timer_at(r->loop, &c->item.timer, c->deadline_us);
    crpci_zk_session_kick(r->session);
    *out = c;
    return CRPC_OK;
}

/* A node that holds nothing, or was reset before, is accepted. */
CRPC_API void crpc_node_reset(crpc_node *node)
{
    crpci_chunk *chunk = (crpci_chunk *)node->reserved[0];
    memset(node, 0, sizeof *node);
    crpci_heap_chunk_unref(chunk);
}

/* The waiter is on this thread's stack: c->waiter is cleared before the return, and the reference
 * of *out keeps the item until the result has been moved to the caller. */
CRPC_API int crpc_registry_call(crpc_registry *r, const crpc_node_op *ops, size_t count,
                                int timeout_ms, crpc_node *node)
{
    crpc_error *error = node ? &node->error : NULL;
    crpci_zk_session *s = r->session;
    crpc_loop *l = r->loop;
    crpci_operations_call *c;
    crpci_waiter w;
    int err;
    if (node)
        crpc_node_reset(node);
    memset(&w, 0, sizeof w);
    crpci_loop_lock(l);
    s->refs++; /* another thread may close the registry meanwhile */
    if (crpci_loop_in_callback(l))
        err = crpci_status_set(error, CRPC_EDEADLK,
                               "crpc_registry_call: it waits, so it must not be called inside a "
                               "callback of its loop");
    else
        err = crpci_operations_begin(r, ops, count, timeout_ms, NULL, NULL, &w, &c, error);
    if (err) {
        crpci_zk_session_unlock(s);
        return err;
    }
    crpci_drive_wait(l, &w, c->deadline_us, false);
    if (!c->finished) /* the wait has timed out before the loop's driver ran the timer */
        crpci_operations_timer(l, &c->item.timer);
    c->waiter = NULL;
    err = c->result.error.code;
    if (node) {
        *node = c->result;
        c->result.reserved[0] = NULL;
    }
    crpci_agreement_unref(&c->item);
    crpci_zk_session_unlock(s);
    return err;
}

CRPC_API int crpc_registry_call_async(crpc_registry *r, const crpc_node_op *ops, size_t count,
                                      int timeout_ms, crpc_node_fn fn, void *user)
{
    crpci_zk_session *s = r->session;
    crpci_operations_call *c;
    int err;
    if (!fn)
        return CRPC_EINVAL;
    crpci_loop_lock(r->loop);
    s->refs++;
    err = r->pending >= CRPCI_OPERATIONS_PENDING ? CRPC_ELIMIT : crpci_agreement_need_owner(r);
    err = err ? err : crpci_operations_begin(r, ops, count, timeout_ms, fn, user, NULL, &c, NULL);
    if (!err)
        crpci_agreement_unref(&c->item);
    crpci_zk_session_unlock(s);
    return err;
}
#endif /* CRPC_ENABLE_ZOOKEEPER */

/* ======================================================================== */
/* >>impl-config   following the value of a znode                          */
/* ======================================================================== */

/* A watched configuration value is an item (impl-agreement) with one crpci_zk_watch. The program is
 * told of the present value and of later ones; values that are replaced before the callback runs
 * are skipped. */

#if CRPC_ENABLE_ZOOKEEPER

/* One watched value. The loop's lock guards it. */
typedef struct crpci_config_watch {
    crpci_item item;
    crpci_zk_watch watch;
    crpc_config_fn fn;
    crpci_chunk *value; /* the bytes; NULL: the node does not exist, or was not read yet */
    size_t size;
    struct Stat stat;
    bool known; /* the node was read at least once */
    bool news;  /* the program has not been told of the present value yet */
} crpci_config_watch;

/* A value was read, on the thread that runs the client. Equal ones are not reported again. */
CRPCI_FN bool crpci_config_on_value(crpci_zk_watch *w, const crpci_zk_answer *a)
{
    crpci_config_watch *c = CRPCI_CONTAINER(w, crpci_config_watch, watch);
    size_t size = a->size > 0 && a->text ? (size_t)a->size : 0;
    const char *bytes = size ? a->text : "";
    crpci_chunk *value = NULL;
    if ((a->rc != ZOK && a->rc != ZNONODE) || !c->item.owner)
        return true;
    if (c->known && (a->rc == ZOK) == (c->value != NULL) &&
        (!c->value || (a->stat->czxid == c->stat.czxid && a->stat->mzxid == c->stat.mzxid &&
                       size == c->size && memcmp(bytes, crpci_heap_data(c->value), size) == 0)))
        return true;
    if (a->rc == ZOK) {
        value = crpci_heap_chunk(c->item.session->heap, size);
        if (!value)
            return false;
        memcpy(crpci_heap_data(value), bytes, size);
        c->stat = *a->stat;
    }
    crpci_heap_chunk_unref(c->value);
    c->value = value;
    c->size = size;
    c->known = c->news = true;
    crpci_agreement_ready(&c->item);
    return true;
}

/* Calls the program until it has the present value. The value is held over the callback, because a
 * new one may replace it meanwhile. */
CRPCI_FN void crpci_config_tell(crpci_item *item)
{
    crpci_config_watch *c = CRPCI_CONTAINER(item, crpci_config_watch, item);
    crpc_loop *l = item->session->loop;
    while (c->news && item->owner) {
        crpci_chunk *value = c->value;
        crpc_view view =
            value ? crpc_view_of(crpci_heap_data(value), c->size) : crpc_view_of(NULL, 0);
        int32_t version = value ? c->stat.version : 0;
        c->news = false;
        if (value)
            crpci_heap_chunk_ref(value);
        crpci_loop_user_begin(l);
        c->fn(item->user, view, version, value != NULL);
        crpci_heap_chunk_unref(value);
        crpci_loop_user_end(l);
    }
}

/* Ends a watch, for the program or for the registry that closes. */
CRPCI_FN void crpci_config_end(crpci_item *item)
{
    crpci_agreement_end(item);
    crpci_zk_job_drop(&CRPCI_CONTAINER(item, crpci_config_watch, item)->watch.job);
}

CRPCI_FN void crpci_config_free(crpci_item *item)
{
    crpci_heap_chunk_unref(CRPCI_CONTAINER(item, crpci_config_watch, item)->value);
}

static const crpci_item_kind crpci_config_kind = {sizeof(crpci_config_watch), crpci_config_tell,
                                                  crpci_config_end, crpci_config_free};

/* The program may be called before this returns, on the thread that drives the loop; *id is set
 * before. */
CRPC_API int crpc_config_watch(crpc_registry *r, const char *path, crpc_config_fn fn, void *user,
                               crpc_id *id)
{
    crpci_zk_session *s = r->session;
    crpci_config_watch *c = NULL;
    char *full = NULL;
    int err;
    id->value = 0;
    if (!fn || !crpci_agreement_path_ok(path, false))
        return CRPC_EINVAL;
    crpci_loop_lock(r->loop);
    err = crpci_agreement_need_owner(r);
    if (!err) {
        full = crpci_agreement_path(s->heap, r->root, path);
        c = (crpci_config_watch *)crpci_agreement_new(r, &crpci_config_kind, NULL, user);
        err = c && full ? crpci_id_add(&r->configs, s->heap, c, &id->value) : CRPC_ENOMEM;
    }
    if (!err) { /* the job takes over the item's only reference */
        c->fn = fn;
        crpci_zk_node_watch_init(&c->watch, s, CRPCI_ZK_WATCH_DATA, full, crpci_config_on_value,
                                 &c->item, crpci_agreement_unref);
        crpci_zk_node_watch_again(&c->watch);
        crpci_zk_session_kick(s);
    } else {
        crpci_heap_strfree(s->heap, full);
        if (c)
            crpci_agreement_discard(&c->item);
    }
    crpci_loop_unlock(r->loop);
    return err;
}

/* After this no callback begins; one that is running on another thread may still be inside. */
CRPC_API void crpc_config_unwatch(crpc_registry *r, crpc_id id)
{
    crpci_config_watch *c;
    crpci_loop_lock(r->loop);
    c = (crpci_config_watch *)crpci_id_get(&r->configs, id.value);
    if (c) {
        crpci_id_remove(&r->configs, id.value);
        crpci_config_end(&c->item);
    }
    crpci_loop_unlock(r->loop);
}
#endif /* CRPC_ENABLE_ZOOKEEPER */

/* ======================================================================== */
/* >>impl-queue   locks and elections                                        */
/* ======================================================================== */

#if CRPC_ENABLE_ZOOKEEPER

/* Each contender owns an ephemeral sequential node. The one with the lowest number holds the lock;
 * every other contender watches the node before its own, so that a release wakes only one of them.
 * The name carries an id, by which a contender finds its node again if the create got no answer.
 * (These are Apache ZooKeeper's recipes with the protection and the node names of Curator.)
 *
 * A holder has a lease. A server ends a session after it has heard nothing for the session's
 * timeout, and an answered request reached the server after it was sent. So an answered check of
 * the own node, made every quarter of the timeout, proves that the session lives for one timeout
 * from the moment of sending; the lease is that less a tenth. When it expires, this process gives
 * the lock up before another process can get it. If the session turns out to be alive, its node is
 * removed all the same.
 *
 *     OUT    not in the queue             acquire, or the election opens       -> ENTER
 *     ENTER  the node is being made       it is owned                          -> LOOK
 *     LOOK   the queue is being read      none is before it                    -> FIRST
 *                                         one is                               -> WAIT, or OUT if
 *                                                                              only tried
 *     WAIT   the one before is watched    that is gone                         -> LOOK
 *     FIRST  the own node is checked      it is there                          -> HELD
 *     HELD   until lease_us               the node, the session or the lease   -> OUT; of an
 *                                         is gone                              election ENTER
 *
 * From LOOK, WAIT and FIRST the loss of the node or the session leads to ENTER. Release, close, the
 * end of the time to wait, and for a lock also an error of the registry lead to OUT. */
typedef enum crpci_queue_state {
    CRPCI_QUEUE_OUT,
    CRPCI_QUEUE_ENTER,
    CRPCI_QUEUE_LOOK,
    CRPCI_QUEUE_WAIT,
    CRPCI_QUEUE_FIRST,
    CRPCI_QUEUE_HELD
} crpci_queue_state;

/* What the program was told last, and what it must be told next. */
typedef enum crpci_queue_told {
    CRPCI_QUEUE_QUIET, /* it holds nothing, and waits for nothing */
    CRPCI_QUEUE_ASKED, /* a lock: the acquire callback is still due, with `outcome` or success */
    CRPCI_QUEUE_LEADS, /* it holds, with told_token: the loss must be reported */
    CRPCI_QUEUE_CLOSED /* the handle is closed: no callback any more */
} crpci_queue_told;

/* A place in the queue of a lock or an election. The loop's lock guards it. */
typedef struct crpci_queue_place {
    crpci_item item;
    crpci_zk_own own;
    crpci_zk_watch list;   /* lists the directory */
    crpci_zk_watch before; /* waits for the end of the node before the own one */
    crpci_queue_state state;
    crpci_queue_told told;
    bool once;   /* the attempt fails unless the lock is free now */
    int outcome; /* why the attempt failed; 0: it has not */
    int64_t told_token;
    int64_t token;    /* HELD: the fencing token, which is the node's creation zxid */
    int64_t lease_us; /* HELD: when the lease expires, on the loop's clock */
    char *dir;
    char *who; /* content of the node: the holder's description */
    size_t who_size;
    crpc_lock_fn on_lock;         /* set for a lock; else NULL */
    crpc_election_fn on_election; /* set for an election; else NULL */
} crpci_queue_place;

struct crpc_lock {
    crpci_queue_place place;
};

struct crpc_election {
    crpci_queue_place place;
};

/* Reads the queue. */
CRPCI_FN void crpci_queue_look(crpci_queue_place *q)
{
    q->state = CRPCI_QUEUE_LOOK;
    crpci_zk_node_watch_again(&q->list);
}

/* Enters another state, forgets what was read of the queue, and changes the wish for the node. */
CRPCI_FN void crpci_queue_to(crpci_queue_place *q, crpci_queue_state state, crpci_zk_wish wish)
{
    q->state = state;
    q->own.check_us = CRPCI_ZK_NODE_CHECK_US;
    crpci_zk_node_watch_stop(&q->list);
    crpci_zk_node_watch_stop(&q->before);
    crpci_zk_node_own_want(&q->own, wish);
}

/* Leaves the queue, or loses the place. `status` becomes the outcome of an attempt that is under
 * way. */
CRPCI_FN void crpci_queue_out(crpci_queue_place *q, int status)
{
    if (q->told == CRPCI_QUEUE_ASKED && !q->outcome)
        q->outcome = status;
    crpci_loop_timer_cancel(q->item.session->loop, &q->item.timer);
    crpci_queue_to(q, CRPCI_QUEUE_OUT, CRPCI_ZK_WISH_UNWANTED);
    crpci_agreement_ready(&q->item);
}

/* No longer held. An existing node is removed before an election queues again. */
CRPCI_FN void crpci_queue_lose(crpci_queue_place *q)
{
    crpci_queue_out(q, CRPC_EGONE); /* for an attempt whose success was not reported yet */
    if (q->on_election && q->told != CRPCI_QUEUE_CLOSED)
        crpci_queue_to(q, CRPCI_QUEUE_ENTER, CRPCI_ZK_WISH_AFRESH);
}

/* The lease has expired, or the time to wait in the queue is over. */
CRPCI_FN void crpci_queue_timer(crpc_loop *l, crpci_timer *timer)
{
    crpci_item *item = CRPCI_CONTAINER(timer, crpci_item, timer);
    crpci_queue_place *q = CRPCI_CONTAINER(item, crpci_queue_place, item);
    crpci_zk_session *s = item->session;
    (void)l;
    if (q->state == CRPCI_QUEUE_HELD) {
        crpci_heap_log(s->heap, CRPC_LOG_WARN,
                       "%s %s: lease expired without an answer from zookeeper://%s; given up",
                       q->on_lock ? "lock" : "election", q->dir, s->authority);
        crpci_queue_lose(q);
    } else {
        crpci_queue_out(q, s->phase == CRPCI_ZK_CONNECTED ? CRPC_ETIMEDOUT : CRPC_ECONN);
    }
    crpci_zk_session_soon(s);
}

/* --- the own node ----------------------------------------------------------------------------- */

/* A new id in the shape of a UUID, because other implementations parse it as one. */
CRPCI_FN char *crpci_queue_name(crpci_zk_own *own)
{
    crpci_zk_session *s = own->job.session;
    uint64_t id = (uint64_t)s->id;
    uint32_t now = (uint32_t)crpci_zk_job_now(s);
    char name[48 + sizeof CRPCI_AGREEMENT_MARK];
    snprintf(name, sizeof name, "_c_%08x-%04x-%04x-%04x-%04x%08x%s", (unsigned)(id >> 32),
             (unsigned)(id >> 16 & 0xffff), (unsigned)(id & 0xffff), (unsigned)(now >> 16),
             (unsigned)(now & 0xffff), (unsigned)crpci_loop_random(s->loop), CRPCI_AGREEMENT_MARK);
    return crpci_zk_node_join(s->heap, own->dir, name);
}

/* The own node is the first, and existed when the check was sent: the lock is held, or its lease is
 * extended. */
CRPCI_FN void crpci_queue_grant(crpci_queue_place *q, int64_t sent_us, const struct Stat *stat)
{
    crpci_zk_session *s = q->item.session;
    int64_t until = sent_us + (int64_t)s->negotiated_ms * 900, now = crpci_zk_job_now(s);
    if (until <= now)
        return;
    q->lease_us = until;
    crpci_loop_timer_set(s->loop, &q->item.timer, until - now);
    if (q->state == CRPCI_QUEUE_HELD)
        return;
    q->state = CRPCI_QUEUE_HELD;
    q->token = stat->czxid;
    crpci_agreement_ready(&q->item);
}

CRPCI_FN void crpci_queue_owned(crpci_zk_own *own, int64_t sent_us, const struct Stat *stat,
                                bool news)
{
    crpci_queue_place *q = CRPCI_CONTAINER(own, crpci_queue_place, own);
    (void)news;
    if (q->state == CRPCI_QUEUE_ENTER)
        crpci_queue_look(q);
    else if (stat && q->state >= CRPCI_QUEUE_FIRST)
        crpci_queue_grant(q, sent_us, stat);
}

CRPCI_FN void crpci_queue_lost(crpci_zk_own *own, int rc)
{
    crpci_queue_place *q = CRPCI_CONTAINER(own, crpci_queue_place, own);
    bool gone = rc == ZNONODE || rc == ZSESSIONEXPIRED;
    if (rc == ZNONODE)
        crpci_heap_log(q->item.session->heap, CRPC_LOG_WARN,
                       "%s %s: another client removed this process's node; the place is lost",
                       q->on_lock ? "lock" : "election", q->dir);
    if (q->state == CRPCI_QUEUE_HELD && gone)
        crpci_queue_lose(q);
    else if (gone)
        crpci_queue_to(q, CRPCI_QUEUE_ENTER, CRPCI_ZK_WISH_WANTED);
    else if (q->on_lock)
        crpci_queue_out(q, crpci_agreement_status(rc));
}

/* --- the queue -------------------------------------------------------------------------------- */

/* The queue was read: the place is the first, or it waits for the node before it. */
CRPCI_FN bool crpci_queue_on_list(crpci_zk_watch *w, const crpci_zk_answer *a)
{
    crpci_queue_place *q = CRPCI_CONTAINER(w, crpci_queue_place, list);
    const char *before;
    size_t count;
    char *const *names = crpci_zk_node_names(a, &count);
    if (q->state != CRPCI_QUEUE_LOOK || !q->own.path)
        return true;
    if (a->rc != ZOK && a->rc != ZNONODE) {
        if (q->on_lock)
            crpci_queue_out(q, crpci_agreement_status(a->rc));
        return true;
    }
    before = crpci_agreement_pick(names, count, strrchr(q->own.path, '/') + 1);
    if (!before) {
        q->state = CRPCI_QUEUE_FIRST;
        crpci_zk_node_own_check(&q->own, (int64_t)q->item.session->negotiated_ms * 250);
    } else if (q->once) {
        crpci_queue_out(q, CRPC_ETIMEDOUT);
    } else {
        if (!crpci_zk_node_watch_set(&q->before, CRPCI_ZK_WATCH_END,
                                     crpci_zk_node_join(q->item.session->heap, q->dir, before)))
            return false;
        q->state = CRPCI_QUEUE_WAIT;
    }
    return true;
}

/* The node before the own one was removed: it may have been a waiting contender, so the queue is
 * read again. */
CRPCI_FN bool crpci_queue_on_before(crpci_zk_watch *w, const crpci_zk_answer *a)
{
    crpci_queue_place *q = CRPCI_CONTAINER(w, crpci_queue_place, before);
    if (q->state == CRPCI_QUEUE_WAIT && a->rc == ZNONODE)
        crpci_queue_look(q);
    return true;
}

/* --- callbacks -------------------------------------------------------------------------------- */

CRPCI_FN void crpci_queue_say(crpci_queue_place *q, int status, int64_t token)
{
    crpc_loop *l = q->item.session->loop;
    crpci_loop_user_begin(l);
    if (q->on_election)
        q->on_election(q->item.user, status == CRPC_OK, token);
    else
        q->on_lock(q->item.user, status, token);
    crpci_loop_user_end(l);
}

/* Reports a loss before the next success, even if both happened before the program's
 * callback ran. */
CRPCI_FN void crpci_queue_tell(crpci_item *item)
{
    crpci_queue_place *q = CRPCI_CONTAINER(item, crpci_queue_place, item);
    for (;;) {
        bool held = q->state == CRPCI_QUEUE_HELD;
        int status = q->outcome;
        if (q->told == CRPCI_QUEUE_LEADS && (!held || q->token != q->told_token)) {
            q->told = CRPCI_QUEUE_QUIET;
            crpci_queue_say(q, CRPC_EGONE, q->told_token);
        } else if (held && q->told < CRPCI_QUEUE_LEADS) {
            q->told = CRPCI_QUEUE_LEADS;
            q->told_token = q->token;
            crpci_queue_say(q, CRPC_OK, q->token);
        } else if (q->told == CRPCI_QUEUE_ASKED && status) {
            q->told = CRPCI_QUEUE_QUIET;
            crpci_queue_say(q, status, 0);
        } else {
            return;
        }
    }
}

/* --- opening and closing ---------------------------------------------------------------------- */

static const crpci_zk_owner crpci_queue_owner = {crpci_queue_name, crpci_queue_owned,
                                                 crpci_queue_lost};

CRPCI_FN void crpci_queue_free(crpci_item *item)
{
    crpci_queue_place *q = CRPCI_CONTAINER(item, crpci_queue_place, item);
    crpci_heap_free(item->session->heap, q->who, q->who_size);
    crpci_heap_strfree(item->session->heap, q->dir);
}

/* The program or the registry closes the place; the session removes the node afterwards. */
CRPCI_FN void crpci_queue_end(crpci_item *item)
{
    crpci_queue_place *q = CRPCI_CONTAINER(item, crpci_queue_place, item);
    if (q->told == CRPCI_QUEUE_LEADS && q->on_lock)
        q->told = CRPCI_QUEUE_QUIET;
    item->refs++;
    crpci_queue_out(q, CRPC_ECANCELED);
    crpci_agreement_end(item);
    crpci_zk_job_drop(&q->list.job);
    crpci_zk_job_drop(&q->before.job);
    crpci_zk_node_own_want(&q->own, CRPCI_ZK_WISH_ENDED);
    crpci_zk_session_kick(item->session);
    crpci_agreement_unref(item);
}

static const crpci_item_kind crpci_queue_kind = {sizeof(crpci_queue_place), crpci_queue_tell,
                                                 crpci_queue_end, crpci_queue_free};

/* A new place outside the queue, with a reference for the handle. Locked. */
CRPCI_FN int crpci_queue_new(crpc_registry *r, const char *path, crpc_view who, void *user,
                             crpci_queue_place **out)
{
    crpci_zk_session *s = r->session;
    crpci_heap *h = s->heap;
    crpci_queue_place *q;
    char *list;
    int err = crpci_agreement_need_owner(r);
    if (err)
        return err;
    q = (crpci_queue_place *)crpci_agreement_new(r, &crpci_queue_kind, crpci_queue_timer, user);
    if (!q)
        return CRPC_ENOMEM;
    q->dir = crpci_agreement_path(h, r->root, path);
    list = crpci_agreement_path(h, r->root, path);
    q->who_size = crpc_view_size(who) + 1; /* never 0: the heap has no empty blocks */
    q->who = (char *)crpci_heap_alloc(h, q->who_size);
    if (!q->dir || !list || !q->who) {
        crpci_heap_strfree(h, list);
        crpci_agreement_discard(&q->item);
        return CRPC_ENOMEM;
    }
    if (q->who_size > 1)
        memcpy(q->who, crpc_view_data(who), q->who_size - 1);
    q->item.refs += 3;
    crpci_zk_node_own_init(&q->own, s, &crpci_queue_owner, q->dir, &q->item, crpci_agreement_unref);
    q->own.sequential = q->own.unwatched = true;
    q->own.data = q->who;
    q->own.size = (int)q->who_size - 1;
    crpci_zk_node_watch_init(&q->list, s, CRPCI_ZK_WATCH_CHILDREN_ONCE, list, crpci_queue_on_list,
                             &q->item, crpci_agreement_unref);
    crpci_zk_node_watch_init(&q->before, s, CRPCI_ZK_WATCH_END, NULL, crpci_queue_on_before,
                             &q->item, crpci_agreement_unref);
    *out = q;
    return CRPC_OK;
}

/* Opens a place for a lock or, with `on_election`, for an election. */
CRPCI_FN int crpci_queue_open(crpc_registry *r, const char *path, crpc_view who,
                              crpc_lock_fn on_lock, crpc_election_fn on_election, void *user,
                              crpci_queue_place **out)
{
    int err;
    if ((!on_lock && !on_election) || !crpci_agreement_path_ok(path, false) ||
        !path[*path == '/'] || crpc_view_size(who) > CRPC_NODE_BYTES_MAX)
        return CRPC_EINVAL;
    crpci_loop_lock(r->loop);
    err = crpci_queue_new(r, path, who, user, out);
    if (!err) {
        (*out)->on_lock = on_lock;
        (*out)->on_election = on_election;
    }
    crpci_loop_unlock(r->loop);
    return err;
}

CRPCI_FN void crpci_queue_close(crpci_queue_place *q)
{
    crpci_zk_session *s = q->item.session;
    crpci_loop_lock(s->loop);
    s->refs++;
    q->told = CRPCI_QUEUE_CLOSED;
    if (q->item.owner)
        crpci_queue_end(&q->item);
    crpci_agreement_unref(&q->item);
    crpci_zk_session_unlock(s);
}

/* Time left of the lease, in microseconds; 0: not held. Any thread. */
CRPCI_FN int64_t crpci_queue_lease(crpci_queue_place *q)
{
    crpci_zk_session *s = q->item.session;
    int64_t left;
    crpci_loop_lock(s->loop);
    left = q->state == CRPCI_QUEUE_HELD ? q->lease_us - crpci_zk_job_now(s) : 0;
    crpci_loop_unlock(s->loop);
    return left > 0 ? left : 0;
}

CRPC_API int crpc_lock_open(crpc_lock **lock, crpc_registry *r, const char *path, const char *who,
                            crpc_lock_fn fn, void *user)
{
    crpci_queue_place *q;
    int err = crpci_queue_open(r, path, crpc_view_str(who), fn, NULL, user, &q);
    *lock = err ? NULL : CRPCI_CONTAINER(q, crpc_lock, place);
    return err;
}

CRPC_API int crpc_lock_acquire(crpc_lock *lock, int timeout_ms)
{
    crpci_queue_place *q = &lock->place;
    crpci_zk_session *s = q->item.session;
    int err = CRPC_OK;
    crpci_loop_lock(s->loop);
    if (!q->item.owner)
        err = CRPC_ECANCELED;
    else if (q->state != CRPCI_QUEUE_OUT || q->told != CRPCI_QUEUE_QUIET)
        err = CRPC_EBUSY;
    if (!err) {
        int64_t ms = timeout_ms ? timeout_ms : CRPCI_OPERATIONS_TIMEOUT_MS;
        q->told = CRPCI_QUEUE_ASKED;
        q->once = timeout_ms == 0;
        q->outcome = 0;
        if (ms > 0)
            crpci_loop_timer_set(s->loop, &q->item.timer, ms * 1000);
        crpci_queue_to(q, CRPCI_QUEUE_ENTER, CRPCI_ZK_WISH_AFRESH);
        crpci_zk_session_kick(s);
    }
    crpci_loop_unlock(s->loop);
    return err;
}

CRPC_API int64_t crpc_lock_lease_us(crpc_lock *lock)
{
    return crpci_queue_lease(&lock->place);
}

CRPC_API void crpc_lock_release(crpc_lock *lock)
{
    crpci_queue_place *q = &lock->place;
    crpci_zk_session *s = q->item.session;
    crpci_loop_lock(s->loop);
    if (q->item.owner && (q->state != CRPCI_QUEUE_OUT || q->told == CRPCI_QUEUE_LEADS)) {
        if (q->told == CRPCI_QUEUE_LEADS)
            q->told = CRPCI_QUEUE_QUIET;
        crpci_queue_out(q, CRPC_ECANCELED);
        crpci_zk_session_kick(s);
    }
    crpci_loop_unlock(s->loop);
}

CRPC_API void crpc_lock_close(crpc_lock *lock)
{
    if (lock)
        crpci_queue_close(&lock->place);
}

CRPC_API int crpc_election_open(crpc_election **election, crpc_registry *r, const char *path,
                                crpc_view who, crpc_election_fn fn, void *user)
{
    crpci_queue_place *q;
    int err = crpci_queue_open(r, path, who, NULL, fn, user, &q);
    *election = err ? NULL : CRPCI_CONTAINER(q, crpc_election, place);
    if (err)
        return err;
    crpci_loop_lock(r->loop); /* the callback can run from here on, and finds *election set */
    crpci_queue_to(q, CRPCI_QUEUE_ENTER, CRPCI_ZK_WISH_WANTED);
    crpci_zk_session_kick(r->session);
    crpci_loop_unlock(r->loop);
    return CRPC_OK;
}

CRPC_API int64_t crpc_election_lease_us(crpc_election *election)
{
    return crpci_queue_lease(&election->place);
}

CRPC_API void crpc_election_resign(crpc_election *election)
{
    crpci_queue_place *q = &election->place;
    crpci_zk_session *s = q->item.session;
    crpci_loop_lock(s->loop);
    if (q->item.owner) {
        crpci_queue_lose(q);
        crpci_zk_session_kick(s);
    }
    crpci_loop_unlock(s->loop);
}

CRPC_API void crpc_election_close(crpc_election *election)
{
    if (election)
        crpci_queue_close(&election->place);
}
#endif /* CRPC_ENABLE_ZOOKEEPER */

/* ======================================================================== */
/* >>impl-registry   opening and closing a session that programs use         */
/* ======================================================================== */

/* crpc_registry_open joins a session and puts a listener on it, the gate, which reports the
 * session's state to the program and lets the opening thread wait for the first connection. Any
 * thread; takes the loop's lock. */

#if CRPC_ENABLE_ZOOKEEPER

#define CRPCI_REGISTRY_OPEN_MS 3000 /* default wait for a session; see registry_timeout_ms */

/* Reports the session's state to the program and to the thread that opens the registry. */
typedef struct crpci_registry_gate {
    crpci_item item;
    crpci_zk_job job;
    crpc_registry_state state;
    int64_t session; /* id of the last connected session */
    bool news;       /* the program has not been told of the present state yet */
    crpc_registry_state_fn fn;
    crpci_waiter *waiter;
} crpci_registry_gate;

/* The state of the session has changed: wakes the opening thread, schedules the program's
 * callback. */
CRPCI_FN void crpci_registry_set(crpci_registry_gate *g, crpc_registry_state state)
{
    int64_t session = g->item.session->id;
    if (state == g->state && (state != CRPC_REGISTRY_CONNECTED || session == g->session))
        return;
    g->state = state;
    if (state == CRPC_REGISTRY_CONNECTED) {
        g->session = session;
        if (g->waiter)
            crpci_drive_end_wait(g->item.session->loop, g->waiter);
    }
    g->news = g->fn != NULL;
    if (g->news)
        crpci_agreement_ready(&g->item);
}

/* Calls the program until it knows the present state; states in between are skipped. */
CRPCI_FN void crpci_registry_tell(crpci_item *item)
{
    crpci_registry_gate *g = CRPCI_CONTAINER(item, crpci_registry_gate, item);
    crpc_loop *l = item->session->loop;
    while (g->news && item->owner) {
        crpc_registry_state state = g->state;
        int64_t session = g->session;
        g->news = false;
        crpci_loop_user_begin(l);
        g->fn(item->user, state, session);
        crpci_loop_user_end(l);
    }
}

CRPCI_FN void crpci_registry_event(crpci_zk_job *job, crpci_zk_event event,
                                   const crpci_zk_request *q, const crpci_zk_answer *a)
{
    crpci_registry_gate *g = CRPCI_CONTAINER(job, crpci_registry_gate, job);
    (void)q;
    (void)a;
    if (event == CRPCI_ZK_RESUMED || event == CRPCI_ZK_RENEWED)
        crpci_registry_set(g, CRPC_REGISTRY_CONNECTED);
    else if (event == CRPCI_ZK_SUSPENDED && g->state != CRPC_REGISTRY_CONNECTING)
        crpci_registry_set(g, CRPC_REGISTRY_SUSPENDED);
    else if (event == CRPCI_ZK_ENDED && g->state != CRPC_REGISTRY_CONNECTING)
        crpci_registry_set(g, CRPC_REGISTRY_LOST);
}

/* The job sends no requests. */
static const crpci_zk_work crpci_registry_work = {NULL, crpci_registry_event, NULL};

/* The registry closes: no state is reported any more. */
CRPCI_FN void crpci_registry_end(crpci_item *item)
{
    crpci_agreement_end(item);
    crpci_zk_job_drop(&CRPCI_CONTAINER(item, crpci_registry_gate, item)->job);
}

static const crpci_item_kind crpci_registry_kind = {sizeof(crpci_registry_gate),
                                                    crpci_registry_tell, crpci_registry_end, NULL};

/* The options that a URL may name. */
static const crpci_option crpci_registry_rows[] = {
    CRPCI_OPTION_ROW(crpc_registry_options, session_timeout_ms, "session_timeout_ms", 0, 0, -1,
                     CRPCI_AGREEMENT_LONGEST_MS),
    CRPCI_OPTION_ROW(crpc_registry_options, registry_timeout_ms, "registry_timeout_ms", 0, 0, -1,
                     CRPCI_AGREEMENT_LONGEST_MS),
    CRPCI_OPTION_ROW(crpc_registry_options, must_connect, "must_connect", 0, 0, -1,
                     CRPCI_AGREEMENT_LONGEST_MS)};

static const crpci_options crpci_registry_table = {CRPCI_OPTIONS_OF(crpci_registry_rows)};

/* Takes over the options that the URL names; they win over the program's. */
CRPCI_COLD int crpci_registry_options(crpci_url *u, crpc_registry_options *o, crpc_error *error)
{
    char *key, *value;
    int err;
    while ((err = crpci_url_next(u, &key, &value, error)) == CRPC_OK) {
        const crpci_option *row = crpci_options_find(&crpci_registry_table, key);
        if (!row)
            return crpci_status_set(error, CRPC_EINVAL,
                                    "URL option %.60s: unknown; a registry has session_timeout_ms, "
                                    "registry_timeout_ms and must_connect",
                                    key);
        err = crpci_options_read(row, o, value, error);
        if (err)
            return err;
    }
    return err == CRPC_EPENDING ? CRPC_OK : err;
}

/* Puts the gate on the session, and waits up to registry_timeout_ms for a connection. */
CRPCI_COLD int crpci_registry_await(crpc_registry *r, const crpc_registry_options *o,
                                    crpc_error *error)
{
    crpc_loop *l = r->loop;
    int64_t ms = crpci_base_option(o->registry_timeout_ms, CRPCI_REGISTRY_OPEN_MS, 0);
    crpci_registry_gate *g;
    bool connected, stuck;
    crpci_waiter w;
    int err = CRPC_OK;
    memset(&w, 0, sizeof w);
    crpci_loop_lock(l);
    g = (crpci_registry_gate *)crpci_agreement_new(r, &crpci_registry_kind, NULL, o->user);
    if (!g) {
        crpci_loop_unlock(l);
        return crpci_status_set(error, CRPC_ENOMEM, "registry: out of memory");
    }
    g->fn = o->on_state; /* the job takes over the item's only reference */
    crpci_zk_job_add(&g->job, &crpci_registry_work, r->session, INT64_MAX, &g->item,
                     crpci_agreement_unref);
    if (r->session->phase == CRPCI_ZK_CONNECTED)
        crpci_registry_set(g, CRPC_REGISTRY_CONNECTED);
    if (o->on_state || CRPC_ZOOKEEPER_ST) /* libzookeeper_st runs only while the loop is driven */
        err = crpci_agreement_need_owner(r);
    stuck = ms && crpci_loop_in_callback(l);
    if (!err && ms && !stuck && g->state != CRPC_REGISTRY_CONNECTED) {
        g->waiter = &w;
        crpci_drive_wait(l, &w, crpci_loop_now(l) + ms * 1000, false);
        g->waiter = NULL;
    }
    connected = g->state == CRPC_REGISTRY_CONNECTED;
    crpci_loop_unlock(l);
    if (err)
        return crpci_status_set(error, err,
                                "registry: its private loop needs a thread, and private_loop."
                                "forbid_threads is set; pass a loop that the program drives");
    if (stuck && !connected)
        return crpci_status_set(error, CRPC_EDEADLK,
                                "registry: opened inside a callback of its loop, which must not "
                                "wait; set registry_timeout_ms to -1");
    if (connected || !o->must_connect)
        return CRPC_OK;
    return crpci_status_set(error, CRPC_EREGISTRY,
                            "zookeeper://%.100s: no session within %d ms (registry_timeout_ms)",
                            r->session->authority, (int)ms);
}

/* With loop NULL the registry has a private loop, which it closes at the end. */
CRPC_API int crpc_registry_open(crpc_registry **registry, crpc_loop *loop, const char *url,
                                const crpc_registry_options *options, crpc_error *error)
{
    crpc_registry_options o;
    crpci_directory_options so;
    bool private_loop = !loop;
    crpc_registry *r;
    crpci_url u;
    int err;
    *registry = NULL;
    memset(&o, 0, sizeof o);
    memset(&so, 0, sizeof so);
    if (options)
        o = *options;
    if (private_loop) {
        err = crpc_loop_open(&loop, &o.private_loop);
        if (err)
            return crpci_status_set(error, err, "registry: cannot open its private loop: %s",
                                    crpc_status_text(err));
    }
    r = (crpc_registry *)crpci_heap_alloc(loop->heap, sizeof *r);
    if (!r) {
        if (private_loop)
            crpc_loop_close(loop);
        return crpci_status_set(error, CRPC_ENOMEM, "registry: out of memory");
    }
    r->loop = loop;
    r->private_loop = private_loop;
    crpci_list_init(&r->items);
    crpci_loop_hold(loop);
    err = crpci_url_parse(&u, loop->heap, url, error);
    if (!err && strcmp(u.scheme, "zookeeper") != 0)
        err = crpci_status_set(error, CRPC_EUNSUPPORTED,
                               "registry: %.40s:// is not supported; use zookeeper://", u.scheme);
    err = err ? err : crpci_registry_options(&u, &o, error);
    err = err ? err : crpci_zk_node_root(loop->heap, u.path, "", &r->root, error);
    so.session_timeout_ms = o.session_timeout_ms;
    so.credential = o.credential;
    err = err ? err : crpci_zk_pool_open(loop, u.authority, &so, &r->session, error);
    err = err ? err : crpci_registry_await(r, &o, error);
    crpci_url_free(&u);
    if (err) {
        crpc_registry_close(r);
        return err;
    }
    *registry = r;
    return CRPC_OK;
}

/* Ends all items, each with its own outcome, before it leaves the session. May block while the last
 * user's handle closes, see crpci_zk_pool_close. */
CRPC_API void crpc_registry_close(crpc_registry *r)
{
    crpc_loop *l;
    bool private_loop;
    if (!r)
        return;
    l = r->loop;
    private_loop = r->private_loop;
    if (r->session) {
        bool last;
        crpci_loop_lock(l);
        last = crpci_zk_pool_leave(r->session);
        while (!crpci_list_empty(&r->items)) {
            crpci_item *item = CRPCI_CONTAINER(r->items.next, crpci_item, node);
            item->kind->end(item);
        }
        crpci_zk_pool_close(r->session, last);
    }
    crpci_id_free(&r->configs, l->heap);
    crpci_heap_strfree(l->heap, r->root);
    crpci_heap_free(l->heap, r, sizeof *r);
    if (private_loop)
        crpc_loop_close(l);
    crpci_loop_release(l);
}

CRPC_API crpc_loop *crpc_registry_loop(crpc_registry *r)
{
    return r->loop;
}

/* The id of the connected session; 0 while there is no connection. */
CRPC_API int64_t crpc_registry_session(crpc_registry *r)
{
    int64_t id;
    crpci_loop_lock(r->loop);
    id = r->session->phase == CRPCI_ZK_CONNECTED ? r->session->id : 0;
    crpci_loop_unlock(r->loop);
    return id;
}
#endif /* CRPC_ENABLE_ZOOKEEPER */

/* ======================================================================== */
/* >>impl-request   a method as a channel knows it, and an encoded request  */
/* ======================================================================== */

/* Channels prepare each method once, and encode each request once, on the caller's thread and
 * without the loop's lock. Every attempt sends the same bytes: what differs between attempts (id,
 * remaining time) is written into the headroom in front of them. */

#if CRPC_ENABLE_CLIENT

#define CRPCI_REQUEST_LONGEST_MS 86400000 /* no call waits longer than a day */
#define CRPCI_REQUEST_RETRIES 16   /* attempts that fail immediately recurse: bounds the stack */
#define CRPCI_REQUEST_INLINE  4096 /* attachments up to this size are copied behind the message */

/* The values of cluster=, in the order of crpc_cluster. */
#define CRPCI_REQUEST_CLUSTERS ",failover,failfast,failsafe,failback,forking,broadcast"

/* What a channel keeps about a method from its first call on. Immutable. */
typedef struct crpci_method {
    struct crpci_method *next;
    const crpc_method *method;
    size_t size;      /* of this struct with the encoded names behind it */
    crpc_view names;  /* service and method, encoded */
    crpci_message_type response;
    crpc_policy policy; /* in which every member has its final value: 0 in timeout_ms and backup_ms
                         * means none, in forks all providers */
    /* at most one attempt at a time, never degraded: fast path */
    bool plain;
    uint32_t hash_field;                /* 0: none */
    const crpc_method_options *options; /* NULL: none */
} crpci_method;

/* What all requests of a channel share. Fixed when the channel opens, but for the atomic
 * members. */
typedef struct crpci_request_source {
    crpc_loop *loop;
    const crpci_protocol *protocol;
    char *credential; /* NULL: none */
    bool short_names;
    bool intercepted; /* interceptors may have added fields */
    bool ids;         /* every request gets an id */
    bool timeout_open; /* neither URL nor options set a timeout: the .proto's applies */
    int hash_field;   /* 0: none */
    uint64_t secret[2]; /* of the request ids: no two channels of a fleet have the same */
    uint32_t last_id;   /* atomic */
    crpc_policy policy;
    const crpc_method_options *options;
    size_t option_count;
    crpci_method *methods; /* atomic: read without the lock; entries are only ever added */
} crpci_request_source;

/* An encoded request. Its chunk holds, in this order: `front` bytes of the caller, which begin with
 * this struct, as a pending call does; the crpci_out; fields; credential; headroom for what the
 * protocol writes first; the message; a small attachment. */
typedef struct crpci_request {
    crpci_chunk *chunk;
    size_t front;           /* offset of the crpci_out */
    size_t fields_size;     /* these stand right behind it */
    size_t credential_size; /* and this behind the fields */
    size_t payload;         /* offset of the message behind the crpci_out */
    size_t payload_size;
    size_t inline_size;   /* attachment behind the message */
    crpc_view attachment; /* outside the chunk, borrowed from the caller */
    crpc_view names;      /* this and the rest as in crpci_message */
    int64_t log_id, trace_id, span_id, parent_span_id;
    bool identified; /* it has a request id: a server with replay_entries executes it once */
} crpci_request;

/* --- the caller's crpc_call ------------------------------------------------------------------- */

/* What crpc_call.reserved holds. */
enum {
    CRPCI_CALL_HELD,      /* chunk of the reply that response views point into */
    CRPCI_CALL_RAW,       /* begin of the reply's fields */
    CRPCI_CALL_RAW_END,   /* end of the reply's fields */
    CRPCI_CALL_ADDED,     /* chunk of the fields that interceptors have added */
    CRPCI_CALL_ADDED_LEN, /* bytes of these fields */
    CRPCI_CALL_HEAP,      /* set only while interceptors run */
    CRPCI_CALL_PROTOCOL   /* protocol in which the fields are encoded */
};

/* Whether a call is zero-initialised, or holds a result of crpc: a bare stack variable is
 * neither. */
CRPCI_FN bool crpci_request_valid_call(const crpc_call *call)
{
    const void *protocol = call->reserved[CRPCI_CALL_PROTOCOL]; /* set in a call with a result */
    size_t i;
    for (i = 0; crpci_protocols[i]; i++) {
        if (protocol == crpci_protocols[i])
            return true;
    }
    for (i = 0; i < sizeof call->reserved / sizeof *call->reserved; i++) {
        if (call->reserved[i])
            return false;
    }
    return true;
}

CRPC_API void crpc_call_reset(crpc_call *call)
{
    CRPCI_DEMAND(crpci_request_valid_call(call),
                 "the crpc_call is not initialised: set it to CRPC_INIT before its first use");
    crpci_heap_chunk_unref((crpci_chunk *)call->reserved[CRPCI_CALL_HELD]);
    crpci_heap_chunk_unref((crpci_chunk *)call->reserved[CRPCI_CALL_ADDED]);
    memset(call->reserved, 0, sizeof call->reserved);
    call->reply_attachment = crpc_view_of(NULL, 0);
}

CRPC_API bool crpc_call_field(const crpc_call *call, const char *key, crpc_view *value)
{
    const crpci_protocol *p = (const crpci_protocol *)call->reserved[CRPCI_CALL_PROTOCOL];
    crpc_view fields;
    fields.at[0] = call->reserved[CRPCI_CALL_RAW];
    fields.end = call->reserved[CRPCI_CALL_RAW_END];
    return fields.end && p->field(fields, key, value);
}

/* Appends a field to what is encoded. False: out of memory, as o->no_memory says then. */
CRPCI_FN bool crpci_request_put_field(const crpci_protocol *p, crpci_message_out *o,
                                      const char *key, crpc_view value)
{
    if (!crpci_message_reserve(o, strlen(key) + crpc_view_size(value) + p->field_cost))
        return false;
    o->len += p->put_field(crpci_heap_data(o->chunk) + o->len, crpc_view_str(key), value);
    return true;
}

CRPC_API int crpc_call_add_field(crpc_call *call, const char *key, const char *value)
{
    crpci_heap *h = (crpci_heap *)call->reserved[CRPCI_CALL_HEAP];
    const crpci_protocol *p = (const crpci_protocol *)call->reserved[CRPCI_CALL_PROTOCOL];
    crpci_message_out o;
    bool added;
    if (!h || !key || !value)
        return CRPC_EINVAL;
    o.heap = h;
    o.chunk = (crpci_chunk *)call->reserved[CRPCI_CALL_ADDED];
    o.len = (size_t)(uintptr_t)call->reserved[CRPCI_CALL_ADDED_LEN];
    o.lent = o.no_memory = false;
    if (!o.chunk)
        o.chunk = crpci_heap_chunk(h, 64);
    if (!o.chunk)
        return CRPC_ENOMEM;
    added = crpci_request_put_field(p, &o, key, crpc_view_str(value));
    call->reserved[CRPCI_CALL_ADDED] = o.chunk;
    call->reserved[CRPCI_CALL_ADDED_LEN] = (void *)(uintptr_t)o.len;
    return added ? CRPC_OK : CRPC_ENOMEM;
}

/* Does for the whole call what CRPC_INIT does, but clears only the first byte of each text. With
 * single stores, because for so few bytes a call of memset, or the string instructions that
 * compilers put in its place, takes longer. */
CRPCI_FN void crpci_request_clear_call(crpc_call *call)
{
    crpc_error *e = &call->error;
    size_t i;
    call->policy.cluster = CRPC_CLUSTER_DEFAULT;
    call->policy.timeout_ms = call->policy.retries = call->policy.backup_ms = 0;
    call->policy.forks = call->policy.fail_percent = 0;
    call->deadline_us = call->log_id = 0;
    call->fields = NULL;
    call->field_count = 0;
    call->credential = call->attachment = call->key = crpc_view_of(NULL, 0);
    call->request_id = call->order_key = crpc_view_of(NULL, 0);
    call->parent = NULL;
    e->code = e->app_code = e->attempts = 0;
    e->sent = CRPC_SENT_NO;
    e->remote = false;
    e->endpoint[0] = e->text[0] = '\0';
    call->reply_attachment = crpc_view_of(NULL, 0);
    call->latency_us = 0;
    for (i = 0; i < sizeof call->reserved / sizeof *call->reserved; i++)
        call->reserved[i] = NULL;
}

/* --- methods ---------------------------------------------------------------------------------- */

/* A setting of a call, which nobody has checked: 0 to `most`. */
CRPCI_FN int crpci_request_within(int value, int most)
{
    return value < 0 ? 0 : value > most ? most : value;
}

/* Overwrites members of `to` with those that are set in `p`. */
CRPCI_FN void crpci_request_apply_policy(crpc_policy *to, const crpc_policy *p)
{
    if (p->cluster && (unsigned)p->cluster <= CRPC_CLUSTER_BROADCAST)
        to->cluster = p->cluster;
    if (p->timeout_ms > 0)
        to->timeout_ms = p->timeout_ms;
    if (p->retries)
        to->retries = crpci_request_within(p->retries, CRPCI_REQUEST_RETRIES);
    if (p->backup_ms)
        to->backup_ms = crpci_request_within(p->backup_ms, INT32_MAX);
    if (p->forks)
        to->forks = crpci_request_within(p->forks, INT32_MAX);
    if (p->fail_percent)
        to->fail_percent = crpci_request_within(p->fail_percent, 100);
}

/* Determines the settings of a method: its own options win over the channel's, the .proto's timeout
 * applies if neither sets one. */
CRPCI_COLD void crpci_request_method_settings(const crpci_request_source *s, crpci_method *k)
{
    const crpc_method *m = k->method;
    size_t i;
    k->policy = s->policy;
    k->hash_field = (uint32_t)s->hash_field;
    if (m->timeout_ms > 0 && s->timeout_open)
        k->policy.timeout_ms = m->timeout_ms;
    for (i = 0; i < s->option_count; i++) {
        const crpc_method_options *o = &s->options[i];
        if (o->method != m)
            continue;
        k->options = o;
        crpci_request_apply_policy(&k->policy, &o->policy);
        if (o->hash_field)
            k->hash_field = o->hash_field < 0 ? 0 : (uint32_t)o->hash_field;
    }
    k->plain = k->policy.cluster <= CRPC_CLUSTER_FAILFAST && !k->policy.backup_ms &&
               !(k->options && k->options->degraded > 0);
}

/* Makes the entry of a method at its first call. NULL: out of memory. */
CRPCI_COLD crpci_method *crpci_request_add_method(crpci_request_source *s, const crpc_method *m)
{
    const char *dot = s->short_names ? strrchr(m->service, '.') : NULL;
    crpc_view service = crpc_view_str(dot ? dot + 1 : m->service), name = crpc_view_str(m->name);
    size_t room = crpc_view_size(service) + crpc_view_size(name) + CRPCI_PROTOCOL_NAMES;
    crpci_method *k = (crpci_method *)crpci_heap_alloc(s->loop->heap, sizeof *k + room);
    if (!k)
        return NULL;
    k->method = m;
    k->size = sizeof *k + room;
    k->names = s->protocol->names((uint8_t *)(k + 1), room, service, name);
    k->response = crpci_message_type_of(m->response, m->response_size);
    crpci_request_method_settings(s, k);
    crpci_loop_lock(s->loop);
    k->next = s->methods; /* two threads may both add one; a lookup finds either, both are equal */
    __atomic_store_n(&s->methods, k, __ATOMIC_RELEASE);
    crpci_loop_unlock(s->loop);
    return k;
}

/* Finds or makes the entry of a method. NULL: out of memory. Any thread, without the lock. */
CRPCI_FN const crpci_method *crpci_request_find_method(crpci_request_source *s,
                                                       const crpc_method *m)
{
    const crpci_method *k = __atomic_load_n(&s->methods, __ATOMIC_ACQUIRE);
    while (k && k->method != m)
        k = k->next;
    return CRPCI_LIKELY(k != NULL) ? k : crpci_request_add_method(s, m);
}

CRPCI_COLD void crpci_request_source_free(crpci_request_source *s)
{
    crpci_heap *h = s->loop->heap;
    while (s->methods) {
        crpci_method *m = s->methods;
        s->methods = m->next;
        crpci_heap_free(h, m, m->size);
    }
    crpci_heap_strfree(h, s->credential);
}

/* --- encoding --------------------------------------------------------------------------------- */

/* Appends a call's fields: its own, `added` bytes of interceptors, its id and its order key. On
 * failure o->no_memory is set. */
CRPCI_FN void crpci_request_put_fields(const crpci_protocol *p, crpci_message_out *o,
                                       const crpc_call *call, size_t added, crpc_view id)
{
    size_t i;
    for (i = 0; i < call->field_count; i++)
        crpci_request_put_field(p, o, call->fields[i].key, crpc_view_str(call->fields[i].value));
    if (CRPCI_UNLIKELY(added) && crpci_message_reserve(o, added)) {
        memcpy(crpci_heap_data(o->chunk) + o->len,
               crpci_heap_data((crpci_chunk *)call->reserved[CRPCI_CALL_ADDED]), added);
        o->len += added;
    }
    if (crpc_view_data(id))
        crpci_request_put_field(p, o, CRPCI_MESSAGE_ID_FIELD, id);
    if (crpc_view_data(call->order_key))
        crpci_request_put_field(p, o, CRPCI_MESSAGE_KEY_FIELD, call->order_key);
}

/* The request's id: the call's own; else, if the channel wants ids, a new one of 128 bits, written
 * to `text`; else none. An id that was seen does not give away the next one. */
CRPCI_FN crpc_view crpci_request_id(crpci_request_source *s, const crpc_call *call, char text[33])
{
    uint32_t number[2]; /* of the call, and of the half of the id */
    uint64_t half;
    if (CRPCI_LIKELY(!s->ids) || crpc_view_data(call->request_id))
        return call->request_id;
    number[0] = __atomic_add_fetch(&s->last_id, 1, __ATOMIC_RELAXED);
    for (number[1] = 0; number[1] < 2; number[1]++) {
        half = crpci_base_siphash(s->secret, number, sizeof number);
        snprintf(text + 16 * number[1], 17, "%016llx", (unsigned long long)half);
    }
    return crpc_view_of(text, 32);
}

/* The frame inside the request's chunk. */
CRPCI_FN crpci_out *crpci_request_frame(const crpci_request *r)
{
    return (crpci_out *)(void *)(crpci_heap_data(r->chunk) + r->front);
}

/* The key of lb=hash: a hash of the last field of that number in the encoded message. proto3 leaves
 * out fields that are zero; an absent field counts as one without bytes. */
CRPCI_COLD uint64_t crpci_request_hash_key(const crpci_request *r, uint32_t field)
{
    const uint8_t *p = (const uint8_t *)(crpci_request_frame(r) + 1) + r->payload;
    const uint8_t *end = p + r->payload_size;
    uint64_t key = crpci_base_hash(NULL, 0), tag = 0;
    while (p && p < end) {
        const uint8_t *value = crpci_message_varint(p, end, &tag);
        p = value ? crpci_message_skip(value, end, (unsigned)(tag & 7)) : NULL;
        if (p && tag >> 3 == field)
            key = crpci_base_hash(value, (size_t)(p - value));
    }
    return key;
}

/* Log and trace ids: the call's own, else those of the server's request for which it is made. */
CRPCI_FN void crpci_request_inherit(const crpc_call *call, crpci_request *r)
{
    r->log_id = call->log_id;
    r->trace_id = r->span_id = r->parent_span_id = 0;
    if (call->parent) {
        const crpci_origin *from = (const crpci_origin *)(const void *)call->parent;
        r->log_id = r->log_id ? r->log_id : from->log_id;
        r->trace_id = from->trace_id;
        r->parent_span_id = from->span_id;
        r->span_id = from->span_id + 1; /* all calls made for one request share it */
    }
}

/* Whether a call asks for what only CRPC_ENABLE_POLICY=1 has. Constant in a build that has it. */
CRPCI_FN bool crpci_request_lacks_policy(const crpc_policy *p)
{
    return !CRPC_ENABLE_POLICY && ((int)p->cluster > CRPC_CLUSTER_FAILFAST || p->backup_ms > 0 ||
                                   p->forks > 0 || p->fail_percent > 0);
}

/* Explains why a call is not made, or its result not given. Returns `err`. */
CRPCI_COLD int crpci_request_refuse(crpc_error *error, const crpc_method *m, int err,
                                    const char *what, const char *why)
{
    return crpci_status_set(error, err, "%s.%s: %s%s (local)", m->service, m->name, what, why);
}

/* Encodes a request behind `front` bytes, which are the caller's. With `borrow` a large attachment
 * is not copied, and must live until the call has ended. On failure nothing is held, and `error`
 * (may be NULL) says why. */
CRPCI_FN int crpci_request_encode(crpci_request_source *s, const crpci_method *k,
                                  const void *request, const crpc_call *call, bool borrow,
                                  size_t front, crpci_request **out, crpc_error *error)
{
    const crpci_protocol *p = s->protocol;
    const crpc_method *m = k->method;
    crpc_view credential = crpc_view_data(call->credential) ? call->credential
                                                            : crpc_view_str(s->credential);
    /* Without interceptors the member may be a remnant of a call on another channel. */
    size_t added = s->intercepted ? (size_t)(uintptr_t)call->reserved[CRPCI_CALL_ADDED_LEN] : 0;
    char id_text[33];
    crpc_view id = crpci_request_id(s, call, id_text);
    size_t secret = crpc_view_size(credential);
    size_t room = p->headroom + crpc_view_size(k->names);
    size_t attached = crpc_view_size(call->attachment), base = front + sizeof(crpci_out);
    size_t copied = borrow && attached > CRPCI_REQUEST_INLINE ? 0 : attached, fields, payload;
    const char *why = "out of memory";
    crpci_message_out o;
    crpci_request *r;
    int err = CRPC_ENOMEM;
    if (crpci_request_lacks_policy(&call->policy))
        return crpci_request_refuse(error, m, CRPC_EUNSUPPORTED, "policy: not compiled in: ",
                                    "CRPC_ENABLE_POLICY is 0");
    o.heap = s->loop->heap;
    o.len = base;
    o.lent = o.no_memory = false;
    o.chunk = crpci_heap_chunk(o.heap, base + room + m->request_size + 64);
    if (!o.chunk)
        return crpci_request_refuse(error, m, err, "request not encoded: ", why);
    crpci_request_put_fields(p, &o, call, added, id);
    fields = o.len - base;
    room += fields + secret;
    payload = o.len + secret + room;
    if (crpci_message_reserve(&o, secret + room) && !o.no_memory) {
        if (secret)
            memcpy(crpci_heap_data(o.chunk) + o.len, crpc_view_data(credential), secret);
        o.len = payload;
        err = crpci_message_encode(&o, m->request, request, &why);
    }
    if (!err && room > CRPCI_PROTOCOL_HEAD_MAX) {
        err = CRPC_EINVAL;
        why = "fields and credential are over 64 KiB together";
    } else if (!err && o.len - payload + room + attached > INT32_MAX) {
        err = CRPC_EINVAL;
        why = "message and attachment are over 2 GiB together";
    } else if (!err && !crpci_message_reserve(&o, copied)) {
        err = CRPC_ENOMEM;
    }
    if (CRPCI_UNLIKELY(err)) {
        crpci_heap_chunk_unref(o.chunk);
        return crpci_request_refuse(error, m, err, "request not encoded: ", why);
    }
    r = (crpci_request *)(void *)crpci_heap_data(o.chunk);
    if (copied)
        memcpy(crpci_heap_data(o.chunk) + o.len, crpc_view_data(call->attachment), copied);
    r->chunk = o.chunk;
    r->front = front;
    r->fields_size = fields;
    r->credential_size = secret;
    r->payload = payload - base;
    r->payload_size = o.len - payload;
    r->inline_size = copied;
    r->attachment = attached > copied ? call->attachment : crpc_view_of(NULL, 0);
    r->names = k->names;
    r->identified = crpc_view_data(id) != NULL;
    crpci_request_inherit(call, r);
    crpci_request_frame(r)->queued = false; /* sending sets the other members */
    *out = r;
    return CRPC_OK;
}

/* Writes what precedes the encoded message, for one attempt. Returns the frame, to be queued. */
CRPCI_FN crpci_out *crpci_request_prepare(const crpci_request *r, const crpci_protocol *p,
                                          int64_t id, int32_t timeout_ms)
{
    crpci_out *o = crpci_request_frame(r);
    uint8_t *fields = (uint8_t *)(o + 1), *payload = fields + r->payload;
    uint8_t *credential = fields + r->fields_size;
    crpci_message m; /* only the members that a request has are set */
    m.kind = CRPCI_MESSAGE_REQUEST;
    m.id = o->id = id;
    m.timeout_ms = timeout_ms;
    m.fields = crpc_view_of(fields, r->fields_size);
    m.credential = crpc_view_of(r->credential_size ? credential : NULL, r->credential_size);
    m.names = r->names;
    m.log_id = r->log_id;
    m.trace_id = r->trace_id;
    m.span_id = r->span_id;
    m.parent_span_id = r->parent_span_id;
    o->tail = (const uint8_t *)crpc_view_data(r->attachment);
    o->tail_len = crpc_view_size(r->attachment);
    m.payload_size = r->payload_size;
    m.attachment_size = r->inline_size + o->tail_len;
    o->chunk = r->chunk;
    o->tail_chunk = NULL;
    o->head = p->request(credential + r->credential_size, payload, &m);
    o->head_len = (size_t)(payload - o->head) + r->payload_size + r->inline_size;
    return o;
}

/* --- copies and the end ----------------------------------------------------------------------- */

/* Bytes that a copy of the request takes. */
CRPCI_FN size_t crpci_request_size(const crpci_request *r)
{
    return sizeof(crpci_out) + r->payload + r->payload_size + r->inline_size;
}

/* Copies a request to offset `front` of a chunk that has room for it. A borrowed attachment stays
 * borrowed. */
CRPCI_FN void crpci_request_copy(crpci_request *to, const crpci_request *from, crpci_chunk *chunk,
                                 size_t front)
{
    memcpy(crpci_heap_data(chunk) + front, crpci_request_frame(from), crpci_request_size(from));
    *to = *from;
    to->chunk = chunk;
    to->front = front;
    crpci_request_frame(to)->queued = false;
}

/* Prepares the request for another attempt. The last attempt's frame may still be part of a send on
 * a dying connection; the request then moves to a chunk of its own. `block` is the chunk that holds
 * the pending call; its reference stays. False: out of memory, or the attachment is borrowed, which
 * two frames cannot share. */
CRPCI_FN bool crpci_request_renew(crpci_request *r, const crpci_chunk *block)
{
    crpci_request old = *r;
    crpci_chunk *chunk;
    if (CRPCI_LIKELY(!crpci_request_frame(r)->queued))
        return true;
    if (crpc_view_data(r->attachment))
        return false;
    chunk = crpci_heap_chunk(r->chunk->heap, crpci_request_size(r));
    if (!chunk)
        return false;
    crpci_request_copy(r, &old, chunk, 0);
    if (old.chunk != block)
        crpci_heap_chunk_unref(old.chunk);
    return true;
}

/* Releases the request's bytes, unless they share the pending call's chunk. */
CRPCI_FN void crpci_request_drop(crpci_request *r, const crpci_chunk *block)
{
    if (r->chunk != block)
        crpci_heap_chunk_unref(r->chunk);
    r->chunk = NULL;
}

/* Makes sure that no send reads a borrowed attachment any more, so that a synchronous call can
 * return: waits for a send on another thread, and copies what is still unsent. Locked; unlocks to
 * wait. */
CRPCI_FN void crpci_request_settle(crpc_loop *l, crpci_request *r)
{
    crpci_out *o = crpci_request_frame(r);
    crpci_loop_assert_locked(l);
    if (!o->queued || !o->tail_len || o->tail_chunk)
        return;
    while (o->queued && o->inflight) {
        l->io_waiters++;
        crpci_thread_wait(&l->io_cond, &l->lock, -1);
        l->io_waiters--;
    }
    if (!o->queued)
        return;
    o->tail_chunk = crpci_heap_chunk(l->heap, o->tail_len);
    if (o->tail_chunk) {
        memcpy(crpci_heap_data(o->tail_chunk), o->tail, o->tail_len);
        o->tail = crpci_heap_data(o->tail_chunk);
    } else {
        crpci_conn_close(o->conn, CRPC_ENOMEM, 0);
    }
}

#endif /* CRPC_ENABLE_CLIENT */

/* ======================================================================== */
/* >>impl-reply   a reply: kept, decoded, handed to the caller              */
/* ======================================================================== */

/* From the message that answers a call to the caller's struct. The loop's thread keeps the reply,
 * locked; the thread that wants the result decodes it without the lock, straight out of the
 * received bytes. */

#if CRPC_ENABLE_CLIENT

#define CRPCI_REPLY_COPY 2048 /* replies up to this size do not keep a shared buffer alive */

/* The kept message that answers a call. Its pointers point into `chunk`. */
typedef struct crpci_reply {
    crpci_chunk *chunk;     /* holds a reference; NULL: there is no reply */
    const crpci_protocol *protocol;
    crpc_view fields;
    crpc_view text;         /* set only if status is not 0 */
    const uint8_t *payload; /* the attachment stands behind it */
    size_t payload_size;
    size_t attachment_size;
    int32_t status;
} crpci_reply;

/* Keeps a message as the reply; takes a reference of its chunk. */
CRPCI_FN void crpci_reply_take(crpci_reply *r, crpc_loop *l, const crpci_protocol *p,
                               const crpci_message *m)
{
    crpci_loop_assert_locked(l);
    r->status = 0;
    if (!m->usual) {
        r->status = m->status;
        r->text = m->text;
    }
    r->chunk = m->chunk;
    r->protocol = p;
    r->fields = m->fields;
    r->payload = m->payload;
    r->payload_size = m->payload_size;
    r->attachment_size = m->attachment_size;
    crpci_loop_share(l, m->chunk);
}

/* Releases a reply that is not wanted. Locked. */
CRPCI_FN void crpci_reply_drop(crpci_reply *r, crpc_loop *l)
{
    crpci_loop_assert_locked(l);
    if (r->chunk)
        crpci_loop_unshare(l, r->chunk);
    r->chunk = NULL;
}

/* Whether the provider executed the call successfully. */
CRPCI_FN bool crpci_reply_succeeded(const crpci_reply *r)
{
    return r->chunk && r->status == 0;
}

/* Copies a small reply out of the loop's receive buffer, so that it does not keep 64 KiB alive; a
 * large one keeps its reference to the buffer. */
CRPCI_FN void crpci_reply_unshare(crpci_reply *r, crpci_heap *h)
{
    const uint8_t *from = (const uint8_t *)crpc_view_data(r->fields);
    size_t n = (size_t)(r->payload - from) + r->payload_size + r->attachment_size;
    crpci_chunk *chunk;
    uint8_t *to;
    if (n > CRPCI_REPLY_COPY || r->chunk->cap < 8 * CRPCI_REPLY_COPY)
        return;
    chunk = crpci_heap_chunk(h, n);
    if (!chunk)
        return; /* out of memory: the reply keeps the buffer */
    to = crpci_heap_data(chunk);
    memcpy(to, from, n);
    r->payload = to + (r->payload - from);
    if (r->status && crpc_view_size(r->text))
        r->text = crpc_view_of(to + ((const uint8_t *)crpc_view_data(r->text) - from),
                               crpc_view_size(r->text));
    r->fields = crpc_view_of(to, crpc_view_size(r->fields));
    crpci_heap_chunk_unref(r->chunk);
    r->chunk = chunk;
}

/* --- on the caller's thread, without the lock ------------------------------------------------- */

/* Explains a reply that carries an error, and returns the status of the call. e->endpoint and
 * e->attempts are set already. A code is the application's if a crpc peer marks it so, or if
 * neither brpc nor crpc defines it. */
CRPCI_COLD int crpci_reply_remote_error(const crpci_reply *r, const crpc_method *m, crpc_error *e)
{
    int code = r->status, length;
    crpc_view mark = {{NULL}, NULL}, text = r->text;
    bool app = !crpci_status_reserved(code);
    if (r->protocol->field(r->fields, CRPCI_MESSAGE_APP_FIELD, &mark))
        app = true;
    e->code = app ? CRPC_EAPP : code == CRPC_EPENDING ? CRPC_ERESPONSE : code;
    if (!crpc_view_size(text))
        text = crpc_view_str(crpc_status_text(e->code));
    e->app_code = app ? code : 0;
    e->remote = true;
    length = (int)crpci_base_min(crpc_view_size(text), CRPC_ERROR_TEXT_MAX);
    if (CRPC_ENABLE_TEXTS)
        snprintf(e->text, sizeof e->text, "%s.%s attempt %d %s: %s %d: %.*s (remote)", m->service,
                 m->name, e->attempts, e->endpoint,
                 app ? "application error" : crpc_status_name(code), code, length,
                 crpc_view_data(text));
    else
        snprintf(e->text, sizeof e->text, "%.*s", length, crpc_view_data(text));
    return e->code;
}

/* Explains a reply that cannot be used. */
CRPCI_COLD int crpci_reply_malformed(const crpc_method *m, crpc_error *e, const char *what)
{
    e->code = CRPC_ERESPONSE;
    crpci_status_explain(e, "%s.%s attempt %d %s: reply: %s (local)", m->service, m->name,
                         e->attempts, e->endpoint, what);
    return CRPC_ERESPONSE;
}

/* Decodes a reply into `response` and fills the outputs of `call`. Views and the attachment point
 * into the reply's chunk. */
CRPCI_FN int crpci_reply_decode(const crpci_reply *r, const crpci_method *k, int attempts,
                                void *response, crpc_call *call)
{
    const crpci_message_type *type = &k->response;
    crpc_error *e = &call->error;
    const char *why = "";
    e->app_code = 0;
    e->remote = false;
    e->sent = CRPC_SENT_YES;
    e->attempts = attempts;
    call->reserved[CRPCI_CALL_RAW] = (void *)(uintptr_t)crpc_view_data(r->fields);
    call->reserved[CRPCI_CALL_RAW_END] = (void *)(uintptr_t)r->fields.end;
    call->reserved[CRPCI_CALL_PROTOCOL] = (void *)(uintptr_t)r->protocol;
    if (CRPCI_UNLIKELY(r->status != 0))
        return crpci_reply_remote_error(r, k->method, e);
    if (type->views || type->clear)
        memset(response, 0, type->size);
    if (!crpci_message_decode(r->payload, r->payload_size, type, response, &why))
        return crpci_reply_malformed(k->method, e, why);
    e->code = CRPC_OK;
    e->text[0] = '\0';
    if (r->attachment_size)
        call->reply_attachment = crpc_view_of(r->payload + r->payload_size, r->attachment_size);
    return CRPC_OK;
}

#endif /* CRPC_ENABLE_CLIENT */

/* ======================================================================== */
/* >>impl-endpoint   one provider: dialling it, backoff, and the attempts on its connection */
/* ======================================================================== */

/* An endpoint dials a provider, backs off, and matches replies with attempts. It belongs to a loop:
 * all channels of the loop with the same address and options share it. It never retries; the
 * attempt section decides that in its callbacks. All functions need the loop's lock. */

#if CRPC_ENABLE_CLIENT

#define CRPCI_ENDPOINT_DEAD        3       /* failed dials in a row that make it count as dead */
#define CRPCI_ENDPOINT_BACKOFF_MIN 50000   /* microseconds */
#define CRPCI_ENDPOINT_BACKOFF_MAX 1000000 /* not longer than an ordinary call's deadline */

/* Channels share an endpoint only if these are equal. */
typedef struct crpci_endpoint_options {
    const crpci_protocol *protocol;
    int connect_timeout_ms; /* 0: only the call's deadline limits dialling */
    uint32_t inflight;      /* requests in flight on the connection; 0: no limit */
    uint32_t max_body;
    int64_t max_queued; /* 0: no limit */
} crpci_endpoint_options;

typedef struct crpci_endpoint crpci_endpoint;

typedef enum crpci_attempt_state {
    CRPCI_ATTEMPT_IDLE,    /* on no endpoint's list */
    CRPCI_ATTEMPT_WAITING, /* in endpoint->waiting */
    CRPCI_ATTEMPT_ACTIVE,  /* in endpoint->active */
    CRPCI_ATTEMPT_DONE     /* its call has ended */
} crpci_attempt_state;

/* One try on one provider, as the endpoint sees it. First member of a pending call, which makes one
 * attempt after another with it. */
typedef struct crpci_attempt {
    crpci_request request; /* first: it stands at the beginning of its chunk */
    crpci_list link;
    crpci_attempt_state state;
    bool one_way; /* ends when its frame was sent, unless the endpoint limits requests in flight */
    crpc_sent sent; /* how far the request got, in this attempt */
    uint64_t id;              /* in loop->calls; also the id in the message */
    crpci_out *out;           /* its frame, while queued on the connection; else NULL */
    crpci_endpoint *endpoint; /* of this attempt or the last one; a reference */
    int64_t deadline_us;
    crpci_reply reply;
} crpci_attempt;

/* Callbacks of the attempt section. Each may end the attempt and free its call. */
typedef struct crpci_endpoint_events {
    /* The attempt could not be sent, or its connection was lost. `cause` explains. */
    void (*failed)(crpci_attempt *a, int code, const char *cause);
    void (*replied)(crpci_attempt *a, const crpci_message *m);
    /* CRPC_OK: a frame that gets no reply was sent completely. Else the reply cannot be used, and
     * `cause` explains. */
    void (*ended)(crpci_attempt *a, int code, const char *cause);
} crpci_endpoint_events;

struct crpci_endpoint {
    crpci_list link; /* in loop->endpoints */
    crpc_loop *loop;
    const crpci_endpoint_events *events;
    uint32_t refs;
    uint32_t users; /* channels; while there is one, the endpoint keeps its connection */
    char address[CRPC_ADDRESS_MAX];
    crpci_addr addr;
    crpci_endpoint_options options;
    crpci_conn *conn;
    crpci_list waiting; /* attempts that wait for a connection or a slot */
    crpci_list active;  /* attempts queued on or sent over conn */
    uint32_t active_count;
    bool serving;      /* crpci_endpoint_serve_waiting is on the stack */
    bool refused;      /* the last dial failed */
    crpci_timer timer; /* end of the backoff */
    int failures;      /* dials and connections since the last reply: doubles the backoff */
    int64_t usable_at; /* end of the backoff, also of that after CRPC_ELOGOFF; 0: usable now */
    int64_t dialled_at;
    int last_errno;    /* of the last connection that failed */
};

/* Drops a reference. NULL is ignored. */
CRPCI_FN void crpci_endpoint_drop(crpci_endpoint *e)
{
    if (e && --e->refs == 0)
        crpci_heap_free(e->loop->heap, e, sizeof *e);
}

/* A channel leaves the endpoint; the last one closes the connection. */
CRPCI_FN void crpci_endpoint_leave(crpci_endpoint *e)
{
    crpci_conn *c = e->conn;
    if (--e->users == 0) {
        crpci_list_remove(&e->link);
        crpci_timer_cancel(&e->timer);
        e->conn = NULL;
        if (c) {
            c->owner = NULL;
            crpci_conn_close(c, CRPC_ECLOSE, 0);
            crpci_conn_drop(c);
        }
    }
    crpci_endpoint_drop(e);
}

/* Whether several dials in a row have failed. */
CRPCI_FN bool crpci_endpoint_is_dead(const crpci_endpoint *e)
{
    return e->refused && !e->conn && e->failures >= CRPCI_ENDPOINT_DEAD;
}

/* Whether the present connection has brought a reply. A retry there cannot overload a provider that
 * is down, so it is not charged to the retry budget. */
CRPCI_FN bool crpci_endpoint_is_proven(const crpci_endpoint *e)
{
    return e->conn && !e->conn->connecting && !e->failures;
}

/* Whether an attempt can be sent now. */
CRPCI_FN bool crpci_endpoint_has_slot(const crpci_endpoint *e)
{
    return e->conn && !e->conn->connecting && !e->conn->closed &&
           (!e->options.inflight || e->active_count < e->options.inflight);
}

/* --- attempts --------------------------------------------------------------------------------- */

/* Whether the attempt ends when its frame was sent. With a limit of requests in flight, a one-way
 * call too occupies its slot until the peer's reply. */
CRPCI_FN bool crpci_endpoint_unanswered(const crpci_attempt *a)
{
    return a->one_way && !a->endpoint->options.inflight;
}

/* Takes an attempt off its endpoint. A frame of which nothing was sent is withdrawn; any other
 * stays in the connection's queue, on its own. */
CRPCI_FN void crpci_endpoint_detach(crpci_attempt *a)
{
    crpci_out *o = a->out;
    if (o && crpci_conn_out_begun(o))
        a->sent = CRPC_SENT_MAYBE;
    a->out = NULL;
    if (o && !crpci_conn_withdraw(o->conn, o))
        crpci_conn_out_orphan(o);
    crpci_list_remove(&a->link);
    if (a->state == CRPCI_ATTEMPT_ACTIVE)
        a->endpoint->active_count--;
    a->state = CRPCI_ATTEMPT_IDLE;
}

/* Fails an attempt whose frame does not fit into the connection's queue. */
CRPCI_COLD void crpci_endpoint_overcrowded(crpci_attempt *a)
{
    const crpci_endpoint *e = a->endpoint;
    char cause[120];
    crpci_status_format(cause, sizeof cause, "%s: %lld bytes are queued, max_queued is %lld",
                        e->conn->tx_bytes ? "the connection's send queue is full"
                                          : "the request is too large",
                        (long long)e->conn->tx_bytes, (long long)e->options.max_queued);
    e->events->failed(a, CRPC_EOVERCROWDED, cause);
}

/* Queues the attempt's frame on the open connection, or fails the attempt if the queue is full. The
 * request's remaining time is written here, so that time spent waiting counts. */
CRPCI_FN void crpci_endpoint_send(crpci_endpoint *e, crpci_attempt *a)
{
    int64_t id = crpci_endpoint_unanswered(a) ? 0 : (int64_t)a->id;
    int64_t left = (a->deadline_us - crpci_loop_rough_time(e->loop)) / 1000;
    crpci_out *o = crpci_request_prepare(&a->request, e->options.protocol, id,
                                         (int32_t)(left > 1 ? left : 1));
    if (e->options.max_queued &&
        e->conn->tx_bytes + (int64_t)crpci_conn_out_len(o) > e->options.max_queued) {
        crpci_endpoint_overcrowded(a);
        return;
    }
    o->owner = a;
    crpci_list_append(&e->active, &a->link);
    e->active_count++;
    a->state = CRPCI_ATTEMPT_ACTIVE;
    a->out = o;
    crpci_conn_queue(e->conn, o);
}

/* Sends waiting attempts while there are slots. A failing attempt may start another call, which
 * comes back here: `serving` leaves the work to the outer call. */
CRPCI_FN void crpci_endpoint_serve_waiting(crpci_endpoint *e)
{
    if (e->serving || crpci_list_empty(&e->waiting))
        return;
    e->serving = true;
    e->refs++; /* a failing attempt drops its reference to the endpoint */
    while (!crpci_list_empty(&e->waiting) && crpci_endpoint_has_slot(e)) {
        crpci_attempt *a = CRPCI_CONTAINER(e->waiting.next, crpci_attempt, link);
        crpci_list_remove(&a->link);
        a->state = CRPCI_ATTEMPT_IDLE;
        crpci_endpoint_send(e, a);
    }
    e->serving = false;
    crpci_endpoint_drop(e);
}

/* Fails all attempts of a list, except those that callbacks add meanwhile. */
CRPCI_FN void crpci_endpoint_fail_all(crpci_endpoint *e, crpci_list *which, const char *cause)
{
    crpci_list now;
    crpci_list_move(&now, which);
    while (!crpci_list_empty(&now))
        e->events->failed(CRPCI_CONTAINER(now.next, crpci_attempt, link), CRPC_ECONN, cause);
}

/* The attempt that a reply belongs to: pending on this very connection, and sent at least in part.
 * NULL: the reply is late, a duplicate, or forged. */
CRPCI_FN crpci_attempt *crpci_endpoint_match(crpci_conn *conn, const crpci_message *m)
{
    crpci_attempt *a = (crpci_attempt *)crpci_id_get(&conn->loop->calls, (uint64_t)m->id);
    if (a && a->state == CRPCI_ATTEMPT_ACTIVE && a->endpoint->conn == conn &&
        (!a->out || crpci_conn_out_begun(a->out)))
        return a;
    if (m->id) /* replies to one-way calls carry 0 */
        conn->loop->stats.late_replies++;
    return NULL;
}

/* --- the connection --------------------------------------------------------------------------- */

/* Chooses when to dial again: at random within a window that doubles with each failure ("full
 * jitter"), so that the clients of a provider that returns do not all dial at once. */
CRPCI_FN void crpci_endpoint_back_off(crpci_endpoint *e)
{
    int shift = e->failures < 8 ? e->failures : 8;
    int64_t window = crpci_base_min64((int64_t)CRPCI_ENDPOINT_BACKOFF_MIN << shift,
                                      CRPCI_ENDPOINT_BACKOFF_MAX);
    e->failures++;
    e->usable_at = crpci_loop_now(e->loop) + (int64_t)(crpci_loop_random(e->loop) %
                                                      (uint32_t)window);
}

CRPCI_FN void crpci_endpoint_on_opened(crpci_conn *conn)
{
    crpci_endpoint *e = (crpci_endpoint *)conn->owner;
    e->usable_at = 0;
    e->failures++; /* until a reply comes, the peer may just accept and then close */
    crpci_endpoint_serve_waiting(e);
}

/* A reply. CRPC_ELOGOFF means that the server is stopping: the endpoint is not chosen for a
 * second. */
CRPCI_FN void crpci_endpoint_on_message(crpci_conn *conn, const crpci_message *m)
{
    crpci_endpoint *e = (crpci_endpoint *)conn->owner;
    crpci_attempt *a = crpci_endpoint_match(conn, m);
    if (!a)
        return;
    e->failures = 0;
    if (!m->usual && m->status == CRPC_ELOGOFF)
        e->usable_at = crpci_loop_now(e->loop) + CRPCI_ENDPOINT_BACKOFF_MAX;
    crpci_endpoint_detach(a);
    a->sent = CRPC_SENT_YES;
    if (!m->usual && m->unsupported && !m->status) {
        char cause[CRPC_ERROR_TEXT_MAX];
        crpci_status_format(cause, sizeof cause, "reply: %s", m->unsupported);
        e->events->ended(a, CRPC_ERESPONSE, cause);
        return;
    }
    e->events->replied(a, m);
}

/* A reply over max_body: the connection skips it and stays open. */
CRPCI_FN void crpci_endpoint_on_oversize(crpci_conn *conn, const crpci_message *m, uint64_t body)
{
    crpci_attempt *a = crpci_endpoint_match(conn, m);
    char cause[96];
    if (!a)
        return;
    crpci_status_format(cause, sizeof cause, "reply of %llu bytes is over max_body, %u",
                        (unsigned long long)body, conn->max_body);
    a->sent = CRPC_SENT_YES;
    a->endpoint->events->ended(a, CRPC_ERESPONSE, cause);
}

/* A whole frame was sent; o->owner is NULL if its call has ended before. */
CRPCI_FN void crpci_endpoint_on_sent(crpci_conn *conn, crpci_out *o)
{
    crpci_attempt *a = (crpci_attempt *)o->owner;
    (void)conn;
    if (!a)
        return;
    a->out = NULL;
    a->sent = CRPC_SENT_YES;
    if (crpci_endpoint_unanswered(a))
        a->endpoint->events->ended(a, CRPC_OK, NULL);
}

CRPCI_FN void crpci_endpoint_on_eof(crpci_conn *conn)
{
    crpci_conn_close(conn, CRPC_ECONN, 0);
}

CRPCI_FN void crpci_endpoint_on_conn_timer(crpci_conn *conn)
{
    if (conn->connecting)
        crpci_conn_close(conn, CRPC_ETIMEDOUT, ETIMEDOUT);
}

/* Connects now, or when the backoff is over. Attempts that fail may dial again, and the
 * connection's events lead back here: a cycle, hence this prototype. */
CRPCI_FN void crpci_endpoint_dial(crpci_endpoint *e);

/* A dial or a connection has failed, and no more comes of it: fails its attempts. */
CRPCI_FN void crpci_endpoint_fail(crpci_endpoint *e, bool connecting, int why, int system_error)
{
    char cause[96];
    crpci_status_format(cause, sizeof cause, "%s%s%s",
                        connecting ? "connecting: " : "connection lost: ",
                        why == CRPC_ECONN    ? crpci_conn_errno_text(system_error)
                        : why == CRPC_ENOMEM ? "out of memory"
                                             : crpc_status_text(why),
                        connecting && why == CRPC_ETIMEDOUT ? " (connect_timeout_ms)" : "");
    e->refs++; /* a failing attempt drops its reference to the endpoint */
    e->last_errno = system_error;
    e->refused = connecting;
    if (connecting || e->failures)
        crpci_endpoint_back_off(e);
    e->conn = NULL;
    if (connecting) /* first the waiting ones: active ones that fail may join this list and stay */
        crpci_endpoint_fail_all(e, &e->waiting, cause);
    crpci_endpoint_fail_all(e, &e->active, cause);
    if (!e->conn && !crpci_list_empty(&e->waiting)) /* these waited for a slot: dial for them */
        crpci_endpoint_dial(e);
    crpci_endpoint_drop(e);
}

CRPCI_FN void crpci_endpoint_on_closed(crpci_conn *conn)
{
    crpci_endpoint *e = (crpci_endpoint *)conn->owner;
    if (!e)
        return;
    crpci_endpoint_fail(e, conn->connecting, conn->why, conn->why_errno);
    crpci_conn_drop(conn);
}

static const crpci_conn_events crpci_endpoint_conn_events = {
    crpci_endpoint_on_opened, crpci_endpoint_on_message, crpci_endpoint_on_oversize,
    crpci_endpoint_on_sent,   crpci_endpoint_on_eof,     crpci_endpoint_on_closed,
    crpci_endpoint_on_conn_timer};

/* Connects now, or when the backoff is over. */
CRPCI_FN void crpci_endpoint_dial(crpci_endpoint *e)
{
    crpc_loop *l = e->loop;
    int64_t wait = e->usable_at - crpci_loop_now(l);
    int err, system_error;
    if (wait > 0) {
        if (!e->timer.prev)
            crpci_loop_timer_set(l, &e->timer, wait);
        return;
    }
    e->dialled_at = crpci_loop_now(l);
    err = crpci_connect_dial(l, &e->addr, &crpci_endpoint_conn_events, e, &e->conn, &system_error);
    if (err) {
        crpci_endpoint_fail(e, true, err, system_error);
        return;
    }
    crpci_conn_hold(e->conn);
    e->conn->max_body = e->options.max_body;
    e->conn->expect = crpc_view_of("", 0);
    e->conn->max_skip = (int64_t)UINT32_MAX; /* a provider is trusted: skip replies of any size */
    if (e->options.connect_timeout_ms > 0)
        crpci_loop_timer_set(l, &e->conn->timer, (int64_t)e->options.connect_timeout_ms * 1000);
    crpci_receive_speak(e->conn, e->options.protocol); /* last, because it may close e->conn */
}

CRPCI_FN void crpci_endpoint_on_timer(crpc_loop *l, crpci_timer *t)
{
    crpci_endpoint *e = CRPCI_CONTAINER(t, crpci_endpoint, timer);
    (void)l;
    if (!e->conn && !crpci_list_empty(&e->waiting))
        crpci_endpoint_dial(e);
}

/* Sends an attempt, or lets it wait for a connection or a slot; dials if there is no connection. */
CRPCI_FN void crpci_endpoint_submit(crpci_endpoint *e, crpci_attempt *a)
{
    if (CRPCI_LIKELY(crpci_endpoint_has_slot(e))) {
        crpci_endpoint_send(e, a);
        return;
    }
    if (!e->conn && e->usable_at > crpci_base_min64(a->deadline_us, INT64_MAX - 1)) {
        e->events->failed(a, CRPC_ECONN, crpci_conn_errno_text(e->last_errno));
        return;
    }
    a->state = CRPCI_ATTEMPT_WAITING;
    crpci_list_append(&e->waiting, &a->link);
    if (!e->conn)
        crpci_endpoint_dial(e);
}

CRPCI_FN bool crpci_endpoint_same_options(const crpci_endpoint_options *a,
                                          const crpci_endpoint_options *b)
{
    return a->protocol == b->protocol && a->inflight == b->inflight && a->max_body == b->max_body &&
           a->max_queued == b->max_queued && a->connect_timeout_ms == b->connect_timeout_ms;
}

/* Finds or makes the loop's endpoint for an address, for a channel that wants its connection.
 * CRPC_EINVAL: the address is not numeric. */
CRPCI_FN int crpci_endpoint_get(crpc_loop *l, const char *address,
                                const crpci_endpoint_options *options,
                                const crpci_endpoint_events *events, crpci_endpoint **out)
{
    crpci_list *i;
    crpci_endpoint *e;
    crpci_addr addr;
    for (i = l->endpoints.next; i != &l->endpoints; i = i->next) {
        e = CRPCI_CONTAINER(i, crpci_endpoint, link);
        if (strcmp(e->address, address) == 0 && crpci_endpoint_same_options(&e->options, options)) {
            e->refs++;
            e->users++;
            *out = e;
            return CRPC_OK;
        }
    }
    if (strlen(address) >= sizeof e->address || !crpci_sock_parse(&addr, address))
        return CRPC_EINVAL;
    e = (crpci_endpoint *)crpci_heap_alloc(l->heap, sizeof *e);
    if (!e)
        return CRPC_ENOMEM;
    e->addr = addr;
    e->loop = l;
    e->events = events;
    e->refs = e->users = 1;
    memcpy(e->address, address, strlen(address)); /* the rest is zero */
    e->options = *options;
    crpci_list_init(&e->waiting);
    crpci_list_init(&e->active);
    crpci_timer_init(&e->timer, crpci_endpoint_on_timer);
    crpci_list_append(&l->endpoints, &e->link);
    *out = e;
    return CRPC_OK;
}

#endif /* CRPC_ENABLE_CLIENT */

/* ======================================================================== */
/* >>impl-providers   the providers of a channel, and the choice among them */
/* ======================================================================== */

/* A channel's list of providers as it stands now. A member is one provider of one channel: it joins
 * the endpoint, which channels share, with weight and breaker, which are the channel's own. The
 * directory's lists replace each other here (crpci_providers_update), and attempts choose from the
 * present one (crpci_providers_pick). Nothing here dials or sends. Everything is called with the
 * loop locked. */

#if CRPC_ENABLE_CLIENT

#define CRPCI_PROVIDERS_REWEIGH 1000000 /* microseconds between new weights of warming providers */
#define CRPCI_PROVIDERS_TRIED 4 /* providers that a retry avoids */
#define CRPCI_PROVIDERS_STALE_REDIAL 60000000 /* microseconds between dials of a stale provider */

/* One provider of one channel. Lives while it is listed or an attempt uses it. */
typedef struct crpci_member {
    crpci_balance_item balance;
    crpci_endpoint *endpoint;
#if CRPC_ENABLE_POLICY
    crpci_breaker breaker;
#endif
    uint32_t refs;    /* the list's, and one of each attempt */
    bool kept;        /* set only while lists are exchanged: it is in the new list too */
    uint32_t weight;  /* at the end of its warm-up; balance.weight is the present one */
    int64_t warmup_us; /* how long its weight grows; 0: it does not */
    int64_t since_us; /* when it began to serve, in the loop's time */
} crpci_member;

typedef struct crpci_pending_call crpci_pending_call;
typedef struct crpci_group crpci_group; /* attempts of one call at the same time */

/* The list of one channel; a member of the channel's struct. */
typedef struct crpci_providers {
    crpc_loop *loop;
    const crpci_endpoint_events *events; /* the attempt section's, for the endpoints */
    /* The cluster section's: whether a part of the call was sent to an endpoint. */
    bool (*in_group)(const crpci_group *g, const crpci_endpoint *e);
    crpci_endpoint_options endpoint;
    crpci_balance balance;
    crpci_balance_item **members; /* each in a crpci_member, sorted by address; the balancer knows
                                   * them by index */
    size_t count;
    size_t room;        /* of the array */
    int64_t stale_at;   /* since when nobody has confirmed the list; INT64_MAX: it is confirmed */
    int64_t stale_ttl_us;
#if CRPC_ENABLE_POLICY
    size_t max;           /* members that are used of a longer list; 0: all */
    crpci_snapshot *list; /* with max: the whole list, to choose from again */
    bool choose_again;    /* one of the chosen cannot be reached */
    int64_t chosen_at;
    uint64_t seed;      /* of the choice of members */
    int64_t reweigh_at; /* when weights of warming members are due; INT64_MAX: none is warming */
    crpci_breaker_options breaker; /* error_percent 0: off */
    size_t ejected_percent;        /* of the members that may be ejected at a time */
#endif
} crpci_providers;

CRPCI_FN crpci_member *crpci_providers_at(const crpci_providers *p, size_t i)
{
    return CRPCI_CONTAINER(p->members[i], crpci_member, balance);
}

/* Gives up a reference; the last one also leaves the endpoint. */
CRPCI_FN void crpci_providers_drop(crpci_member *m)
{
    crpci_endpoint *e = m->endpoint;
    if (--m->refs)
        return;
    crpci_heap_free(e->loop->heap, m, sizeof *m);
    crpci_endpoint_leave(e);
}

/* The member of an endpoint. NULL: it is no longer listed. */
CRPCI_COLD crpci_member *crpci_providers_of(const crpci_providers *p, const crpci_endpoint *e)
{
    size_t i;
    for (i = 0; i < p->count; i++) {
        if (crpci_providers_at(p, i)->endpoint == e)
            return crpci_providers_at(p, i);
    }
    return NULL;
}

/* --- lists ------------------------------------------------------------------------------------ */

/* Drops the members of an array, except those that are kept. */
CRPCI_FN void crpci_providers_unlist(crpci_balance_item **members, size_t count)
{
    size_t i;
    for (i = 0; i < count; i++) {
        crpci_member *m = CRPCI_CONTAINER(members[i], crpci_member, balance);
        bool kept = m->kept;
        m->kept = false;
        if (!kept) /* else its reference belongs to the other array */
            crpci_providers_drop(m);
    }
}

/* The present member with an address. Lists are sorted: `from` is where the search goes on behind
 * the address before. NULL: there is none. */
CRPCI_FN crpci_member *crpci_providers_find(const crpci_providers *p, const char *address,
                                            size_t *from)
{
    for (; *from < p->count; ++*from) {
        crpci_member *m = crpci_providers_at(p, *from);
        int order = strcmp(m->endpoint->address, address);
        if (order >= 0)
            return order == 0 ? m : NULL;
    }
    return NULL;
}

/* Makes a member for an address; endpoints may exist already, for other channels of the loop. */
CRPCI_FN int crpci_providers_new_member(crpci_providers *p, const char *address, crpci_member **out)
{
    crpci_heap *h = p->loop->heap;
    crpci_member *m = (crpci_member *)crpci_heap_alloc(h, sizeof *m);
    int err = m ? crpci_endpoint_get(p->loop, address, &p->endpoint, p->events, &m->endpoint)
                : CRPC_ENOMEM;
    if (err) {
        crpci_heap_free(h, m, sizeof *m);
        return err;
    }
    m->refs = 1;
    m->balance.address = m->endpoint->address;
    *out = m;
    return CRPC_OK;
}

/* Takes over what the registry says about a provider. Its start time is wall clock, which both
 * hosts are expected to keep. */
CRPCI_FN void crpci_providers_describe(crpci_member *m, const crpci_provider *p, int64_t now)
{
#if CRPC_ENABLE_POLICY
    struct timespec wall;
    int64_t age_ms;
    clock_gettime(CLOCK_REALTIME, &wall);
    age_ms = (int64_t)wall.tv_sec * 1000 + wall.tv_nsec / 1000000 - p->timestamp_ms;
    m->weight = (uint32_t)p->weight;
    m->warmup_us = (int64_t)p->warmup_ms * 1000;
    if (!m->kept)
        m->since_us = now;
    if (p->timestamp_ms && age_ms > 0)
        m->since_us = now - crpci_base_min64(age_ms, INT64_C(1) << 40) * 1000;
    m->balance.weight =
        crpci_balance_warm_weight(m->weight, (now - m->since_us) / 1000, p->warmup_ms);
#else
    (void)now;
    m->balance.weight = (uint32_t)p->weight;
#endif
}

#if CRPC_ENABLE_POLICY

/* Marks which entries of a list this channel uses: the `max` that a hash of address and channel
 * puts first, with those that cannot be reached last. NULL: all of them; without memory too: more
 * connections, but nothing is lost. */
CRPCI_FN bool *crpci_providers_choose(const crpci_providers *p, const crpci_snapshot *list)
{
    crpci_heap *h = p->loop->heap;
    size_t size = list->count * sizeof(crpci_balance_choice), i, n, from = 0;
    crpci_balance_choice *choices;
    bool *chosen = NULL;
    if (!p->max || list->count <= p->max)
        return NULL;
    choices = (crpci_balance_choice *)crpci_heap_alloc(h, size);
    if (choices)
        chosen = (bool *)crpci_heap_alloc(h, list->count);
    for (i = 0; i < list->count && chosen; i++) {
        const char *address = list->providers[i].address;
        crpci_member *m = crpci_providers_find(p, address, &from);
        crpci_balance_choice_init(&choices[i], i, address, p->seed);
        if (m && crpci_endpoint_is_dead(m->endpoint))
            choices[i].rank = 0;
    }
    n = chosen ? crpci_balance_subset(choices, list->count, p->max) : 0;
    for (i = 0; i < n; i++)
        chosen[choices[i].index] = true;
    crpci_heap_free(h, choices, size);
    return chosen;
}

#endif /* CRPC_ENABLE_POLICY */

/* Fills `fresh` with the members of a list, of which `chosen` are wanted; members that exist are
 * kept. On failure *count says how many there are already. */
CRPCI_FN int crpci_providers_make(crpci_providers *p, const crpci_snapshot *list,
                                  const bool *chosen, crpci_balance_item **fresh, size_t *count)
{
    int64_t now = crpci_loop_now(p->loop);
    size_t i, from = 0;
    *count = 0;
    for (i = 0; i < list->count; i++) {
        const crpci_provider *provider = &list->providers[i];
        crpci_member *m;
        int err;
        if (chosen && !chosen[i])
            continue;
        m = crpci_providers_find(p, provider->address, &from);
        if (m) {
            m->kept = true;
        } else {
            err = crpci_providers_new_member(p, provider->address, &m);
            if (err)
                return err;
        }
        crpci_providers_describe(m, provider, now);
        fresh[(*count)++] = &m->balance;
    }
    return CRPC_OK;
}

/* Replaces the list. Providers that stay keep what is known about them; calls under way keep their
 * endpoint until they end. On failure nothing has changed, unless the balancer had no memory. */
CRPCI_FN int crpci_providers_set(crpci_providers *p, const crpci_snapshot *list)
{
    crpci_heap *h = p->loop->heap;
    size_t room = list->count + 1, old_room = p->room, old_count = p->count, n;
    crpci_balance_item **old = p->members;
    crpci_balance_item **fresh = (crpci_balance_item **)crpci_heap_alloc(h, room * sizeof *fresh);
    bool *chosen = NULL;
    int err;
    if (!fresh)
        return CRPC_ENOMEM;
#if CRPC_ENABLE_POLICY
    chosen = crpci_providers_choose(p, list);
#endif
    err = crpci_providers_make(p, list, chosen, fresh, &n);
    crpci_heap_free(h, chosen, list->count);
    if (err) {
        crpci_providers_unlist(fresh, n);
        crpci_heap_free(h, fresh, room * sizeof *fresh);
        return err;
    }
    p->members = fresh;
    p->count = n;
    p->room = room;
    err = crpci_balance_reset(&p->balance, h, fresh, n);
#if CRPC_ENABLE_POLICY
    p->reweigh_at = crpci_loop_now(p->loop);
#endif
    crpci_providers_unlist(old, old_count); /* last: connections may close, and their calls move */
    crpci_heap_free(h, old, old_room * sizeof *old);
    return err;
}

/* A new list from a URL or a registry; keeps it whole if only a part of it is used. */
CRPCI_FN int crpci_providers_update(crpci_providers *p, crpci_snapshot *list)
{
    int err = crpci_providers_set(p, list);
    if (err)
        return err;
#if CRPC_ENABLE_POLICY
    if (p->max) {
        crpci_directory_snapshot_ref(list);
        crpci_directory_snapshot_unref(p->list);
        p->list = list;
    }
#endif
    if (!list->stale)
        p->stale_at = INT64_MAX;
    else if (p->stale_at == INT64_MAX)
        p->stale_at = crpci_loop_now(p->loop);
    return CRPC_OK;
}

/* Before a call: where only a part of the list is used and one of it cannot be reached, chooses
 * again, at most once a second. */
CRPCI_FN void crpci_providers_refresh(crpci_providers *p)
{
#if CRPC_ENABLE_POLICY
    int64_t now;
    if (CRPCI_LIKELY(!p->choose_again))
        return;
    now = crpci_loop_now(p->loop);
    if (!p->list || now < p->chosen_at + CRPCI_PROVIDERS_REWEIGH)
        return;
    p->choose_again = false;
    p->chosen_at = now;
    crpci_providers_set(p, p->list); /* without memory the old choice stays */
#else
    (void)p;
#endif
}

/* Empties the list when the channel closes. Attempts under way have been abandoned before. */
CRPCI_FN void crpci_providers_clear(crpci_providers *p)
{
    crpci_balance_item **old = p->members;
    size_t count = p->count;
#if CRPC_ENABLE_POLICY
    crpci_directory_snapshot_unref(p->list);
    p->list = NULL;
#endif
    p->members = NULL;
    p->count = 0;
    crpci_balance_reset(&p->balance, p->loop->heap, NULL, 0);
    crpci_providers_unlist(old, count);
    crpci_heap_free(p->loop->heap, old, p->room * sizeof *old);
    p->room = 0;
}

/* --- attempts --------------------------------------------------------------------------------- */

/* Tells balancer and breaker that an attempt on a provider begins, and takes a reference for it.
 * crpci_providers_end must follow exactly once. */
CRPCI_FN void crpci_providers_begin(crpci_providers *p, crpci_member *m, int64_t now)
{
    (void)now;
    m->refs++;
    crpci_balance_item_begin(&p->balance, &m->balance);
#if CRPC_ENABLE_POLICY
    if (p->breaker.error_percent)
        crpci_breaker_begin(&m->breaker, &p->breaker, now);
#endif
}

#if CRPC_ENABLE_POLICY

/* Whether the breakers have ejected more than eject_percent of the providers. Then the last one to
 * open is closed again: a fault that all providers share must not leave none. */
CRPCI_COLD bool crpci_providers_too_many_out(const crpci_providers *p)
{
    size_t i, out = 0;
    for (i = 0; i < p->count; i++)
        out += crpci_breaker_ejected(&crpci_providers_at(p, i)->breaker);
    return out * 100 > p->count * p->ejected_percent;
}

#endif /* CRPC_ENABLE_POLICY */

/* Tells balancer and breaker how the attempt ended, and gives up the reference. */
CRPCI_FN void crpci_providers_end(crpci_providers *p, crpci_member *m, crpci_outcome outcome,
                                  int64_t latency, int64_t now)
{
    crpci_balance_item_end(
        &p->balance, &m->balance, outcome != CRPCI_OUTCOME_ERROR,
        outcome == CRPCI_OUTCOME_IGNORE &&
                latency < m->balance.latency >> CRPCI_BALANCE_LATENCY_BITS
            ? -1 /* cut short: that says nothing about the provider's speed */
            : latency,
        now);
#if CRPC_ENABLE_POLICY
    if (p->breaker.error_percent &&
        crpci_breaker_end(&m->breaker, &p->breaker, outcome, latency, now,
                          crpci_loop_random(p->loop)) &&
        crpci_providers_too_many_out(p))
        crpci_breaker_reset(&m->breaker);
#endif
    crpci_providers_drop(m);
}

/* Before a dial: a provider that cannot be reached, in a list that nobody has confirmed for long,
 * may be gone for good, so it is dialled only once a minute. */
CRPCI_FN void crpci_providers_age(const crpci_providers *p, crpci_endpoint *e)
{
    int64_t now = crpci_loop_rough_time(p->loop);
    if (e->failures && p->stale_at <= now - p->stale_ttl_us &&
        e->usable_at < e->dialled_at + CRPCI_PROVIDERS_STALE_REDIAL)
        e->usable_at = e->dialled_at + CRPCI_PROVIDERS_STALE_REDIAL;
}

/* --- choosing --------------------------------------------------------------------------------- */

/* The attempts of one call, whose endpoints a choice leaves out. */
typedef struct crpci_tried {
    int attempts; /* made so far */
    int max_attempts;
    const crpci_endpoint *last[CRPCI_PROVIDERS_TRIED]; /* of the last failed attempts, a ring; only
                                                        * compared, so they may be gone */
} crpci_tried;

/* One choice under way, on the stack: the balancer passes it to crpci_providers_usable. */
typedef struct crpci_choice {
    const crpci_providers *providers;
    const crpci_tried *tried;
    const crpci_group *group;
    int64_t now;
    uint32_t random; /* the same for the whole choice, because a member may be asked about twice */
    bool strict;     /* leave out what the breaker has ejected */
} crpci_choice;

/* Whether the call has been to an endpoint, by itself or by one of its parts. */
CRPCI_FN bool crpci_providers_has_tried(const crpci_choice *x, const crpci_endpoint *e)
{
    int i;
    for (i = 0; i < x->tried->attempts && i < CRPCI_PROVIDERS_TRIED; i++) {
        if (x->tried->last[i] == e)
            return true;
    }
    return x->group && x->providers->in_group(x->group, e);
}

/* Whether a member can be chosen now; the balancer asks. */
CRPCI_FN bool crpci_providers_usable(void *user, size_t i)
{
    const crpci_choice *x = (const crpci_choice *)user;
    const crpci_member *m = crpci_providers_at(x->providers, i);
    if (m->endpoint->usable_at > x->now)
        return false;
#if CRPC_ENABLE_POLICY
    if (x->strict && (crpci_breaker_open(&m->breaker, &x->providers->breaker, x->now) ||
                      !crpci_breaker_ramped(&m->breaker, &x->providers->breaker, x->now,
                                            x->random ^ (uint32_t)m->balance.hash)))
        return false;
#endif
    return !crpci_providers_has_tried(x, m->endpoint);
}

/* No member is usable now: chooses, among those not tried yet, the one whose backoff ends first.
 * The attempt then waits for it. NULL: all have been tried. */
CRPCI_COLD crpci_member *crpci_providers_last_resort(const crpci_choice *x)
{
    const crpci_providers *p = x->providers;
    crpci_member *best = NULL;
    size_t i;
    for (i = 0; i < p->count; i++) {
        crpci_member *m = crpci_providers_at(p, i);
        if (!crpci_providers_has_tried(x, m->endpoint) &&
            (!best || m->endpoint->usable_at < best->endpoint->usable_at))
            best = m;
    }
    return best;
}

#if CRPC_ENABLE_POLICY

/* Gives providers that began to serve a short time ago their growing share. */
CRPCI_COLD void crpci_providers_reweigh(crpci_providers *p, int64_t now)
{
    size_t i;
    p->reweigh_at = INT64_MAX;
    for (i = 0; i < p->count; i++) {
        crpci_member *m = crpci_providers_at(p, i);
        crpci_balance_reweigh(&p->balance, i,
                              crpci_balance_warm_weight(m->weight, (now - m->since_us) / 1000,
                                                 m->warmup_us / 1000));
        if (now - m->since_us < m->warmup_us)
            p->reweigh_at = now + CRPCI_PROVIDERS_REWEIGH;
    }
}

#endif /* CRPC_ENABLE_POLICY */

/* Chooses a provider that the call has not tried: the balancer's choice, else one that the breaker
 * has ejected, else the one whose backoff ends first. NULL: all have been tried. `key` 0: none. */
CRPCI_FN crpci_member *crpci_providers_pick(crpci_providers *p, const crpci_tried *tried,
                                            const crpci_group *group, uint64_t key)
{
    crpci_choice x;
    int i;
    x.providers = p;
    x.tried = tried;
    x.group = group;
    if (p->count <= 1)
        return p->count && !crpci_providers_has_tried(&x, crpci_providers_at(p, 0)->endpoint)
                   ? crpci_providers_at(p, 0)
                   : NULL;
    x.random = crpci_loop_random(p->loop);
    x.now = crpci_loop_rough_time(p->loop);
    key = key ? key : x.random;
#if CRPC_ENABLE_POLICY
    x.strict = p->breaker.error_percent != 0;
    if (CRPCI_UNLIKELY(x.now >= p->reweigh_at))
        crpci_providers_reweigh(p, x.now);
#else
    x.strict = false;
#endif
    i = crpci_balance_pick(&p->balance, key, x.random, x.now, crpci_providers_usable, &x);
    if (i < 0 && x.strict) { /* all usable ones are ejected: then none is */
        x.strict = false;
        i = crpci_balance_pick(&p->balance, key, x.random, x.now, crpci_providers_usable, &x);
    }
    return CRPCI_LIKELY(i >= 0) ? crpci_providers_at(p, (size_t)i)
                                : crpci_providers_last_resort(&x);
}

#endif /* CRPC_ENABLE_CLIENT */

/* ======================================================================== */
/* >>impl-attempt   a pending call: one attempt after another, and its end  */
/* ======================================================================== */

/* A pending call is the loop's record of a call that a program has made. It makes one attempt at a
 * time; what needs several at once, or later tries, is the cluster section's. The struct of the
 * channel stands here because every attempt reads it; members are grouped by the section that they
 * belong to. Everything here is called with the loop locked. */

#if CRPC_ENABLE_CLIENT

/* The forms of calls. Those from CRPCI_CALL_PART on are made by the cluster section. */
typedef enum crpci_call_kind {
    CRPCI_CALL_SYNC,    /* its caller waits for its end */
    CRPCI_CALL_DELIVER, /* ends with a callback */
    CRPCI_CALL_ID,      /* ends with a result to be fetched */
    CRPCI_CALL_NOTIFY,  /* one-way */
    CRPCI_CALL_PART,    /* one of several attempts at a time; its parent is one of the above */
    CRPCI_CALL_FAILBACK /* a failed call that is tried again in the background */
} crpci_call_kind;

/* How the cluster section takes part. NULL in a channel: one attempt at a time is all there is. */
typedef struct crpci_cluster_ops {
    void (*begin)(crpci_pending_call *c);  /* makes the first attempts of a FORKING or BROADCAST */
    void (*backup)(crpci_pending_call *c); /* a backup request is due */
    bool (*leaves_open)(crpci_group *g, int status); /* parts under way will decide the call */
    void (*part_ended)(crpci_pending_call *part, int status);
    void (*drop_parts)(crpci_pending_call *c);
    bool (*retry_later)(crpci_pending_call *c, int status); /* true: c itself goes on */
} crpci_cluster_ops;

/* A channel. The program owns it until crpc_channel_close; calls keep it beyond. Members that say
 * nothing else are set when it is opened, or belong to the loop's lock. */
struct crpc_channel {
    CRPCI_HANDLE
    crpc_loop *loop;
    bool private_loop; /* the channel opened the loop and closes it */
    bool closed;       /* no call may begin or go on */
    bool wait; /* calls wait for a provider */
    uint32_t refs; /* atomic: the program's, and one of each pending call */
    crpci_list calls;   /* all pending calls but parts */
    crpci_list waiting; /* attempts that wait for a list of providers */
    crpci_request_source requests;
    crpci_providers providers;
    const crpci_cluster_ops *cluster;
    const crpc_client_interceptor *interceptors;
    size_t interceptor_count;
#if CRPC_ENABLE_POLICY
    struct {
        bool limited; /* false: retry_budget=-1 */
        crpci_limiter_budget tokens;
    } budget; /* of retries */
    struct {
        size_t waiting;   /* failed calls that were put aside, those being tried included */
        size_t max;
        int64_t pause_us; /* between tries */
        void (*dropped)(void *user, const crpc_method *method, const crpc_error *error);
        void *user;
    } failback;
#endif
    struct {
        char *where; /* what is looked up, for texts; NULL: the providers stand in the URL */
        crpci_backend *registry;
        crpci_subscriber *subscription;
        bool listed; /* the registry has answered, or the URL is the list */
        crpci_waiter *waiter; /* crpc_channel_open waits for the first answer */
    } directory;
};

/* One pending call. The loop's lock protects it until it has ended; then it is the property of the
 * thread that delivers or fetches its result. */
struct crpci_pending_call {
    crpci_attempt attempt; /* first: the loop's table of calls points to it, and its request begins
                            * the chunk */
    crpci_list of_channel; /* in channel->calls, or in the group of a part's parent */
    crpci_task task;
    crpci_timer timer; /* the next of backup request and deadline */
    crpc_channel *channel;
    const crpci_method *method;
    crpci_call_kind kind;
    crpc_policy policy;   /* the method's, with what the call overrides */
    crpci_member *member; /* of the present attempt; NULL: it has ended */
    int64_t start_us;   /* when the program made the call; times are the loop's */
    int64_t attempt_us; /* when the present attempt began */
    int64_t end_us;     /* if the call has ended */
    int64_t backup_us;  /* when a backup request is due; INT64_MAX: never */
    uint64_t key;       /* for lb=hash; 0: none */
    crpci_pending_call *parent; /* of a part */
    crpci_group *group;         /* its parts; NULL: none */
    crpc_sent before; /* the most that failed attempts sent, but for those refused by ELOGOFF */
    crpci_waiter *waiter; /* on the stack of the thread that waits for the end; NULL: none does */
    crpc_error *error; /* the caller's, or in error_chunk; NULL: not wanted, or no memory */
    crpci_chunk *error_chunk;
    int status; /* of the call that has ended; a reply's own status is in attempt.reply */
    crpc_done_fn deliver; /* calls fn(user, ...): generated stubs know its type */
    crpc_any_fn fn;
    void *user;
    crpci_chunk *block; /* holds this struct; mostly the request's chunk too */
    crpci_tried tried;
};

/* Rounded up, because the response that may stand behind a pending call can be of any type. */
#define CRPCI_PENDING_SIZE ((sizeof(crpci_pending_call) + 15) & ~(size_t)15)

CRPCI_FN crpci_pending_call *crpci_attempt_call(crpci_attempt *a)
{
    return CRPCI_CONTAINER(a, crpci_pending_call, attempt);
}

/* Fills a pending call that has its request, id and block. Its policy is the method's, and it may
 * make one attempt. Single stores, because clearing the whole struct takes longer. */
CRPCI_FN void crpci_attempt_init(crpci_pending_call *c, crpc_channel *ch, const crpci_method *k,
                                 crpci_call_kind kind, int64_t start)
{
    crpci_attempt *a = &c->attempt;
    crpci_loop_assert_locked(ch->loop);
    crpci_list_init(&a->link);
    a->state = CRPCI_ATTEMPT_IDLE;
    a->one_way = kind == CRPCI_CALL_NOTIFY;
    a->sent = c->before = CRPC_SENT_NO;
    a->out = NULL;
    a->endpoint = NULL;
    a->reply.chunk = NULL;
    c->timer.prev = NULL;
    c->channel = ch;
    c->method = k;
    c->kind = kind;
    c->policy = k->policy;
    c->member = NULL;
    c->start_us = start;
    c->backup_us = INT64_MAX;
    c->key = 0;
    c->parent = NULL;
    c->group = NULL;
    c->waiter = NULL;
    c->error = NULL;
    c->error_chunk = NULL;
    c->status = CRPC_OK;
    c->tried.attempts = 0;
    c->tried.max_attempts = 1;
}

/* Gives up a reference of a channel; the last one frees it. */
CRPCI_FN void crpci_attempt_drop_channel(crpc_channel *ch)
{
    crpc_loop *l = ch->loop;
    if (!crpci_thread_unref(&ch->refs))
        return;
    crpci_request_source_free(&ch->requests);
    crpci_heap_strfree(l->heap, ch->directory.where);
    crpci_heap_retire(l->heap, ch, sizeof *ch);
    crpci_loop_release(l);
}

/* --- explaining ------------------------------------------------------------------------------- */

/* Where the explanation of a failure goes. An asynchronous call takes memory for it only now. */
CRPCI_COLD crpc_error *crpci_attempt_error(crpci_pending_call *c)
{
    c = c->parent ? c->parent : c;
    if (!c->error && c->kind != CRPCI_CALL_NOTIFY) {
        c->error_chunk = crpci_heap_chunk(c->channel->loop->heap, sizeof(crpc_error));
        if (c->error_chunk) {
            c->error = (crpc_error *)(void *)crpci_heap_data(c->error_chunk);
            memset(c->error, 0, sizeof *c->error);
        }
    }
    return c->error;
}

/* The most that any attempt of the call has sent. */
CRPCI_FN crpc_sent crpci_attempt_sent(const crpci_pending_call *c)
{
    return c->attempt.sent > c->before ? c->attempt.sent : c->before;
}

/* Writes why the present attempt failed. A part whose parent has ended explains nothing. */
CRPCI_COLD void crpci_attempt_explain(crpci_pending_call *c, int code, const char *cause,
                                      const char *more)
{
    const crpci_endpoint *at = c->attempt.endpoint;
    const crpc_method *m = c->method->method;
    bool late = c->parent && c->parent->attempt.state == CRPCI_ATTEMPT_DONE;
    crpc_error *e = late ? NULL : crpci_attempt_error(c);
    if (!e)
        return;
    e->code = code;
    e->app_code = 0;
    e->remote = code == CRPC_ELOGOFF; /* only a peer says that */
    e->sent = crpci_attempt_sent(c);
    e->attempts = c->tried.attempts;
    snprintf(e->endpoint, sizeof e->endpoint, "%s", at ? at->address : "");
    crpci_status_explain(e, "%s.%s attempt %d%s%s: %s%s (%s)", m->service, m->name,
                         c->tried.attempts, at ? " " : "", e->endpoint, cause, more,
                         e->remote ? "remote" : "local");
}

/* --- ends ------------------------------------------------------------------------------------- */

/* Tells balancer, breaker and budget how the present attempt ended, once. */
CRPCI_FN void crpci_attempt_end(crpci_pending_call *c, crpci_outcome outcome)
{
    crpc_channel *ch = c->channel;
    crpci_member *m = c->member;
    int64_t now;
    if (!m)
        return;
    c->member = NULL;
    now = crpci_loop_time(ch->loop);
#if CRPC_ENABLE_POLICY
    if (outcome == CRPCI_OUTCOME_OK && ch->budget.limited)
        crpci_limiter_budget_earn(&ch->budget.tokens);
#endif
    crpci_providers_end(&ch->providers, m, outcome, now - c->attempt_us, now);
}

/* Takes a call out of what its loop knows: from here on it is the calling thread's alone.
 * Locked. */
CRPCI_FN void crpci_attempt_take(crpci_pending_call *c)
{
    crpc_loop *l = c->channel->loop;
    crpci_list_remove(&c->of_channel);
    crpci_timer_cancel(&c->timer);
    crpci_id_remove(&l->calls, c->attempt.id);
    if (c->kind == CRPCI_CALL_ID)
        l->results--;
    crpci_endpoint_drop(c->attempt.endpoint);
}

/* Frees a call that was taken. With or without the lock. */
CRPCI_FN void crpci_attempt_free(crpci_pending_call *c)
{
    crpc_channel *ch = c->channel;
    crpci_heap_chunk_unref(c->attempt.reply.chunk);
    crpci_request_drop(&c->attempt.request, c->block);
    crpci_heap_chunk_unref(c->error_chunk);
    crpci_heap_chunk_unref(c->block);
    crpci_attempt_drop_channel(ch);
}

/* Takes and frees a call whose result nobody wants. Locked. */
CRPCI_FN void crpci_attempt_discard(crpci_pending_call *c)
{
    crpci_attempt_take(c);
    crpci_attempt_free(c);
}

/* Gives up the present attempt before its reply came. A peer that was sent the request still works
 * on it. With a limit of requests in flight the slot is still occupied then, and the late reply
 * could be taken for that of the next request: closes the connection. */
CRPCI_FN void crpci_attempt_abandon(crpci_pending_call *c, int why)
{
    crpci_endpoint *e = c->attempt.endpoint;
    bool active = c->attempt.state == CRPCI_ATTEMPT_ACTIVE;
    crpci_endpoint_detach(&c->attempt);
    crpci_attempt_end(c, why == CRPC_ETIMEDOUT ? CRPCI_OUTCOME_ERROR : CRPCI_OUTCOME_IGNORE);
    if (active && e->options.inflight && c->attempt.sent != CRPC_SENT_NO && e->conn)
        crpci_conn_close(e->conn, why, 0);
}

/* Ends the call, once, with a reply or a status: queues its callback, ends its caller's wait, or
 * leaves its result to be fetched. Frees one-way calls. The slot of its endpoint goes to the next
 * attempt before the caller is told. */
CRPCI_FN void crpci_attempt_finish(crpci_pending_call *c, int status)
{
    const crpci_cluster_ops *cluster = c->channel->cluster;
    crpc_loop *l = c->channel->loop;
    crpci_endpoint *e = c->attempt.endpoint;
    crpci_endpoint_detach(&c->attempt);
    crpci_attempt_end(c, CRPCI_OUTCOME_IGNORE);
    c->status = status;
    c->attempt.state = CRPCI_ATTEMPT_DONE;
    c->end_us = crpci_loop_time(l);
    crpci_timer_cancel(&c->timer);
    if (e)
        crpci_endpoint_serve_waiting(e);
    if (CRPCI_UNLIKELY(c->group != NULL)) {
        cluster->drop_parts(c);
        if (status) /* a BROADCAST that is cut short may have a reply of one of its parts */
            crpci_reply_drop(&c->attempt.reply, l);
    }
    /* No status and no reply is a one-way call that was sent: it has not failed. */
    if (CRPCI_UNLIKELY(c->policy.cluster == CRPC_CLUSTER_FAILBACK) && cluster &&
        (status || (c->attempt.reply.chunk && !crpci_reply_succeeded(&c->attempt.reply))) &&
        cluster->retry_later(c, status))
        return;
    switch (c->kind) {
    case CRPCI_CALL_SYNC:
        break;
    case CRPCI_CALL_DELIVER:
        crpci_loop_ready(l, &c->task);
        return;
    case CRPCI_CALL_ID:
        if (c->attempt.reply.chunk)
            crpci_reply_unshare(&c->attempt.reply, l->heap);
        crpci_request_drop(&c->attempt.request, c->block);
        break;
    case CRPCI_CALL_NOTIFY:
        crpci_attempt_discard(c);
        return;
    case CRPCI_CALL_PART:
    case CRPCI_CALL_FAILBACK:
        cluster->part_ended(c, status);
        return;
    }
    if (c->waiter)
        crpci_drive_end_wait(l, c->waiter);
}

/* Ends a call that has failed on this side; `more` completes the cause, or is "". */
CRPCI_COLD void crpci_attempt_give_up(crpci_pending_call *c, int code, const char *cause,
                                      const char *more)
{
    crpci_attempt_explain(c, code, cause, more);
    crpci_attempt_finish(c, code);
}

/* Ends a call whose deadline has passed; the text says how far it had come. */
CRPCI_FN void crpci_attempt_expire(crpci_pending_call *c)
{
    bool waits = c->attempt.state == CRPCI_ATTEMPT_WAITING;
    crpci_attempt_abandon(c, CRPC_ETIMEDOUT);
    crpci_attempt_give_up(c, CRPC_ETIMEDOUT, "deadline exceeded",
                          !waits                ? ""
                          : c->attempt.endpoint ? " while waiting for a connection"
                                                : " while waiting for a provider");
}

/* Ends a call that has nobody to be sent to; tells an empty list from a registry that has not
 * answered. */
CRPCI_COLD void crpci_attempt_no_provider(crpci_pending_call *c)
{
    const crpc_channel *ch = c->channel;
    crpci_attempt_give_up(c, CRPC_ENOPROVIDER,
                          ch->directory.registry && !ch->directory.listed
                              ? "the registry has not answered yet about "
                              : "no provider is known at ",
                          ch->directory.where ? ch->directory.where : "the channel's URL");
}

/* --- attempts --------------------------------------------------------------------------------- */

/* Chooses a provider that the call has not tried. NULL: there is none. */
CRPCI_FN crpci_member *crpci_attempt_pick(const crpci_pending_call *c)
{
    return crpci_providers_pick(&c->channel->providers, &c->tried, c->group, c->key);
}

/* Excludes the present attempt's endpoint from later choices. A ring: the oldest entry goes. */
CRPCI_FN void crpci_attempt_mark_tried(crpci_pending_call *c)
{
    c->tried.last[(c->tried.attempts - 1) % CRPCI_PROVIDERS_TRIED] = c->attempt.endpoint;
}

/* With wait=1: puts a call for which there is no provider now into the channel's waiting list,
 * until a list of providers comes or its deadline passes. False: the call does not wait. */
CRPCI_COLD bool crpci_attempt_park(crpci_pending_call *c)
{
    crpc_channel *ch = c->channel;
    if (!ch->wait || ch->closed || c->kind >= CRPCI_CALL_PART)
        return false;
    c->attempt.state = CRPCI_ATTEMPT_WAITING;
    crpci_list_append(&ch->waiting, &c->attempt.link);
    return true;
}

/* Makes an attempt on a member; NULL ends the call, or lets it wait. The call may be over, and an
 * asynchronous one freed, when this returns. */
CRPCI_FN void crpci_attempt_start(crpci_pending_call *c, crpci_member *m)
{
    crpc_channel *ch = c->channel;
    crpci_endpoint *e;
    if (CRPCI_UNLIKELY(!m) && crpci_attempt_park(c))
        return;
    c->tried.attempts++;
    c->attempt.sent = CRPC_SENT_NO;
    if (CRPCI_UNLIKELY(!m)) {
        crpci_attempt_no_provider(c);
        return;
    }
    e = m->endpoint;
    e->refs++;
    crpci_endpoint_drop(c->attempt.endpoint);
    c->attempt.endpoint = e;
    c->member = m;
    c->attempt_us = c->tried.attempts == 1 ? c->start_us : crpci_loop_rough_time(ch->loop);
    crpci_providers_begin(&ch->providers, m, c->attempt_us);
    if (!e->conn)
        crpci_providers_age(&ch->providers, e);
    crpci_endpoint_submit(e, &c->attempt);
}

/* Whether another attempt is allowed: the request was certainly not executed, or may be executed
 * twice; and there are attempts, time and a request left. */
CRPCI_FN bool crpci_attempt_may_retry(crpci_pending_call *c, int code)
{
    bool twice = (c->method->method->flags & CRPC_METHOD_IDEMPOTENT) ||
                 c->attempt.request.identified;
    bool harmless = c->attempt.sent == CRPC_SENT_NO || code == CRPC_ELOGOFF ||
                    (twice && code == CRPC_ECONN);
    return harmless && c->tried.attempts < c->tried.max_attempts && !c->channel->closed &&
           crpci_loop_rough_time(c->channel->loop) < c->attempt.deadline_us &&
           crpci_request_renew(&c->attempt.request, c->block);
}

/* With wait=1: lets a call whose last attempt could not connect begin anew, at the provider whose
 * backoff ends first. False: the call ends. Endpoints bound the rate of dials, so such attempts are
 * not counted as retries. */
CRPCI_COLD bool crpci_attempt_wait(crpci_pending_call *c, int code)
{
    crpc_channel *ch = c->channel;
    crpci_member *m;
    if (!ch->wait || code != CRPC_ECONN || ch->closed || c->kind >= CRPCI_CALL_PART)
        return false;
    if (c->group) /* its parts have failed: their providers can be chosen again */
        ch->cluster->drop_parts(c);
    if (c->before != CRPC_SENT_NO ||
        crpci_loop_rough_time(ch->loop) >= c->attempt.deadline_us ||
        !crpci_request_renew(&c->attempt.request, c->block))
        return false;
    memset(c->tried.last, 0, sizeof c->tried.last);
    if (c->tried.max_attempts < c->tried.attempts) /* the parts were more than that */
        c->tried.max_attempts = c->tried.attempts;
    c->tried.max_attempts++;
    m = crpci_attempt_pick(c);
    if (!m || m->endpoint->usable_at > c->attempt.deadline_us)
        return crpci_attempt_park(c);
    crpci_attempt_start(c, m);
    return true;
}

/* Chooses where a failed attempt is made again. NULL: nowhere. `stale`: perhaps only the connection
 * was dead, not the provider. */
CRPCI_FN crpci_member *crpci_attempt_next(crpci_pending_call *c, int code, bool stale)
{
    crpc_channel *ch = c->channel;
    crpci_member *m;
    /* The request may have been executed, and has an id: only the provider that it was sent to can
     * have kept the reply, so it goes there again; nowhere, if that provider is stopping. */
    if (c->before != CRPC_SENT_NO && !(c->method->method->flags & CRPC_METHOD_IDEMPOTENT))
        return code == CRPC_ELOGOFF ? NULL
                                    : crpci_providers_of(&ch->providers, c->attempt.endpoint);
    m = crpci_attempt_pick(c);
    if (!m && stale) {
        memset(c->tried.last, 0, sizeof c->tried.last);
        m = crpci_attempt_pick(c);
    }
    return m;
}

/* Whether the retry budget lets an attempt on a member through. Free of charge are: what a stopping
 * server refused, a provider that has proven itself, a connection that had gone stale. */
CRPCI_FN bool crpci_attempt_affordable(crpci_pending_call *c, const crpci_member *m, int code,
                                       bool stale)
{
#if CRPC_ENABLE_POLICY
    crpc_channel *ch = c->channel;
    return code == CRPC_ELOGOFF || crpci_endpoint_is_proven(m->endpoint) || !ch->budget.limited ||
           (stale && c->attempt.sent == CRPC_SENT_NO) ||
           crpci_limiter_budget_spend(&ch->budget.tokens);
#else
    (void)c, (void)m, (void)code, (void)stale;
    return true;
#endif
}

/* The present attempt has failed: makes the next one, or ends the call with `code` and `cause`. */
CRPCI_FN void crpci_attempt_failed(crpci_attempt *a, int code, const char *cause)
{
    crpci_pending_call *c = crpci_attempt_call(a);
    crpc_channel *ch = c->channel;
    crpci_endpoint *e = a->endpoint;
    bool again, stale = code == CRPC_ECONN && !e->refused;
    crpci_member *m;
    if (code == CRPC_EOVERCROWDED && !e->conn->tx_bytes)
        c->tried.max_attempts = c->tried.attempts; /* no queue can take it: a retry is useless */
    crpci_endpoint_detach(a);
    crpci_attempt_end(c, code == CRPC_ECONN ? CRPCI_OUTCOME_ERROR : CRPCI_OUTCOME_IGNORE);
    again = crpci_attempt_may_retry(c, code);
    if (code != CRPC_ELOGOFF && a->sent > c->before)
        c->before = a->sent;
    crpci_attempt_explain(c, code, cause, "");
    crpci_attempt_mark_tried(c);
#if CRPC_ENABLE_POLICY
    ch->providers.choose_again =
        ch->providers.choose_again || (ch->providers.max && crpci_endpoint_is_dead(e));
#endif
    stale = stale && (c->before == CRPC_SENT_NO ||
                      (c->method->method->flags & CRPC_METHOD_IDEMPOTENT));
    m = again ? crpci_attempt_next(c, code, stale) : NULL;
    e->refs++; /* the next attempt may end the call, and with it the last reference */
    if (m && crpci_attempt_affordable(c, m, code, stale))
        crpci_attempt_start(c, m);
    else if (!(c->group && ch->cluster->leaves_open(c->group, code)) &&
             !crpci_attempt_wait(c, code))
        crpci_attempt_give_up(c, code, cause,
                              m       ? "; retry_budget is used up"
                              : again ? "; no other provider to try"
                                      : "");
    crpci_endpoint_serve_waiting(e);
    crpci_endpoint_drop(e);
}

/* Judges the provider by a reply's status, for balancer and breaker: an application's error
 * shows a service that works; a refusal of this request says nothing about the next one. */
CRPCI_FN crpci_outcome crpci_attempt_outcome(int code)
{
    if (CRPCI_LIKELY(code == 0))
        return CRPCI_OUTCOME_OK;
    switch (code) {
    case CRPC_EINTERNAL:
    case CRPC_ERESPONSE:
    case CRPC_ETIMEDOUT:
    case CRPC_EOVERCROWDED:
        return CRPCI_OUTCOME_ERROR;
    default:
        return crpci_status_reserved(code) ? CRPCI_OUTCOME_IGNORE : CRPCI_OUTCOME_OK;
    }
}

/* A reply has come. One that refuses because its server is stopping counts as a failed attempt, if
 * there is another provider to try; any other one ends the call. */
CRPCI_FN void crpci_attempt_replied(crpci_attempt *a, const crpci_message *m)
{
    crpci_pending_call *c = crpci_attempt_call(a);
    if (!m->usual && m->status == CRPC_ELOGOFF &&
        c->tried.attempts < c->tried.max_attempts && c->channel->providers.count > 1) {
        crpci_attempt_failed(a, CRPC_ELOGOFF, CRPCI_STATUS_TEXT("the server is stopping"));
        return;
    }
    crpci_reply_take(&a->reply, c->channel->loop, a->endpoint->options.protocol, m);
    crpci_attempt_end(c, crpci_attempt_outcome(a->reply.status));
    crpci_attempt_finish(c, CRPC_OK);
}

/* A one-way call's frame has left, which is its success; or a reply has come that cannot be used:
 * the provider has answered, so the call ends here. */
CRPCI_FN void crpci_attempt_ended(crpci_attempt *a, int code, const char *cause)
{
    crpci_pending_call *c = crpci_attempt_call(a);
    if (code)
        crpci_attempt_give_up(c, code, cause, "");
    else
        crpci_attempt_finish(c, CRPC_OK);
}

static const crpci_endpoint_events crpci_attempt_events = {
    crpci_attempt_failed, crpci_attempt_replied, crpci_attempt_ended};

/* Makes the first attempt, or has the cluster section make several. Ends a call at once that is too
 * late, lacks the key that lb=hash needs, or whose method is degraded. */
CRPCI_FN void crpci_attempt_begin(crpci_pending_call *c)
{
    const crpc_method_options *o = c->method->options;
    crpci_providers_refresh(&c->channel->providers);
    if (crpci_loop_rough_time(c->channel->loop) >= c->attempt.deadline_us) {
        crpci_attempt_give_up(c, CRPC_ETIMEDOUT, "deadline exceeded",
                              " before the request was sent");
    } else if (CRPCI_UNLIKELY(!c->key && crpci_balance_need(&c->channel->providers.balance,
                                                            CRPCI_BALANCE_RING))) {
        crpci_attempt_give_up(c, CRPC_EINVAL, "lb=hash needs a key:",
                              " set crpc_call.key or hash_field");
    } else if (CRPCI_UNLIKELY(o && o->degraded > 0)) {
        crpci_attempt_give_up(c, CRPC_EREJECT, "not sent:", " the method's options set degraded");
    } else if (CRPCI_UNLIKELY(c->policy.cluster >= CRPC_CLUSTER_FORKING) && c->channel->cluster) {
        c->channel->cluster->begin(c);
    } else {
        crpci_attempt_start(c, crpci_attempt_pick(c));
    }
}

/* With wait=1: a list of providers has come. The calls that wait for one begin anew. */
CRPCI_COLD void crpci_attempt_serve_waiting(crpc_channel *ch)
{
    crpci_list now;
    crpci_list_move(&now, &ch->waiting);
    while (!crpci_list_empty(&now)) {
        crpci_attempt *a = CRPCI_CONTAINER(now.next, crpci_attempt, link);
        crpci_list_remove(&a->link);
        a->state = CRPCI_ATTEMPT_IDLE;
        crpci_attempt_begin(crpci_attempt_call(a));
    }
}

/* A backup request is due, or the deadline has passed. A synchronous caller watches its deadline by
 * itself. */
CRPCI_FN void crpci_attempt_on_timer(crpc_loop *l, crpci_timer *t)
{
    crpci_pending_call *c = CRPCI_CONTAINER(t, crpci_pending_call, timer);
    int64_t now = crpci_loop_time(l);
    if (c->backup_us <= now && now < c->attempt.deadline_us) {
        if (c->kind != CRPCI_CALL_SYNC)
            crpci_loop_timer_at(l, t, c->attempt.deadline_us);
        c->channel->cluster->backup(c);
    } else if (c->kind != CRPCI_CALL_SYNC) {
        crpci_attempt_expire(c);
    }
}

/* --- results, on the thread that wants them, without the lock --------------------------------- */

/* Puts a response in the place of a failed call's: the method's fallback or canned response, or an
 * empty one where the cluster policy hides failures. Otherwise returns the failure. An
 * application's error is an answer, and a cancelled call wants none: both stay. */
CRPCI_COLD int crpci_attempt_degrade(const crpci_pending_call *c, void *response, crpc_call *call,
                                     int status)
{
#if CRPC_ENABLE_POLICY
    const crpc_method_options *o = c->method->options;
    const crpci_message_type *type = &c->method->response;
    const char *why = "";
    if (status == CRPC_EAPP || status == CRPC_ECANCELED)
        return status;
    call->reply_attachment = crpc_view_of(NULL, 0);
    if (o && (o->fallback || crpc_view_data(o->canned))) {
        memset(response, 0, type->size);
        if (o->fallback)
            return o->fallback(o->user, c->method->method, &call->error, response);
        if (crpci_message_decode(crpc_view_data(o->canned), crpc_view_size(o->canned), type,
                                 response, &why))
            return CRPC_OK;
        return crpci_reply_malformed(c->method->method, &call->error, why);
    }
    if (c->policy.cluster != CRPC_CLUSTER_FAILSAFE && c->policy.cluster != CRPC_CLUSTER_FAILBACK)
        return status;
    crpci_heap_log(c->channel->loop->heap, CRPC_LOG_WARN, "%s; the call returns an empty response",
                   call->error.text);
    memset(response, 0, type->size);
    return CRPC_OK;
#else
    (void)c, (void)response, (void)call;
    return status;
#endif
}

/* Gives an ended call's result: fills `response` and the outputs of `call`, which has the
 * explanation already if the call failed here. */
CRPCI_FN int crpci_attempt_result(const crpci_pending_call *c, void *response, crpc_call *call)
{
    const crpci_reply *r = &c->attempt.reply;
    int status =
        r->chunk ? crpci_reply_decode(r, c->method, c->tried.attempts, response, call) : c->status;
    if (CRPCI_UNLIKELY(status))
        status = crpci_attempt_degrade(c, response, call, status);
    call->error.code = status;
    call->latency_us = c->end_us - c->start_us;
    return status;
}

#endif /* CRPC_ENABLE_CLIENT */

/* ======================================================================== */
/* >>impl-cluster   several attempts at a time, and tries in the background */
/* ======================================================================== */

/* FORKING, BROADCAST and backup requests give a call a group of parts: pending calls with one
 * attempt each and a copy of the request. FAILBACK puts a copy of a failed call aside and tries it
 * again in the background. The attempt section calls in through crpci_cluster_all and knows nothing
 * else of this section. Everything here is called with the loop locked. */

#if CRPC_ENABLE_CLIENT && CRPC_ENABLE_POLICY

/* The parts of one call. The call owns the group and its parts, and frees them when it ends. */
struct crpci_group {
    crpci_list parts; /* ended ones too, so that no provider is asked twice */
    uint32_t open;    /* parts under way */
    uint32_t failed;  /* parts that have ended without success */
    size_t lost;   /* parts that could not be begun for want of memory */
    bool all;      /* wait for every part (BROADCAST); else the first success decides */
    bool starting; /* parts are being begun, or dropped: one that ends must not settle the call */
    int status;    /* of the last failure */
    crpci_endpoint *from; /* whose reply the call takes; a reference. NULL: no success yet */
};

/* Whether a part of the group was sent to an endpoint, or is about to be. */
CRPCI_COLD bool crpci_cluster_tried(const crpci_group *g, const crpci_endpoint *e)
{
    crpci_list *i;
    for (i = g->parts.next; i != &g->parts; i = i->next) {
        if (CRPCI_CONTAINER(i, crpci_pending_call, of_channel)->attempt.endpoint == e)
            return true;
    }
    return false;
}

/* The call's own attempt has failed for good while a backup request is under way. */
CRPCI_COLD bool crpci_cluster_leaves_open(crpci_group *g, int status)
{
    if (!g->open)
        return false;
    g->status = status;
    return true;
}

/* Frees the group of a call that has ended, and cancels the parts under way. What they sent and how
 * many they were goes into the call's explanation. */
CRPCI_COLD void crpci_cluster_drop_parts(crpci_pending_call *c)
{
    crpci_group *g = c->group;
    crpc_loop *l = c->channel->loop;
    g->starting = true; /* a connection that closes may end other parts: they decide nothing now */
    while (!crpci_list_empty(&g->parts)) {
        crpci_pending_call *part =
            CRPCI_CONTAINER(g->parts.next, crpci_pending_call, of_channel);
        crpci_attempt *a = &part->attempt;
        crpci_list_remove(&part->of_channel);
        c->tried.attempts += part->tried.attempts;
        if (a->state != CRPCI_ATTEMPT_DONE)
            crpci_attempt_abandon(part,
                                  c->status == CRPC_ETIMEDOUT ? CRPC_ETIMEDOUT : CRPC_ECANCELED);
        if (a->sent > c->before)
            c->before = a->sent;
        crpci_reply_drop(&a->reply, l);
        if (a->endpoint)
            crpci_endpoint_serve_waiting(a->endpoint);
        crpci_attempt_discard(part);
    }
    c->group = NULL;
    if (c->error) {
        c->error->attempts = c->tried.attempts;
        c->error->sent = crpci_attempt_sent(c);
    }
    crpci_endpoint_drop(g->from);
    crpci_heap_free(l->heap, g, sizeof *g);
}

/* Ends the call with a part's reply, which it has taken over; its own attempt is given up. The
 * endpoint that answered becomes the call's, so that the result names it. */
CRPCI_COLD void crpci_cluster_succeed(crpci_pending_call *c)
{
    crpci_endpoint *own = c->attempt.endpoint;
    if (c->attempt.state != CRPCI_ATTEMPT_IDLE)
        crpci_attempt_abandon(c, CRPC_ECANCELED);
    c->attempt.endpoint = c->group->from;
    c->group->from = NULL;
    crpci_attempt_finish(c, CRPC_OK);
    if (own) /* the attempt that was given up leaves a slot to the next call */
        crpci_endpoint_serve_waiting(own);
    crpci_endpoint_drop(own);
}

/* Ends the call if its parts have decided it: BROADCAST when all have ended, with success if no
 * more than fail_percent of them failed; the others with the first success, or when the last part
 * and the call's own attempt have failed. With wait=1, if none could connect, the call then goes on
 * with attempts of its own; a BROADCAST ends, because one attempt would not reach everyone. */
CRPCI_COLD void crpci_cluster_settle(crpci_pending_call *c)
{
    crpci_group *g = c->group;
    int status = g->status;
    size_t all = g->lost;
    const crpci_list *i;
    if (g->starting || (g->all && g->open))
        return;
    for (i = g->parts.next; i != &g->parts; i = i->next)
        all++;
    if (g->all && (g->failed + g->lost) * 100 > all * (size_t)c->policy.fail_percent)
        crpci_reply_drop(&c->attempt.reply, c->channel->loop); /* too many failed */
    if (c->attempt.reply.chunk)
        crpci_cluster_succeed(c);
    else if (!g->open && c->attempt.state == CRPCI_ATTEMPT_IDLE &&
             (g->all || !crpci_attempt_wait(c, status)))
        crpci_attempt_finish(c, status);
}

/* The status of an attempt that has failed. A reply explains the call: a part's status and text
 * become those of the call if that fails too, and a later failure replaces them. */
CRPCI_COLD int crpci_cluster_explain(crpci_pending_call *c, int status)
{
    const crpci_attempt *a = &c->attempt;
    crpc_error *e = a->reply.chunk ? crpci_attempt_error(c) : NULL;
    if (!e)
        return a->reply.chunk ? CRPC_ERESPONSE : status;
    e->sent = CRPC_SENT_YES;
    e->attempts = c->tried.attempts;
    memcpy(e->endpoint, a->endpoint->address, sizeof e->endpoint);
    return crpci_reply_remote_error(&a->reply, c->method->method, e);
}

/* A part, or a background try, has ended. The first success gives its reply to the call; later ones
 * are dropped with their parts. */
CRPCI_COLD void crpci_cluster_part_ended(crpci_pending_call *part, int status)
{
    crpci_pending_call *c = part->parent;
    if (part->kind == CRPCI_CALL_FAILBACK) { /* with success; failures go to retry_later */
        part->channel->failback.waiting--;
        crpci_attempt_discard(part);
        return;
    }
    c->group->open--;
    if (!crpci_reply_succeeded(&part->attempt.reply)) {
        c->group->failed++;
        c->group->status = crpci_cluster_explain(part, status);
    } else if (!c->attempt.reply.chunk) {
        c->group->from = part->attempt.endpoint;
        c->group->from->refs++;
        c->attempt.reply = part->attempt.reply;
        part->attempt.reply.chunk = NULL;
    }
    crpci_cluster_settle(c);
}

/* Makes a pending call for one more attempt of `c`, with a copy of its request and an id of its
 * own, in a chunk of its own. It shares the deadline of `c`. NULL: out of memory. */
CRPCI_COLD crpci_pending_call *crpci_cluster_part(crpci_pending_call *c)
{
    crpc_loop *l = c->channel->loop;
    crpci_chunk *chunk = crpci_heap_chunk(
        l->heap, CRPCI_PENDING_SIZE + crpci_request_size(&c->attempt.request));
    crpci_pending_call *part;
    if (!chunk)
        return NULL;
    part = (crpci_pending_call *)(void *)crpci_heap_data(chunk);
    if (crpci_id_add(&l->calls, l->heap, part, &part->attempt.id)) {
        crpci_heap_chunk_unref(chunk);
        return NULL;
    }
    /* The provider is not charged for the call's wait. */
    crpci_attempt_init(part, c->channel, c->method, CRPCI_CALL_PART, crpci_loop_time(l));
    crpci_request_copy(&part->attempt.request, &c->attempt.request, chunk, CRPCI_PENDING_SIZE);
    part->attempt.deadline_us = c->attempt.deadline_us;
    part->policy = c->policy;
    part->policy.cluster = CRPC_CLUSTER_FAILFAST;
    part->key = c->key;
    part->parent = c;
    part->block = chunk;
    crpci_thread_ref(&c->channel->refs);
    return part;
}

/* Sends the call to up to `n` more providers that it has not tried; `all`: to all, as a BROADCAST,
 * which counts those for which there is no memory as failed. Other calls do without. False: no part
 * was begun. */
CRPCI_COLD bool crpci_cluster_branch(crpci_pending_call *c, size_t n, bool all)
{
    crpci_group *g = c->group;
    bool any = false;
    if (!g) {
        g = (crpci_group *)crpci_heap_alloc(c->channel->loop->heap, sizeof *g);
        if (!g)
            return false;
        crpci_list_init(&g->parts);
        g->all = all;
        g->status = CRPC_ENOMEM;
        c->group = g;
    }
    g->starting = true;
    for (; n; n--) {
        crpci_member *m = crpci_attempt_pick(c);
        crpci_pending_call *part = m ? crpci_cluster_part(c) : NULL;
        if (!part && m && g->all) {
            g->lost = n;
            crpci_attempt_explain(c, CRPC_ENOMEM, "out of memory", "");
        }
        if (!part)
            break;
        any = true;
        crpci_list_append(&g->parts, &part->of_channel);
        g->open++;
        crpci_attempt_start(part, m);
    }
    g->starting = false;
    return any;
}

/* Begins a FORKING or BROADCAST call: to `forks` providers (0: all), or to all. The call makes no
 * attempt of its own. */
CRPCI_COLD void crpci_cluster_begin(crpci_pending_call *c)
{
    bool all = c->policy.cluster == CRPC_CLUSTER_BROADCAST;
    size_t count = c->channel->providers.count;
    size_t n = all || !c->policy.forks ? count : (size_t)c->policy.forks;
    if (!count && crpci_attempt_park(c)) {
        ; /* waits for a list */
    } else if (!count) {
        crpci_attempt_no_provider(c);
    } else if (crpci_cluster_branch(c, n, all)) {
        crpci_cluster_settle(c);
    } else {
        crpci_attempt_give_up(c, CRPC_ENOMEM, "out of memory", "");
    }
}

/* A backup request is due: asks one more provider, while the first attempt goes on. Without memory
 * or another provider, and if the call was not sent anywhere yet, nothing happens. */
CRPCI_COLD void crpci_cluster_backup(crpci_pending_call *c)
{
    c->backup_us = INT64_MAX;
    if (c->attempt.state == CRPCI_ATTEMPT_DONE || !c->attempt.endpoint)
        return;
    crpci_attempt_mark_tried(c);
    if (crpci_cluster_branch(c, 1, false))
        crpci_cluster_settle(c);
}

/* --- failback --------------------------------------------------------------------------------- */

/* Tells the program, through failback_dropped or the log, of a call that is given up; a task that
 * runs user code. */
CRPCI_COLD void crpci_cluster_failback_dropped(crpc_loop *l, crpci_task *task)
{
    crpci_pending_call *c = CRPCI_CONTAINER(task, crpci_pending_call, task);
    const crpc_channel *ch = c->channel;
    crpc_error unknown;
    memset(&unknown, 0, sizeof unknown);
    unknown.code = c->status;
    crpci_loop_user_begin(l);
    if (ch->failback.dropped)
        ch->failback.dropped(ch->failback.user, c->method->method, c->error ? c->error : &unknown);
    else
        crpci_heap_log(l->heap, CRPC_LOG_WARN, "failback: call given up: %s",
                       c->error ? c->error->text : "");
    crpci_loop_user_end(l);
    crpci_attempt_discard(c);
}

/* The pause before a background try is over: begins it, with the whole timeout of the call. Or the
 * timeout of a try has passed. */
CRPCI_COLD void crpci_cluster_failback_timer(crpc_loop *l, crpci_timer *t)
{
    crpci_pending_call *c = CRPCI_CONTAINER(t, crpci_pending_call, timer);
    if (c->attempt.state == CRPCI_ATTEMPT_IDLE) {
        c->start_us = crpci_loop_time(l);
        c->attempt.deadline_us = c->start_us + (int64_t)c->policy.timeout_ms * 1000;
        crpci_loop_timer_at(l, &c->timer, c->attempt.deadline_us);
        crpci_attempt_start(c, crpci_attempt_pick(c));
    } else {
        crpci_attempt_expire(c);
    }
}

/* A background try has failed: pauses before the next one, or gives the call up after `retries`
 * tries, when the channel closes, or when the service answered with an error of its own, which the
 * next try would only repeat. */
CRPCI_COLD void crpci_cluster_failback_failed(crpci_pending_call *c, int status)
{
    crpc_channel *ch = c->channel;
    crpci_reply *r = &c->attempt.reply;
    bool answered = r->chunk && !crpci_status_reserved(r->status);
    status = crpci_cluster_explain(c, status);
    crpci_reply_drop(r, ch->loop);
    if (c->policy.retries > 1 && !answered && !ch->closed &&
        crpci_request_renew(&c->attempt.request, c->block)) {
        c->policy.retries--;
        c->tried.attempts = 0;
        c->attempt.state = CRPCI_ATTEMPT_IDLE;
        crpci_loop_timer_set(ch->loop, &c->timer, ch->failback.pause_us);
        return;
    }
    c->status = status;
    ch->failback.waiting--;
    c->policy.cluster = CRPC_CLUSTER_FAILFAST;
    crpci_loop_ready(ch->loop, &c->task);
}

/* A FAILBACK call has failed: puts a copy aside that is sent later, unless the failure is final or
 * failback_max copies wait. True: `c` is such a copy itself, and has been dealt with. */
CRPCI_COLD bool crpci_cluster_retry_later(crpci_pending_call *c, int status)
{
    crpc_channel *ch = c->channel;
    crpc_loop *l = ch->loop;
    crpci_pending_call *back;
    int code = c->attempt.reply.chunk ? c->attempt.reply.status : status;
    if (c->kind == CRPCI_CALL_FAILBACK) {
        crpci_cluster_failback_failed(c, status);
        return true;
    }
    if (c->kind == CRPCI_CALL_PART || ch->closed || status == CRPC_ECANCELED ||
        status == CRPC_EREJECT || !c->policy.retries || !crpci_status_reserved(code))
        return false;
    if (ch->failback.waiting >= ch->failback.max) {
        crpci_heap_log(l->heap, CRPC_LOG_WARN, "%s.%s: failed call not retried: %zu calls "
                                               "wait already (failback_max)",
                       c->method->method->service, c->method->method->name, ch->failback.waiting);
        return false;
    }
    back = crpci_cluster_part(c);
    if (!back)
        return false;
    back->kind = CRPCI_CALL_FAILBACK;
    back->policy = c->policy;
    back->parent = NULL;
    crpci_list_append(&ch->calls, &back->of_channel);
    crpci_loop_task_init(&back->task, crpci_cluster_failback_dropped);
    crpci_timer_init(&back->timer, crpci_cluster_failback_timer);
    ch->failback.waiting++;
    crpci_loop_timer_set(l, &back->timer, ch->failback.pause_us);
    crpci_drive_ensure_owner(l); /* where threads are forbidden it waits until somebody drives */
    return false;
}

static const crpci_cluster_ops crpci_cluster_all = {
    crpci_cluster_begin,      crpci_cluster_backup,     crpci_cluster_leaves_open,
    crpci_cluster_part_ended, crpci_cluster_drop_parts, crpci_cluster_retry_later};

#endif /* CRPC_ENABLE_CLIENT && CRPC_ENABLE_POLICY */

/* ======================================================================== */
/* >>impl-channel   the forms of calls, and closing                         */
/* ======================================================================== */

/* The calls that programs make: synchronous, with a callback, with an id, one-way. Each encodes its
 * request without a lock, then locks the loop, lists a pending call in the channel and hands it to
 * crpci_attempt_begin. The public functions are called without a lock, by any thread. A call lives
 * in the chunk of its request. A synchronous call differs from one with an id in that its caller
 * waits at once. */

#if CRPC_ENABLE_CLIENT

/* --- interceptors ----------------------------------------------------------------------------- */

/* Runs the interceptors' `before` in order, without the lock. *ran receives for how many of them
 * `after` is due. While they run the call knows heap and protocol, so that fields can be added. */
CRPCI_FN int crpci_channel_before(crpc_channel *ch, const crpc_method *m, crpc_call *call,
                                  size_t *ran)
{
    int err = CRPC_OK;
    *ran = 0;
    call->reserved[CRPCI_CALL_HEAP] = ch->loop->heap;
    call->reserved[CRPCI_CALL_PROTOCOL] = (void *)(uintptr_t)ch->requests.protocol;
    while (*ran < ch->interceptor_count && !err) {
        const crpc_client_interceptor *i = &ch->interceptors[*ran];
        err = i->before ? i->before(i->user, m, call) : CRPC_OK;
        if (!err)
            ++*ran;
    }
    call->reserved[CRPCI_CALL_HEAP] = NULL;
    if (err)
        crpci_request_refuse(&call->error, m, err, "ended by an interceptor: ",
                             crpc_status_text(err));
    return err;
}

/* Runs the interceptors' `after` in reverse order, for the first `ran` of them. Without the
 * lock. */
CRPCI_FN void crpci_channel_after(crpc_channel *ch, const crpc_method *m, crpc_call *call, int err,
                                  size_t ran)
{
    while (ran--) {
        const crpc_client_interceptor *i = &ch->interceptors[ran];
        if (i->after)
            i->after(i->user, m, call, err);
    }
}

/* --- beginning a call ------------------------------------------------------------------------- */

/* The deadline of a call, in the loop's time: the call's own if it has one, else the policy's
 * timeout; never later than a day, nor than the deadline of the request that it is made for. */
CRPCI_FN int64_t crpci_channel_deadline(const crpc_policy *policy, const crpc_call *call,
                                        int64_t now)
{
    int64_t ms = policy->timeout_ms;
    int64_t at = now + crpci_base_min64(ms, CRPCI_REQUEST_LONGEST_MS) * 1000;
    if (call->deadline_us > 0)
        at = crpci_base_min64(call->deadline_us,
                              now + (int64_t)CRPCI_REQUEST_LONGEST_MS * 1000);
    if (call->parent)
        at = crpci_base_min64(at,
                              ((const crpci_origin *)(const void *)call->parent)->deadline_us);
    return at;
}

/* Fills a pending call whose request is encoded, and lists it in the channel. */
CRPCI_FN void crpci_channel_init_call(crpci_pending_call *c, crpc_channel *ch,
                                      const crpci_method *k, crpci_call_kind kind,
                                      const crpc_call *in, int64_t start)
{
    crpci_attempt_init(c, ch, k, kind, start);
    crpci_request_apply_policy(&c->policy, &in->policy);
    c->attempt.deadline_us = crpci_channel_deadline(&c->policy, in, start);
    if (CRPCI_UNLIKELY(c->policy.backup_ms && kind != CRPCI_CALL_NOTIFY &&
                       (k->method->flags & CRPC_METHOD_IDEMPOTENT)))
        c->backup_us = start + (int64_t)c->policy.backup_ms * 1000;
    if (crpc_view_data(in->key))
        c->key = crpci_base_hash(crpc_view_data(in->key), crpc_view_size(in->key));
    if (CRPCI_UNLIKELY(k->hash_field && !c->key))
        c->key = crpci_request_hash_key(&c->attempt.request, k->hash_field);
    if (c->policy.cluster == CRPC_CLUSTER_FAILOVER)
        c->tried.max_attempts += c->policy.retries;
    crpci_list_append(&ch->calls, &c->of_channel);
    ch->loop->stats.calls++;
}

/* Locks for a call that begins at `start`, and lets the loop catch up, which unlocks meanwhile. The
 * start serves as the loop's time, unless encoding a large message may have taken long. */
CRPCI_FN void crpci_channel_enter(crpc_loop *l, int64_t start, const crpci_request *r)
{
    crpci_loop_lock(l);
    if (start > l->now)
        l->now = start;
    l->fresh = false;
    if (r->payload_size > CRPCI_REQUEST_INLINE)
        crpci_loop_rough_time(l);
    l->fresh = true;
    crpci_drive_catch_up(l);
}

/* Rule P2: sends what was queued, unless a driver will do so before it sleeps. Locked; sending
 * unlocks meanwhile. */
CRPCI_FN void crpci_channel_flush(crpc_loop *l)
{
    if (crpci_loop_may_send(l))
        crpci_loop_run_list(l, &l->dirty);
}

/* --- all forms -------------------------------------------------------------------------------- */

/* Copies what is known of an ended call's failure, and where it went. */
CRPCI_FN void crpci_channel_copy_error(const crpci_pending_call *c, crpc_error *to)
{
    const crpci_endpoint *e = c->attempt.endpoint;
    if (c->error && c->error != to)
        *to = *c->error;
    if (e) /* else no attempt of its own was made, and the parts have explained */
        memcpy(to->endpoint, e->address, sizeof to->endpoint);
}

/* Runs the callback of an ended call, as a task of the loop. The response is decoded without the
 * lock into the call's own chunk, and lasts until the callback returns. */
CRPCI_FN void crpci_channel_deliver(crpc_loop *l, crpci_task *task)
{
    crpci_pending_call *c = CRPCI_CONTAINER(task, crpci_pending_call, task);
    const crpci_message_type *type = &c->method->response;
    crpc_channel *ch = c->channel;
    void *response = (char *)c + CRPCI_PENDING_SIZE;
    crpc_call call;
    crpc_done done;
    crpci_request_clear_call(&call);
    crpci_channel_copy_error(c, &call.error);
    crpci_attempt_take(c);
    crpci_loop_user_begin(l);
    if (c->attempt.reply.chunk && !type->views && !type->clear)
        memset(response, 0, type->size);
    done.status = crpci_attempt_result(c, response, &call);
    done.response = done.status ? NULL : response;
    crpci_channel_after(ch, c->method->method, &call, done.status, ch->interceptor_count);
    done.call = &call;
    done.user = c->user;
    done.fn = c->fn;
    c->deliver(&done);
    crpci_loop_user_end(l);
    crpci_reply_drop(&c->attempt.reply, l);
    crpci_attempt_free(c);
}

/* Whether one more call may begin: CRPC_ECANCELED in a closed channel, CRPC_EDEADLK for a
 * synchronous one inside a callback of this loop, which only its return lets go on, CRPC_ELIMIT at
 * max_results. Rule P8: starts the loop's thread if nobody drives. Locked. */
CRPCI_FN int crpci_channel_admit(crpc_channel *ch, crpci_call_kind kind)
{
    crpc_loop *l = ch->loop;
    crpci_loop_assert_locked(l);
    if (ch->closed)
        return CRPC_ECANCELED;
    if (kind == CRPCI_CALL_SYNC)
        return crpci_loop_in_callback(l) ? CRPC_EDEADLK : CRPC_OK;
    if (kind == CRPCI_CALL_ID && l->max_results && (int64_t)l->results >= l->max_results)
        return CRPC_ELIMIT;
    if (kind == CRPCI_CALL_ID && l->forbid_threads)
        return CRPC_OK; /* crpc_channel_wait drives the loop */
    return crpci_drive_ensure_owner(l);
}

/* The pending call of a request, which stands in the request's chunk. A result may stay unfetched
 * for long, so if the request is large a call with an id gets a chunk of its own. NULL: out of
 * memory. */
CRPCI_FN crpci_pending_call *crpci_channel_place(crpc_loop *l, crpci_call_kind kind,
                                                 crpci_request *r)
{
    crpci_pending_call *c = CRPCI_CONTAINER(r, crpci_pending_call, attempt.request);
    c->block = r->chunk;
    if (kind == CRPCI_CALL_ID && r->payload_size + r->inline_size > CRPCI_REQUEST_INLINE) {
        crpci_chunk *block = crpci_heap_chunk(l->heap, CRPCI_PENDING_SIZE);
        if (!block)
            return NULL;
        c = (crpci_pending_call *)(void *)crpci_heap_data(block);
        c->attempt.request = *r;
        c->block = block;
    }
    if (CRPCI_LIKELY(!crpci_id_add(&l->calls, l->heap, c, &c->attempt.id)))
        return c;
    if (c->block != r->chunk)
        crpci_heap_chunk_unref(c->block);
    return NULL;
}

/* Encodes and enters a call of any form. On success the loop is locked, and the call has taken over
 * a reference of the channel from the caller, who sets what is special to its form in *out and
 * launches it. On failure nothing is locked, and `error` (may be NULL) says why. */
CRPCI_FN int crpci_channel_put(crpc_channel *ch, const crpci_method *k, crpci_call_kind kind,
                               const void *request, const crpc_call *in, crpc_error *error,
                               crpci_pending_call **out)
{
    crpc_loop *l = ch->loop;
    int64_t start = crpci_loop_start_time(l);
    /* In front of the request: the call, and the response that is decoded for a callback. */
    size_t front = CRPCI_PENDING_SIZE +
                   (kind == CRPCI_CALL_DELIVER ? (k->response.size + 15) & ~(size_t)15 : 0);
    /* Borrows the attachment of a synchronous call, unless two frames may be queued at a time,
     * which cannot share it. */
    bool borrow = kind == CRPCI_CALL_SYNC && k->plain && !in->policy.cluster &&
                  !in->policy.backup_ms;
    crpci_request *r = NULL; /* an optimizer does not see that it is set unless `err` is */
    crpci_pending_call *c;
    int err = crpci_request_encode(&ch->requests, k, request, in, borrow, front, &r, error);
    if (err)
        return err;
    crpci_channel_enter(l, start, r);
    err = crpci_channel_admit(ch, kind);
    c = err ? NULL : crpci_channel_place(l, kind, r);
    if (CRPCI_UNLIKELY(!c)) {
        err = err ? err : CRPC_ENOMEM;
        l->fresh = false;
        crpci_loop_unlock(l);
        crpci_heap_chunk_unref(r->chunk);
        return crpci_request_refuse(error, k->method, err, "", crpc_status_text(err));
    }
    crpci_channel_init_call(c, ch, k, kind, in, start);
    crpci_loop_task_init(&c->task, crpci_channel_deliver);
    crpci_timer_init(&c->timer, crpci_attempt_on_timer);
    *out = c;
    return CRPC_OK;
}

/* Makes the first attempt and sends it. Locked; unlocks meanwhile. An asynchronous call may end and
 * be freed in here. A synchronous call's wait ends at the deadline by itself, so its timer only
 * serves the backup request. */
CRPCI_FN void crpci_channel_launch(crpc_loop *l, crpci_pending_call *c)
{
    int64_t at = c->backup_us;
    if (c->kind != CRPCI_CALL_SYNC)
        at = crpci_base_min64(at, c->attempt.deadline_us);
    if (at < INT64_MAX)
        crpci_loop_timer_at(l, &c->timer, at);
    crpci_attempt_begin(c);
    crpci_channel_flush(l);
}

/* Gives the result of a call that was taken, and frees the call. Views, attachment and fields are
 * valid until crpc_call_reset. Without the lock. */
CRPCI_FN int crpci_channel_result(crpci_pending_call *c, void *response, crpc_call *call)
{
    crpc_channel *ch = c->channel;
    int err = crpci_attempt_result(c, response, call);
    call->reserved[CRPCI_CALL_HELD] = c->attempt.reply.chunk;
    c->attempt.reply.chunk = NULL;
    crpci_channel_after(ch, c->method->method, call, err, ch->interceptor_count);
    crpci_attempt_free(c);
    return err;
}

/* --- synchronous ------------------------------------------------------------------------------ */

/* Runs one call to its end: makes attempts and drives the loop, or follows its driver, until the
 * call has ended or its deadline has passed. Unlocks. crpci_request_settle waits until no thread
 * sends from the attachment that was borrowed. */
CRPCI_FN void crpci_channel_run(crpc_loop *l, crpci_pending_call *c)
{
    crpci_waiter w;
    memset(&w, 0, sizeof w);
    c->waiter = &w;
    crpci_channel_launch(l, c);
    crpci_drive_wait(l, &w, c->attempt.deadline_us, false);
    c->waiter = NULL;
    if (c->attempt.state != CRPCI_ATTEMPT_DONE) {
        crpci_attempt_expire(c);
        crpci_channel_flush(l); /* the next call for its slot */
    }
    crpci_channel_copy_error(c, c->error);
    crpci_attempt_take(c);
    crpci_request_settle(l, &c->attempt.request);
    l->fresh = false; /* the next caller may come much later */
    crpci_loop_unlock(l);
}

CRPC_API int crpc_channel_call(crpc_channel *ch, const crpc_method *m, const void *request,
                               void *response, crpc_call *call)
{
    const crpci_method *k;
    crpci_pending_call *c;
    crpc_call local;
    size_t ran = 0;
    int err;
    CRPCI_HANDLE_CHECK(ch);
    crpci_thread_ref(&ch->refs); /* another thread may close the channel meanwhile */
    k = crpci_request_find_method(&ch->requests, m);
    if (call)
        crpc_call_reset(call);
    else
        crpci_request_clear_call(&local);
    if (CRPCI_UNLIKELY(!k || (!call && k->response.views))) {
        crpci_attempt_drop_channel(ch);
        return crpci_request_refuse(call ? &call->error : NULL, m, k ? CRPC_EINVAL : CRPC_ENOMEM,
                                    "", "out of memory");
    }
    call = call ? call : &local;
    err = ch->interceptor_count ? crpci_channel_before(ch, m, call, &ran) : CRPC_OK;
    err = err ? err
              : crpci_channel_put(ch, k, CRPCI_CALL_SYNC, request, call, &call->error, &c);
    if (CRPCI_LIKELY(!err)) {
        c->error = &call->error;
        crpci_channel_run(ch->loop, c);
        err = crpci_channel_result(c, response, call);
    } else {
        crpci_channel_after(ch, m, call, err, ran);
        crpci_attempt_drop_channel(ch);
    }
    if (call == &local)
        crpc_call_reset(call);
    return err;
}

/* --- asynchronous ----------------------------------------------------------------------------- */

/* Encodes and enters a call of any asynchronous form. Interceptors get a copy of the caller's
 * inputs, which they may change; it is not needed once the request is encoded. On success the loop
 * is locked: the caller sets what is special to its form in *out, then calls
 * crpci_channel_start. */
CRPCI_FN int crpci_channel_async(crpc_channel *ch, const crpc_method *m, const void *request,
                                 crpci_call_kind kind, const crpc_call *in,
                                 crpci_pending_call **out)
{
    const crpci_method *k = crpci_request_find_method(&ch->requests, m);
    bool intercepted = ch->interceptor_count != 0;
    crpc_call copy;
    size_t ran = 0;
    int err = CRPC_OK;
    *out = NULL;
    if (CRPCI_UNLIKELY(!k))
        return CRPC_ENOMEM;
    if (!in || intercepted) {
        crpci_request_clear_call(&copy);
        if (in)
            memcpy(&copy, in, offsetof(crpc_call, error));
        in = &copy;
    }
    crpci_thread_ref(&ch->refs); /* the call's; an interceptor may close the channel */
    if (intercepted)
        err = crpci_channel_before(ch, m, &copy, &ran);
    err = err ? err : crpci_channel_put(ch, k, kind, request, in, NULL, out);
    if (err) {
        crpci_channel_after(ch, m, &copy, err, ran);
        crpci_attempt_drop_channel(ch);
    }
    if (intercepted)
        crpc_call_reset(&copy);
    return err;
}

/* Launches an asynchronous call, and unlocks. */
CRPCI_FN void crpci_channel_start(crpc_loop *l, crpci_pending_call *c)
{
    bool send = crpci_loop_may_send(l);
    if (send)
        crpci_loop_hold(l); /* sending unlocks: a callback may close the channel meanwhile */
    crpci_channel_launch(l, c);
    l->fresh = false;
    crpci_loop_unlock(l);
    if (send)
        crpci_loop_release(l);
}

CRPC_API int crpc_channel_call_async(crpc_channel *ch, const crpc_method *m, const void *request,
                                     crpc_done_fn deliver, crpc_any_fn fn, void *user,
                                     const crpc_call *call)
{
    crpci_pending_call *c;
    int err = deliver ? crpci_channel_async(ch, m, request, CRPCI_CALL_DELIVER, call, &c)
                      : CRPC_EINVAL;
    if (err)
        return err;
    c->deliver = deliver;
    c->fn = fn;
    c->user = user;
    crpci_channel_start(ch->loop, c);
    return CRPC_OK;
}

CRPC_API int crpc_channel_notify(crpc_channel *ch, const crpc_method *m, const void *request,
                                 const crpc_call *call)
{
    crpci_pending_call *c;
    int err = crpci_channel_async(ch, m, request, CRPCI_CALL_NOTIFY, call, &c);
    if (!err)
        crpci_channel_start(ch->loop, c);
    return err;
}

/* --- results by id ---------------------------------------------------------------------------- */

CRPC_API int crpc_channel_begin(crpc_channel *ch, const crpc_method *m, const void *request,
                                crpc_id *id, const crpc_call *call)
{
    crpci_pending_call *c;
    int err = crpci_channel_async(ch, m, request, CRPCI_CALL_ID, call, &c);
    id->value = err ? 0 : c->attempt.id; /* while locked: the call may end before this returns */
    if (!err) {
        ch->loop->results++;
        crpci_channel_start(ch->loop, c);
    }
    return err;
}

/* Finds the pending call of an id. NULL: it is not one of this channel's calls with an id, or was
 * fetched or cancelled. Locked. */
CRPCI_FN crpci_pending_call *crpci_channel_find(crpc_channel *ch, crpc_id id)
{
    crpci_pending_call *c = (crpci_pending_call *)crpci_id_get(&ch->loop->calls, id.value);
    crpci_loop_assert_locked(ch->loop);
    return c && c->channel == ch && c->kind == CRPCI_CALL_ID ? c : NULL;
}

/* The result of crpc_channel_poll for a call; NULL is CRPC_ENOTFOUND. */
CRPCI_FN int crpci_channel_status(const crpci_pending_call *c)
{
    return !c                                        ? CRPC_ENOTFOUND
           : c->attempt.state == CRPCI_ATTEMPT_DONE ? CRPC_OK
                                                     : CRPC_EPENDING;
}

CRPC_API int crpc_channel_poll(crpc_channel *ch, crpc_id id)
{
    int err;
    crpci_loop_lock(ch->loop);
    err = crpci_channel_status(crpci_channel_find(ch, id));
    crpci_loop_unlock(ch->loop);
    return err;
}

CRPC_API int crpc_channel_wait(crpc_channel *ch, crpc_id id, int timeout_ms)
{
    crpc_loop *l = ch->loop;
    crpci_waiter w;
    crpci_pending_call *c;
    int err;
    memset(&w, 0, sizeof w);
    crpci_thread_ref(&ch->refs); /* another thread may close the channel meanwhile */
    crpci_loop_lock(l);
    c = crpci_channel_find(ch, id);
    err = crpci_channel_status(c);
    if (err == CRPC_EPENDING) {
        int64_t until = timeout_ms < 0 ? INT64_MAX
                                       : crpci_loop_now(l) + (int64_t)timeout_ms * 1000;
        if (crpci_loop_in_callback(l) || c->waiter) {
            err = c->waiter ? CRPC_EBUSY : CRPC_EDEADLK;
        } else {
            c->waiter = &w;
            crpci_drive_wait(l, &w, until, true);
            c = crpci_channel_find(ch, id); /* another thread may have fetched or cancelled it */
            if (c)
                c->waiter = NULL;
            err = ch->closed ? CRPC_ECANCELED : crpci_channel_status(c);
        }
    }
    crpci_drive_unlock(l);
    crpci_attempt_drop_channel(ch);
    return err;
}

CRPC_API int crpc_channel_fetch(crpc_channel *ch, const crpc_method *m, crpc_id id, void *response,
                                crpc_call *call)
{
    crpc_loop *l = ch->loop;
    crpc_call local;
    crpci_pending_call *c;
    int err;
    crpci_loop_lock(l);
    c = crpci_channel_find(ch, id);
    err = crpci_channel_status(c);
    if (!err && (c->method->method != m || (!call && c->method->response.views)))
        err = CRPC_EINVAL;
    if (err) {
        crpci_loop_unlock(l);
        return crpci_request_refuse(call ? &call->error : NULL, m, err, "crpc_channel_fetch: ",
                                    crpc_status_text(err));
    }
    if (call) {
        crpc_call_reset(call);
        memset(&call->error, 0, sizeof call->error);
    } else {
        memset(&local, 0, sizeof local);
        call = &local;
    }
    crpci_channel_copy_error(c, &call->error);
    crpci_attempt_take(c);
    crpci_loop_unlock(l);
    err = crpci_channel_result(c, response, call);
    if (call == &local)
        crpc_call_reset(call);
    return err;
}

CRPC_API int crpc_channel_cancel(crpc_channel *ch, crpc_id id)
{
    crpc_loop *l = ch->loop;
    crpci_pending_call *c;
    crpci_loop_lock(l);
    c = crpci_channel_find(ch, id);
    if (c) {
        if (c->attempt.state != CRPCI_ATTEMPT_DONE) {
            crpci_attempt_abandon(c, CRPC_ECANCELED);
            crpci_attempt_finish(c, CRPC_ECANCELED);
        }
        if (c->waiter)
            crpci_drive_end_wait(l, c->waiter);
        crpci_attempt_discard(c);
        crpci_channel_flush(l); /* the next call for its slot */
    }
    crpci_loop_unlock(l);
    return c ? CRPC_OK : CRPC_ENOTFOUND;
}

/* --- closing ---------------------------------------------------------------------------------- */

/* Ends every call of the channel with CRPC_ECANCELED. Calls with a callback free themselves when it
 * has run, synchronous ones belong to their callers, and those with an id are freed here.
 * Locked. */
CRPCI_FN void crpci_channel_cancel_all(crpc_channel *ch)
{
    crpci_list calls;
    crpci_loop_assert_locked(ch->loop);
    crpci_list_move(&calls, &ch->calls);
    while (!crpci_list_empty(&calls)) {
        crpci_pending_call *c = CRPCI_CONTAINER(calls.next, crpci_pending_call, of_channel);
        bool by_id = c->kind == CRPCI_CALL_ID;
        crpci_list_remove(&c->of_channel);
        if (c->attempt.state != CRPCI_ATTEMPT_DONE) {
            crpci_attempt_abandon(c, CRPC_ECANCELED);
            crpci_attempt_give_up(c, CRPC_ECANCELED, "the channel was closed", "");
        }
        if (by_id)
            crpci_attempt_discard(c);
    }
}

/* First no new call can begin; then the directory is closed, without the lock, since its callback
 * locks the loop; then calls, endpoints and the program's reference go. Threads that are still
 * inside a synchronous call or crpc_channel_wait keep the struct until they leave. */
CRPC_API void crpc_channel_close(crpc_channel *ch)
{
    crpc_loop *l;
    bool private_loop;
    if (!ch)
        return;
    CRPCI_HANDLE_CLOSE(ch);
    l = ch->loop;
    private_loop = ch->private_loop;
    crpci_loop_lock(l);
    ch->closed = true;
    crpci_loop_unlock(l);
#if CRPCI_DIRECTORY
    if (ch->directory.registry)
        crpci_directory_unsubscribe(ch->directory.registry, ch->directory.subscription);
    crpci_directory_close(ch->directory.registry);
    ch->directory.registry = NULL;
#endif
    crpci_loop_lock(l);
    crpci_channel_cancel_all(ch);
    crpci_providers_clear(&ch->providers);
    crpci_attempt_drop_channel(ch);
    crpci_channel_flush(l); /* calls of other channels for the slots */
    crpci_loop_unlock(l);
    if (private_loop)
        crpc_loop_close(l);
}

CRPC_API crpc_loop *crpc_channel_loop(crpc_channel *ch)
{
    return ch->loop;
}

CRPC_API size_t crpc_channel_providers(crpc_channel *ch)
{
    size_t n;
    crpci_loop_lock(ch->loop);
    n = ch->providers.count;
    crpci_loop_unlock(ch->loop);
    return n;
}

#endif /* CRPC_ENABLE_CLIENT */

/* ======================================================================== */
/* >>impl-opening   URLs and options of a channel, its directory            */
/* ======================================================================== */

/* Opens channels: checks options, reads the URL, and gets the first list of providers, from the URL
 * itself or from a registry. Runs on the program's thread without the loop's lock; only
 * crpci_opening_on_list comes from other threads. It may block to resolve names and to wait for the
 * registry's first answer. A channel that cannot be opened is closed like any other. */

#if CRPC_ENABLE_CLIENT

/* The options of a channel: what 0 and -1 stand for, and the largest value. The same rows
 * serve URL options, defaults, checks and crpc_channel_options_parse. */
#define CRPCI_OPENING_ROW(member, name, flags, zero, none, most)                                   \
    CRPCI_OPTION_ROW(crpc_channel_options, member, name, flags, zero, none, most)
#define CRPCI_OPENING_MS(member, name, flags, zero, none)                                          \
    CRPCI_OPENING_ROW(member, name, flags, zero, none, CRPCI_REQUEST_LONGEST_MS)
#define CRPCI_OPENING_TEXT(member, name, flags)                                                    \
    CRPCI_OPENING_ROW(member, name, CRPCI_OPTION_TEXT | (flags), 0, 0, 0)
#define CRPCI_OPENING_FLAG(member, name, flags) CRPCI_OPENING_ROW(member, name, flags, 0, 0, 1)

static const crpci_option crpci_opening_rows[] = {
    CRPCI_OPENING_ROW(policy.cluster, "cluster\0" CRPCI_REQUEST_CLUSTERS, CRPCI_OPTION_WORDS,
                      CRPC_CLUSTER_FAILOVER, CRPC_CLUSTER_FAILOVER, CRPC_CLUSTER_BROADCAST),
    CRPCI_OPENING_MS(policy.timeout_ms, "timeout_ms", 0, 1000, CRPCI_REQUEST_LONGEST_MS),
    CRPCI_OPENING_ROW(policy.retries, "retries", 0, 2, 0, CRPCI_REQUEST_RETRIES),
    CRPCI_OPENING_MS(policy.backup_ms, "backup_ms", CRPCI_OPTION_POLICY, 0, 0),
    CRPCI_OPENING_ROW(policy.forks, "forks", CRPCI_OPTION_POLICY, 2, 0, CRPCI_OPTION_ANY),
    CRPCI_OPENING_ROW(policy.fail_percent, "fail_percent", CRPCI_OPTION_POLICY, 0, 0, 100),
    CRPCI_OPENING_ROW(balancer, "lb\0" CRPCI_BALANCE_WORDS, CRPCI_OPTION_WORDS,
                      CRPC_BALANCER_WEIGHTED_ROUND_ROBIN, CRPC_BALANCER_WEIGHTED_ROUND_ROBIN,
                      CRPCI_BALANCE_KINDS),
    CRPCI_OPENING_ROW(hash_field, "hash_field", CRPCI_OPTION_POLICY, 0, 0, 0x1fffffff),
    CRPCI_OPENING_ROW(max_endpoints, "max_endpoints", CRPCI_OPTION_POLICY, 0, 0, CRPCI_OPTION_ANY),
    CRPCI_OPENING_FLAG(wait, "wait", 0),
    CRPCI_OPENING_MS(connect_timeout_ms, "connect_timeout_ms", 0, 500, 0),
    CRPCI_OPENING_ROW(retry_budget, "retry_budget", CRPCI_OPTION_POLICY, 10, -1, CRPCI_OPTION_ANY),
    CRPCI_OPENING_FLAG(request_ids, "request_ids", 0),
    CRPCI_OPENING_FLAG(breaker.enabled, "breaker", CRPCI_OPTION_POLICY),
    CRPCI_OPENING_ROW(breaker.percent, "breaker_percent", CRPCI_OPTION_POLICY, 50, 50, 100),
    CRPCI_OPENING_ROW(breaker.requests, "breaker_requests", CRPCI_OPTION_POLICY, 20, 1,
                      CRPCI_OPTION_ANY),
    CRPCI_OPENING_MS(breaker.window_ms, "breaker_window_ms", CRPCI_OPTION_POLICY, 10000, 10000),
    CRPCI_OPENING_MS(breaker.slow_ms, "breaker_slow_ms", CRPCI_OPTION_POLICY, 0, 0),
    CRPCI_OPENING_ROW(breaker.slow_percent, "breaker_slow_percent", CRPCI_OPTION_POLICY, 50, 50,
                      100),
    CRPCI_OPENING_MS(breaker.open_ms, "breaker_open_ms", CRPCI_OPTION_POLICY, 1000, 1000),
    CRPCI_OPENING_MS(breaker.open_max_ms, "breaker_open_max_ms", CRPCI_OPTION_POLICY, 30000, 30000),
    CRPCI_OPENING_MS(breaker.ramp_ms, "breaker_ramp_ms", CRPCI_OPTION_POLICY, 5000, 0),
    CRPCI_OPENING_ROW(breaker.eject_percent, "breaker_eject_percent", CRPCI_OPTION_POLICY, 50, 100,
                      100),
    CRPCI_OPENING_TEXT(directory.group, "group", CRPCI_OPTION_BACKEND),
    CRPCI_OPENING_TEXT(directory.version, "version", CRPCI_OPTION_BACKEND),
    CRPCI_OPENING_TEXT(directory.application, "application", CRPCI_OPTION_DIRECTORY),
    CRPCI_OPENING_TEXT(directory.credential, "registry_credential", CRPCI_OPTION_SECRET),
    CRPCI_OPENING_MS(directory.timeout_ms, "registry_timeout_ms", 0, 3000, 0),
    CRPCI_OPENING_MS(directory.session_timeout_ms, "session_timeout_ms", 0, 15000, 15000),
    CRPCI_OPENING_FLAG(directory.must_connect, "must_connect", 0),
    CRPCI_OPENING_FLAG(directory.allow_empty, "allow_empty", 0),
    CRPCI_OPENING_MS(directory.stale_ttl_ms, "stale_ttl_ms", 0, 600000, 0),
    CRPCI_OPENING_TEXT(directory.cache, "cache", CRPCI_OPTION_BACKEND),
    CRPCI_OPENING_ROW(limits.max_body, "max_body", 0, 64 << 20, INT32_MAX, INT32_MAX),
    CRPCI_OPENING_ROW(limits.max_queued, "max_queued", 0, 16 << 20, 0, CRPCI_OPTION_ANY),
    CRPCI_OPENING_ROW(wire.inflight, "inflight", 0, 0, 0, CRPCI_OPTION_ANY),
    CRPCI_OPENING_FLAG(wire.short_names, "short_names", 0),
    CRPCI_OPENING_TEXT(security.credential, "credential", CRPCI_OPTION_SECRET),
    CRPCI_OPENING_MS(failback_ms, "failback_ms", CRPCI_OPTION_POLICY, 5000, 5000),
    CRPCI_OPENING_ROW(failback_max, "failback_max", CRPCI_OPTION_POLICY, 100, 0, CRPCI_OPTION_ANY),
};

static const crpci_options crpci_opening_options = {CRPCI_OPTIONS_OF(crpci_opening_rows)};

CRPC_API int crpc_channel_options_parse(char *text, crpc_channel_options *options,
                                        crpc_error *error)
{
    crpci_options_target to[] = {{&crpci_opening_options, options, 0},
                                 {&crpci_drive_options, &options->private_loop, 0}};
    return crpci_options_lines(to, 2, text, error);
}

/* Whether the providers are looked up rather than named in the URL. */
CRPCI_COLD bool crpci_opening_has_registry(const char *scheme)
{
    return strcmp(scheme, "tcp") != 0 && strcmp(scheme, "unix") != 0 && strcmp(scheme, "list") != 0;
}

/* The parts of a URL that are no options of the channel. Texts point into the parsed URL. */
typedef struct crpci_opening_request {
    const crpci_protocol *protocol;
#if CRPCI_DIRECTORY
    crpci_open_request directory;
#endif
} crpci_opening_request;

/* Takes one key=value of a URL: the backend's, or an option of the channel, which overrides `o`.
 * Text options point into the URL. Secrets are refused, because URLs get into logs and
 * registries. */
CRPCI_COLD int crpci_opening_read_key(const char *scheme, const char *key, const char *value,
                                      crpc_channel_options *o, crpci_opening_request *request,
                                      crpc_error *error)
{
    const crpci_option *row = crpci_options_find(&crpci_opening_options, key);
    bool registry = crpci_opening_has_registry(scheme);
#if CRPCI_DIRECTORY
    if (registry && crpci_open_option(&request->directory, false, key, value))
        return CRPC_OK;
#endif
    if (strcmp(key, "protocol") == 0 && crpci_protocols_find(value)) {
        request->protocol = crpci_protocols_find(value);
        return CRPC_OK;
    }
    if (row && (row->flags & CRPCI_OPTION_SECRET))
        return crpci_status_set(error, CRPC_EINVAL,
                                "%s: a secret must not stand in a URL: set it "
                                "in the options or a configuration line",
                                key);
    if (!row || (row->flags & CRPCI_OPTION_BACKEND) ||
        (!registry && (row->flags & CRPCI_OPTION_DIRECTORY)))
        return crpci_status_set(error, CRPC_EINVAL, "URL option %.60s=%.60s: not known for %s://",
                                key, value, scheme);
    return crpci_options_read(row, o, value, error);
}

/* Finds the backend of the URL's scheme, unless the providers stand in the URL, and reads the URL's
 * options. The backend comes first because it has keys of its own. */
CRPCI_COLD int crpci_opening_read_url(crpci_url *u, crpc_channel_options *o,
                                      crpci_opening_request *request, crpc_error *error)
{
    bool registry = crpci_opening_has_registry(u->scheme);
    char *key, *value;
    int err = CRPC_OK;
    request->protocol = crpci_protocols[0];
#if CRPCI_DIRECTORY
    if (registry)
        err = crpci_open_find(&request->directory, u, error);
#else
    if (registry)
        err = crpci_status_set(error, CRPC_EUNSUPPORTED,
                               "%.40s:// is not known: tcp, unix and list are, and no registry is "
                               "compiled in",
                               u->scheme);
#endif
    while (!err) {
        err = crpci_url_next(u, &key, &value, error);
        if (!err)
            err = crpci_opening_read_key(u->scheme, key, value, o, request, error);
    }
    return err == CRPC_EPENDING ? CRPC_OK : err;
}

/* CRPC_EUNSUPPORTED: a build without CRPC_ENABLE_POLICY is asked for a cluster policy, or to answer
 * calls itself. Options that need it are refused by their rows (CRPCI_OPTION_POLICY). */
CRPCI_COLD int crpci_opening_check_policy(const crpc_policy *p, const crpc_method_options *m,
                                          crpc_error *error)
{
    const char *what = (int)p->cluster > CRPC_CLUSTER_FAILFAST           ? "cluster"
                       : m && m->degraded > 0                            ? "degraded"
                       : m && (m->fallback || crpc_view_data(m->canned)) ? "fallback, canned"
                                                                         : NULL;
    if (CRPC_ENABLE_POLICY || !what)
        return CRPC_OK;
    return crpci_status_set(error, CRPC_EUNSUPPORTED,
                            "%s%s%s: not compiled in: CRPC_ENABLE_POLICY is 0",
                            m ? m->method->name : "", m ? ": " : "", what);
}

/* Checks all options, into which the URL has been read before; those of each method by the rows of
 * the channel's own. */
CRPCI_COLD int crpci_opening_check(const crpc_channel_options *o, crpc_error *error)
{
    int err = crpci_options_check(&crpci_opening_options, o, error);
    crpc_channel_options own;
    size_t i;
    err = err ? err : crpci_opening_check_policy(&o->policy, NULL, error);
    memset(&own, 0, sizeof own);
    for (i = 0; i < o->method_count && !err; i++) {
        const crpc_method_options *m = &o->methods[i];
        if (!m->method)
            return crpci_status_set(error, CRPC_EINVAL, "methods[%zu].method is NULL", i);
        own.policy = m->policy;
        own.hash_field = m->hash_field;
        err = crpci_options_check(&crpci_opening_options, &own, error);
        err = err ? err : crpci_opening_check_policy(&m->policy, m, error);
    }
    return err;
}

#if CRPC_ENABLE_POLICY

/* Sets up the breaker; without breaker.enabled its error_percent stays 0, which means off. */
CRPCI_COLD void crpci_opening_breaker(crpci_providers *p, const crpc_breaker_options *o)
{
    crpci_breaker_options *b = &p->breaker;
    if (!o->enabled)
        return;
    b->error_percent = o->percent;
    b->min_requests = o->requests;
    b->window_us = (int64_t)o->window_ms * 1000;
    b->slow_us = (int64_t)o->slow_ms * 1000;
    b->slow_percent = o->slow_percent;
    b->open_us = (int64_t)o->open_ms * 1000;
    b->open_max_us = (int64_t)o->open_max_ms * 1000;
    b->ramp_us = (int64_t)o->ramp_ms * 1000;
    p->ejected_percent = (size_t)o->eject_percent;
}

#endif /* CRPC_ENABLE_POLICY */

/* Sets up the still empty list of providers. A stale_ttl of INT64_MAX / 4 never passes, and can be
 * subtracted from a time without overflow. */
CRPCI_COLD void crpci_opening_providers(crpci_providers *p, const crpc_channel_options *o)
{
    p->events = &crpci_attempt_events;
    p->endpoint.connect_timeout_ms = o->connect_timeout_ms;
    p->endpoint.inflight = (uint32_t)o->wire.inflight;
    p->endpoint.max_body = (uint32_t)o->limits.max_body;
    p->endpoint.max_queued = o->limits.max_queued;
    p->stale_at = INT64_MAX;
    p->stale_ttl_us =
        o->directory.stale_ttl_ms ? (int64_t)o->directory.stale_ttl_ms * 1000 : INT64_MAX / 4;
#if CRPC_ENABLE_POLICY
    p->max = (size_t)o->max_endpoints;
    crpci_loop_lock(p->loop);
    p->seed = (uint64_t)crpci_loop_random(p->loop) << 32 | crpci_loop_random(p->loop);
    crpci_loop_unlock(p->loop);
    p->reweigh_at = INT64_MAX;
    crpci_opening_breaker(p, &o->breaker);
#endif
}

/* Takes over checked options; those of `o` get their final values. Whether a timeout was given is
 * noted before, because a default counts less than the .proto's timeout. The seed makes the
 * channel's request ids, and its part of a long list (max_endpoints), differ from those of
 * others. */
CRPCI_COLD void crpci_opening_configure(crpc_channel *ch, crpc_channel_options *o)
{
    crpci_request_source *s = &ch->requests;
    s->timeout_open = !o->policy.timeout_ms;
    crpci_options_fill(&crpci_opening_options, o);
    s->policy = o->policy;
    s->short_names = o->wire.short_names != 0;
    s->intercepted = o->interceptor_count != 0;
    s->ids = o->request_ids != 0;
    if (s->ids)
        crpci_loop_secret(ch->loop, s->secret);
    s->hash_field = o->hash_field;
    s->options = o->methods; /* the program's array, not a copy */
    s->option_count = o->method_count;
    crpci_opening_providers(&ch->providers, o);
    ch->wait = o->wait > 0;
    ch->interceptors = o->interceptors;
    ch->interceptor_count = o->interceptor_count;
#if CRPC_ENABLE_POLICY
    ch->cluster = &crpci_cluster_all;
    ch->providers.in_group = crpci_cluster_tried;
    ch->budget.limited = o->retry_budget >= 0;
    crpci_limiter_budget_init(&ch->budget.tokens,
                              o->retry_budget > 0 ? (uint32_t)o->retry_budget : 0, 1);
    ch->failback.pause_us = (int64_t)o->failback_ms * 1000;
    ch->failback.max = (size_t)o->failback_max;
    ch->failback.dropped = o->failback_dropped;
    ch->failback.user = o->failback_user;
#endif
}

#define CRPCI_OPENING_ADDRESSES 16 /* of one host name */

/* Appends the providers that one "host:port" of a URL stands for: at most CRPCI_OPENING_ADDRESSES
 * addresses of a name, for which the list has room. The name is not resolved again later. */
CRPCI_COLD int crpci_opening_item(crpci_snapshot *list, const char *text, crpc_error *error)
{
    char names[1024], *rest = names;
    size_t from = list->count, most = from + CRPCI_OPENING_ADDRESSES;
    unsigned port;
    crpci_addr a;
    int err;
    if (crpci_sock_parse(&a, text)) {
        crpci_sock_format(&a, list->providers[list->count++].address, CRPC_ADDRESS_MAX);
        return CRPC_OK;
    }
    err = crpci_resolver_split(list->heap, text, names, sizeof names, &port, error);
    while (!err && list->count < most &&
           crpci_resolver_next(&rest, port, list->providers[list->count].address, CRPC_ADDRESS_MAX))
        list->count++;
    if (!err && list->count == from)
        err = crpci_status_set(error, CRPC_ERESOLVE,
                               "\"%.80s\": the resolve hook gave no numeric address: \"%.80s\"",
                               text, names);
    return err;
}

/* Fills the list with the providers that stand in a tcp://, unix:// or list:// URL. */
CRPCI_COLD int crpci_opening_items(crpci_snapshot *list, crpci_url *u, crpc_error *error)
{
    char *item, *next;
    const char *p;
    size_t i;
    int err = CRPC_OK;
    list->count = 0;
    if (strcmp(u->scheme, "unix") == 0) {
        if ((size_t)snprintf(list->providers[list->count++].address, CRPC_ADDRESS_MAX, "unix:%s",
                             u->path) >= CRPC_ADDRESS_MAX)
            return crpci_status_set(error, CRPC_EINVAL, "unix:// path is over %d bytes",
                                    CRPC_ADDRESS_MAX - 6);
    } else {
        for (item = u->authority; item && !err; item = next) {
            next = strcmp(u->scheme, "list") == 0 ? strchr(item, ',') : NULL;
            if (next)
                *next++ = '\0';
            err = crpci_opening_item(list, item, error);
            p = strrchr(list->providers[list->count ? list->count - 1 : 0].address, ':');
            if (!err && strcmp(p, ":0") == 0)
                err = crpci_status_set(error, CRPC_EINVAL,
                                       "%s://%.80s: a client cannot connect to port 0; give the "
                                       "port that the server listens on",
                                       u->scheme, item);
        }
    }
    for (i = 0; i < list->count; i++)
        list->providers[i].weight = CRPCI_NAMES_WEIGHT;
    crpci_directory_sort(list);
    return err;
}

/* Gives a channel with a tcp://, unix:// or list:// URL its only list of providers. */
CRPCI_COLD int crpci_opening_static(crpc_channel *ch, crpci_url *u, crpc_error *error)
{
    size_t count = 1;
    const char *p;
    crpci_snapshot *list;
    int err;
    if (*u->authority && *u->path)
        return crpci_status_set(error, CRPC_EINVAL,
                                "%s://%.60s: tcp:// and list:// URLs take no path: \"/%.60s\"",
                                u->scheme, u->authority, u->path);
    for (p = u->authority; *p; p++)
        count += *p == ',';
    list = crpci_directory_snapshot(ch->loop->heap, count * CRPCI_OPENING_ADDRESSES);
    if (!list)
        return crpci_status_set(error, CRPC_ENOMEM, "channel: out of memory");
    err = crpci_opening_items(list, u, error);
    if (!err) {
        crpci_loop_lock(ch->loop);
        err = crpci_providers_update(&ch->providers, list);
        crpci_loop_unlock(ch->loop);
        if (err)
            crpci_status_set(
                error, err,
                err == CRPC_ENOMEM
                    ? "channel: out of memory"
                    : "channel: an address of its URL is neither IP:port nor unix:path");
    }
    ch->directory.listed = true;
    crpci_directory_snapshot_unref(list);
    return err;
}

#if CRPCI_DIRECTORY

/* Takes a new list of the directory, and lets calls that wait for one begin. Called without a lock
 * on any thread, also while the channel is being opened or closed. An error makes the directory
 * offer the list again, and the old one stays in use. */
CRPCI_FN int crpci_opening_on_list(void *user, crpci_snapshot *list)
{
    crpc_channel *ch = (crpc_channel *)user;
    crpc_loop *l = ch->loop;
    int err = CRPC_OK;
    crpci_loop_lock(l);
    crpci_loop_hold(l); /* sending unlocks: a callback may close the channel meanwhile */
    if (!ch->closed)
        err = crpci_providers_update(&ch->providers, list);
    if (!ch->closed && !err && !list->stale) { /* stale: from a cache, not the registry's answer */
        ch->directory.listed = true;
        if (ch->directory.waiter)
            crpci_drive_end_wait(l, ch->directory.waiter);
    }
    if (!ch->closed && !err && ch->providers.count && !crpci_list_empty(&ch->waiting)) {
        crpci_attempt_serve_waiting(ch);
        crpci_channel_flush(l);
    }
    crpci_loop_unlock(l);
    crpci_loop_release(l);
    if (err)
        crpci_heap_log(list->heap, CRPC_LOG_WARN,
                       "channel: new list of %zu providers refused, the old one stays: %s",
                       list->count, crpc_status_text(err));
    return err;
}

/* Waits at most registry_timeout_ms for the registry's first answer. Without one the channel opens
 * all the same, and its calls fail or wait (wait=1) until a list comes, unless must_connect is set:
 * CRPC_EREGISTRY. CRPC_EDEADLK: inside a callback of the loop, where it must not wait. */
CRPCI_COLD int crpci_opening_await_list(crpc_channel *ch, const crpc_channel_options *o,
                                        const char *service, crpc_error *error)
{
    crpc_loop *l = ch->loop;
    int64_t ms = o->directory.timeout_ms;
    crpci_waiter w;
    bool listed, stuck;
    memset(&w, 0, sizeof w);
    crpci_loop_lock(l);
    stuck = ms && crpci_loop_in_callback(l); /* libzookeeper_st works on this very thread */
    if (!ch->directory.listed && ms && !stuck) {
        ch->directory.waiter = &w;
        crpci_drive_wait(l, &w, crpci_loop_now(l) + ms * 1000, false);
        ch->directory.waiter = NULL;
    }
    listed = ch->directory.listed;
    crpci_loop_unlock(l);
    if (stuck && !listed)
        return crpci_status_set(error, CRPC_EDEADLK,
                                "%.80s: opened inside a callback of its loop, which must not wait: "
                                "set registry_timeout_ms to -1",
                                service);
    if (listed || !o->directory.must_connect)
        return CRPC_OK;
    return crpci_status_set(error, CRPC_EREGISTRY,
                            "%.80s: no answer from the registry in %d ms (registry_timeout_ms)",
                            service, (int)ms);
}

/* Subscribes a channel to the directory that its URL names, like
 * zookeeper://servers/root/package.Service. What the URL says counts more than the options. The
 * subscription ends with the channel, which may fail to open after this. */
CRPCI_COLD int crpci_opening_directory(crpc_channel *ch, crpci_url *u,
                                       const crpc_channel_options *o, crpci_open_request *request,
                                       crpc_error *error)
{
    const crpc_directory_options *d = &o->directory;
    crpci_directory_options *ro = &request->options;
    crpci_names_service *want = &request->want;
    const char *service;
    int err;
    want->group = want->group ? want->group : d->group;
    want->version = want->version ? want->version : d->version;
    ch->directory.where =
        crpci_heap_format(ch->loop->heap, "/%.120s (group \"%.63s\", version \"%.63s\")", u->path,
                          want->group ? want->group : "", want->version ? want->version : "");
    err = crpci_open_service(request, u, error);
    if (err)
        return err;
    service = want->service ? want->service : "";
    ro->session_timeout_ms = d->session_timeout_ms;
    ro->credential = d->credential;
    ro->application = d->application;
    ro->register_consumer = true;
    ro->cache = ro->cache ? ro->cache : d->cache;
    err = request->backend->open(ch->loop, u, ro, &ch->directory.registry, error);
    if (err)
        return err;
    want->application = d->application;
    want->allow_empty = d->allow_empty > 0;
    err = crpci_directory_subscribe(ch->directory.registry, want, crpci_opening_on_list, ch,
                                    &ch->directory.subscription);
    if (err)
        return crpci_status_set(error, err, "%.80s: cannot subscribe to its providers: %s", service,
                                crpc_status_text(err));
#if CRPC_ZOOKEEPER_ST && CRPC_ENABLE_THREADS
    /* The single-threaded client lives in the loop, which somebody must drive. */
    crpci_loop_lock(ch->loop);
    if (ch->private_loop && strcmp(request->backend->scheme, "zookeeper") == 0)
        err = crpci_drive_ensure_owner(ch->loop);
    crpci_loop_unlock(ch->loop);
    if (err)
        return crpci_status_set(error, err, "zookeeper:// needs a loop that is driven: run it, or "
                                            "unset private_loop.forbid_threads");
#endif
    return crpci_opening_await_list(ch, o, service, error);
}

#endif /* CRPCI_DIRECTORY */

/* Steps that can fail without a channel come first, then the channel is made; from there on
 * crpc_channel_close undoes the rest. */
CRPC_API int crpc_channel_open(crpc_channel **channel, const char *url,
                               const crpc_channel_options *options, crpc_error *error)
{
    crpci_opening_request request;
    crpc_channel_options o;
    crpc_channel *ch;
    crpc_loop *l;
    crpci_url u;
    int err;
    *channel = NULL;
    memset(&o, 0, sizeof o);
    if (options)
        o = *options;
    err = crpci_options_check(&crpci_drive_options, &o.private_loop, error);
    if (err)
        return err;
    l = o.loop;
    if (!l) {
        err = crpc_loop_open(&l, &o.private_loop);
        if (err)
            return crpci_status_set(error, err, "channel: cannot open its private loop: %s",
                                    crpc_status_text(err));
    }
    err = crpci_url_parse(&u, l->heap, url, error);
    err = err ? err : crpci_opening_read_url(&u, &o, &request, error);
    err = err ? err : crpci_opening_check(&o, error);
    ch = err ? NULL : (crpc_channel *)crpci_heap_alloc(l->heap, sizeof *ch);
    if (!ch) {
        crpci_url_free(&u);
        if (!o.loop)
            crpc_loop_close(l);
        return err ? err : crpci_status_set(error, CRPC_ENOMEM, "channel: out of memory");
    }
    CRPCI_HANDLE_OPEN(ch);
    ch->loop = ch->requests.loop = ch->providers.loop = l;
    ch->private_loop = !o.loop;
    ch->requests.protocol = ch->providers.endpoint.protocol = request.protocol;
    ch->refs = 1;
    crpci_list_init(&ch->calls);
    crpci_list_init(&ch->waiting);
    crpci_loop_hold(l);
    crpci_opening_configure(ch, &o);
    err = crpci_balance_open(&ch->providers.balance, o.balancer, crpci_loop_seed(l));
    if (err)
        crpci_status_set(error, err,
                         "lb: this balancer is not compiled in: CRPC_ENABLE_POLICY is 0");
    if (!err && o.security.credential) {
        ch->requests.credential =
            crpci_heap_strndup(l->heap, o.security.credential, strlen(o.security.credential));
        if (!ch->requests.credential)
            err = crpci_status_set(error, CRPC_ENOMEM, "channel: out of memory");
    }
    if (err)
        ;
    else if (!crpci_opening_has_registry(u.scheme))
        err = crpci_opening_static(ch, &u, error);
#if CRPCI_DIRECTORY
    else
        err = crpci_opening_directory(ch, &u, &o, &request.directory, error);
#endif
    crpci_url_free(&u);
    if (err) {
        crpc_channel_close(ch);
        return err;
    }
    *channel = ch;
    return CRPC_OK;
}
#endif /* CRPC_ENABLE_CLIENT */

/* ======================================================================== */
/* >>impl-service   finding the method that a request names                  */
/* ======================================================================== */

/* The services of a server and their methods. The map is filled before the server starts, under the
 * lock of its loop; from then on every I/O thread reads it without a lock. Nothing here runs a
 * handler. */

#if CRPC_ENABLE_SERVER

/* A method as the program added it, with what is computed once so that no request has to. */
typedef struct crpci_service_method {
    const crpc_method *method;
    const void *handlers;
    void *user;
    crpc_view names[CRPCI_PROTOCOLS_COUNT]; /* as each protocol encodes service and method; a
                                             * connection compares a request's bytes with them */
    crpci_message_type request;
    crpci_message_type response;
    void *quota; /* the guard's crpci_quota for the method; NULL: it has no limit */
} crpci_service_method;

/* One service. The program's table must outlive the server. */
typedef struct crpci_service {
    const crpc_service *table;
    const char *short_name;        /* what follows the last dot of the name; unique in the map */
    crpci_service_method *methods; /* one block, with the bytes of their names behind them */
    size_t methods_size;
} crpci_service;

typedef struct crpci_service_map {
    crpci_service *items;
    size_t count;
} crpci_service_map;

/* Names are bytes: case counts, and a view may hold zeros. */
CRPCI_FN bool crpci_service_named(const char *name, crpc_view v)
{
    size_t n = crpc_view_size(v);
    return strlen(name) == n && memcmp(name, crpc_view_data(v), n) == 0;
}

/* Looks a service up by its full or its short name, as brpc does. The name without a dot of one
 * service is the short name of no other, so the first that fits is the right one. A server has few
 * services, and a connection remembers the method of its last request: a table would gain nothing.
 */
CRPCI_FN const crpci_service *crpci_service_find(const crpci_service_map *map, crpc_view name)
{
    size_t i;
    for (i = 0; i < map->count; i++) {
        if (crpci_service_named(map->items[i].table->name, name) ||
            crpci_service_named(map->items[i].short_name, name))
            return &map->items[i];
    }
    return NULL;
}

CRPCI_FN const crpci_service_method *crpci_service_find_method(const crpci_service *s,
                                                               crpc_view name)
{
    size_t i;
    for (i = 0; i < s->table->method_count; i++) {
        if (crpci_service_named(s->table->methods[i].name, name))
            return &s->methods[i];
    }
    return NULL;
}

/* Finds the method of a request. An unknown service gets brpc's codes: CRPC_ENOMETHOD if its name
 * has a dot, else CRPC_ENOSERVICE. */
CRPCI_FN int crpci_service_lookup(const crpci_service_map *map, const crpci_message *m,
                                  const crpci_service_method **method)
{
    size_t n = crpc_view_size(m->service);
    const crpci_service *service = n ? crpci_service_find(map, m->service) : NULL;
    *method = NULL;
    if (!service)
        return n && memchr(crpc_view_data(m->service), '.', n) ? CRPC_ENOMETHOD : CRPC_ENOSERVICE;
    if (crpc_view_size(m->method))
        *method = crpci_service_find_method(service, m->method);
    return *method ? CRPC_OK : CRPC_ENOMETHOD;
}

/* Bytes that the encoded names of a method take at most, in any protocol. */
CRPCI_FN size_t crpci_service_names_room(const crpc_service *table, const crpc_method *m)
{
    return strlen(table->name) + strlen(m->name) + CRPCI_PROTOCOL_NAMES;
}

/* Makes the methods of a table and, in the same block, their encoded names. *size receives the size
 * of the block. NULL: out of memory. */
CRPCI_COLD crpci_service_method *crpci_service_prepare(crpci_heap *h, const crpc_service *table,
                                                       const void *handlers, void *user,
                                                       size_t *size)
{
    size_t n = table->method_count * sizeof(crpci_service_method), i, k;
    crpci_service_method *methods;
    uint8_t *at;
    *size = n + 1; /* never 0, so that NULL means out of memory for an empty table too */
    for (i = 0; i < table->method_count; i++)
        *size += CRPCI_PROTOCOLS_COUNT * crpci_service_names_room(table, &table->methods[i]);
    methods = (crpci_service_method *)crpci_heap_alloc(h, *size);
    if (!methods)
        return NULL;
    at = (uint8_t *)methods + n;
    for (i = 0; i < table->method_count; i++) {
        const crpc_method *m = &table->methods[i];
        size_t room = crpci_service_names_room(table, m);
        methods[i].method = m;
        methods[i].handlers = handlers;
        methods[i].user = user;
        methods[i].request = crpci_message_type_of(m->request, m->request_size);
        methods[i].response = crpci_message_type_of(m->response, m->response_size);
        for (k = 0; k < CRPCI_PROTOCOLS_COUNT; k++) {
            methods[i].names[k] = crpci_protocols[k]->names(at, room, crpc_view_str(table->name),
                                                            crpc_view_str(m->name));
            at += room;
        }
    }
    return methods;
}

CRPCI_COLD void crpci_service_free(crpci_service_map *map, crpci_heap *h)
{
    size_t i;
    for (i = 0; i < map->count; i++)
        crpci_heap_free(h, map->items[i].methods, map->items[i].methods_size);
    crpci_heap_free(h, map->items, map->count * sizeof *map->items);
    map->items = NULL;
    map->count = 0;
}

/* Adds a service. CRPC_EBUSY: another service has the same short name, under which a request could
 * mean either. On failure the map has not changed. */
CRPCI_COLD int crpci_service_add(crpci_service_map *map, crpci_heap *h, const crpc_service *table,
                                 const void *handlers, void *user)
{
    const char *dot = strrchr(table->name, '.');
    const char *short_name = dot ? dot + 1 : table->name;
    crpci_service_method *methods;
    crpci_service *items;
    size_t i, size;
    for (i = 0; i < map->count; i++) {
        if (strcmp(map->items[i].short_name, short_name) == 0)
            return CRPC_EBUSY;
    }
    methods = crpci_service_prepare(h, table, handlers, user, &size);
    if (!methods)
        return CRPC_ENOMEM;
    items = (crpci_service *)crpci_heap_resize(h, map->items, map->count * sizeof *items,
                                               (map->count + 1) * sizeof *items);
    if (!items) {
        crpci_heap_free(h, methods, size);
        return CRPC_ENOMEM;
    }
    map->items = items;
    items += map->count++;
    items->table = table;
    items->short_name = short_name;
    items->methods = methods;
    items->methods_size = size;
    return CRPC_OK;
}

/* ======================================================================== */
/* >>impl-worker   a pool of threads for handlers, with a bounded queue      */
/* ======================================================================== */

/* Started by the server, one pool for all its listeners and I/O threads. */
typedef struct crpci_worker_pool {
    crpci_mutex lock;
    crpci_cond work;  /* a task was queued, or the pool is stopping */
    crpci_list queue; /* crpci_task; `run` is called without a lock, its loop is NULL */
    int64_t queued;
    int64_t max_queued; /* tasks that wait for a busy worker; 0: no limit */
    int64_t idle;       /* workers that wait for a task */
    bool stopping;
    size_t count; /* threads that run */
    crpci_thread *threads;
} crpci_worker_pool;

/* Queues a task. False: the queue is full, or the pool is stopping. An idle worker takes a task at
 * once, so each adds one place to the queue. `admitted`: the request was let in before and waited
 * for its turn; the limit does not apply again. */
CRPCI_FN bool crpci_worker_put(crpci_worker_pool *p, crpci_task *t, bool admitted)
{
    bool room;
    crpci_thread_lock(&p->lock);
    room = admitted || !p->max_queued || p->queued < p->max_queued + p->idle;
    room = room && !p->stopping;
    if (room) {
        crpci_list_append(&p->queue, &t->link);
        p->queued++;
        crpci_thread_signal(&p->work);
    }
    crpci_thread_unlock(&p->lock);
    return room;
}

#if CRPC_ENABLE_THREADS
CRPCI_FN void *crpci_worker_thread(void *arg)
{
    crpci_worker_pool *p = (crpci_worker_pool *)arg;
    crpci_thread_name("crpc-worker");
    crpci_thread_lock(&p->lock);
    for (;;) {
        crpci_task *t;
        if (crpci_list_empty(&p->queue)) {
            if (p->stopping)
                break;
            p->idle++;
            crpci_thread_wait(&p->work, &p->lock, -1);
            p->idle--;
            continue;
        }
        t = CRPCI_CONTAINER(p->queue.next, crpci_task, link);
        crpci_list_remove(&t->link);
        p->queued--;
        crpci_thread_unlock(&p->lock);
        t->run(NULL, t);
        crpci_thread_lock(&p->lock);
    }
    crpci_thread_unlock(&p->lock);
    return NULL;
}
#endif

/* Runs what is queued and ends the threads. From here on crpci_worker_put refuses everything.
 * allocated: length of p->threads. */
CRPCI_COLD void crpci_worker_stop(crpci_worker_pool *p, crpci_heap *h, size_t allocated)
{
    crpci_thread_lock(&p->lock);
    p->stopping = true;
    crpci_thread_broadcast(&p->work);
    crpci_thread_unlock(&p->lock);
#if CRPC_ENABLE_THREADS
    while (p->count)
        crpci_thread_join(p->threads[--p->count]);
#endif
    crpci_heap_free(h, p->threads, allocated * sizeof *p->threads);
    p->threads = NULL;
}

/* Frees a pool that was stopped. */
CRPCI_COLD void crpci_worker_free(crpci_worker_pool *p)
{
    crpci_thread_cond_free(&p->work);
    crpci_thread_mutex_free(&p->lock);
}

/* Starts `count` threads. stack: bytes of each one's stack, 0: the system's default. */
CRPCI_COLD int crpci_worker_start(crpci_worker_pool *p, crpci_heap *h, size_t count,
                                  int64_t max_queued, size_t stack)
{
    int err = CRPC_EUNSUPPORTED;
    memset(p, 0, sizeof *p);
    crpci_list_init(&p->queue);
    p->max_queued = max_queued;
#if CRPC_ENABLE_THREADS
    if (crpci_thread_mutex_init(&p->lock))
        return CRPC_ENOMEM;
    if (crpci_thread_cond_init(&p->work)) {
        crpci_thread_mutex_free(&p->lock);
        return CRPC_ENOMEM;
    }
    p->threads = (crpci_thread *)crpci_heap_alloc(h, count * sizeof *p->threads);
    while (p->threads && p->count < count) {
        if (crpci_thread_start(&p->threads[p->count], stack, crpci_worker_thread, p))
            break;
        p->count++;
    }
    if (p->count == count)
        return CRPC_OK;
    err = p->threads ? CRPC_ESYSTEM : CRPC_ENOMEM;
    crpci_worker_stop(p, h, count);
    crpci_worker_free(p);
#else
    (void)h;
    (void)count;
    (void)stack;
#endif
    return err;
}

/* ======================================================================== */
/* >>impl-order   requests with the same ordering key run one after another */
/* ======================================================================== */

#define CRPCI_ORDER_BUCKETS 64u

/* A request with a key. The first request of a key runs; the others wait in a queue of the
 * first. */
typedef struct crpci_order_item {
    crpci_list link;  /* the first: in its bucket; the others: in the first's queue */
    crpci_list queue; /* the first: requests that wait, in the order in which they came */
    const void *of;   /* the connection within which the key orders; NULL: the whole server */
    uint64_t key;     /* hash of the key; two keys with one hash would only run one after another */
} crpci_order_item;

/* The caller locks. */
typedef struct crpci_order {
    crpci_list buckets[CRPCI_ORDER_BUCKETS];
    int64_t waiting;
    int64_t max_waiting; /* 0: no limit */
} crpci_order;

CRPCI_FN crpci_list *crpci_order_bucket(crpci_order *o, const crpci_order_item *i)
{
    return &o->buckets[i->key % CRPCI_ORDER_BUCKETS];
}

CRPCI_COLD void crpci_order_init(crpci_order *o, int64_t max_waiting)
{
    unsigned i;
    o->waiting = 0;
    o->max_waiting = max_waiting;
    for (i = 0; i < CRPCI_ORDER_BUCKETS; i++)
        crpci_list_init(&o->buckets[i]);
}

/* CRPC_OK: the request is the first of its key and may run. CRPC_EPENDING: it waits for its turn.
 * CRPC_ELIMIT: too many requests wait; this one was not taken in. */
CRPCI_FN int crpci_order_enter(crpci_order *o, crpci_order_item *item)
{
    crpci_list *bucket = crpci_order_bucket(o, item), *i;
    crpci_list_init(&item->queue);
    for (i = bucket->next; i != bucket; i = i->next) {
        crpci_order_item *first = CRPCI_CONTAINER(i, crpci_order_item, link);
        if (first->key != item->key || first->of != item->of)
            continue;
        if (o->max_waiting && o->waiting >= o->max_waiting)
            return CRPC_ELIMIT;
        crpci_list_append(&first->queue, &item->link);
        o->waiting++;
        return CRPC_EPENDING;
    }
    crpci_list_append(bucket, &item->link);
    return CRPC_OK;
}

/* The running request of a key has ended. Returns the request that runs next; NULL: none waits. */
CRPCI_FN crpci_order_item *crpci_order_leave(crpci_order *o, crpci_order_item *item)
{
    crpci_order_item *next;
    crpci_list_remove(&item->link);
    if (crpci_list_empty(&item->queue))
        return NULL;
    next = CRPCI_CONTAINER(item->queue.next, crpci_order_item, link);
    crpci_list_remove(&next->link);
    crpci_list_move(&next->queue, &item->queue);
    crpci_list_append(crpci_order_bucket(o, next), &next->link);
    o->waiting--;
    return next;
}

/* ======================================================================== */
/* >>impl-replay   replies kept for requests that arrive again with the same id */
/* ======================================================================== */

#define CRPCI_REPLAY_ID_MAX 64 /* bytes of a request's id */
#define CRPCI_REPLAY_BUCKETS_MAX 4096u

/* A reply, in a chunk of its own, with the bytes that it refers to. */
typedef struct crpci_replay_reply {
    const void *protocol; /* that the fields are encoded for */
    crpci_message m;      /* a repeated request puts in its own id; the attachment is behind the
                           * payload */
} crpci_replay_reply;

/* A request that is executing, or has finished. */
typedef struct crpci_replay_entry {
    crpci_list link;    /* in its bucket */
    crpci_list age;     /* finished: in the order in which requests finished */
    crpci_list waiting; /* executing: links of the repeated requests that wait for its reply */
    const void *method;
    void *owner;     /* the account that the entry is charged to */
    uint64_t hash;   /* of method and id */
    uint64_t digest; /* of the request's bytes: another request with the same id is refused */
    int64_t until; /* finished: when the entry expires */
    bool finished;
    crpci_chunk *reply; /* finished: a crpci_replay_reply; NULL: it was too large to keep */
    size_t id_size;
    char id[CRPCI_REPLAY_ID_MAX];
} crpci_replay_entry;

typedef struct crpci_replay crpci_replay;

/* The caller locks. An entry stays for keep_us: if it went earlier, to make room for another, a
 * repeated request would be executed twice. */
struct crpci_replay {
    crpci_heap *heap;
    crpci_list *buckets;
    size_t bucket_count; /* a power of two */
    crpci_list age; /* finished entries, oldest first */
    size_t count;
    size_t max;    /* entries */
    int64_t bytes; /* of replies and entries */
    int64_t max_bytes;
    int64_t keep_us; /* from a request's end to its expiry */
    uint64_t secret[2]; /* of hashes and digests */
    void (*release)(crpci_replay *r, void *owner); /* an entry of the owner is gone */
};

CRPCI_COLD int crpci_replay_open(crpci_replay *r, crpci_heap *h, size_t entries, int64_t max_bytes,
                                 int64_t keep_us, const uint64_t secret[2])
{
    memset(r, 0, sizeof *r);
    r->heap = h;
    memcpy(r->secret, secret, sizeof r->secret);
    r->max = entries;
    r->max_bytes = max_bytes;
    r->keep_us = keep_us;
    crpci_list_init(&r->age);
    r->bucket_count = 16;
    while (r->bucket_count < entries && r->bucket_count < CRPCI_REPLAY_BUCKETS_MAX)
        r->bucket_count *= 2;
    r->buckets = crpci_list_table(h, r->bucket_count);
    return r->buckets ? CRPC_OK : CRPC_ENOMEM;
}

CRPCI_FN int64_t crpci_replay_size(const crpci_chunk *reply)
{
    return reply ? (int64_t)(CRPCI_CHUNK_HEADER + reply->cap) : 0;
}

/* Frees an entry, for which no request waits any more. */
CRPCI_FN void crpci_replay_remove(crpci_replay *r, crpci_replay_entry *e)
{
    r->count--;
    r->bytes -= (int64_t)sizeof *e + crpci_replay_size(e->reply);
    crpci_list_remove(&e->link);
    crpci_list_remove(&e->age);
    crpci_heap_chunk_unref(e->reply);
    if (r->release)
        r->release(r, e->owner);
    crpci_heap_free(r->heap, e, sizeof *e);
}

/* Frees the entries that have been kept until `now`. */
CRPCI_FN void crpci_replay_expire(crpci_replay *r, int64_t now)
{
    while (!crpci_list_empty(&r->age)) {
        crpci_replay_entry *e = CRPCI_CONTAINER(r->age.next, crpci_replay_entry, age);
        if (e->until > now)
            break;
        crpci_replay_remove(r, e);
    }
}

CRPCI_COLD uint64_t crpci_replay_hash(const crpci_replay *r, const void *method, crpc_view id)
{
    return crpci_base_siphash(r->secret, crpc_view_data(id), crpc_view_size(id)) ^
           crpci_base_mix((uint64_t)(uintptr_t)method);
}

/* Finds the entry of a request by its method and its id, which has at most CRPCI_REPLAY_ID_MAX
 * bytes. NULL: the request is new, or its entry has expired. */
CRPCI_FN crpci_replay_entry *crpci_replay_find(crpci_replay *r, const void *method, crpc_view id,
                                               int64_t now)
{
    uint64_t hash = crpci_replay_hash(r, method, id);
    crpci_list *bucket = &r->buckets[hash & (r->bucket_count - 1)], *i;
    size_t n = crpc_view_size(id);
    crpci_replay_expire(r, now);
    for (i = bucket->next; i != bucket; i = i->next) {
        crpci_replay_entry *e = CRPCI_CONTAINER(i, crpci_replay_entry, link);
        if (e->hash == hash && e->method == method && e->id_size == n &&
            memcmp(e->id, crpc_view_data(id), n) == 0)
            return e;
    }
    return NULL;
}

/* Adds the entry of a new request that begins to execute. NULL: none is free, or out of memory; the
 * request must be refused then. */
CRPCI_FN crpci_replay_entry *crpci_replay_add(crpci_replay *r, const void *method, crpc_view id,
                                              uint64_t digest, void *owner)
{
    uint64_t hash = crpci_replay_hash(r, method, id);
    crpci_replay_entry *e = NULL;
    if (r->count < r->max && r->bytes + (int64_t)sizeof *e <= r->max_bytes)
        e = (crpci_replay_entry *)crpci_heap_alloc(r->heap, sizeof *e);
    if (!e)
        return NULL;
    e->method = method;
    e->owner = owner;
    e->hash = hash;
    e->digest = digest;
    e->id_size = crpc_view_size(id);
    memcpy(e->id, crpc_view_data(id), e->id_size);
    crpci_list_init(&e->age);
    crpci_list_init(&e->waiting);
    crpci_list_append(&r->buckets[hash & (r->bucket_count - 1)], &e->link);
    r->count++;
    r->bytes += (int64_t)sizeof *e;
    return e;
}

/* A request has finished. Keeps its reply, with a reference of its own, if there is room for it and
 * it takes no more than a quarter of max_bytes. The entry stays in any case: a repetition is then
 * refused, not executed. Moves the requests that waited to `waiting`. */
CRPCI_FN void crpci_replay_finish(crpci_replay *r, crpci_replay_entry *e, crpci_chunk *reply,
                                  int64_t now, crpci_list *waiting)
{
    int64_t size = crpci_replay_size(reply);
    crpci_list_move(waiting, &e->waiting);
    crpci_replay_expire(r, now);
    if (reply && size <= r->max_bytes / 4 && r->bytes + size <= r->max_bytes) {
        crpci_heap_chunk_ref(reply);
        e->reply = reply;
        r->bytes += size;
    }
    e->finished = true;
    e->until = now + r->keep_us;
    crpci_list_append(&r->age, &e->age);
}

/* All requests have ended. */
CRPCI_COLD void crpci_replay_close(crpci_replay *r)
{
    if (r->buckets)
        crpci_replay_expire(r, INT64_MAX);
    crpci_heap_free(r->heap, r->buckets, r->bucket_count * sizeof *r->buckets);
    r->buckets = NULL;
}

/* Copies bytes to *at, which moves behind them. */
CRPCI_COLD crpc_view crpci_replay_append(uint8_t **at, const void *bytes, size_t n)
{
    uint8_t *to = *at;
    if (n)
        memcpy(to, bytes, n);
    *at += n;
    return crpc_view_of(n ? to : NULL, n);
}

/* Makes a chunk that holds a crpci_replay_reply: a copy of a reply, whose attachment may be
 * elsewhere. NULL: out of memory. */
CRPCI_COLD crpci_chunk *crpci_replay_copy(crpci_heap *h, const void *protocol,
                                          const crpci_message *m, const void *attachment)
{
    size_t text = crpc_view_size(m->text), fields = crpc_view_size(m->fields);
    crpci_chunk *c = crpci_heap_chunk(
        h, sizeof(crpci_replay_reply) + text + fields + m->payload_size + m->attachment_size);
    crpci_replay_reply *r;
    uint8_t *at;
    if (!c)
        return NULL;
    r = (crpci_replay_reply *)(void *)crpci_heap_data(c);
    at = (uint8_t *)(r + 1);
    r->protocol = protocol;
    r->m = *m;
    r->m.text = crpci_replay_append(&at, crpc_view_data(m->text), text);
    r->m.fields = crpci_replay_append(&at, crpc_view_data(m->fields), fields);
    r->m.payload = at;
    crpci_replay_append(&at, m->payload, m->payload_size);
    crpci_replay_append(&at, attachment, m->attachment_size);
    return c;
}

/* ======================================================================== */
/* >>impl-peer   the peers of a server: networks, and the accounts of hosts  */
/* ======================================================================== */

/* A server shares what it has among accounts: all connections of one host are one account. An
 * account exists while it holds something. What has to outlive it, the debt of its token bucket,
 * goes into a sketch of fixed size, so that no number of other hosts can push it out. The caller
 * locks a table; networks are pure. */

#define CRPCI_PEER_BUCKETS   64u
#define CRPCI_PEER_SKETCH    4096u /* cells in each of the sketch's two rows */
#define CRPCI_PEER_UNIT_US   15625 /* of the sketch's times: 1/64 s, which wraps after two years */

/* Makes the key of a peer's account: the address without what one host can choose. A host with global IPv6 has at least a /64 to choose addresses
 * from, so those 64 bits are dropped; link-local and unique-local addresses (RFC 4193) are kept
 * whole, because all hosts of a site share their /64. */
CRPCI_FN crpci_sock_name crpci_peer_key(const crpci_sock_name *p)
{
    crpci_sock_name key = *p;
    bool local = (p->address[0] == 0xfe && (p->address[1] & 0xc0) == 0x80) ||
                 (p->address[0] & 0xfe) == 0xfc;
    key.port = 0;
    if (p->kind == CRPCI_SOCK_IP && !local) {
        key.scope = 0;
        if (!crpci_sock_is_ipv4(p) && memcmp(p->address, &in6addr_loopback, 16) != 0)
            memset(key.address + 8, 0, 8);
    }
    return key;
}

/* --- networks --------------------------------------------------------------------------------- */

typedef struct crpci_peer_network {
    crpci_sock_name base; /* of a unix network only the kind counts */
    unsigned bits;        /* leading bits of `base` that an address must share */
    uint32_t weight;
} crpci_peer_network;

typedef struct crpci_peer_networks {
    crpci_peer_network *items;
    size_t count;
} crpci_peer_networks;

/* Reads one network: "unix", "10.0.0.0/8" or "fd00::/8", with ":WEIGHT" behind it if `weighted`.
 * Changes the text. False: it is none of these. */
CRPCI_COLD bool crpci_peer_read_network(crpci_peer_network *n, char *text, bool weighted)
{
    char *slash, *colon = weighted ? strrchr(text, ':') : NULL;
    int64_t weight = 1, bits = 128;
    size_t i;
    memset(n, 0, sizeof *n);
    if (weighted && (!colon || !crpci_url_number(colon + 1, 1000000, &weight) || weight < 1))
        return false;
    if (colon)
        *colon = '\0';
    n->weight = (uint32_t)weight;
    n->base.kind = strcmp(text, "unix") == 0 ? CRPCI_SOCK_UNIX : CRPCI_SOCK_IP;
    if (n->base.kind == CRPCI_SOCK_UNIX)
        return true;
    slash = strchr(text, '/');
    if (slash) {
        *slash = '\0';
        if (!crpci_url_number(slash + 1, 128, &bits) || bits < 0)
            return false;
    }
    if (inet_pton(AF_INET, text, n->base.address + 12) == 1) {
        memcpy(n->base.address, crpci_sock_mapped, 12);
        if (slash && bits > 32)
            return false;
        n->bits = slash ? (unsigned)bits + 96 : 128;
    } else if (inet_pton(AF_INET6, text, n->base.address) == 1) {
        n->bits = (unsigned)bits;
    } else {
        return false;
    }
    for (i = n->bits; i < 128; i++) { /* 10.0.0.7/8 is a slip for 10.0.0.0/8 or for 10.0.0.7 */
        if (n->base.address[i / 8] & 0x80 >> i % 8)
            return false;
    }
    return true;
}

/* Reads a list such as "10.0.0.0/8,fd00::/8,unix", or with weights "10.0.0.7:16,10.1.0.0/16:4".
 * NULL and "" are an empty list. `option` names the list in the error. */
CRPCI_COLD int crpci_peer_read_networks(crpci_peer_networks *list, crpci_heap *h, const char *text,
                                        const char *option, bool weighted, crpc_error *error)
{
    const char *from = text ? text : "", *end;
    char item[INET6_ADDRSTRLEN + 16];
    memset(list, 0, sizeof *list);
    for (; *from; from = *end ? end + 1 : end) {
        crpci_peer_network *grown;
        size_t n;
        end = strchr(from, ',');
        end = end ? end : from + strlen(from);
        n = crpci_base_min((size_t)(end - from), sizeof item - 1);
        memcpy(item, from, n);
        item[n] = '\0';
        grown = (crpci_peer_network *)crpci_heap_resize(h, list->items,
                                                        list->count * sizeof *list->items,
                                                        (list->count + 1) * sizeof *list->items);
        if (!grown)
            return crpci_status_set(error, CRPC_ENOMEM, "server: out of memory");
        list->items = grown;
        if (!crpci_peer_read_network(&grown[list->count++], item, weighted))
            return crpci_status_set(error, CRPC_EINVAL,
                                    "%s: \"%.*s\" is not a network: expected ADDRESS, ADDRESS/BITS "
                                    "with zeros behind the bits, or unix%s",
                                    option, (int)crpci_base_min((size_t)(end - from), 60), from,
                                    weighted ? ", each with :WEIGHT from 1 to 1000000" : "");
    }
    return CRPC_OK;
}

CRPCI_COLD void crpci_peer_free_networks(crpci_peer_networks *list, crpci_heap *h)
{
    crpci_heap_free(h, list->items, list->count * sizeof *list->items);
    memset(list, 0, sizeof *list);
}

CRPCI_FN bool crpci_peer_in_network(const crpci_peer_network *n, const crpci_sock_name *p)
{
    unsigned whole = n->bits / 8, rest = n->bits % 8;
    if (n->base.kind != p->kind)
        return false;
    return p->kind == CRPCI_SOCK_UNIX ||
           (memcmp(n->base.address, p->address, whole) == 0 &&
            (!rest || (n->base.address[whole] ^ p->address[whole]) >> (8 - rest) == 0));
}

/* The smallest network of a list that holds a peer. NULL: none does. */
CRPCI_FN const crpci_peer_network *crpci_peer_find_network(const crpci_peer_networks *list,
                                                           const crpci_sock_name *p)
{
    const crpci_peer_network *best = NULL;
    size_t i;
    for (i = 0; i < list->count; i++) {
        if (crpci_peer_in_network(&list->items[i], p) && (!best || list->items[i].bits > best->bits))
            best = &list->items[i];
    }
    return best;
}

/* --- accounts --------------------------------------------------------------------------------- */

/* What a server has a limited number of, and shares among accounts. */
typedef enum crpci_peer_resource {
    CRPCI_PEER_CONNECTIONS,
    CRPCI_PEER_REPLAYS, /* replay entries */
    CRPCI_PEER_RESOURCES
} crpci_peer_resource;

typedef struct crpci_peer_account {
    crpci_list link; /* in its bucket */
    crpci_sock_name key;
    uint32_t weight;
    uint32_t held[CRPCI_PEER_RESOURCES];
    crpci_limiter_bucket bucket; /* of rate_per_client */
} crpci_peer_account;

typedef struct crpci_peer_table {
    crpci_heap *heap;
    crpci_list buckets[CRPCI_PEER_BUCKETS];
    uint64_t secret[2]; /* a peer cannot choose addresses that fall into one bucket or cell */
    crpci_peer_networks weights;
    int64_t rate, burst; /* of each account's token bucket; rate 0: none */
    /* With a rate: when the debts of departed accounts are paid, in CRPCI_PEER_UNIT_US. An account
     * has a cell in each row, and the lower one counts: both are wrong only if others share both. */
    uint32_t *sketch;
} crpci_peer_table;

/* `t` is all zero, but for its weights. */
CRPCI_COLD int crpci_peer_open(crpci_peer_table *t, crpci_heap *h, const uint64_t secret[2],
                               int64_t rate, int64_t burst)
{
    size_t i;
    t->heap = h;
    t->secret[0] = secret[0];
    t->secret[1] = secret[1];
    t->rate = rate;
    t->burst = burst;
    for (i = 0; i < CRPCI_PEER_BUCKETS; i++)
        crpci_list_init(&t->buckets[i]);
    if (rate > 0)
        t->sketch = (uint32_t *)crpci_heap_alloc(h, 2 * CRPCI_PEER_SKETCH * sizeof *t->sketch);
    return rate > 0 && !t->sketch ? CRPC_ENOMEM : CRPC_OK;
}

/* All connections have ended, and all accounts with them. */
CRPCI_COLD void crpci_peer_close(crpci_peer_table *t, crpci_heap *h)
{
    crpci_heap_free(h, t->sketch, 2 * CRPCI_PEER_SKETCH * sizeof *t->sketch);
    t->sketch = NULL;
    crpci_peer_free_networks(&t->weights, h);
}

CRPCI_FN uint64_t crpci_peer_hash(const crpci_peer_table *t, const crpci_sock_name *key)
{
    uint8_t bytes[21];
    memcpy(bytes, key->address, 16);
    crpci_base_put32(bytes + 16, key->scope);
    bytes[20] = key->kind;
    return crpci_base_siphash(t->secret, bytes, sizeof bytes);
}

CRPCI_FN uint32_t *crpci_peer_cell(const crpci_peer_table *t, uint64_t hash, unsigned row)
{
    return &t->sketch[row * CRPCI_PEER_SKETCH + (hash >> row * 32) % CRPCI_PEER_SKETCH];
}

/* Gives a new account the debt with which its host left. A time in a cell that is further away than
 * any debt lasts is an old one, from before the counter wrapped. */
CRPCI_FN void crpci_peer_restore_debt(const crpci_peer_table *t, crpci_limiter_bucket *b,
                                      uint64_t hash, int64_t now_us)
{
    uint32_t now = (uint32_t)(now_us / CRPCI_PEER_UNIT_US);
    uint32_t first = *crpci_peer_cell(t, hash, 0) - now, second = *crpci_peer_cell(t, hash, 1) - now;
    int64_t left = (int64_t)(first < second ? first : second) * CRPCI_PEER_UNIT_US;
    if (first > INT32_MAX || second > INT32_MAX || left > b->clear_us + 2 * CRPCI_PEER_UNIT_US)
        return;
    b->debt = crpci_base_min64(left * b->per_second, b->most);
    b->at_us = now_us;
}

/* Keeps the debt of an account that ends, rounded up, unless a cell holds a longer one. */
CRPCI_FN void crpci_peer_keep_debt(crpci_peer_table *t, const crpci_limiter_bucket *b,
                                   uint64_t hash, int64_t now_us)
{
    int64_t left = b->debt / b->per_second - (now_us - b->at_us);
    uint32_t now = (uint32_t)(now_us / CRPCI_PEER_UNIT_US), until;
    unsigned row;
    if (left <= 0)
        return;
    until = now + (uint32_t)crpci_base_min64(left / CRPCI_PEER_UNIT_US + 1, INT32_MAX);
    for (row = 0; row < 2; row++) {
        uint32_t *cell = crpci_peer_cell(t, hash, row);
        if (*cell - now > INT32_MAX || *cell - now < until - now)
            *cell = until;
    }
}

/* Counts a new connection for its account. NULL: out of memory. */
CRPCI_FN crpci_peer_account *crpci_peer_connect(crpci_peer_table *t, const crpci_sock_name *name,
                                                int64_t now_us)
{
    crpci_sock_name key = crpci_peer_key(name);
    uint64_t hash = crpci_peer_hash(t, &key);
    crpci_list *bucket = &t->buckets[hash % CRPCI_PEER_BUCKETS], *i;
    const crpci_peer_network *network = crpci_peer_find_network(&t->weights, name);
    crpci_peer_account *a;
    for (i = bucket->next; i != bucket; i = i->next) {
        a = CRPCI_CONTAINER(i, crpci_peer_account, link);
        if (a->key.kind == key.kind && a->key.scope == key.scope &&
            memcmp(a->key.address, key.address, 16) == 0) {
            a->held[CRPCI_PEER_CONNECTIONS]++;
            return a;
        }
    }
    a = (crpci_peer_account *)crpci_heap_alloc(t->heap, sizeof *a);
    if (!a)
        return NULL;
    a->key = key;
    a->weight = network ? network->weight : 1;
    a->held[CRPCI_PEER_CONNECTIONS] = 1;
    crpci_limiter_bucket_init(&a->bucket, t->rate, t->burst);
    if (t->sketch)
        crpci_peer_restore_debt(t, &a->bucket, hash, now_us);
    crpci_list_append(bucket, &a->link);
    return a;
}

/* An account gives back what it held. It ends when it holds nothing. */
CRPCI_FN void crpci_peer_release(crpci_peer_table *t, crpci_peer_account *a,
                                 crpci_peer_resource what, int64_t now_us)
{
    size_t i;
    a->held[what]--;
    for (i = 0; i < CRPCI_PEER_RESOURCES; i++) {
        if (a->held[i])
            return;
    }
    if (t->sketch)
        crpci_peer_keep_debt(t, &a->bucket, crpci_peer_hash(t, &a->key), now_us);
    crpci_list_remove(&a->link);
    crpci_heap_free(t->heap, a, sizeof *a);
}

/* Whether account `a` holds more by its weight than `b`. */
CRPCI_FN bool crpci_peer_is_larger(const crpci_peer_account *a, const crpci_peer_account *b,
                                   crpci_peer_resource what)
{
    return (uint64_t)a->held[what] * b->weight > (uint64_t)b->held[what] * a->weight;
}

/* The account other than `but` that holds most by its weight. NULL: there is no other. */
CRPCI_COLD crpci_peer_account *crpci_peer_largest(const crpci_peer_table *t,
                                                  const crpci_peer_account *but,
                                                  crpci_peer_resource what)
{
    crpci_peer_account *best = NULL;
    size_t k;
    for (k = 0; k < CRPCI_PEER_BUCKETS; k++) {
        const crpci_list *i;
        for (i = t->buckets[k].next; i != &t->buckets[k]; i = i->next) {
            crpci_peer_account *a = CRPCI_CONTAINER(i, crpci_peer_account, link);
            if (a != but && (!best || crpci_peer_is_larger(a, best, what)))
                best = a;
        }
    }
    return best;
}

/* Whether account `own` may keep what it has taken last and is counted in own->held, when `total`
 * of `most` are held by all. Up to three quarters of them anybody may have all. Above them the
 * largest account gets no more, so that the rest is there for others, but one each. With `victim`
 * not NULL, `total` may be over `most` if a larger account can yield one: *victim. */
CRPCI_FN bool crpci_peer_may_keep(const crpci_peer_table *t, const crpci_peer_account *own,
                                  crpci_peer_resource what, uint64_t total, uint64_t most,
                                  const crpci_peer_account **victim)
{
    const crpci_peer_account *other;
    if (victim)
        *victim = NULL;
    if (total <= most - most / 4)
        return true;
    other = crpci_peer_largest(t, own, what);
    if (own->held[what] > 1 && (!other || crpci_peer_is_larger(own, other, what)))
        return false;
    if (total <= most)
        return true;
    if (!victim || !other || !crpci_peer_is_larger(other, own, what))
        return false;
    *victim = other;
    return true;
}

/* ======================================================================== */
/* >>impl-quota   limits of a method: concurrency and rates                  */
/* ======================================================================== */

#define CRPCI_QUOTA_START 40u /* requests in service at which an adaptive limit begins */

/* The limits of one method. The caller locks. All zero, there are none. */
typedef struct crpci_quota {
    struct crpci_quota *next; /* of the server's quotas */
    uint32_t max; /* requests in service; 0: no limit */
    uint32_t active;
    bool adaptive;
    crpci_limiter_auto limiter;
    crpci_limiter_bucket bucket;
} crpci_quota;

CRPCI_COLD void crpci_quota_init(crpci_quota *q, const crpc_method_limit *l, uint32_t least)
{
    memset(q, 0, sizeof *q);
    q->max = l->max_concurrency > 0 ? (uint32_t)l->max_concurrency : 0;
    q->adaptive = l->adaptive > 0;
    crpci_limiter_auto_init(&q->limiter, least, CRPCI_QUOTA_START);
    crpci_limiter_bucket_init(&q->bucket, l->rate, l->burst);
}

/* NULL: the request is let in and must then leave. Otherwise why it is refused, as a text for the
 * error reply. */
CRPCI_FN const char *crpci_quota_enter(crpci_quota *q, int64_t now_us)
{
    if (q->max && q->active >= q->max)
        return CRPCI_STATUS_TEXT(
            "too many requests of the method are being served (max_concurrency)");
    if (q->adaptive && !crpci_limiter_auto_enter(&q->limiter))
        return CRPCI_STATUS_TEXT("too many requests of the method are being served (adaptive)");
    if (!crpci_limiter_bucket_take(&q->bucket, now_us)) {
        if (q->adaptive)
            crpci_limiter_auto_leave(&q->limiter, false, -1, now_us);
        return CRPCI_STATUS_TEXT("too many requests of the method in a second (rate)");
    }
    q->active++;
    return NULL;
}

/* A request leaves. latency_us: since it arrived; -1: it is no measure of the server. */
CRPCI_FN void crpci_quota_leave(crpci_quota *q, bool ok, int64_t latency_us, int64_t now_us)
{
    q->active--;
    if (q->adaptive)
        crpci_limiter_auto_leave(&q->limiter, ok, latency_us, now_us);
}

/* ======================================================================== */
/* >>impl-context   one request in service: its handler, its reply, its end */
/* ======================================================================== */

/* A context is the server's record of one request, from intake to the queueing of its reply. It has
 * one user at a time: the I/O thread or worker that runs the handler or, after CRPC_EPENDING, the
 * thread that calls crpc_context_finish. That user needs no lock. The lock of the connection's loop
 * is taken to make a context, to queue its reply and to release what it holds. A server's struct
 * stands here because every request reads it. */

#define CRPCI_CONTEXT_CONN_MAX 4096 /* requests of one connection in service at a time */
/* Received bytes up to this number are copied: a request that waits for long must not keep the
 * receive buffer of 64 KiB that it came in. */
#define CRPCI_CONTEXT_COPY 1024u
#define CRPCI_CONTEXT_CROWDED                                                                      \
    CRPCI_STATUS_TEXT("too many requests wait for a worker (worker_queue)")

/* The life of a server, which only goes forward. */
typedef enum crpci_server_state {
    CRPCI_SERVER_NEW,      /* takes services and listeners; accepts no connection yet */
    CRPCI_SERVER_RUNNING,
    CRPCI_SERVER_LAME,     /* has left the registry, and serves on while clients learn of it */
    CRPCI_SERVER_STOPPING, /* listeners are closed; new requests get ELOGOFF, begun ones go on */
    CRPCI_SERVER_STOPPED   /* connections are closed; replies that are finished now are dropped */
} crpci_server_state;

/* The guard section's functions for a request that has a crpci_guard. The user of the context calls
 * them, without the loop's lock. */
typedef struct crpci_context_guard {
    int (*serve)(crpc_context *x); /* in place of the handler; CRPC_EPENDING: x may be gone */
    crpci_out *(*encode)(crpc_context *x, int code); /* as crpci_context_encode; then does `end` */
    void (*end)(crpc_context *x, const crpci_message *reply, int served); /* reply NULL: none */
    void (*leave)(crpc_server *s, void *account); /* a connection is closed and has no request */
} crpci_context_guard;

/* A server. The program owns it, and connections with requests in service keep it. Each nested
 * struct belongs to the section of its name. Unless a member says otherwise, it is written before
 * the start or under the lock of `loop`. */
struct crpc_server {
    CRPCI_HANDLE
    crpc_loop *loop; /* accepts; also serves the connections if there are no I/O threads */
    crpci_heap *heap;
    uint32_t refs;    /* atomic: the program's, and one of each connection with requests */
    uint32_t state;   /* atomic crpci_server_state, written under the loop's lock */
    uint32_t active;  /* atomic: connections with requests in service */
    uint32_t serving; /* requests in service; atomic with I/O threads, else under the lock */
    uint32_t max_serving; /* at which further requests get CRPC_ELIMIT */
    uint32_t connections; /* atomic: open ones, of all loops */
    bool private_loop;    /* the server opened `loop` and closes it */
    void (*destroy)(crpc_server *s); /* the lifecycle section's: frees it with the last reference */
    crpci_service_map services;
    crpci_worker_pool workers;
    size_t worker_count; /* also when they have stopped; 0: handlers run on the I/O threads */
    struct {
        crpc_loop **loops; /* one for each I/O thread */
        size_t count;
        size_t next; /* the loop of the next connection; the accepting thread's alone */
        char thread_name[16];
    } io;
    struct {
        const crpci_context_guard *ops;
        bool all;          /* all requests, not only those with user_fields, go through the guard */
        crpci_mutex lock;  /* of what follows; taken after a loop's lock, and before the workers' or
                            * the heap's */
        crpci_order order;
        crpci_replay replay;
        crpci_quota *quotas; /* list: of the methods that have limits */
        crpci_peer_table peers;
        uint64_t replayed; /* requests that had come before */
    } guard;
    struct {
        crpci_list list;
        crpci_peer_networks allow; /* empty: all */
        uint32_t refusing;         /* atomic: connections that are open only to be refused */
        int reserve_fd; /* closed for a moment when no descriptors are left, to accept and close a
                         * connection in its place; -1: not to be had */
        int64_t emfile_logged; /* when a lack of descriptors was logged last */
    } listener;
    struct {
        crpci_backend *registry;
        struct crpci_enrolment *items; /* one a service */
        size_t count;
        size_t missing; /* services that the registry has not confirmed yet */
        crpci_waiter *waiter; /* crpc_server_start waits for all of them */
        char text[CRPC_ERROR_TEXT_MAX]; /* why the last registration failed */
    } enrolment;
    struct {
        crpci_timer timer; /* ends LAME, then checks every 10 ms whether the server is drained */
        int64_t until;     /* when connections are closed, drained or not */
        crpci_waiter *waiter; /* crpc_server_close or _run waits for STOPPED */
        bool running;     /* crpc_server_run is at work */
        bool close_later; /* closed in a callback: close_task does it when the server is drained */
        crpci_task close_task;
    } drain;
    crpc_server_options options; /* its texts are copies; loops.thread_name may be gone, see `io` */
};

/* One request in service. It lies at the start of `block`, and is gone with it. */
struct crpc_context {
    crpci_origin origin; /* first: a call with this context as its parent reads it */
    crpci_task task;
    crpc_server *server;
    crpc_loop *loop;
    crpci_conn *conn;
    crpci_chunk *block; /* holds this, the request, the response, the received bytes if they are
                         * few, and the reply if that is short */
    const crpci_service_method *method;
    void *request;
    void *response;
    size_t reply_at; /* offset in the block: from here the reply is encoded, if it fits */
    /* the request, as in its crpci_message */
    crpc_view received; /* fields */
    int64_t id;
    uint32_t turn;
    const uint8_t *payload; /* the attachment stands behind it */
    size_t payload_size;
    size_t attachment_size;
    /* from here on all is 0 at first */
    crpci_chunk *chunk; /* holds the received bytes; NULL: `block` has a copy of them */
    crpci_chunk *extra; /* list of chunks: what crpc_context_alloc gave out */
    struct crpci_guard *guard; /* NULL: the request has no limit, order or id to heed */
    size_t intercepted; /* interceptors whose `before` has passed, so that `after` is due */
    int app_code;       /* set by crpc_context_fail; 0: none */
    char *text; /* for the error reply; NULL: the text of the status. In `extra` */
    char *peer; /* address, as crpc_context_peer formats it; NULL: not asked for. In `extra` */
    crpci_message_out fields; /* of the reply */
    crpc_view attachment; /* of the reply */
    crpci_chunk *attachment_chunk;
    crpci_out *reply; /* of a concluded request; NULL: no memory, or the server has stopped */
    crpc_view credential;
};

/* Whether a request has a guard. Constant without CRPC_ENABLE_POLICY, so that the compiler drops
 * the code behind it. */
CRPCI_FN bool crpci_context_guarded(const crpc_context *x)
{
    return CRPC_ENABLE_POLICY && x->guard;
}

/* Makes the frame of a reply. Text, fields and payload are copied; the attachment behind the
 * payload is not, so the caller sees to it that its bytes outlive the frame (tail_chunk). NULL: out
 * of memory. */
CRPCI_COLD crpci_out *crpci_context_frame(crpci_conn *conn, const crpci_message *m)
{
    size_t head = sizeof(crpci_out) + conn->protocol->headroom + crpc_view_size(m->text) +
                  crpc_view_size(m->fields);
    crpci_chunk *chunk = crpci_heap_chunk(conn->loop->heap, head + m->payload_size);
    uint8_t *data;
    crpci_out *o;
    if (!chunk)
        return NULL;
    data = crpci_heap_data(chunk);
    o = (crpci_out *)(void *)data;
    memset(o, 0, sizeof *o);
    if (m->payload_size)
        memcpy(data + head, m->payload, m->payload_size);
    o->head = conn->protocol->reply(data + sizeof *o, data + head, m);
    o->head_len = (size_t)(data + head + m->payload_size - o->head);
    o->chunk = chunk;
    o->tail = m->attachment_size ? m->payload + m->payload_size : NULL;
    o->tail_len = m->attachment_size;
    return o;
}

/* Answers a request with an error, without a context. Locked. Without memory for the answer the
 * connection is closed, because a peer must not wait for a reply that cannot come. */
CRPCI_COLD void crpci_context_refuse(crpci_conn *conn, const crpci_message *m, int code,
                                     const char *text)
{
    crpci_message reply;
    crpci_out *o;
    if (!CRPC_ENABLE_TEXTS)
        text = crpc_status_name(code);
    memset(&reply, 0, sizeof reply);
    reply.kind = CRPCI_MESSAGE_REPLY;
    reply.id = m->id;
    reply.status = code;
    reply.text = crpc_view_of(text, crpci_base_min(strlen(text), CRPC_ERROR_TEXT_MAX));
    o = crpci_context_frame(conn, &reply);
    conn->loop->stats.limited += code == CRPC_ELIMIT;
    if (o)
        crpci_conn_reply(conn, o, m->turn);
    else
        crpci_conn_close(conn, CRPC_ENOMEM, 0);
}

CRPC_API void *crpc_context_alloc(crpc_context *x, size_t size)
{
    crpci_chunk *c = crpci_heap_chunk(x->loop->heap, size);
    if (!c)
        return NULL;
    c->next = x->extra;
    x->extra = c;
    return memset(crpci_heap_data(c), 0, size);
}

/* Sets the text of an error reply. Without memory the reply has the text of its status. */
CRPCI_COLD CRPC_PRINTF(2, 0) void crpci_context_vexplain(crpc_context *x, const char *format,
                                                         va_list ap)
{
    if (!x->text)
        x->text = (char *)crpc_context_alloc(x, CRPC_ERROR_TEXT_MAX);
    if (x->text)
        vsnprintf(x->text, CRPC_ERROR_TEXT_MAX, format, ap);
}

/* Texts that crpc itself gives to failed requests: CRPC_ENABLE_TEXTS=0 leaves them out, and the
 * reply has the name of its status. The texts of handlers are always sent. */
#if CRPC_ENABLE_TEXTS
#define crpci_context_error crpc_context_error
#else
#define crpci_context_error(x, status, ...)                                                        \
    (0 ? crpc_context_error(x, status, __VA_ARGS__) : (status))
#endif

CRPC_API int crpc_context_fail(crpc_context *x, int app_code, const char *format, ...)
{
    va_list ap;
    if (crpci_status_reserved(app_code))
        return crpci_context_error(x, CRPC_EINTERNAL,
                                   "crpc_context_fail: code %d is reserved (0-199, 1000-3999)",
                                   app_code);
    x->app_code = app_code;
    va_start(ap, format);
    crpci_context_vexplain(x, format, ap);
    va_end(ap);
    return CRPC_EAPP;
}

CRPC_API int crpc_context_error(crpc_context *x, int status, const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    crpci_context_vexplain(x, format, ap);
    va_end(ap);
    return status;
}

CRPC_API int crpc_context_add_field(crpc_context *x, const char *key, const char *value)
{
    const crpci_protocol *p = x->conn->protocol;
    crpci_message_out *o = &x->fields;
    size_t more;
    if (!key || !value)
        return CRPC_EINVAL;
    more = strlen(key) + strlen(value) + p->field_cost;
    if (o->len + more + p->headroom + CRPC_ERROR_TEXT_MAX > CRPCI_PROTOCOL_HEAD_MAX)
        return CRPC_EINVAL;
    o->heap = x->loop->heap;
    if (!o->chunk)
        o->chunk = crpci_heap_chunk(o->heap, 64);
    if (!o->chunk || !crpci_message_reserve(o, more))
        return CRPC_ENOMEM;
    o->len += p->put_field(crpci_heap_data(o->chunk) + o->len, crpc_view_str(key),
                           crpc_view_str(value));
    return CRPC_OK;
}

/* Encodes the response at o->len, where the payload begins; `room` bytes of head come before it.
 * CRPC_EINTERNAL: it cannot be encoded, or the frame would be over 2 GiB; the text says which. */
CRPCI_FN int crpci_context_encode_response(crpc_context *x, crpci_message_out *o, size_t payload,
                                           size_t room)
{
    const char *why = "";
    int err = crpci_message_encode(o, x->method->response.desc, x->response, &why);
    if (CRPCI_LIKELY(!err) && o->len - payload + crpc_view_size(x->attachment) + room > INT32_MAX) {
        err = CRPC_ECODEC;
        why = CRPCI_STATUS_TEXT("it is over 2 GiB with its attachment");
    }
    return CRPCI_LIKELY(!err) ? CRPC_OK
                              : crpci_context_error(x, CRPC_EINTERNAL,
                                                    "the response could not be encoded: %s", why);
}

/* Builds the reply of a finished request, and says in *m what it consists of. Layout from `front`:
 * crpci_out, the fields, room into which the protocol writes the head backwards from the payload,
 * the payload. The context's own block is used if it is large enough; the encoder moves to a larger
 * chunk (and clears o.lent) if it turns out too small. NULL: out of memory. */
CRPCI_FN crpci_out *crpci_context_encode(crpc_context *x, int status, crpci_message *m)
{
    const crpci_protocol *p = x->conn->protocol;
    const char *text = !status ? "" : x->text ? x->text : crpc_status_text(status);
    size_t words = status ? strlen(text) : 0, payload;
    size_t room = p->headroom + words + x->fields.len, front = x->reply_at;
    size_t head = sizeof(crpci_out) + x->fields.len + room;
    crpci_message_out o;
    crpci_out *out;
    uint8_t *data;
    o.heap = x->loop->heap;
    o.no_memory = false;
    o.chunk = x->block;
    o.lent = x->block->cap >= front + head;
    if (CRPCI_UNLIKELY(!o.lent)) {
        front = 0;
        o.chunk = crpci_heap_chunk(o.heap, head + (status ? 0 : x->method->response.size + 64));
    }
    if (!o.chunk)
        return NULL;
    payload = o.len = front + head;
    if (!status) {
        int err = crpci_context_encode_response(x, &o, payload, room);
        if (CRPCI_UNLIKELY(err)) {
            if (!o.lent)
                crpci_heap_chunk_unref(o.chunk);
            return crpci_context_encode(x, err, m);
        }
    }
    data = crpci_heap_data(o.chunk) + front;
    out = (crpci_out *)(void *)data;
    if (x->fields.len)
        memcpy(data + sizeof *out, crpci_heap_data(x->fields.chunk), x->fields.len);
    m->kind = CRPCI_MESSAGE_REPLY;
    m->id = x->id;
    m->status = status;
    m->text = crpc_view_of(text, words);
    m->fields = crpc_view_of(data + sizeof *out, x->fields.len);
    m->payload = data + head;
    m->payload_size = o.len - payload;
    m->attachment_size = status ? 0 : crpc_view_size(x->attachment);
    out->head = p->reply(data + sizeof *out + x->fields.len, data + head, m);
    out->head_len = (size_t)(data + head + m->payload_size - out->head);
    out->chunk = o.chunk;
    out->owner = NULL; /* the chunk is the frame's */
    out->tail = (const uint8_t *)crpc_view_data(x->attachment);
    out->tail_len = m->attachment_size;
    out->tail_chunk = NULL;
    if (m->attachment_size) {
        out->tail_chunk = x->attachment_chunk;
        crpci_heap_chunk_ref(out->tail_chunk);
    }
    if (o.lent) /* the context goes before the reply is sent, and its block with the reply */
        x->block = NULL;
    return out;
}

/* Frees a context; the block goes last, because it holds the struct. Any thread, no lock needed. */
CRPCI_FN void crpci_context_free(crpc_context *x)
{
    crpci_chunk *extra;
    while ((extra = x->extra) != NULL) {
        x->extra = extra->next;
        crpci_heap_chunk_unref(extra);
    }
    crpci_heap_chunk_unref(x->fields.chunk);
    crpci_heap_chunk_unref(x->attachment_chunk);
    crpci_heap_chunk_unref(x->chunk);
    crpci_heap_chunk_unref(x->block);
}

/* --- requests in service ---------------------------------------------------------------------- */

/* Counts requests in service. One thread alone counts if there are no I/O threads: no atomics. */
CRPCI_FN void crpci_context_count(crpc_server *s, uint32_t by)
{
    if (s->options.io_threads)
        crpci_thread_add(&s->serving, by);
    else
        s->serving += by;
}

/* A connection with requests in service keeps itself, its loop and the server. Locked. */
CRPCI_FN void crpci_context_begin(crpc_server *s, crpci_conn *conn)
{
    crpci_context_count(s, 1);
    if (conn->busy++)
        return;
    crpci_conn_hold(conn);
    crpci_loop_hold(conn->loop);
    crpci_thread_ref(&s->refs);
    crpci_thread_ref(&s->active);
}

/* Undoes crpci_context_begin for one request. Locked. True: it was the connection's last one, and
 * crpci_context_release is due when the loop is unlocked. */
CRPCI_FN bool crpci_context_end(crpci_conn *conn)
{
    crpc_server *s = (crpc_server *)conn->owner;
    crpci_context_count(s, (uint32_t)-1);
    if (--conn->busy)
        return false;
    if (CRPC_ENABLE_POLICY && conn->closed)
        s->guard.ops->leave(s, conn->account);
    crpci_conn_drop(conn);
    return true;
}

/* Gives up a reference; the last one frees the server, which takes no lock but the heap's. */
CRPCI_FN void crpci_context_drop_server(crpc_server *s)
{
    if (crpci_thread_unref(&s->refs))
        s->destroy(s);
}

/* Gives up the references that crpci_context_begin took for a connection with requests. */
CRPCI_FN void crpci_context_release(crpc_server *s, crpc_loop *l)
{
    __atomic_fetch_sub(&s->active, 1, __ATOMIC_ACQ_REL);
    crpci_loop_release(l);
    crpci_context_drop_server(s);
}

/* Frees a context whose request has been refused. Locked; the loop is at work for the server, so
 * the references given up here are not the last ones. */
CRPCI_COLD void crpci_context_reject(crpc_context *x)
{
    crpc_server *s = x->server;
    crpci_conn *conn = x->conn;
    crpci_context_free(x);
    if (crpci_context_end(conn))
        crpci_context_release(s, conn->loop);
}

/* Stops reading a connection that has CRPCI_CONTEXT_CONN_MAX requests in service, or whose unsent
 * replies take more than max_queued bytes; reads it again when both have fallen to half. Locked. */
CRPCI_FN void crpci_context_throttle(crpci_conn *conn)
{
    const crpc_server *s = (const crpc_server *)conn->owner;
    int64_t max = s->options.limits.max_queued;
    if (!conn->paused && (conn->busy >= CRPCI_CONTEXT_CONN_MAX || (max && conn->tx_memory > max)))
        crpci_conn_pause(conn, true);
    else if (conn->paused && conn->busy < CRPCI_CONTEXT_CONN_MAX / 2 &&
             (!max || conn->tx_memory <= max / 2))
        crpci_conn_pause(conn, false);
}

/* After the end of input: closes the connection when every request is answered and every reply
 * sent. A peer that takes no byte of them for frame_timeout_ms is closed before. Locked. */
CRPCI_FN void crpci_context_close_if_done(crpci_conn *conn)
{
    if (!conn->eof || conn->busy || conn->left || conn->closed)
        return;
    if (!conn->tx_head) {
        crpci_conn_close(conn, CRPC_ECLOSE, 0);
    } else if (!conn->close_when_sent) {
        conn->close_when_sent = true;
        conn->linger_bytes = conn->tx_bytes; /* the timer compares: has the peer taken any? */
        if (conn->frame_timeout_us)
            crpci_loop_timer_set(conn->loop, &conn->timer, conn->frame_timeout_us);
    }
}

/* --- the end of a request --------------------------------------------------------------------- */

/* The code that the reply carries for a handler's status: the application's code, or a crpc_status.
 * Any other number is a mistake of the handler; below 200 it is likely an errno value, which means
 * something else on another architecture. */
CRPCI_FN int crpci_context_code(crpc_context *x, int status)
{
    if (CRPCI_LIKELY(status == CRPC_OK))
        return CRPC_OK;
    if (status == CRPC_EAPP && x->app_code)
        return x->app_code;
    if (status > 199 && crpci_status_reserved(status))
        return status;
    return crpci_context_error(x, CRPC_EINTERNAL,
                               "the handler returned %d, which is no crpc_status; an "
                               "application's code is set with crpc_context_fail",
                               status);
}

/* Ends a request up to the queueing of its reply: runs the interceptors' `after` in reverse order
 * and encodes the reply. Without the lock, because encoding may take long. If the server has
 * stopped there is no reply: crpc_server_close may have returned, so services and interceptors of
 * the program must not be touched. */
CRPCI_FN void crpci_context_conclude(crpc_context *x, int status)
{
    const crpc_server *s = x->server;
    crpci_message m;
    int code;
    if (CRPCI_UNLIKELY(crpci_thread_load(&s->state) == CRPCI_SERVER_STOPPED)) {
        if (crpci_context_guarded(x))
            s->guard.ops->end(x, NULL, -1);
        return;
    }
    while (x->intercepted) {
        const crpc_server_interceptor *i = &s->options.interceptors[--x->intercepted];
        if (i->after)
            i->after(i->user, x, status);
    }
    code = crpci_context_code(x, status);
    if (x->app_code && code == x->app_code &&
        crpc_context_add_field(x, CRPCI_MESSAGE_APP_FIELD, "1"))
        crpci_heap_log(s->heap, CRPC_LOG_WARN,
                       "server: out of memory: a client takes the handler's error for crpc's own");
    x->reply = CRPCI_LIKELY(!crpci_context_guarded(x)) ? crpci_context_encode(x, code, &m)
                                                       : s->guard.ops->encode(x, code);
}

/* Frees the context of a concluded request and queues its reply; the caller or the driver sends it.
 * Locked. The connection may have closed in the meantime: then the reply is dropped. True:
 * crpci_context_release is due. */
CRPCI_FN bool crpci_context_reply(crpc_context *x)
{
    crpci_conn *conn = x->conn;
    crpci_out *reply = x->reply;
    uint32_t turn = x->turn;
    bool last;
    if (x->chunk)
        crpci_loop_unshare(x->loop, x->chunk);
    x->chunk = NULL;
    crpci_context_free(x);
    crpci_conn_hold(conn);
    last = crpci_context_end(conn);
    if (conn->closed) {
        if (reply)
            crpci_conn_out_free(reply);
    } else if (reply) {
        crpci_conn_reply(conn, reply, turn);
        crpci_context_throttle(conn);
        crpci_context_close_if_done(conn);
    } else {
        crpci_conn_close(conn, CRPC_ENOMEM, 0);
    }
    crpci_conn_drop(conn);
    return last;
}

/* Ends a request on any thread, without the lock. CRPC_EGONE: nobody gets the reply, because the
 * connection is closed, the server has stopped, or there was no memory for it. */
CRPCI_FN int crpci_context_complete(crpc_context *x, int status)
{
    crpc_server *s = x->server;
    crpc_loop *l = x->loop;
    bool gone, last;
    crpci_context_conclude(x, status);
    crpci_loop_lock(l);
    gone = !x->reply || x->conn->closed;
    last = crpci_context_reply(x);
    if (crpci_loop_may_send(l))
        crpci_loop_run_list(l, &l->dirty);
    crpci_loop_unlock(l);
    if (last)
        crpci_context_release(s, l);
    return gone ? CRPC_EGONE : CRPC_OK;
}

/* --- handlers --------------------------------------------------------------------------------- */

/* Checks the deadline, runs the interceptors, decodes the request and runs its handler, without the
 * lock. What an interceptor refuses is not decoded. Returns the status of the reply. After
 * CRPC_EPENDING x may be gone: another thread may have finished it already. */
CRPCI_FN int crpci_context_serve(crpc_context *x)
{
    const crpc_server *s = x->server;
    const crpc_method *m = x->method->method;
    const char *why = "";
    int err = CRPC_OK;
    if (CRPCI_UNLIKELY(x->origin.deadline_us != INT64_MAX) &&
        crpci_heap_rough_now(s->heap) >= x->origin.deadline_us)
        return crpci_context_error(x, CRPC_ETIMEDOUT, "deadline passed before the handler ran");
    if (crpci_thread_load(&s->state) >= CRPCI_SERVER_STOPPED)
        return CRPC_ELOGOFF;
    while (x->intercepted < s->options.interceptor_count && !err) {
        const crpc_server_interceptor *i = &s->options.interceptors[x->intercepted];
        err = i->before ? i->before(i->user, x) : CRPC_OK;
        if (!err)
            x->intercepted++;
    }
    if (err)
        return err;
    if (!crpci_message_decode(x->payload, x->payload_size, &x->method->request, x->request, &why))
        return crpci_context_error(x, CRPC_EREQUEST, "%s.%s: request does not decode: %s",
                                   m->service, m->name, why);
    if (!m->serve)
        return CRPC_ENOMETHOD;
    if (CRPCI_UNLIKELY(crpci_context_guarded(x)))
        return s->guard.ops->serve(x);
    return m->serve(x, x->request, x->response, x->method->handlers);
}

/* Runs a request on the I/O thread, as a task of the loop. The reply is queued in the hold of the
 * lock that follows user code anyway, and the driver sends it before it sleeps. */
CRPCI_FN void crpci_context_run(crpc_loop *l, crpc_context *x)
{
    crpc_server *s = x->server;
    int status;
    crpci_loop_user_begin(l);
    status = crpci_context_serve(x);
    if (status != CRPC_EPENDING)
        crpci_context_conclude(x, status);
    crpci_loop_user_end(l);
    if (status != CRPC_EPENDING && crpci_context_reply(x))
        crpci_context_release(s, l);
}

/* Hands a request to the workers, or makes it a task of its loop, which is locked then. Returns
 * NULL, or the text with which to refuse it; one that was `admitted` before is not refused. From
 * here on another thread may run the request and free its context. */
CRPCI_FN const char *crpci_context_dispatch(crpc_context *x, bool admitted)
{
    crpc_server *s = x->server;
    if (!s->worker_count)
        crpci_loop_ready(x->loop, &x->task);
    else if (!crpci_worker_put(&s->workers, &x->task, admitted))
        return CRPCI_CONTEXT_CROWDED;
    return NULL;
}

/* Runs a request. A worker passes NULL as the loop, and holds no lock. */
CRPCI_FN void crpci_context_task(crpc_loop *l, crpci_task *task)
{
    crpc_context *x = CRPCI_CONTAINER(task, crpc_context, task);
    int status;
    if (l) {
        crpci_context_run(l, x);
        return;
    }
    status = crpci_context_serve(x);
    if (status != CRPC_EPENDING)
        crpci_context_complete(x, status);
}

/* Makes the context of a request. One chunk holds the context, request, response and, in most
 * cases, received bytes and reply: one allocation a request. The deadline counts from the request's arrival. NULL:
 * out of memory. Locked. */
CRPCI_FN crpc_context *crpci_context_new(crpc_server *s, crpci_conn *conn, const crpci_message *m,
                                         const crpci_service_method *method)
{
    const size_t align = 15, zero = offsetof(crpc_context, chunk);
    size_t at = (sizeof(crpc_context) + align) & ~align;
    size_t response_at = (at + method->request.size + align) & ~align;
    size_t copy_at = (response_at + method->response.size + align) & ~align;
    const uint8_t *from = (const uint8_t *)crpc_view_data(m->fields), *to = from;
    size_t size = (size_t)(m->payload + m->payload_size + m->attachment_size - from);
    size_t reply_at = copy_at + (size <= CRPCI_CONTEXT_COPY ? (size + align) & ~align : 0);
    crpci_chunk *block =
        crpci_heap_chunk(conn->loop->heap, reply_at + sizeof(crpci_out) + conn->protocol->headroom +
                                               64 + method->response.size);
    crpc_context *x;
    if (!block)
        return NULL;
    x = (crpc_context *)(void *)crpci_heap_data(block);
    memset((char *)x + zero, 0, copy_at - zero);
    x->origin.log_id = x->origin.trace_id = x->origin.span_id = 0;
    x->block = block;
    x->request = (char *)x + at;
    x->response = (char *)x + response_at;
    x->reply_at = reply_at;
    x->server = s;
    x->loop = conn->loop;
    x->conn = conn;
    if (CRPCI_LIKELY(reply_at > copy_at)) {
        to = (const uint8_t *)memcpy((char *)x + copy_at, from, size);
    } else {
        x->chunk = m->chunk;
        crpci_loop_share(conn->loop, m->chunk);
    }
    x->received.at[0] = to;
    x->received.end = to + ((const uint8_t *)m->fields.end - from);
    x->id = m->id;
    x->turn = m->turn;
    x->payload = to + (m->payload - from);
    x->payload_size = m->payload_size;
    x->attachment_size = m->attachment_size;
    x->method = method;
    if (!m->usual) {
        if (crpc_view_data(m->credential))
            x->credential = crpc_view_of(
                to + ((const uint8_t *)crpc_view_data(m->credential) - from),
                crpc_view_size(m->credential));
        x->origin.log_id = m->log_id;
        x->origin.trace_id = m->trace_id;
        x->origin.span_id = m->span_id;
    }
    x->origin.deadline_us =
        m->timeout_ms > 0 ? conn->active_us + (int64_t)m->timeout_ms * 1000 : INT64_MAX;
    crpci_loop_task_init(&x->task, crpci_context_task);
    crpci_context_begin(s, conn);
    return x;
}

/* --- the handler's side ----------------------------------------------------------------------- */

CRPC_API int crpc_context_finish(crpc_context *x, int status)
{
    return crpci_context_complete(x, status == CRPC_EPENDING ? CRPC_EINTERNAL : status);
}

CRPC_API void *crpc_context_response(crpc_context *x)
{
    return x->response;
}

CRPC_API void *crpc_context_user(const crpc_context *x)
{
    return x->method->user;
}

CRPC_API const crpc_method *crpc_context_method(const crpc_context *x)
{
    return x->method->method;
}

CRPC_API crpc_view crpc_context_attachment(const crpc_context *x)
{
    return crpc_view_of(x->attachment_size ? x->payload + x->payload_size : NULL,
                        x->attachment_size);
}

CRPC_API int crpc_context_set_attachment(crpc_context *x, crpc_view bytes)
{
    const uint8_t *p = (const uint8_t *)crpc_view_data(bytes);
    const uint8_t *in = x->payload + x->payload_size;
    size_t n = crpc_view_size(bytes);
    crpci_chunk *chunk = x->chunk ? x->chunk : x->block;
    if (n > INT32_MAX)
        return CRPC_EINVAL;
    if (n && p >= in && p + n <= in + x->attachment_size) { /* the request's own: not copied */
        crpci_heap_chunk_ref(chunk);
    } else if (n) {
        chunk = crpci_heap_chunk(x->loop->heap, n);
        if (!chunk)
            return CRPC_ENOMEM;
        memcpy(crpci_heap_data(chunk), p, n);
        p = crpci_heap_data(chunk);
    } else {
        chunk = NULL;
    }
    crpci_heap_chunk_unref(x->attachment_chunk);
    x->attachment_chunk = chunk;
    x->attachment = crpc_view_of(n ? p : NULL, n);
    return CRPC_OK;
}

CRPC_API bool crpc_context_field(const crpc_context *x, const char *key, crpc_view *value)
{
    return x->conn->protocol->field(x->received, key, value);
}

CRPC_API crpc_view crpc_context_credential(const crpc_context *x)
{
    return x->credential;
}

CRPC_API int64_t crpc_context_log_id(const crpc_context *x)
{
    return x->origin.log_id;
}

CRPC_API int64_t crpc_context_remaining_us(const crpc_context *x)
{
    return x->origin.deadline_us == INT64_MAX
               ? INT64_MAX
               : x->origin.deadline_us - crpci_heap_now(x->server->heap);
}

CRPC_API const char *crpc_context_peer(crpc_context *x)
{
    if (!x->peer)
        x->peer = (char *)crpc_context_alloc(x, CRPCI_SOCK_NAME_MAX);
    if (!x->peer)
        return "";
    crpci_sock_name_format(&x->conn->peer, x->peer, CRPCI_SOCK_NAME_MAX);
    return x->peer;
}

/* ======================================================================== */
/* >>impl-guard   requests that are limited, keep an order, or come again   */
/* ======================================================================== */

/* A request gets a crpci_guard if its method or client is limited, if it has an ordering key, or if
 * it has a request id, under which it may arrive again. Intake calls crpci_guard_inspect, _limit
 * and _start in this order with the loop locked; crpci_guard_ops do the rest without that lock, on
 * the thread that uses the context. s->guard.lock protects quotas, clients, order and replay
 * entries. It is held for bookkeeping only, never while a handler runs. */

/* The guard's part of one request. Intake fills one on its stack; a request that is let in has a
 * copy in its context's memory. */
typedef struct crpci_guard {
    crpc_context *context;
    bool ordered; /* `order` is in s->guard.order, or about to be */
    crpci_order_item order;
    crpc_view id;              /* request id, in the request's bytes; empty: none */
    crpci_replay_entry *entry; /* of the id, if this request is the one that executes; else NULL */
    crpci_peer_account *account; /* of the peer; the connection holds it while it is open */
    bool repeats;              /* another request with the id has executed; its answer serves */
    crpci_chunk *reply;        /* that answer, a reference; NULL: it was not kept */
    crpci_quota *quota; /* entered and still to be left; NULL: none */
    int64_t since;      /* when the request arrived; set if it has a quota or a client */
} crpci_guard;

/* Lets a request in: it runs now, or when its turn comes. Returns NULL, or the text with which to
 * refuse it. `of` is copied. Locked. The turn is taken before the request is handed over: its
 * handler may end at once on another thread, and would pass on a turn that it does not have. */
CRPCI_COLD const char *crpci_guard_start(crpc_context *x, const crpci_guard *of)
{
    crpc_server *s = x->server;
    crpci_guard *g;
    const char *why = NULL;
    int err;
    if (!of->ordered && !of->quota && !crpc_view_size(of->id))
        return crpci_context_dispatch(x, false);
    x->guard = g = (crpci_guard *)crpc_context_alloc(x, sizeof *g);
    if (!g)
        return CRPCI_STATUS_TEXT("out of memory");
    *g = *of;
    g->context = x;
    if (crpc_view_size(g->id)) /* in the bytes that the context keeps */
        x->conn->protocol->field(x->received, CRPCI_MESSAGE_ID_FIELD, &g->id);
    if (!g->ordered)
        return crpci_context_dispatch(x, false);
    crpci_thread_lock(&s->guard.lock);
    err = crpci_order_enter(&s->guard.order, &g->order);
    if (err == CRPC_ELIMIT)
        why = CRPCI_CONTEXT_CROWDED;
    else if (!err)
        why = crpci_context_dispatch(x, false);
    if (!err && why)
        crpci_order_leave(&s->guard.order, &g->order); /* still locked: none waits behind it */
    crpci_thread_unlock(&s->guard.lock);
    return why;
}

/* Runs a request that was let in before and whose turn has come. False: the server has stopped. No
 * lock is held. */
CRPCI_COLD bool crpci_guard_resume(crpc_context *x)
{
    crpc_server *s = x->server;
    bool ok;
    if (s->worker_count)
        return !crpci_context_dispatch(x, true);
    crpci_loop_lock(x->loop);
    ok = crpci_thread_load(&s->state) != CRPCI_SERVER_STOPPED; /* else nobody may drive the loop */
    if (ok)
        crpci_context_dispatch(x, true);
    crpci_loop_unlock(x->loop);
    return ok;
}

/* Gives up a request's turn. Returns the context of the next one with its key; NULL: none waits. */
CRPCI_COLD crpc_context *crpci_guard_leave(crpc_server *s, crpci_guard *g)
{
    crpci_order_item *next;
    crpci_thread_lock(&s->guard.lock);
    next = crpci_order_leave(&s->guard.order, &g->order);
    crpci_thread_unlock(&s->guard.lock);
    g->ordered = false;
    return next ? CRPCI_CONTAINER(next, crpci_guard, order)->context : NULL;
}

/* Passes the turn on to the next request with the key. If the server has stopped, all that wait get
 * CRPC_ELOGOFF. Each gives up its turn before it is completed, so that its own end does not pass
 * the turn on again: the queue is emptied by this loop, not by recursion. */
CRPCI_COLD void crpci_guard_pass(crpc_server *s, crpci_guard *g)
{
    crpc_context *x = crpci_guard_leave(s, g);
    while (x && !crpci_guard_resume(x)) {
        crpc_context *next = crpci_guard_leave(s, x->guard);
        crpci_context_complete(x, CRPC_ELOGOFF);
        x = next;
    }
}

/* One more reference of a kept reply; NULL stays NULL. */
CRPCI_COLD crpci_chunk *crpci_guard_ref(crpci_chunk *reply)
{
    if (reply)
        crpci_heap_chunk_ref(reply);
    return reply;
}

/* Returns the status of a repeated request: that of the kept reply. A reply is kept in the encoding
 * of one protocol; for a connection with another one it counts as not kept. */
CRPCI_COLD int crpci_guard_status(crpc_context *x)
{
    crpci_guard *g = x->guard;
    const crpci_replay_reply *r;
    g->repeats = true;
    r = g->reply ? (const crpci_replay_reply *)(const void *)crpci_heap_data(g->reply) : NULL;
    if (r && r->protocol == x->conn->protocol) {
        if (crpci_status_reserved(r->m.status))
            return r->m.status;
        x->app_code = r->m.status;
        return CRPC_EAPP;
    }
    crpci_heap_chunk_unref(g->reply);
    g->reply = NULL;
    return crpci_context_error(x, CRPC_EINTERNAL,
                               "the request was executed before, but its reply was not kept");
}

/* A digest of a request's message and attachment. */
CRPCI_COLD uint64_t crpci_guard_digest(const crpc_context *x)
{
    return crpci_base_siphash(x->server->guard.replay.secret, x->payload,
                              x->payload_size + x->attachment_size) ^ x->attachment_size;
}

/* Gives a new request an entry, charged to its peer's account. False: none is free, or the account
 * has its share. The guard is locked. */
CRPCI_COLD bool crpci_guard_remember(crpc_context *x, uint64_t digest)
{
    crpc_server *s = x->server;
    crpci_replay *r = &s->guard.replay;
    crpci_guard *g = x->guard;
    g->account->held[CRPCI_PEER_REPLAYS]++;
    if (crpci_peer_may_keep(&s->guard.peers, g->account, CRPCI_PEER_REPLAYS, r->count + 1, r->max,
                            NULL))
        g->entry = crpci_replay_add(r, x->method, g->id, digest, g->account);
    if (!g->entry)
        crpci_peer_release(&s->guard.peers, g->account, CRPCI_PEER_REPLAYS,
                           crpci_heap_now(s->heap));
    return g->entry != NULL;
}

/* Runs the handler of a request, unless its id has come before. Then either the first request is
 * still executing, and its crpci_guard_end will complete x (CRPC_EPENDING: x may be gone), or it
 * has ended, and x is answered with the kept reply. */
CRPCI_COLD int crpci_guard_serve(crpc_context *x)
{
    crpc_server *s = x->server;
    crpci_guard *g = x->guard;
    crpci_replay_entry *e = NULL;
    bool waits = false, full = false, other = false;
    if (crpc_view_size(g->id)) {
        uint64_t digest = crpci_guard_digest(x);
        crpci_thread_lock(&s->guard.lock);
        e = crpci_replay_find(&s->guard.replay, x->method, g->id, crpci_heap_rough_now(s->heap));
        other = e && e->digest != digest;
        waits = e && !other && !e->finished;
        if (!e)
            full = !crpci_guard_remember(x, digest);
        else if (waits)
            crpci_list_append(&e->waiting, &x->task.link);
        else if (!other)
            g->reply = crpci_guard_ref(e->reply);
        s->guard.replayed += e && !other;
        crpci_thread_unlock(&s->guard.lock);
    }
    if (waits)
        return CRPC_EPENDING;
    if (other)
        return crpci_context_error(x, CRPC_EREQUEST,
                                   "another request had the same id (crpc-rid) before");
    if (full)
        return crpci_context_error(x, CRPC_ELIMIT,
                                   "no entry is free to remember the request (replay_entries)");
    if (e)
        return crpci_guard_status(x);
    return x->method->method->serve(x, x->request, x->response, x->method->handlers);
}

/* Leaves the quota, if one was entered. `served`: 1: the handler gave an answer, an application's
 * error included; 0: it failed; -1: the latency is no measure of the handler. */
CRPCI_COLD void crpci_guard_quit(crpc_server *s, crpci_guard *g, int served)
{
    int64_t now;
    if (!g->quota)
        return;
    now = crpci_heap_now(s->heap);
    crpci_thread_lock(&s->guard.lock);
    crpci_quota_leave(g->quota, served > 0, served < 0 ? -1 : now - g->since, now);
    crpci_thread_unlock(&s->guard.lock);
    g->quota = NULL;
}

/* Ends the guard's part of a request: leaves the quota, keeps the reply `m` (NULL: there is none)
 * and completes the requests with the same id that wait for it, then passes the turn on. The turn
 * goes last: the next request of the key must find what this one has left. No lock is held. */
CRPCI_COLD void crpci_guard_end(crpc_context *x, const crpci_message *m, int served)
{
    crpc_server *s = x->server;
    crpci_guard *g = x->guard;
    crpci_chunk *reply = NULL;
    crpci_list waiting;
    crpci_list_init(&waiting);
    crpci_guard_quit(s, g, served);
    if (g->entry) {
        if (m)
            reply = crpci_replay_copy(s->heap, x->conn->protocol, m, crpc_view_data(x->attachment));
        crpci_thread_lock(&s->guard.lock);
        crpci_replay_finish(&s->guard.replay, g->entry, reply, crpci_heap_rough_now(s->heap),
                            &waiting);
        crpci_thread_unlock(&s->guard.lock);
    }
    while (!crpci_list_empty(&waiting)) {
        crpci_task *t = CRPCI_CONTAINER(waiting.next, crpci_task, link);
        crpc_context *w = CRPCI_CONTAINER(t, crpc_context, task);
        crpci_list_remove(&t->link);
        w->guard->reply = crpci_guard_ref(reply);
        crpci_context_complete(w, crpci_guard_status(w));
    }
    crpci_heap_chunk_unref(reply);
    crpci_heap_chunk_unref(g->reply);
    g->reply = NULL;
    if (g->ordered)
        crpci_guard_pass(s, g);
}

/* Builds the reply of a request with a guard: the kept one for a repeated request, else a new one.
 * The attachment of a kept reply is sent from its chunk, which the frame therefore holds. */
CRPCI_COLD crpci_out *crpci_guard_encode(crpc_context *x, int code)
{
    crpci_chunk *reply = x->guard->repeats ? x->guard->reply : NULL;
    crpci_message m;
    crpci_out *out;
    if (reply) {
        m = ((const crpci_replay_reply *)(const void *)crpci_heap_data(reply))->m;
        m.id = x->id;
        out = crpci_context_frame(x->conn, &m);
        if (out && out->tail_len)
            out->tail_chunk = crpci_guard_ref(reply);
    } else {
        memset(&m, 0, sizeof m);
        out = crpci_context_encode(x, code, &m);
    }
    crpci_guard_end(x, reply || !out ? NULL : &m, x->guard->repeats ? -1 : !code || x->app_code);
    return out;
}

/* --- connections ------------------------------------------------------------------------------ */

/* Counts a new connection for its account. NULL: out of memory. */
CRPCI_COLD crpci_peer_account *crpci_guard_connect(crpc_server *s, const crpci_sock_name *peer)
{
    crpci_peer_account *account;
    crpci_thread_lock(&s->guard.lock);
    account = crpci_peer_connect(&s->guard.peers, peer, crpci_heap_now(s->heap));
    crpci_thread_unlock(&s->guard.lock);
    return account;
}

/* Gives back what crpci_guard_connect took, when the connection is closed and its requests have
 * ended. */
CRPCI_COLD void crpci_guard_disconnect(crpc_server *s, void *account)
{
    crpci_thread_lock(&s->guard.lock);
    crpci_peer_release(&s->guard.peers, (crpci_peer_account *)account, CRPCI_PEER_CONNECTIONS,
                       crpci_heap_now(s->heap));
    crpci_thread_unlock(&s->guard.lock);
}

/* Whether a connection of account `own`, counted already, may stay when `count` connections are
 * open with it; if *victim is not NULL, only when one of that account's is closed. */
CRPCI_COLD bool crpci_guard_has_room(crpc_server *s, const crpci_peer_account *own, uint32_t count,
                                     const crpci_peer_account **victim)
{
    uint32_t most = (uint32_t)s->options.max_connections;
    bool may;
    crpci_thread_lock(&s->guard.lock);
    may = crpci_peer_may_keep(&s->guard.peers, own, CRPCI_PEER_CONNECTIONS, count,
                              most ? most : UINT32_MAX, victim);
    crpci_thread_unlock(&s->guard.lock);
    return may;
}

static const crpci_context_guard crpci_guard_ops = {crpci_guard_serve, crpci_guard_encode,
                                                    crpci_guard_end, crpci_guard_disconnect};

/* --- admission -------------------------------------------------------------------------------- */

/* Reads ordering key and request id from the fields of a request. With the option `ordered`
 * requests without a key keep the order of their connection. False: the request was refused. */
CRPCI_COLD bool crpci_guard_inspect(crpc_server *s, crpci_conn *conn, const crpci_message *m,
                                    crpci_guard *g)
{
    bool fields = !m->usual && m->has_fields;
    crpc_view key;
    memset(g, 0, sizeof *g);
    g->account = (crpci_peer_account *)conn->account;
    if (fields && s->options.ordered >= 0 &&
        conn->protocol->field(m->fields, CRPCI_MESSAGE_KEY_FIELD, &key)) {
        g->ordered = true;
        g->order.key = crpci_base_siphash(s->guard.peers.secret, crpc_view_data(key),
                                          crpc_view_size(key));
    } else if (s->options.ordered > 0) {
        g->ordered = true;
        g->order.of = conn;
        g->order.key = crpci_base_mix((uint64_t)(uintptr_t)conn);
    }
    if (!fields || !s->guard.replay.buckets ||
        !conn->protocol->field(m->fields, CRPCI_MESSAGE_ID_FIELD, &g->id) ||
        crpc_view_size(g->id) <= CRPCI_REPLAY_ID_MAX)
        return true;
    crpci_context_refuse(conn, m, CRPC_EREQUEST, "the request id (crpc-rid) is over 64 bytes");
    return false;
}

/* Charges a request to its client's rate and to its method's limits. Returns NULL, or the text with
 * which it is to be refused; a token of the client is spent even if the method then refuses. */
CRPCI_COLD const char *crpci_guard_limit(crpc_server *s, const crpci_conn *conn, crpci_quota *q,
                                         crpci_guard *g)
{
    crpci_peer_account *account = (crpci_peer_account *)conn->account;
    const char *why = NULL;
    g->since = conn->active_us;
    crpci_thread_lock(&s->guard.lock);
    if (account && !crpci_limiter_bucket_take(&account->bucket, g->since))
        why = CRPCI_STATUS_TEXT("too many requests of this client in a second (rate_per_client)");
    else if (q)
        why = crpci_quota_enter(q, g->since);
    crpci_thread_unlock(&s->guard.lock);
    g->quota = why ? NULL : q;
    return why;
}

/* --- opening ---------------------------------------------------------------------------------- */

/* Gives a method a quota of its own. One that an earlier limit or an earlier start that failed gave
 * it stays. */
CRPCI_COLD int crpci_guard_add_quota(crpc_server *s, crpci_service_method *m,
                                     const crpc_method_limit *l)
{
    crpci_quota *q;
    if (m->quota)
        return CRPC_OK;
    m->quota = q = (crpci_quota *)crpci_heap_alloc(s->heap, sizeof *q);
    if (!q)
        return CRPC_ENOMEM;
    crpci_quota_init(q, l, (uint32_t)s->options.workers);
    q->next = s->guard.quotas;
    s->guard.quotas = q;
    s->guard.all = true;
    return CRPC_OK;
}

/* Applies a limit; one without service and method is for all methods. CRPC_EINVAL: it applies to no
 * method of the server, so the program cannot mean it. */
CRPCI_COLD int crpci_guard_apply_limit(crpc_server *s, size_t index, crpc_error *error)
{
    const crpc_method_limit *l = &s->options.method_limits[index];
    bool applies = false;
    size_t i, k;
    for (i = 0; i < s->services.count; i++) {
        const crpci_service *v = &s->services.items[i];
        if (l->service && l->service != v->table)
            continue;
        for (k = 0; k < v->table->method_count; k++) {
            if (l->method && l->method != &v->table->methods[k])
                continue;
            if (crpci_guard_add_quota(s, &v->methods[k], l))
                return crpci_status_set(error, CRPC_ENOMEM, "server: out of memory");
            applies = true;
        }
    }
    if (applies)
        return CRPC_OK;
    return crpci_status_set(error, CRPC_EINVAL,
                            "method_limits[%zu] names %.80s.%.80s, which this server does not have",
                            index,
                            l->service  ? l->service->name
                            : l->method ? l->method->service
                                        : "*",
                            l->method ? l->method->name : "*");
}

/* Sets up the quotas of methods when the server starts, because services can be added until then.
 * A method gets that of the first limit that applies to it. */
CRPCI_COLD int crpci_guard_start_limits(crpc_server *s, crpc_error *error)
{
    size_t i;
    int err = CRPC_OK;
    for (i = 0; i < s->options.method_limit_count && !err; i++)
        err = crpci_guard_apply_limit(s, i, error);
    return err;
}

/* A replay entry of an account is gone. */
CRPCI_COLD void crpci_guard_forget(crpci_replay *r, void *account)
{
    crpc_server *s = CRPCI_CONTAINER(r, crpc_server, guard.replay);
    crpci_peer_release(&s->guard.peers, (crpci_peer_account *)account, CRPCI_PEER_REPLAYS,
                       crpci_heap_now(s->heap));
}

/* Sets up the tables of request ids and of accounts. */
CRPCI_COLD int crpci_guard_open(crpc_server *s)
{
    const crpc_server_options *o = &s->options;
    uint64_t secret[2];
    int err;
    crpci_order_init(&s->guard.order, o->worker_queue);
    crpci_loop_secret(s->loop, secret);
    err = crpci_peer_open(&s->guard.peers, s->heap, secret, o->rate_per_client,
                          o->burst_per_client);
    if (!err && o->replay_entries)
        err = crpci_replay_open(&s->guard.replay, s->heap, (size_t)o->replay_entries,
                                o->replay_bytes, (int64_t)o->replay_ms * 1000, secret);
    s->guard.replay.release = crpci_guard_forget;
    return err;
}

CRPCI_COLD void crpci_guard_stats(crpc_server *s, crpc_loop_stats *stats)
{
    crpci_thread_lock(&s->guard.lock);
    stats->replayed = s->guard.replayed;
    crpci_thread_unlock(&s->guard.lock);
}

CRPCI_COLD void crpci_guard_close(crpc_server *s)
{
    crpci_quota *q;
    while ((q = s->guard.quotas) != NULL) {
        s->guard.quotas = q->next;
        crpci_heap_free(s->heap, q, sizeof *q);
    }
    crpci_replay_close(&s->guard.replay);
    crpci_peer_close(&s->guard.peers, s->heap);
    crpci_thread_mutex_free(&s->guard.lock);
}

/* ======================================================================== */
/* >>impl-intake   what a server's connections bring: taken in, or refused  */
/* ======================================================================== */

/* The events of a server's connections. The connection section calls them with the loop locked and
 * without unlocking; no handler runs in here. Every request is either handed on with a context or
 * answered with an error: a request without an answer would occupy its peer's slot for good. */

/* Finds the method of a request. NULL: there is none, and the request has been refused. The names
 * are remembered as those that the connection's next request is likely to have: the protocol then
 * marks it `usual`, and no name is looked up. */
CRPCI_FN const crpci_service_method *crpci_intake_method(crpc_server *s, crpci_conn *conn,
                                                         const crpci_message *m)
{
    const crpci_service_method *method = (const crpci_service_method *)conn->expected;
    char text[CRPC_ERROR_TEXT_MAX];
    int err;
    if (CRPCI_LIKELY(m->usual))
        return method; /* a usual request has only what crpc supports */
    if (m->unsupported) { /* compression and the like: a wrong answer would be worse than none */
        crpci_context_refuse(conn, m, CRPC_EREQUEST, m->unsupported);
        return NULL;
    }
    err = crpci_service_lookup(&s->services, m, &method);
    if (err) {
        crpci_status_format(text, sizeof text, "no such %s: %.*s.%.*s",
                 err == CRPC_ENOSERVICE ? "service" : "method",
                 (int)crpci_base_min(crpc_view_size(m->service), 100),
                 crpc_view_size(m->service) ? crpc_view_data(m->service) : "",
                 (int)crpci_base_min(crpc_view_size(m->method), 100),
                 crpc_view_size(m->method) ? crpc_view_data(m->method) : "");
        crpci_context_refuse(conn, m, err, text);
        return NULL;
    }
    conn->expect = method->names[conn->protocol_index];
    conn->expected = method;
    return method;
}

/* Lets a request in, or refuses it. The limits come before the context, so that an excess costs
 * neither memory nor decoding. A refused request leaves the quota that it has entered. */
CRPCI_FN void crpci_intake_admit(crpc_server *s, crpci_conn *conn, const crpci_message *m,
                                 const crpci_service_method *method)
{
    bool guarded = CRPC_ENABLE_POLICY && (s->guard.all || (!m->usual && m->has_fields));
    const char *why = NULL;
    crpc_context *x = NULL;
    crpci_guard g;
    if (CRPCI_UNLIKELY(guarded)) {
        if (!crpci_guard_inspect(s, conn, m, &g))
            return;
        why = crpci_guard_limit(s, conn, (crpci_quota *)method->quota, &g);
    }
    if (CRPCI_LIKELY(!why)) {
        x = crpci_context_new(s, conn, m, method);
        why = x ? NULL : CRPCI_STATUS_TEXT("out of memory");
    }
    if (x && CRPCI_UNLIKELY(guarded))
        why = crpci_guard_start(x, &g);
    else if (x)
        why = crpci_context_dispatch(x, false);
    if (CRPCI_LIKELY(!why))
        return;
    if (guarded)
        crpci_guard_quit(s, &g, -1);
    crpci_context_refuse(conn, m, CRPC_ELIMIT, why);
    if (x)
        crpci_context_reject(x);
}

/* A request is complete. */
CRPCI_FN void crpci_intake_on_message(crpci_conn *conn, const crpci_message *m)
{
    crpc_server *s = (crpc_server *)conn->owner;
    const crpci_service_method *method;
    conn->loop->stats.requests++;
    if (CRPCI_UNLIKELY(conn->refused)) {
        crpci_context_refuse(conn, m, CRPC_ELIMIT,
                             "the server has too many connections (max_connections)");
        return;
    }
    if (CRPCI_UNLIKELY(crpci_thread_load(&s->state) >= CRPCI_SERVER_STOPPING)) {
        crpci_context_refuse(conn, m, CRPC_ELOGOFF, "the server is stopping");
        crpci_context_throttle(conn);
        return;
    }
    method = crpci_intake_method(s, conn, m);
    if (method && CRPCI_UNLIKELY(crpci_thread_load(&s->serving) >= s->max_serving)) {
        crpci_context_refuse(conn, m, CRPC_ELIMIT,
                             "too many requests are being served (max_concurrency)");
    } else if (method) {
        crpci_intake_admit(s, conn, m, method);
    }
    crpci_context_throttle(conn);
}

/* A request's head announces a body over max_body. The connection skips the body; it is never
 * buffered. */
CRPCI_COLD void crpci_intake_on_oversize(crpci_conn *conn, const crpci_message *m, uint64_t body)
{
    char text[128];
    crpci_status_format(text, sizeof text, "request of %llu bytes is over max_body, %u",
                        (unsigned long long)body, conn->max_body);
    conn->loop->stats.requests++;
    crpci_context_refuse(conn, m, CRPC_EREQUEST, text);
    crpci_context_throttle(conn);
}

/* A reply has left: a connection that was paused for its unsent replies may be read again. */
CRPCI_FN void crpci_intake_on_sent(crpci_conn *conn, crpci_out *o)
{
    (void)o;
    if (conn->paused)
        crpci_context_throttle(conn);
}

/* The peer sends no more, but may still read: what it asked for is answered before closing. */
CRPCI_FN void crpci_intake_on_eof(crpci_conn *conn)
{
    conn->eof = true;
    crpci_conn_interest(conn);
    crpci_context_close_if_done(conn);
}

/* Requests in service keep the closed connection's struct until they end. */
CRPCI_FN void crpci_intake_on_closed(crpci_conn *conn)
{
    crpc_server *s = (crpc_server *)conn->owner;
    if (CRPC_ENABLE_POLICY && !conn->busy)
        crpci_guard_disconnect(s, conn->account);
    if (conn->refused)
        __atomic_fetch_sub(&s->listener.refusing, 1, __ATOMIC_ACQ_REL);
    __atomic_fetch_sub(&s->connections, 1, __ATOMIC_ACQ_REL);
}

CRPCI_FN void crpci_intake_expire(crpci_conn *conn)
{
    conn->loop->stats.timeouts++;
    crpci_conn_close(conn, CRPC_ECLOSE, 0);
}

/* Closes a connection that was idle for idle_timeout_ms, that has asked for no method of the server
 * within first_request_ms, whose request has not arrived whole within frame_timeout_ms, or which
 * ended its input and does not read its replies. A paused connection is not read, so its peer is
 * not to blame for a partial request. */
CRPCI_FN void crpci_intake_on_timer(crpci_conn *conn)
{
    const crpc_server *s = (const crpc_server *)conn->owner;
    int64_t now = crpci_loop_now(conn->loop), next = INT64_MAX;
    int64_t idle = (int64_t)s->options.idle_timeout_ms * 1000;
    int64_t first = (int64_t)s->options.first_request_ms * 1000;
    if (conn->refused) {
        crpci_conn_close(conn, CRPC_ECLOSE, 0);
        return;
    }
    if (conn->close_when_sent && conn->frame_timeout_us) {
        if (conn->tx_bytes == conn->linger_bytes)
            crpci_intake_expire(conn);
        else
            crpci_loop_timer_set(conn->loop, &conn->timer, conn->frame_timeout_us);
        conn->linger_bytes = conn->tx_bytes;
        return;
    }
    if ((conn->rx || conn->skip) && conn->frame_timeout_us)
        next = (conn->paused ? now : conn->rx_since) + conn->frame_timeout_us;
    if (idle && !conn->busy && !conn->tx_head && !conn->rx && !conn->skip)
        next = crpci_base_min64(next, conn->active_us + idle);
    else if (idle)
        next = crpci_base_min64(next, now + idle);
    if (first && !conn->expected)
        next = crpci_base_min64(next, conn->opened_us + first);
    if (next <= now)
        crpci_intake_expire(conn);
    else if (next != INT64_MAX)
        crpci_loop_timer_set(conn->loop, &conn->timer, next - now);
}

static const crpci_conn_events crpci_intake_events = {
    NULL, /* only dialled connections open */
    crpci_intake_on_message,
    crpci_intake_on_oversize,
    crpci_intake_on_sent,
    crpci_intake_on_eof,
    crpci_intake_on_closed,
    crpci_intake_on_timer};

/* Closes the server's connections on a loop, which other servers and channels may share. Locked.
 * Returns false: crpci_lifecycle_any shall go on. */
CRPCI_FN bool crpci_intake_close_conns(crpc_server *s, crpc_loop *l)
{
    crpci_list *i, *next;
    for (i = l->conns.next; i != &l->conns; i = next) {
        crpci_conn *c = CRPCI_CONTAINER(i, crpci_conn, link);
        next = i->next;
        if (c->up == &crpci_intake_events && c->owner == s)
            crpci_conn_close(c, CRPC_ECLOSE, 0);
    }
    return false;
}

/* Closes one connection of an account on a loop: one that has not asked for a method of the server
 * yet or, if `idle`, the one that has been without a request for longest. Locked. False: there is
 * none. */
CRPCI_COLD bool crpci_intake_evict(crpc_server *s, crpc_loop *l, const void *account, bool idle)
{
    crpci_conn *victim = NULL;
    crpci_list *i;
    for (i = l->conns.next; i != &l->conns; i = i->next) {
        crpci_conn *c = CRPCI_CONTAINER(i, crpci_conn, link);
        if (c->up == &crpci_intake_events && c->owner == s && c->account == account &&
            !c->refused && (!c->expected || (idle && !c->busy && crpci_conn_idle(c))) &&
            (!victim || c->active_us < victim->active_us))
            victim = c;
    }
    if (!victim)
        return false;
    l->stats.evicted++;
    crpci_conn_close(victim, CRPC_ECLOSE, 0);
    return true;
}

/* Whether any of the server's connections on a loop has output to send, or input that was not read:
 * TCP answers the closing of such a connection with a reset, which can destroy replies on their
 * way. Locked. */
CRPCI_FN bool crpci_intake_has_output(crpc_server *s, crpc_loop *l)
{
    crpci_list *i;
    for (i = l->conns.next; i != &l->conns; i = i->next) {
        const crpci_conn *c = CRPCI_CONTAINER(i, crpci_conn, link);
        if (c->up == &crpci_intake_events && c->owner == s && !crpci_conn_idle(c))
            return true;
    }
    return false;
}

/* ======================================================================== */
/* >>impl-listener   sockets that accept, and who gets the new connections  */
/* ======================================================================== */

/* The sockets on which a server accepts. The server's own loop watches them, so one thread accepts;
 * new connections go to the I/O threads' loops in turn, or stay on that loop. Two loops are never
 * locked at a time, by any thread. Listeners are added before the start and closed together. */

typedef struct crpci_listener {
    crpci_list link; /* in server->listener.list, under the lock of the server's loop */
    crpc_server *server;
    crpci_watch watch;
    crpci_timer masked; /* armed while accepting pauses, for want of descriptors or memory */
    int fd;
    bool given; /* opened by the program, which also removes the file of a unix socket */
    char url[CRPC_ADDRESS_MAX + 8]; /* with the port that the kernel chose for port 0 */
    crpci_addr addr;
} crpci_listener;

#define CRPCI_LISTENER_REFUSING  32      /* connections at a time that are told they are refused */
#define CRPCI_LISTENER_REFUSE_US 1000000 /* how long each of them stays */

/* Takes a connection from an account that has more than its share. Locks one loop after another.
 * False: all of the account's connections are at work. */
CRPCI_COLD bool crpci_listener_evict(crpc_server *s, const void *account)
{
    bool done = false;
    size_t i, n = s->io.count ? s->io.count : 1;
    for (i = 0; i < 2 * n && !done; i++) {
        crpc_loop *l = s->io.count ? s->io.loops[i % n] : s->loop;
        crpci_loop_lock(l);
        done = crpci_intake_evict(s, l, account, i >= n);
        crpci_loop_unlock(l);
    }
    return done;
}

/* Opens a connection only to refuse its requests: its peer learns that they were not executed, and
 * may try another server. False: enough connections are being refused already. Locked. */
CRPCI_COLD bool crpci_listener_refuse(crpc_server *s, crpci_conn *conn)
{
    conn->loop->stats.refused++;
    if (__atomic_add_fetch(&s->listener.refusing, 1, __ATOMIC_ACQ_REL) > CRPCI_LISTENER_REFUSING) {
        __atomic_fetch_sub(&s->listener.refusing, 1, __ATOMIC_ACQ_REL);
        return false;
    }
    conn->refused = true;
    crpci_loop_timer_set(conn->loop, &conn->timer, CRPCI_LISTENER_REFUSE_US);
    return true;
}

/* Sets up an accepted connection. Locked. */
CRPCI_FN void crpci_listener_configure(const crpc_server *s, crpci_conn *conn)
{
    int64_t first = s->options.first_request_ms, idle = s->options.idle_timeout_ms;
    conn->protocols = crpci_protocols;
    conn->max_body = (uint32_t)s->options.limits.max_body;
    conn->max_skip = s->options.max_skip;
    conn->frame_timeout_us = (int64_t)s->options.frame_timeout_ms * 1000;
    first = first && (!idle || first < idle) ? first : idle;
    if (first)
        crpci_loop_timer_set(conn->loop, &conn->timer, first * 1000);
}

/* Makes a connection of a socket that was counted for `account`. False: it could not, and the
 * socket is closed. Called without a lock. The server's state was set before this loop was locked
 * to close its connections, so a connection is either refused here or closed there. */
CRPCI_FN bool crpci_listener_adopt(crpc_server *s, crpc_loop *l, int fd,
                                   const crpci_sock_name *peer, void *account, bool room)
{
    crpci_conn *conn = NULL;
    crpci_loop_lock(l);
    if (crpci_thread_load(&s->state) >= CRPCI_SERVER_STOPPING) {
        close(fd);
    } else if ((conn = crpci_connect_new(l, fd, false, &crpci_intake_events, s)) != NULL) {
        crpci_thread_ref(&s->connections);
        conn->peer = *peer;
        conn->account = account;
        crpci_listener_configure(s, conn);
        if (!room && !crpci_listener_refuse(s, conn))
            crpci_conn_close(conn, CRPC_ECLOSE, 0);
    }
    crpci_loop_unlock(l);
    return conn != NULL;
}

/* Gives an accepted socket to one of the server's loops, in turn, if the peer may connect. Called
 * without a lock by the thread that accepts, so s->connections only becomes less meanwhile. */
CRPCI_FN void crpci_listener_share(crpc_server *s, int fd, const crpci_sock_name *peer)
{
    crpc_loop *l = s->io.count ? s->io.loops[s->io.next++ % s->io.count] : s->loop;
    uint32_t count = crpci_thread_load(&s->connections) + 1;
    const crpci_peer_account *victim = NULL;
    crpci_peer_account *account = NULL;
    bool room = !s->options.max_connections || count <= (uint32_t)s->options.max_connections;
    if (s->listener.allow.count && !crpci_peer_find_network(&s->listener.allow, peer)) {
        crpci_loop_lock(l);
        l->stats.refused++;
        crpci_loop_unlock(l);
        close(fd);
        return;
    }
    if (CRPC_ENABLE_POLICY) {
        account = crpci_guard_connect(s, peer);
        if (!account) {
            close(fd);
            return;
        }
        room = crpci_guard_has_room(s, account, count, &victim) &&
               (!victim || crpci_listener_evict(s, victim));
    }
    if (!crpci_listener_adopt(s, l, fd, peer, account, room) && account)
        crpci_guard_disconnect(s, account);
}

/* No descriptors or memory are left. The reserve descriptor is freed to accept one connection and
 * close it, so that its peer learns of it at once. Then accepting pauses for 100 ms, because the
 * level-triggered listener would otherwise wake the loop without end. Logs once a second.
 * Locked. */
CRPCI_COLD void crpci_listener_no_descriptors(crpci_listener *n)
{
    crpc_server *s = n->server;
    int64_t now = crpci_loop_now(s->loop);
    crpci_addr peer;
    int fd;
    if (s->listener.reserve_fd >= 0) {
        close(s->listener.reserve_fd);
        fd = crpci_sock_accept(n->fd, &peer);
        if (fd >= 0)
            close(fd);
        s->listener.reserve_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    }
    crpci_watch_set(s->loop, &n->watch, n->fd, 0);
    crpci_loop_timer_set(s->loop, &n->masked, 100000);
    if (now - s->listener.emfile_logged > 1000000) {
        s->listener.emfile_logged = now;
        crpci_heap_log(s->heap, CRPC_LOG_WARN,
                       "listener %s: no file descriptors left; it accepts again in 100 ms", n->url);
    }
}

/* Accepts again; if the poller refuses, tries again in another 100 ms. */
CRPCI_FN void crpci_listener_unmask(crpc_loop *l, crpci_timer *t)
{
    crpci_listener *n = CRPCI_CONTAINER(t, crpci_listener, masked);
    if (crpci_watch_set(l, &n->watch, n->fd, CRPC_READABLE))
        crpci_loop_timer_set(l, t, 100000);
}

/* Accepts up to 16 connections; the level-triggered poller reports the rest in the next step, so a
 * storm of connections cannot hold up those that exist. The loop is unlocked to hand them out; a
 * reference keeps the server meanwhile. */
CRPCI_FN void crpci_listener_on_accept(crpc_loop *l, crpci_watch *w, unsigned events)
{
    crpci_listener *n = CRPCI_CONTAINER(w, crpci_listener, watch);
    crpc_server *s = n->server;
    crpci_sock_name peers[16];
    int fds[16], count = 0, i;
    (void)events;
    while (count < 16) {
        crpci_addr peer;
        int fd = crpci_sock_accept(n->fd, &peer);
        if (fd < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS)
                crpci_listener_no_descriptors(n);
            break;
        }
        if (n->addr.u.any.sa_family != AF_UNIX)
            crpci_sock_tune(fd);
        crpci_sock_name_of(&peers[count], &peer, fd);
        fds[count++] = fd;
    }
    if (!count)
        return;
    crpci_thread_ref(&s->refs);
    crpci_loop_unlock(l);
    for (i = 0; i < count; i++)
        crpci_listener_share(s, fds[i], &peers[i]);
    crpci_loop_lock(l);
    crpci_context_drop_server(s);
}

/* Adds a socket that listens. On failure the caller still owns the descriptor. */
CRPCI_COLD int crpci_listener_add(crpc_server *s, int fd, bool given)
{
    crpci_listener *n = (crpci_listener *)crpci_heap_alloc(s->heap, sizeof *n);
    char text[CRPC_ADDRESS_MAX];
    if (!n)
        return CRPC_ENOMEM;
    n->server = s;
    n->fd = fd;
    n->given = given;
    crpci_sock_local(fd, &n->addr);
    crpci_sock_format(&n->addr, text, sizeof text);
    if (n->addr.u.any.sa_family == AF_UNIX)
        snprintf(n->url, sizeof n->url, "unix://%s", text + 5);
    else
        snprintf(n->url, sizeof n->url, "tcp://%s", text);
    crpci_watch_init(&n->watch, crpci_listener_on_accept);
    crpci_timer_init(&n->masked, crpci_listener_unmask);
    crpci_loop_lock(s->loop);
    crpci_list_append(&s->listener.list, &n->link);
    crpci_loop_unlock(s->loop);
    return CRPC_OK;
}

CRPC_API int crpc_server_listen_fd(crpc_server *s, int fd)
{
    int flags = fcntl(fd, F_GETFL), on = 0;
    socklen_t len = sizeof on;
    if (flags < 0 || getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &len) || !on)
        return CRPC_EINVAL;
    if (crpci_thread_load(&s->state) != CRPCI_SERVER_NEW)
        return CRPC_EBUSY;
    fcntl(fd, F_SETFL, flags | O_NONBLOCK);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    return crpci_listener_add(s, fd, true);
}

/* Finds the address of tcp://host:port, unix:///path or unix://@name (Linux's abstract names). May
 * block to resolve a host name. */
CRPCI_COLD int crpci_listener_address(crpc_server *s, const char *url, const crpci_url *u,
                                      crpci_addr *out, crpc_error *error)
{
    char text[CRPC_ADDRESS_MAX];
    int err = CRPC_OK;
    if (*u->query)
        return crpci_status_set(error, CRPC_EINVAL, "%.100s: a listener takes no URL options", url);
    if (strcmp(u->scheme, "unix") == 0) {
        if ((size_t)snprintf(text, sizeof text, "unix:%s", u->path) >= sizeof text)
            return crpci_status_set(error, CRPC_EINVAL, "unix:// path is over %d bytes",
                                    CRPC_ADDRESS_MAX - 6);
    } else if (strcmp(u->scheme, "tcp") == 0 && !*u->path) {
        err = crpci_resolver_address(s->heap, u->authority, text, sizeof text, error);
    } else {
        return crpci_status_set(error, CRPC_EINVAL,
                                "%.100s: expected tcp://host:port, unix:///path or unix://@name",
                                url);
    }
    if (!err && !crpci_sock_parse(out, text))
        err = crpci_status_set(error, CRPC_EINVAL,
                               "%.100s: not an address that a socket can be bound to", url);
    return err;
}

CRPC_API int crpc_server_listen(crpc_server *s, const char *url, crpc_error *error)
{
    crpci_addr addr;
    crpci_url u;
    int err, fd, saved;
    if (crpci_thread_load(&s->state) != CRPCI_SERVER_NEW)
        return crpci_status_set(error, CRPC_EBUSY,
                                "listen: the server has been started; add listeners before that");
    err = crpci_url_parse(&u, s->heap, url, error);
    if (err)
        return err;
    err = crpci_listener_address(s, url, &u, &addr, error);
    crpci_url_free(&u);
    if (err)
        return err;
    fd = crpci_sock_listen(&addr);
    saved = errno;
    if (fd < 0) {
        err = saved == EADDRINUSE || saved == EADDRNOTAVAIL || saved == EACCES || saved == ENOENT
                  ? CRPC_EADDRESS
                  : CRPC_ESYSTEM;
        return crpci_status_set(
            error, err, "%.100s: cannot listen: %s (errno %d)", url,
            saved == ENOENT ? "no such directory" : crpci_conn_errno_text(saved), saved);
    }
    err = crpci_listener_add(s, fd, false);
    if (err) {
        close(fd);
        crpci_status_set(error, err, "server: out of memory");
    }
    return err;
}

CRPC_API int crpc_server_address(crpc_server *s, size_t index, char *url, size_t size)
{
    crpci_list *i;
    int err = CRPC_ENOTFOUND;
    crpci_loop_lock(s->loop);
    for (i = s->listener.list.next; i != &s->listener.list; i = i->next) {
        if (index-- == 0) {
            const char *text = CRPCI_CONTAINER(i, crpci_listener, link)->url;
            err = strlen(text) < size ? CRPC_OK : CRPC_EINVAL;
            if (size)
                snprintf(url, size, "%s", err ? "" : text);
            break;
        }
    }
    crpci_loop_unlock(s->loop);
    return err;
}

/* Begins to accept on all listeners. The kernel has queued connections since they were added.
 * Locked. */
CRPCI_COLD int crpci_listener_start(crpc_server *s)
{
    crpci_list *i;
    int err = CRPC_OK;
    for (i = s->listener.list.next; i != &s->listener.list && !err; i = i->next) {
        crpci_listener *n = CRPCI_CONTAINER(i, crpci_listener, link);
        err = crpci_watch_set(s->loop, &n->watch, n->fd, CRPC_READABLE);
    }
    return err;
}

/* Stops accepting and frees the listeners. Connections that the kernel has queued but nobody has
 * accepted are reset. Locked. */
CRPCI_COLD void crpci_listener_close_all(crpc_server *s)
{
    while (!crpci_list_empty(&s->listener.list)) {
        crpci_listener *n = CRPCI_CONTAINER(s->listener.list.next, crpci_listener, link);
        crpci_watch_set(s->loop, &n->watch, n->fd, 0);
        crpci_timer_cancel(&n->masked);
        crpci_list_remove(&n->link);
        close(n->fd);
        if (n->addr.u.any.sa_family == AF_UNIX && !n->given)
            unlink(n->addr.u.un.sun_path);
        crpci_heap_free(s->heap, n, sizeof *n);
    }
}

/* ======================================================================== */
/* >>impl-enrolment   the services of a server in a registry                */
/* ======================================================================== */

/* Registers the services of a server when it starts, and withdraws them when it stops. The
 * directory backend registers again after a loss by itself; here is only decided what is
 * registered, and how long crpc_server_start waits. Functions are called without the loop's
 * lock. */

/* One registered service. */
typedef struct crpci_enrolment {
    crpc_server *server;
    void *handle; /* the backend's; NULL: withdrawn, or never registered */
    bool through; /* the registry has confirmed it at least once */
} crpci_enrolment;

#if CRPCI_DIRECTORY

/* The registry has confirmed a registration, or an attempt at it failed: `text` says why. Called on
 * any thread, ZooKeeper's among them, without a lock. */
CRPCI_FN void crpci_enrolment_on_status(void *user, int status, const char *text)
{
    crpci_enrolment *e = (crpci_enrolment *)user;
    crpc_server *s = e->server;
    crpci_loop_lock(s->loop);
    if (status) {
        snprintf(s->enrolment.text, sizeof s->enrolment.text, "%s", text ? text : "");
    } else if (!e->through) {
        e->through = true;
        if (--s->enrolment.missing == 0 && s->enrolment.waiter)
            crpci_drive_end_wait(s->loop, s->enrolment.waiter);
    }
    crpci_loop_unlock(s->loop);
}

/* Finds the address to register: what the option `advertise` says, with the first TCP listener's
 * port if it names none, else the first TCP listener's address. A listener on all interfaces gives
 * an empty host or 0.0.0.0: the backend puts in the local address that reaches the registry. */
CRPCI_COLD int crpci_enrolment_address(crpc_server *s, char *out, size_t size, crpc_error *error)
{
    const char *advertise = s->options.advertise, *colon, *bracket;
    const crpci_listener *n = NULL;
    crpci_list *i;
    char *text;
    int err;
    for (i = s->listener.list.next; i != &s->listener.list && !n; i = i->next) {
        n = CRPCI_CONTAINER(i, crpci_listener, link);
        if (n->addr.u.any.sa_family == AF_UNIX)
            n = NULL;
    }
    if (!n && !advertise)
        return crpci_status_set(error, CRPC_EINVAL,
                                "registry: there is no tcp:// listener to register; set listen or "
                                "advertise");
    if (!advertise) {
        crpci_sock_format(&n->addr, out, size);
        if (strncmp(out, "[::]", 4) == 0)
            memmove(out, out + 4, strlen(out + 4) + 1);
        return CRPC_OK;
    }
    colon = strrchr(advertise, ':');
    bracket = strrchr(advertise, ']');
    if (colon && (!bracket || colon > bracket))
        text = crpci_heap_format(s->heap, "%s", advertise);
    else if (n)
        text = crpci_heap_format(s->heap, "%s:%u", advertise, crpci_sock_port(&n->addr));
    else
        return crpci_status_set(error, CRPC_EINVAL,
                                "advertise \"%.80s\": no port, and no "
                                "tcp:// listener to take it from",
                                advertise);
    if (!text)
        return crpci_status_set(error, CRPC_ENOMEM, "server: out of memory");
    err = crpci_resolver_address(s->heap, text, out, size, error);
    crpci_heap_strfree(s->heap, text);
    return err ? crpci_status_set(error, err,
                                  "advertise \"%.80s\" is not host[:port], or "
                                  "cannot be resolved (IPv6 stands in brackets)",
                                  advertise)
               : CRPC_OK;
}

/* Joins the names of a service's methods with commas, for people who inspect the registry. What
 * does not fit is cut off. */
CRPCI_COLD void crpci_enrolment_method_names(const crpc_service *table, char *out, size_t size)
{
    size_t used = 0, i;
    *out = '\0';
    for (i = 0; i < table->method_count && used < size; i++)
        used +=
            (size_t)snprintf(out + used, size - used, "%s%s", i ? "," : "", table->methods[i].name);
}

/* Opens the registry and enters every service in it. Does not wait: while the registry cannot be
 * reached, the registrations stay queued. */
CRPCI_COLD int crpci_enrolment_start(crpc_server *s, crpc_error *error)
{
    const size_t room = 1024; /* for the names of a service's methods */
    char address[CRPC_ADDRESS_MAX], *methods;
    crpci_directory_options o;
    crpci_names_service what;
    size_t i;
    int err = crpci_enrolment_address(s, address, sizeof address, error);
    memset(&o, 0, sizeof o);
    o.session_timeout_ms = s->options.directory.session_timeout_ms;
    o.credential = s->options.directory.credential;
    if (!err)
        err = crpci_open_registry(s->loop, s->options.registry, &o, &s->enrolment.registry, error);
    if (err)
        return err;
    s->enrolment.items = (crpci_enrolment *)crpci_heap_alloc(
        s->heap, s->services.count * sizeof *s->enrolment.items);
    if (!s->enrolment.items && s->services.count)
        return crpci_status_set(error, CRPC_ENOMEM, "server: out of memory");
    s->enrolment.count = s->enrolment.missing = s->services.count;
    methods = (char *)crpci_heap_alloc(s->heap, room);
    if (!methods)
        return crpci_status_set(error, CRPC_ENOMEM, "server: out of memory");
    memset(&what, 0, sizeof what);
    what.address = address;
    what.group = s->options.directory.group;
    what.version = s->options.directory.version;
    what.application = s->options.directory.application;
    what.methods = methods;
    what.weight = s->options.weight;
    what.warmup_ms = s->options.warmup_ms;
    for (i = 0; i < s->enrolment.count && !err; i++) {
        what.service = s->services.items[i].table->name;
        crpci_enrolment_method_names(s->services.items[i].table, methods, room);
        s->enrolment.items[i].server = s;
        err = crpci_directory_enroll(s->enrolment.registry, &what, crpci_enrolment_on_status,
                                     &s->enrolment.items[i], &s->enrolment.items[i].handle);
    }
    crpci_heap_free(s->heap, methods, room);
    return err ? crpci_status_set(error, err, "%.100s: cannot register %.60s at %.60s: %s",
                                  s->options.registry, what.service, address, crpc_status_text(err))
               : CRPC_OK;
}

/* Waits at most registry_timeout_ms until all services are registered. CRPC_EREGISTRY: they are
 * not, and must_connect is set; otherwise the start goes on, and so do the registrations. Does not
 * wait inside a callback of the loop, which could not be driven meanwhile. */
CRPCI_COLD int crpci_enrolment_await(crpc_server *s, crpc_error *error)
{
    crpc_loop *l = s->loop;
    int64_t ms = s->options.directory.timeout_ms;
    crpci_waiter w;
    int err = CRPC_OK;
    memset(&w, 0, sizeof w);
    crpci_loop_lock(l);
    if (s->enrolment.missing && ms && !crpci_loop_in_callback(l)) {
        s->enrolment.waiter = &w;
        crpci_drive_wait(l, &w, crpci_loop_now(l) + ms * 1000, false);
        s->enrolment.waiter = NULL;
    }
    if (s->enrolment.missing && s->options.directory.must_connect)
        err = crpci_status_set(error, CRPC_EREGISTRY,
                               "%.80s: not registered within %d ms (registry_timeout_ms)%s%.100s",
                               s->options.registry, (int)ms, *s->enrolment.text ? ": " : "",
                               s->enrolment.text);
    crpci_loop_unlock(l);
    return err;
}

/* Withdraws all services. The registry stays open until the server is dismantled, so that the
 * withdrawals reach it. */
CRPCI_COLD void crpci_enrolment_withdraw(crpc_server *s)
{
    size_t i;
    for (i = 0; s->enrolment.registry && i < s->enrolment.count; i++) {
        void *handle = s->enrolment.items[i].handle;
        s->enrolment.items[i].handle = NULL;
        crpci_directory_withdraw(s->enrolment.registry, handle);
    }
}

#endif /* CRPCI_DIRECTORY */

/* ======================================================================== */
/* >>impl-lifecycle   a server's options; opening a server, starting, draining, closing */
/* ======================================================================== */

/* Stopping goes in steps: the services leave the registry (LAME, lame_ms); listeners close and new
 * requests are refused (STOPPING, at most drain_ms); connections close (STOPPED). A timer of the
 * server's loop takes the steps, so crpc_server_stop does not wait. crpc_server_close waits for the
 * last step and then takes the server apart. */

#define CRPCI_LIFECYCLE_TICK 10000 /* microseconds between two checks of a drain */

/* --- stopping --------------------------------------------------------------------------------- */

/* Asks `what` about each loop of the server until one answers true. No lock is held: two loops are
 * never locked at a time. */
CRPCI_FN bool crpci_lifecycle_any(crpc_server *s, bool (*what)(crpc_server *s, crpc_loop *l))
{
    bool yes = false;
    size_t i;
    for (i = 0; i <= s->io.count && !yes; i++) {
        crpc_loop *l = i ? s->io.loops[i - 1] : s->loop;
        crpci_loop_lock(l);
        yes = what(s, l);
        crpci_loop_unlock(l);
    }
    return yes;
}

/* Begins STOPPING: no connection is accepted and no new request is let in. Locked. */
CRPCI_FN void crpci_lifecycle_drain(crpc_server *s)
{
    crpci_thread_store(&s->state, CRPCI_SERVER_STOPPING);
    crpci_listener_close_all(s);
}

/* Ends LAME; then closes the connections when all is answered and sent, or when drain.until has
 * passed. Called with the server's loop locked, which it unlocks to visit all loops. The reference
 * keeps the server meanwhile. `active` is read first, so that no reply is queued unseen between the
 * two, and again for a request that came meanwhile. */
CRPCI_FN void crpci_lifecycle_drain_tick(crpc_loop *l, crpci_timer *t)
{
    crpc_server *s = CRPCI_CONTAINER(t, crpc_server, drain.timer);
    bool busy;
    if (crpci_thread_load(&s->state) == CRPCI_SERVER_LAME)
        crpci_lifecycle_drain(s);
    if (crpci_thread_load(&s->state) != CRPCI_SERVER_STOPPING)
        return;
    crpci_thread_ref(&s->refs);
    crpci_loop_unlock(l);
    busy = crpci_thread_load(&s->active) || crpci_lifecycle_any(s, crpci_intake_has_output) ||
           crpci_thread_load(&s->active);
    busy = busy && crpci_loop_now(l) < s->drain.until;
    if (!busy)
        crpci_lifecycle_any(s, crpci_intake_close_conns);
    crpci_loop_lock(l);
    if (busy) {
        crpci_loop_timer_set(l, t, CRPCI_LIFECYCLE_TICK);
    } else {
        crpci_thread_store(&s->state, CRPCI_SERVER_STOPPED);
        if (s->drain.waiter)
            crpci_drive_end_wait(l, s->drain.waiter);
        if (s->drain.running)
            crpc_loop_stop(l);
        if (s->drain.close_later)
            crpci_loop_ready(l, &s->drain.close_task);
    }
    crpci_context_drop_server(s);
}

CRPC_API void crpc_server_stop(crpc_server *s)
{
    crpc_loop *l = s->loop;
    int64_t lame_until;
    uint32_t state;
    crpci_loop_lock(l);
    state = crpci_thread_load(&s->state);
    lame_until = crpci_loop_now(l);
    if (state == CRPCI_SERVER_RUNNING)
        lame_until += (int64_t)s->options.lame_ms * 1000;
    if (state <= CRPCI_SERVER_RUNNING)
        s->drain.until = lame_until + (int64_t)s->options.drain_ms * 1000;
    if (state == CRPCI_SERVER_RUNNING && s->options.lame_ms)
        crpci_thread_store(&s->state, CRPCI_SERVER_LAME);
    else if (state <= CRPCI_SERVER_RUNNING)
        crpci_lifecycle_drain(s);
    crpci_loop_unlock(l);
    if (state > CRPCI_SERVER_RUNNING)
        return;
#if CRPCI_DIRECTORY
    crpci_enrolment_withdraw(s);
#endif
    /* The timer is set last: once it has fired, another thread may free the server. */
    crpci_loop_lock(l);
    crpci_loop_timer_at(l, &s->drain.timer, lame_until);
    crpci_loop_unlock(l);
}

/* Waits for STOPPED, and drives the loop if no other thread does. At most a second longer than the
 * options allow: a clock that stands still must not keep the program from closing. */
CRPCI_FN void crpci_lifecycle_await_stop(crpc_server *s)
{
    crpc_loop *l = s->loop;
    crpci_waiter w;
    memset(&w, 0, sizeof w);
    crpci_loop_lock(l);
    if (crpci_thread_load(&s->state) < CRPCI_SERVER_STOPPED) {
        s->drain.waiter = &w;
        crpci_drive_wait(l, &w, s->drain.until + 1000000, true);
        s->drain.waiter = NULL;
    }
    crpci_drive_unlock(l);
}

/* --- closing ---------------------------------------------------------------------------------- */

CRPCI_FN bool crpci_lifecycle_calls_back(crpc_server *s, crpc_loop *l)
{
    (void)s;
    return crpci_loop_in_callback(l);
}

/* Whether the calling thread is inside a callback of one of the server's loops, or is one of its
 * workers: waiting for the server would then be waiting for itself. */
CRPCI_FN bool crpci_lifecycle_in_callback(crpc_server *s)
{
    bool in = crpci_lifecycle_any(s, crpci_lifecycle_calls_back);
#if CRPC_ENABLE_THREADS
    size_t i;
    for (i = 0; i < s->worker_count && !in; i++)
        in = crpci_thread_is_self(s->workers.threads[i]);
#endif
    return in;
}

/* Takes a stopped server apart. Runs without a lock, on the thread that closes or, if that was
 * inside a callback, in a task of the loop. The registry is closed first: its callbacks lock the
 * loop. The workers end before the I/O loops, to which they send their last replies. Requests that
 * never finish keep their loop and the server's struct, which the last of them frees. */
CRPCI_COLD void crpci_lifecycle_dismantle(crpc_server *s)
{
    crpc_loop *l = s->loop;
    bool private_loop = s->private_loop;
    size_t i;
#if CRPCI_DIRECTORY
    crpci_directory_close(s->enrolment.registry);
    s->enrolment.registry = NULL;
#endif
    crpci_loop_lock(l);
    crpci_listener_close_all(s);
    crpci_thread_store(&s->state, CRPCI_SERVER_STOPPED);
    crpci_timer_cancel(&s->drain.timer);
    crpci_loop_unlock(l);
    crpci_lifecycle_any(s, crpci_intake_close_conns);
    if (s->worker_count)
        crpci_worker_stop(&s->workers, s->heap, s->worker_count);
    for (i = 0; i < s->io.count; i++)
        crpc_loop_close(s->io.loops[i]);
    crpci_heap_free(s->heap, s->io.loops, (size_t)s->options.io_threads * sizeof *s->io.loops);
    s->io.loops = NULL;
    s->io.count = 0;
    if (s->listener.reserve_fd >= 0)
        close(s->listener.reserve_fd);
    s->listener.reserve_fd = -1;
    crpci_context_drop_server(s);
    if (private_loop)
        crpc_loop_close(l);
    crpci_loop_release(l);
}

/* The rest of a close that was called inside a callback. */
CRPCI_FN void crpci_lifecycle_close_task(crpc_loop *l, crpci_task *task)
{
    crpci_loop_user_begin(l);
    crpci_lifecycle_dismantle(CRPCI_CONTAINER(task, crpc_server, drain.close_task));
    crpci_loop_user_end(l);
}

CRPC_API void crpc_server_close(crpc_server *s)
{
    bool started;
    if (!s)
        return;
    CRPCI_HANDLE_CLOSE(s);
    started = crpci_thread_load(&s->state) != CRPCI_SERVER_NEW;
    if (started && crpci_lifecycle_in_callback(s)) { /* must not wait: close_task goes on */
        crpc_loop *l = s->loop;
        crpci_loop_lock(l);
        s->drain.close_later = true;
        if (crpci_thread_load(&s->state) == CRPCI_SERVER_STOPPED)
            crpci_loop_ready(l, &s->drain.close_task);
        crpci_loop_unlock(l);
        crpc_server_stop(s);
        return;
    }
    if (started) {
        crpc_server_stop(s);
        crpci_lifecycle_await_stop(s);
    }
    crpci_lifecycle_dismantle(s);
}

/* --- opening and starting --------------------------------------------------------------------- */

/* The options of a server: what 0 and -1 stand for, and the largest value. The same rows serve
 * defaults, checks and crpc_server_options_parse. */
#define CRPCI_LIFECYCLE_ROW(member, name, flags, zero, none, most)                                 \
    CRPCI_OPTION_ROW(crpc_server_options, member, name, flags, zero, none, most)
#define CRPCI_LIFECYCLE_NUMBER(member, zero, none, most)                                           \
    CRPCI_LIFECYCLE_ROW(member, #member, 0, zero, none, most)
#define CRPCI_LIFECYCLE_POLICY(member, zero, none, most)                                           \
    CRPCI_LIFECYCLE_ROW(member, #member, CRPCI_OPTION_POLICY, zero, none, most)
#define CRPCI_LIFECYCLE_TEXT(member, name, flags)                                                  \
    CRPCI_LIFECYCLE_ROW(member, name, CRPCI_OPTION_TEXT | (flags), 0, 0, 0)

static const crpci_option crpci_lifecycle_rows[] = {
    CRPCI_LIFECYCLE_TEXT(listen, "listen", 0),
    CRPCI_LIFECYCLE_TEXT(registry, "registry", 0),
    CRPCI_LIFECYCLE_TEXT(advertise, "advertise", 0),
    CRPCI_LIFECYCLE_TEXT(directory.group, "group", 0),
    CRPCI_LIFECYCLE_TEXT(directory.version, "version", 0),
    CRPCI_LIFECYCLE_TEXT(directory.application, "application", 0),
    CRPCI_LIFECYCLE_TEXT(directory.credential, "registry_credential", CRPCI_OPTION_SECRET),
    CRPCI_LIFECYCLE_ROW(directory.timeout_ms, "registry_timeout_ms", 0, 3000, 0, 86400000),
    CRPCI_LIFECYCLE_ROW(directory.session_timeout_ms, "session_timeout_ms", 0, 15000, 15000,
                        86400000),
    CRPCI_LIFECYCLE_ROW(directory.must_connect, "must_connect", 0, 0, 0, 1),
    CRPCI_LIFECYCLE_NUMBER(weight, 100, 0, 1000000),
    CRPCI_LIFECYCLE_NUMBER(warmup_ms, 0, 0, 86400000),
    CRPCI_LIFECYCLE_NUMBER(io_threads, 0, 0, 1024),
    CRPCI_LIFECYCLE_NUMBER(workers, 0, 0, 1024),
    CRPCI_LIFECYCLE_NUMBER(worker_queue, 1024, 0, CRPCI_OPTION_ANY),
    CRPCI_LIFECYCLE_ROW(worker_stack, "worker_stack", CRPCI_OPTION_STACK, 256 << 10, 0,
                        CRPCI_OPTION_ANY),
    CRPCI_LIFECYCLE_POLICY(ordered, 0, -1, 1),
    CRPCI_LIFECYCLE_NUMBER(max_concurrency, 8192, 0, CRPCI_OPTION_ANY),
    CRPCI_LIFECYCLE_NUMBER(max_connections, 1024, 0, CRPCI_OPTION_ANY),
    CRPCI_LIFECYCLE_NUMBER(first_request_ms, 60000, 0, 86400000),
    CRPCI_LIFECYCLE_TEXT(access.allow, "allow", 0),
    CRPCI_LIFECYCLE_TEXT(access.peers, "peers", 0),
    CRPCI_LIFECYCLE_ROW(limits.max_body, "max_body", 0, 64 << 20, INT32_MAX, INT32_MAX),
    CRPCI_LIFECYCLE_ROW(limits.max_queued, "max_queued", 0, 4 << 20, 0, CRPCI_OPTION_ANY),
    CRPCI_LIFECYCLE_NUMBER(max_skip, 256 << 20, 0, CRPCI_OPTION_ANY),
    CRPCI_LIFECYCLE_POLICY(rate_per_client, 0, 0, CRPCI_OPTION_ANY),
    CRPCI_LIFECYCLE_NUMBER(burst_per_client, 0, 0, CRPCI_OPTION_ANY),
    CRPCI_LIFECYCLE_POLICY(replay_entries, 0, 0, CRPCI_OPTION_ANY),
    CRPCI_LIFECYCLE_NUMBER(replay_ms, 60000, 0, 86400000),
    CRPCI_LIFECYCLE_NUMBER(replay_bytes, 4 << 20, 0, CRPCI_OPTION_ANY),
    CRPCI_LIFECYCLE_NUMBER(idle_timeout_ms, 0, 0, 86400000),
    CRPCI_LIFECYCLE_NUMBER(frame_timeout_ms, 30000, 0, 86400000),
    CRPCI_LIFECYCLE_NUMBER(lame_ms, 1000, 0, 86400000),
    CRPCI_LIFECYCLE_NUMBER(drain_ms, 5000, 0, 86400000),
};

static const crpci_options crpci_lifecycle_options = {CRPCI_OPTIONS_OF(crpci_lifecycle_rows)};

CRPC_API int crpc_server_options_parse(char *text, crpc_server_options *options, crpc_error *error)
{
    crpci_options_target to[] = {{&crpci_lifecycle_options, options, 0},
                                 {&crpci_drive_options, &options->loops, 0}};
    return crpci_options_lines(to, 2, text, error);
}

/* Checks options before anything is allocated, so that a wrong one costs nothing to undo. */
CRPCI_COLD int crpci_lifecycle_check(const crpc_server_options *o, crpc_error *error)
{
    int err = crpci_options_check(&crpci_lifecycle_options, o, error);
    if (!CRPC_ENABLE_POLICY && o->method_limit_count && !err)
        err = crpci_status_set(error, CRPC_EUNSUPPORTED,
                               "method_limits: not compiled in: CRPC_ENABLE_POLICY is 0");
    return err ? err : crpci_options_check(&crpci_drive_options, &o->loops, error);
}

/* Takes over checked options and gives them their final values. The default of max_concurrency is
 * for each I/O thread; lame_ms has a default only where there is a registry to leave. */
CRPCI_COLD void crpci_lifecycle_configure(crpc_server *s, const crpc_server_options *in)
{
    crpc_server_options *o = &s->options;
    *o = *in;
    snprintf(s->io.thread_name, sizeof s->io.thread_name, "%s",
             in->loops.thread_name ? in->loops.thread_name : "crpc-io");
    crpci_options_fill(&crpci_lifecycle_options, o);
    if (!o->directory.application)
        o->directory.application = "crpc";
    s->max_serving = o->max_concurrency ? (uint32_t)o->max_concurrency : INT32_MAX;
    if (!in->max_concurrency && o->io_threads)
        s->max_serving *= (uint32_t)o->io_threads;
    if (!in->lame_ms && !in->registry)
        o->lame_ms = 0;
    if (!o->replay_bytes)
        o->replay_bytes = INT64_MAX;
    s->guard.all = o->ordered > 0 || o->rate_per_client > 0;
}

/* With `keep` replaces the texts of the options by copies, because the program may free its own;
 * without it frees the copies. CRPC_ENOMEM: some are NULL now. */
CRPCI_COLD int crpci_lifecycle_keep_texts(crpc_server *s, bool keep)
{
    size_t i;
    int err = CRPC_OK;
    for (i = 0; i < crpci_lifecycle_options.count; i++) {
        char *at = (char *)&s->options + crpci_lifecycle_rows[i].offset, *text, *copy = NULL;
        if (!(crpci_lifecycle_rows[i].flags & CRPCI_OPTION_TEXT))
            continue;
        memcpy(&text, at, sizeof text);
        if (!keep)
            crpci_heap_strfree(s->heap, text);
        else if (text && (copy = crpci_heap_strndup(s->heap, text, strlen(text))) == NULL)
            err = CRPC_ENOMEM;
        memcpy(at, &copy, sizeof copy);
    }
    return err;
}

/* Frees the struct when the last reference has gone: that of the program, or of a request that
 * ended after the close. Any thread; a loop may be locked. */
CRPCI_FN void crpci_lifecycle_free(crpc_server *s)
{
    crpci_heap *h = s->heap;
    crpci_service_free(&s->services, h);
    if (s->worker_count)
        crpci_worker_free(&s->workers);
    if (CRPC_ENABLE_POLICY)
        crpci_guard_close(s);
    crpci_heap_free(h, s->enrolment.items, s->enrolment.count * sizeof *s->enrolment.items);
    crpci_peer_free_networks(&s->listener.allow, h);
    crpci_lifecycle_keep_texts(s, false);
    crpci_heap_retire(h, s, sizeof *s);
    crpci_heap_unref(h);
}

CRPC_API int crpc_server_open(crpc_server **server, const crpc_server_options *options,
                              crpc_error *error)
{
    crpc_server_options o;
    crpc_server *s;
    crpc_loop *l;
    int err = CRPC_OK;
    *server = NULL;
    memset(&o, 0, sizeof o);
    if (options)
        o = *options;
    err = crpci_lifecycle_check(&o, error);
    if (err)
        return err;
    l = o.loop;
    if (!l) {
        err = crpc_loop_open(&l, &o.loops);
        if (err)
            return crpci_status_set(error, err, "server: cannot open its private loop: %s",
                                    crpc_status_text(err));
    }
    s = (crpc_server *)crpci_heap_alloc(l->heap, sizeof *s);
    if (!s || (CRPC_ENABLE_POLICY && crpci_thread_mutex_init(&s->guard.lock))) {
        crpci_heap_free(l->heap, s, sizeof *s);
        if (!o.loop)
            crpc_loop_close(l);
        return crpci_status_set(error, CRPC_ENOMEM, "server: out of memory");
    }
    CRPCI_HANDLE_OPEN(s);
    s->loop = l;
    s->heap = l->heap;
    crpci_heap_ref(s->heap);
    crpci_loop_hold(l);
    s->private_loop = !o.loop;
    s->refs = 1;
    s->destroy = crpci_lifecycle_free;
    s->guard.ops = CRPC_ENABLE_POLICY ? &crpci_guard_ops : NULL;
    crpci_list_init(&s->listener.list);
    crpci_timer_init(&s->drain.timer, crpci_lifecycle_drain_tick);
    crpci_loop_task_init(&s->drain.close_task, crpci_lifecycle_close_task);
    crpci_lifecycle_configure(s, &o);
    s->listener.reserve_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (crpci_lifecycle_keep_texts(s, true) || (CRPC_ENABLE_POLICY && crpci_guard_open(s)))
        err = crpci_status_set(error, CRPC_ENOMEM, "server: out of memory");
    if (!err)
        err = crpci_peer_read_networks(&s->listener.allow, s->heap, o.access.allow, "allow", false,
                                       error);
    if (!err && CRPC_ENABLE_POLICY)
        err = crpci_peer_read_networks(&s->guard.peers.weights, s->heap, o.access.peers, "peers",
                                       true, error);
    if (!err && o.registry)
#if CRPCI_DIRECTORY
        err = crpci_open_registry(l, o.registry, NULL, NULL, error);
#else
        err = crpci_status_set(error, CRPC_EUNSUPPORTED, "%.100s: no registry is compiled in",
                               o.registry);
#endif
    if (!err && o.listen)
        err = crpc_server_listen(s, o.listen, error);
    if (err) {
        crpc_server_close(s);
        return err;
    }
    *server = s;
    return CRPC_OK;
}

CRPC_API int crpc_server_add(crpc_server *s, const crpc_service *service, const void *handlers,
                             void *user)
{
    int err;
    if (!service || !service->name)
        return CRPC_EINVAL;
    crpci_loop_lock(s->loop);
    err = crpci_thread_load(&s->state) != CRPCI_SERVER_NEW
              ? CRPC_EBUSY
              : crpci_service_add(&s->services, s->heap, service, handlers, user);
    crpci_loop_unlock(s->loop);
    return err;
}

/* Starts I/O threads and workers. After a failure crpc_server_close stops those that run. The I/O
 * loops use the hooks of the server's heap: one log and one allocator for the whole server. */
CRPCI_COLD int crpci_lifecycle_start_threads(crpc_server *s, crpc_error *error)
{
    size_t want = (size_t)s->options.io_threads;
    crpc_loop_options lo = s->options.loops;
    int err = CRPC_OK;
    lo.hooks = s->heap->hooks;
    if (!lo.hooks.log_level)
        lo.hooks.log_level = -1;
    lo.thread_name = s->io.thread_name;
    if (want) {
        s->io.loops = (crpc_loop **)crpci_heap_alloc(s->heap, want * sizeof *s->io.loops);
        if (!s->io.loops)
            return crpci_status_set(error, CRPC_ENOMEM, "server: out of memory");
    }
    while (!err && s->io.count < want) {
        err = crpc_loop_open(&s->io.loops[s->io.count], &lo);
        if (!err)
            err = crpc_loop_start(s->io.loops[s->io.count++]);
    }
    if (err)
        return crpci_status_set(error, err, "I/O thread %zu: cannot be started: %s", s->io.count,
                                crpc_status_text(err));
    if (s->options.workers) {
        err = crpci_worker_start(&s->workers, s->heap, (size_t)s->options.workers,
                                 s->options.worker_queue, (size_t)s->options.worker_stack);
        if (err)
            return crpci_status_set(error, err, "worker threads cannot be started: %s",
                                    crpc_status_text(err));
        s->worker_count = (size_t)s->options.workers;
    }
    return CRPC_OK;
}

CRPC_API int crpc_server_start(crpc_server *s, crpc_error *error)
{
    crpc_loop *l = s->loop;
    int err;
    if (crpci_thread_load(&s->state) != CRPCI_SERVER_NEW || s->io.loops)
        return crpci_status_set(error, CRPC_EBUSY,
                                "the server has been started already; it can be started only once");
    if (crpci_list_empty(&s->listener.list))
        return crpci_status_set(error, CRPC_EINVAL, "the server has no listener: set listen");
    err = CRPC_ENABLE_POLICY ? crpci_guard_start_limits(s, error) : CRPC_OK;
    err = err ? err : crpci_lifecycle_start_threads(s, error);
    if (err)
        return err;
    crpci_loop_lock(l);
    crpci_thread_store(&s->state, CRPCI_SERVER_RUNNING);
    err = crpci_listener_start(s);
    crpci_loop_unlock(l);
    if (err)
        return crpci_status_set(error, err,
                                "server: cannot wait for connections on its listeners: %s",
                                crpc_status_text(err));
#if CRPCI_DIRECTORY
    if (s->options.registry) {
        err = crpci_enrolment_start(s, error);
        err = err ? err : crpci_enrolment_await(s, error);
    }
#endif
    if (err) {
        crpci_loop_lock(l);
        s->options.lame_ms = 0; /* the program can only close it now, and need not wait */
        crpci_loop_unlock(l);
    }
    return err;
}

CRPC_API int crpc_server_run(crpc_server *s)
{
    crpc_loop *l = s->loop;
    crpc_error error;
    bool running, closed;
    int err = CRPC_OK;
    if (crpci_thread_load(&s->state) == CRPCI_SERVER_NEW)
        err = crpc_server_start(s, &error);
    if (err) {
        crpci_heap_log(s->heap, CRPC_LOG_ERROR, "server: cannot start: %s", error.text);
        return err;
    }
    crpci_loop_hold(l); /* a callback may close the server, and with it the loop */
    crpci_thread_ref(&s->refs);
    crpci_loop_lock(l);
    running = s->drain.running = crpci_thread_load(&s->state) < CRPCI_SERVER_STOPPED;
    crpci_loop_unlock(l);
    if (running)
        err = crpc_loop_run(l);
    crpci_loop_lock(l);
    s->drain.running = false;
    closed = s->drain.close_later;
    crpci_loop_unlock(l);
    if (!err && !closed) {
        crpc_server_stop(s);
        crpci_lifecycle_await_stop(s);
    }
    crpci_context_drop_server(s);
    crpci_loop_release(l);
    return err;
}

CRPC_API crpc_loop *crpc_server_loop(crpc_server *s)
{
    return s->loop;
}

CRPC_API void crpc_server_stats_get(crpc_server *s, crpc_loop_stats *stats)
{
    const size_t first = offsetof(crpc_loop_stats, waits);
    const size_t last = offsetof(crpc_loop_stats, timeouts);
    size_t i, at;
    crpc_loop_stats_get(s->loop, stats);
    for (i = 0; i < s->io.count; i++) {
        crpc_loop_stats one;
        crpc_loop_stats_get(s->io.loops[i], &one);
        for (at = first; at <= last; at += sizeof(uint64_t)) /* all members between are counters */
            *(uint64_t *)(void *)((char *)stats + at) += *(uint64_t *)(void *)((char *)&one + at);
        stats->connections += one.connections;
        stats->pending += one.pending;
        stats->watches += one.watches;
        stats->memory += one.memory;
        stats->memory_peak += one.memory_peak;
    }
    if (CRPC_ENABLE_POLICY)
        crpci_guard_stats(s, stats);
}

#endif /* CRPC_ENABLE_SERVER */

#endif /* CRPC_IMPLEMENTATION */

/*
 * crpc is available under two licences: choose the one you prefer.
 *
 * --------------------------------------------------------------------------------
 * ALTERNATIVE A - MIT License
 *
 * Copyright (c) 2026 the crpc authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of
 * this software and associated documentation files (the "Software"), to deal in
 * the Software without restriction, including without limitation the rights to
 * use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies
 * of the Software, and to permit persons to whom the Software is furnished to do
 * so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all
 * copies or substantial portions of the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
 * IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
 * FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
 * AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
 * LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
 * OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
 * SOFTWARE.
 *
 * --------------------------------------------------------------------------------
 * ALTERNATIVE B - Public Domain (www.unlicense.org)
 *
 * This is free and unencumbered software released into the public domain.
 *
 * Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
 * software, either in source code form or as a compiled binary, for any purpose,
 * commercial or non-commercial, and by any means.
 *
 * In jurisdictions that recognize copyright laws, the author or authors of this
 * software dedicate any and all copyright interest in the software to the public
 * domain. We make this dedication for the benefit of the public at large and to
 * the detriment of our heirs and successors. We intend this dedication to be an
 * overt act of relinquishment in perpetuity of all present and future rights to
 * this software under copyright law.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
 * IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
 * FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
 * AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN
 * ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
 * WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 */
