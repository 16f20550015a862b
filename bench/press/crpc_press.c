/* crpc_press: a load generator for any baidu_std server, whatever it is written with.
 *
 *   crpc_press URL Service.Method [OPTION...]
 *
 *   $ crpc_press tcp://127.0.0.1:8000 example.EchoService.Echo --text-field 1=hello --rate 20000
 *
 * It does not know the message type: the request is raw bytes, put together from the options, and
 * the reply is only measured. `crpc_press --help` lists the options.
 *
 * Closed loop (no --rate): --concurrency calls are in flight at any time, and each call that ends
 * begins the next. This measures the most that a server can do. A server that stops now and then
 * looks better than it is, because its callers wait before they call again.
 *
 * Open loop (--rate N): N calls a second are due, however slow the earlier ones are. The latency of
 * a call counts from when it was due, not from when it was sent, so a server that stands still for
 * a second is charged with every call of that second (no coordinated omission). Calls that were due
 * and could not be sent by the end, because --concurrency was reached, are counted with the time
 * they had waited. `late` says how far the sending was behind: if it is not far below the
 * latencies, the generator was the bottleneck.
 *
 * Latencies are those of calls that were answered or timed out. Other failures are counted by code.
 * Calls that were due before the end of --warmup are left out.
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "hist.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <pb_decode.h>
#include <pb_encode.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#define SECOND INT64_C(1000000000)

static const char usage_text[] =
    "usage: crpc_press URL Service.Method [OPTION...]\n"
    "\n"
    "Calls a method of a baidu_std server at a rate, or as fast as it answers, and prints\n"
    "latencies and failures. URL: tcp://host:port, unix:///path, list://a:1,b:2\n"
    "\n"
    "The request is put together from these options, in the order given:\n"
    "  --payload FILE       the bytes of a file\n"
    "  --hex STR            bytes in hexadecimal; blanks are skipped\n"
    "  --text-field N=STR   protobuf field N, a string or bytes\n"
    "  --int-field N=NUM    protobuf field N, a varint\n"
    "  --attachment X       attachment: the bytes of file X, or X bytes (1000, 64k, 1m)\n"
    "  --user-field K=STR   a user_fields entry, such as crpc-key=a\n"
    "The load:\n"
    "  --rate N             calls a second, however slow the replies are (open loop). Default 0:\n"
    "                       each call that ends begins the next (closed loop)\n"
    "  --concurrency N      calls in flight at most. Default 16; in an open loop 4096\n"
    "  --connections N      connections, used in turn. Default 1\n"
    "  --duration S         seconds that are measured. Default 10\n"
    "  --warmup S           seconds of load before the measurement. Default 1\n"
    "  --timeout-ms N       deadline of each call. Default 1000\n"
    "The output:\n"
    "  --json               prints the summary as one JSON object on stdout\n"
    "  --quiet              prints no line each second\n"
    "  --print              prints the fields of the first reply\n"
    "SIGINT ends the run and prints the summary; a second SIGINT ends at once.\n"
    "Exit status: 0 if a call succeeded, 1 if none did, 2 for wrong usage.\n";

/* --- the messages ------------------------------------------------------------------------------
 * crpc takes nanopb structs. This one has a single field, whose callback writes the whole message:
 * any bytes, no tag. */
typedef struct raw_request {
    crpc_view bytes;
} raw_request;

static bool raw_write(pb_istream_t *in, pb_ostream_t *out, const pb_field_iter_t *field)
{
    const crpc_view *bytes = (const crpc_view *)field->pData;

    (void)in;
    return pb_write(out, (const pb_byte_t *)crpc_view_data(*bytes), crpc_view_size(*bytes));
}

#define raw_request_CALLBACK        raw_write
#define raw_request_DEFAULT         NULL
#define raw_request_FIELDLIST(X, a) X(a, CALLBACK, REQUIRED, BYTES, bytes, 1)
PB_BIND(raw_request, raw_request, AUTO)

/* And this one adds up what its fields take on the wire; those above 31 are skipped unseen. */
typedef struct raw_reply {
    size_t size;
    FILE *print; /* NULL: do not */
} raw_reply;

