/* Requests passes from a server on loopback over keep-alive connections, and prints how long they took.
 *
 *     load PORT CONNECTIONS SECONDS RATE REQUEST TOKENS
 *
 * With RATE 0, every connection sends its next request as soon as it has its answer (closed loop). With another RATE,
 * RATE requests a second start at random times (open loop, Poisson). If no connection is idle, a request waits, and its
 * wait counts. "{token}" in REQUEST becomes the next line of the file TOKENS. After SECONDS no request is sent, and
 * requests in flight get DRAIN_SECONDS. "per_second" is the answers within SECONDS, divided by the time of the last of
 * them; median and p99 are those of all answers.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ANSWER_BYTES = 8192, REQUEST_BYTES = 4096, EVENTS = 512, MAX_CONNECTIONS = 10000, MAX_TOKENS = 1 << 17 };
static const double DRAIN_SECONDS = 5;

typedef struct {
    int descriptor, length, is_asking;
    double since;
    char answer[ANSWER_BYTES];
} Connection;

static Connection *connections, *idle[MAX_CONNECTIONS];
static char *before, *after, *tokens[MAX_TOKENS];
static int port, poller, token_count, connection_count;
static unsigned long next_token, first_idle, last_idle, asking, answered, answered_in_time, refused, errors;
static double seconds, rate, begun, last_answer, *took, *arrivals;
static unsigned long took_room, first_arrival, last_arrival, arrival_room;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void open_connection(Connection *connection) {
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1;
    connection->descriptor = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(connection->descriptor, (struct sockaddr *)&address, sizeof address)) {
        perror("load: connect");
        exit(1);
    }
    setsockopt(connection->descriptor, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    connection->length = connection->is_asking = 0;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
    epoll_ctl(poller, EPOLL_CTL_ADD, connection->descriptor, &event);
}

static void reopen(Connection *connection) {
    close(connection->descriptor);
    open_connection(connection);
}

static void ask(Connection *connection, double since) {
    char request[REQUEST_BYTES];
    int length = snprintf(request, sizeof request, "%s%s%s", before, tokens[next_token++ % (unsigned)token_count], after);
    connection->is_asking = 1;
    connection->since = since;
    asking++;
    if (send(connection->descriptor, request, (size_t)length, MSG_NOSIGNAL) != length)
        shutdown(connection->descriptor, SHUT_RDWR); /* epoll reports it, and read_from counts it */
}

static void continue_or_idle(Connection *connection, double time) {
    if (rate == 0 && time < begun + seconds)
        ask(connection, time);
    else if (first_arrival != last_arrival)
        ask(connection, arrivals[first_arrival++]);
    else
        idle[last_idle++ % MAX_CONNECTIONS] = connection; /* the longest idle one is next: none times out */
}

/* Whether the answer is whole: by its length, or by its last chunk. */
static int is_whole(const Connection *connection) {
    const char *end = strstr(connection->answer, "\r\n\r\n");
    if (!end) return 0;
    const char *length = strcasestr(connection->answer, "\r\ncontent-length:");
    if (length && length < end)
        return connection->length >= end + 4 - connection->answer + atoi(length + 17);
    return connection->length >= 5 && !strcmp(connection->answer + connection->length - 5, "0\r\n\r\n");
}

static void count_answer(Connection *connection, double time) {
    connection->is_asking = 0;
    asking--;
    if (strncmp(connection->answer + 8, " 200 ", 5)) {
        if (!refused++) fprintf(stderr, "load: %s\n", connection->answer);
        return;
    }
    if (answered == took_room) took = realloc(took, (took_room = took_room * 2 + 1024) * sizeof *took);
    took[answered++] = time - connection->since;
    if (time < begun + seconds) {
        answered_in_time++;
        last_answer = time;
    }
}

static void read_from(Connection *connection) {
    int room = ANSWER_BYTES - 1 - connection->length;
    ssize_t got = recv(connection->descriptor, connection->answer + connection->length, (size_t)room, 0);
    if (got <= 0) {
        int was_asking = connection->is_asking;
        reopen(connection);
        if (was_asking) {
            asking--;
            if (!errors++) fprintf(stderr, "load: connection closed (%s)\n", got ? strerror(errno) : "end of stream");
            continue_or_idle(connection, now());
        }
        return;
    }
    connection->length += (int)got;
    connection->answer[connection->length] = 0;
    if (!is_whole(connection)) return;
    double time = now();
    count_answer(connection, time);
    connection->length = 0;
    continue_or_idle(connection, time);
}

/* Sends the requests that are due by now; returns when the next one is due. */
static double send_due_requests(double time) {
    static double next;
    if (!next) next = begun;
    for (; next < time && next < begun + seconds; next -= log(1 - drand48()) / rate) {
        if (first_idle != last_idle) {
            ask(idle[first_idle++ % MAX_CONNECTIONS], next);
            continue;
        }
        if (last_arrival == arrival_room)
            arrivals = realloc(arrivals, (arrival_room = arrival_room * 2 + 1024) * sizeof *arrivals);
        arrivals[last_arrival++] = next;
    }
    return next;
}

static int compare(const void *a, const void *b) {
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

static double percentile(double part) {
    return answered ? took[(unsigned long)(part * (double)(answered - 1))] * 1000 : NAN;
}

int main(int count, char **arguments) {
    if (count != 7) return fprintf(stderr, "usage: load PORT CONNECTIONS SECONDS RATE REQUEST TOKENS\n"), 2;
    port = atoi(arguments[1]);
    connection_count = atoi(arguments[2]);
    seconds = atof(arguments[3]);
    rate = atof(arguments[4]);
    before = arguments[5];
    if (!(after = strstr(before, "{token}")) || connection_count > MAX_CONNECTIONS) return 2;
    *after = 0;
    after += strlen("{token}");
    FILE *file = fopen(arguments[6], "r");
    char line[REQUEST_BYTES / 2];
    while (file && token_count < MAX_TOKENS && fscanf(file, "%2047s", line) == 1) tokens[token_count++] = strdup(line);
    if (!token_count) return perror("load: tokens"), 2;

    poller = epoll_create1(0);
    srand48((long)time(NULL));
    next_token = (unsigned long)(drand48() * token_count); /* else every round would use the same users */
    connections = calloc((size_t)connection_count, sizeof *connections);
    for (int i = 0; i < connection_count; i++) open_connection(&connections[i]);
    begun = last_answer = now();
    for (int i = 0; i < connection_count; i++) continue_or_idle(&connections[i], begun);
    struct epoll_event events[EVENTS];
    for (double time = begun; time < begun + seconds || (asking && time < begun + seconds + DRAIN_SECONDS); time = now()) {
        double wait = rate ? send_due_requests(time) - time : 0.01;
        struct timespec until = {.tv_nsec = wait > 0.01 ? 10000000 : wait > 0 ? (long)(wait * 1e9) : 0};
        int ready = epoll_pwait2(poller, events, EVENTS, &until, NULL);
        for (int i = 0; i < ready; i++) read_from(events[i].data.ptr);
    }
    qsort(took, answered, sizeof *took, compare);
    printf("{\"answered\": %lu, \"per_second\": %.3f, \"median_ms\": %.4f, \"p99_ms\": %.4f, \"refused\": %lu, "
           "\"errors\": %lu, \"unanswered\": %lu}\n",
           answered, answered_in_time ? (double)answered_in_time / (last_answer - begun) : 0, percentile(0.5),
           percentile(0.99), refused, errors, asking + (last_arrival - first_arrival));
    return 0;
}
