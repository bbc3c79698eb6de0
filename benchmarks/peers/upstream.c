/* An emulated ElevenLabs that needs almost no CPU: one thread answers every call with a new signed URL, after a delay.
 *
 *     upstream DELAY_MS      listens on a free port of loopback, and prints the port
 *     GET /stats             returns the number of signed URLs
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { DESCRIPTORS = 1 << 16, WAITING = 1 << 17, REQUEST_BYTES = 4096, EVENTS = 512 };

typedef struct {
    char request[REQUEST_BYTES];
    int length, is_answering;
    unsigned generation; /* the kernel reuses descriptors: an answer for an old connection must not reach a new one */
} Connection;

typedef struct {
    int64_t due;
    int descriptor;
    unsigned generation;
} Answer;

static Connection *connections[DESCRIPTORS];
static Answer waiting[WAITING]; /* a ring buffer: the delay is the same for all calls, so the first call is due first */
static unsigned first, last;
static int64_t delay;
static uint64_t calls;
static int port, poller;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void close_connection(int descriptor) {
    connections[descriptor]->generation++;
    close(descriptor);
}

static void look_for_request(int descriptor);

static void answer(int descriptor) {
    Connection *connection = connections[descriptor];
    char body[1024], agent[128] = "", all[1536];
    const char *status = "200 OK";
    if (!strncmp(connection->request, "GET /v1/convai/conversation/get-signed-url?", 43)) {
        const char *found = strstr(connection->request, "agent_id=");
        if (found) sscanf(found, "agent_id=%127[A-Za-z0-9_-]", agent);
        unsigned long long number = ++calls;
        int is_named = strstr(connection->request, "include_conversation_id=true") != NULL;
        char id[64] = "", field[96] = "";
        if (is_named) {
            snprintf(id, sizeof id, "&conversation_id=conv_%d%012llu", port, number);
            snprintf(field, sizeof field, ",\"conversation_id\":\"conv_%d%012llu\"", port, number);
        }
        snprintf(body, sizeof body,
                 "{\"signed_url\":\"ws://127.0.0.1:%d/v1/convai/conversation?agent_id=%s"
                 "&conversation_signature=cvtkn_%040llx%s\"%s}",
                 port, agent, number * 0x9E3779B97F4A7C15ULL, id, field);
    } else if (!strncmp(connection->request, "GET /stats ", 11)) {
        snprintf(body, sizeof body, "{\"calls\":%llu}", (unsigned long long)calls);
    } else {
        status = "404 Not Found";
        snprintf(body, sizeof body, "{\"detail\":{\"status\":\"not_found\",\"message\":\"not here\"}}");
    }
    int length = snprintf(all, sizeof all,
                          "HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s", status,
                          strlen(body), body);
    char *end = strstr(connection->request, "\r\n\r\n") + 4;
    connection->length -= (int)(end - connection->request);
    memmove(connection->request, end, (size_t)connection->length + 1);
    connection->is_answering = 0;
    if (send(descriptor, all, (size_t)length, MSG_NOSIGNAL) != length)
        close_connection(descriptor);
    else
        look_for_request(descriptor);
}

/* Calls have no body. Bytes that arrive before the answer wait in the connection's buffer. */
static void look_for_request(int descriptor) {
    Connection *connection = connections[descriptor];
    if (connection->is_answering || !strstr(connection->request, "\r\n\r\n")) return;
    connection->is_answering = 1;
    if (!delay) {
        answer(descriptor);
        return;
    }
    if (last - first == WAITING) abort();
    waiting[last++ % WAITING] = (Answer){now() + delay, descriptor, connection->generation};
}

static void read_from(int descriptor) {
    Connection *connection = connections[descriptor];
    int room = REQUEST_BYTES - 1 - connection->length;
    ssize_t got = recv(descriptor, connection->request + connection->length, (size_t)room, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) {
        close_connection(descriptor);
        return;
    }
    connection->length += (int)got;
    connection->request[connection->length] = 0;
    look_for_request(descriptor);
}

static void accept_from(int listener) {
    int descriptor, one = 1;
    while ((descriptor = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        if (descriptor >= DESCRIPTORS) abort();
        if (!connections[descriptor]) connections[descriptor] = calloc(1, sizeof(Connection));
        connections[descriptor]->length = connections[descriptor]->is_answering = 0;
        setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event event = {.events = EPOLLIN, .data.fd = descriptor};
        epoll_ctl(poller, EPOLL_CTL_ADD, descriptor, &event);
    }
}

int main(int count, char **arguments) {
    if (count != 2) return fprintf(stderr, "usage: upstream DELAY_MS\n"), 2;
    delay = (int64_t)(atof(arguments[1]) * 1e6);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)) return perror("upstream"), 1;
    getsockname(listener, (struct sockaddr *)&address, &size);
    port = ntohs(address.sin_port);
    printf("%d\n", port);
    fflush(stdout);

    poller = epoll_create1(0);
    struct epoll_event events[EVENTS], event = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int64_t wait = first == last ? -1 : waiting[first % WAITING].due - now();
        struct timespec until = {.tv_sec = wait > 0 ? wait / 1000000000 : 0, .tv_nsec = wait > 0 ? wait % 1000000000 : 0};
        int ready = epoll_pwait2(poller, events, EVENTS, first == last ? NULL : &until, NULL);
        for (int i = 0; i < ready; i++)
            events[i].data.fd == listener ? accept_from(listener) : read_from(events[i].data.fd);
        for (int64_t time = now(); first != last && waiting[first % WAITING].due <= time;) {
            Answer due = waiting[first++ % WAITING];
            if (connections[due.descriptor]->generation == due.generation) answer(due.descriptor);
        }
    }
}