static size_t varint_size(uint64_t value)
{
    size_t n = 1;

    while (value >>= 7) {
        n++;
    }
    return n;
}

static void print_field(FILE *to, const pb_field_iter_t *field, pb_istream_t in, bool number)
{
    pb_byte_t byte = 0;
    size_t shown = 0;

    fprintf(to, "reply field %u, %s of %zu bytes:", (unsigned)field->tag,
            number ? "a number" : "text, bytes or a message", in.bytes_left);
    while (in.bytes_left && shown++ < 64 && pb_read(&in, &byte, 1)) {
        if (!number && isprint(byte) && byte != '\\') {
            fprintf(to, "%s%c", shown == 1 ? " " : "", byte);
        } else {
            fprintf(to, "%s\\x%02x", shown == 1 ? " " : "", byte);
        }
    }
    fprintf(to, "%s\n", in.bytes_left ? "..." : "");
}

static bool raw_read(pb_istream_t *in, pb_ostream_t *out, const pb_field_iter_t *field)
{
    static pb_byte_t nothing;
    raw_reply *reply = (raw_reply *)field->message;
    /* nanopb hands numbers over in a buffer stream of its own, and crpc's streams are none */
    bool number = in->callback == pb_istream_from_buffer(&nothing, 0).callback;

    (void)out;
    reply->size += varint_size((uint64_t)field->tag << 3) + in->bytes_left;
    reply->size += number ? 0 : varint_size(in->bytes_left);
    if (reply->print) {
        print_field(reply->print, field, *in, number);
    }
    return pb_read(in, NULL, in->bytes_left);
}

#define raw_reply_CALLBACK     raw_read
#define raw_reply_DEFAULT      NULL
#define RAW_FIELD(X, a, tag)   X(a, CALLBACK, OPTIONAL, BYTES, size, tag)
#define raw_reply_FIELDLIST(X, a)                                                                  \
    RAW_FIELD(X, a, 1) RAW_FIELD(X, a, 2) RAW_FIELD(X, a, 3) RAW_FIELD(X, a, 4)                    \
    RAW_FIELD(X, a, 5) RAW_FIELD(X, a, 6) RAW_FIELD(X, a, 7) RAW_FIELD(X, a, 8)                    \
    RAW_FIELD(X, a, 9) RAW_FIELD(X, a, 10) RAW_FIELD(X, a, 11) RAW_FIELD(X, a, 12)                 \
    RAW_FIELD(X, a, 13) RAW_FIELD(X, a, 14) RAW_FIELD(X, a, 15) RAW_FIELD(X, a, 16)                \
    RAW_FIELD(X, a, 17) RAW_FIELD(X, a, 18) RAW_FIELD(X, a, 19) RAW_FIELD(X, a, 20)                \
    RAW_FIELD(X, a, 21) RAW_FIELD(X, a, 22) RAW_FIELD(X, a, 23) RAW_FIELD(X, a, 24)                \
    RAW_FIELD(X, a, 25) RAW_FIELD(X, a, 26) RAW_FIELD(X, a, 27) RAW_FIELD(X, a, 28)                \
    RAW_FIELD(X, a, 29) RAW_FIELD(X, a, 30) RAW_FIELD(X, a, 31)
PB_BIND(raw_reply, raw_reply, AUTO)

/* --- what there is to do -------------------------------------------------------------------- */

typedef struct bytes {
    char *data;
    size_t size;
} bytes;

typedef struct plan {
    const char *url;
    char service[256];
    const char *method; /* behind the dot in service, which is cut there */
    bytes payload;
    bytes attachment;
    crpc_field field; /* key NULL: none */
    double rate;
    double duration;
    double warmup;
    int concurrency; /* 0: the default */
    int connections;
    int timeout_ms;
    bool json;
    bool quiet;
    bool print;
} plan;

static int complain(const char *what, const char *detail)
{
    fprintf(stderr, "crpc_press: %s: %s\n", what, detail);
    return 2;
}

