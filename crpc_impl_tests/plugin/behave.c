/* What the generated code does, checked without crpc's implementation: the functions of crpc.h that
 * it calls are replaced by fakes that write down their arguments. */
#include "user.crpc.h"
#include "common/types.crpc.h"

#include <stdio.h>
#include <string.h>

#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            printf("behave.c:%d: %s\n", __LINE__, #condition);                                     \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

/* --- fakes ------------------------------------------------------------------------------------ */

static struct {
    const char *function;
    crpc_channel *channel;
    const crpc_method *method;
    const void *request;
    void *response;
    const void *call;
    crpc_done_fn deliver;
    crpc_any_fn fn;
    void *user;
    crpc_id id;
} seen;

bool crpc_view_field(struct pb_istream_s *in, struct pb_ostream_s *out,
                     const struct pb_field_iter_s *field)
{
    (void)in;
    (void)out;
    (void)field;
    return false;
}

int crpc_channel_call(crpc_channel *channel, const crpc_method *method, const void *request,
                      void *response, crpc_call *call)
{
    seen.function = "call";
    seen.channel = channel;
    seen.method = method;
    seen.request = request;
    seen.response = response;
    seen.call = call;
    return 11;
}

int crpc_channel_call_async(crpc_channel *channel, const crpc_method *method, const void *request,
                            crpc_done_fn deliver, crpc_any_fn fn, void *user, const crpc_call *call)
{
    seen.function = "call_async";
    seen.channel = channel;
    seen.method = method;
    seen.request = request;
    seen.deliver = deliver;
    seen.fn = fn;
    seen.user = user;
    seen.call = call;
    return 12;
}

int crpc_channel_begin(crpc_channel *channel, const crpc_method *method, const void *request,
                       crpc_id *id, const crpc_call *call)
{
    seen.function = "begin";
    seen.channel = channel;
    seen.method = method;
    seen.request = request;
    id->value = 99;
    seen.call = call;
    return 13;
}

int crpc_channel_fetch(crpc_channel *channel, const crpc_method *method, crpc_id id, void *response,
                       crpc_call *call)
{
    seen.function = "fetch";
    seen.channel = channel;
    seen.method = method;
    seen.id = id;
    seen.response = response;
    seen.call = call;
    return 14;
}

int crpc_channel_notify(crpc_channel *channel, const crpc_method *method, const void *request,
                        const crpc_call *call)
{
    seen.function = "notify";
    seen.channel = channel;
    seen.method = method;
    seen.request = request;
    seen.call = call;
    return 15;
}

/* --- what is in the tables -------------------------------------------------------------------- */

static int check_tables(void)
{
    const crpc_service *s = &demo_UserService;
    EXPECT(strcmp(s->name, "demo.UserService") == 0);
    EXPECT(s->method_count == 5);
    for (size_t i = 0; i < s->method_count; i++) {
        EXPECT(strcmp(s->methods[i].service, s->name) == 0);
    }
    EXPECT(strcmp(s->methods[0].name, "Login") == 0);
    EXPECT(s->methods[0].request == &demo_LoginRequest_msg);
    EXPECT(s->methods[0].response == &demo_LoginResponse_msg);
    EXPECT(s->methods[0].request_size == sizeof(demo_LoginRequest));
    EXPECT(s->methods[0].response_size == sizeof(demo_LoginResponse));
    EXPECT(s->methods[0].flags == CRPC_METHOD_IDEMPOTENT);
    EXPECT(s->methods[0].timeout_ms == 500);
    EXPECT(s->methods[1].flags == CRPC_METHOD_IDEMPOTENT);
    EXPECT(s->methods[1].timeout_ms == 0);
    EXPECT(s->methods[2].flags == 0);
    EXPECT(s->methods[2].request == &google_protobuf_Empty_msg);
    EXPECT(strcmp(s->methods[3].name, "register") == 0);
    EXPECT(s->methods[3].response == &demo_LoginResponse_Session_msg);
    EXPECT(strcmp(demo_Empty.name, "demo.Empty") == 0);
    EXPECT(demo_Empty.method_count == 0);
    EXPECT(strcmp(common_Bank.name, "common.Bank") == 0);
    EXPECT(common_Bank.methods[0].timeout_ms == 0);
    return 0;
}

/* --- the server's side ------------------------------------------------------------------------ */

#if CRPC_ENABLE_SERVER
static crpc_context *handler_context;

static int login(crpc_context *context, const demo_LoginRequest *request,
                 demo_LoginResponse *response)
{
    handler_context = context;
    response->result = request->scores_count == 3 ? demo_LoginResponse_Result_LOCKED
                                                  : demo_LoginResponse_Result_OK;
    return 77;
}

