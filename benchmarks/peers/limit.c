/* Stores nothing: reads in bulk, acknowledges what each read brought with one write, and counts.
 * Draining, what is left is the broker. Live it reads each message at once, which is not the cheapest.
 * The count is kept in the file $PEER_COUNT as a native 64-bit integer. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void send_all(int sock, const uint8_t *data, size_t size) {
    while (size) {
        ssize_t sent = write(sock, data, size);
        if (sent <= 0) fail("write");
        data += sent;
        size -= (size_t)sent;
    }
}

int main(void) {
    static uint8_t in[1 << 18], out[1 << 18];
    const char *client = getenv("PEER_CLIENT"), *topic = getenv("PEER_TOPIC");
    int sock = socket(AF_INET, SOCK_STREAM, 0);
    int file = open(getenv("PEER_COUNT"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)atoi(getenv("PEER_PORT")))};
    inet_pton(AF_INET, getenv("PEER_HOST"), &address.sin_addr);
    if (file < 0 || connect(sock, (struct sockaddr *)&address, sizeof address)) fail("start");

    size_t n = strlen(client);
    uint8_t hello[256] = {0x10, (uint8_t)(12 + n), 0, 4, 'M', 'Q', 'T', 'T', 4, 0, 0, 0, 0, (uint8_t)n};
    memcpy(hello + 14, client, n);
    send_all(sock, hello, 14 + n);
    n = strlen(topic);
    uint8_t subscribe[256] = {0x82, (uint8_t)(5 + n), 0, 1, 0, (uint8_t)n};
    memcpy(subscribe + 6, topic, n);
    subscribe[6 + n] = 1;
    send_all(sock, subscribe, 7 + n);

    uint64_t count = 0;
    size_t have = 0;
    for (;;) {
        ssize_t got = read(sock, in + have, sizeof in - have);
        if (got <= 0) fail("read");
        have += (size_t)got;
        size_t at = 0, acks = 0;
        while (have - at >= 2) {
            size_t body = at + 1, length = 0;
            int shift = 0;
            while (body < have && in[body] & 0x80) {
                length |= (size_t)(in[body++] & 0x7f) << shift;
                shift += 7;
            }
            if (body == have) break;
            length |= (size_t)in[body++] << shift;
            if (body + length > have) break;
            if ((in[at] & 0xf6) == 0x32) {
                size_t id = body + 2 + ((size_t)in[body] << 8 | in[body + 1]);
                uint8_t ack[4] = {0x40, 2, in[id], in[id + 1]};
                memcpy(out + acks, ack, sizeof ack);
                acks += sizeof ack;
                count++;
            }
            at = body + length;
        }
        memmove(in, in + at, have -= at);
        send_all(sock, out, acks);
        if (pwrite(file, &count, sizeof count, 0) != sizeof count) fail("count");
    }
}