static bool append(bytes *to, const void *data, size_t size)
{
    char *grown = (char *)realloc(to->data, to->size + size + 1);

    if (!grown) {
        return false;
    }
    to->data = grown;
    if (size) {
        memcpy(grown + to->size, data, size);
    }
    to->size += size;
    return true;
}

static bool append_varint(bytes *to, uint64_t value)
{
    uint8_t out[10];
    size_t n = 0;

    for (; value >= 0x80; value >>= 7) {
        out[n++] = (uint8_t)(value | 0x80);
    }
    out[n++] = (uint8_t)value;
    return append(to, out, n);
}

static bool append_file(bytes *to, const char *path)
{
    FILE *f = fopen(path, "rb");
    char part[4096];
    size_t n;
    bool ok = f != NULL;

    while (ok && (n = fread(part, 1, sizeof part, f)) > 0) {
        ok = append(to, part, n);
    }
    ok = ok && !ferror(f);
    if (f) {
        fclose(f);
    }
    return ok;
}

static bool append_hex(bytes *to, const char *text)
{
    char pair[3] = "";
    size_t have = 0;
    uint8_t byte;

    for (; *text; text++) {
        if (isspace((unsigned char)*text)) {
            continue;
        }
        if (!isxdigit((unsigned char)*text)) {
            return false;
        }
        pair[have++] = *text;
        byte = (uint8_t)strtoul(pair, NULL, 16);
        if (have == 2 && !append(to, &byte, 1)) {
            return false;
        }
        have &= 1;
    }
    return have == 0;
}

/* N=STR or N=NUM: a protobuf field. */
static bool append_field(bytes *to, const char *text, bool number)
{
    char *end = NULL;
    unsigned long tag = strtoul(text, &end, 10);
    const char *value = end + 1;
    long long n;

    if (!isdigit((unsigned char)*text) || *end != '=' || tag < 1 || tag > 536870911) {
        return false;
    }
    if (!number) {
        return append_varint(to, (uint64_t)tag << 3 | 2) && append_varint(to, strlen(value)) &&
               append(to, value, strlen(value));
    }
    errno = 0;
    n = strtoll(value, &end, 0);
    return !errno && end != value && !*end && append_varint(to, (uint64_t)tag << 3) &&
           append_varint(to, (uint64_t)n);
}

/* KEY=STR: a user_fields entry. */
static bool set_user_field(plan *p, const char *text)
{
    bytes key = CRPC_INIT;
    const char *equals = strchr(text, '=');

    if (p->field.key || !equals || !append(&key, text, (size_t)(equals - text) + 1)) {
        return false;
    }
    key.data[equals - text] = '\0';
    p->field.key = key.data;
    p->field.value = equals + 1;
    return true;
}

/* A size such as 512, 64k or 2m, else a file. */
static bool append_attachment(bytes *to, const char *text)
{
    char *end = NULL;
    unsigned long long n = strtoull(text, &end, 10);
    int shift = *end == 'k' ? 10 : *end == 'm' ? 20 : 0;

    if (!isdigit((unsigned char)*text) || end[shift != 0]) {
        return append_file(to, text);
    }
    if (n > (unsigned)INT_MAX >> shift) {
        return false;
    }
    free(to->data);
    to->size = (size_t)n << shift;
    to->data = (char *)calloc(to->size + 1, 1);
    return to->data != NULL;
}

static bool parse_real(const char *text, double min, double max, double *out)
{
    char *end = NULL;

    *out = strtod(text, &end);
    return end != text && !*end && *out >= min && *out <= max;
}

static bool parse_int(const char *text, int min, int max, int *out)
{
    double n = 0;
    bool ok = parse_real(text, min, max, &n) && n == (double)(int)n;

    *out = (int)n;
    return ok;
}

