// A wire with a delay: what enters one end leaves the other NANOSECONDS later, in order.
//
//     delay_wire NANOSECONDS [NAMESPACE DEVICE NAMESPACE DEVICE]...        an end is a TAP device that is made in its namespace
//
// For kernels without netem. Rates are tc's business, on the same devices. Frames pass whole (up to 64 KB, checksums left to the
// other end), so that a large transfer costs few of them. Every wire has the same delay, so one queue holds all frames in order.
// Prints "ready" when all ends are there; ends at SIGTERM.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { ENDS = 512, FRAMES = 1 << 16, LARGEST = 70000 };
static struct frame { uint64_t due; int to, length; char *bytes; } queue[FRAMES];

static void fail(const char *what) { perror(what); exit(1); }

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int end(const char *space, const char *device) {
    char path[300];
    snprintf(path, sizeof path, "/run/netns/%s", space);
    int file = open(path, O_RDONLY), tap;
    if (file < 0 || setns(file, CLONE_NEWNET)) fail(path);
    close(file);
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    strncpy(request.ifr_name, device, IFNAMSIZ - 1);
    int header = sizeof(struct virtio_net_hdr);
    if ((tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK)) < 0 || ioctl(tap, TUNSETIFF, &request) || ioctl(tap, TUNSETVNETHDRSZ, &header) ||
        ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6))
        fail("/dev/net/tun");
    return tap;
}

int main(int count, char **words) {
    static struct pollfd ends[ENDS];
    static char bytes[LARGEST];
    if (count < 6 || (count - 2) % 4 || (count - 2) / 2 > ENDS) return 2;
    uint64_t delay = strtoull(words[1], 0, 10);
    int n = 0;
    for (int i = 2; i < count; i += 2) ends[n++] = (struct pollfd){.fd = end(words[i], words[i + 1]), .events = POLLIN};
    puts("ready");
    fflush(stdout);
    for (unsigned first = 0, last = 0;;) {
        uint64_t t = now();
        for (; first != last && queue[first % FRAMES].due <= t; first++, t = now()) {
            struct frame *f = &queue[first % FRAMES];
            if (write(ends[f->to].fd, f->bytes, f->length) < 0 && errno != EAGAIN && errno != EIO) fail("write"); // EIO: a device is down
            free(f->bytes);
        }
        uint64_t wait = first == last ? 1000000000 : queue[first % FRAMES].due - t;
        struct timespec most = {wait / 1000000000, wait % 1000000000};
        if (ppoll(ends, n, &most, 0) < 0 && errno != EINTR) fail("ppoll");
        for (int i = 0; i < n; i++)
            while (ends[i].revents & POLLIN) {
                ssize_t length = read(ends[i].fd, bytes, sizeof bytes);
                if (length <= 0) break;
                if (last - first == FRAMES) continue; // full: a lost frame, as on any wire
                struct frame *f = &queue[last++ % FRAMES];
                *f = (struct frame){now() + delay, i ^ 1, length, malloc(length)};
                memcpy(f->bytes, bytes, length);
            }
    }
}