static int check_server(void)
{
    int there = 0;
    crpc_context *context = (crpc_context *)(void *)&there;
    demo_LoginRequest request = demo_LoginRequest_init_zero;
    demo_LoginResponse response = demo_LoginResponse_init_zero;
    demo_UserService_handlers handlers;
    const crpc_method *m = demo_UserService.methods;
    memset(&handlers, 0, sizeof(handlers));
    handlers.Login = login;
    request.scores_count = 3;
    EXPECT(m[0].serve(context, &request, &response, &handlers) == 77);
    EXPECT(handler_context == context);
    EXPECT(response.result == demo_LoginResponse_Result_LOCKED);
    for (size_t i = 1; i < demo_UserService.method_count; i++) {
        EXPECT(m[i].serve(context, &request, &response, &handlers) == CRPC_ENOMETHOD);
    }
    EXPECT(m[0].serve(context, &request, &response, NULL) == CRPC_ENOMETHOD);
    return 0;
}
#else
static int check_server(void)
{
    for (size_t i = 0; i < demo_UserService.method_count; i++) {
        EXPECT(demo_UserService.methods[i].serve == NULL);
    }
    return 0;
}
#endif

/* --- the client's side ------------------------------------------------------------------------ */

#if CRPC_ENABLE_CLIENT
static struct {
    void *user;
    int status;
    const demo_LoginResponse *response;
    crpc_call *call;
} told;

static void login_done(void *user, int status, const demo_LoginResponse *response, crpc_call *call)
{
    told.user = user;
    told.status = status;
    told.response = response;
    told.call = call;
}

static int check_async(crpc_channel *channel)
{
    int user = 0;
    demo_LoginRequest request = demo_LoginRequest_init_zero;
    demo_LoginResponse response = demo_LoginResponse_init_zero;
    crpc_call call = CRPC_INIT;
    crpc_done done = CRPC_INIT;
    memset(&seen, 0, sizeof(seen));
    EXPECT(demo_UserService_Login_async(channel, &request, NULL, &user, &call) == CRPC_EINVAL);
    EXPECT(seen.function == NULL);
    EXPECT(demo_UserService_Login_async(channel, &request, login_done, &user, &call) == 12);
    EXPECT(strcmp(seen.function, "call_async") == 0);
    EXPECT(seen.channel == channel && seen.method == &demo_UserService.methods[0]);
    EXPECT(seen.request == &request && seen.user == &user && seen.call == &call);
    done.status = 5;
    done.response = &response;
    done.call = &call;
    done.user = seen.user;
    done.fn = seen.fn;
    seen.deliver(&done);
    EXPECT(told.user == &user && told.status == 5);
    EXPECT(told.response == &response && told.call == &call);
    return 0;
}

static int check_client(void)
{
    int there = 0;
    crpc_channel *channel = (crpc_channel *)(void *)&there;
    demo_LoginRequest request = demo_LoginRequest_init_zero;
    demo_LoginResponse_Session session = demo_LoginResponse_Session_init_zero;
    crpc_call call = CRPC_INIT;
    crpc_id id = CRPC_INIT;
    EXPECT(demo_UserService_register(channel, &request, &session, &call) == 11);
    EXPECT(strcmp(seen.function, "call") == 0);
    EXPECT(seen.channel == channel && seen.method == &demo_UserService.methods[3]);
    EXPECT(seen.request == &request && seen.response == &session && seen.call == &call);
    EXPECT(demo_UserService_register_begin(channel, &request, &id, NULL) == 13);
    EXPECT(strcmp(seen.function, "begin") == 0 && id.value == 99 && seen.call == NULL);
    EXPECT(seen.method == &demo_UserService.methods[3] && seen.request == &request);
    EXPECT(demo_UserService_register_fetch(channel, id, &session, &call) == 14);
    EXPECT(strcmp(seen.function, "fetch") == 0 && seen.id.value == 99);
    EXPECT(strcmp(seen.method->name, "register") == 0);
    EXPECT(seen.response == &session && seen.call == &call);
    EXPECT(demo_UserService_register_notify(channel, &request, &call) == 15);
    EXPECT(strcmp(seen.function, "notify") == 0 && seen.request == &request);
    EXPECT(seen.method == &demo_UserService.methods[3] && seen.call == &call);
    return check_async(channel);
}
#else
static int check_client(void)
{
    return 0;
}
#endif

int main(void)
{
    return check_tables() || check_server() || check_client();
}