static bool parse_value(plan *p, const char *key, const char *value)
{
    return !strcmp(key, "--payload")       ? append_file(&p->payload, value)
           : !strcmp(key, "--hex")         ? append_hex(&p->payload, value)
           : !strcmp(key, "--text-field")  ? append_field(&p->payload, value, false)
           : !strcmp(key, "--int-field")   ? append_field(&p->payload, value, true)
           : !strcmp(key, "--attachment")  ? append_attachment(&p->attachment, value)
           : !strcmp(key, "--user-field")  ? set_user_field(p, value)
           : !strcmp(key, "--rate")        ? parse_real(value, 0, 1e8, &p->rate)
           : !strcmp(key, "--duration")    ? parse_real(value, 0.01, 1e6, &p->duration)
           : !strcmp(key, "--warmup")      ? parse_real(value, 0, 1e6, &p->warmup)
           : !strcmp(key, "--concurrency") ? parse_int(value, 1, 1000000, &p->concurrency)
           : !strcmp(key, "--connections") ? parse_int(value, 1, 100000, &p->connections)
           : !strcmp(key, "--timeout-ms")  ? parse_int(value, 1, 86400000, &p->timeout_ms)
                                           : false;
}

static bool parse_flag(plan *p, const char *key)
{
    bool *flag = !strcmp(key, "--json")    ? &p->json
                 : !strcmp(key, "--quiet") ? &p->quiet
                 : !strcmp(key, "--print") ? &p->print
                                           : NULL;

    if (flag) {
        *flag = true;
    }
    return flag != NULL;
}

/* 0, or the exit status. */
static int parse(plan *p, int argc, char **argv)
{
    char *dot;
    int i;

    if (argc < 3) {
        fputs(usage_text, argc == 2 && !strcmp(argv[1], "--help") ? stdout : stderr);
        return 2;
    }
    p->url = argv[1];
    p->duration = 10;
    p->warmup = 1;
    p->connections = 1;
    p->timeout_ms = 1000;
    if (strlen(argv[2]) >= sizeof p->service) {
        return complain(argv[2], "the name is too long");
    }
    strcpy(p->service, argv[2]);
    dot = strrchr(p->service, '.');
    if (!dot || dot == p->service || !dot[1]) {
        return complain(argv[2], "expected Service.Method, as in example.EchoService.Echo");
    }
    *dot = '\0';
    p->method = dot + 1;
    for (i = 3; i < argc; i++) {
        if (parse_flag(p, argv[i])) {
            continue;
        }
        if (i + 1 == argc || !parse_value(p, argv[i], argv[i + 1])) {
            return complain(argv[i], i + 1 == argc
                                         ? "unknown option, or its value is missing; see --help"
                                         : "unknown option, or its value is wrong; see --help");
        }
        i++;
    }
    if (!p->concurrency) {
        p->concurrency = p->rate > 0 ? 4096 : 16;
    }
    return 0;
}

/* --- the run ---------------------------------------------------------------------------------- */

typedef struct press press;

typedef struct slot {
    press *run;
    struct slot *next; /* while free */
    int64_t due;
    size_t size; /* bytes of the request */
} slot;

typedef struct fault {
    int status;
    int app_code;
    uint64_t count;
    char text[CRPC_ERROR_TEXT_MAX]; /* of the first */
} fault;

#define FAULTS 16

/* Counted once for the run and once for the present second. */
typedef struct counts {
    uint64_t ok;
    uint64_t failed;
    uint64_t sent_bytes;
    uint64_t received_bytes;
    hist latency;
} counts;

struct press {
    const plan *plan;
    crpc_loop *loop;
    crpc_channel **channels;
    crpc_method method;
    raw_request request;
    crpc_call call; /* the inputs of every call */
    slot *slots;
    slot *free;
    int in_flight;
    uint64_t begun;   /* calls, warm-up included; in open loop those due so far that were sent */
    int64_t start;    /* when the first was due */
    int64_t measured; /* from when on they count */
    int64_t end;      /* from when on none is due */
    int64_t last;     /* when the last that counts ended */
    uint64_t sent;    /* that count */
    uint64_t not_sent;
    counts total;
    counts second;
    hist late;
    fault faults[FAULTS];
};

static volatile sig_atomic_t interrupted;
static crpc_loop *loop_to_stop;

static void on_signal(int signo)
{
    (void)signo;
    if (interrupted++) {
        _exit(130);
    }
    crpc_loop_stop(loop_to_stop);
}

static int64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * SECOND + ts.tv_nsec;
}

/* When call number n is due. */
static int64_t due_ns(const press *r, uint64_t n)
{
    return r->start + (int64_t)((double)n * (1e9 / r->plan->rate));
}

static void count_fault(press *r, int status, int app_code, const char *text)
{
    fault *f = r->faults;

    /* the last entry takes what does not fit */
    while (f < r->faults + FAULTS - 1 && f->count &&
           (f->status != status || f->app_code != app_code)) {
        f++;
    }
    if (!f->count++) {
        f->status = status;
        f->app_code = app_code;
        snprintf(f->text, sizeof f->text, "%s", text);
    }
}

static void count_end(counts *c, const slot *s, const crpc_done *done, int64_t ns)
{
    const raw_reply *reply = (const raw_reply *)done->response;

    if (done->status == CRPC_OK) {
        c->ok++;
        c->sent_bytes += s->size;
        c->received_bytes += reply->size + crpc_view_size(done->call->reply_attachment);
    } else {
        c->failed++;
    }
    if (done->status == CRPC_OK || done->status == CRPC_ETIMEDOUT || done->call->error.remote) {
        hist_add(&c->latency, ns, 1);
    }
}

static void begin(press *r, slot *s, int64_t due);

static void on_done(const crpc_done *done)
{
    slot *s = (slot *)done->user;
    press *r = s->run;
    int64_t now = now_ns();

    r->in_flight--;
    count_end(&r->second, s, done, now - s->due);
    if (s->due >= r->measured) {
        count_end(&r->total, s, done, now - s->due);
        if (done->status != CRPC_OK) {
            count_fault(r, done->status, done->call->error.app_code, done->call->error.text);
        }
        r->last = now;
    }
    if (r->plan->rate <= 0 && now < r->end && !interrupted) {
        begin(r, s, now);
        return;
    }
    s->next = r->free;
    r->free = s;
}

/* What cannot even be begun leaves its slot free, and is not tried again before the next step. */
static void begin(press *r, slot *s, int64_t due)
{
    crpc_channel *channel = r->channels[r->begun++ % (uint64_t)r->plan->connections];
    int64_t now = now_ns();
    int status;

    s->due = due;
    s->size = crpc_view_size(r->request.bytes) + crpc_view_size(r->call.attachment);
    status = crpc_channel_call_async(channel, &r->method, &r->request, on_done, NULL, s, &r->call);
    if (due >= r->measured) {
        r->sent++;
        hist_add(&r->late, now - due, 1);
    }
    if (status == CRPC_OK) {
        r->in_flight++;
        return;
    }
    r->second.failed++;
    if (due >= r->measured) {
        r->total.failed++;
        count_fault(r, status, 0, crpc_status_text(status));
    }
    s->next = r->free;
    r->free = s;
}

static void begin_what_is_due(press *r, int64_t now)
{
    slot *s = r->free;

    if (r->plan->rate > 0) {
        while ((s = r->free) != NULL && due_ns(r, r->begun) <= now &&
               due_ns(r, r->begun) < r->end) {
            r->free = s->next;
            begin(r, s, due_ns(r, r->begun));
        }
        return;
    }
    r->free = NULL;
    while (s && now < r->end) {
        slot *next = s->next;
        begin(r, s, now);
        s = next;
    }
}

/* Steps the loop until something came, or `until`, to the microsecond. */
static int step(press *r, int64_t until)
{
    struct pollfd fd = CRPC_INIT;
    int64_t wait = until - now_ns(), own;
    struct timespec ts;

    if (r->plan->rate <= 0 || wait <= 0) { /* closed loop: the poller's milliseconds are enough */
        return crpc_loop_step(r->loop, wait > 0 ? (int)(wait / 1000000) + 1 : 0);
    }
    own = crpc_loop_timeout(r->loop) * INT64_C(1000000);
    wait = own >= 0 && own < wait ? own : wait;
    ts.tv_sec = (time_t)(wait / SECOND);
    ts.tv_nsec = (long)(wait % SECOND);
    fd.fd = crpc_loop_fd(r->loop);
    fd.events = POLLIN;
    ppoll(&fd, 1, &ts, NULL);
    return crpc_loop_step(r->loop, 0);
}

/* --- what is shown ---------------------------------------------------------------------------- */

static double micro(uint64_t ns)
{
    return (double)ns / 1000;
}

static void print_second(press *r, int64_t now, int64_t since)
{
    const counts *c = &r->second;
    double seconds = (double)(now - since) / 1e9;

    fprintf(stderr, "%6.1f s %9.0f calls/s %8.2f MB/s  p50 %.0f p99 %.0f max %.0f us  "
                    "%d under way, %llu failed%s\n",
            (double)(now - r->start) / 1e9, (double)c->ok / seconds,
            (double)(c->sent_bytes + c->received_bytes) / seconds / 1e6,
            micro(hist_percentile(&c->latency, 50)), micro(hist_percentile(&c->latency, 99)),
            micro(c->latency.max), r->in_flight, (unsigned long long)c->failed,
            now <= r->measured ? "  (warm-up)" : "");
    memset(&r->second, 0, sizeof r->second);
}

static double elapsed(const press *r)
{
    int64_t until = r->last > r->end ? r->last : r->end;

    return until > r->measured ? (double)(until - r->measured) / 1e9 : 0;
}

static const double percents[] = {50, 90, 99, 99.9, 99.99};
#define PERCENTS (sizeof percents / sizeof percents[0])

static void fault_name(const fault *f, char *out, size_t size)
{
    if (f->status == CRPC_EAPP) {
        snprintf(out, size, "EAPP %d", f->app_code);
    } else {
        snprintf(out, size, "%s", crpc_status_name(f->status));
    }
}

static void print_text(const press *r)
{
    const counts *c = &r->total;
    double seconds = elapsed(r);
    const fault *f;
    size_t i;

    printf("%s loop: %llu sent, %llu ok, %llu failed", r->plan->rate > 0 ? "open" : "closed",
           (unsigned long long)r->sent, (unsigned long long)c->ok, (unsigned long long)c->failed);
    if (r->not_sent) {
        printf(", %llu due but not sent", (unsigned long long)r->not_sent);
    }
    printf(" in %.2f s\n", seconds);
    for (f = r->faults; f < r->faults + FAULTS && f->count; f++) {
        char name[32];
        fault_name(f, name, sizeof name);
        printf("  %8llu %s: %s\n", (unsigned long long)f->count, name, f->text);
    }
    printf("%.0f calls/s, sent %.2f MB/s, received %.2f MB/s\n",
           seconds > 0 ? (double)c->ok / seconds : 0,
           seconds > 0 ? (double)c->sent_bytes / seconds / 1e6 : 0,
           seconds > 0 ? (double)c->received_bytes / seconds / 1e6 : 0);
    printf("latency in us, from when a call was due:\n");
    for (i = 0; i < PERCENTS; i++) {
        printf("  p%-6g %12.1f\n", percents[i], micro(hist_percentile(&c->latency, percents[i])));
    }
    printf("  %-7s %12.1f\n  %-7s %12.1f\n", "max", micro(c->latency.max), "mean",
           hist_mean(&c->latency) / 1000);
    if (r->plan->rate > 0) {
        printf("sent late by: p50 %.1f, p99 %.1f, max %.1f us\n",
               micro(hist_percentile(&r->late, 50)), micro(hist_percentile(&r->late, 99)),
               micro(r->late.max));
    }
}

static void json_string(const char *text)
{
    putchar('"');
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') {
            putchar('\\');
        }
        if ((unsigned char)*text < 0x20) {
            printf("\\u%04x", (unsigned char)*text);
        } else {
            putchar(*text);
        }
    }
    putchar('"');
}

static void json_hist(const char *name, const hist *h)
{
    size_t i;

    printf("\"%s\": {\"count\": %llu, \"mean\": %.1f", name, (unsigned long long)h->count,
           hist_mean(h) / 1000);
    for (i = 0; i < PERCENTS; i++) {
        printf(", \"p%g\": %.1f", percents[i], micro(hist_percentile(h, percents[i])));
    }
    printf(", \"max\": %.1f}", micro(h->max));
}

static void print_json(const press *r)
{
    const counts *c = &r->total;
    const plan *p = r->plan;
    double seconds = elapsed(r);
    const fault *f;

    printf("{\"url\": ");
    json_string(p->url);
    printf(", \"service\": ");
    json_string(p->service);
    printf(", \"method\": ");
    json_string(p->method);
    printf(", \"loop\": \"%s\", \"rate\": %g, \"concurrency\": %d, \"connections\": %d",
           p->rate > 0 ? "open" : "closed", p->rate, p->concurrency, p->connections);
    printf(", \"request_bytes\": %zu, \"attachment_bytes\": %zu, \"seconds\": %.3f",
           p->payload.size, p->attachment.size, seconds);
    printf(", \"sent\": %llu, \"ok\": %llu, \"failed\": %llu, \"not_sent\": %llu",
           (unsigned long long)r->sent, (unsigned long long)c->ok, (unsigned long long)c->failed,
           (unsigned long long)r->not_sent);
    printf(", \"failures\": {");
    for (f = r->faults; f < r->faults + FAULTS && f->count; f++) {
        char name[32];
        fault_name(f, name, sizeof name);
        printf("%s\"%s\": %llu", f == r->faults ? "" : ", ", name, (unsigned long long)f->count);
    }
    printf("}, \"calls_per_s\": %.1f, \"sent_mb_per_s\": %.3f, \"received_mb_per_s\": %.3f, ",
           seconds > 0 ? (double)c->ok / seconds : 0,
           seconds > 0 ? (double)c->sent_bytes / seconds / 1e6 : 0,
           seconds > 0 ? (double)c->received_bytes / seconds / 1e6 : 0);
    json_hist("latency_us", &c->latency);
    printf(", ");
    json_hist("late_us", &r->late);
    printf("}\n");
}

/* --- from start to end ------------------------------------------------------------------------ */

static int explain(int status, const crpc_error *error, const char *what)
{
    fprintf(stderr, "crpc_press: %s: %s (%d): %s\n", what, crpc_status_name(status), status,
            error->text[0] ? error->text : crpc_status_text(status));
    return 1;
}

/* Channels of a loop share a connection where all that concerns it is the same: each gets a limit
 * of its own. */
static int open_channels(press *r)
{
    const plan *p = r->plan;
    int i;

    for (i = 0; i < p->connections; i++) {
        crpc_channel_options options = CRPC_INIT;
        crpc_error error = CRPC_INIT;
        int status;

        options.loop = r->loop;
        options.policy.retries = -1;
        options.limits.max_queued = (INT64_C(1) << 30) + i;
        status = crpc_channel_open(&r->channels[i], p->url, &options, &error);
        if (status != CRPC_OK) {
            return explain(status, &error, p->url);
        }
    }
    return 0;
}

/* One call, to see that there is something to measure. */
static int first_call(press *r)
{
    raw_reply reply = CRPC_INIT;
    crpc_call call = r->call;
    int status;

    reply.print = r->plan->print ? stderr : NULL;
    status = crpc_channel_call(r->channels[0], &r->method, &r->request, &reply, &call);
    if (status != CRPC_OK) {
        explain(status, &call.error, "the first call");
    } else if (r->plan->print) {
        fprintf(stderr, "reply of %zu bytes, attachment of %zu\n", reply.size,
                crpc_view_size(call.reply_attachment));
    }
    status = status == CRPC_OK || call.error.remote ? 0 : 1; /* a server's refusal can be measured */
    crpc_call_reset(&call);
    return status;
}

static int run(press *r)
{
    int64_t shown, next, now = now_ns();
    int status = CRPC_OK;

    r->start = shown = now;
    r->measured = now + (int64_t)(r->plan->warmup * 1e9);
    r->end = r->measured + (int64_t)(r->plan->duration * 1e9);
    next = now + SECOND;
    for (; !status && (now < r->end || r->in_flight); now = now_ns()) {
        int64_t until = next;
        if (interrupted && now < r->end) {
            r->end = now;
            r->measured = r->measured < now ? r->measured : now;
        }
        if (now < r->end) {
            begin_what_is_due(r, now);
            until = until < r->end ? until : r->end;
            if (r->plan->rate > 0 && r->free && due_ns(r, r->begun) < until) {
                until = due_ns(r, r->begun);
            }
        }
        status = step(r, until);
        now = now_ns();
        if (now >= next) {
            if (!r->plan->quiet) {
                print_second(r, now, shown);
            }
            shown = now;
            next += SECOND;
        }
    }
    if (status) {
        fprintf(stderr, "crpc_press: the loop failed: %s\n", crpc_status_name(status));
        return 1;
    }
    return 0;
}

/* Open loop: what was due and could not be sent has waited until the end. */
static void count_not_sent(press *r)
{
    for (; r->plan->rate > 0 && due_ns(r, r->begun) < r->end; r->begun++) {
        int64_t due = due_ns(r, r->begun);
        if (due >= r->measured) {
            r->not_sent++;
            hist_add(&r->total.latency, r->end - due, 1);
        }
    }
}

static bool prepare(press *r)
{
    const plan *p = r->plan;
    int i;

    r->channels = (crpc_channel **)calloc((size_t)p->connections, sizeof *r->channels);
    r->slots = (slot *)calloc((size_t)p->concurrency, sizeof *r->slots);
    if (!r->channels || !r->slots) {
        return false;
    }
    for (i = 0; i < p->concurrency; i++) {
        r->slots[i].run = r;
        r->slots[i].next = r->free;
        r->free = &r->slots[i];
    }
    r->method.service = p->service;
    r->method.name = p->method;
    r->method.request = &raw_request_msg;
    r->method.response = &raw_reply_msg;
    r->method.request_size = sizeof(raw_request);
    r->method.response_size = sizeof(raw_reply);
    r->request.bytes = crpc_view_of(p->payload.data, p->payload.size);
    r->call.policy.timeout_ms = p->timeout_ms;
    r->call.fields = &p->field;
    r->call.field_count = p->field.key != NULL;
    r->call.attachment = crpc_view_of(p->attachment.data, p->attachment.size);
    return true;
}

static int press_server(press *r)
{
    struct sigaction action = CRPC_INIT;
    crpc_loop_options options = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    int i, status;

    options.forbid_threads = 1;
    options.max_bytes = -1;
    status = crpc_loop_open(&r->loop, &options);
    if (status != CRPC_OK) {
        return explain(status, &error, "opening a loop");
    }
    loop_to_stop = r->loop;
    action.sa_handler = on_signal;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    prctl(PR_SET_TIMERSLACK, 1ul);
    status = open_channels(r);
    if (!status) {
        status = first_call(r);
    }
    if (!status) {
        status = crpc_loop_step(r->loop, 0) == CRPC_OK ? run(r) : 1;
    }
    if (!status) {
        count_not_sent(r);
        if (r->plan->json) {
            print_json(r);
        } else {
            print_text(r);
        }
        status = r->total.ok ? 0 : 1;
    }
    signal(SIGINT, SIG_DFL); /* the handler's loop is about to go */
    signal(SIGTERM, SIG_DFL);
    for (i = 0; i < r->plan->connections; i++) {
        crpc_channel_close(r->channels[i]);
    }
    crpc_loop_close(r->loop);
    return fflush(stdout) ? 1 : status;
}

int main(int argc, char **argv)
{
    static press r;
    static plan p;
    int status = parse(&p, argc, argv);

    r.plan = &p;
    if (!status) {
        status = prepare(&r) ? press_server(&r) : complain("starting", "out of memory");
    }
    free(r.channels);
    free(r.slots);
    free(p.payload.data);
    free(p.attachment.data);
    free((void *)(uintptr_t)p.field.key);
    return status;
}
